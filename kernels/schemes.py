"""The quantization schemes: what the codes of a packed tensor mean, and how many bits they take.

A scheme is a small frozen dataclass with its own checks. It knows nothing of regions or caches: `Layout` asks it for
the shapes of codes and parameters of a page of ``page_size`` tokens with ``head_dim`` channels. A scheme is a value, so
it names calibration tables by their digest (`Tables.digest`); the tables themselves travel as tensors.

Attributes of a scheme besides its fields, the same for all instances of a class unless said otherwise:

    name            its file in `reference` and in each backend, and its name in saved caches
    reader          attention's loop over its pages; keys and values must have the same
    param_elements  elements of a parameter: 2 (scale and zero point), or 1 (a byte of metadata)
    byte_params     whether parameters are bytes; depends on ``params``
    entries         vectors of its codebook; 0 without one
    attentive       whether the bits of a token depend on the attention it gets
    asks_queries    whether a cache of keys also holds the last queries
    state_rows      rows behind the exact ones in which a cache holds what it found of itself
    adaptive        options of QAQ for pages after they are packed, or ``None``
    keeps_codes     whether the tokens of a truncated page keep their codes when it fills again
    takes_bias      whether keys may be coded relative to the bias of their projection
    parts           fields that are dataclasses; a saved cache lists their fields among those of the scheme
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import TYPE_CHECKING, Any, ClassVar

from kvq_compile.kernels.adaptive.options import Adaptive as Adaptive
from kvq_compile.kernels.channelwise_scheme import Channelwise as Channelwise
from kvq_compile.kernels.mixed_scheme import Mixed as Mixed
from kvq_compile.kernels.scheme_checks import Grouping as Grouping
from kvq_compile.kernels.scheme_checks import Packing as Packing
from kvq_compile.kernels.scheme_checks import Params as Params
from kvq_compile.kernels.scheme_checks import Role as Role
from kvq_compile.kernels.scheme_checks import Transform as Transform
from kvq_compile.kernels.scheme_checks import check_format, check_tables
from kvq_compile.kernels.tables import NO_TABLES
from kvq_compile.kernels.values import Interned, changed_fields, check, check_flags, check_integers
from kvq_compile.kernels.words import TRITS, padded_length, plane_words, planes_of
from kvq_compile.kernels.words import WORD_BITS as WORD_BITS

if TYPE_CHECKING:
    from torch import Tensor

WIDTHS = (1, 1.5, 2, 3, 4, 8)  # bits of the codes of a uniform quantizer; 1.5: three levels
MAX_INDEX_BITS = (
    12  # more entries could not be learned from a calibration set or searched while writing
)
PAGE_SIZES = (32, 64, 128, 256)


def largest_divisor(whole: int, most: int) -> int:
    """Return the largest divisor of ``whole`` up to ``most``."""
    return next(size for size in range(min(whole, most), 0, -1) if whole % size == 0)


class _Codes:
    """Attributes common to schemes whose pages are codes and parameters of groups."""

    reader: ClassVar[str] = "pages"
    param_elements: ClassVar[int] = 2
    attentive: ClassVar[bool] = False
    asks_queries: ClassVar[bool] = False
    state_rows: ClassVar[int] = 0
    adaptive: ClassVar[None] = None
    keeps_codes: ClassVar[bool] = True
    parts: ClassVar[Mapping[str, type]] = {}

    def row_places(self, row_length: int) -> int:
        """Return the codes that a row of ``row_length`` codes is padded to before its planes are."""
        return row_length

    def unused_bits(self, codes: Tensor, head_dim: int, page_size: int) -> float:
        """Return the bits per element of packed pages that no token uses: 0."""
        del codes, head_dim, page_size
        return 0.0


@dataclass(frozen=True, repr=False)
class Uniform(_Codes, metaclass=Interned):
    """Uniform quantization: the elements of a group share a scale and a zero point, ``x = code * scale + zero``.

    Args:
        bits: Width of a code: 1, 1.5 (three levels), 2, 3, 4 or 8.
        grouping: ``"token"``: a group is ``group_size`` neighbouring channels of one token.
            ``"channel"``: a group is one channel of ``group_size`` neighbouring tokens.
        group_size: Elements of a group; ``None``: the whole head dimension (token) or page (channel).
        clip: Fraction of a group's range, about its midpoint, that the codes span; in (0, 1].
        transform: Rotation of the head dimension before quantization, undone on reading.
        params: Format of scale and zero point: ``"fp16"``; ``"fp8"`` (e4m3), half as large; or ``"e5m3"``, as
            large as that, for groups about zero: a scale without a sign, of the range of fp16, and the place of the
            middle between the ends.
        packing: How three-level codes are packed: in two-bit ``"fields"``, which unpack fastest, or as five
            ``"trits"`` a byte, 1.6 bits each.
        rotary: Whether keys are quantized before the rotary embedding.
        tables: Digest of the calibration tables of this tensor; rotary keys need tables.
        up_to: Whether ``group_size`` is an upper limit: groups then get the largest size up to it that divides the
            head dimension (token) or the page (channel).
        search: Whether each group has the best of eight clips, from 1 to 0.4, by the squared error that it leaves.

    Raises:
        TypeError: A count of bits or channels is not an integer.
        ValueError: An argument is out of its range, or two of them do not go together.
    """

    name: ClassVar[str] = "uniform"
    couple: ClassVar[int] = 1
    entries: ClassVar[int] = 0

    bits: float = 4
    grouping: Grouping = "token"
    group_size: int | None = None
    clip: float = 1.0
    transform: Transform = "none"
    params: Params = "fp16"
    packing: Packing = "fields"
    rotary: bool = False
    tables: str = NO_TABLES
    up_to: bool = False
    search: bool = False

    def __post_init__(self) -> None:
        check_flags(up_to=self.up_to, search=self.search)
        if self.bits != 1.5:
            check_integers(bits=self.bits)
        check_integers(group_size=1 if self.group_size is None else self.group_size)
        check(self.bits in WIDTHS, f"bits must be one of {list(WIDTHS)}, got {self.bits}")
        check(
            self.packing in ("fields", "trits"),
            f'packing must be "fields" or "trits", got {self.packing!r}',
        )
        check(
            self.packing == "fields" or self.bits == 1.5,
            f'packing "trits" must go with bits=1.5, got bits={self.bits}',
        )
        check(
            self.grouping in ("token", "channel"),
            f'grouping must be "token" or "channel", got {self.grouping!r}',
        )
        check(
            self.group_size is None or self.group_size > 0,
            f"group_size must be positive, got {self.group_size}",
        )
        check(0.0 < self.clip <= 1.0, f"clip must be in (0, 1], got {self.clip}")
        check(
            not self.search or (self.clip == 1.0 and self.tables == NO_TABLES),
            f"search must go with clip=1 and without tables, got clip={self.clip}, tables={self.tables!r}",
        )
        check_format(self.params, self.transform, self.rotary, self.tables)

    __repr__ = changed_fields

    def bound_to(self, head_dim: int, page_size: int) -> Uniform:
        """Return the scheme with its group size resolved for pages of these sizes."""
        whole = head_dim if self.grouping == "token" else page_size
        if self.group_size is None:
            return replace(self, group_size=whole, up_to=False)
        if self.up_to:
            return replace(self, group_size=largest_divisor(whole, self.group_size), up_to=False)
        return self

    def check_sizes(self, role: Role, head_dim: int, page_size: int) -> None:
        """Make sure that pages of these sizes can be grouped.

        Raises:
            ValueError: They cannot.
        """
        del role
        assert self.group_size is not None
        divided = head_dim if self.grouping == "token" else page_size
        what = "head_dim" if self.grouping == "token" else "page_size"
        check(
            divided % self.group_size == 0,
            f"{what} must be a multiple of group_size={self.group_size}, got {divided}",
        )
        check(not self.rotary or head_dim % 2 == 0, f"head_dim must be even, got {head_dim}")

    @property
    def planes(self) -> tuple[int, ...]:
        """The width in bits of the one plane: of 3 bits it is packed in thirds."""
        return (2 if self.bits == 1.5 else int(self.bits),)

    @property
    def levels(self) -> int:
        """Steps between the lowest and the highest code."""
        return 2 if self.bits == 1.5 else (1 << int(self.bits)) - 1

    def row_places(self, row_length: int) -> int:
        """Return the codes that fill whole words, or whole thirds of the row."""
        return padded_length(row_length, self.planes[-1])

    def row_words(self, row_length: int) -> int:
        """Return the packed 16-bit words in a row of ``row_length`` codes."""
        if self.packing == "trits":
            row_bytes = -(-row_length // TRITS)
            return -(-row_bytes // 2)
        return sum(plane_words(self.row_places(row_length), width) for width in self.planes)

    def codes_shape(self, role: Role, head_dim: int, page_size: int) -> tuple[int, int]:
        """Return ``rows, units`` of the codes of a page."""
        if role == "key":
            return page_size, self.row_words(head_dim)
        return head_dim, self.row_words(page_size)

    def params_shape(self, head_dim: int, page_size: int) -> tuple[int, int]:
        """Return ``groups, members`` of the parameters of a page."""
        assert self.group_size is not None
        if self.grouping == "token":
            return head_dim // self.group_size, page_size
        return page_size // self.group_size, head_dim

    @property
    def byte_params(self) -> bool:
        """Whether parameters are bytes."""
        return self.params != "fp16"

    @property
    def takes_bias(self) -> bool:
        """Whether keys may be coded relative to the bias of their projection."""
        return self.transform == "none"

    def describe(self, head_dim: int, page_size: int) -> str:
        """Describe the codes: ``"2-bit"``, ``"2-bit group-24"``."""
        whole = head_dim if self.grouping == "token" else page_size
        group = "" if self.group_size == whole else f" group-{self.group_size}"
        return f"{self.bits:g}-bit{group}"


@dataclass(frozen=True, repr=False)
class Codebook(_Codes, metaclass=Interned):
    """Vector quantization: an index selects one of ``2 ** bits`` vectors for ``couple`` neighbouring channels.

    Args:
        bits: Width of an index, 1 to 12.
        couple: Channels that share an index.
        rotary: Whether keys are quantized before the rotary embedding.
        tables: Digest of the tables with the codebook.

    Raises:
        TypeError: A count of bits or channels is not an integer.
        ValueError: An argument is out of its range, or there are no tables.
    """

    name: ClassVar[str] = "codebook"
    packing: ClassVar[Packing] = "fields"
    params: ClassVar[Params] = "fp16"
    grouping: ClassVar[Grouping] = "token"
    group_size: ClassVar[None] = None
    transform: ClassVar[Transform] = "none"
    clip: ClassVar[float] = 1.0
    byte_params: ClassVar[bool] = False
    takes_bias: ClassVar[bool] = False

    bits: int
    couple: int
    rotary: bool = False
    tables: str = NO_TABLES

    def __post_init__(self) -> None:
        check_integers(bits=self.bits, couple=self.couple)
        check_tables(self.rotary, self.tables)
        check(self.couple > 0, f"couple must be positive, got {self.couple}")
        check(
            1 <= self.bits <= MAX_INDEX_BITS,
            f"bits must be 1 to {MAX_INDEX_BITS} for a codebook, got {self.bits}",
        )
        check(self.tables != NO_TABLES, "a codebook must be calibrated: tables must be given")

    __repr__ = changed_fields

    def bound_to(self, head_dim: int, page_size: int) -> Codebook:
        """Return the scheme itself: nothing of it depends on the sizes of a page."""
        del head_dim, page_size
        return self

    def check_sizes(self, role: Role, head_dim: int, page_size: int) -> None:
        """Make sure that the channels of a token can be coupled.

        Raises:
            ValueError: They cannot.
        """
        del role, page_size
        halves = 2 * self.couple if self.rotary else self.couple
        check(
            head_dim % halves == 0,
            f"head_dim must be a multiple of {halves} for {self.couple} coupled channels, "
            f"got {head_dim}",
        )

    @property
    def planes(self) -> tuple[int, ...]:
        """Widths in bits of the planes that an index is split into, low bits first."""
        return planes_of(self.bits)

    @property
    def levels(self) -> int:
        """The largest index."""
        return (1 << self.bits) - 1

    def codes_shape(self, role: Role, head_dim: int, page_size: int) -> tuple[int, int]:
        """Return ``rows, units`` of the codes of a page."""
        rows, length = head_dim // self.couple, page_size
        if role == "key":
            rows, length = length, rows
        return rows, sum(plane_words(length, width) for width in self.planes)

    def params_shape(self, head_dim: int, page_size: int) -> tuple[int, int]:
        """Return ``groups, members`` of the parameters of a page: there are none."""
        del head_dim
        return 0, page_size

    @property
    def entries(self) -> int:
        """Vectors of a codebook."""
        return 1 << self.bits

    def describe(self, head_dim: int, page_size: int) -> str:
        """Describe the codes: ``"4 channels in 8 bits"``."""
        del head_dim, page_size
        return f"{self.couple} channels in {self.bits} bits"


Scheme = Uniform | Codebook | Mixed | Channelwise
SCHEMES: tuple[type[Scheme], ...] = (Uniform, Codebook, Mixed, Channelwise)


def plain_scheme(scheme: Scheme) -> dict[str, Any]:
    """Return the fields of a scheme as plain Python values; `load_scheme` is the inverse."""
    plain = asdict(scheme)
    for name in scheme.parts:
        plain |= plain.pop(name) or {}
    return {"scheme": scheme.name, **plain}


def load_scheme(plain: Mapping[str, Any]) -> Scheme:
    """Return the scheme from what `plain_scheme` returned.

    Raises:
        KeyError: There is no such scheme.
        TypeError: A field is unknown or missing, or of the wrong type.
        ValueError: A field is out of its range.
    """
    own = dict(plain)
    kind = {kind.name: kind for kind in SCHEMES}[own.pop("scheme")]
    for name, part in kind.parts.items():
        held = {f.name: own.pop(f.name) for f in fields(part) if f.name in own}
        own[name] = part(**held) if held else None
    return kind(**own)


def as_channelwise(scheme: Scheme) -> Channelwise:
    """Return the scheme as `Channelwise`.

    Raises:
        TypeError: It is another scheme.
    """
    if not isinstance(scheme, Channelwise):
        raise TypeError(f"the scheme must be Channelwise, got {scheme}")
    return scheme


def as_mixed(scheme: Scheme) -> Mixed:
    """Return the scheme as `Mixed`.

    Raises:
        TypeError: It is another scheme.
    """
    if not isinstance(scheme, Mixed):
        raise TypeError(f"the scheme must be Mixed, got {scheme}")
    return scheme


def scheme_of(
    options: Mapping[str, Any], tables: str, rotary: bool
) -> Uniform | Codebook | Channelwise:
    """Return a calibrated scheme: a `Codebook` if ``couple`` is among the options, `Channelwise` with ``weighs``.

    Else it is `Uniform`.

    Args:
        options: Fields that differ from their defaults.
        tables: Digest of the tables.
        rotary: Whether keys are quantized before the rotary embedding.
    """
    if "weighs" in options:
        return Channelwise(**options, tables=tables)
    kind: type[Uniform | Codebook] = Codebook if "couple" in options else Uniform
    return kind(**options, rotary=rotary, tables=tables)
