"""Rows of codes in packed 16-bit words: planes, and how many words they take."""

from __future__ import annotations

WORD_BITS = 16  # the packed word: the operand type of a tensor core is 16 bits wide, so fields unpack in place
TRITS = 5  # three-level codes in a byte: 3 ** 5 = 243


def planes_of(bits: float) -> tuple[int, ...]:
    """Return the widths of the planes that codes of ``bits`` bits are split into, the widest first."""
    whole = 2 if bits == 1.5 else int(bits)
    return tuple(width for width in (8, 4, 2, 1) if whole & width)


def plane_words(places: int, width: int) -> int:
    """Return the words of a plane of ``width`` bits in a row with room for ``places`` codes."""
    return -(-places * width // WORD_BITS)


def padded_length(length: int, width: int) -> int:
    """Return the codes of ``width`` bits that fill whole words and are ``length`` or more."""
    per_word = WORD_BITS // width
    return -(-length // per_word) * per_word
