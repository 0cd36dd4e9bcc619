"""Describe a quantized cache as data: which tokens stay exact, how the others are coded, where each bit lies.

A cache holds the tokens ``0 .. length - 1`` of one key or value tensor in three regions::

    | sinks |      packed pages of page_size tokens      |  recent: window .. window + page_size - 1  |
      exact              quantized once                                    exact

A token enters the exact ring of recent rows and is quantized once, together with its page, when
``page_size`` tokens have left the window. Where a token is kept follows from the length alone, so a
prompt written at once, in chunks or token by token gives the same bytes.

`TensorSpec` and `CacheSpec` are what a user chooses. `PageLayout` is what an op needs: one tensor's spec
bound to its role and head dimension, with every derived size, and a one-line text form that can stand in
a graph as a constant.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from typing import Any, Literal

from kvq_compile.kernels.mixed_layout import (
    PAGE_SIZES,
    UNIT_BITS,
    MixedLayout,
    Params,
    length_class,
    target_bounds,
)
from kvq_compile.kernels.tables import NO_TABLES, Tables

Grouping = Literal["token", "channel"]
Role = Literal["key", "value"]
Transform = Literal["none", "hadamard"]
Coder = Literal["uniform", "codebook", "mixed"]
Packing = Literal["fields", "trits"]

WIDTHS = (1, 1.5, 2, 3, 4, 8)  # of the codes of a uniform quantizer; 1.5: three levels
TRITS = 5  # three-level codes in a byte: 3 ** 5 = 243
MAX_INDEX_BITS = 12  # a codebook of more entries could not be learned, searched or held
HIDES = -1e4  # an additive mask of this or less leaves a token no weight
QUERIES = 5  # whose attention mixed pages go by, the last; the paper's attention window


def _check_integers(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an integer, got {value!r}")


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise ValueError(message)


@dataclass(frozen=True)
class TensorSpec:
    """Say how the packed tokens of one tensor, keys or values, are coded.

    Of a *uniform* quantizer a group of numbers shares a scale and a zero point; a code ``c`` stands for
    ``c * scale + zero``. Of a *codebook* ``couple`` neighbouring channels of a token share an index of
    ``bits`` bits, which stands for one of ``2 ** bits`` learned vectors. In *mixed* pages each token has bits
    of its own, ``bits`` on average.

    Args:
        bits: Width of a code: 1, 1.5 (three levels), 2, 3, 4 or 8; of an index, 1 to 12; of mixed pages the
            average, any number that makes whole rows of a page.
        grouping: ``"token"``: a group is ``group_size`` neighbouring channels of one token.
            ``"channel"``: a group is one channel of ``group_size`` neighbouring tokens.
        group_size: Numbers per group; ``None`` takes the whole head dimension (token) or page (channel).
        clip: Fraction of a group's range, about its midpoint, that the codes span; in (0, 1].
        transform: Rotation of the head dimension before coding, undone on reading.
        params: Format of scale and zero point: ``"fp16"``, or ``"fp8"`` (e4m3), half as large.
        packing: How three-level codes are packed: in two-bit ``"fields"``, which unpack fastest, or five
            ``"trits"`` to a byte, which are 1.6 bits each.
        couple: Channels that share an index into a codebook; ``None`` for the uniform quantizer.
        rotary: Whether keys are coded as they were before the rotary embedding.
        tables: What calibration found for this tensor; see `Tables`. A codebook, and rotary keys, need it.
        mixed: Least and most bits of a token in mixed pages; ``None`` for the other quantizers.
        outliers: Numbers of a token that mixed pages keep exactly, half of them at each end.
        fit: Whether mixed codes stand for the middles of their segments scaled to keep a token's product with
            itself, or for the middles.
        soften: Whether mixed pages distribute bits by softened importance, or by importance as it is.
        attentive: Whether mixed pages distribute bits by the attention that tokens get, or by range alone.
        target: Error that is good enough in mixed pages, which then use no more of their bits than it takes: the
            standard deviation of an attention weight (keys) or of the output (values). 0: all bits are used.
        query_norm: Squared norm of a query that few exceed, which a target of keys needs.
        requantize: Whether tokens of mixed pages lose bits that their target needs no more as attention moves on.
        keep_exact: Whether host memory holds packed tokens exactly, for them to gain bits when attention returns.

    Raises:
        TypeError: A number of bits or channels is not a number.
        ValueError: An argument is out of its range, or two of them do not go together.
    """

    bits: float = 4
    grouping: Grouping = "token"
    group_size: int | None = None
    clip: float = 1.0
    transform: Transform = "none"
    params: Params = "fp16"
    packing: Packing = "fields"
    couple: int | None = None
    rotary: bool = False
    tables: Tables | None = None
    mixed: tuple[int, int] | None = None
    outliers: int = 0
    fit: bool = True
    soften: bool = True
    attentive: bool = True
    target: float = 0.0
    query_norm: float = 0.0
    requantize: bool = False
    keep_exact: bool = False

    def __post_init__(self) -> None:
        if self.mixed is not None:
            self._check_mixed()
        elif self.bits != 1.5 or self.couple is not None:
            _check_integers(bits=self.bits)
        _check(
            self.mixed is not None or not (self.target or self.requantize or self.keep_exact),
            "target, requantize and keep_exact must go with mixed pages: give mixed",
        )
        _check_integers(
            group_size=1 if self.group_size is None else self.group_size,
            couple=1 if self.couple is None else self.couple,
        )
        if self.mixed is not None:
            pass
        elif self.couple is None:
            _check(self.bits in WIDTHS, f"bits must be one of {list(WIDTHS)}, got {self.bits}")
        else:
            _check(self.couple > 0, f"couple must be positive, got {self.couple}")
            _check(
                1 <= self.bits <= MAX_INDEX_BITS,
                f"bits must be 1 to {MAX_INDEX_BITS} for a codebook, got {self.bits}",
            )
            _check(self.tables is not None, "a codebook must be calibrated: tables must be given")
        _check(
            self.params in ("fp16", "fp8"), f'params must be "fp16" or "fp8", got {self.params!r}'
        )
        _check(
            self.packing in ("fields", "trits"),
            f'packing must be "fields" or "trits", got {self.packing!r}',
        )
        _check(
            self.packing == "fields" or self.bits == 1.5,
            f'packing "trits" must go with bits=1.5, got bits={self.bits}',
        )
        _check(
            not self.rotary or self.tables is not None,
            "rotary keys must be calibrated: tables must be given",
        )
        _check(
            self.transform == "none" or not (self.rotary or self.couple),
            f'transform must be "none" for rotary keys and for codebooks, got {self.transform!r}',
        )
        _check(
            self.grouping in ("token", "channel"),
            f'grouping must be "token" or "channel", got {self.grouping!r}',
        )
        _check(
            self.group_size is None or self.group_size > 0,
            f"group_size must be positive, got {self.group_size}",
        )
        _check(0.0 < self.clip <= 1.0, f"clip must be in (0, 1], got {self.clip}")
        _check(
            self.transform in ("none", "hadamard"),
            f'transform must be "none" or "hadamard", got {self.transform!r}',
        )

    def _check_mixed(self) -> None:
        assert self.mixed is not None
        least, most = self.mixed
        _check_integers(least=least, most=most, outliers=self.outliers)
        if not isinstance(self.bits, (int, float)) or isinstance(self.bits, bool):
            raise TypeError(f"bits must be a number, got {self.bits!r}")
        plain = self.couple is None and self.grouping == "token" and self.group_size is None
        _check(plain, "mixed pages have one group a token: no couple, grouping or group_size")
        _check(
            not self.requantize or self.target > 0, "requantize must go with a target: give target"
        )
        _check(
            not self.keep_exact or (self.attentive and self.tables is None),
            "keep_exact must go with bits that depend on attention, without tables",
        )
        _check(
            0 <= self.target < math.inf and 0 <= self.query_norm < math.inf,
            "target and query_norm must be finite numbers of 0 or more, "
            f"got {self.target} and {self.query_norm}",
        )


@dataclass(frozen=True)
class CacheSpec:
    """Say how a whole cache is kept: exact regions, a `TensorSpec` for keys and one for values, overrides.

    Args:
        key, value: How packed keys and values are coded.
        sinks: First tokens that stay exact for ever.
        window: Most recent tokens that are always exact; up to ``page_size - 1`` more wait for their page.
        page_size: Tokens quantized at once: 32, 64, 128 or 256.
        layers: ``(layer index, CacheSpec or None)`` pairs that replace this spec for single layers, in
            the order in which the model runs its attentions; ``None`` leaves the layer in 16 bit.
        method: Name under which reports show this spec.

    Raises:
        TypeError: A number of tokens is not an integer.
        ValueError: An argument is out of its range.
    """

    key: TensorSpec = field(default_factory=TensorSpec)
    value: TensorSpec = field(default_factory=TensorSpec)
    sinks: int = 5
    window: int = 128
    page_size: int = 128
    layers: tuple[tuple[int, CacheSpec | None], ...] = ()
    method: str = "custom"

    def __post_init__(self) -> None:
        _check_integers(sinks=self.sinks, window=self.window, page_size=self.page_size)
        _check(self.sinks >= 0, f"sinks must be 0 or more, got {self.sinks}")
        _check(self.window >= 0, f"window must be 0 or more, got {self.window}")
        _check(
            self.page_size in PAGE_SIZES,
            f"page_size must be one of {PAGE_SIZES}, got {self.page_size}",
        )
        _check(
            (self.key.mixed is None) == (self.value.mixed is None),
            "keys and values must both be in mixed pages, or neither",
        )
        _check(
            self.key.target == 0 or self.key.query_norm > 0,
            f"query_norm must be positive for a target of keys, got {self.key.query_norm}",
        )

    def for_layer(self, layer: int) -> CacheSpec | None:
        """Return the spec of one layer; ``None`` says that it stays in 16 bit."""
        for index, override in self.layers:
            if index == layer:
                return override
        return replace(self, layers=()) if self.layers else self

    def layout(self, role: Role, head_dim: int, shared_by: int = 0) -> PageLayout:
        """Bind this spec to the keys or values of heads of ``head_dim`` channels.

        Where bits depend on attention, keys of which ``shared_by``, the query heads of a KV head, is known also
        hold the last queries.

        Raises:
            ValueError: ``head_dim`` cannot be packed or grouped as the spec says.
        """
        spec = self.key if role == "key" else self.value
        attentive = any(x.mixed and x.attentive for x in (self.key, self.value))
        shared_by = shared_by if attentive and role == "key" else 0
        whole = head_dim if spec.grouping == "token" else self.page_size
        return PageLayout(
            role=role,
            bits=spec.bits,
            grouping=spec.grouping,
            group_size=spec.group_size or whole,
            clip=spec.clip,
            transform=spec.transform,
            sinks=self.sinks,
            window=self.window,
            page_size=self.page_size,
            head_dim=head_dim,
            coder="mixed" if spec.mixed else "codebook" if spec.couple else "uniform",
            params="fp16" if spec.couple else spec.params,
            packing=spec.packing,
            couple=spec.couple or 1,
            rotary=spec.rotary and role == "key",
            tables=spec.tables.digest if spec.tables else NO_TABLES,
            min_bits=spec.mixed[0] if spec.mixed else 0,
            max_bits=spec.mixed[1] if spec.mixed else 0,
            outliers=spec.outliers,
            fit=spec.fit,
            soften=spec.soften,
            attentive=spec.attentive,
            target=float(spec.target),
            query_norm=float(spec.query_norm if role == "key" and spec.target else 0),
            requantize=spec.requantize,
            keep_exact=spec.keep_exact,
            queries=QUERIES if shared_by else 0,
            shared_by=shared_by,
        )


@dataclass(frozen=True)
class PageLayout:
    """Fix the place of every bit of one packed tensor.

    With ``B`` sequences, ``H`` KV heads, ``P`` pages of ``N = page_size`` tokens and ``D = head_dim``::

        codes   int16    [B, H, P, rows, units]   keys: rows are tokens; values: rows are channels
        params  float16  [B, H, P, groups, members, 2]   (scale, zero) of each group; uint8 for fp8
        exact   model's  [B, H, exact_rows, D]    sinks, a ring of the recent tokens, a ring of `queries`
        cursor  int32    [2]                      tokens held, pages packed
        tables  int32    [H, table_words]         what calibration found; only where the spec has tables
        originals  model's  [B, H, P, N, D]       packed tokens as they were, in host memory; only by option
        shift   int32    [B]                      position minus slot of each sequence; only rotary keys

    Where tokens differ in bits (`mixed`) codes have one row, ``params`` are bytes ``[B, H, P, fields, N, 1]``.

    ``groups, members`` is ``D / group_size, N`` when groups lie inside a token, ``N / group_size, D``
    when they lie inside a channel, and ``0, N`` for a codebook. A codebook has one code for ``couple``
    neighbouring channels. A row of ``L`` codes is planar: field ``f`` of unit ``u`` holds the
    code of index ``f * (units of the plane) + u``, so that all fields of a unit shift out into
    contiguous runs. A width that is no power of two is split into planes that lie one after another in
    the row (3 bits: a plane of the low two, a plane of the high one). Trits lie likewise in bytes, of
    which a unit holds two, the first in its low half: digit ``f`` in base 3 of byte ``u`` is the code of
    index ``f * bytes + u``.
    """

    role: Role
    bits: float
    grouping: Grouping
    group_size: int
    clip: float
    transform: Transform
    sinks: int
    window: int
    page_size: int
    head_dim: int
    coder: Coder = "uniform"
    params: Params = "fp16"
    packing: Packing = "fields"
    couple: int = 1
    rotary: bool = False
    tables: str = NO_TABLES
    min_bits: int = 0
    max_bits: int = 0
    outliers: int = 0
    fit: bool = True
    soften: bool = True
    attentive: bool = True
    target: float = 0.0
    query_norm: float = 0.0
    requantize: bool = False
    keep_exact: bool = False
    queries: int = 0
    shared_by: int = 0

    def __post_init__(self) -> None:
        if self.coder == "mixed":
            _ = self.mixed  # which checks itself
            return
        divided = self.head_dim if self.grouping == "token" else self.page_size
        what = "head_dim" if self.grouping == "token" else "page_size"
        _check(
            divided % self.group_size == 0,
            f"{what} must be a multiple of group_size={self.group_size}, got {divided}",
        )
        halves = 2 * self.couple if self.rotary else self.couple
        _check(
            self.head_dim % halves == 0,
            f"head_dim must be a multiple of {halves} for {self.couple} coupled channels, "
            f"got {self.head_dim}",
        )
        _check(
            self.packing == "trits"
            or all(self.row_length * width % UNIT_BITS == 0 for width in self.planes),
            f"head_dim must be a multiple of {self.couple * UNIT_BITS // min(self.planes)} for "
            f"{self.bits:g}-bit {self.role}s, got {self.head_dim}",
        )

    @property
    def mixed(self) -> MixedLayout:
        """The layout of pages whose tokens differ in bits."""
        return MixedLayout(
            self.bits, self.page_size, self.head_dim, self.min_bits, self.max_bits, self.outliers,
            self.params, self.fit, self.soften,
        )  # fmt: skip

    @property
    def bounds(self) -> tuple[float, ...]:
        """Bounds on the weighted error of mixed pages that have a target: see `target_bounds`."""
        return target_bounds(self.role, self.target, self.query_norm, self.head_dim)

    def bound_at(self, end: int) -> float:
        """Return the bound of a mixed page that ends before slot ``end``; 0 where there is no target."""
        return self.bounds[length_class(end)] if self.target else 0.0

    @property
    def planes(self) -> tuple[int, ...]:
        """Widths in bits of the planes that a code is split into, low bits first."""
        bits = 2 if self.bits == 1.5 else int(self.bits)
        return tuple(width for width in (8, 4, 2, 1) if bits & width)

    @property
    def levels(self) -> int:
        """Steps between the lowest and the highest code."""
        return 2 if self.bits == 1.5 else (1 << int(self.bits)) - 1

    @property
    def code_channels(self) -> int:
        """Codes of a token."""
        return self.head_dim // self.couple

    @property
    def rows(self) -> int:
        """Rows of packed units in a page."""
        if self.coder == "mixed":
            return 1
        return self.page_size if self.role == "key" else self.code_channels

    @property
    def row_length(self) -> int:
        """Codes in a row."""
        return self.code_channels if self.role == "key" else self.page_size

    @property
    def row_bytes(self) -> int:
        """Bytes of a row that hold trits."""
        return -(-self.row_length // TRITS)

    @property
    def units(self) -> int:
        """16-bit units in a row."""
        if self.coder == "mixed":
            return self.mixed.units
        if self.packing == "trits":
            return -(-self.row_bytes // 2)
        return self.row_length * sum(self.planes) // UNIT_BITS

    @property
    def params_shape(self) -> tuple[int, int]:
        """``groups, members`` of one page's parameters."""
        if self.coder == "mixed":
            return self.mixed.fields, self.page_size
        if self.coder == "codebook":
            return 0, self.page_size
        if self.grouping == "token":
            return self.head_dim // self.group_size, self.page_size
        return self.page_size // self.group_size, self.head_dim

    @property
    def param_numbers(self) -> int:
        """Numbers of a parameter: scale and zero point, or one byte of a record."""
        return 1 if self.coder == "mixed" else 2

    @property
    def has_byte_params(self) -> bool:
        """Whether parameters are bytes."""
        return self.coder == "mixed" or self.params == "fp8"

    @property
    def about(self) -> str:
        """Codes in words: ``"2-bit"``, ``"4 channels in 8 bits"``."""
        if self.coder == "codebook":
            return f"{self.couple} channels in {self.bits:g} bits"
        if self.coder == "mixed":
            average = f"{self.bits:g} on average"
            if self.target:
                average = f"at most {average}, fewer where they meet target {self.target:g}"
            exact = ", exact copies in host memory" if self.keep_exact else ""
            return f"{self.min_bits} to {self.max_bits} bits ({average}){exact}"
        return f"{self.bits:g}-bit"

    @property
    def has_tables(self) -> bool:
        """Whether calibration tables belong to the tensor."""
        return self.tables != NO_TABLES

    @property
    def ring(self) -> int:
        """Rows of the ring of recent tokens."""
        return self.window + self.page_size

    @property
    def token_rows(self) -> int:
        """Exact rows of tokens: sinks and ring."""
        return self.sinks + self.ring

    @property
    def exact_rows(self) -> int:
        """Exact rows kept: of tokens, and of the last ``queries`` in each of ``shared_by`` query heads."""
        return self.token_rows + self.queries * self.shared_by

    def pages_at(self, length: int) -> int:
        """Return how many pages ``length`` appended tokens have filled."""
        return max(0, (length - self.sinks - self.window) // self.page_size)

    def exact_row(self, token: int) -> int:
        """Return the row of ``exact`` that holds ``token`` while it is not packed."""
        return token if token < self.sinks else self.sinks + (token - self.sinks) % self.ring

    @property
    def token(self) -> str:
        """One-line text form, the inverse of `PageLayout.parse`."""
        return ",".join(str(getattr(self, f.name)) for f in fields(self))

    @staticmethod
    @lru_cache(maxsize=1024)
    def parse(token: str) -> PageLayout:
        """Rebuild a layout from its `token`."""
        values = zip(fields(PageLayout), token.split(","), strict=True)
        return PageLayout(**{f.name: _FROM_TEXT.get(str(f.type), str)(text) for f, text in values})


def _number(text: str) -> int | float:
    return int(text) if text.isdecimal() else float(text)


_FROM_TEXT: dict[str, Callable[[str], Any]] = {  # by type; all others are texts
    "int": int, "float": _number, "bool": lambda text: text == "True"
}  # fmt: skip
