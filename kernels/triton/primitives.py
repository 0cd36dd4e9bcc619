"""What more than one kernel does with packed words and with scores: unpacking in registers, masks, online softmax.

A packed row is planar (`Layout`): field ``f`` of word ``w`` holds code ``f * words + w``. The helpers work on
tiles whose sides are powers of two, 16 or more. Where the words of a row are not as many, they are padded, and column
``f * WORDS_PAD + w`` of a tile then stands for code ``f * words + w``; `row_index` does that arithmetic.

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


@triton.jit
def row_index(column, LENGTH: tl.constexpr, BITS: tl.constexpr):
    """Return the code that a tile's column stands for, and whether it exists, in rows with room for
    ``LENGTH``."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    WORDS: tl.constexpr = LENGTH * WIDTH // 16
    WORDS_PAD: tl.constexpr = max(WIDTH, triton.next_power_of_2(WORDS))
    word = column % WORDS_PAD
    return (column // WORDS_PAD) * WORDS + word, word < WORDS


@triton.jit
def load_rows(codes, row, LENGTH: tl.constexpr, ROWS: tl.constexpr, BITS: tl.constexpr):
    """Load the words of rows with room for ``LENGTH`` codes: those of the low plane, and of the high
    one at 3 bits.

    Rows from ``ROWS`` on do not exist and give zeros. Words of the high plane hold 16 codes, those
    of the low one 8. They are brought to the low plane's shape: bit ``2 f`` of the result belongs
    to field ``f`` of the low word in the same place.
    """
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    WORDS: tl.constexpr = LENGTH * WIDTH // 16
    WORDS_PAD: tl.constexpr = max(WIDTH, triton.next_power_of_2(WORDS))
    HALF: tl.constexpr = WORDS // 2
    word = tl.arange(0, WORDS_PAD)
    first = codes + row[:, None] * (LENGTH * BITS // 16)
    if WORDS_PAD == WORDS and row.shape[0] == ROWS:
        low = tl.load(first + word[None, :])
    else:
        exists = (row < ROWS)[:, None] & (word < WORDS)[None, :]
        low = tl.load(first + word[None, :], mask=exists, other=0)
    high = low
    if BITS == 3:
        # Two loads, because a shift by a computed amount would keep the compiler from changing the
        # layout here, where it costs little, instead of behind the unpacking.
        where = first + WORDS + (word % HALF)[None, :]
        exists = (row < ROWS)[:, None] & (word < HALF)[None, :]
        high = tl.load(where, mask=exists, other=0)
        exists = (row < ROWS)[:, None] & ((word >= HALF) & (word < WORDS))[None, :]
        high |= tl.load(where, mask=exists, other=0) >> 1
    return low, high


@triton.jit
def unpack_rows(low, high, BITS: tl.constexpr, FAST: tl.constexpr, DTYPE: tl.constexpr):
    """Return the codes ``[rows, columns]`` of words from `load_rows` as ``DTYPE``."""
    ROWS: tl.constexpr = low.shape[0]
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    FIELDS: tl.constexpr = 16 // WIDTH
    COLUMNS: tl.constexpr = FIELDS * low.shape[1]
    if FAST:
        if BITS == 8:
            a, b = _fields_8(low)
            codes = tl.permute(tl.join(a, b), (0, 2, 1))
        elif BITS == 4:
            a, b, c, d = _fields_4(low)
            codes = tl.permute(_join_4(a, b, c, d), (0, 2, 3, 1))
        elif BITS == 3:
            a, b, c, d, e, f, g, h = _fields_3(low, high)
            codes = tl.permute(join_8(a, b, c, d, e, f, g, h), (0, 2, 3, 4, 1))
        elif BITS == 2:
            a, b, c, d, e, f, g, h = _fields_2(low)
            codes = tl.permute(join_8(a, b, c, d, e, f, g, h), (0, 2, 3, 4, 1))
        else:
            a, b, c, d, e, f, g, h, i, j, k, m, n, o, p, q = _fields_1(low)
            even = join_8(a, c, e, g, i, k, n, p)
            odd = join_8(b, d, f, h, j, m, o, q)
            codes = tl.permute(tl.join(even, odd), (0, 2, 3, 4, 5, 1))
    else:
        codes = _shift_out(low, high, BITS, FIELDS)
    return tl.reshape(codes, (ROWS, COLUMNS)).to(DTYPE)


@triton.jit
def unpack_halves(low, high, BITS: tl.constexpr, FAST: tl.constexpr, DTYPE: tl.constexpr):
    """Return the two halves of what `unpack_rows` returns, ``[rows, columns / 2]`` each.

    The fields of a word belong half to one and half to the other, so that columns ``c`` of both lie in
    the same lane.
    """
    ROWS: tl.constexpr = low.shape[0]
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    HALF: tl.constexpr = 8 // WIDTH
    COLUMNS: tl.constexpr = HALF * low.shape[1]
    if FAST:
        if BITS == 8:
            first, second = _fields_8(low)
        elif BITS == 4:
            a, b, c, d = _fields_4(low)
            first = tl.permute(tl.join(a, b), (0, 2, 1))
            second = tl.permute(tl.join(c, d), (0, 2, 1))
        elif BITS == 3:
            a, b, c, d, e, f, g, h = _fields_3(low, high)
            first = tl.permute(_join_4(a, b, c, d), (0, 2, 3, 1))
            second = tl.permute(_join_4(e, f, g, h), (0, 2, 3, 1))
        elif BITS == 2:
            a, b, c, d, e, f, g, h = _fields_2(low)
            first = tl.permute(_join_4(a, b, c, d), (0, 2, 3, 1))
            second = tl.permute(_join_4(e, f, g, h), (0, 2, 3, 1))
        else:
            a, b, c, d, e, f, g, h, i, j, k, m, n, o, p, q = _fields_1(low)
            first = tl.permute(join_8(a, b, c, d, e, f, g, h), (0, 2, 3, 4, 1))
            second = tl.permute(join_8(i, j, k, m, n, o, p, q), (0, 2, 3, 4, 1))
    else:
        first = _shift_out(low, high, BITS, HALF)
        second = _shift_out(low >> 8, high >> 8, BITS, HALF)
    first = tl.reshape(first, (ROWS, COLUMNS)).to(DTYPE)
    return first, tl.reshape(second, (ROWS, COLUMNS)).to(DTYPE)


@triton.jit
def _shift_out(low, high, BITS: tl.constexpr, FIELDS: tl.constexpr):
    """Return the first fields of words as ``[rows, FIELDS, words]``, int32: the portable way."""
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    shift = (tl.arange(0, FIELDS) * WIDTH)[None, :, None]
    fields = (low.to(tl.int32)[:, None, :] >> shift) & ((1 << WIDTH) - 1)
    if BITS == 3:
        fields += ((high.to(tl.int32)[:, None, :] >> shift) & 1) << 2
    return fields


@triton.jit
def _fields_1(w):
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 m, r, x; shr.u32 r, $16, 8;
        mov.b32 m, 0x64006400; lop3.b32 x, $16, 0x00010001, m, 0xEA; sub.f16x2 $0, x, m;
        mov.b32 m, 0x60006000; lop3.b32 x, $16, 0x00020002, m, 0xEA; sub.f16x2 $1, x, m;
        mov.b32 m, 0x5C005C00; lop3.b32 x, $16, 0x00040004, m, 0xEA; sub.f16x2 $2, x, m;
        mov.b32 m, 0x58005800; lop3.b32 x, $16, 0x00080008, m, 0xEA; sub.f16x2 $3, x, m;
        mov.b32 m, 0x54005400; lop3.b32 x, $16, 0x00100010, m, 0xEA; sub.f16x2 $4, x, m;
        mov.b32 m, 0x50005000; lop3.b32 x, $16, 0x00200020, m, 0xEA; sub.f16x2 $5, x, m;
        mov.b32 m, 0x4C004C00; lop3.b32 x, $16, 0x00400040, m, 0xEA; sub.f16x2 $6, x, m;
        mov.b32 m, 0x48004800; lop3.b32 x, $16, 0x00800080, m, 0xEA; sub.f16x2 $7, x, m;
        mov.b32 m, 0x44004400; lop3.b32 x, $16, 0x01000100, m, 0xEA; sub.f16x2 $8, x, m;
        mov.b32 m, 0x40004000; lop3.b32 x, $16, 0x02000200, m, 0xEA; sub.f16x2 $9, x, m;
        mov.b32 m, 0x5C005C00; lop3.b32 x, r, 0x00040004, m, 0xEA; sub.f16x2 $10, x, m;
        mov.b32 m, 0x58005800; lop3.b32 x, r, 0x00080008, m, 0xEA; sub.f16x2 $11, x, m;
        mov.b32 m, 0x54005400; lop3.b32 x, r, 0x00100010, m, 0xEA; sub.f16x2 $12, x, m;
        mov.b32 m, 0x50005000; lop3.b32 x, r, 0x00200020, m, 0xEA; sub.f16x2 $13, x, m;
        mov.b32 m, 0x4C004C00; lop3.b32 x, r, 0x00400040, m, 0xEA; sub.f16x2 $14, x, m;
        mov.b32 m, 0x48004800; lop3.b32 x, r, 0x00800080, m, 0xEA; sub.f16x2 $15, x, m; }""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
        args=[w],
        dtype=(tl.float16,) * 16,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _fields_2(w):
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 l, r, ma, mb, mc, x;
        mov.b32 ma, 0x54005400; mov.b32 mb, 0x4C004C00; mov.b32 mc, 0x44004400;
        shl.b32 l, $8, 6; shr.u32 r, $8, 6;
        lop3.b32 x, l,  0x00C000C0, mb, 0xEA; sub.f16x2 $0, x, mb;
        lop3.b32 x, l,  0x03000300, mc, 0xEA; sub.f16x2 $1, x, mc;
        lop3.b32 x, $8, 0x00300030, ma, 0xEA; sub.f16x2 $2, x, ma;
        lop3.b32 x, $8, 0x00C000C0, mb, 0xEA; sub.f16x2 $3, x, mb;
        lop3.b32 x, $8, 0x03000300, mc, 0xEA; sub.f16x2 $4, x, mc;
        lop3.b32 x, r,  0x00300030, ma, 0xEA; sub.f16x2 $5, x, ma;
        lop3.b32 x, r,  0x00C000C0, mb, 0xEA; sub.f16x2 $6, x, mb;
        lop3.b32 x, r,  0x03000300, mc, 0xEA; sub.f16x2 $7, x, mc; }""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
        args=[w],
        dtype=(tl.float16,) * 8,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _fields_3(w, high):
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 w0, w4, w7, h0, h1, h4, h7, ma, mb, mc, x;
        mov.b32 ma, 0x5C005C00; mov.b32 mb, 0x54005400; mov.b32 mc, 0x4C004C00;
        shl.b32 w0, $8, 4; shr.u32 w4, $8, 6; shr.u32 w7, $8, 10;
        shl.b32 h0, $9, 6; shl.b32 h1, $9, 2; shr.u32 h4, $9, 4; shr.u32 h7, $9, 8;
        lop3.b32 x, w0, 0x00300030, mb, 0xEA;
            lop3.b32 x, h0, 0x00400040, x, 0xEA; sub.f16x2 $0, x, mb;
        lop3.b32 x, $8, 0x000C000C, ma, 0xEA;
            lop3.b32 x, h1, 0x00100010, x, 0xEA; sub.f16x2 $1, x, ma;
        lop3.b32 x, $8, 0x00300030, mb, 0xEA;
            lop3.b32 x, h1, 0x00400040, x, 0xEA; sub.f16x2 $2, x, mb;
        lop3.b32 x, $8, 0x00C000C0, mc, 0xEA;
            lop3.b32 x, h1, 0x01000100, x, 0xEA; sub.f16x2 $3, x, mc;
        lop3.b32 x, w4, 0x000C000C, ma, 0xEA;
            lop3.b32 x, h4, 0x00100010, x, 0xEA; sub.f16x2 $4, x, ma;
        lop3.b32 x, w4, 0x00300030, mb, 0xEA;
            lop3.b32 x, h4, 0x00400040, x, 0xEA; sub.f16x2 $5, x, mb;
        lop3.b32 x, w4, 0x00C000C0, mc, 0xEA;
            lop3.b32 x, h4, 0x01000100, x, 0xEA; sub.f16x2 $6, x, mc;
        lop3.b32 x, w7, 0x00300030, mb, 0xEA;
            lop3.b32 x, h7, 0x00400040, x, 0xEA; sub.f16x2 $7, x, mb; }""",
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r",
        args=[w, high],
        dtype=(tl.float16,) * 8,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _fields_4(w):
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, ma, mb, x; mov.b32 ma, 0x64006400; mov.b32 mb, 0x54005400;
        shr.u32 a, $4, 8;
        lop3.b32 x, $4, 0x000F000F, ma, 0xEA; sub.f16x2 $0, x, ma;
        lop3.b32 x, $4, 0x00F000F0, mb, 0xEA; sub.f16x2 $1, x, mb;
        lop3.b32 x, a,  0x000F000F, ma, 0xEA; sub.f16x2 $2, x, ma;
        lop3.b32 x, a,  0x00F000F0, mb, 0xEA; sub.f16x2 $3, x, mb; }""",
        "=&r,=&r,=&r,=&r,r",
        args=[w],
        dtype=(tl.float16,) * 4,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _fields_8(w):
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 a, ma, x; mov.b32 ma, 0x64006400;
        shr.u32 a, $2, 8;
        lop3.b32 x, $2, 0x00FF00FF, ma, 0xEA; sub.f16x2 $0, x, ma;
        lop3.b32 x, a,  0x00FF00FF, ma, 0xEA; sub.f16x2 $1, x, ma; }""",
        "=&r,=&r,r",
        args=[w],
        dtype=(tl.float16,) * 2,
        is_pure=True,
        pack=2,
    )


@triton.jit
def _join_4(a, b, c, d):
    """Return four fields along two new last axes, the high digit of their number first."""
    return tl.join(tl.join(a, c), tl.join(b, d))


@triton.jit
def join_8(a, b, c, d, e, f, g, h):
    """Return eight fields along three new last axes, the highest digit of their number first."""
    return tl.join(_join_4(a, c, e, g), _join_4(b, d, f, h))


# --- codes where they lie -------------------------------------------------------------------------

# The bit of each field of a word from which its code is read: after one shift, which brings fields into the mantissa.
PLACES = {8: (0, 0), 4: (0, 4, 0, 4), 3: (4, 2, 4, 6, 2, 4, 6, 4), 2: (6, 8, 4, 6, 8, 4, 6, 8)}


@triton.constexpr_function
def _halves_of_places(bits):
    return sum(place // 2 << 4 * field for field, place in enumerate(PLACES[bits]))


@triton.jit
def place_of(field, BITS: tl.constexpr):
    """Return the exponent by which codes of a field that `cut_2` and others cut out are larger than ``2 ** -24``."""
    return 2 * ((_halves_of_places(BITS) >> 4 * field) & 15)


@triton.jit
def cut_rows(low, high, BITS: tl.constexpr, DTYPE: tl.constexpr):
    """Return what `unpack_rows` returns, each code times ``2 ** (place_of(its field) - 24)``."""
    if BITS == 8:
        a, b = cut_8(low)
        codes = tl.permute(tl.join(a, b), (0, 2, 1))
    elif BITS == 4:
        a, b, c, d = cut_4(low)
        codes = tl.permute(_join_4(a, b, c, d), (0, 2, 3, 1))
    else:
        if BITS == 3:
            a, b, c, d, e, f, g, h = cut_3(low, high)
        else:
            a, b, c, d, e, f, g, h = cut_2(low, 3)
        codes = tl.permute(join_8(a, b, c, d, e, f, g, h), (0, 2, 3, 4, 1))
    return tl.reshape(codes, (low.shape[0], low.shape[1] * (16 // (2 if BITS == 3 else BITS)))).to(
        DTYPE
    )


def _cut(bits: int, mask: int, shifted: str) -> tl.constexpr:
    """Return the instructions that cut these bits of all fields out of two neighbouring words, field by field: out of
    ``l``, ``w`` or ``r``, the words shifted to the left, as they are, or shifted to the right.
    """
    fields = len(shifted)
    ands = (
        f"and.b32 ${field}, {source}, 0x{mask << place:04x}{mask << place:04x};"
        for field, (source, place) in enumerate(zip(shifted, PLACES[bits], strict=True))
    )
    left, right = (6, 6) if bits == 2 else (0, 8)
    return tl.constexpr(
        f"{{ .reg .b32 l, r, w; mov.b32 w, ${fields};"
        f" shl.b32 l, w, {left}; shr.u32 r, w, {right}; {' '.join(ands)} }}"
    )


CUT_8, CUT_4 = _cut(8, 0xFF, "wr"), _cut(4, 0xF, "wwrr")
CUT_2, CUT_LOWER, CUT_HIGHER = (_cut(2, mask, "llwwwrrr") for mask in (3, 1, 2))
CUT_3 = tl.constexpr(
    """{
    .reg .b32 w0, w4, w7, h0, h1, h4, h7, x;
    shl.b32 w0, $8, 4; shr.u32 w4, $8, 6; shr.u32 w7, $8, 10;
    shl.b32 h0, $9, 6; shl.b32 h1, $9, 2; shr.u32 h4, $9, 4; shr.u32 h7, $9, 8;
    and.b32 x, w0, 0x00300030; lop3.b32 $0, h0, 0x00400040, x, 0xEA;
    and.b32 x, $8, 0x000C000C; lop3.b32 $1, h1, 0x00100010, x, 0xEA;
    and.b32 x, $8, 0x00300030; lop3.b32 $2, h1, 0x00400040, x, 0xEA;
    and.b32 x, $8, 0x00C000C0; lop3.b32 $3, h1, 0x01000100, x, 0xEA;
    and.b32 x, w4, 0x000C000C; lop3.b32 $4, h4, 0x00100010, x, 0xEA;
    and.b32 x, w4, 0x00300030; lop3.b32 $5, h4, 0x00400040, x, 0xEA;
    and.b32 x, w4, 0x00C000C0; lop3.b32 $6, h4, 0x01000100, x, 0xEA;
    and.b32 x, w7, 0x00300030; lop3.b32 $7, h7, 0x00400040, x, 0xEA; }"""
)


@triton.jit
def cut_2(w, PART: tl.constexpr):
    """Return the fields of words of two-bit codes; or of each the lower bit, ``PART`` 1, or the higher one, 2."""
    CUT: tl.constexpr = CUT_2 if PART == 3 else (CUT_LOWER if PART == 1 else CUT_HIGHER)
    return tl.inline_asm_elementwise(
        CUT,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r",
        args=[w],
        dtype=(tl.float16,) * 8,
        is_pure=True,
        pack=2,
    )


@triton.jit
def cut_3(w, high):
    return tl.inline_asm_elementwise(
        CUT_3,
        "=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r,r",
        args=[w, high],
        dtype=(tl.float16,) * 8,
        is_pure=True,
        pack=2,
    )


@triton.jit
def cut_4(w):
    return tl.inline_asm_elementwise(
        CUT_4,
        "=&r,=&r,=&r,=&r,r",
        args=[w],
        dtype=(tl.float16,) * 4,
        is_pure=True,
        pack=2,
    )


@triton.jit
def cut_8(w):
    return tl.inline_asm_elementwise(
        CUT_8, "=&r,=&r,r", args=[w], dtype=(tl.float16,) * 2, is_pure=True, pack=2
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
    """Return the additive form ``[slots, queries]``, in units of log 2, of the `MaskRows` of a tile.

    ``SHARED``: all queries share the row that the pointer is at.
    """
    inside = slot < mask.width
    if SHARED:
        where = mask.pointer + slot.to(tl.int64)[:, None] * mask.stride
        ok = inside[:, None]
    else:
        where = mask.pointer + mask.rows[None, :] + slot.to(tl.int64)[:, None] * mask.stride
        ok = inside[:, None] & mask.exists[None, :]
    if KIND == 1:
        return tl.where(tl.load(where, mask=ok, other=0) != 0, 0.0, float("-inf"))
    bias = tl.load(where, mask=ok, other=0.0).to(tl.float32)
    return tl.maximum(bias, 2 * HIDDEN) * LOG2_E  # stays finite, and hidden


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
