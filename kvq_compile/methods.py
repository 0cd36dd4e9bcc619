"""The methods by name: each a small function that returns a `CacheSpec`.

The functions of *calibrated* methods return the spec of one layer from its tables; `make_spec` puts the layers
of a `Calibration` together. CQ is a family, ``cq-<channels>c<bits>b``.
"""

from __future__ import annotations

import difflib
import inspect
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

from kvq_compile.calibration.artifact import Calibration, LayerTables
from kvq_compile.calibration.fit import EQUALIZE
from kvq_compile.kernels.layout import CacheSpec
from kvq_compile.kernels.schemes import (
    Adaptive,
    Codebook,
    Mixed,
    Packing,
    Params,
    Scheme,
    Transform,
    Uniform,
    scheme_of,
)

DEFAULT = "int4"
AT_COMPILE = (
    "sinks",
    "window",
    "page_size",
    "packing",
)  # options that calibration does not depend on
QAQ_RECORDS = {"fp8": 0.196, "fp16": 0.321}  # bits a number of records and headers at 128 channels
QAQ_QUERY_NORM = 300.0  # squared; what QAQ's code takes for every layer of every model
QAQ_KEYS_WIDER = 0.55  # keys get so many bits more than the average, values as many less
# Bits of SKVQ's codes to the parts of a group's range that they span, of keys and of values: docs/decisions.md.
DEFAULT_CLIPS = {1: (0.85, 0.7), 1.5: (0.85, 0.7), 2: (0.85, 0.75), 3: (0.95, 0.9)}
SWITCHES = ("reorder", "weighted", "correlate", "pre_rope")  # of calibrations
CQ = re.compile(r"cq-(\d+)c(\d+)b")


def _uniform(
    bits: int,
    *,
    key_bits: int | None = None,
    value_bits: int | None = None,
    group_size: int | None = None,
    clip: float = 1.0,
    transform: Transform = "none",
    sinks: int = 5,
    window: int = 128,
    page_size: int = 128,
) -> CacheSpec:
    def tensor(width: int | None) -> Uniform:
        return Uniform(bits if width is None else width, "token", group_size, clip, transform)

    return CacheSpec(tensor(key_bits), tensor(value_bits), sinks, window, page_size)


def int8(**options: Any) -> CacheSpec:
    """Uniform 8 bit, one scale and zero point a token (or ``group_size`` channels of it)."""
    return _uniform(8, **options)


def int4(**options: Any) -> CacheSpec:
    """Uniform 4 bit, one scale and zero point a token (or ``group_size`` channels of it)."""
    return _uniform(4, **options)


def int3(**options: Any) -> CacheSpec:
    """Uniform 3 bit, clipped to 0.95 of the range; ``group_size`` channels of a token share a scale."""
    return _uniform(3, **{"clip": 0.95} | options)


def int2(**options: Any) -> CacheSpec:
    """Uniform 2 bit, clipped to 0.9 of the range, groups of 32 channels of a token."""
    return _uniform(2, **{"clip": 0.9, "group_size": 32} | options)


def kivi(
    *,
    bits: int = 2,
    key_bits: int | None = None,
    value_bits: int | None = None,
    group_size: int = 32,
    clip: float = 1.0,
    sinks: int = 5,
    window: int = 128,
    page_size: int = 128,
) -> CacheSpec:
    """Keys per channel in groups of ``group_size`` tokens, values per token in groups of as many channels.

    Source: KIVI (arXiv 2402.02750), groups of 32, 128 recent tokens exact; the exact sinks are ours.
    """
    key = Uniform(bits if key_bits is None else key_bits, "channel", group_size, clip)
    value = Uniform(bits if value_bits is None else value_bits, "token", group_size, clip)
    return CacheSpec(key, value, sinks, window, page_size)


