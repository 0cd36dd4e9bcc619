"""The channelwise scheme: what the channels of a key are given, when each has its own number of bits.

A scheme like those of `schemes`, whose docstring lists the attributes of all.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

from kvq_compile.kernels.scheme_checks import (
    Grouping,
    Packing,
    Params,
    Role,
    Transform,
    check_tables,
)
from kvq_compile.kernels.tables import NO_TABLES
from kvq_compile.kernels.values import Interned, changed_fields, check
from kvq_compile.kernels.words import WORD_BITS

if TYPE_CHECKING:
    from torch import Tensor

Pairs = Literal["halves", "neighbours", "none"]

MAX_WIDTH = 8  # bits of a channel
BLOCK_WORDS = (
    8  # words of a token in a block: 16 bytes, which the matrix instruction reads as 64 channels
)
FIELDS = WORD_BITS // 2  # of a word
PARAM_FIELDS = 3  # bytes of a channel's parameters: step, low and high byte of the center
# What a bit takes from the mean squared error of a channel of variance 1: the first, the second, ...
GAINS = (0.6366, 0.2459, 0.08296, 0.025043, 0.006997, 0.00185, 0.00048, 0.00013)
CLIPS = (1.0, 0.92, 0.84, 0.76, 0.68, 0.6, 0.5, 0.4)
PRIOR = 2.5  # queries that look at all channels alike, added to those known: few do not show what others look at


@dataclass(frozen=True, repr=False)
class Channelwise(metaclass=Interned):
    """Transform coding of keys: each channel of a head has its own number of bits, ``bits`` on average.

    A cache finds the widths of its channels when its first page fills and keeps them (`reference.channelwise`). A
    channel of a page has a step and a center of its own. With tables, which name rotation pairs and their frequencies,
    it also finds the mean of keys before the rotary embedding, and codes what is left of a key without it. Tables that
    weigh channels are calibrated: a cache then needs no queries to know which of them matter.

    Args:
        bits: Average width in bits, up to 8; of a head it becomes the nearest multiple of ``16 / head_dim``.
        pairs: Which two channels the rotary embedding mixes, and so get their widths by the same weight:
            ``"halves"``: ``c`` and ``c + head_dim / 2``; ``"neighbours"``: ``2 c`` and ``2 c + 1``; ``"none"``.
            With tables it must be ``"halves"``, since they put the channels in that order.
        tables: Digest of the tables of this tensor.
        weighs: Whether the scales of the tables weigh channels.

    Raises:
        TypeError: ``bits`` is not a number.
        ValueError: An argument is out of its range.
    """

    name: ClassVar[str] = "channelwise"
    reader: ClassVar[str] = "pages"
    couple: ClassVar[int] = 1
    packing: ClassVar[Packing] = "fields"
    grouping: ClassVar[Grouping] = "channel"
    group_size: ClassVar[None] = None
    clip: ClassVar[float] = 1.0
    transform: ClassVar[Transform] = "none"
    params: ClassVar[Params] = "fp16"
    planes: ClassVar[tuple[int, ...]] = (1,)
    levels: ClassVar[int] = 1
    param_elements: ClassVar[int] = 1
    byte_params: ClassVar[bool] = True
    entries: ClassVar[int] = 0
    attentive: ClassVar[bool] = False
    adaptive: ClassVar[None] = None
    keeps_codes: ClassVar[bool] = False
    takes_bias: ClassVar[bool] = False
    rotary: ClassVar[bool] = False
    parts: ClassVar[Mapping[str, type]] = {}

    bits: float = 4.0
    pairs: Pairs = "halves"
    tables: str = NO_TABLES
    weighs: bool = False

    def __post_init__(self) -> None:
        check_tables(False, self.tables)
        if not isinstance(self.bits, (int, float)) or isinstance(self.bits, bool):
            raise TypeError(f"bits must be a number, got {self.bits!r}")
        check(0 < self.bits <= MAX_WIDTH, f"bits must be in (0, {MAX_WIDTH}], got {self.bits}")
        names = ("halves", "neighbours", "none")
        check(
            self.pairs in names,
            f'pairs must be "halves", "neighbours" or "none", got {self.pairs!r}',
        )
        check(
            self.pairs == "halves" or self.tables == NO_TABLES,
            f'pairs must be "halves" with tables, got {self.pairs!r}',
        )
        check(
            not self.weighs or self.tables != NO_TABLES,
            f"weighs must be False without tables, got {self.weighs}",
        )

    __repr__ = changed_fields

    def bound_to(self, head_dim: int, page_size: int) -> Channelwise:
        """Return the scheme with the bits that fill whole words of a token."""
        del page_size
        words = max(1, round(self.bits * head_dim / WORD_BITS))
        words = min(words, MAX_WIDTH * head_dim // WORD_BITS)
        return replace(self, bits=words * WORD_BITS / head_dim)

    def check_sizes(self, role: Role, head_dim: int, page_size: int) -> None:
        """Make sure that pages of these sizes can be packed.

        Raises:
            ValueError: They cannot.
        """
        del page_size
        check(role == "key", f'role must be "key" for channels of different widths, got "{role}"')
        check(
            head_dim % 2 == 0 or self.pairs == "none",
            f'head_dim must be even, or pairs="none", got {head_dim}',
        )

    @property
    def asks_queries(self) -> bool:
        """Whether the channels' weights are those of the last queries."""
        return not self.weighs

    @property
    def takes_mean(self) -> bool:
        """Whether keys are coded without their rotated mean."""
        return self.tables != NO_TABLES

    @property
    def state_rows(self) -> int:
        """Rows behind the exact ones: the widths of channels, and their mean where keys are coded without it."""
        return 2 if self.takes_mean else 1

    def bit_rows(self, head_dim: int) -> int:
        """Return the bits of a token: the widths of all channels together."""
        return round(self.bits * head_dim)

    def row_places(self, row_length: int) -> int:
        """Return the codes in a row that its planes have room for: no row has more than its length."""
        return row_length

    def codes_shape(self, role: Role, head_dim: int, page_size: int) -> tuple[int, int]:
        """Return ``rows, units`` of the codes of a page: the words of a token, tokens."""
        del role
        return self.bit_rows(head_dim) // WORD_BITS, page_size

    def params_shape(self, head_dim: int, page_size: int) -> tuple[int, int]:
        """Return ``groups, members`` of the parameters of a page: bytes of a channel, channels."""
        del page_size
        return PARAM_FIELDS, head_dim

    def unused_bits(self, codes: Tensor, head_dim: int, page_size: int) -> float:
        """Return the bits per element of packed pages that no token uses: 0."""
        del codes, head_dim, page_size
        return 0.0

    def describe(self, head_dim: int, page_size: int) -> str:
        """Describe the codes: ``"3-bit by channel"``, ``"3-bit by channel without a mean, calibrated"``."""
        del head_dim, page_size
        mean = " without a mean" if self.takes_mean else ""
        return f"{self.bits:g}-bit by channel{mean}{', calibrated' if self.weighs else ''}"
