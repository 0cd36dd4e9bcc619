"""Pack the codes of a page that is quantized, row by row, in tiles in which the codes of a word lie along one axis."""

import triton
import triton.language as tl

from kvq_compile.kernels.triton.constants import first_word, in_thirds, plane_words
from kvq_compile.kernels.triton.packing import DIGITS, IN_THIRD, PLANE, THIRD
from kvq_compile.kernels.triton.schemes import page_codes


@triton.jit
def _row_codes(source, page, scratch, row, index, exists, CONSTANTS: tl.constexpr):
    """Return the codes (int32) of a page's packed rows: tokens of keys, channels of values."""
    if CONSTANTS.role == "key":
        code = page_codes(source, page, scratch, row, index, exists, CONSTANTS)
    else:
        code = page_codes(source, page, scratch, index, row, exists, CONSTANTS)
    return code


@triton.jit
def _pack_plane(
    source, page, scratch, CONSTANTS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr
):
    """Write the plane of ``WIDTH`` bits of a page, in tiles in which the fields of a word lie along one axis."""
    SHIFT: tl.constexpr = CONSTANTS.bits & -(2 * WIDTH)  # bits of the planes before it
    LENGTH: tl.constexpr = CONSTANTS.row_length
    FIRST: tl.constexpr = first_word(CONSTANTS, WIDTH)
    WORDS: tl.constexpr = plane_words(CONSTANTS, WIDTH)
    WORDS_PAD: tl.constexpr = triton.next_power_of_2(WORDS)
    ROWS: tl.constexpr = CONSTANTS.page_words // CONSTANTS.row_words
    BLOCK: tl.constexpr = min(
        triton.next_power_of_2(ROWS), max(1, TILE // triton.next_power_of_2(LENGTH))
    )
    field = tl.arange(0, 16 // WIDTH)[None, :, None]
    word = tl.arange(0, WORDS_PAD)[None, None, :]
    for block in range(0, ROWS, BLOCK):
        row = block + tl.arange(0, BLOCK)[:, None, None]
        index = field * WORDS + word
        exists = (row < ROWS) & (word < WORDS) & (field >= 0)
        if WORDS * 16 > LENGTH * WIDTH:  # of what does not exist the code is 0
            exists &= index < LENGTH
        code = _row_codes(source, page, scratch, row, index, exists, CONSTANTS)
        packed = tl.sum(((code >> SHIFT) & ((1 << WIDTH) - 1)) << (field * WIDTH), 1)
        row = block + tl.arange(0, BLOCK)[:, None]
        word_2d = tl.arange(0, WORDS_PAD)[None, :]
        where = page.codes + row * CONSTANTS.row_words + FIRST + word_2d
        tl.store(where, packed.to(tl.uint16), mask=(row < ROWS) & (word_2d < WORDS))


@triton.jit
def _pack_thirds(source, page, scratch, CONSTANTS: tl.constexpr, TILE: tl.constexpr):
    """Write the three thirds of a page's rows, one after the other: five fields of a word, then a bit of the last."""
    WORDS: tl.constexpr = CONSTANTS.row_places // 16
    WORDS_PAD: tl.constexpr = triton.next_power_of_2(WORDS)
    ROWS: tl.constexpr = CONSTANTS.page_words // CONSTANTS.row_words
    BLOCK: tl.constexpr = min(triton.next_power_of_2(ROWS), max(1, TILE // (8 * WORDS_PAD)))
    field = tl.arange(0, 8)[None, :, None]
    word = tl.arange(0, WORDS_PAD)[None, None, :]
    for block in range(0, ROWS, BLOCK):
        row = block + tl.arange(0, BLOCK)[:, None, None]
        row_2d = block + tl.arange(0, BLOCK)[:, None]
        word_2d = tl.arange(0, WORDS_PAD)[None, :]
        where = page.codes + row_2d * CONSTANTS.row_words + word_2d
        for third in range(THIRD):
            index = tl.where(field < IN_THIRD, field + third * IN_THIRD, 15) * WORDS + word
            exists = (row < ROWS) & (word < WORDS) & (field <= IN_THIRD)
            exists &= index < CONSTANTS.row_length
            code = _row_codes(source, page, scratch, row, index, exists, CONSTANTS)
            part = tl.where(field < IN_THIRD, code << field * 3, (code >> third & 1) << 15)
            packed = tl.sum(tl.where(exists, part, 0), 1).to(tl.uint16)
            tl.store(where + third * WORDS, packed, mask=(row_2d < ROWS) & (word_2d < WORDS))


@triton.jit
def _pack_trit_plane(
    source, page, scratch, first, CONSTANTS: tl.constexpr, TILE: tl.constexpr, WORDS: tl.constexpr
):
    """Write the plane of ``WORDS`` words of a page's rows of trits that begins with word ``first`` of them."""
    ROWS: tl.constexpr = CONSTANTS.page_words // CONSTANTS.row_words
    BLOCK: tl.constexpr = min(triton.next_power_of_2(ROWS), max(1, TILE // (2 * WORDS)))
    byte = tl.arange(0, 2 * WORDS)[None, :]
    word = tl.arange(0, WORDS)[None, :]
    for block in range(0, ROWS, BLOCK):
        row = block + tl.arange(0, BLOCK)[:, None]
        packed, weight = tl.zeros((BLOCK, 2 * WORDS), tl.int32), 1
        for digit in range(DIGITS):
            index = 2 * (DIGITS * first + digit * WORDS) + byte
            exists = (row < ROWS) & (index < CONSTANTS.row_length)
            code = _row_codes(source, page, scratch, row, index, exists, CONSTANTS)
            packed += code * weight  # of what does not exist the code is 0
            weight *= 3
        low, high = tl.split(tl.reshape(packed, (BLOCK, WORDS, 2)))
        where = page.codes + ROWS * first + row * WORDS + word
        tl.store(where, (low | (high << 8)).to(tl.uint16), mask=(row < ROWS) & (word < WORDS))


@triton.jit
def _pack_trits(source, page, scratch, CONSTANTS: tl.constexpr, TILE: tl.constexpr):
    """Write the trits of a page, plane by plane."""
    WORDS: tl.constexpr = CONSTANTS.row_words
    WHOLE: tl.constexpr = WORDS // PLANE * PLANE
    for first in range(0, WHOLE, PLANE):
        _pack_trit_plane(source, page, scratch, first, CONSTANTS, TILE, PLANE)
    if WORDS & 2:
        _pack_trit_plane(source, page, scratch, WHOLE, CONSTANTS, TILE, 2)
    if WORDS & 1:
        _pack_trit_plane(source, page, scratch, WORDS - 1, CONSTANTS, TILE, 1)


@triton.jit
def pack(source, page, scratch, CONSTANTS: tl.constexpr, TILE: tl.constexpr):
    """Write the codes of a page: uniform ones at once, others plane by plane."""
    if CONSTANTS.packing == "trits":
        _pack_trits(source, page, scratch, CONSTANTS, TILE)
    elif in_thirds(CONSTANTS):
        _pack_thirds(source, page, scratch, CONSTANTS, TILE)
    else:
        if CONSTANTS.bits & 8:
            _pack_plane(source, page, scratch, CONSTANTS, TILE, 8)
        if CONSTANTS.bits & 4:
            _pack_plane(source, page, scratch, CONSTANTS, TILE, 4)
        if CONSTANTS.bits & 2:
            _pack_plane(source, page, scratch, CONSTANTS, TILE, 2)
        if CONSTANTS.bits & 1:
            _pack_plane(source, page, scratch, CONSTANTS, TILE, 1)
