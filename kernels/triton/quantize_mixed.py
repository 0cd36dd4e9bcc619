"""Quantize a page whose tokens differ in bits, in Triton: part of the write kernel of `quantize_kv`.

Mirrors `mixed.quantize_pages`, bit by bit: each sum of fp32 numbers is the tree of `mixed.sum_pairs`, and the
bound under which a page fits its budget is found by bisection on the bits of fp32 numbers, which ascend as the
numbers do, so that it is the very number that sorting would find.

The page lies in scratch, ``[page_size, head_dim]``, in the form in which it is coded; four rows of ``page_size``
numbers behind it hold the span of each token, its bits and its rank. The page is read twice, in tiles of whole
tokens: for the spans, and to be coded.
"""

import triton
import triton.language as tl
from kvq_compile.kernels.reference.mixed import FLOOR as FLOOR_OF_MEAN
from kvq_compile.kernels.schemes import HEADER as HEADER_UNITS
from kvq_compile.kernels.schemes import MAX_BITS as MOST_BITS
from kvq_compile.kernels.schemes import OUTLIER_FIELDS as FIELDS
from kvq_compile.kernels.schemes import PAGE_SIZES
from kvq_compile.kernels.triton.encode import bounded, e4m3_value, round_e4m3, round_up_fp16

FP16_MAX = tl.constexpr(65504.0)
FP32_MAX = tl.constexpr(3.4028234663852886e38)
FLOOR = tl.constexpr(FLOOR_OF_MEAN)
HEADER = tl.constexpr(HEADER_UNITS)
MAX_BITS = tl.constexpr(MOST_BITS)
LEAST_LENGTH = tl.constexpr(min(PAGE_SIZES))  # slots that the first bound is for
OUTLIER_FIELDS = tl.constexpr(FIELDS)
INFINITY = tl.constexpr(0x7F800000)
HALVINGS = tl.constexpr(31)  # of the numbers from zero to infinity


# --- helpers of the specification -----------------------------------------------------------------


@triton.constexpr_function
def _steps(size):
    return size.bit_length() - 1


@triton.jit
def sum_pairs(x):
    """Return `mixed.sum_pairs` of the rows of ``x``, whose length is a power of two."""
    ROWS: tl.constexpr = x.shape[0]
    y = x
    for step in tl.static_range(_steps(x.shape[1])):
        a, b = tl.split(tl.reshape(y, (ROWS, x.shape[1] >> (step + 1), 2)))
        y = a + b
    return tl.reshape(y, (ROWS,))


@triton.jit
def soften(importance):
    """Return `mixed.soften` of a page ``[N]``."""
    PAGE: tl.constexpr = importance.shape[0]
    mean = sum_pairs(importance[None, :]) * (1.0 / PAGE)
    return tl.sqrt_rn(importance + tl.where(mean > 0, mean * FLOOR, 1.0))


