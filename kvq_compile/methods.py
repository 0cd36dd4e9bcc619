"""The methods by name: each a frozen dataclass of its options, which checks them and gives a `CacheSpec`.

A *calibrated* method gives the spec of one layer from its tables; `kvq_compile.options` puts the layers of a
`Calibration` together. CQ is a family, ``cq-<channels>c<bits>b``. The fields of a method are its options: there is
no other list of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal

from kvq_compile.calibration.artifact import LayerTables
from kvq_compile.calibration.fit import EQUALIZE
from kvq_compile.kernels.channelwise_scheme import MAX_WIDTH, Pairs
from kvq_compile.kernels.layout import Regions
from kvq_compile.kernels.schemes import (
    WIDTHS,
    Adaptive,
    Channelwise,
    Codebook,
    Mixed,
    Packing,
    Params,
    Scheme,
    Transform,
    Uniform,
    scheme_of,
)
from kvq_compile.kernels.spec import CacheSpec

GroupSize = int | Literal["auto"] | None
# Options that calibration does not depend on.
AT_COMPILE = ("sinks", "window", "page_size", "packing")
TC_CLIPS = {1: 0.7, 1.5: 0.78, 2: 0.88, 3: 0.96}  # parts of a value's range that its codes span
QAQ_RECORDS = {
    "fp8": 0.196,
    "fp16": 0.321,
}  # bits an element of records and headers at 128 channels
QAQ_QUERY_NORM = 300.0  # squared; what QAQ's code takes for every layer of every model
QAQ_KEYS_WIDER = 0.55  # keys get so many bits more than the average, values as many less
# Bits of SKVQ's codes to the parts of a group's range that they span, of keys and of values: docs/decisions.md.
DEFAULT_CLIPS = {1: (0.85, 0.7), 1.5: (0.85, 0.7), 2: (0.85, 0.75), 3: (0.95, 0.9)}


@dataclass(frozen=True, kw_only=True)
class Options:
    """What every method takes: the regions of exact tokens, and how many tokens are quantized at once.

    Args:
        sinks: First tokens that stay exact for ever.
        window: Most recent tokens that are always exact.
        page_size: Tokens quantized at once: 32, 64, 128 or 256.
    """

    calibrated: ClassVar[bool] = False  # whether there is no spec without tables

    sinks: int = 5
    window: int = 128
    page_size: int = 128

    def __post_init__(self) -> None:
        _ = Regions(self.sinks, self.window, self.page_size)  # which checks itself

    def spec(self, tables: LayerTables | None = None) -> CacheSpec:
        """Return the spec of a cache, or of the layer that ``tables`` belong to.

        Raises:
            TypeError: An option has the wrong type.
            ValueError: An option is out of its range, or options do not go together.
        """
        raise NotImplementedError

    def _cache(self, key: Scheme, value: Scheme, tables: LayerTables | None = None) -> CacheSpec:
        return CacheSpec(
            *(key, value, self.sinks, self.window, self.page_size),
            key_tables=None if tables is None else tables.key,
            value_tables=None if tables is None else tables.value,
        )


@dataclass(frozen=True, kw_only=True)
class Int8(Options):
    """Uniform codes, one scale and zero point a token, or ``group_size`` channels of it."""

    bits: ClassVar[int] = 8
    most: ClassVar[int] = 32  # channels of a group that is chosen by the head size

    key_bits: int | None = None
    value_bits: int | None = None
    group_size: GroupSize = None
    clip: float = 1.0
    transform: Transform = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("clip", self.clip)

    def spec(self, tables: LayerTables | None = None) -> CacheSpec:
        """Return the spec."""
        del tables
        return self._cache(self._tensor(self.key_bits), self._tensor(self.value_bits))

    def _tensor(self, width: int | None) -> Uniform:
        group_size, up_to = grouped(self.group_size, self.most)
        return Uniform(
            self.bits if width is None else width,
            group_size=group_size,
            clip=self.clip,
            transform=self.transform,
            up_to=up_to,
        )


@dataclass(frozen=True, kw_only=True)
class Int4(Int8):
    """Uniform 4 bit, one scale and zero point a token, or ``group_size`` channels of it."""

    bits: ClassVar[int] = 4


@dataclass(frozen=True, kw_only=True)
class Int3(Int8):
    """Uniform 3 bit, clipped to 0.95 of the range; ``group_size`` channels of a token share a scale."""

    bits: ClassVar[int] = 3

    clip: float = 0.95


@dataclass(frozen=True, kw_only=True)
class Int2(Int8):
    """Uniform 2 bit, clipped to 0.9 of the range, groups of 32 channels of a token, or as many as divide the head."""

    bits: ClassVar[int] = 2

    group_size: GroupSize = "auto"
    clip: float = 0.9


@dataclass(frozen=True, kw_only=True)
class Kivi(Options):
    """Keys per channel in groups of ``group_size`` tokens, values per token in groups of as many channels.

    Source: KIVI (arXiv 2402.02750), groups of 32, 128 recent tokens exact; the exact sinks are ours.
    """

    most: ClassVar[int] = 32

    bits: int = 2
    key_bits: int | None = None
    value_bits: int | None = None
    group_size: GroupSize = "auto"
    clip: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("clip", self.clip)

    def spec(self, tables: LayerTables | None = None) -> CacheSpec:
        """Return the spec."""
        del tables
        size, up_to = grouped(self.group_size, self.most)
        key_bits = self.bits if self.key_bits is None else self.key_bits
        value_bits = self.bits if self.value_bits is None else self.value_bits
        return self._cache(
            Uniform(key_bits, "channel", size, self.clip, up_to=up_to),
            Uniform(value_bits, "token", size, self.clip, up_to=up_to),
        )


@dataclass(frozen=True, kw_only=True)
class Tc(Options):
    """Transform coding: keys by channel, each with bits of its own; values by token after a Hadamard transform.

    A cache finds the bits of its channels from its first page and the last queries; no calibration is needed.
    Values get the largest width up to ``bits`` and keys what is left of ``2 * bits``, unless ``key_bits`` or
    ``value_bits`` say otherwise. ``pairs`` says which channels of a key the rotary embedding mixes: ``"halves"`` as
    in Llama, ``"neighbours"`` as in GPT-J, ``"none"``.
    """

    bits: float = 4.0
    key_bits: float | None = None
    value_bits: float | None = None
    value_clip: float | None = None
    pairs: Pairs = "halves"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("bits", "key_bits", "value_bits", "value_clip"):
            number = getattr(self, name)
            if name == "bits" or number is not None:
                check_number(name, number)
        if not 1 <= self.bits <= 8:
            raise ValueError(f"bits must be from 1 to 8, got {self.bits}")

    def spec(self, tables: LayerTables | None = None) -> CacheSpec:
        """Return the spec."""
        del tables
        value_bits = self.value_bits
        if value_bits is None:
            value_bits = max(width for width in WIDTHS if width <= max(self.bits, 1.5))
            value_bits = value_bits if 2 * self.bits - value_bits <= MAX_WIDTH else 8
        key_bits = 2 * self.bits - value_bits if self.key_bits is None else self.key_bits
        clip = TC_CLIPS.get(value_bits, 1.0) if self.value_clip is None else self.value_clip
        value = Uniform(
            value_bits, clip=clip, transform="hadamard", params="e5m3",
            packing="trits" if value_bits == 1.5 else "fields",
        )  # fmt: skip
        return self._cache(Channelwise(float(key_bits), self.pairs), value)


@dataclass(frozen=True, kw_only=True)
class Skvq(Options):
    """Clipped groups of channels reordered by calibration, keys before RoPE, fp8 scales and zero points.

    A width of 1.5 is three levels: two bits each in ``packing="fields"``, 1.6 in ``"trits"``. A clip is the part
    of a group's range that its codes span, ``"search"`` finds the one of each group that changes attention's output
    least, ``None`` is the best known: `default_clip`. ``reorder`` gathers channels of like range in a group; it
    changes nothing where a group is a head, or, for keys before RoPE, half a head. Channels are divided by their
    spread to the power ``equalize``, 0 being the paper's choice. ``pre_rope=False`` codes keys as attention sees them.

    Source: SKVQ (arXiv 2405.06219). Channels are reordered within a head, in equal groups, which is what a
    fused kernel needs; the authors' code clusters across heads (`cross_head`). The clip is about the midpoint.
    """

    calibrated: ClassVar[bool] = True
    most: ClassVar[int] = 64

    bits: float = 2
    key_bits: float | None = None
    value_bits: float | None = None
    group_size: GroupSize = "auto"
    key_clip: float | Literal["search"] | None = None
    value_clip: float | Literal["search"] | None = None
    reorder: bool = True
    equalize: float = EQUALIZE
    pre_rope: bool = True
    params: Params = "fp8"
    packing: Packing = "fields"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("key_clip", "value_clip"):
            clip = getattr(self, name)
            if clip not in (None, "search") and not (is_number(clip) and 0 < clip <= 1):
                raise ValueError(
                    f'{name} must be a number in (0, 1], "search" or None, got {clip!r}'
                )
        if not (is_number(self.equalize) and 0 <= self.equalize <= 1):
            raise ValueError(
                "equalize must be a number from 0, channels as they are, to 1, equal spread, "
                f"got {self.equalize!r}"
            )
        _check_switches(reorder=self.reorder, pre_rope=self.pre_rope)

    def spec(self, tables: LayerTables | None = None) -> CacheSpec:
        """Return the spec of a layer."""
        of_key, of_value = _digests(tables)
        assert tables is not None
        key = self._tensor(self.key_bits, tables.rotary, of_key)
        return self._cache(key, self._tensor(self.value_bits, False, of_value), tables)

    def _tensor(self, width: float | None, rotary: bool, digest: str) -> Uniform:
        width = self.bits if width is None else width
        group_size, up_to = grouped(self.group_size, self.most)
        return Uniform(
            width,
            group_size=group_size,
            params=self.params,
            packing=self.packing if width == 1.5 else "fields",
            rotary=rotary,
            tables=digest,
            up_to=up_to,
        )


@dataclass(frozen=True, kw_only=True)
class Cq(Options):
    """``couple`` channels of a head coded by one index into a learned codebook, keys before RoPE.

    ``weighted``: centroids are fitted to samples weighted by Fisher information. ``correlate``: channels that
    go together are coupled, instead of neighbours. ``pre_rope=False`` codes keys as attention sees them.

    Source: CQ (arXiv 2405.03917); its setting is ``correlate=False, window=0, sinks=0``.
    """

    calibrated: ClassVar[bool] = True

    couple: int
    bits: int
    weighted: bool = True
    correlate: bool = True
    pre_rope: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_switches(weighted=self.weighted, correlate=self.correlate, pre_rope=self.pre_rope)

    def spec(self, tables: LayerTables | None = None) -> CacheSpec:
        """Return the spec of a layer."""
        of_key, of_value = _digests(tables)
        assert tables is not None
        key = Codebook(self.bits, self.couple, tables.rotary, of_key)
        return self._cache(key, Codebook(self.bits, self.couple, tables=of_value), tables)


@dataclass(frozen=True, kw_only=True)
class Auto(Options):
    """Layers and tensors quantized as `choose` found best for ``bits`` on average, parameters included."""

    calibrated: ClassVar[bool] = True

    bits: float = 3.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("bits", self.bits)

    def spec(self, tables: LayerTables | None = None) -> CacheSpec:
        """Return the spec of a layer."""
        of_key, of_value = _digests(tables)
        assert tables is not None
        key = scheme_of(tables.key_options, of_key, tables.rotary)
        return self._cache(key, scheme_of(tables.value_options, of_value, rotary=False), tables)


@dataclass(frozen=True, kw_only=True)
class Qaq(Options):
    """Bits by token, more for those of wide range and for those that the last five queries attended to.

    They are ``bits`` on average.

    A page of tokens has a budget; its bits go where they lower the largest weighted error most. ``bits`` counts
    codes and metadata of heads of 128 channels; ``key_bits`` and ``value_bits`` count codes alone.
    ``variant="fitted"`` weighs attention softly, for keys too, and keeps each token's product with itself;
    ``"paper"`` does neither and keeps one element at each end exact. ``params="fp8"`` saves an eighth of a bit, for
    models whose keys and values stay below 448: larger elements would be cut off.

    Targets are the standard deviations of an attention weight (``key_target``) and of attention's output
    (``value_target``) that are good enough. Tokens get the bits that meet them, weighed as in the paper: values by
    attention as it is, keys not at all. The budget stays the cap, and what is held; less of it is used and read.
    The target of keys takes ``query_norm``, the squared norm that one query of ten exceeds: 300 as in the code of
    the paper, or what `calibrate` measured, of each layer the largest of its heads.

    ``requantize=True``: whenever a page fills, tokens of older pages lose the bits that their target needs no more
    now that attention has moved on, in place. It needs a target: a budget would gain nothing.
    ``keep_exact="cpu"`` holds packed tokens whose bits depend on attention exactly in host memory, as in the paper,
    and quantizes a page anew, within its budget, when a token of it would gain bits. Only of caches that grow.

    Source: QAQ (arXiv 2403.04643), with its per-head level.
    """

    bits: float = 3.0
    key_bits: float | None = None
    value_bits: float | None = None
    max_bits: int | None = None
    min_bits: int | None = None
    outliers: int | None = None
    variant: Literal["fitted", "paper"] = "fitted"
    key_target: float | None = None
    value_target: float | None = None
    query_norm: float = QAQ_QUERY_NORM
    requantize: bool = False
    keep_exact: Literal["cpu"] | None = None
    params: Params = "fp16"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.variant not in ("fitted", "paper"):
            raise ValueError(f'variant must be "fitted" or "paper", got {self.variant!r}')
        if self.params not in QAQ_RECORDS:
            raise ValueError(f'params must be "fp16" or "fp8", got {self.params!r}')
        for name in ("key_target", "value_target", "query_norm"):
            number = getattr(self, name)
            if number is not None and not (is_number(number) and 0 < number < math.inf):
                raise ValueError(f"{name} must be a positive number, got {number!r}")
        if not isinstance(self.requantize, bool):
            raise TypeError(f"requantize must be a bool, got {self.requantize!r}")
        if self.keep_exact not in (None, "cpu"):
            raise ValueError(f'keep_exact must be "cpu" or None, got {self.keep_exact!r}')
        targets = self.key_target, self.value_target, self.keep_exact
        if self.requantize and targets == (None, None, None):
            raise ValueError(
                "requantize must go with error targets, got none: a page keeps its budget, so that taking bits "
                'away would gain nothing; give key_target or value_target, or keep_exact="cpu"'
            )
        for name in ("max_bits", "min_bits", "outliers"):
            number = getattr(self, name)
            if number is not None and (not isinstance(number, int) or isinstance(number, bool)):
                raise TypeError(f"{name} must be an integer, got {number!r}")
        self._check_budgets()

    def _check_budgets(self) -> None:
        """Make sure that the bits of keys and values lie between those of the least and the most of a token."""
        check_number("bits", self.bits)
        least, most = self._range()
        if not 0 <= least < most <= 8:
            raise ValueError(
                f"min_bits and max_bits must be two ascending numbers of 0 to 8, got {least} and {most}"
            )
        for name in ("key_bits", "value_bits"):
            budget = getattr(self, name)
            if budget is None:
                continue
            check_number(name, budget)
            if not (least <= budget <= most and budget > 0):
                raise ValueError(
                    f"{name} must be from min_bits={least} to max_bits={most} and positive, got {budget}"
                )
        low, high = -99.0, 99.0  # of the codes' share, where keys and values follow from it
        if self.value_bits is None:
            low = max(least, 1 / self.page_size) + QAQ_KEYS_WIDER
        if self.key_bits is None:
            high = most - QAQ_KEYS_WIDER
        if not low <= self.bits - self._records() <= high:
            raise ValueError(
                f"bits must be from {math.ceil(100 * (low + self._records())) / 100:g} to "
                f"{math.floor(100 * (high + self._records())) / 100:g} with min_bits={least} and "
                f"max_bits={most}, got {self.bits}; give other min_bits or max_bits, or another method"
            )

    def _range(self) -> tuple[int, int]:
        """Return the least and the most bits of a token."""
        least = (0 if self.variant == "paper" else 1) if self.min_bits is None else self.min_bits
        most = (4 if self.bits <= 3.25 else 6) if self.max_bits is None else self.max_bits
        return least, most

    def _outliers(self) -> int:
        return (2 if self.variant == "paper" else 0) if self.outliers is None else self.outliers

    def _records(self) -> float:
        """Return the bits an element that are not codes."""
        return QAQ_RECORDS[self.params] + 24 * self._outliers() / 128

    def spec(self, tables: LayerTables | None = None) -> CacheSpec:
        """Return the spec; with ``tables``, for the query norm that was measured."""
        norm = max(tables.query_norms) if tables is not None else self.query_norm
        codes = self.bits - self._records()
        keys, values = (
            int(budget * self.page_size) / self.page_size
            if given is None
            else given  # whole rows of a page
            for budget, given in (
                (codes + QAQ_KEYS_WIDER, self.key_bits),
                (codes - QAQ_KEYS_WIDER, self.value_bits),
            )
        )
        by_attention = self.variant != "paper" and self.key_target is None
        key = self._tensor(keys, by_attention, self.key_target, float(norm))
        return self._cache(key, self._tensor(values, True, self.value_target, 0.0))

    def _tensor(self, budget: float, attentive: bool, target: float | None, norm: float) -> Mixed:
        exact = self.keep_exact is not None and attentive
        adaptive = None
        if target is not None:
            adaptive = Adaptive(float(target), norm, self.requantize, exact)
        elif exact:
            adaptive = Adaptive(keep_exact=True)
        least, most = self._range()
        fitted = self.variant != "paper"
        return Mixed(
            budget, least, most, self._outliers(), self.params, fit=fitted,
            soften=fitted and target is None, attentive=attentive, adaptive=adaptive,
        )  # fmt: skip


UNIFORM: dict[str, type[Options]] = {
    "int8": Int8, "int4": Int4, "int3": Int3, "int2": Int2, "kivi": Kivi
}  # fmt: skip
METHODS: dict[str, type[Options]] = UNIFORM | {
    "tc": Tc, "qaq": Qaq, "skvq": Skvq, "cq": Cq, "auto": Auto
}  # fmt: skip
MEASURED = ("qaq",)  # methods that can do without a calibration and gain by one


def option_names(method: type[Options]) -> tuple[str, ...]:
    """Return the names of a method's options, those of every method last."""
    shared = [field.name for field in fields(Options)]
    own = [field.name for field in fields(method) if field.name not in shared]
    return (*own, *shared)


