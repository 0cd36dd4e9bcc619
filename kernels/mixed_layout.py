"""`MixedLayout`: where each bit of a page lies whose tokens differ in bits; `mixed` says what the bits mean."""

from __future__ import annotations

import ctypes
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

Params = Literal["fp16", "fp8"]

UNIT_BITS = 16  # the packed word: the operand type of a tensor core is 16 bits wide, so fields unpack in place
PAGE_SIZES = (32, 64, 128, 256)
MAX_BITS = 8
HEADER = MAX_BITS  # units; also what keeps rows of 128 channels aligned to 16 bytes
OUTLIER_FIELDS = 3  # channel, low byte, high byte
LONGEST = 31  # bits of the number of slots of the longest cache


@dataclass(frozen=True)
class MixedLayout:
    """Fix the place of every bit of pages whose tokens differ in bits.

    Args:
        budget: Bits a number that the codes of a page may take; a whole number of rows a page.
        page_size: Tokens of a page, ``N``.
        head_dim: Channels, ``D``, a multiple of 16, at most 256.
        min_bits, max_bits: Least and most bits of a token, 0 to 8.
        outliers: Numbers of a token that are kept exactly, in fp16: half of them the largest, half the
            smallest. An even number.
        params: Format of centre and reach.
        fit: Whether codes stand for the middles of their segments times a factor of their token, with which the
            token's product with itself is kept (`fit_reach`), instead of for the middles, as in the paper.
        soften: Whether importance counts softened (`soften`) instead of as it is, as in the paper.

    Raises:
        ValueError: An argument is out of its range.
    """

    budget: float
    page_size: int = 128
    head_dim: int = 128
    min_bits: int = 0
    max_bits: int = 4
    outliers: int = 0
    params: Params = "fp8"
    fit: bool = True
    soften: bool = True

    def __post_init__(self) -> None:
        if self.page_size not in PAGE_SIZES:
            raise ValueError(f"page_size must be one of {PAGE_SIZES}, got {self.page_size}")
        if self.head_dim % UNIT_BITS or not 0 < self.head_dim <= 256:
            raise ValueError(
                f"head_dim must be a multiple of {UNIT_BITS} up to 256, got {self.head_dim}"
            )
        if not 0 <= self.min_bits < self.max_bits <= MAX_BITS:
            raise ValueError(
                f"min_bits and max_bits must be two ascending numbers of 0 to {MAX_BITS}, "
                f"got {self.min_bits} and {self.max_bits}"
            )
        if not self.min_bits <= self.budget <= self.max_bits or self.budget <= 0:
            raise ValueError(
                f"budget must be positive and between min_bits={self.min_bits} and "
                f"max_bits={self.max_bits}, got {self.budget}"
            )
        if self.budget * self.page_size % 1:
            raise ValueError(
                f"budget must be a multiple of 1/{self.page_size}, the rows of a page, got {self.budget}"
            )
        if self.outliers % 2 or not 0 <= self.outliers < self.head_dim:
            raise ValueError(
                f"outliers must be an even number below {self.head_dim}, got {self.outliers}"
            )

    @property
    def code_rows(self) -> int:
        """Rows of all planes of a page."""
        return int(self.budget * self.page_size)

    @property
    def row_units(self) -> int:
        """Units of a row."""
        return self.head_dim // UNIT_BITS

    @property
    def units(self) -> int:
        """Units of a page, the header included."""
        return HEADER + self.code_rows * self.row_units

    @property
    def param_bytes(self) -> int:
        """Bytes of a stored centre or reach."""
        return 1 if self.params == "fp8" else 2

    @property
    def rank_field(self) -> int:
        """Field of the rank, behind centre and reach."""
        return 2 * self.param_bytes

    @property
    def fields(self) -> int:
        """Bytes of a record."""
        return self.rank_field + 1 + OUTLIER_FIELDS * self.outliers

    @property
    def bits_per_number(self) -> float:
        """Bits held for each number of a page: codes, header and records."""
        page = UNIT_BITS * self.units + 8 * self.fields * self.page_size
        return page / (self.page_size * self.head_dim)


def key_bound(query_norm: float, target: float, tokens: int, head_dim: int) -> float:
    """Return the bound on keys at which attention weights have a standard deviation of ``target``.

    Args:
        query_norm: Squared norm of a query that few exceed.
        target: Standard deviation of an attention weight.
        tokens: Tokens that are attended to.
        head_dim: ``D``; attention divides scores by its root, which the paper neglects.

    Source: QAQ, section 4.1, ``sigma ** 2 = ln(T ** 3 / (T - 1) * target ** 2 + 1) / sum Q ** 2``.
    """
    variance = math.log(tokens**3 / (tokens - 1) * target**2 + 1) / (query_norm / head_dim)
    return 2 * math.sqrt(3 * variance)


def value_bound(target: float, tokens: int) -> float:
    """Return the bound on values at which outputs have a standard deviation of ``target``.

    Source: QAQ, section 4.1, ``sigma = target / (sqrt(T) A)``; `mixed.allocate` multiplies with ``A``.
    """
    return 2 * math.sqrt(3 / tokens) * target


@lru_cache(maxsize=256)
def target_bounds(role: str, target: float, query_norm: float, head_dim: int) -> tuple[float, ...]:
    """Return the bounds on keys or values of caches of ``2 ** 5`` slots, ``2 ** 6`` and so on, rounded to fp32.

    How many tokens a page is attended to with counts up to its end and up to a power of two, so that its bits
    do not depend on how many tokens came with it, and a kernel looks its bound up. Without a target, none.
    """
    if not target:
        return ()
    lengths = (1 << k for k in range(min(PAGE_SIZES).bit_length() - 1, LONGEST + 1))
    if role == "key":
        bounds = [key_bound(query_norm, target, tokens, head_dim) for tokens in lengths]
    else:
        bounds = [value_bound(target, tokens) for tokens in lengths]
    return tuple(ctypes.c_float(bound).value for bound in bounds)


def length_class(end: int) -> int:
    """Return the place in `target_bounds` for a page that ends before slot ``end``."""
    return (end - 1).bit_length() - (min(PAGE_SIZES).bit_length() - 1)
