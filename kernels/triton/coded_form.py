"""The tokens of a page that is being quantized, in Triton: their source, and their transform before quantization.

The tokens are rows of the ring, followed by new tokens. If the layout transforms tokens before quantization, the
transformed page, the *coded form*, is first written to fp32 scratch memory ``[page_size, head_dim]``.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kvq_compile.kernels.triton.transforms import (
    hadamard,
    load_table,
    normalize,
    rotary_angle,
    rotated_mean,
)


class Source(NamedTuple):
    """Source of the tokens of a page of one KV head.

    Attributes:
        new, stride: New tokens, and how far apart they lie.
        exact, tail: Exact rows of the cache, and the last of them.
        first: Slot of the page's first token.
        start: Slot of the first new token; tokens before it lie in the ring.
    """

    new: Any
    stride: Any
    exact: Any
    tail: Any
    first: Any
    start: Any


@triton.jit
def ring_row(slot, CONSTANTS: tl.constexpr):
    """Return the rows of ``exact`` that tokens behind the sinks lie in while they are recent."""
    return CONSTANTS.sinks + (slot - CONSTANTS.sinks) % CONSTANTS.ring


@triton.jit
def read_tokens(source, token, channel, exists, CONSTANTS: tl.constexpr):
    """Return channels of the page's tokens from ring or new tokens, fp32."""
    slot = source.first + token
    recent = slot < source.start
    where = ring_row(slot, CONSTANTS) * CONSTANTS.head_dim + channel
    held = tl.load(source.exact + where, mask=exists & recent, other=0.0)
    new = (slot - source.start).to(tl.int64) * source.stride
    fresh = tl.load(source.new + new + channel, mask=exists & (slot >= source.start), other=0.0)
    return tl.where(recent, held.to(tl.float32), fresh.to(tl.float32))


@triton.jit
def write_coded_form(source, scratch, calibration, CONSTANTS: tl.constexpr, TILE: tl.constexpr):
    """Write the coded form of the page to scratch memory."""
    HEAD_DIM: tl.constexpr = CONSTANTS.head_dim
    tables = calibration.tables
    # of rotary keys, one of the two channels of a pair
    CHANNELS: tl.constexpr = HEAD_DIM // 2 if CONSTANTS.rotary else HEAD_DIM
    channel = tl.arange(0, triton.next_power_of_2(CHANNELS))[None, :]
    ROWS: tl.constexpr = min(CONSTANTS.page_size, max(1, TILE // triton.next_power_of_2(HEAD_DIM)))
    for block in range(0, CONSTANTS.page_size, ROWS):
        token = block + tl.arange(0, ROWS)[:, None]
        inside = channel < CHANNELS
        exists = (token < CONSTANTS.page_size) & inside
        order = channel
        if CONSTANTS.has_tables:
            order = load_table(tables, channel, inside, "order", CONSTANTS)
        y = read_tokens(source, token, order, exists, CONSTANTS)
        where = scratch + token * HEAD_DIM + channel
        if CONSTANTS.rotary:
            other = load_table(tables, channel + CHANNELS, inside, "order", CONSTANTS)
            z = read_tokens(source, token, other, exists, CONSTANTS)
            cosine, sine = rotary_angle(
                source.first + token, channel, inside, calibration, CONSTANTS
            )
            y, z = y * cosine + z * sine, z * cosine - y * sine
            z = normalize(z, tables, channel + CHANNELS, inside, CONSTANTS)
            tl.store(where + CHANNELS, z, mask=exists)
        if CONSTANTS.has_tables:
            y = normalize(y, tables, channel, inside, CONSTANTS)
        if CONSTANTS.takes_mean:
            slot = source.first + token
            y = y - rotated_mean(source.tail, slot, channel, inside, tables, CONSTANTS)
        if CONSTANTS.transform == "hadamard":
            y = hadamard(y, HEAD_DIM)
        tl.store(where, y, mask=exists)


@triton.jit
def load_coded(source, scratch, token, channel, exists, CONSTANTS: tl.constexpr):
    """Return channels of the coded form of the page's tokens, fp32."""
    if CONSTANTS.in_coded_form:
        return tl.load(scratch + token * CONSTANTS.head_dim + channel, mask=exists, other=0.0)
    else:
        return read_tokens(source, token, channel, exists, CONSTANTS)