@triton.jit
def _power(exponent):
    """Return ``2 ** exponent`` of small integers."""
    return ((127 + exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def _store(x, UP: tl.constexpr, LAYOUT: tl.constexpr):
    """Return `mixed.store` of numbers as integers."""
    if LAYOUT.params == "fp8":
        stored = round_e4m3(x)
    elif UP:
        stored = round_up_fp16(x).to(tl.uint16, bitcast=True).to(tl.int32)
    else:
        stored = x.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32)
    return stored


@triton.jit
def _value(stored, LAYOUT: tl.constexpr):
    """Undo `_store`."""
    if LAYOUT.params == "fp8":
        x = e4m3_value(stored)
    else:
        x = stored.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return x


@triton.jit
def _place(levels, bits):
    """Return `mixed.place` of codes ``[rows, channels]``."""
    return levels.to(tl.float32) * 0.0078125 + (_power(-bits) - 1.0)[:, None]


# --- the budget -----------------------------------------------------------------------------------


@triton.jit
def bound_at(end, LAYOUT: tl.constexpr):
    """Return `Layout.bound_at` slot ``end``."""
    bound = end.to(tl.float32) * 0.0
    for step in tl.static_range(len(LAYOUT.bounds)):
        bound = tl.where(end > LEAST_LENGTH << step >> 1, LAYOUT.bounds[step], bound)
    return bound


@triton.jit
def allocate(weighted, least, LAYOUT: tl.constexpr):
    """Return the bits ``[N]`` of `mixed.allocate` for spans times importance and the bound ``least``."""
    LEAST: tl.constexpr = LAYOUT.min_bits
    MOST: tl.constexpr = LAYOUT.max_bits
    FREE: tl.constexpr = LAYOUT.code_rows - LEAST * LAYOUT.page_size
    low = tl.sum(tl.zeros_like(weighted), 0).to(tl.int32)
    high = low + INFINITY
    for _ in range(HALVINGS):  # for the least number that no more than FREE of the needs exceed
        middle = low + (high - low) // 2
        bound = middle.to(tl.float32, bitcast=True)
        over = tl.zeros(weighted.shape, tl.int32)
        for step in tl.static_range(LEAST, MOST):
            over += (weighted * (2.0**-step) > bound).to(tl.int32)
        fits = tl.sum(over, 0) <= FREE
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, tl.minimum(middle + 1, high))
    return needed_bits(weighted, tl.maximum(high.to(tl.float32, bitcast=True), least), LAYOUT)


@triton.jit
def needed_bits(weighted, bound, LAYOUT: tl.constexpr):
    """Return the bits ``[N]`` of `mixed.needed_bits` for spans times importance."""
    LEAST: tl.constexpr = LAYOUT.min_bits
    MOST: tl.constexpr = LAYOUT.max_bits
    bits = tl.full(weighted.shape, LEAST, tl.int32)
    for step in tl.static_range(LEAST, MOST):
        bits += (weighted * (2.0**-step) > bound).to(tl.int32)
    return bits


@triton.jit
def rank(bits, LAYOUT: tl.constexpr):
    """Return `mixed.rank` of the tokens of a page."""
    MOST: tl.constexpr = LAYOUT.max_bits
    LEVELS: tl.constexpr = MOST - LAYOUT.min_bits + 1
    order = tl.zeros_like(bits)
    placed = tl.sum(order, 0)
    for level in range(LEVELS):
        here = (bits + level == MOST).to(tl.int32)
        order = tl.where(here > 0, placed + tl.cumsum(here, 0) - 1, order)
        placed += tl.sum(here, 0)
    return order


@triton.jit
def weigh(span, importance, slots, first, LAYOUT: tl.constexpr):
    """Return the spans of a page from slot ``first`` on times the importance of its tokens."""
    weighted = span
    if importance is not None:
        slot = first + tl.arange(0, LAYOUT.page_size)
        weight = tl.load(importance + slot, mask=slot < slots, other=0.0)
        weight = tl.minimum(tl.maximum(weight.to(tl.float32), -FP32_MAX), FP32_MAX)
        weight = tl.where(weight == weight, weight, 0.0)
        if LAYOUT.soften:
            weight = soften(weight)
        weighted = span * weight
    return weighted


@triton.jit
def _distribute(codes, records, spans, importance, slots, first, LAYOUT: tl.constexpr):
    """Write bits and ranks of a page's tokens, its header, and zeros where no row will be.

    Returns the first row of each plane.
    """
    PAGE: tl.constexpr = LAYOUT.page_size
    token = tl.arange(0, PAGE)
    span = tl.load(spans + PAGE + token) - tl.load(spans + token)
    weighted = weigh(span, importance, slots, first, LAYOUT)
    bits = allocate(weighted, bound_at(first + PAGE, LAYOUT), LAYOUT)
    order = rank(bits, LAYOUT)
    tl.store(spans + 2 * PAGE + token, bits.to(tl.float32))
    tl.store(spans + 3 * PAGE + token, order.to(tl.float32))
    tl.store(records + LAYOUT.rank_field * PAGE + token, order.to(tl.uint8))
    first_rows, used = write_header(codes, bits)
    write_zero_rows(codes, used, LAYOUT)
    return first_rows


