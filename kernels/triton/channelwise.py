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
from kvq_compile.kernels.triton.formats import e5m3_half, e5m3_value
from kvq_compile.kernels.triton.primitives import join_8
from kvq_compile.kernels.triton.transforms import cosine_and_sine, load_table, rotate_back

MAX_WIDTH = tl.constexpr(channelwise_scheme.MAX_WIDTH)
BLOCK_WORDS = tl.constexpr(channelwise_scheme.BLOCK_WORDS)
BLOCK_ROWS = tl.constexpr(16 * channelwise_scheme.BLOCK_WORDS)  # bits of a token in a block
HELD_COLUMNS = tl.constexpr(64)  # of all blocks together: what registers hold of queries


class BitQueries(NamedTuple):
    """Queries for products with bits, in tiles of ``block_q`` columns.

    Attributes:
        rows: What each bit of a block adds to a score for a step of 1, ``[B * Hkv, tiles, blocks, 128, block_q]``;
            zeros for bits that the last block lacks.
        channel: The channel of each, ``[B * Hkv, blocks, 128]``.
        plain: The queries, ``[B * Hkv, tiles, block_q, D padded]``, scaled as scores are.
        half_levels: Half of the levels of each channel, ``[B * Hkv, D padded]``.
        factor: What products with ``rows`` are multiplied by, ``[B * Hkv, tiles, block_q]``.
        mean: What cosine and sine of the angles of pairs are multiplied by in scores, for the mean of keys,
            ``[B * Hkv, tiles, 2, places, block_q]``; ``None`` if keys keep their mean.
        angles: Cosine and sine for the tokens of a page, ``[Hkv, page_size, 2, places]``; or ``None``.
    """

    rows: Any
    channel: Any
    plain: Any
    half_levels: Any
    factor: Any
    mean: Any
    angles: Any


class Held(NamedTuple):
    """What a program keeps of `BitQueries` in registers: rows and channels a tensor for each block, if they are few."""

    rows: Any
    channels: Any
    half_levels: Any
    factor: Any


# --- elements, load by load -----------------------------------------------------------------------