def skvq(
    tables: LayerTables,
    *,
    bits: float = 2,
    key_bits: float | None = None,
    value_bits: float | None = None,
    group_size: int | None = 64,
    key_clip: float | Literal["search"] | None = None,
    value_clip: float | Literal["search"] | None = None,
    reorder: bool = True,
    equalize: float = EQUALIZE,
    pre_rope: bool = True,
    params: Params = "fp8",
    packing: Packing = "fields",
    sinks: int = 5,
    window: int = 128,
    page_size: int = 128,
) -> CacheSpec:
    """Clipped groups of channels reordered by calibration, keys before RoPE, fp8 scales and zero points.

    A width of 1.5 is three levels: two bits each in ``packing="fields"``, 1.6 in ``"trits"``. A clip is the part
    of a group's range that its codes span, ``"search"`` finds the one of each group that changes attention's output
    least, ``None`` is the best known: `default_clip`. ``reorder`` gathers channels of like range in a group; it
    changes nothing where a group is a head, or, for keys before RoPE, half a head. Channels are divided by their
    spread to the power ``equalize``, 0 being the paper's choice. ``pre_rope=False`` codes keys as attention sees them.

    Source: SKVQ (arXiv 2405.06219). Channels are reordered within a head, in equal groups, which is what a
    fused kernel needs; the authors' code clusters across heads (`cross_head`). The clip is about the midpoint.
    """
    del key_clip, value_clip, reorder, equalize, pre_rope  # calibration's

    def tensor(width: float | None, rotary: bool, digest: str) -> Uniform:
        width = bits if width is None else width
        return Uniform(
            width, "token", group_size, params=params, packing=packing if width == 1.5 else "fields",
            rotary=rotary, tables=digest,
        )  # fmt: skip

    of_key, of_value = _digests(tables)
    key, value = tensor(key_bits, tables.rotary, of_key), tensor(value_bits, False, of_value)
    return _with_tables(tables, key, value, sinks, window, page_size)


