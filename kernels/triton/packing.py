"""Codes in packed rows, in Triton: written, and read one by one.

How uniform codes leave registers in whole tiles is in `primitives`; here is what is always right, and slow where it is
done for every element.
"""

import triton
import triton.language as tl

from kvq_compile.kernels.triton.constants import first_word, in_thirds, plane_words
from kvq_compile.kernels.words import THIRD_FIELDS, THIRDS, TRIT_WORDS, TRITS

DIGITS, PLANE = tl.constexpr(TRITS), tl.constexpr(TRIT_WORDS)
THIRD, IN_THIRD = tl.constexpr(THIRDS), tl.constexpr(THIRD_FIELDS)


# --- reading --------------------------------------------------------------------------------------


@triton.jit
def load_words(where, exists):
    """Return words, 0 where none ``exists``; all of them do if that is ``None``."""
    return tl.load(where) if exists is None else tl.load(where, mask=exists, other=0)


@triton.jit
def _plane(codes, row, column, exists, CONSTANTS: tl.constexpr, WIDTH: tl.constexpr):
    """Return the bits of codes that lie in the plane of ``WIDTH`` bits, in their place."""
    SHIFT: tl.constexpr = CONSTANTS.bits & -(2 * WIDTH)  # of the planes before it
    WORDS: tl.constexpr = plane_words(CONSTANTS, WIDTH)
    word = first_word(CONSTANTS, WIDTH) + column % WORDS
    word = load_words(codes + (row * CONSTANTS.row_words + word), exists).to(tl.int32)
    return ((word >> (column // WORDS * WIDTH)) & ((1 << WIDTH) - 1)) << SHIFT


@triton.jit
def _thirds(codes, row, column, exists, CONSTANTS: tl.constexpr):
    """Return codes of 3 bits: a field of one word, or the last bits of three."""
    WORDS: tl.constexpr = CONSTANTS.row_places // 16
    field, word = column // WORDS, row * CONSTANTS.row_words + column % WORDS
    third = tl.minimum(field // IN_THIRD, THIRD - 1)
    own = load_words(codes + (word + third * WORDS), exists).to(tl.int32)
    code = own >> (field - third * IN_THIRD) * 3 & 7
    last = exists & (field == 15)
    ends = tl.load(codes + word, mask=last, other=0).to(tl.int32) >> 15 & 1
    ends |= (tl.load(codes + (word + WORDS), mask=last, other=0).to(tl.int32) >> 15 & 1) << 1
    return tl.where(field == 15, ends | (own >> 15 & 1) << 2, code)


@triton.jit
def trit_place(row, column, CONSTANTS: tl.constexpr):
    """Return where codes of rows of trits lie: word of the page, byte of the word, digit of the byte."""
    ROWS: tl.constexpr = CONSTANTS.page_words // CONSTANTS.row_words
    WHOLE: tl.constexpr = CONSTANTS.row_words // PLANE * PLANE
    OF_WORD: tl.constexpr = 2 * DIGITS
    # Planes of four words, then one of two, then one of one.
    first, width = column // (OF_WORD * PLANE) * PLANE, PLANE + column * 0
    if CONSTANTS.row_words > WHOLE:
        rest = column >= OF_WORD * WHOLE
        first = tl.where(rest, WHOLE, first)
        width = tl.where(rest, 2 if CONSTANTS.row_words & 2 else 1, width)
    if CONSTANTS.row_words & 3 == 3:
        rest = column >= OF_WORD * (WHOLE + 2)
        first, width = tl.where(rest, WHOLE + 2, first), tl.where(rest, 1, width)
    inside = column - OF_WORD * first
    byte, digit = inside % (2 * width), inside // (2 * width)
    return ROWS * first + row * width + byte // 2, byte % 2, digit


@triton.jit
def trit(byte, digit):
    """Return a digit of bytes: the first one behind the point of ``byte / 3 ** (digit + 1)``."""
    third = tl.where(digit == 0, 21846, tl.where(digit == 1, 7282, 2428))
    third = tl.where(
        digit == 3, 810, tl.where(digit == 4, 270, third)
    )  # 2 ** 16 / 3 ** (digit + 1)
    return (((byte * third) & 0xFFFF) * 3) >> 16


@triton.jit
def _trits(codes, row, column, exists, CONSTANTS: tl.constexpr):
    """Return three-level codes."""
    word, byte, digit = trit_place(row, column, CONSTANTS)
    word = tl.load(codes + word, mask=exists, other=0)
    return trit((word.to(tl.int32) >> (byte * 8)) & 0xFF, digit)


@triton.jit
def load_row_codes(codes, row, column, exists, CONSTANTS: tl.constexpr):
    """Return the codes (int32) in places ``column`` of rows, a load for each plane; 0 where none ``exists``."""
    if CONSTANTS.packing == "trits":
        code = _trits(codes, row, column, exists, CONSTANTS)
    elif in_thirds(CONSTANTS):
        code = _thirds(codes, row, column, exists, CONSTANTS)
    else:
        code = tl.zeros((row + column).shape, tl.int32)
        if CONSTANTS.bits & 8:
            code |= _plane(codes, row, column, exists, CONSTANTS, 8)
        if CONSTANTS.bits & 4:
            code |= _plane(codes, row, column, exists, CONSTANTS, 4)
        if CONSTANTS.bits & 2:
            code |= _plane(codes, row, column, exists, CONSTANTS, 2)
        if CONSTANTS.bits & 1:
            code |= _plane(codes, row, column, exists, CONSTANTS, 1)
    return code


@triton.jit
def load_codes(codes, token, part, exists, CONSTANTS: tl.constexpr):
    """Return the codes (int32) of a page, ``part`` counting those of a token."""
    if CONSTANTS.role == "key":
        code = load_row_codes(codes, token, part, exists, CONSTANTS)
    else:
        code = load_row_codes(codes, part, token, exists, CONSTANTS)
    return code