@triton.jit
def block_words(block, CONSTANTS: tl.constexpr):
    """Return the words of a token in a block: what is left in the last one."""
    return tl.where(block == CONSTANTS.bit_blocks - 1, CONSTANTS.last_words, BLOCK_WORDS)


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
    """Return the elements (fp32) that a page stands for, a load for each bit; for ``token`` ``[rows, 1]``, all of
    ``channel`` ``[1, channels]`` in their order.
    """
    PAGE: tl.constexpr = CONSTANTS.page_size
    real = channel < CONSTANTS.head_dim
    # A scan of [1, channels] does not compile for some layouts of it (Triton 3.6).
    width = load_widths(tail_of(page, CONSTANTS), tl.arange(0, channel.shape[1]), CONSTANTS)
    first = (tl.cumsum(width, 0) - width)[None, :]
    width = width[None, :]
    code = tl.zeros(exists.shape, tl.int32)
    for bit in range(tl.max(tl.max(width, 1), 0)):
        number = first + bit
        block, place = number // BLOCK_ROWS, number % BLOCK_ROWS
        words = block_words(block, CONSTANTS)
        where = page.codes + block * (BLOCK_WORDS * PAGE) + token * words + place % words
        word = tl.load(where, mask=exists & (bit < width), other=0).to(tl.int32)
        code |= ((word >> (place // words)) & 1) << bit
    size = e5m3_value(tl.load(page.params + channel, mask=real, other=0).to(tl.int32))
    center = load_center(page.params, channel, real, CONSTANTS)
    return code.to(tl.float32) * size + lowest_value(size, center, half_levels_of(width))


# --- attention ------------------------------------------------------------------------------------


@triton.jit
def row_of(block, field, word):
    """Return where a bit is among those of all blocks, as tiles have them.

    The lowest digit of the field comes behind that of the word: that is where the matrix instruction wants the elements
    that a lane has side by side.
    """
    return block * BLOCK_ROWS + field // 2 * 16 + word // 2 * 4 + field % 2 * 2 + word % 2


@triton.jit
def tile_of(bits, head, kv_heads, tiles, KEY: tl.constexpr, LAUNCH: tl.constexpr):
    """Return the `BitQueries` of a program's tile, one of ``tiles`` of a head (int64), as far as it has them."""
    D_PAD: tl.constexpr = triton.next_power_of_2(KEY.head_dim)
    tile = head * tiles + tl.program_id(1)
    mean, angles = 0, 0
    if KEY.takes_mean:
        mean = bits.mean + tile * (2 * KEY.mean_places * LAUNCH.block_q)
        angles = bits.angles + head % kv_heads * (KEY.page_size * 2 * KEY.mean_places)
    return BitQueries(
        bits.rows + tile * (KEY.bit_blocks * BLOCK_ROWS * LAUNCH.block_q),
        bits.channel + head * (KEY.bit_blocks * BLOCK_ROWS),
        bits.plain + tile * (D_PAD * LAUNCH.block_q),
        bits.half_levels + head * D_PAD,
        bits.factor + tile * LAUNCH.block_q,
        mean,
        angles,
    )


@triton.jit
def _load_block(bits, block, LAUNCH: tl.constexpr):
    """Return rows and channels of a block."""
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    column = tl.arange(0, LAUNCH.block_q)
    rows = tl.load(bits.rows + row[:, None] * LAUNCH.block_q + column[None, :])
    return rows, tl.load(bits.channel + row)


@triton.jit
def hold_queries(bits, KEY: tl.constexpr, LAUNCH: tl.constexpr):
    """Return what a program holds of its `BitQueries`."""
    channel = tl.arange(0, triton.next_power_of_2(KEY.head_dim))
    column = tl.arange(0, LAUNCH.block_q)
    BLOCKS: tl.constexpr = KEY.bit_blocks
    all_rows, channels = (), ()
    if BLOCKS * LAUNCH.block_q <= HELD_COLUMNS:
        for block in tl.static_range(BLOCKS):
            rows, channel_of = _load_block(bits, block, LAUNCH)
            all_rows += (rows,)  # type: ignore[assignment]  # tuples that grow
            channels += (channel_of,)  # type: ignore[assignment]
    half_levels = tl.load(bits.half_levels + channel)
    return Held(all_rows, channels, half_levels, tl.load(bits.factor + column))


@triton.jit
def load_params(params, page, exists, held, KEY: tl.constexpr, LAUNCH: tl.constexpr):
    """Return the parameters of a page, as bytes: steps and the bytes of centers ``[D padded]``, and the steps ``[128,
    1]`` of each block held.
    """
    DIM: tl.constexpr = KEY.head_dim
    first = params + tl.cast(page, tl.int64) * KEY.page_params
    channel = tl.arange(0, triton.next_power_of_2(DIM))
    ok = exists & (channel < DIM)
    BLOCKS: tl.constexpr = KEY.bit_blocks
    fields = ()
    for field in tl.static_range(3):
        byte = tl.load(first + field * DIM + channel, mask=ok, other=0)
        fields += (byte,)  # type: ignore[assignment]  # a tuple that grows
    if BLOCKS * LAUNCH.block_q <= HELD_COLUMNS:
        for block in tl.static_range(BLOCKS):
            step = tl.load(first + held.channels[block][:, None], mask=exists, other=0)
            fields += (step,)  # type: ignore[assignment]
    return fields


@triton.jit
def _bits(w):
    """Return the fields of words of one-bit codes: see the docstring of the module."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 l, r; shl.b32 l, $16, 6; shr.u32 r, $16, 5;
        and.b32 $0, l, 0x00400040; and.b32 $1, l, 0x00800080; and.b32 $2, l, 0x01000100;
        and.b32 $3, l, 0x02000200; and.b32 $4, l, 0x04000400;
        and.b32 $5, $16, 0x00200020; and.b32 $6, $16, 0x00400040; and.b32 $7, $16, 0x00800080;
        and.b32 $8, $16, 0x01000100; and.b32 $9, $16, 0x02000200; and.b32 $10, $16, 0x04000400;
        and.b32 $11, r, 0x00400040; and.b32 $12, r, 0x00800080; and.b32 $13, r, 0x01000100;
        and.b32 $14, r, 0x02000200; and.b32 $15, r, 0x04000400; }""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
        args=[w],
        dtype=(tl.float16,) * 16,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _read_bits(codes, WORDS: tl.constexpr, KEY: tl.constexpr, LAUNCH: tl.constexpr):
    """Return a block of ``WORDS`` words a token as ``[page_size, 128]``, its bits in the order of `row_of`, each times
    the power of two that its field has on NVIDIA hardware.
    """
    PAGE: tl.constexpr = KEY.page_size
    word = tl.arange(0, BLOCK_WORDS)[None, :]
    where = codes + tl.arange(0, PAGE)[:, None] * WORDS + word
    if WORDS == BLOCK_WORDS:
        w = tl.load(where)
    else:
        w = tl.load(where, mask=word < WORDS, other=0)
    if LAUNCH.fast:
        a, b, c, d, e, f, g, h, i, j, k, m, n, o, p, q = _bits(w)
        even, odd = join_8(a, c, e, g, i, k, n, p), join_8(b, d, f, h, j, m, o, q)
        bits = tl.permute(tl.join(even, odd), (0, 2, 3, 4, 5, 1))
    else:
        bits = (w.to(tl.int32)[:, None, :] >> tl.arange(0, 16)[None, :, None]) & 1
    bits = tl.permute(tl.reshape(bits, (PAGE, 8, 2, BLOCK_WORDS // 2, 2)), (0, 1, 3, 2, 4))
    return tl.reshape(bits, (PAGE, BLOCK_ROWS)).to(LAUNCH.dtype)


@triton.jit
def _add_block(
    scores, codes, rows, step, WORDS: tl.constexpr, KEY: tl.constexpr, LAUNCH: tl.constexpr
):
    """Return ``scores`` and the products of a block, whose rows belong to channels with these steps (bytes)."""
    weights = rows * e5m3_half(step).to(rows.dtype)
    bits = _read_bits(codes, WORDS, KEY, LAUNCH)
    return tl.dot(bits, weights, scores, input_precision=LAUNCH.precision)


@triton.jit
def page_scores(
    scores, page, codes, params, fields, bits, held, KEY: tl.constexpr, LAUNCH: tl.constexpr
):  # fmt: skip
    """Return the scores ``[page_size, queries]`` of a page with parameters ``fields``, as `load_params` has them, and
    what adds to ``scores`` in units of products with bits.
    """
    BLOCKS: tl.constexpr = KEY.bit_blocks
    BLOCK: tl.constexpr = BLOCK_WORDS * KEY.page_size  # words
    if BLOCKS * LAUNCH.block_q <= HELD_COLUMNS:
        for block in tl.static_range(BLOCKS - 1):
            rows, step = held.rows[block], fields[3 + block]
            scores = _add_block(scores, codes + block * BLOCK, rows, step, BLOCK_WORDS, KEY, LAUNCH)
        rows, step = held.rows[BLOCKS - 1], fields[2 + BLOCKS]
    else:
        for block in range(BLOCKS - 1):
            rows, channel = _load_block(bits, block, LAUNCH)
            step = tl.load(params + channel[:, None])
            scores = _add_block(scores, codes + block * BLOCK, rows, step, BLOCK_WORDS, KEY, LAUNCH)
        rows, channel = _load_block(bits, BLOCKS - 1, LAUNCH)
        step = tl.load(params + channel[:, None])
    last = codes + (BLOCKS - 1) * BLOCK
    scores = _add_block(scores, last, rows, step, KEY.last_words, KEY, LAUNCH)
    center = fields[1].to(tl.uint16) | (fields[2].to(tl.uint16) << 8)
    center = center.to(tl.float16, bitcast=True).to(tl.float32)
    low = lowest_value(e5m3_value(fields[0]), center, held.half_levels)
    channel, column = tl.arange(0, low.shape[0]), tl.arange(0, LAUNCH.block_q)
    # Loaded for each page, for held they would cost an SM its third program. The compiler, which would load them
    # once, does not know that pages are not negative.
    where = bits.plain + tl.minimum(page, 0) * 16
    plain = tl.load(where + column[:, None] * low.shape[0] + channel[None, :])
    return scores * held.factor[None, :] + tl.sum(plain * low[None, :], 1)[None, :]


# --- the mean of keys -----------------------------------------------------------------------------


@triton.jit
def start_mean(keys, first, KEY: tl.constexpr, LAUNCH: tl.constexpr):
    """Return what a program needs of the mean of keys, for pages from ``first`` on.

    A pair ``a, b`` of the mean ``m``, rotated by the angle of a slot, adds ``cosine (q_a m_a + q_b m_b) + sine (q_b
    m_a - q_a m_b)`` to a score. The angle is that of the page's first slot, by which both terms are rotated, page by
    page, and that of the token in the page, the same for all pages.

    Returns:
        Both terms ``[places, queries]`` for the first page, cosine and sine of the tokens of a page ``[page_size, 2 *
        places]``, and cosine and sine of the angle from page to page.
    """
    PLACES: tl.constexpr = KEY.mean_places
    pair, column = tl.arange(0, PLACES), tl.arange(0, LAUNCH.block_q)
    where = keys.bits.mean + pair[:, None] * LAUNCH.block_q + column[None, :]
    a, b = tl.load(where), tl.load(where + PLACES * LAUNCH.block_q)
    tables = keys.calibration.tables
    frequency = load_table(tables, pair, pair < KEY.mean_pairs, "frequency", KEY)
    cosine, sine = cosine_and_sine((KEY.sinks + first * KEY.page_size) * frequency)
    a, b = rotate_back(a, b, cosine, sine)
    token, place = tl.arange(0, KEY.page_size), tl.arange(0, 2 * PLACES)
    angles = tl.load(keys.bits.angles + token[:, None] * (2 * PLACES) + place[None, :])
    return a, b, angles, cosine_and_sine(KEY.page_size * frequency)


@triton.jit
def mean_scores(a, b, angles, KEY: tl.constexpr, LAUNCH: tl.constexpr):
    """Return what the mean of keys adds to the scores of a page, in units of products with bits."""
    terms = tl.permute(tl.join(a.to(LAUNCH.dtype), b.to(LAUNCH.dtype)), (2, 0, 1))
    terms = tl.reshape(terms, (2 * KEY.mean_places, LAUNCH.block_q))
    scores = tl.dot(angles, terms, input_precision=LAUNCH.precision)
    return scores * (2.0**-18 if LAUNCH.fast else 2.0)