@triton.jit
def write_header(codes, bits):
    """Write how many tokens each plane has; return the first row of each plane and the rows of all."""
    first_rows = ()
    used = tl.sum(tl.zeros_like(bits), 0)
    for plane in tl.static_range(MAX_BITS):
        tokens = tl.sum((bits > plane).to(tl.int32), 0)
        tl.store(codes + plane, tokens.to(tl.uint16))
        first_rows += (used,)  # a tuple that grows
        used += tokens
    return first_rows, used


@triton.jit
def write_zero_rows(codes, used, LAYOUT: tl.constexpr):
    """Write zeros to the rows of a page from number ``used`` on."""
    UNITS: tl.constexpr = LAYOUT.row_units
    UNITS_PAD: tl.constexpr = triton.next_power_of_2(UNITS)
    CODE_ROWS: tl.constexpr = LAYOUT.code_rows
    unit = tl.arange(0, UNITS_PAD)[None, :]
    for block in range(used, CODE_ROWS, 32):
        row = block + tl.arange(0, 32)[:, None]
        where = codes + HEADER + row * UNITS + unit
        nothing = tl.zeros((32, UNITS_PAD), tl.int32).to(tl.uint16)
        tl.store(where, nothing, mask=(row < CODE_ROWS) & (unit < UNITS))


# --- tokens ---------------------------------------------------------------------------------------


@triton.jit
def _load_tokens(scratch, token, channel, LAYOUT: tl.constexpr):
    """Return tokens of the page, within fp16, and which of their numbers are finite."""
    exists = (token < LAYOUT.page_size)[:, None] & (channel < LAYOUT.head_dim)[None, :]
    where = scratch + token[:, None] * LAYOUT.head_dim + channel[None, :]
    x = tl.load(where, mask=exists, other=0.0)
    return bounded(x), exists & (tl.abs(x) < float("inf"))


@triton.jit
def _find_outliers(x, finite, channel, LAYOUT: tl.constexpr):
    """Return channels and numbers of the outliers, and which numbers are neither, as `mixed` does."""
    OUTLIERS: tl.constexpr = LAYOUT.outliers
    BLOCK_D: tl.constexpr = x.shape[1]
    kept = finite
    taken = (channel >= LAYOUT.head_dim)[None, :] & (x == x)
    channels, numbers = (), ()
    for outlier in tl.static_range(OUTLIERS):
        rest = -x if outlier % 2 else x
        rest = tl.where(taken, float("-inf"), tl.where(kept, rest, -2 * FP16_MAX))
        is_most = rest == tl.max(rest, 1)[:, None]
        most = tl.min(tl.where(is_most, channel[None, :], BLOCK_D), 1)
        here = channel[None, :] == most[:, None]
        bits = x.to(tl.int32, bitcast=True)  # a sum of numbers would lose the sign of zero
        number = tl.sum(tl.where(here, bits, 0), 1).to(tl.float32, bitcast=True)
        channels += (most,)  # type: ignore[assignment]
        numbers += (number,)  # type: ignore[assignment]
        kept, taken = kept & (here == 0), taken | here
    return channels, numbers, kept


@triton.jit
def _write_bytes(where, stored, exists, SIZE: tl.constexpr, LAYOUT: tl.constexpr):
    """Write ``SIZE`` bytes of integers to neighbouring fields, the low one first."""
    tl.store(where, (stored & 0xFF).to(tl.uint8), mask=exists)
    if SIZE == 2:
        tl.store(where + LAYOUT.page_size, (stored >> 8).to(tl.uint8), mask=exists)


