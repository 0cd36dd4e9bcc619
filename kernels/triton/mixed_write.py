"""The mixed scheme in Triton: quantize a page whose tokens differ in bits.

Mirrors the specification bit by bit. Each fp32 sum is the same tree of pairs. The bound that fits the budget of a page
is found by bisection on the bit patterns of non-negative fp32 values, which have the order of the values; the result
is exactly the one that sorting would find.

The page is in scratch memory, ``[page_size, head_dim]``, transformed for quantization; four rows of ``page_size``
elements after it hold the range of each token, its bits and its rank. The page is read twice, in tiles of whole
tokens: for the ranges, and to be quantized.
"""

import triton
import triton.language as tl

from kvq_compile.kernels.mixed_scheme import FLOOR as FLOOR_OF_MEAN
from kvq_compile.kernels.schemes import PAGE_SIZES
from kvq_compile.kernels.triton.formats import (
    FP16_MAX,
    FP32_MAX,
    bounded,
    round_e4m3,
    round_up_fp16,
    sum_pairs,
)
from kvq_compile.kernels.triton.mixed import (
    HEADER,
    MAX_BITS,
    power_of_2,
    stored_value,
)

FLOOR = tl.constexpr(FLOOR_OF_MEAN)
LEAST_LENGTH = tl.constexpr(min(PAGE_SIZES))  # slots that the first bound is for
INFINITY = tl.constexpr(0x7F800000)
HALVINGS = tl.constexpr(31)  # of the fp32 values from zero to infinity


# --- helpers of the specification -----------------------------------------------------------------


@triton.jit
def soften(importance):
    """Return `mixed.soften` of a page ``[N]``."""
    PAGE: tl.constexpr = importance.shape[0]
    mean = sum_pairs(importance[None, :]) * (1.0 / PAGE)
    return tl.sqrt_rn(importance + tl.where(mean > 0, mean * FLOOR, 1.0))


@triton.jit
def _store(x, UP: tl.constexpr, CONSTANTS: tl.constexpr):
    """Return `mixed.store` of fp32 values, as integers."""
    if CONSTANTS.params == "fp8":
        stored = round_e4m3(x)
    elif UP:
        stored = round_up_fp16(x).to(tl.uint16, bitcast=True).to(tl.int32)
    else:
        stored = x.to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32)
    return stored


@triton.jit
def _place(levels, bits):
    """Return `mixed.place` of codes ``[rows, channels]``."""
    return levels.to(tl.float32) * 0.0078125 + (power_of_2(-bits) - 1.0)[:, None]


# --- the budget -----------------------------------------------------------------------------------


@triton.jit
def bound_at(end, CONSTANTS: tl.constexpr):
    """Return `Layout.bound_at` slot ``end``."""
    bound = end.to(tl.float32) * 0.0
    for step in tl.static_range(len(CONSTANTS.bounds)):
        bound = tl.where(end > LEAST_LENGTH << step >> 1, CONSTANTS.bounds[step], bound)
    return bound


@triton.jit
def allocate(weighted, least, CONSTANTS: tl.constexpr):
    """Return the bits ``[N]`` of `mixed.allocate` for ranges times importance and the bound ``least``."""
    LEAST: tl.constexpr = CONSTANTS.min_bits
    MOST: tl.constexpr = CONSTANTS.bits
    FREE: tl.constexpr = CONSTANTS.code_rows - LEAST * CONSTANTS.page_size
    low = tl.sum(tl.zeros_like(weighted), 0).to(tl.int32)
    high = low + INFINITY
    for _ in range(HALVINGS):  # for the least value that at most FREE of the needs exceed
        middle = low + (high - low) // 2
        bound = middle.to(tl.float32, bitcast=True)
        over = tl.zeros(weighted.shape, tl.int32)
        for step in tl.static_range(LEAST, MOST):
            over += (weighted * (2.0**-step) > bound).to(tl.int32)
        fits = tl.sum(over, 0) <= FREE
        high = tl.where(fits, middle, high)
        low = tl.where(fits, low, tl.minimum(middle + 1, high))
    return needed_bits(weighted, tl.maximum(high.to(tl.float32, bitcast=True), least), CONSTANTS)


