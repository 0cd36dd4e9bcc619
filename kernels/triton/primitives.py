"""What more than one kernel does with packed words and with scores: unpacking in registers, masks, online softmax.

A packed row is planar (`Layout`): field ``f`` of word ``w`` holds code ``f * words + w``. Of 3 bits a row has three
thirds, whose words at ``w`` hold 16 fields together. The helpers work on tiles whose sides are powers of two, 16 or
more. Where the words of a row are not as many, they are padded, and column ``f * WORDS_PAD + w`` of a tile then stands
for code ``f * words + w``; `row_index` does that arithmetic.

A lane multiplies four neighbouring columns of every 16. Rows of 8 words have only two words a lane there, so that
*paired* tiles have two fields of two words side by side: column ``16 a + 4 b + 2 c + d`` is field ``2 a + c`` of word
``2 b + d``. Codes in the order of fields would be moved between lanes, by way of shared memory.

Two ways lead from words to codes. The portable one shifts and masks, and runs everywhere, in the interpreter too.
On NVIDIA hardware one logic instruction puts a field of two neighbouring words under the exponent of a power of two
``2**k``, which reads as the fp16 pair ``2**k + code``; one exact subtraction leaves the codes. The fields of a word
then sit in the same lanes, so joining them moves no data. Where what a code is multiplied by can make up for a power of
two, the field is cut out alone: its bits from bit ``p`` on read as ``code * 2 ** (p - 24)``, a subnormal number or the
next larger ones, which the matrix instruction takes as they are.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kvq_compile.kernels.words import THIRD_FIELDS, THIRDS, WORD_BITS

IN_THIRD = tl.constexpr(THIRD_FIELDS)
# Scores below this count as hidden; far from where exp2 has an effect.
HIDDEN = tl.constexpr(-1.0e38)
LOG2_E = tl.constexpr(1.4426950408889634)
WEIGHT_BIAS = tl.constexpr(
    12.0
)  # weights are kept 2 ** 12 times too large, or fp16 weights would underflow


# --- queries --------------------------------------------------------------------------------------


@triton.jit
def tile_columns(tile, kv_head, tokens, LAUNCH: tl.constexpr):
    """Return what the columns of a tile of queries stand for: number among those of the KV head (int64), query head,
    token, group of a value's channels that a copy is for, and whether there is one.
    """
    column = tile * LAUNCH.block_q + tl.arange(0, LAUNCH.block_q)
    group = column // (LAUNCH.shared_by * tokens)
    if LAUNCH.copies > 1:
        column = column % (LAUNCH.shared_by * tokens)
    q_head = kv_head * LAUNCH.shared_by + column // tokens
    return column, q_head, (column % tokens).to(tl.int64), group, group < LAUNCH.copies


# --- rows of packed words -------------------------------------------------------------------------


@triton.constexpr_function
def row_fields(bits):
    """Return how many fields a word of a row has; of 3 bits, the three words at one place of the thirds."""
    return WORD_BITS if bits == THIRDS else WORD_BITS // bits


@triton.constexpr_function
def words_pad(length, bits):
    """Return the words of a row (of a third) with room for ``length`` codes, padded to fill tiles."""
    fields = row_fields(bits)
    return max(WORD_BITS // fields, triton.next_power_of_2(length // fields))


@triton.jit
def paired(column):
    """Return the columns in the order of fields that those of paired tiles are."""
    return column // 16 * 16 + column // 2 % 2 * 8 + column // 4 % 4 * 2 + column % 2


@triton.jit
def row_index(column, LENGTH: tl.constexpr, BITS: tl.constexpr, PAIRED: tl.constexpr):
    """Return the code that a tile's column stands for, and whether it exists, in rows with room for
    ``LENGTH``."""
    WORDS: tl.constexpr = LENGTH // row_fields(BITS)
    WORDS_PAD: tl.constexpr = words_pad(LENGTH, BITS)
    if PAIRED:
        column = paired(column)
    word = column % WORDS_PAD
    return (column // WORDS_PAD) * WORDS + word, word < WORDS


@triton.jit
def flat_tile(codes, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return codes of several axes as a tile ``[rows, columns]``.

    Fields of fp16 are reshaped as integers. Triton 3.8 reads an operand that is nothing but a reshaped tensor from
    shared memory in that tensor's own layout, and for Blackwell has none where the last axis is of two columns.
    """
    if codes.dtype == tl.float16:
        whole = tl.reshape(codes.to(tl.int16, bitcast=True), (ROWS, COLUMNS))
        return whole.to(tl.float16, bitcast=True)
    else:
        return tl.reshape(codes, (ROWS, COLUMNS))