def qaq(
    *,
    bits: float = 3.0,
    key_bits: float | None = None,
    value_bits: float | None = None,
    max_bits: int | None = None,
    min_bits: int | None = None,
    outliers: int | None = None,
    variant: Literal["fitted", "paper"] = "fitted",
    key_target: float | None = None,
    value_target: float | None = None,
    query_norm: float = QAQ_QUERY_NORM,
    requantize: bool = False,
    keep_exact: Literal["cpu"] | None = None,
    params: Params = "fp16",
    sinks: int = 5,
    window: int = 128,
    page_size: int = 128,
) -> CacheSpec:
    """Bits by token, more for those of wide range and for those that the last five queries attended to.

    They are ``bits`` on average.

    A page of tokens has a budget; its bits go where they lower the largest weighted error most. ``bits`` counts
    codes and records of heads of 128 channels; ``key_bits`` and ``value_bits`` count codes alone.
    ``variant="fitted"`` weighs attention softly, for keys too, and keeps each token's product with itself;
    ``"paper"`` does neither and keeps one number at each end exact. ``params="fp8"`` saves an eighth of a bit, for
    models whose keys and values stay below 448: larger numbers would be cut off.

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
    paper = variant == "paper"
    if variant not in ("fitted", "paper"):
        raise ValueError(f'variant must be "fitted" or "paper", got {variant!r}')
    if params not in QAQ_RECORDS:
        raise ValueError(f'params must be "fp16" or "fp8", got {params!r}')
    numbers = {"key_target": key_target, "value_target": value_target, "query_norm": query_norm}
    for name, number in numbers.items():
        if number is not None and not 0 < number < math.inf:
            raise ValueError(f"{name} must be a positive number, got {number!r}")
    if not isinstance(requantize, bool):
        raise TypeError(f"requantize must be a bool, got {requantize!r}")
    if keep_exact not in (None, "cpu"):
        raise ValueError(f'keep_exact must be "cpu" or None, got {keep_exact!r}')
    if requantize and key_target is None and value_target is None and keep_exact is None:
        raise ValueError(
            "requantize must go with error targets, got none: a page keeps its budget, so that taking bits "
            'away would gain nothing; give key_target or value_target, or keep_exact="cpu"'
        )
    outliers = (2 if paper else 0) if outliers is None else outliers
    least = (0 if paper else 1) if min_bits is None else min_bits
    most = (4 if bits <= 3.25 else 6) if max_bits is None else max_bits
    codes = bits - QAQ_RECORDS[params] - 24 * outliers / 128
    wide = QAQ_KEYS_WIDER
    keys = _rows(codes + wide, page_size) if key_bits is None else key_bits
    values = _rows(codes - wide, page_size) if value_bits is None else value_bits

    def tensor(budget: float, attentive: bool, target: float | None, norm: float) -> Mixed:
        exact = keep_exact is not None and attentive
        adaptive = None
        if target is not None:
            adaptive = Adaptive(float(target), norm, requantize, exact)
        elif exact:
            adaptive = Adaptive(keep_exact=True)
        return Mixed(
            budget, least, most, outliers, params, fit=not paper,
            soften=not paper and target is None, attentive=attentive, adaptive=adaptive,
        )  # fmt: skip

    key = tensor(keys, not paper and key_target is None, key_target, float(query_norm))
    return CacheSpec(key, tensor(values, True, value_target, 0.0), sinks, window, page_size)


def _measured_qaq(tables: LayerTables, **options: Any) -> CacheSpec:
    """`qaq` with the query norm that was measured."""
    return qaq(query_norm=max(tables.query_norms), **options)


def _rows(budget: float, page_size: int) -> float:
    """Return the largest budget not above ``budget`` that makes whole rows of a page."""
    return int(budget * page_size) / page_size


def check_calibrated(options: Mapping[str, Any]) -> None:
    """Make sure that what only the calibration of a method depends on can be fitted.

    Raises:
        ValueError: A clip or ``equalize`` is out of range, or a switch is neither on nor off.
    """
    for name in sorted({"key_clip", "value_clip"} & set(options)):
        clip = options[name]
        if clip not in (None, "search") and not (_is_number(clip) and 0 < clip <= 1):
            raise ValueError(f'{name} must be a number in (0, 1], "search" or None, got {clip!r}')
    equalize = options.get("equalize", EQUALIZE)
    if not (_is_number(equalize) and 0 <= equalize <= 1):
        raise ValueError(
            f"equalize must be a number from 0, channels as they are, to 1, equal spread, got {equalize!r}"
        )
    for name in SWITCHES:
        if not isinstance(options.get(name, True), bool):
            raise ValueError(f"{name} must be True or False, got {options[name]!r}")


def _is_number(x: Any) -> bool:
    return isinstance(x, (int, float)) and not isinstance(x, bool)


def default_clip(role: str, bits: float) -> float:
    """Return the part of a group's range that pays best: the less, the fewer the codes."""
    key, value = DEFAULT_CLIPS.get(bits, (1.0, 1.0))
    return key if role == "key" else value


def cq(
    tables: LayerTables,
    *,
    couple: int,
    bits: int,
    weighted: bool = True,
    correlate: bool = True,
    pre_rope: bool = True,
    sinks: int = 5,
    window: int = 128,
    page_size: int = 128,
) -> CacheSpec:
    """``couple`` channels of a head coded by one index into a learned codebook, keys before RoPE.

    ``weighted``: centroids are fitted to samples weighted by Fisher information. ``correlate``: channels that
    go together are coupled, instead of neighbours. ``pre_rope=False`` codes keys as attention sees them.

    Source: CQ (arXiv 2405.03917); its setting is ``correlate=False, window=0, sinks=0``.
    """
    del weighted, correlate, pre_rope  # calibration's
    of_key, of_value = _digests(tables)
    key = Codebook(bits, couple, tables.rotary, of_key)
    value = Codebook(bits, couple, tables=of_value)
    return _with_tables(tables, key, value, sinks, window, page_size)


