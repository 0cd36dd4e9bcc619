"""The channelwise scheme in Triton: find the widths of channels, quantize a page whose channels differ in bits.

Mirrors the specification bit by bit. Each fp32 sum is the same tree of pairs. The worth of the last bit given is found
by bisection on the bit patterns of non-negative fp32 values, which have the order of the values; of bits of that worth
the first are given. So the result is exactly the one that sorting would find.

A page is read in tiles of whole channels, for parameters and then for codes. Codes go through scratch memory: their
bits lie in other tiles than the elements of their channel do.
"""

import triton
import triton.language as tl

from kvq_compile.kernels import channelwise_scheme
from kvq_compile.kernels.triton.channelwise import (
    BLOCK_WORDS,
    FIELDS,
    MAX_WIDTH,
    UNIT,
    block_words,
    first_fields,
    half_levels_of,
    load_widths,
    lowest_value,
)
from kvq_compile.kernels.triton.coded_form import Source, load_coded, read_tokens
from kvq_compile.kernels.triton.formats import bounded, e5m3_value, round_e5m3, sum_pairs
from kvq_compile.kernels.triton.transforms import (
    load_table,
    normalize,
    other_of_pair,
    rotated_mean,
    slot_angle,
)

GAINS = tl.constexpr(channelwise_scheme.GAINS)
CLIPS = tl.constexpr(channelwise_scheme.CLIPS)
TRIALS = tl.constexpr(len(channelwise_scheme.CLIPS))
PRIOR = tl.constexpr(channelwise_scheme.PRIOR)
INFINITY = tl.constexpr(0x7F800000)
HALVINGS = tl.constexpr(31)  # of the fp32 values from zero to infinity


# --- widths ---------------------------------------------------------------------------------------


@triton.jit
def _load_tokens(source, channel, tables, CONSTANTS: tl.constexpr):
    """Return coded channels of a page ``[channels, page_size]``, fp32, within fp16, before anything is taken off."""
    token = tl.arange(0, CONSTANTS.page_size)[None, :]
    exists = channel < CONSTANTS.head_dim
    order = channel
    if CONSTANTS.has_tables:
        order = load_table(tables, channel, exists, "order", CONSTANTS)
    inside = exists[:, None] & (token >= 0)
    x = read_tokens(source, token, order[:, None], inside, CONSTANTS)
    if CONSTANTS.has_tables:
        x = normalize(x, tables, channel[:, None], exists[:, None], CONSTANTS)
    return bounded(x)