@triton.jit
def pair_fields(rows):
    """Return rows ``[16 n, columns]``, one for each column of a tile, in the order of paired tiles."""
    ROWS: tl.constexpr = rows.shape[0]
    COLUMNS: tl.constexpr = rows.shape[1]
    fields = tl.reshape(rows, (ROWS // 16, 2, 4, 2, COLUMNS))
    return tl.reshape(tl.permute(fields, (0, 2, 1, 3, 4)), (ROWS, COLUMNS))


@triton.jit
def load_rows(codes, row, LENGTH: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr):
    """Load the words of rows with room for ``LENGTH`` codes, three tiles of 3 bits and else one.

    Rows from ``ROWS`` on do not exist and give zeros.
    """
    WORDS: tl.constexpr = LENGTH // row_fields(BITS)
    WORDS_PAD: tl.constexpr = words_pad(LENGTH, BITS)
    PARTS: tl.constexpr = 3 if BITS == 3 else 1
    word = tl.arange(0, WORDS_PAD)
    first = codes + row[:, None] * (PARTS * WORDS) + word[None, :]
    words = ()
    for part in tl.static_range(PARTS):
        if WORDS_PAD == WORDS and row.shape[0] == ROWS:
            tile = tl.load(first + part * WORDS)
        else:
            exists = (row < ROWS)[:, None] & (word < WORDS)[None, :]
            tile = tl.load(first + part * WORDS, mask=exists, other=0)
        words += (tile,)  # type: ignore[assignment]  # a tuple that grows
    return words


@triton.jit
def unpack_rows(
    words, BITS: tl.constexpr, PAIRED: tl.constexpr, FAST: tl.constexpr, IN_PLACE: tl.constexpr,
    DTYPE: tl.constexpr,
):  # fmt: skip
    """Return the codes ``[rows, columns]`` of words from `load_rows` as ``DTYPE``; ``IN_PLACE``, each times
    ``2 ** (place_of(its field) - 24)``, on NVIDIA hardware only.
    """
    ROWS: tl.constexpr = words[0].shape[0]
    FIELDS: tl.constexpr = row_fields(BITS)
    COLUMNS: tl.constexpr = FIELDS * words[0].shape[1]
    if FAST:
        if BITS == 8:
            a, b = fields_8(words[0], IN_PLACE)
            codes = tl.permute(tl.join(a, b), (0, 2, 1))
        elif BITS == 4:
            a, b, c, d = fields_4(words[0], IN_PLACE)
            codes = tl.permute(_join_4(a, b, c, d), (0, 2, 3, 1))
        elif BITS == 2:
            a, b, c, d, e, f, g, h = fields_2(words[0], IN_PLACE)
            codes = tl.permute(join_8(a, b, c, d, e, f, g, h), (0, 2, 3, 4, 1))
        else:
            a, b, c, d, e, f, g, h, i, j, k, m, n, o, p, q = _sixteen_fields(words, BITS, IN_PLACE)
            even = join_8(a, c, e, g, i, k, n, p)
            odd = join_8(b, d, f, h, j, m, o, q)
            codes = tl.permute(tl.join(even, odd), (0, 2, 3, 4, 5, 1))
    else:
        codes = _shift_out(words, 0, FIELDS, BITS)
    if PAIRED:
        codes = tl.permute(tl.reshape(codes, (ROWS, FIELDS // 2, 2, 4, 2)), (0, 1, 3, 2, 4))
    return flat_tile(codes, ROWS, COLUMNS).to(DTYPE)


@triton.jit
def unpack_halves(words, BITS: tl.constexpr, FAST: tl.constexpr, DTYPE: tl.constexpr):
    """Return the two halves of what `unpack_rows` returns, ``[rows, columns / 2]`` each.

    The fields of a word belong half to one and half to the other, so that columns ``c`` of both lie in
    the same lane.
    """
    ROWS: tl.constexpr = words[0].shape[0]
    HALF: tl.constexpr = row_fields(BITS) // 2
    COLUMNS: tl.constexpr = HALF * words[0].shape[1]
    if FAST:
        if BITS == 8:
            first, second = fields_8(words[0], False)
        elif BITS == 4:
            a, b, c, d = fields_4(words[0], False)
            first = tl.permute(tl.join(a, b), (0, 2, 1))
            second = tl.permute(tl.join(c, d), (0, 2, 1))
        elif BITS == 2:
            a, b, c, d, e, f, g, h = fields_2(words[0], False)
            first = tl.permute(_join_4(a, b, c, d), (0, 2, 3, 1))
            second = tl.permute(_join_4(e, f, g, h), (0, 2, 3, 1))
        else:
            a, b, c, d, e, f, g, h, i, j, k, m, n, o, p, q = _sixteen_fields(words, BITS, False)
            first = tl.permute(join_8(a, b, c, d, e, f, g, h), (0, 2, 3, 4, 1))
            second = tl.permute(join_8(i, j, k, m, n, o, p, q), (0, 2, 3, 4, 1))
    else:
        first = _shift_out(words, 0, HALF, BITS)
        second = _shift_out(words, HALF, HALF, BITS)
    first = tl.reshape(first, (ROWS, COLUMNS)).to(DTYPE)
    return first, tl.reshape(second, (ROWS, COLUMNS)).to(DTYPE)


@triton.jit
def _shift_out(words, FIRST: tl.constexpr, FIELDS: tl.constexpr, BITS: tl.constexpr):
    """Return fields from ``FIRST`` on as ``[rows, FIELDS, words]``, int32: the portable way."""
    field = FIRST + tl.arange(0, FIELDS)[None, :, None]
    first = words[0].to(tl.int32)[:, None, :]
    if BITS == 3:
        second, third = words[1].to(tl.int32)[:, None, :], words[2].to(tl.int32)[:, None, :]
        number = tl.minimum(field // IN_THIRD, 2)
        own = tl.where(number == 0, first, tl.where(number == 1, second, third))
        last = (first >> 15 & 1) | (second >> 15 & 1) << 1 | (third >> 15 & 1) << 2
        codes = tl.where(field == 15, last, own >> (field - number * IN_THIRD) * 3 & 7)
    else:
        codes = first >> field * BITS & ((1 << BITS) - 1)
    return codes


@triton.jit
def _join_4(a, b, c, d):
    """Return four fields along two new last axes, the high digit of their number first."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def join_8(a, b, c, d, e, f, g, h):
    """Return eight fields along three new last axes, the highest digit of their number first."""
    return tl.join(_join_4(a, c, e, g), _join_4(b, d, f, h))


# --- fields of two neighbouring words in NVIDIA's instructions ------------------------------------

# Of each field of a word the register that it is cut from, after one shift that brings it into the mantissa, and the
# bit where it then begins. The last of three bits is gathered from the last bits of three words.
SHIFTS = {
    8: "mov.b32 w, $2; shr.u32 r, w, 8;",
    4: "mov.b32 w, $4; shr.u32 r, w, 8;",
    3: "mov.b32 a, $16; mov.b32 b, $17; mov.b32 c, $18; shr.u32 d, a, 8; shr.u32 e, b, 7; shr.u32 f, c, 6;",
    2: "mov.b32 w, $8; shl.b32 l, w, 6; shr.u32 r, w, 6;",
    1: "mov.b32 w, $16; shr.u32 r, w, 8;",
}
CUT_FROM = {
    8: "wr",
    4: "wwrr",
    3: ("a", "a", "a", "d", "d", "b", "b", "b", "e", "e", "c", "c", "c", "f", "f", "def"),
    2: "llwwwrrr",
    1: 10 * "w" + 6 * "r",
}
PLACES = {
    8: (0, 0),
    4: (0, 4, 0, 4),
    3: (0, 3, 6, 1, 4, 0, 3, 6, 2, 5, 0, 3, 6, 3, 6, 7),
    2: (6, 8, 4, 6, 8, 4, 6, 8),
    1: (*range(10), *range(2, 8)),
}


def _cut(bits: int, part: int, in_place: bool) -> tl.constexpr:
    """Return the instructions that cut all fields out of two neighbouring words, of each the bits of ``part``: in their
    place, or as fp16 numbers.
    """
    text = SHIFTS[bits]
    for field, (registers, place) in enumerate(zip(CUT_FROM[bits], PLACES[bits], strict=True)):
        bits_of = [part] if len(registers) == 1 else [part & 1 << i for i in range(len(registers))]
        masks = [mask << place for mask in bits_of]
        # What is cut out comes above 2 ** (10 - place), which is subtracted, or above nothing.
        base = 0 if in_place else 25 - place << 10
        text += f" mov.b32 m, {_both_halves(base)}; mov.b32 x, m;"
        for register, mask in zip(registers, masks, strict=True):
            text += f" lop3.b32 x, {register}, {_both_halves(mask)}, x, 0xEA;"
        text += f" mov.b32 ${field}, x;" if in_place else f" sub.f16x2 ${field}, x, m;"
    return tl.constexpr(f"{{ .reg .b32 a, b, c, d, e, f, l, m, r, w, x; {text} }}")


def _both_halves(half: int) -> str:
    return f"0x{half << 16 | half:08x}"


CUT_8, CUT_4, CUT_3, CUT_2, CUT_1 = (_cut(bits, (1 << bits) - 1, True) for bits in (8, 4, 3, 2, 1))
CUT_LOWER, CUT_HIGHER = _cut(2, 1, True), _cut(2, 2, True)
AS_FP16_8, AS_FP16_4, AS_FP16_3, AS_FP16_2, AS_FP16_1 = (
    _cut(bits, (1 << bits) - 1, False) for bits in (8, 4, 3, 2, 1)
)


@triton.constexpr_function
def _places_of(bits):
    return sum(place << 4 * field for field, place in enumerate(PLACES[bits]))


@triton.jit
def place_of(field, BITS: tl.constexpr):
    """Return the exponent by which codes of a field that are read in place are larger than ``2 ** -24``."""
    return (_places_of(BITS) >> 4 * field.to(tl.int64) & 15).to(tl.int32)


@triton.jit
def fields_8(w, IN_PLACE: tl.constexpr):
    PROGRAM: tl.constexpr = CUT_8 if IN_PLACE else AS_FP16_8
    return tl.inline_asm_elementwise(
        PROGRAM, "=&r,=&r,r", args=[w], dtype=(tl.float16,) * 2, is_pure=True, pack=2
    )


@triton.jit
def fields_4(w, IN_PLACE: tl.constexpr):
    PROGRAM: tl.constexpr = CUT_4 if IN_PLACE else AS_FP16_4
    return tl.inline_asm_elementwise(
        PROGRAM, "=&r,=&r,=&r,=&r,r", args=[w], dtype=(tl.float16,) * 4, is_pure=True, pack=2
    )


@triton.jit
def fields_2(w, IN_PLACE: tl.constexpr):
    PROGRAM: tl.constexpr = CUT_2 if IN_PLACE else AS_FP16_2
    return _eight_fields(w, PROGRAM)


@triton.jit
def cut_bit(w, PART: tl.constexpr):
    """Return of the fields of words of two-bit codes the lower bit, ``PART`` 1, or the higher one, 2, in place."""
    PROGRAM: tl.constexpr = CUT_LOWER if PART == 1 else CUT_HIGHER
    return _eight_fields(w, PROGRAM)


@triton.jit
def _eight_fields(w, PROGRAM: tl.constexpr):
    return tl.inline_asm_elementwise(
        PROGRAM,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
        args=[w],
        dtype=(tl.float16,) * 8,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _sixteen_fields(words, BITS: tl.constexpr, IN_PLACE: tl.constexpr):
    OUTPUTS: tl.constexpr = "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r"
    if BITS == 3:
        PROGRAM: tl.constexpr = CUT_3 if IN_PLACE else AS_FP16_3
        return tl.inline_asm_elementwise(
            PROGRAM,
            OUTPUTS + ",r,r,r",
            args=[words[0], words[1], words[2]],
            dtype=(tl.float16,) * 16,
            is_pure=True,
            pack=2,
        )
    else:
        ONE_BIT: tl.constexpr = CUT_1 if IN_PLACE else AS_FP16_1
        return tl.inline_asm_elementwise(
            ONE_BIT,
            OUTPUTS + ",r",
            args=[words[0]],
            dtype=(tl.float16,) * 16,
            is_pure=True,
            pack=2,
        )


# --- scores ---------------------------------------------------------------------------------------


class MaskRows(NamedTuple):
    """Rows of an attention mask for the queries of a tile.

    Attributes:
        pointer, stride, width: The mask, elements from one slot to the next, and how many slots it has.
        rows: Elements from the pointer to the row of each query.
        exists: Which columns stand for a query.
    """

    pointer: Any
    rows: Any
    exists: Any
    stride: Any
    width: Any


@triton.jit
def load_mask(mask, slot, KIND: tl.constexpr, SHARED: tl.constexpr):
    """Return the additive form, in units of log 2, of the `MaskRows` of a tile: ``[slots, queries]``.

    ``SHARED``: ``[slots]``, since all queries share the row that the pointer is at.
    """
    where = mask.pointer + slot.to(tl.int64) * mask.stride
    ok = slot < mask.width
    if not SHARED:
        where = where[:, None] + mask.rows[None, :]
        ok = ok[:, None] & mask.exists[None, :]
    if KIND == 1:
        return tl.where(tl.load(where, mask=ok, other=0) != 0, 0.0, float("-inf"))
    bias = tl.load(where, mask=ok, other=0.0).to(tl.float32)
    return tl.maximum(bias, 2 * HIDDEN) * LOG2_E  # stays finite, and hidden


@triton.jit
def hide_scores(scores, slot, seen, mask, KIND: tl.constexpr, SHARED: tl.constexpr):
    """Return scores ``[slots, queries]`` under the `MaskRows` of a tile, with those of slots hidden that are not
    ``seen``.
    """
    if KIND > 0:
        shown = load_mask(mask, slot, KIND, SHARED)
        if SHARED and KIND == 1:  # a row of slots takes part in what is compared anyway
            seen &= shown == 0
        elif SHARED:
            scores += shown[:, None]
        else:
            scores += shown
    return tl.where(seen[:, None], scores, float("-inf"))


@triton.constexpr_function
def bends(launch):
    """Return whether scores are capped or clamped."""
    return launch.cap > 0 or launch.clamps


@triton.constexpr_function
def adds_mean(key):
    """Return whether the mean of packed keys adds the same to all scores of a query: see `query`."""
    return key.has_tables and not key.rotary


@triton.jit
def bend_scores(scores, LAUNCH: tl.constexpr):
    """Return scores in units of log 2, capped and clamped where the launch's `Operands` say so."""
    if LAUNCH.cap > 0:
        scores = LAUNCH.cap - 2 * LAUNCH.cap / (tl.exp2(scores * (2 / LAUNCH.cap * LOG2_E)) + 1)
    if LAUNCH.clamps:
        scores = tl.minimum(tl.maximum(scores, LAUNCH.lowest), LAUNCH.highest)
    return scores


@triton.jit
def softmax_update(scores, running_max, BIAS: tl.constexpr):
    """Take scores ``[keys, queries]`` in units of log 2 into a running maximum ``[queries]``.

    Returns:
        The weights ``2 ** (scores - maximum + BIAS)``, the factor by which sums so far shrink, the new maximum. A
        query that has seen nothing keeps maximum ``-inf`` and weights 0, never NaN.
    """
    new_max = tl.maximum(running_max, tl.max(scores, 0))
    point = tl.maximum(new_max, HIDDEN)
    decay = tl.exp2(running_max - point)
    return tl.exp2(scores - (point - BIAS)[None, :]), decay, new_max