def auto(
    tables: LayerTables,
    *,
    bits: float = 3.0,
    sinks: int = 5,
    window: int = 128,
    page_size: int = 128,
) -> CacheSpec:
    """Layers and tensors coded as `choose` found best for ``bits`` on average, parameters included."""
    del bits  # calibration's
    of_key, of_value = _digests(tables)
    key = scheme_of(tables.key_options, of_key, tables.rotary)
    value = scheme_of(tables.value_options, of_value, rotary=False)
    return _with_tables(tables, key, value, sinks, window, page_size)


def _digests(tables: LayerTables) -> tuple[str, str]:
    """Return the digests of the tables of a layer's keys and values."""
    assert tables.key is not None and tables.value is not None  # measured for QAQ alone
    return tables.key.digest, tables.value.digest


def _with_tables(
    tables: LayerTables, key: Scheme, value: Scheme, sinks: int, window: int, page_size: int
) -> CacheSpec:
    return CacheSpec(
        *(key, value, sinks, window, page_size),
        key_tables=tables.key,
        value_tables=tables.value,
    )


UNIFORM: dict[str, Callable[..., CacheSpec]] = {
    function.__name__: function for function in (int8, int4, int3, int2, kivi)
}
METHODS: dict[str, Callable[..., CacheSpec]] = UNIFORM | {"qaq": qaq}
CALIBRATED: dict[str, Callable[..., CacheSpec]] = {"skvq": skvq, "cq": cq, "auto": auto}
FROM_LAYER: dict[str, Callable[..., CacheSpec]] = CALIBRATED | {
    "qaq": _measured_qaq
}  # which can do without


def make_spec(
    method: str | None = None,
    *,
    layers: Mapping[int, Any] | None = None,
    calibration: str | Path | Calibration | None = None,
    **options: Any,
) -> CacheSpec:
    """Return the `CacheSpec` of a method.

    Args:
        method: A name in `METHODS`, or a calibrated method's; the default is that of the calibration, or int4.
        layers: What single layers get instead, by number: a method's name, a dictionary with
            ``"method"`` and its options, or ``None`` for 16 bit.
        calibration: What `calibrate` returned, or the file it was saved to.
        **options: The method's options; see its function. Of a calibrated method, options that calibration
            depends on may be left out, and must be as it was calibrated if they are not.

    Raises:
        ValueError: The name, an option or a value is unknown or out of range, or the calibration is of
            another method or of other options.
        TypeError: A value has the wrong type.
        FileNotFoundError: There is no such calibration.
    """
    if calibration is not None:
        spec = _calibrated_spec(method, as_calibration(calibration), options)
        return replace(
            spec, layers=_merge(spec.layers, _overrides({} if layers is None else layers))
        )
    method = DEFAULT if method is None else method
    check_method(method, options)
    if base_name(method) in CALIBRATED:
        raise ValueError(
            f"calibration must be given for {method}; make one with kvq_compile.calibrate or `kvq calibrate`"
        )
    spec = METHODS[method](**options)
    return replace(spec, method=method, layers=_overrides({} if layers is None else layers))


def as_calibration(calibration: str | Path | Calibration) -> Calibration:
    """Return a calibration, loading it if it is a file's name.

    Raises:
        TypeError: It is neither.
    """
    if isinstance(calibration, (str, Path)):
        return Calibration.load(calibration)
    if not isinstance(calibration, Calibration):
        raise TypeError(f"calibration must be a Calibration or a file, got {calibration!r}")
    return calibration


def base_name(method: str) -> str:
    """Return the name of a method's function: ``"cq"`` for ``"cq-4c8b"``."""
    return "cq" if CQ.fullmatch(method) else method


def preset(method: str) -> dict[str, Any]:
    """Return the options that a method's name stands for."""
    match = CQ.fullmatch(method)
    return {"couple": int(match[1]), "bits": int(match[2])} if match else {}


