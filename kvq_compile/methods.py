"""The methods by name: each a frozen dataclass of its options, which checks them and gives a `CacheSpec`.

A *calibrated* method gives the spec of one layer from its tables; `kvq_compile.options` puts the layers of a
`Calibration` together. CQ is a family, ``cq-<channels>c<bits>b``. The fields of a method are its options: there is
no other list of them.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, get_args

from kvq_compile.calibration.artifact import LayerTables
from kvq_compile.calibration.fit import EQUALIZE
from kvq_compile.kernels.schemes import (
    WIDTHS,
    Codebook,
    Packing,
    Params,
    Transform,
    Uniform,
    scheme_of,
)
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.kernels.tables import NO_TABLES
from kvq_compile.method_base import Options, check_number, is_number
from kvq_compile.qaq import Qaq
from kvq_compile.transform_coding import Tc, value_options

GroupSize = int | Literal["auto"] | None
Clip = float | Literal["best"]  # "best": of eight, for each group that of the least squared error
CqValues = Literal["codebook", "hadamard"]
SkvqValues = Literal["groups", "hadamard"]
# Options that calibration does not depend on.
AT_COMPILE = ("sinks", "window", "page_size", "packing")
# Bits of SKVQ's codes to the parts of a group's range that they span, of keys and of values: docs/decisions.md.
DEFAULT_CLIPS = {1: (0.85, 0.7), 1.5: (0.85, 0.7), 2: (0.85, 0.75), 3: (0.95, 0.9)}


@dataclass(frozen=True, kw_only=True)
class Int8(Options):
    """Uniform codes, one scale and zero point a token, or ``group_size`` channels of it."""

    bits: ClassVar[int] = 8
    most: ClassVar[int] = 32  # channels of a group that is chosen by the head size

    key_bits: int | None = None
    value_bits: int | None = None
    group_size: GroupSize = None
    clip: Clip = 1.0
    transform: Transform = "none"

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_clip(self.clip)

    def spec(self, tables: LayerTables | None = None) -> CacheSpec:
        """Return the spec."""
        del tables
        return self._cache(self._tensor(self.key_bits), self._tensor(self.value_bits))

    def _tensor(self, width: int | None) -> Uniform:
        group_size, up_to = grouped(self.group_size, self.most)
        return Uniform(
            self.bits if width is None else width,
            group_size=group_size,
            transform=self.transform,
            up_to=up_to,
            **_clip(self.clip),
        )


@dataclass(frozen=True, kw_only=True)
class Int4(Int8):
    """Uniform 4 bit, one scale and zero point a token, or ``group_size`` channels of it."""

    bits: ClassVar[int] = 4


@dataclass(frozen=True, kw_only=True)
class Int3(Int8):
    """Uniform 3 bit, clipped to 0.95 of the range; ``group_size`` channels of a token share a scale."""

    bits: ClassVar[int] = 3

    clip: Clip = 0.95


@dataclass(frozen=True, kw_only=True)
class Int2(Int8):
    """Uniform 2 bit, clipped to 0.9 of the range, groups of 32 channels of a token, or as many as divide the head."""

    bits: ClassVar[int] = 2

    group_size: GroupSize = "auto"
    clip: Clip = 0.9


@dataclass(frozen=True, kw_only=True)
class Kivi(Options):
    """Keys per channel in groups of ``group_size`` tokens, values per token in groups of as many channels.

    ``clip="best"`` tries eight parts of each group's range and takes the one that leaves the least squared error.

    Source: KIVI (arXiv 2402.02750), groups of 32, 128 recent tokens exact; the exact sinks are ours.
    """

    most: ClassVar[int] = 32

    bits: int = 2
    key_bits: int | None = None
    value_bits: int | None = None
    group_size: GroupSize = "auto"
    clip: Clip = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_clip(self.clip)

    def spec(self, tables: LayerTables | None = None) -> CacheSpec:
        """Return the spec."""
        del tables
        size, up_to = grouped(self.group_size, self.most)
        key_bits = self.bits if self.key_bits is None else self.key_bits
        value_bits = self.bits if self.value_bits is None else self.value_bits
        return self._cache(
            Uniform(key_bits, "channel", size, up_to=up_to, **_clip(self.clip)),
            Uniform(value_bits, "token", size, up_to=up_to, **_clip(self.clip)),
        )


@dataclass(frozen=True, kw_only=True)
class Skvq(Options):
    """Clipped groups of channels reordered by calibration, keys before RoPE, fp8 scales and zero points.

    A width of 1.5 is three levels: two bits each in ``packing="fields"``, 1.6 in ``"trits"``. A clip is the part
    of a group's range that its codes span, ``"search"`` finds the one of each group that changes attention's output
    least, ``None`` is the best known: `default_clip`. ``reorder`` gathers channels of like range in a group; it
    changes nothing where a group is a head, or, for keys before RoPE, half a head. Channels are divided by their
    spread to the power ``equalize``, 0 being the paper's choice. ``values="hadamard"``: values are quantized by token
    after a Hadamard transform instead, without a calibration of theirs. ``pre_rope=False`` codes keys as attention
    sees them.

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
    values: SkvqValues = "groups"
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
        if self.values == "hadamard" and self.value_clip == "search":
            raise ValueError(
                'value_clip must be a number or None with values="hadamard", got "search"; '
                "leave it out for the best known one"
            )
        if not (is_number(self.equalize) and 0 <= self.equalize <= 1):
            raise ValueError(
                "equalize must be a number from 0, channels as they are, to 1, equal spread, "
                f"got {self.equalize!r}"
            )
        _check_switches(reorder=self.reorder, pre_rope=self.pre_rope)
        _check_name("values", self.values, get_args(SkvqValues))

    def spec(self, tables: LayerTables | None = None) -> CacheSpec:
        """Return the spec of a layer."""
        of_key, of_value = _digests(tables, values=self.values == "groups")
        assert tables is not None
        key = self._tensor(self.key_bits, tables.rotary, of_key)
        if self.values == "hadamard":
            width = self.bits if self.value_bits is None else self.value_bits
            assert self.value_clip != "search"
            return self._cache(key, hadamard_values(width, self.value_clip), tables)
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
    go together are coupled, instead of neighbours. ``balance``: the channels of a key are coupled so that every index
    has equally much to say, wide channels with narrow ones. ``values="hadamard"``: values are quantized by token
    after a Hadamard transform, in the largest width up to ``bits / couple``, instead of by a codebook.
    ``pre_rope=False`` codes keys as attention sees them.

    Source: CQ (arXiv 2405.03917); its setting is ``correlate=False, window=0, sinks=0``.
    """

    calibrated: ClassVar[bool] = True

    couple: int
    bits: int
    weighted: bool = True
    correlate: bool = True
    balance: bool = False
    values: CqValues = "codebook"
    pre_rope: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_switches(
            weighted=self.weighted,
            correlate=self.correlate,
            balance=self.balance,
            pre_rope=self.pre_rope,
        )
        _check_name("values", self.values, get_args(CqValues))

    def spec(self, tables: LayerTables | None = None) -> CacheSpec:
        """Return the spec of a layer."""
        of_key, of_value = _digests(tables, values=self.values == "codebook")
        assert tables is not None
        key = Codebook(self.bits, self.couple, tables.rotary, of_key)
        if self.values == "hadamard":
            width = largest_width(self.bits / self.couple)
            return self._cache(key, hadamard_values(width), tables)
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
        if tables is None:
            raise ValueError("calibration must have what was chosen for each layer, got none")
        of_key, of_value = (
            NO_TABLES if each is None else each.digest for each in (tables.key, tables.value)
        )
        key = scheme_of(tables.key_options, of_key, tables.rotary)
        return self._cache(key, scheme_of(tables.value_options, of_value, rotary=False), tables)


UNIFORM: dict[str, type[Options]] = {
    "int8": Int8, "int4": Int4, "int3": Int3, "int2": Int2, "kivi": Kivi
}  # fmt: skip
METHODS: dict[str, type[Options]] = UNIFORM | {
    "tc": Tc, "qaq": Qaq, "skvq": Skvq, "cq": Cq, "auto": Auto
}  # fmt: skip
MEASURED = ("tc", "qaq")  # methods that can do without a calibration and gain by one


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


def largest_width(bits: float) -> float:
    """Return the largest width of a uniform code up to ``bits``, at least 1.5."""
    return max(width for width in WIDTHS if width <= max(bits, 1.5))


def hadamard_values(bits: float, clip: float | None = None) -> Uniform:
    """Return values quantized as those of `Tc`; ``clip`` is the best known unless given."""
    return Uniform(**value_options(bits) | ({} if clip is None else {"clip": clip}))


def _check_clip(clip: Clip) -> None:
    if isinstance(clip, str) and clip != "best":
        raise TypeError(f'clip must be a number or "best", got {clip!r}')
    if not isinstance(clip, str):
        check_number("clip", clip)


def _clip(clip: Clip) -> dict[str, Any]:
    """Return the options of `Uniform` that a clip stands for."""
    return {"search": True} if isinstance(clip, str) else {"clip": clip}


def _check_switches(**values: object) -> None:
    for name, value in values.items():
        if not isinstance(value, bool):
            raise ValueError(f"{name} must be True or False, got {value!r}")


def _check_name(name: str, value: object, known: tuple[str, ...]) -> None:
    if value not in known:
        names = " or ".join(f'"{each}"' for each in known)
        raise ValueError(f"{name} must be {names}, got {value!r}")


def _digests(tables: LayerTables | None, values: bool = True) -> tuple[str, str]:
    """Return the digests of the tables of a layer's keys and values; ``values``: whether these need any."""
    if tables is None or tables.key is None or (values and tables.value is None):
        raise ValueError("calibration must have tables for keys and values of each layer, got none")
    return tables.key.digest, NO_TABLES if tables.value is None else tables.value.digest