def calibration_options(options: Options) -> dict[str, Any]:
    """Return all options of a method that calibration depends on."""
    return {
        name: getattr(options, name)
        for name in option_names(type(options))
        if name not in AT_COMPILE
    }


def grouped(group_size: GroupSize, most: int) -> tuple[int | None, bool]:
    """Return what a group size is to `Uniform`: a size, and whether it is the most that a group may have.

    Raises:
        ValueError: It is neither a size, nor ``None``, nor ``"auto"``.
    """
    if group_size == "auto":
        return most, True
    if isinstance(group_size, str):
        raise ValueError(
            f'group_size must be a number of channels, None or "auto", got {group_size!r}'
        )
    return group_size, False


def default_clip(role: str, bits: float) -> float:
    """Return the part of a group's range that pays best: the less, the fewer the codes."""
    key, value = DEFAULT_CLIPS.get(bits, (1.0, 1.0))
    return key if role == "key" else value


def is_number(x: Any) -> bool:
    """Return whether ``x`` is an integer or a float, and no bool."""
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def check_number(name: str, x: Any) -> None:
    """Make sure that an option is a finite number.

    Raises:
        TypeError: It is no number.
        ValueError: It is not finite.
    """
    if not is_number(x):
        raise TypeError(f"{name} must be a number, got {x!r}")
    if not math.isfinite(x):
        raise ValueError(f"{name} must be finite, got {x!r}")


def _check_switches(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")


def _digests(tables: LayerTables | None) -> tuple[str, str]:
    """Return the digests of the tables of a layer's keys and values."""
    if tables is None or tables.key is None or tables.value is None:
        raise ValueError("calibration must have tables for keys and values of each layer, got none")
    return tables.key.digest, tables.value.digest