def check_method(method: Any, options: Iterable[str]) -> None:
    """Make sure that a method and its options are known.

    Raises:
        TypeError: ``method`` is no name.
        ValueError: It, or an option, is unknown.
    """
    if not isinstance(method, str):
        raise TypeError(f"method must be a name, got {method!r}")
    names = (*METHODS, "skvq", "cq-4c8b", "auto")
    if (base_name(method) not in METHODS and base_name(method) not in CALIBRATED) or method == "cq":
        raise ValueError(
            f"method must be one of {', '.join(names)} (or any cq-<c>c<b>b), got {method!r}{nearest(method, names)}"
        )
    known = method_options(method)
    for name in options:
        if name not in known:
            raise ValueError(
                f"options of {method} must be among {', '.join(known)}, got {name!r}{nearest(name, known)}"
            )


def method_options(method: str) -> tuple[str, ...]:
    """Return the names of a method's options."""
    name = base_name(method)
    if name in CALIBRATED:
        function, fixed = CALIBRATED[name], preset(method)
    else:
        function = _uniform if METHODS[name] in (int8, int4, int3, int2) else METHODS[name]
        fixed = {}
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.name not in fixed)


def calibrated_options(method: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Return all options of a calibrated method that calibration depends on, defaults filled in.

    What is measured for QAQ depends on none: its options are defaults for compiling.
    """
    if base_name(method) not in CALIBRATED:
        return dict(options)
    parameters = inspect.signature(CALIBRATED[base_name(method)]).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}
    every = defaults | preset(method) | dict(options)
    return {name: value for name, value in every.items() if name not in AT_COMPILE}


def _calibrated_spec(
    method: str | None, calibration: Calibration, options: dict[str, Any]
) -> CacheSpec:
    """Return the spec of a calibration, a layer's spec for each of its layers."""
    if method is not None and method != calibration.method:
        raise ValueError(
            f"calibration must be of method {method}, got one of {calibration.method}; calibrate for {method}"
        )
    method = calibration.method
    check_method(method, options)
    if "query_norm" in options:
        raise ValueError(
            f"query_norm must be left out beside a calibration, which measured it, got {options['query_norm']!r}"
        )
    fixed = options if base_name(method) in CALIBRATED else {}
    for name, value in fixed.items():
        if name not in AT_COMPILE and calibration.options.get(name) != value:
            raise ValueError(
                f"{name} must be as calibrated, {calibration.options.get(name)!r}, got {value!r}; "
                "calibrate anew for other options"
            )
    every = calibration.options | options
    specs = [FROM_LAYER[base_name(method)](tables, **every) for tables in calibration.layers]
    named = [replace(spec, method=method) for spec in specs]
    return replace(named[0], layers=tuple(enumerate(named)))


def _merge(
    layers: tuple[tuple[int, CacheSpec | None], ...],
    overrides: tuple[tuple[int, CacheSpec | None], ...],
) -> tuple[tuple[int, CacheSpec | None], ...]:
    return tuple(sorted((dict(layers) | dict(overrides)).items()))


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"``, or nothing where no known name is like ``name``."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _overrides(layers: Mapping[int, Any]) -> tuple[tuple[int, CacheSpec | None], ...]:
    if not isinstance(layers, Mapping):
        raise TypeError(f"layers must be a dictionary, got {layers!r}")
    for index in layers:
        if not isinstance(index, int) or index < 0:
            raise ValueError(f"layers must be numbered from 0, got {index!r}")
    return tuple((index, _override(choice)) for index, choice in sorted(layers.items()))


def _override(choice: Any) -> CacheSpec | None:
    if choice is None:
        return None
    if isinstance(choice, str):
        return make_spec(choice)
    if isinstance(choice, Mapping) and "layers" not in choice:
        return make_spec(**choice)
    raise ValueError(f"layers must map numbers to a method, its options or None, got {choice!r}")
