"""The mixed-precision scheme: what the tokens of a page are given, when each has its own number of bits.

A scheme like those of `schemes`, whose docstring lists the attributes of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar

from kvq_compile.kernels.adaptive.options import Adaptive
from kvq_compile.kernels.scheme_checks import (
    Grouping,
    Packing,
    Params,
    Role,
    Transform,
    check_format,
)
from kvq_compile.kernels.tables import NO_TABLES
from kvq_compile.kernels.values import Interned, changed_fields, check, check_flags, check_integers
from kvq_compile.kernels.words import WORD_BITS, plane_words

if TYPE_CHECKING:
    from torch import Tensor

MAX_BITS = 8  # of a token in mixed pages
HEADER = (
    MAX_BITS  # words of the header of a mixed page; 8 keep rows of 128 channels aligned to 16 bytes
)
FLOOR = 4.0  # times the mean importance of a page, added before the root; only heavy tokens stand out above it


@dataclass(frozen=True, repr=False)
class Mixed(metaclass=Interned):
    """Mixed precision: each token has its own number of bits, ``bits`` on average over a page (`reference.mixed`).

    Args:
        bits: Budget of the codes of a page, in bits per element; times ``page_size`` it must be an integer.
        min_bits, max_bits: Least and most bits of a token, 0 to 8.
        outliers: Elements of a token kept in fp16: half of them the largest, half the smallest.
        params: Format of zero point and half-range: ``"fp16"``, or ``"fp8"`` (e4m3).
        fit: Whether the half-range is fitted so that quantization keeps the product of a token with itself; the
            paper does not.
        soften: Whether bits are distributed by softened importance scores; the paper uses them as they are.
        attentive: Whether bits are distributed by attention and range, or by range alone.
        transform: Rotation of the head dimension before quantization, undone on reading.
        rotary: Whether keys are quantized before the rotary embedding.
        tables: Digest of the calibration tables of this tensor; rotary keys need tables.
        adaptive: What QAQ does to pages after they are packed; ``None``: nothing.

    Raises:
        TypeError: ``bits`` is not a number, or another size not an integer.
        ValueError: An argument is out of its range, or two of them do not go together.
    """

    name: ClassVar[str] = "mixed"
    reader: ClassVar[str] = "mixed"
    couple: ClassVar[int] = 1
    packing: ClassVar[Packing] = "fields"
    grouping: ClassVar[Grouping] = "token"
    group_size: ClassVar[None] = None
    clip: ClassVar[float] = 1.0
    planes: ClassVar[tuple[int, ...]] = ()
    levels: ClassVar[int] = 0
    param_elements: ClassVar[int] = 1
    byte_params: ClassVar[bool] = True
    entries: ClassVar[int] = 0
    state_rows: ClassVar[int] = 0
    keeps_codes: ClassVar[bool] = False
    takes_bias: ClassVar[bool] = False
    parts: ClassVar[Mapping[str, type]] = {"adaptive": Adaptive}

    bits: float
    min_bits: int = 0
    max_bits: int = 4
    outliers: int = 0
    params: Params = "fp16"
    fit: bool = True
    soften: bool = True
    attentive: bool = True
    transform: Transform = "none"
    rotary: bool = False
    tables: str = NO_TABLES
    adaptive: Adaptive | None = None

    def __post_init__(self) -> None:
        check_integers(min_bits=self.min_bits, max_bits=self.max_bits, outliers=self.outliers)
        check_flags(fit=self.fit, soften=self.soften, attentive=self.attentive)
        if not isinstance(self.bits, (int, float)) or isinstance(self.bits, bool):
            raise TypeError(f"bits must be a number, got {self.bits!r}")
        check(
            0 <= self.min_bits < self.max_bits <= MAX_BITS,
            f"min_bits and max_bits must be two ascending numbers of 0 to {MAX_BITS}, "
            f"got {self.min_bits} and {self.max_bits}",
        )
        check(
            self.min_bits <= self.bits <= self.max_bits and self.bits > 0,
            f"bits must be positive and between min_bits={self.min_bits} and "
            f"max_bits={self.max_bits}, got {self.bits}",
        )
        check(
            self.outliers % 2 == 0 and self.outliers >= 0,
            f"outliers must be an even number of 0 or more, got {self.outliers}",
        )
        check_format(self.params, self.transform, self.rotary, self.tables)
        check(
            self.params != "e5m3",
            'params must be "fp16" or "fp8" where tokens differ in bits, got "e5m3"',
        )
        exact = self.adaptive is not None and self.adaptive.keep_exact
        check(
            not exact or (self.attentive and self.tables == NO_TABLES),
            "keep_exact must go with bits that depend on attention, without tables",
        )

    __repr__ = changed_fields

    def bound_to(self, head_dim: int, page_size: int) -> Mixed:
        """Return the scheme itself: nothing of it depends on the sizes of a page."""
        del head_dim, page_size
        return self

    def in_whole_rows(self, page_size: int) -> Mixed:
        """Return the scheme with the bits of whole rows of a page, as many as there are."""
        return replace(self, bits=int(self.bits * page_size) / page_size)

    def check_sizes(self, role: Role, head_dim: int, page_size: int) -> None:
        """Make sure that pages of these sizes have whole rows, and their tokens more elements than outliers.

        Raises:
            ValueError: They cannot.
        """
        del role
        check(
            self.bits * page_size % 1 == 0,
            f"bits must be a multiple of 1/{page_size}, the rows of a page, got {self.bits}",
        )
        check(
            self.outliers < head_dim,
            f"outliers must be an even number below {head_dim}, got {self.outliers}",
        )

    @property
    def asks_queries(self) -> bool:
        """Whether a cache of keys also holds the last queries."""
        return self.attentive

    @property
    def param_bytes(self) -> int:
        """Bytes of a stored zero point or half-range."""
        return 1 if self.params == "fp8" else 2

    @property
    def rank_field(self) -> int:
        """Field of the rank, after zero point and half-range."""
        return 2 * self.param_bytes

    def outlier_fields(self, head_dim: int) -> int:
        """Return the bytes of an outlier: one or two of its channel, the low and the high one of its value."""
        return 3 if head_dim <= 256 else 4

    def metadata_bytes(self, head_dim: int) -> int:
        """Return the bytes of metadata of a token: zero point, half-range, rank and outliers."""
        return self.rank_field + 1 + self.outlier_fields(head_dim) * self.outliers

    def row_places(self, row_length: int) -> int:
        """Return ``row_length``: the rows of a page are those of its planes."""
        return row_length

    def codes_shape(self, role: Role, head_dim: int, page_size: int) -> tuple[int, int]:
        """Return ``rows, row_words`` of the codes of a page: one row, the header and then the bit planes."""
        del role
        return 1, HEADER + int(self.bits * page_size) * plane_words(head_dim, 1)

    def params_shape(self, head_dim: int, page_size: int) -> tuple[int, int]:
        """Return ``fields, tokens`` of the metadata of a page."""
        return self.metadata_bytes(head_dim), page_size

    def unused_bits(self, codes: Tensor, head_dim: int, page_size: int) -> float:
        """Return the bits per element of packed pages that no token uses: the rows after the last bit plane.

        Args:
            codes: ``[B, H, P, 1, row_words]``, one page or more.
            head_dim: Channels of a head.
            page_size: Tokens of a page.
        """
        used = codes[..., 0, :HEADER].float().sum(-1).mean()
        row_bits = WORD_BITS * plane_words(head_dim, 1)
        return (self.bits - float(used) / page_size) * row_bits / head_dim

    def describe(self, head_dim: int, page_size: int) -> str:
        """Describe the codes: ``"1 to 4 bits (2.5 on average)"``."""
        del head_dim, page_size
        average, exact = f"{self.bits:g} on average", ""
        if self.adaptive is not None and self.adaptive.target:
            average = f"at most {average}, fewer where they meet target {self.adaptive.target:g}"
        if self.adaptive is not None and self.adaptive.keep_exact:
            exact = ", exact copies in host memory"
        return f"{self.min_bits} to {self.max_bits} bits ({average}){exact}"