@triton.jit
def _write_spans(scratch, spans, LAYOUT: tl.constexpr, ROWS: tl.constexpr):
    """Write the least and the largest number of each token, outliers apart."""
    PAGE: tl.constexpr = LAYOUT.page_size
    channel = tl.arange(0, triton.next_power_of_2(LAYOUT.head_dim))
    for block in range(0, PAGE, ROWS):
        token = block + tl.arange(0, ROWS)
        x, finite = _load_tokens(scratch, token, channel, LAYOUT)
        _channels, _numbers, kept = _find_outliers(x, finite, channel, LAYOUT)
        lo = tl.min(tl.where(kept, x, float("inf")), 1)
        hi = tl.max(tl.where(kept, x, float("-inf")), 1)
        hi = tl.where(lo == float("inf"), 0.0, hi)
        lo = tl.where(lo == float("inf"), 0.0, lo)
        tl.store(spans + token, lo, mask=token < PAGE)
        tl.store(spans + PAGE + token, hi, mask=token < PAGE)


@triton.jit
def _write_tokens(
    codes, records, scratch, spans, first_rows, LAYOUT: tl.constexpr, ROWS: tl.constexpr
):
    """Code the tokens and write their records and the rows of all planes."""
    PAGE: tl.constexpr = LAYOUT.page_size
    UNITS: tl.constexpr = LAYOUT.row_units
    UNITS_PAD: tl.constexpr = triton.next_power_of_2(UNITS)
    SIZE: tl.constexpr = LAYOUT.param_bytes
    OUTLIERS: tl.constexpr = LAYOUT.outliers
    PLANES: tl.constexpr = LAYOUT.max_bits
    channel = tl.arange(0, 16 * UNITS_PAD)
    unit = tl.arange(0, UNITS_PAD)
    field = tl.arange(0, 16)[None, None, :]
    for block in range(0, PAGE, ROWS):
        token = block + tl.arange(0, ROWS)
        exists = token < PAGE
        x, finite = _load_tokens(scratch, token, channel, LAYOUT)
        channels, numbers, kept = _find_outliers(x, finite, channel, LAYOUT)
        lo = tl.load(spans + token, mask=exists, other=0.0)
        hi = tl.load(spans + PAGE + token, mask=exists, other=0.0)
        bits = tl.load(spans + 2 * PAGE + token, mask=exists, other=0.0).to(tl.int32)
        order = tl.load(spans + 3 * PAGE + token, mask=exists, other=0.0).to(tl.int32)
        stored_centre = _store(lo * 0.5 + hi * 0.5, False, LAYOUT)
        centre = _value(stored_centre, LAYOUT)
        reach = tl.minimum(tl.maximum(hi - centre, centre - lo), FP16_MAX)
        stored_reach = _store(reach, True, LAYOUT)
        reach = _value(stored_reach, LAYOUT)
        width = tl.where(reach > 0, 2.0 * reach, 1.0)
        offset = x - centre[:, None]
        levels = tl.floor((tl.div_rn(offset, width[:, None]) + 0.5) * 256.0)
        levels = tl.minimum(tl.maximum(levels, 0.0), 255.0)
        levels = tl.where((reach > 0)[:, None], levels, 0.0).to(tl.int32)
        if LAYOUT.fit:
            offset = tl.where(kept, offset, 0.0)
            shift = (-bits + MAX_BITS)[:, None]
            middle = _place((levels >> shift) << shift, bits)
            power, product = sum_pairs(offset * offset), sum_pairs(offset * middle)
            ok = (bits > 0) & (product > 0)
            fitted = tl.div_rn(power, tl.where(ok, product, 1.0))
            fitted = _store(tl.minimum(tl.where(ok, fitted, 0.0), FP16_MAX), False, LAYOUT)
            stored_reach = tl.where(ok, fitted, stored_reach)
        where = records + token
        _write_bytes(where, stored_centre, exists, SIZE, LAYOUT)
        _write_bytes(where + SIZE * PAGE, stored_reach, exists, SIZE, LAYOUT)
        for outlier in tl.static_range(OUTLIERS):
            at = 2 * SIZE + 1 + OUTLIER_FIELDS * outlier
            number = numbers[outlier].to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32)
            _write_bytes(where + at * PAGE, channels[outlier], exists, 1, LAYOUT)
            _write_bytes(where + (at + 1) * PAGE, number, exists, 2, LAYOUT)
        levels = tl.reshape(levels, (ROWS, UNITS_PAD, 16))
        for plane in tl.static_range(PLANES):
            words = tl.sum(((levels >> (MAX_BITS - 1 - plane)) & 1) << field, 2)
            row = codes + HEADER + (first_rows[plane] + order) * UNITS
            has = (exists & (bits > plane))[:, None] & (unit < UNITS)[None, :]
            tl.store(row[:, None] + unit[None, :], words.to(tl.uint16), mask=has)