@triton.jit
def needed_bits(weighted, bound, CONSTANTS: tl.constexpr):
    """Return the bits ``[N]`` of `mixed.needed_bits` for ranges times importance."""
    LEAST: tl.constexpr = CONSTANTS.min_bits
    MOST: tl.constexpr = CONSTANTS.bits
    bits = tl.full(weighted.shape, LEAST, tl.int32)
    for step in tl.static_range(LEAST, MOST):
        bits += (weighted * (2.0**-step) > bound).to(tl.int32)
    return bits


@triton.jit
def rank(bits, CONSTANTS: tl.constexpr):
    """Return `mixed.rank` of the tokens of a page."""
    MOST: tl.constexpr = CONSTANTS.bits
    LEVELS: tl.constexpr = MOST - CONSTANTS.min_bits + 1
    order = tl.zeros_like(bits)
    placed = tl.sum(order, 0)
    for level in range(LEVELS):
        here = (bits + level == MOST).to(tl.int32)
        order = tl.where(here > 0, placed + tl.cumsum(here, 0) - 1, order)
        placed += tl.sum(here, 0)
    return order


@triton.jit
def weigh(span, weights, first, CONSTANTS: tl.constexpr):
    """Return the ranges of a page from slot ``first`` on times the importance of its tokens."""
    weighted = span
    if weights.pointer is not None:
        slot = first + tl.arange(0, CONSTANTS.page_size)
        weight = tl.load(
            weights.pointer + weights.offset + slot, mask=slot < weights.slots, other=0.0
        )
        weight = tl.minimum(tl.maximum(weight.to(tl.float32), -FP32_MAX), FP32_MAX)
        weight = tl.where(weight == weight, weight, 0.0)
        if CONSTANTS.soften:
            weight = soften(weight)
        weighted = span * weight
    return weighted


@triton.jit
def _distribute(page, spans, weights, first, CONSTANTS: tl.constexpr):
    """Write bits and ranks of a page's tokens, its header, and zeros where no row will be.

    Returns the first row of each plane.
    """
    PAGE: tl.constexpr = CONSTANTS.page_size
    token = tl.arange(0, PAGE)
    span = tl.load(spans + PAGE + token) - tl.load(spans + token)
    weighted = weigh(span, weights, first, CONSTANTS)
    bits = allocate(weighted, bound_at(first + PAGE, CONSTANTS), CONSTANTS)
    order = rank(bits, CONSTANTS)
    tl.store(spans + 2 * PAGE + token, bits.to(tl.float32))
    tl.store(spans + 3 * PAGE + token, order.to(tl.float32))
    tl.store(page.params + CONSTANTS.rank_field * PAGE + token, order.to(tl.uint8))
    first_rows, used = write_header(page.codes, bits)
    write_zero_rows(page.codes, used, CONSTANTS)
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
def write_zero_rows(codes, used, CONSTANTS: tl.constexpr):
    """Write zeros to the rows of a page from index ``used`` on."""
    WORDS: tl.constexpr = triton.cdiv(CONSTANTS.head_dim, 16)
    WORDS_PAD: tl.constexpr = triton.next_power_of_2(WORDS)
    CODE_ROWS: tl.constexpr = CONSTANTS.code_rows
    word = tl.arange(0, WORDS_PAD)[None, :]
    for block in range(used, CODE_ROWS, 32):
        row = block + tl.arange(0, 32)[:, None]
        where = codes + HEADER + row * WORDS + word
        nothing = tl.zeros((32, WORDS_PAD), tl.int32).to(tl.uint16)
        tl.store(where, nothing, mask=(row < CODE_ROWS) & (word < WORDS))


# --- tokens ---------------------------------------------------------------------------------------


