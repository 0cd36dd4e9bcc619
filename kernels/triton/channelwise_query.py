"""Queries for products with keys whose channels differ in bits, in Triton, before attention.

A tile of queries is written with a row for each bit of a token, its channel times the power of two of the bit: what
is left to do for a page is to multiply by its steps. The result is `BitQueries`.

**Range.** Rows are multiplied by steps in fp16. So queries are divided by a power of two above their largest channel,
which scores are multiplied by again (``factor``). A step times the power of any of its bits is below 92800, for a step
is at most 61440 and a range 131008; half of that fits fp16. What underflows changes a key by less than 2 ** -18, as
fp16 would one of the size of 2 ** -7.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvq_compile.kernels import channelwise_scheme
from kvq_compile.kernels.triton.arguments import Strided
from kvq_compile.kernels.triton.channelwise import (
    BLOCK_ROWS,
    MAX_WIDTH,
    BitQueries,
    block_words,
    half_levels_of,
    load_widths,
    row_of,
)
from kvq_compile.kernels.triton.constants import ReadConstants
from kvq_compile.kernels.triton.mixed import power_of_2
from kvq_compile.kernels.triton.primitives import tile_columns

HALF = tl.constexpr(-1)  # exponent of what makes room


@triton.jit
def _clear(out, BLOCKS: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Write zeros to all rows and channels of a tile."""
    row = tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, BLOCK_Q)[None, :]
    for block in range(BLOCKS):
        at = block * BLOCK_ROWS + row
        nothing = tl.zeros((BLOCK_ROWS, BLOCK_Q), tl.float32).to(out.rows.dtype.element_ty)
        tl.store(out.rows + at[:, None] * BLOCK_Q + column, nothing)
        tl.store(out.channel + at, tl.zeros((BLOCK_ROWS,), tl.int32))
    tl.debug_barrier()


@triton.jit
def _field_exponent(field, FAST: tl.constexpr):
    """Return the exponent of what rows of a field are multiplied by, for bits read as numbers that are not equal: see
    `channelwise._read_bits`.
    """
    if FAST:
        exponent = tl.where(field < 5, -1 - field, tl.where(field < 11, 5 - field, 10 - field))
    else:
        exponent = field * 0
    return exponent


@triton.jit
def expand_query_kernel(
    query, exact, out, scale, shape, KEY: tl.constexpr, LAUNCH: tl.constexpr
):  # fmt: skip
    """Write the `BitQueries` of one tile of queries of a KV head.

    Grid: (B * Hkv, tiles).
    """
    BLOCKS: tl.constexpr = KEY.bit_blocks
    BLOCK_Q: tl.constexpr = LAUNCH.block_q
    D_PAD: tl.constexpr = triton.next_power_of_2(KEY.head_dim)
    head = tl.program_id(0).to(tl.int64)
    tile = head * tl.num_programs(1) + tl.program_id(1)
    kv_head = head % shape.kv_heads
    _column, q_head, token, _group, exists = tile_columns(
        tl.program_id(1), kv_head, shape.tokens, LAUNCH
    )
    rows = head // shape.kv_heads * query.batch + q_head * query.head + token * query.token
    out = BitQueries(
        out.rows + tile * (BLOCKS * BLOCK_ROWS * BLOCK_Q), out.channel + head * (BLOCKS * BLOCK_ROWS),
        out.plain + tile * (D_PAD * BLOCK_Q), out.half_levels + head * D_PAD,
        out.factor + tile * BLOCK_Q,
    )  # fmt: skip
    _clear(out, BLOCKS, BLOCK_Q)

    channel, column = tl.arange(0, D_PAD), tl.arange(0, BLOCK_Q)
    ok = (channel < KEY.head_dim)[:, None] & exists[None, :]
    q = tl.load(query.pointer + rows[None, :] + channel[:, None], mask=ok, other=0.0)
    q = q.to(tl.float32) * scale
    tl.store(out.plain + channel[:, None] * BLOCK_Q + column[None, :], q)
    exponent = (tl.max(tl.abs(q), 0).to(tl.int32, bitcast=True) >> 23) - 126
    exponent = tl.minimum(tl.maximum(exponent, -100), 100)
    tl.store(out.factor + column, power_of_2(exponent - HALF + (19 if LAUNCH.fast else 0)))
    q = q * power_of_2(-exponent)[None, :]

    width = load_widths(exact + head * (KEY.exact_rows * KEY.head_dim), channel, KEY)
    tl.store(out.half_levels + channel, half_levels_of(width))
    first = tl.cumsum(width, 0) - width
    for bit in tl.static_range(MAX_WIDTH):
        number = first + bit
        has = (bit < width) & (number < KEY.bit_rows)
        block, inside = number // BLOCK_ROWS, number % BLOCK_ROWS
        words = block_words(block, KEY)
        field, word = inside // words, inside % words
        at = row_of(block, field, word)
        row = q * power_of_2(_field_exponent(field, LAUNCH.fast) + bit + HALF)[:, None]
        where = out.rows + at[:, None] * BLOCK_Q + column[None, :]
        tl.store(where, row.to(out.rows.dtype.element_ty), mask=has[:, None])
        tl.store(out.channel + at, channel, mask=has)


class Shape(NamedTuple):
    """KV heads and query tokens of a call."""

    kv_heads: Any
    tokens: Any


def expand_query(
    query: Strided, exact: Tensor, tiles: int, tokens: int, scale: float, key: ReadConstants,
    launch: Any,
) -> BitQueries:  # fmt: skip
    """Return the `BitQueries` of a call.

    Args:
        query: Queries ``[B, Hq, T, D]``.
        exact: Exact rows of the keys.
        tiles: Tiles of queries of a KV head.
        tokens: Query tokens.
        scale: Factor on scores.
        key: Constants of the keys.
        launch: The `AttendConstants`.
    """
    B, H = exact.shape[:2]
    rows, columns = channelwise_scheme.BLOCK_WORDS * 16, launch.block_q
    D_pad = triton.next_power_of_2(key.head_dim)
    dtype = torch.float32 if launch.dtype == tl.float32 else torch.float16
    plain = exact.new_empty(B * H, tiles, D_pad, columns, dtype=torch.float32)
    out = BitQueries(
        exact.new_empty(B * H, tiles, key.bit_blocks, rows, columns, dtype=dtype),
        exact.new_empty(B * H, key.bit_blocks, rows, dtype=torch.int32),
        plain,
        plain.new_empty(B * H, D_pad),
        plain.new_empty(B * H, tiles, columns),
    )
    expand_query_kernel[(B * H, tiles)](
        query, exact, out, scale, Shape(H, tokens), KEY=key, LAUNCH=launch
    )
    return out
