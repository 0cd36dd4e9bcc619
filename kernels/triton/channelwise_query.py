"""Queries for products with keys whose channels differ in bits, in Triton, before attention.

A tile of queries is written with a row for each bit of a token, its channel times the power of two of the bit: what
is left to do for a page is to multiply by its steps. The result is `BitQueries`.

**Range.** Rows are multiplied by steps in fp16. So queries are divided by a power of two above their largest channel,
which scores are multiplied by again (``factor``). A step times the power of any of its bits is below 92800, for a step
is at most 61440 and a range 131008; half of that fits fp16. What underflows changes a key by less than 2 ** -18, as
fp16 would one of the size of 2 ** -7.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvq_compile.kernels import channelwise_scheme
from kvq_compile.kernels.triton.arguments import Calibration, Strided
from kvq_compile.kernels.triton.channelwise import (
    BLOCK_ROWS,
    MAX_WIDTH,
    BitQueries,
    block_words,
    half_levels_of,
    load_widths,
    row_of,
    tile_of,
)
from kvq_compile.kernels.triton.constants import ReadConstants
from kvq_compile.kernels.triton.mixed import power_of_2
from kvq_compile.kernels.triton.primitives import tile_columns
from kvq_compile.kernels.triton.query import TOKENS, CodedQuery
from kvq_compile.kernels.triton.transforms import cosine_and_sine, load_table

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
def _load_query(where, channel, exists, tables, KEY: tl.constexpr):
    """Return coded channels of queries ``[channels, columns]``, fp32, and what the table of means adds to scores."""
    ok = (channel < KEY.head_dim)[:, None] & exists[None, :]
    order = channel
    if KEY.has_tables:
        order = load_table(tables, channel, channel < KEY.head_dim, "order", KEY)
    q = tl.load(where[None, :] + order[:, None], mask=ok, other=0.0).to(tl.float32)
    bias = tl.zeros(exists.shape, tl.float32)
    if KEY.has_tables:
        real = channel < KEY.head_dim
        bias = tl.sum(q * load_table(tables, channel, real, "mean", KEY)[:, None], 0)
        q = q * load_table(tables, channel, real, "scale", KEY)[:, None]
    return q, bias


@triton.jit
def _write_mean_queries(
    where, tail, out, exists, factor, tables, KEY: tl.constexpr, BLOCK_Q: tl.constexpr
):
    """Write what the mean of keys adds to scores, for cosine and sine of the angle of each pair: see `start_mean`."""
    HALF: tl.constexpr = KEY.head_dim // 2
    PLACES: tl.constexpr = KEY.mean_places
    pair = tl.arange(0, PLACES)
    real = pair < KEY.mean_pairs
    first = tl.where(real, pair, KEY.head_dim)  # of places without a pair there is no channel
    q_a, _bias = _load_query(where, first, exists, tables, KEY)
    q_b, _bias = _load_query(where, first + HALF, exists, tables, KEY)
    mean = tail + (KEY.query_rows + 1) * KEY.head_dim + pair
    a = tl.load(mean, mask=real, other=0.0).to(tl.float32)[:, None]
    b = tl.load(mean + HALF, mask=real, other=0.0).to(tl.float32)[:, None]
    to = out + pair[:, None] * BLOCK_Q + tl.arange(0, BLOCK_Q)[None, :]
    tl.store(to, (q_a * a + q_b * b) * factor[None, :])
    tl.store(to + PLACES * BLOCK_Q, (q_b * a - q_a * b) * factor[None, :])


@triton.jit
def _write_angles(out, tables, block, KEY: tl.constexpr, TOKENS: tl.constexpr):
    """Write cosine and sine of the angles of ``TOKENS`` tokens of a page, ``[tokens, 2, places]``."""
    PLACES: tl.constexpr = KEY.mean_places
    pair = tl.arange(0, PLACES)
    frequency = load_table(tables, pair, pair < KEY.mean_pairs, "frequency", KEY)
    token = block * TOKENS + tl.arange(0, TOKENS)
    cosine, sine = cosine_and_sine(token[:, None] * frequency[None, :])
    where = out + token[:, None] * (2 * PLACES) + pair[None, :]
    tl.store(where, cosine.to(out.dtype.element_ty))
    tl.store(where + PLACES, sine.to(out.dtype.element_ty))


@triton.jit
def expand_query_kernel(
    query, exact, exact_head, calibration, out, bias, scale, kv_heads, tokens, tiles,
    KEY: tl.constexpr, LAUNCH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Write the `BitQueries` of one tile of queries of a KV head; or angles of ``TOKENS`` tokens of a page.

    Grid: (B * Hkv, tiles, then, where keys have a mean, page_size / TOKENS).
    """
    head, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tables = calibration.tables
    if KEY.has_tables:
        tables += head % kv_heads * calibration.words
    if tile < tiles:
        tail = exact + head * exact_head + exact_head - KEY.tail_rows * KEY.head_dim
        _expand_query(
            query, tail, tables, out, bias, scale, head, kv_heads, tokens, tiles, KEY, LAUNCH
        )
    elif KEY.takes_mean and head < kv_heads:
        angles = out.angles + head * (KEY.page_size * 2 * KEY.mean_places)
        _write_angles(angles, tables, tile - tiles, KEY, TOKENS)