@triton.jit
def _load_tokens(scratch, token, channel, CONSTANTS: tl.constexpr):
    """Return tokens of the page, within fp16, and which of their elements are finite."""
    exists = (token < CONSTANTS.page_size)[:, None] & (channel < CONSTANTS.head_dim)[None, :]
    where = scratch + token[:, None] * CONSTANTS.head_dim + channel[None, :]
    x = tl.load(where, mask=exists, other=0.0)
    return bounded(x), exists & (tl.abs(x) < float("inf"))


@triton.jit
def _find_outliers(x, finite, channel, CONSTANTS: tl.constexpr):
    """Return channels and values of the outliers, and which elements are neither, as the specification does."""
    OUTLIERS: tl.constexpr = CONSTANTS.outliers
    BLOCK_D: tl.constexpr = x.shape[1]
    kept = finite
    taken = (channel >= CONSTANTS.head_dim)[None, :] & (x == x)
    channels, numbers = (), ()
    for outlier in tl.static_range(OUTLIERS):
        rest = -x if outlier % 2 else x
        rest = tl.where(taken, float("-inf"), tl.where(kept, rest, -2 * FP16_MAX))
        is_most = rest == tl.max(rest, 1)[:, None]
        most = tl.min(tl.where(is_most, channel[None, :], BLOCK_D), 1)
        here = channel[None, :] == most[:, None]
        bits = x.to(tl.int32, bitcast=True)  # a floating-point sum would lose the sign of zero
        number = tl.sum(tl.where(here, bits, 0), 1).to(tl.float32, bitcast=True)
        channels += (most,)  # type: ignore[assignment]
        numbers += (number,)  # type: ignore[assignment]
        kept, taken = kept & (here == 0), taken | here
    return channels, numbers, kept


@triton.jit
def _write_bytes(where, stored, exists, SIZE: tl.constexpr, CONSTANTS: tl.constexpr):
    """Write ``SIZE`` bytes of integers to neighbouring fields, the low one first."""
    tl.store(where, (stored & 0xFF).to(tl.uint8), mask=exists)
    if SIZE == 2:
        tl.store(where + CONSTANTS.page_size, (stored >> 8).to(tl.uint8), mask=exists)


@triton.jit
def _write_spans(scratch, spans, CONSTANTS: tl.constexpr, ROWS: tl.constexpr):
    """Write the least and the largest element of each token, outliers apart."""
    PAGE: tl.constexpr = CONSTANTS.page_size
    channel = tl.arange(0, triton.next_power_of_2(CONSTANTS.head_dim))
    for block in range(0, PAGE, ROWS):
        token = block + tl.arange(0, ROWS)
        x, finite = _load_tokens(scratch, token, channel, CONSTANTS)
        _channels, _numbers, kept = _find_outliers(x, finite, channel, CONSTANTS)
        lo = tl.min(tl.where(kept, x, float("inf")), 1)
        hi = tl.max(tl.where(kept, x, float("-inf")), 1)
        hi = tl.where(lo == float("inf"), 0.0, hi)
        lo = tl.where(lo == float("inf"), 0.0, lo)
        tl.store(spans + token, lo, mask=token < PAGE)
        tl.store(spans + PAGE + token, hi, mask=token < PAGE)


