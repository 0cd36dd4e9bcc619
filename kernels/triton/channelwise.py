"""The channelwise scheme in Triton: reading packed pages, whose channels differ in bits.

Scores of a page are products with bits. A block of 128 bits of all tokens is read as 128 channels of one bit; what a
bit adds to a score is the query's channel times its step times the power of two of the bit. Channel and power of each
bit belong to the head, so that queries come as a row for each bit (`channelwise_query`) and a page has to bring its
steps alone. What the lowest codes of a page stand for adds the same to the scores of all of its tokens::

    q . x = sum over bits r of  bit[r] * (q[channel[r]] * 2 ** bit_of[r] * step[channel[r]])
          + sum over channels c of  q[c] * (center[c] - step[c] * levels[c] / 2)

Blocks are multiplied one after the other, so that registers hold one tile at a time. Parameters are loaded one page
ahead.

On NVIDIA hardware one logic instruction cuts a field out of two neighbouring words: bit ``p`` of an fp16 number alone
reads as ``2 ** (p - 24)``, which is subnormal, and the matrix instruction takes it as it is. Two shifts of a word bring
all fields to places 5 to 10; the query's row makes up for the place.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kvq_compile.kernels import channelwise_scheme
from kvq_compile.kernels.triton.arguments import tail_of
from kvq_compile.kernels.triton.channelwise_mean import mean_scores, turn_mean
from kvq_compile.kernels.triton.formats import e5m3_half, e5m3_value
from kvq_compile.kernels.triton.primitives import (
    cut_bit,
    fields_2,
    flat_tile,
    join_8,
    place_of,
)

MAX_WIDTH = tl.constexpr(channelwise_scheme.MAX_WIDTH)
BLOCK_WORDS = tl.constexpr(channelwise_scheme.BLOCK_WORDS)
FIELDS = tl.constexpr(channelwise_scheme.FIELDS)
UNIT = tl.constexpr(channelwise_scheme.BLOCK_WORDS * channelwise_scheme.FIELDS)  # rows
HELD_COLUMNS = tl.constexpr(96)  # of all units together: what registers hold of queries
GROUP = 4  # units multiplied at once, whose rows reach the matrix unit together
LEAST_PLACE = tl.constexpr(4)  # of fields of two bits
BOTH, LOWER, HIGHER = tl.constexpr(3), tl.constexpr(1), tl.constexpr(2)  # bits of a field


class FieldQueries(NamedTuple):
    """Queries for products with fields, in tiles of ``block_q`` columns.

    Attributes:
        rows: What each field of a unit adds to a score for a step of 1, ``[B * Hkv, tiles, units, 64, block_q]``;
            zeros for fields that there are not.
        channel: The channel of each, ``[B * Hkv, units, 64]``.
        plain: The queries, ``[B * Hkv, tiles, block_q, D padded]``, scaled as scores are.
        constant: What each page adds to scores besides, ``[B * Hkv, pages, block_q]``; ``None`` where attention
            computes it itself.
        half_levels: Half of the levels of each channel, ``[B * Hkv, D padded]``.
        factor: What products with ``rows`` are multiplied by, ``[B * Hkv, tiles, block_q]``.
        mean: What cosine and sine of the angles of pairs are multiplied by in scores, for the mean of keys,
            ``[B * Hkv, tiles, 2, places, block_q]``; ``None`` if keys keep their mean.
        ratio: What these products are multiplied by to be in units of those with ``rows``, ``[B * Hkv, tiles,
            block_q]``; or ``None``.
        angles: Cosine and sine for the tokens of a page, ``[Hkv, page_size, 2, places]``; or ``None``.
    """

    rows: Any
    channel: Any
    plain: Any
    constant: Any
    half_levels: Any
    factor: Any
    mean: Any
    ratio: Any
    angles: Any


class Held(NamedTuple):
    """What a program keeps of `FieldQueries`: rows and channels, a tensor for each group of units, if they are few."""

    rows: Any
    channels: Any
    half_levels: Any
    factor: Any


# --- fields ---------------------------------------------------------------------------------------


@triton.jit
def first_fields(width):
    """Return, for all channels of widths ``[channels]``, the number of the bit that is left over, among all such, and
    the field of the lowest digit.
    """
    single, digits = width % 2, width // 2
    total = tl.sum(single, 0)
    return tl.cumsum(single, 0) - single, total // 2 + tl.cumsum(digits, 0) - digits


@triton.jit
def field_place(field, CONSTANTS: tl.constexpr):
    """Return where a field of a token is: block, words of a token there, field of a word, word."""
    block, inside = field // UNIT, field % UNIT
    words = block_words(block, CONSTANTS)
    return block, words, inside // words, inside % words


@triton.jit
def block_words(block, CONSTANTS: tl.constexpr):
    """Return the words of a token in a block: what is left in the last one."""
    return tl.where(block == CONSTANTS.bit_blocks - 1, CONSTANTS.last_words, BLOCK_WORDS)


@triton.jit
def _load_field(codes, token, field, exists, CONSTANTS: tl.constexpr):
    """Return fields (int32) of tokens, 0 where there are none."""
    block, words, shift, word = field_place(field, CONSTANTS)
    where = codes + block * (BLOCK_WORDS * CONSTANTS.page_size) + token * words + word
    return tl.load(where, mask=exists, other=0).to(tl.int32) >> (2 * shift) & 3


# --- elements, load by load -----------------------------------------------------------------------


@triton.jit
def load_widths(tail, channel, CONSTANTS: tl.constexpr):
    """Return the widths (int32) of channels of a head, whose tail of exact rows is ``tail``; 0 where it has none."""
    where = tail + CONSTANTS.query_rows * CONSTANTS.head_dim + channel
    return tl.load(where, mask=channel < CONSTANTS.head_dim, other=0.0).to(tl.int32)


@triton.jit
def half_levels_of(width):
    """Return half of the levels (fp32) of codes of these widths."""
    return ((1 << width) - 1).to(tl.float32) * 0.5


@triton.jit
def load_center(params, channel, exists, CONSTANTS: tl.constexpr):
    """Return the centers (fp32) of channels of a page."""
    where = params + CONSTANTS.head_dim + channel
    low = tl.load(where, mask=exists, other=0).to(tl.uint16)
    high = tl.load(where + CONSTANTS.head_dim, mask=exists, other=0).to(tl.uint16)
    return (low | (high << 8)).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def lowest_value(size, center, half_levels):
    """Return what the lowest codes of channels stand for."""
    return center - size * half_levels


@triton.jit
def load_elements(page, token, channel, exists, CONSTANTS: tl.constexpr):
    """Return the elements (fp32) that a page stands for, a load for each digit; for ``token`` ``[rows, 1]``, all of
    ``channel`` ``[1, channels]`` in their order.
    """
    real = channel < CONSTANTS.head_dim
    # A scan of [1, channels] does not compile for some layouts of it (Triton 3.6).
    width = load_widths(tail_of(page, CONSTANTS), tl.arange(0, channel.shape[1]), CONSTANTS)
    single, digits = first_fields(width)
    single, digits, width = single[None, :], digits[None, :], width[None, :]
    odd = exists & (width % 2 == 1)
    field = _load_field(page.codes, token, single // 2, odd, CONSTANTS)
    code = tl.where(odd, (field >> single % 2 & 1) << tl.maximum(width - 1, 0), 0)
    for digit in range(tl.max(tl.max(width // 2, 1), 0)):
        there = exists & (digit < width // 2)
        code |= _load_field(page.codes, token, digits + digit, there, CONSTANTS) << 2 * digit
    size = e5m3_value(tl.load(page.params + channel, mask=real, other=0).to(tl.int32))
    center = load_center(page.params, channel, real, CONSTANTS)
    return code.to(tl.float32) * size + lowest_value(size, center, half_levels_of(width))


# --- attention ------------------------------------------------------------------------------------


@triton.jit
def row_of(field, word):
    """Return the row of a field among those of a unit, as tiles have them.

    The lowest digit of the field comes behind that of the word: that is where the matrix instruction wants the elements
    that a lane has side by side.
    """
    return field // 2 * 16 + word // 2 * 4 + field % 2 * 2 + word % 2


@triton.constexpr_function
def holds_queries(key, launch):
    """Return whether programs hold their `FieldQueries`, and the constants of pages are computed before."""
    units = key.bit_blocks + key.twice_read
    return launch.block_q <= 16 and units * launch.block_q <= HELD_COLUMNS.value


@triton.jit
def tile_of(fields, head, kv_heads, tiles, pages, KEY: tl.constexpr, LAUNCH: tl.constexpr):
    """Return the `FieldQueries` of a program's tile, one of ``tiles`` of a head (int64) with room for ``pages``, as far
    as it has them.
    """
    D_PAD: tl.constexpr = triton.next_power_of_2(KEY.head_dim)
    ROWS: tl.constexpr = (KEY.bit_blocks + KEY.twice_read) * UNIT
    tile = head * tiles + tl.program_id(1)
    nothing = fields.factor
    plain, constant, half_levels = nothing, nothing, nothing
    mean, ratio, angles = nothing, nothing, nothing
    if holds_queries(KEY, LAUNCH):
        constant = fields.constant + head * pages * LAUNCH.block_q
    else:
        plain = fields.plain + tile * (D_PAD * LAUNCH.block_q)
        half_levels = fields.half_levels + head * D_PAD
    if KEY.takes_mean:
        mean = fields.mean + tile * (2 * KEY.mean_places * LAUNCH.block_q)
        ratio = fields.ratio + tile * LAUNCH.block_q
        angles = fields.angles + head % kv_heads * (KEY.page_size * 2 * KEY.mean_places)
    return FieldQueries(
        fields.rows + tile * (ROWS * LAUNCH.block_q),
        fields.channel + head * ROWS,
        plain,
        constant,
        half_levels,
        fields.factor + tile * LAUNCH.block_q,
        mean,
        ratio,
        angles,
    )


@triton.jit
def _load_units(fields, unit, UNITS: tl.constexpr, LAUNCH: tl.constexpr):
    """Return rows and channels of some units."""
    row = unit * UNIT + tl.arange(0, UNITS * UNIT)
    column = tl.arange(0, LAUNCH.block_q)
    rows = tl.load(fields.rows + row[:, None] * LAUNCH.block_q + column[None, :])
    return rows, tl.load(fields.channel + row)


@triton.jit
def hold_queries(fields, KEY: tl.constexpr, LAUNCH: tl.constexpr):
    """Return what a program holds of its `FieldQueries`."""
    channel = tl.arange(0, triton.next_power_of_2(KEY.head_dim))
    factor = tl.load(fields.factor + tl.arange(0, LAUNCH.block_q))
    all_rows, channels, half_levels = (), (), factor
    if holds_queries(KEY, LAUNCH):
        for group in tl.static_range(_groups(KEY)):
            rows, channel_of = _load_units(
                fields, _first_of_group(KEY, group), _size_of_group(KEY, group), LAUNCH
            )
            all_rows += (rows,)  # type: ignore[assignment]  # tuples that grow
            channels += (channel_of,)  # type: ignore[assignment]
    else:
        half_levels = tl.load(fields.half_levels + channel)
    return Held(all_rows, channels, half_levels, factor)


@triton.jit
def field_exponent(field, FAST: tl.constexpr):
    """Return the exponent of what rows of a field are multiplied by, for fields are read where they lie."""
    if FAST:
        exponent = LEAST_PLACE - place_of(field, 2)
    else:
        exponent = field * 0
    return exponent


@triton.jit
def _load_words(codes, WORDS: tl.constexpr, KEY: tl.constexpr):
    """Return a block of ``WORDS`` words a token, ``[page_size, 8]``."""
    word = tl.arange(0, BLOCK_WORDS)[None, :]
    where = codes + tl.arange(0, KEY.page_size)[:, None] * WORDS + word
    if WORDS == BLOCK_WORDS:
        return tl.load(where)
    else:
        return tl.load(where, mask=word < WORDS, other=0)


@triton.jit
def _read_unit(w, PART: tl.constexpr, KEY: tl.constexpr, LAUNCH: tl.constexpr):
    """Return the fields of words ``[page_size, 8]``, or one bit of each, as ``[page_size, 64]`` in the order of
    `row_of`, each times the power of two that its place stands for on NVIDIA hardware.
    """
    PAGE: tl.constexpr = KEY.page_size
    if LAUNCH.fast:
        if PART == BOTH:
            a, b, c, d, e, f, g, h = fields_2(w, True)
        else:
            a, b, c, d, e, f, g, h = cut_bit(w, PART)
        fields = tl.permute(join_8(a, b, c, d, e, f, g, h), (0, 2, 3, 4, 1))
    else:
        fields = (w.to(tl.int32)[:, None, :] >> (2 * tl.arange(0, FIELDS))[None, :, None]) & PART
    fields = tl.reshape(fields, (PAGE, FIELDS // 2, 2, BLOCK_WORDS // 2, 2))
    return flat_tile(tl.permute(fields, (0, 1, 3, 2, 4)), PAGE, UNIT).to(LAUNCH.dtype)


@triton.jit
def _beside(a, b):
    """Return two tiles ``[tokens, rows]`` as one of twice the rows."""
    both = tl.permute(tl.join(a, b), (0, 2, 1))
    return tl.reshape(both, (a.shape[0], 2 * a.shape[1]))


@triton.constexpr_function
def _group_sizes(key):
    """Return how many units are multiplied at once, group by group: `GROUP`, then what is left."""
    units = key.bit_blocks + key.twice_read
    return [GROUP] * (units // GROUP) + [size for size in (2, 1) if units % GROUP & size]


@triton.constexpr_function
def _groups(key):
    return len(_group_sizes(key))


@triton.constexpr_function
def _first_of_group(key, group):
    return sum(_group_sizes(key)[:group])


@triton.constexpr_function
def _size_of_group(key, group):
    return _group_sizes(key)[group]


@triton.jit
def _multiply_group(
    scores, tiles, rows, GROUP_NUMBER: tl.constexpr, KEY: tl.constexpr, LAUNCH: tl.constexpr
):
    """Return ``scores`` and the products of the tiles of a group with its rows."""
    FIRST: tl.constexpr = _first_of_group(KEY, GROUP_NUMBER)
    SIZE: tl.constexpr = _size_of_group(KEY, GROUP_NUMBER)
    a = tiles[FIRST]
    if SIZE >= 2:
        a = _beside(a, tiles[FIRST + 1])
    if SIZE == 4:
        a = _beside(a, _beside(tiles[FIRST + 2], tiles[FIRST + 3]))
    return tl.dot(a, rows, scores, input_precision=LAUNCH.precision)


@triton.jit
def _load_steps(params, channel, KEY: tl.constexpr, LAUNCH: tl.constexpr):
    """Return the steps ``[rows, 1]`` of channels of a page, in the dtype of products."""
    if KEY.head_dim % 4 == 0:  # bytes are not loaded ahead, words are
        words = params.to(tl.pointer_type(tl.int32), bitcast=True) + channel[:, None] // 4
        step = tl.load(words) >> 8 * (channel[:, None] % 4)
    else:
        step = tl.load(params + channel[:, None])
    return e5m3_half(step & 0xFF).to(LAUNCH.dtype)


@triton.jit
def _read_units(codes, KEY: tl.constexpr, LAUNCH: tl.constexpr):
    """Return the tiles of all units of a page."""
    BLOCKS: tl.constexpr = KEY.bit_blocks
    TWICE: tl.constexpr = KEY.twice_read
    BLOCK: tl.constexpr = BLOCK_WORDS * KEY.page_size  # words
    tiles, words = (), ()
    for block in tl.static_range(BLOCKS - 1):
        words += (_load_words(codes + block * BLOCK, BLOCK_WORDS, KEY),)  # type: ignore[assignment]  # tuples that grow
    words += (_load_words(codes + (BLOCKS - 1) * BLOCK, KEY.last_words, KEY),)  # type: ignore[assignment]
    for unit in tl.static_range(BLOCKS + TWICE):
        if unit < TWICE:
            tile = _read_unit(words[unit], LOWER, KEY, LAUNCH)
        elif unit < BLOCKS:
            tile = _read_unit(words[unit], BOTH, KEY, LAUNCH)
        else:
            tile = _read_unit(words[unit - BLOCKS], HIGHER, KEY, LAUNCH)
        tiles += (tile,)  # type: ignore[assignment]
    return tiles


@triton.jit
def _held_scores(codes, params, held, mean, KEY: tl.constexpr, LAUNCH: tl.constexpr):
    """Return the products of a page with rows that are held, added up in two sums, since each product waits for the one
    before in its sum.
    """
    PAGE: tl.constexpr = KEY.page_size
    BLOCK_Q: tl.constexpr = LAUNCH.block_q
    scores = tl.zeros([PAGE, BLOCK_Q], tl.float32)
    second, terms, rows = scores, scores, ()
    if KEY.takes_mean:  # moved to shared memory with the rows
        terms = mean.own.to(LAUNCH.dtype)
    for group in tl.static_range(_groups(KEY)):
        steps = _load_steps(params, held.channels[group], KEY, LAUNCH)
        rows += (held.rows[group] * steps,)  # type: ignore[assignment]  # a tuple that grows
    if KEY.takes_mean:
        second = mean_scores(mean, terms, LAUNCH)
    tiles = _read_units(codes, KEY, LAUNCH)
    for group in tl.static_range(_groups(KEY)):
        if group % 2 == 0:
            scores = _multiply_group(scores, tiles, rows[group], group, KEY, LAUNCH)
        else:
            second = _multiply_group(second, tiles, rows[group], group, KEY, LAUNCH)
    return scores + second


@triton.jit
def _add_block(
    scores, codes, params, fields, block, WORDS: tl.constexpr, TWICE: tl.constexpr,
    KEY: tl.constexpr, LAUNCH: tl.constexpr,
):  # fmt: skip
    """Return ``scores`` and the products of a block, whose rows and steps are loaded."""
    w = _load_words(codes + block * (BLOCK_WORDS * KEY.page_size), WORDS, KEY)
    rows, channel = _load_units(fields, block, 1, LAUNCH)
    rows = rows * _load_steps(params, channel, KEY, LAUNCH)
    tile = _read_unit(w, LOWER if TWICE else BOTH, KEY, LAUNCH)
    scores = tl.dot(tile, rows, scores, input_precision=LAUNCH.precision)
    if TWICE:
        rows, channel = _load_units(fields, KEY.bit_blocks + block, 1, LAUNCH)
        rows = rows * _load_steps(params, channel, KEY, LAUNCH)
        tile = _read_unit(w, HIGHER, KEY, LAUNCH)
        scores = tl.dot(tile, rows, scores, input_precision=LAUNCH.precision)
    return scores


@triton.jit
def _loaded_scores(codes, params, fields, mean, KEY: tl.constexpr, LAUNCH: tl.constexpr):
    """Return the products of a page with rows that are loaded, block by block."""
    LAST: tl.constexpr = KEY.bit_blocks - 1
    TWICE: tl.constexpr = min(KEY.twice_read, KEY.bit_blocks - 1)
    PAGE: tl.constexpr = KEY.page_size
    BLOCK_Q: tl.constexpr = LAUNCH.block_q
    scores = tl.zeros([PAGE, BLOCK_Q], tl.float32)
    if KEY.takes_mean:
        scores = mean_scores(mean, mean.own.to(LAUNCH.dtype), LAUNCH)
    for block in range(TWICE):
        scores = _add_block(scores, codes, params, fields, block, BLOCK_WORDS, True, KEY, LAUNCH)
    for block in range(TWICE, LAST):
        scores = _add_block(scores, codes, params, fields, block, BLOCK_WORDS, False, KEY, LAUNCH)
    ALSO: tl.constexpr = KEY.twice_read > LAST
    return _add_block(scores, codes, params, fields, LAST, KEY.last_words, ALSO, KEY, LAUNCH)


@triton.jit
def _load_constant(page, params, fields, held, KEY: tl.constexpr, LAUNCH: tl.constexpr):
    """Return what the lowest codes of a page add to the scores of each query."""
    column = tl.arange(0, LAUNCH.block_q)
    if holds_queries(KEY, LAUNCH):
        constant = tl.load(fields.constant + page * LAUNCH.block_q + column)
    else:
        channel = tl.arange(0, triton.next_power_of_2(KEY.head_dim))
        exists = channel < KEY.head_dim
        size = e5m3_value(tl.load(params + channel, mask=exists, other=0))
        low = lowest_value(size, load_center(params, channel, exists, KEY), held.half_levels)
        plain = tl.load(fields.plain + column[:, None] * low.shape[0] + channel[None, :])
        constant = tl.sum(plain * low[None, :], 1)
    return constant


@triton.jit
def page_scores(
    page, codes, params, fields, held, mean, KEY: tl.constexpr, LAUNCH: tl.constexpr
):  # fmt: skip
    """Return the scores ``[page_size, queries]`` of a page, and the mean of the next."""
    if holds_queries(KEY, LAUNCH):
        scores = _held_scores(codes, params, held, mean, KEY, LAUNCH)
    else:
        scores = _loaded_scores(codes, params, fields, mean, KEY, LAUNCH)
    constant = _load_constant(page, params, fields, held, KEY, LAUNCH)
    return scores * held.factor[None, :] + constant[None, :], turn_mean(mean, KEY)
