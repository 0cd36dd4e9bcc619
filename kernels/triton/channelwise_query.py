"""Queries for products with keys whose channels differ in bits, in Triton, before attention.

A tile of queries is written with a row for each field of a token, its channel times the power of four of the digit:
what is left to do for a page is to multiply by its steps. Where there are few queries, what the lowest codes of each
page add to scores is computed here too, by programs of their own. The result is `FieldQueries`.

**Range.** Rows are multiplied by steps in fp16. So queries are divided by a power of two above their largest channel,
which scores are multiplied by again (``factor``). A step times the power of any of its bits is below 92800, for a step
is at most 61440 and a range 131008; half of that fits fp16. What underflows changes a key by less than 2 ** -18, as
fp16 would one of the size of 2 ** -7. Factors of the mean have an exponent of their own.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import Packed
from kvq_compile.kernels.triton.arguments import (
    Calibration,
    Strided,
    bundle_cache,
    cursor_of,
    exact_rows,
)
from kvq_compile.kernels.triton.channelwise import (
    MAX_WIDTH,
    UNIT,
    FieldQueries,
    field_exponent,
    field_place,
    first_fields,
    half_levels_of,
    holds_queries,
    load_center,
    load_widths,
    lowest_value,
    row_of,
    tile_of,
)
from kvq_compile.kernels.triton.constants import ReadConstants
from kvq_compile.kernels.triton.formats import e5m3_value
from kvq_compile.kernels.triton.mixed import power_of_2
from kvq_compile.kernels.triton.primitives import tile_columns
from kvq_compile.kernels.triton.query import TOKENS, CodedQuery
from kvq_compile.kernels.triton.transforms import cosine_and_sine, load_table

HALF = tl.constexpr(-1)  # exponent of what makes room
PAGES = tl.constexpr(32)  # whose constants a program computes


@triton.jit
def _clear(out, UNITS: tl.constexpr, BLOCK_Q: tl.constexpr):
    """Write zeros to all rows and channels of a tile."""
    row = tl.arange(0, UNIT)
    column = tl.arange(0, BLOCK_Q)[None, :]
    for unit in range(UNITS):
        at = unit * UNIT + row
        nothing = tl.zeros((UNIT, BLOCK_Q), tl.float32).to(out.rows.dtype.element_ty)
        tl.store(out.rows + at[:, None] * BLOCK_Q + column, nothing)
        tl.store(out.channel + at, tl.zeros((UNIT,), tl.int32))
    tl.debug_barrier()


@triton.constexpr_function
def _factor_exponent(fast):
    """Return the exponent of what products are multiplied by because of `HALF`, and on NVIDIA hardware because a bit at
    place 4 reads as ``2 ** -20``.
    """
    return (20 if fast else 0) - HALF.value


@triton.jit
def _exponent_above(x):
    """Return exponents of powers of two above ``x`` (fp32, not negative), within 100 of 0."""
    exponent = (x.to(tl.int32, bitcast=True) >> 23) - 126
    return tl.minimum(tl.maximum(exponent, -100), 100)


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
    where, tail, out, exists, exponent, scale, tables, KEY: tl.constexpr, BLOCK_Q: tl.constexpr
):
    """Write what the mean of keys adds to scores, for cosine and sine of the angle of each pair: see `start_mean`.

    Products with rows are ``2 ** exponent`` times too small, ``[columns]``.
    """
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
    column = tl.arange(0, BLOCK_Q)
    to = out.mean + pair[:, None] * BLOCK_Q + column[None, :]
    along, across = q_a * a + q_b * b, q_b * a - q_a * b
    own = _exponent_above(tl.maximum(tl.max(tl.abs(along), 0), tl.max(tl.abs(across), 0)))
    tl.store(to, along * power_of_2(-own)[None, :])
    tl.store(to + PLACES * BLOCK_Q, across * power_of_2(-own)[None, :])
    tl.store(
        out.ratio + column, power_of_2(tl.minimum(tl.maximum(own - exponent, -126), 126)) * scale
    )


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
def _write_constants(
    query, cache, tables, out, scale, head, room, kv_heads, tokens, block, KEY: tl.constexpr,
    LAUNCH: tl.constexpr,
):  # fmt: skip
    """Write what the lowest codes of ``PAGES`` pages of a head add to the scores of each query."""
    D_PAD: tl.constexpr = max(16, triton.next_power_of_2(KEY.head_dim))  # what a product takes
    page = block * PAGES + tl.arange(0, PAGES)
    channel, column = tl.arange(0, D_PAD), tl.arange(0, LAUNCH.block_q)
    pages = tl.load(cursor_of(cache, head // kv_heads, KEY) + 1)
    _number, where, exists = _query_columns(query, head, 0, kv_heads, tokens, LAUNCH)
    q, _bias = _load_query(where, channel, exists, tables, KEY)
    width = load_widths(tail_of_head(cache, head, KEY), channel, KEY)
    there = page < pages
    ok = there[:, None] & (channel < KEY.head_dim)[None, :]
    params = cache.params + ((head * room + page) * KEY.page_params)[:, None]
    size = e5m3_value(tl.load(params + channel[None, :], mask=ok, other=0).to(tl.int32))
    center = load_center(params, channel[None, :], ok, KEY)
    low = lowest_value(size, center, half_levels_of(width)[None, :])
    constant = tl.dot(low, q * scale, input_precision=LAUNCH.precision)
    where = out + ((head * room + page) * LAUNCH.block_q)[:, None]
    tl.store(where + column[None, :], constant, mask=there[:, None])


@triton.jit
def tail_of_head(cache, head, KEY: tl.constexpr):
    """Return a pointer to the tail of the exact rows of a head (int64)."""
    return exact_rows(cache, head) + (cache.exact_head - KEY.tail_rows * KEY.head_dim)


@triton.jit
def _query_columns(query, head, tile, kv_heads, tokens, LAUNCH: tl.constexpr):
    """Return the numbers of a tile's queries among those of the KV head, where they lie, and whether there are such."""
    number, q_head, token, _group, exists = tile_columns(tile, head % kv_heads, tokens, LAUNCH)
    where = query.pointer + head // kv_heads * query.batch
    return number, where + q_head * query.head + token * query.token, exists