@triton.jit
def _write_tokens(
    page, scratch, spans, first_rows, CONSTANTS: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """Code the tokens and write their metadata and the rows of all planes."""
    PAGE: tl.constexpr = CONSTANTS.page_size
    WORDS: tl.constexpr = triton.cdiv(CONSTANTS.head_dim, 16)
    WORDS_PAD: tl.constexpr = triton.next_power_of_2(WORDS)
    SIZE: tl.constexpr = CONSTANTS.param_bytes
    OUTLIERS: tl.constexpr = CONSTANTS.outliers
    WIDE: tl.constexpr = CONSTANTS.outlier_fields - 2  # bytes of a channel
    PLANES: tl.constexpr = CONSTANTS.bits
    channel = tl.arange(0, 16 * WORDS_PAD)
    word = tl.arange(0, WORDS_PAD)
    field = tl.arange(0, 16)[None, None, :]
    for block in range(0, PAGE, ROWS):
        token = block + tl.arange(0, ROWS)
        exists = token < PAGE
        x, finite = _load_tokens(scratch, token, channel, CONSTANTS)
        channels, numbers, kept = _find_outliers(x, finite, channel, CONSTANTS)
        lo = tl.load(spans + token, mask=exists, other=0.0)
        hi = tl.load(spans + PAGE + token, mask=exists, other=0.0)
        bits = tl.load(spans + 2 * PAGE + token, mask=exists, other=0.0).to(tl.int32)
        order = tl.load(spans + 3 * PAGE + token, mask=exists, other=0.0).to(tl.int32)
        stored_zero = _store(lo * 0.5 + hi * 0.5, False, CONSTANTS)
        zero = stored_value(stored_zero, CONSTANTS)
        half_range = tl.minimum(tl.maximum(hi - zero, zero - lo), FP16_MAX)
        stored_range = _store(half_range, True, CONSTANTS)
        half_range = stored_value(stored_range, CONSTANTS)
        width = tl.where(half_range > 0, 2.0 * half_range, 1.0)
        offset = x - zero[:, None]
        levels = tl.floor((tl.div_rn(offset, width[:, None]) + 0.5) * 256.0)
        levels = tl.minimum(tl.maximum(levels, 0.0), 255.0)
        levels = tl.where((half_range > 0)[:, None], levels, 0.0).to(tl.int32)
        if CONSTANTS.head_dim % 16 > 0:  # the last word of a row ends in zeros
            levels = tl.where((channel < CONSTANTS.head_dim)[None, :], levels, 0)
        if CONSTANTS.fit:
            offset = tl.where(kept, offset, 0.0)
            shift = (-bits + MAX_BITS)[:, None]
            middle = _place((levels >> shift) << shift, bits)
            power, product = sum_pairs(offset * offset), sum_pairs(offset * middle)
            ok = (bits > 0) & (product > 0)
            fitted = tl.div_rn(power, tl.where(ok, product, 1.0))
            fitted = _store(tl.minimum(tl.where(ok, fitted, 0.0), FP16_MAX), False, CONSTANTS)
            stored_range = tl.where(ok, fitted, stored_range)
        where = page.params + token
        _write_bytes(where, stored_zero, exists, SIZE, CONSTANTS)
        _write_bytes(where + SIZE * PAGE, stored_range, exists, SIZE, CONSTANTS)
        for outlier in tl.static_range(OUTLIERS):
            at = 2 * SIZE + 1 + CONSTANTS.outlier_fields * outlier
            number = numbers[outlier].to(tl.float16).to(tl.uint16, bitcast=True).to(tl.int32)
            _write_bytes(where + at * PAGE, channels[outlier], exists, WIDE, CONSTANTS)
            _write_bytes(where + (at + WIDE) * PAGE, number, exists, 2, CONSTANTS)
        levels = tl.reshape(levels, (ROWS, WORDS_PAD, 16))
        for plane in tl.static_range(PLANES):
            words = tl.sum(((levels >> (MAX_BITS - 1 - plane)) & 1) << field, 2)
            row = page.codes + HEADER + (first_rows[plane] + order) * WORDS
            has = (exists & (bits > plane))[:, None] & (word < WORDS)[None, :]
            tl.store(row[:, None] + word[None, :], words.to(tl.uint16), mask=has)


@triton.jit
def quantize_page(page, scratch, weights, first, CONSTANTS: tl.constexpr, TILE: tl.constexpr):
    """Quantize and pack the page in ``scratch``, whose first token is in slot ``first``.

    ``weights`` are the `HeadWeights`.
    """
    D_PAD: tl.constexpr = triton.next_power_of_2(CONSTANTS.head_dim)
    ROWS: tl.constexpr = min(CONSTANTS.page_size, max(1, TILE // D_PAD))
    spans = scratch + CONSTANTS.page_size * CONSTANTS.head_dim
    _write_spans(scratch, spans, CONSTANTS, ROWS)
    tl.debug_barrier()
    first_rows = _distribute(page, spans, weights, first, CONSTANTS)
    tl.debug_barrier()
    _write_tokens(page, scratch, spans, first_rows, CONSTANTS, ROWS)