@triton.jit
def quantize_mixed_page(
    codes, records, scratch, importance, slots, first, LAYOUT: tl.constexpr, TILE: tl.constexpr
):
    """Quantize and pack the page in ``scratch``, whose first token is in slot ``first``.

    ``importance`` is that of each slot of the head, of which there are ``slots``, or ``None``.
    """
    D_PAD: tl.constexpr = triton.next_power_of_2(LAYOUT.head_dim)
    ROWS: tl.constexpr = min(LAYOUT.page_size, max(1, TILE // D_PAD))
    spans = scratch + LAYOUT.page_size * LAYOUT.head_dim
    _write_spans(scratch, spans, LAYOUT, ROWS)
    tl.debug_barrier()
    first_rows = _distribute(codes, records, spans, importance, slots, first, LAYOUT)
    tl.debug_barrier()
    _write_tokens(codes, records, scratch, spans, first_rows, LAYOUT, ROWS)


# --- reading --------------------------------------------------------------------------------------


@triton.jit
def _load_bytes(where, exists, SIZE: tl.constexpr, LAYOUT: tl.constexpr):
    stored = tl.load(where, mask=exists, other=0).to(tl.int32)
    if SIZE == 2:
        high = tl.load(where + LAYOUT.page_size, mask=exists, other=0).to(tl.int32)
        stored |= high << 8
    return stored


@triton.jit
def stored_reach(records, token, LAYOUT: tl.constexpr):
    """Return the reach of tokens of a page."""
    SIZE: tl.constexpr = LAYOUT.param_bytes
    where = records + SIZE * LAYOUT.page_size + token
    return _value(_load_bytes(where, token < LAYOUT.page_size, SIZE, LAYOUT), LAYOUT)


@triton.jit
def mixed_value(codes, records, token, channel, exists, LAYOUT: tl.constexpr):
    """Return the numbers (fp32) of `mixed.dequantize_pages`, a load for each bit; for ``token``
    ``[rows, 1]``, ``channel`` ``[1, channels]``."""
    PAGE: tl.constexpr = LAYOUT.page_size
    SIZE: tl.constexpr = LAYOUT.param_bytes
    PLANES: tl.constexpr = LAYOUT.max_bits
    OUTLIERS: tl.constexpr = LAYOUT.outliers
    real = token < PAGE
    where = records + token
    order = tl.load(where + LAYOUT.rank_field * PAGE, mask=real, other=0).to(tl.int32)
    centre = _value(_load_bytes(where, real, SIZE, LAYOUT), LAYOUT)
    reach = stored_reach(records, token, LAYOUT)
    levels = tl.zeros(exists.shape, tl.int32)
    bits = tl.zeros(order.shape, tl.int32)
    first = 0
    for plane in tl.static_range(PLANES):
        tokens = tl.load(codes + plane).to(tl.int32)
        has = order < tokens
        row = codes + HEADER + (first + order) * LAYOUT.row_units
        word = tl.load(row + channel // 16, mask=exists & has, other=0).to(tl.int32)
        levels += ((word >> (channel % 16)) & 1) << (MAX_BITS - 1 - plane)
        bits += has.to(tl.int32)
        first += tokens
    middle = levels.to(tl.float32) * 0.0078125 + (_power(-bits) - 1.0)
    x = middle * reach + centre
    for outlier in tl.static_range(OUTLIERS):
        at = 2 * SIZE + 1 + OUTLIER_FIELDS * outlier
        here = tl.load(where + at * PAGE, mask=real, other=0).to(tl.int32)
        number = _load_bytes(where + (at + 1) * PAGE, real, 2, LAYOUT)
        number = number.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        x = tl.where(channel == here, number, x)
    return x