@triton.jit(do_not_specialize=["room"])
def expand_query_kernel(
    query, cache, calibration, out, bias, scale, room, kv_heads, tokens, tiles,
    KEY: tl.constexpr, LAUNCH: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Write the `FieldQueries` of one tile of queries of a KV head; or angles of ``TOKENS`` tokens of a page; or
    constants of some pages.

    Grid: (B * Hkv, tiles, then, where keys have a mean, page_size / TOKENS, then programs for all pages).
    """
    ANGLES: tl.constexpr = KEY.page_size // TOKENS if KEY.takes_mean else 0
    head, tile = tl.program_id(0).to(tl.int64), tl.program_id(1)
    tables = calibration.tables
    if KEY.has_tables:
        tables += head % kv_heads * calibration.words
    if tile < tiles:
        _expand_query(
            query, cache, tables, out, bias, scale, head, room, kv_heads, tokens, tiles, KEY, LAUNCH
        )
    elif tile < tiles + ANGLES:
        if KEY.takes_mean and head < kv_heads:
            angles = out.angles + head * (KEY.page_size * 2 * KEY.mean_places)
            _write_angles(angles, tables, tile - tiles, KEY, TOKENS)
    elif holds_queries(KEY, LAUNCH):
        _write_constants(
            query, cache, tables, out.constant, scale, head, room, kv_heads, tokens,
            tile - tiles - ANGLES, KEY, LAUNCH,
        )  # fmt: skip


@triton.jit
def _expand_query(
    query, cache, tables, out, bias, scale, head, room, kv_heads, tokens, tiles, KEY: tl.constexpr,
    LAUNCH: tl.constexpr,
):  # fmt: skip
    """Write the `FieldQueries` of one tile of queries of a head."""
    BLOCK_Q: tl.constexpr = LAUNCH.block_q
    D_PAD: tl.constexpr = triton.next_power_of_2(KEY.head_dim)
    number, where, exists = _query_columns(query, head, tl.program_id(1), kv_heads, tokens, LAUNCH)
    out = tile_of(out, head, kv_heads, tiles, room, KEY, LAUNCH)
    _clear(out, KEY.bit_blocks + KEY.twice_read, BLOCK_Q)

    channel, column = tl.arange(0, D_PAD), tl.arange(0, BLOCK_Q)
    q, offset = _load_query(where, channel, exists, tables, KEY)
    if KEY.has_tables:
        tl.store(bias + head * (LAUNCH.shared_by * tokens) + number, offset, mask=exists)
    q = q * scale
    exponent = _exponent_above(tl.max(tl.abs(q), 0))
    FACTOR: tl.constexpr = _factor_exponent(LAUNCH.fast)
    tl.store(out.factor + column, power_of_2(exponent + FACTOR))
    tail = tail_of_head(cache, head, KEY)
    if KEY.takes_mean:
        rows = exponent + FACTOR
        _write_mean_queries(where, tail, out, exists, rows, scale, tables, KEY, BLOCK_Q)
    width = load_widths(tail, channel, KEY)
    if not holds_queries(KEY, LAUNCH):
        tl.store(out.plain + column[None, :] * D_PAD + channel[:, None], q)
        tl.store(out.half_levels + channel, half_levels_of(width))
    _write_rows(out, q * power_of_2(-exponent)[None, :], channel, width, KEY, LAUNCH)


@triton.jit
def _write_rows(out, q, channel, width, KEY: tl.constexpr, LAUNCH: tl.constexpr):
    """Write the rows of all fields of channels of these widths."""
    single, digits = first_fields(width)
    odd = width % 2 == 1
    _write_row(out, q, channel, single // 2, single % 2, width - 1 - single % 2, odd, KEY, LAUNCH)
    for digit in tl.static_range(MAX_WIDTH // 2):
        has = digit < width // 2
        zero = width * 0
        field = digits + digit
        _write_row(out, q, channel, field, zero, zero + 2 * digit, has, KEY, LAUNCH)
        again = has & (field < KEY.twice_read * UNIT)
        _write_row(out, q, channel, field, zero + 1, zero + 2 * digit, again, KEY, LAUNCH)


@triton.jit
def _write_row(
    out, q, channel, field, part, exponent, exists, KEY: tl.constexpr, LAUNCH: tl.constexpr
):  # fmt: skip
    """Write the query's channels times a power of two to the rows of fields, of those read twice to those of the lower
    or, for ``part`` 1, of the higher bits.
    """
    block, _words, number, word = field_place(field, KEY)
    at = (part * KEY.bit_blocks + block) * UNIT + row_of(number, word)
    row = q * power_of_2(field_exponent(number, LAUNCH.fast) + exponent + HALF)[:, None]
    where = out.rows + at[:, None] * LAUNCH.block_q + tl.arange(0, LAUNCH.block_q)[None, :]
    tl.store(where, row.to(out.rows.dtype.element_ty), mask=exists[:, None])
    tl.store(out.channel + at, channel, mask=exists)


def expand_query(
    query: Strided, keys: Packed, room: int, layout: Layout, calibration: Calibration, tiles: int,
    tokens: int, scale: float, key: ReadConstants, launch: Any,
) -> CodedQuery:  # fmt: skip
    """Return the queries of a call with their `FieldQueries`.

    Args:
        query: Queries ``[B, Hq, T, D]``.
        keys, room, layout: The cache's keys, how many pages it has room for, and their layout.
        calibration: Tables of the keys.
        tiles: Tiles of queries of a KV head.
        tokens: Query tokens.
        scale: Factor on scores.
        key: Constants of the keys.
        launch: The `AttendConstants`.
    """
    exact = keys[2]
    (B, H), columns = exact.shape[:2], launch.block_q
    units, D_pad = key.bit_blocks + key.twice_read, triton.next_power_of_2(key.head_dim)
    dtype = torch.float32 if launch.dtype == tl.float32 else torch.float16

    def new(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return exact.new_empty(*shape, dtype=dtype)

    held = holds_queries(key, launch)
    out = FieldQueries(
        rows=new(B * H, tiles, units, UNIT.value, columns, dtype=dtype),
        channel=new(B * H, units, UNIT.value, dtype=torch.int32),
        plain=None if held else new(B * H, tiles, columns, D_pad),
        constant=new(B * H, room, columns) if held else None,
        half_levels=None if held else new(B * H, D_pad),
        factor=new(B * H, tiles, columns),
        mean=new(B * H, tiles, 2, key.mean_places, columns) if key.takes_mean else None,
        ratio=new(B * H, tiles, columns) if key.takes_mean else None,
        angles=new(H, key.page_size, 2, key.mean_places, dtype=dtype) if key.takes_mean else None,
    )
    bias = new(B * H * launch.shared_by * tokens) if key.has_tables else None
    programs = tiles + (key.page_size // TOKENS if key.takes_mean else 0)
    programs += triton.cdiv(room, PAGES.value) if held else 0
    expand_query_kernel[(B * H, programs)](
        query, bundle_cache(keys, layout), calibration, out, bias, scale, room, H, tokens, tiles,
        KEY=key, LAUNCH=launch, TOKENS=TOKENS,
    )  # fmt: skip
    return CodedQuery(query, bias, None, out)