@triton.jit
def _part_of_mean(source, channel, tables, CONSTANTS: tl.constexpr):
    """Return what a page adds to the mean of coded channels: half of its own mean, rotated back."""
    SHARE: tl.constexpr = 0.5 / CONSTANTS.page_size
    slot = source.first + tl.arange(0, CONSTANTS.page_size)[None, :]
    exists = channel < CONSTANTS.head_dim
    cosine, sine = slot_angle(slot, channel[:, None], exists[:, None], tables, CONSTANTS)
    other = tl.where(exists, other_of_pair(channel, CONSTANTS), CONSTANTS.head_dim)
    own = _load_tokens(source, channel, tables, CONSTANTS)
    other = _load_tokens(source, other, tables, CONSTANTS)
    other = tl.where((channel < CONSTANTS.head_dim // 2)[:, None], other, -other)
    return sum_pairs(own * cosine + other * sine) * SHARE


@triton.jit
def _find_mean(source, last_page, tables, CONSTANTS: tl.constexpr, CHANNELS: tl.constexpr):
    """Write the mean of a head's keys to its exact rows."""
    DIM: tl.constexpr = CONSTANTS.head_dim
    for block in range(0, DIM, CHANNELS):
        channel = block + tl.arange(0, CHANNELS)
        mean = _part_of_mean(source, channel, tables, CONSTANTS)
        mean = bounded(mean + _part_of_mean(last_page, channel, tables, CONSTANTS))
        mean = tl.where(channel % (DIM // 2) < CONSTANTS.mean_pairs, mean, 0.0)
        where = source.tail + (CONSTANTS.query_rows + 1) * DIM + channel
        tl.store(where, mean.to(source.tail.dtype.element_ty), mask=channel < DIM)
    tl.debug_barrier()


@triton.jit
def _variances(source, channel, tables, CONSTANTS: tl.constexpr):
    """Return `channelwise.variances` of channels of a page."""
    SHARE: tl.constexpr = 1.0 / CONSTANTS.page_size
    x = _load_tokens(source, channel, tables, CONSTANTS)
    if CONSTANTS.takes_mean:
        slot = source.first + tl.arange(0, CONSTANTS.page_size)[None, :]
        exists = (channel < CONSTANTS.head_dim)[:, None]
        x = x - rotated_mean(source.tail, slot, channel[:, None], exists, tables, CONSTANTS)
    mean = sum_pairs(x) * SHARE
    offset = x - mean[:, None]
    return sum_pairs(offset * offset) * SHARE


@triton.jit
def _sum_squares(tail, channel, tables, CONSTANTS: tl.constexpr):
    """Return the sum of the squares of held queries in coded channels, and how many queries are known."""
    total = tl.zeros(channel.shape, tl.float32)
    known = tl.sum(total, 0)
    exists = channel < CONSTANTS.head_dim
    if CONSTANTS.has_tables:
        channel = load_table(tables, channel, exists, "order", CONSTANTS)
    for row in range(CONSTANTS.query_rows):
        where = tail + row * CONSTANTS.head_dim + channel
        q = bounded(tl.load(where, mask=exists, other=0.0).to(tl.float32))
        total = total + q * q
        known = known + tl.where(tl.max(tl.abs(q), 0) > 0, 1.0, 0.0)
    return total, known


@triton.jit
def _weights(tail, channel, tables, CONSTANTS: tl.constexpr):
    """Return `channelwise.weights` of all channels."""
    DIM: tl.constexpr = CONSTANTS.head_dim
    total, known = _sum_squares(tail, channel, tables, CONSTANTS)
    if CONSTANTS.pairs == "halves":
        other = tl.where(channel < DIM, other_of_pair(channel, CONSTANTS), DIM)
        other, _known = _sum_squares(tail, other, tables, CONSTANTS)
        total = total + other
    elif CONSTANTS.pairs == "neighbours":
        other, _known = _sum_squares(tail, channel ^ 1, tables, CONSTANTS)
        total = total + other
    mean = tl.sum(sum_pairs(total[None, :]), 0) * (1.0 / DIM)
    prior = mean * tl.div_rn(known * 0.0 + PRIOR, tl.maximum(known, 1.0))
    return tl.where(mean > 0, total + prior, 1.0)


@triton.jit
def _allocate(value, exists, CONSTANTS: tl.constexpr):
    """Return the widths of `channelwise.allocate` (int32)."""
    ROWS: tl.constexpr = CONSTANTS.bit_rows
    low = tl.sum(tl.zeros_like(value), 0).to(tl.int32)
    high = low + INFINITY
    for _ in range(HALVINGS):  # for the largest value that ROWS of the bits are worth
        middle = low + (high - low) // 2
        bound = middle.to(tl.float32, bitcast=True)
        worthy = tl.zeros(value.shape, tl.int32)
        for bit in tl.static_range(MAX_WIDTH):
            worthy += (exists & (value * GAINS[bit] >= bound)).to(tl.int32)
        enough = tl.sum(worthy, 0) >= ROWS
        low = tl.where(enough, middle, low)
        high = tl.where(enough, high, middle)
    least = low.to(tl.float32, bitcast=True)
    widths = tl.zeros(value.shape, tl.int32)
    for bit in tl.static_range(MAX_WIDTH):
        widths += (exists & (value * GAINS[bit] > least)).to(tl.int32)
    left = ROWS - tl.sum(widths, 0)
    for bit in tl.static_range(MAX_WIDTH):
        equal = (exists & (value * GAINS[bit] == least)).to(tl.int32)
        widths += equal * (tl.cumsum(equal, 0) <= left).to(tl.int32)
        left -= tl.minimum(left, tl.sum(equal, 0))
    return widths


@triton.jit
def find_state(source, last, scratch, tables, CONSTANTS: tl.constexpr, TILE: tl.constexpr):
    """Write what a head finds of its keys to its exact rows, unless it is there: widths, and the mean it takes off.

    Args:
        source: Tokens of the first page that the call fills.
        last: Slot of the first token of the last one.
        scratch: Memory for the worth of each channel.
        tables: Tables of the head.
        CONSTANTS, TILE: As `append_kernel` has them.
    """
    DIM: tl.constexpr = CONSTANTS.head_dim
    D_PAD: tl.constexpr = triton.next_power_of_2(DIM)
    TILES: tl.constexpr = 8  # at once in registers
    CHANNELS: tl.constexpr = min(D_PAD, max(1, TILE // (TILES * CONSTANTS.page_size)))
    channel = tl.arange(0, D_PAD)
    if tl.max(load_widths(source.tail, channel, CONSTANTS), 0) == 0:
        last_page = Source(source.new, source.stride, source.exact, source.tail, last, source.start)
        if CONSTANTS.takes_mean:
            _find_mean(source, last_page, tables, CONSTANTS, CHANNELS)
        for block in range(0, DIM, CHANNELS):
            part = block + tl.arange(0, CHANNELS)
            variance = _variances(source, part, tables, CONSTANTS)
            variance = variance + _variances(last_page, part, tables, CONSTANTS)
            tl.store(scratch + part, variance, mask=part < DIM)
        tl.debug_barrier()
        value = tl.load(scratch + channel, mask=channel < DIM, other=0.0)
        value = value * _weights(source.tail, channel, tables, CONSTANTS)
        widths = _allocate(value, channel < DIM, CONSTANTS).to(tl.float32)
        where = source.tail + CONSTANTS.query_rows * DIM + channel
        tl.store(where, widths.to(source.tail.dtype.element_ty), mask=channel < DIM)
    tl.debug_barrier()


# --- pages ----------------------------------------------------------------------------------------


@triton.jit
def _load_page(source, scratch, channel, CONSTANTS: tl.constexpr):
    """Return coded channels of a page ``[channels, page_size]``, fp32, as they are."""
    token = tl.arange(0, CONSTANTS.page_size)[None, :]
    exists = (channel < CONSTANTS.head_dim)[:, None] & (token >= 0)
    return load_coded(source, scratch, token, channel[:, None], exists, CONSTANTS)


@triton.jit
def _nearest(x, size, center, half_levels):
    """Return `channelwise.nearest_codes`, as fp32, for steps of ``size``."""
    place = tl.div_rn(x - lowest_value(size, center, half_levels), tl.where(size > 0, size, 1.0))
    most = tl.where(size > 0, 2.0 * half_levels, 0.0)
    return tl.minimum(tl.maximum(tl.floor(place + 0.5), 0.0), most)


@triton.jit
def _clip(number):
    """Return one of `CLIPS`."""
    clip = number * 0.0
    for trial in tl.static_range(TRIALS):
        clip = tl.where(number == trial, CLIPS[trial], clip)
    return clip


@triton.jit
def _channel_params(x, width):
    """Return step, as a byte, and center (fp16) of channels ``[channels, page_size]`` of widths (int32)."""
    finite = tl.abs(x) < float("inf")
    x = bounded(x)
    low = tl.min(tl.where(finite, x, float("inf")), 1)
    high = tl.max(tl.where(finite, x, float("-inf")), 1)
    high = tl.where(low == float("inf"), 0.0, high)
    low = tl.where(low == float("inf"), 0.0, low)
    half_levels, coded = half_levels_of(width), width > 0
    mean = sum_pairs(x) * (1.0 / x.shape[1])
    center = tl.where(coded, (low + high) * 0.5, mean).to(tl.float16)
    middle, half_range = center.to(tl.float32), (high - low) * 0.5
    levels = tl.where(coded, half_levels, 1.0)
    step = tl.zeros(width.shape, tl.int32)
    least = tl.full(width.shape, float("inf"), tl.float32)
    for number in range(TRIALS):  # not unrolled, for that would spill on AMD hardware
        trial = tl.where(coded, round_e5m3(tl.div_rn(half_range * _clip(number), levels)), 0)
        size = e5m3_value(trial)
        codes = _nearest(x, size[:, None], middle[:, None], half_levels[:, None])
        value = codes * size[:, None] + lowest_value(size, middle, half_levels)[:, None]
        difference = tl.where(finite, value - x, 0.0)
        error = sum_pairs(difference * difference)
        step = tl.where(error < least, trial, step)
        least = tl.minimum(error, least)
    return step, center


@triton.jit
def _write_params(source, params, scratch, CONSTANTS: tl.constexpr, TILE: tl.constexpr):
    """Write the parameters of a page, and its codes to scratch in place of its tokens, in tiles of whole channels."""
    DIM: tl.constexpr = CONSTANTS.head_dim
    D_PAD: tl.constexpr = triton.next_power_of_2(DIM)
    TILES: tl.constexpr = (
        2 if CONSTANTS.in_coded_form else 4
    )  # the ring takes more registers to read
    CHANNELS: tl.constexpr = min(D_PAD, max(1, TILE // (TILES * CONSTANTS.page_size)))
    for block in range(0, DIM, CHANNELS):
        channel = block + tl.arange(0, CHANNELS)
        width = load_widths(source.tail, channel, CONSTANTS)
        x = _load_page(source, scratch, channel, CONSTANTS)
        step, center = _channel_params(x, width)
        size, middle = e5m3_value(step)[:, None], center.to(tl.float32)[:, None]
        code = _nearest(bounded(x), size, middle, half_levels_of(width)[:, None])
        token = tl.arange(0, CONSTANTS.page_size)[None, :]
        where = scratch + token * DIM + channel[:, None]
        tl.store(where, code, mask=(channel < DIM)[:, None] & (token >= 0))
        word = center.to(tl.uint16, bitcast=True).to(tl.int32)
        exists = channel < DIM
        tl.store(params + channel, step.to(tl.uint8), mask=exists)
        tl.store(params + DIM + channel, (word & 0xFF).to(tl.uint8), mask=exists)
        tl.store(params + 2 * DIM + channel, (word >> 8).to(tl.uint8), mask=exists)


@triton.jit
def _write_places(tail, places, CONSTANTS: tl.constexpr):
    """Write channel and bit of each bit of a token, ``channel * MAX_WIDTH + bit``, as fp32."""
    channel = tl.arange(0, triton.next_power_of_2(CONSTANTS.head_dim))
    width = load_widths(tail, channel, CONSTANTS)
    single, digits = first_fields(width)
    number = channel * MAX_WIDTH
    tl.store(places + single, (number + width - 1).to(tl.float32), mask=width % 2 == 1)
    for bit in tl.static_range(MAX_WIDTH):
        where = places + 2 * digits + bit
        tl.store(where, (number + bit).to(tl.float32), mask=bit < width // 2 * 2)


@triton.constexpr_function
def _tile_tokens(page, tile):
    return min(page, max(1, tile // (64 * channelwise_scheme.BLOCK_WORDS)))


@triton.jit
def _pack(codes, scratch, places, CONSTANTS: tl.constexpr, TILE: tl.constexpr):
    """Write the fields of a page whose codes are in scratch, in tiles of words."""
    PAGE: tl.constexpr = CONSTANTS.page_size
    TOKENS: tl.constexpr = _tile_tokens(PAGE, TILE)
    PARTS: tl.constexpr = PAGE // TOKENS
    bit = tl.arange(0, 2 * FIELDS)[None, :, None]
    word = tl.arange(0, BLOCK_WORDS)[None, None, :]
    for tile in range(CONSTANTS.bit_blocks * PARTS):
        block = tile // PARTS
        words = block_words(block, CONSTANTS)
        token = tile % PARTS * TOKENS + tl.arange(0, TOKENS)
        exists = (word < words) & (bit >= 0)
        number = 2 * (block * UNIT + bit // 2 * words + word) + bit % 2
        place = tl.load(places + number, mask=exists, other=0.0).to(tl.int32)
        channel, of_code = place // MAX_WIDTH, place % MAX_WIDTH
        there = exists & (token >= 0)[:, None, None]
        where = scratch + token[:, None, None] * CONSTANTS.head_dim + channel
        code = tl.load(where, mask=there, other=0.0).to(tl.int32)
        packed = tl.sum(((code >> of_code) & 1) << bit, 1)
        where = codes + block * (BLOCK_WORDS * PAGE) + token[:, None] * words
        word_2d = tl.arange(0, BLOCK_WORDS)[None, :]
        tl.store(where + word_2d, packed.to(tl.uint16), mask=word_2d < words)


@triton.jit
def quantize_page(source, page, scratch, CONSTANTS: tl.constexpr, TILE: tl.constexpr):
    """Quantize and pack a page of a head that has found its state; in coded form if the layout has tables."""
    places = scratch + (CONSTANTS.scratch_size - CONSTANTS.bit_rows)
    _write_params(source, page.params, scratch, CONSTANTS, TILE)
    _write_places(source.tail, places, CONSTANTS)
    tl.debug_barrier()
    _pack(page.codes, scratch, places, CONSTANTS, TILE)
