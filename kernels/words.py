"""Rows of codes in packed 16-bit words: planes and thirds, and how many words they take."""

from __future__ import annotations

WORD_BITS = 16  # the packed word: the operand type of a tensor core is 16 bits wide, so fields unpack in place
TRITS = 5  # three-level codes in a byte: 3 ** 5 = 243
TRIT_WORDS = 4  # of a plane of trits: a lane of the matrix instruction has one of them
THIRDS = 3  # words that hold 16 codes of 3 bits
THIRD_FIELDS = (
    WORD_BITS // THIRDS
)  # whole codes in each: the bits that are left over hold the last code


def planes_of(bits: int) -> tuple[int, ...]:
    """Return the widths of the planes that codes of ``bits`` bits are split into, the widest first."""
    return tuple(width for width in (8, 4, 2, 1) if bits & width)


def plane_words(places: int, width: int) -> int:
    """Return the words of a plane of ``width`` bits in a row with room for ``places`` codes."""
    return -(-places * width // WORD_BITS)


def trit_planes(words: int) -> tuple[tuple[int, int], ...]:
    """Return of a row of ``words`` words of trits the first word and the width of each plane: 4 words, then 2 and 1."""
    whole = words // TRIT_WORDS * TRIT_WORDS
    planes = [(first, TRIT_WORDS) for first in range(0, whole, TRIT_WORDS)]
    for width in (2, 1):
        if words & width:
            planes.append((whole, width))
            whole += width
    return tuple(planes)


def padded_length(length: int, width: int) -> int:
    """Return the codes of ``width`` bits that fill whole words and are ``length`` or more."""
    per_word = (
        WORD_BITS if width == THIRDS else WORD_BITS // width
    )  # of thirds: as many as each has bits
    return -(-length // per_word) * per_word