@triton.jit
def _expand_query(
    query, tail, tables, out, bias, scale, head, kv_heads, tokens, tiles, KEY: tl.constexpr,
    LAUNCH: tl.constexpr,
):  # fmt: skip
    """Write the `BitQueries` of one tile of queries of a head."""
    BLOCKS: tl.constexpr = KEY.bit_blocks
    BLOCK_Q: tl.constexpr = LAUNCH.block_q
    D_PAD: tl.constexpr = triton.next_power_of_2(KEY.head_dim)
    number, q_head, token, _group, exists = tile_columns(
        tl.program_id(1), head % kv_heads, tokens, LAUNCH
    )
    where = query.pointer + head // kv_heads * query.batch
    where = where + q_head * query.head + token * query.token
    out = tile_of(out, head, kv_heads, tiles, KEY, LAUNCH)
    _clear(out, BLOCKS, BLOCK_Q)

    channel, column = tl.arange(0, D_PAD), tl.arange(0, BLOCK_Q)
    q, offset = _load_query(where, channel, exists, tables, KEY)
    if KEY.has_tables:
        row = head * (LAUNCH.shared_by * tokens) + number
        tl.store(bias + row, offset, mask=exists)
    q = q * scale
    tl.store(out.plain + column[None, :] * D_PAD + channel[:, None], q)
    exponent = (tl.max(tl.abs(q), 0).to(tl.int32, bitcast=True) >> 23) - 126
    exponent = tl.minimum(tl.maximum(exponent, -100), 100)
    tl.store(out.factor + column, power_of_2(exponent - HALF + (19 if LAUNCH.fast else 0)))
    if KEY.takes_mean:
        quarter = power_of_2(-exponent - 2) * scale
        _write_mean_queries(where, tail, out.mean, exists, quarter, tables, KEY, BLOCK_Q)
    q = q * power_of_2(-exponent)[None, :]

    width = load_widths(tail, channel, KEY)
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


def expand_query(
    query: Strided, exact: Tensor, calibration: Calibration, tiles: int, tokens: int, scale: float,
    key: ReadConstants, launch: Any,
) -> CodedQuery:  # fmt: skip
    """Return the queries of a call with their `BitQueries`.

    Args:
        query: Queries ``[B, Hq, T, D]``.
        exact: Exact rows of the keys.
        calibration: Tables of the keys.
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
    plain = exact.new_empty(B * H, tiles, columns, D_pad, dtype=torch.float32)
    out = BitQueries(
        exact.new_empty(B * H, tiles, key.bit_blocks, rows, columns, dtype=dtype),
        exact.new_empty(B * H, key.bit_blocks, rows, dtype=torch.int32),
        plain,
        plain.new_empty(B * H, D_pad),
        plain.new_empty(B * H, tiles, columns),
        plain.new_empty(B * H, tiles, 2, key.mean_places, columns) if key.takes_mean else None,
        exact.new_empty(H, key.page_size, 2, key.mean_places, dtype=dtype)
        if key.takes_mean
        else None,
    )
    bias = plain.new_empty(B * H * launch.shared_by * tokens) if key.has_tables else None
    programs = tiles + (key.page_size // TOKENS if key.takes_mean else 0)
    expand_query_kernel[(B * H, programs)](
        query, exact, exact.stride(1), calibration, out, bias, scale, H, tokens, tiles, KEY=key, LAUNCH=launch,
        TOKENS=TOKENS,
    )  # fmt: skip
    return CodedQuery(query, bias, None, out)
