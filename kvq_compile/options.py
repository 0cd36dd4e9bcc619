"""Turn the ``options`` of ``torch.compile`` into a `Config`, and a method's into a `CacheSpec`, checking each once."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from kvq_compile.calibration.artifact import Calibration
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.method_base import Options
from kvq_compile.methods import AT_COMPILE, METHODS, option_names

DEFAULT: tuple[str, Mapping[str, Any]] = ("tc", {"bits": 4})  # where no method is named
INNER = ("inductor", "eager", "aot_eager")
MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
LAUNCHED = ("default", "max-autotune-no-cudagraphs")  # modes whose steps are not replayed on a GPU
OWN_OPTIONS = ("layers", "strict", "mode", "inner", "inductor")
CQ = re.compile(r"cq-(\d+)c(\d+)b")
NAMES = (
    *(name for name in METHODS if name != "cq"),
    "cq-4c8b",
)  # "cq" alone does not say its sizes


@dataclass(frozen=True)
class Config:
    """What a compilation was asked for.

    Attributes:
        spec: How caches are quantized.
        strict: Whether an attention that keeps a cache and cannot be rewritten is an error.
        inner: Compiler of the rewritten graph.
        inductor: Settings handed on to Inductor.
        calibration: What the spec was made from, if it was.
        mode: As for ``torch.compile``, which refuses it beside ``options``. ``None``, where it is not given, replays
            steps on a GPU as ``"reduce-overhead"`` does, but for those that wait for other processes, and leaves all
            other graphs as they are.
    """

    spec: CacheSpec
    strict: bool = False
    inner: str = "inductor"
    inductor: Mapping[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None
    mode: str | None = None

    @property
    def records(self) -> bool:
        """Whether steps of a decoding loop are recorded as CUDA graphs where that is possible."""
        return self.mode not in LAUNCHED and bool(self.inductor.get("triton.cudagraphs", True))

    @property
    def records_collectives(self) -> bool:
        """Whether those steps are, too, that wait for other processes."""
        return self.records and self.mode is not None


def make_config(options: Mapping[str, Any] | None = None) -> Config:
    """Return the `Config` of ``options``.

    Args:
        options: ``method`` and its options, ``calibration``, ``layers``, ``strict``, ``mode``, ``inner``, ``inductor``.

    Raises:
        ValueError: An option is unknown or out of range; the message names the nearest one.
        TypeError: An option has the wrong type.
    """
    rest = dict(options or {})
    strict, inner, inductor, mode = (
        rest.pop("strict", False),
        rest.pop("inner", "inductor"),
        rest.pop("inductor", {}),
        rest.pop("mode", None),
    )
    if not isinstance(strict, bool):
        raise TypeError(f"strict must be a bool, got {strict!r}")
    if inner not in INNER:
        raise ValueError(f"inner must be one of {', '.join(INNER)}, got {inner!r}")
    if mode is not None and mode not in MODES:
        raise ValueError(f"mode must be one of {', '.join(MODES)}, got {mode!r}")
    if not isinstance(inductor, Mapping):
        raise TypeError(f"inductor must be a dictionary of Inductor's settings, got {inductor!r}")
    method, calibration = rest.pop("method", None), rest.pop("calibration", None)
    if calibration is not None:
        calibration = as_calibration(calibration)
    known_method = method or (calibration.method if calibration else DEFAULT[0])
    names = option_names(method_class(known_method))
    known = ("method", "calibration", *_free(known_method, names), *OWN_OPTIONS)
    for name in rest:
        if name not in known:
            raise ValueError(
                f"option must be one of {', '.join(known)}, got {name!r}{nearest(name, known)}"
            )
    spec = make_spec(method, calibration=calibration, **rest)
    return Config(spec, strict, inner, dict(inductor), calibration, mode)


def make_spec(
    method: str | None = None,
    *,
    layers: Mapping[int, Any] | None = None,
    calibration: str | Path | Calibration | None = None,
    **options: Any,
) -> CacheSpec:
    """Return the `CacheSpec` of a method.

    Args:
        method: A name in `METHODS`; the default is that of the calibration, or `DEFAULT` with its options.
        layers: What single layers get instead, by number: a method's name, a dictionary with
            ``"method"`` and its options, or ``None`` for 16 bit.
        calibration: What `calibrate` returned, or the file it was saved to.
        **options: The method's options; see its class. Of a calibrated method, options that calibration
            depends on may be left out, and must be as it was calibrated if they are not.

    Raises:
        ValueError: The name, an option or a value is unknown or out of range, or the calibration is of
            another method or of other options.
        TypeError: A value has the wrong type.
        FileNotFoundError: There is no such calibration.
    """
    if calibration is not None:
        spec = _calibrated_spec(method, as_calibration(calibration), options)
        merged = dict(spec.layers) | dict(_overrides({} if layers is None else layers))
        return replace(spec, layers=tuple(sorted(merged.items())))
    if method is None:
        method, options = DEFAULT[0], {**DEFAULT[1], **options}
    if method_class(method).calibrated:
        make_options(method, options)
        raise ValueError(
            f"calibration must be given for {method}; make one with kvq_compile.calibrate or `kvq calibrate`"
        )
    spec = make_options(method, options).spec()
    return replace(spec, method=method, layers=_overrides({} if layers is None else layers))


def method_class(method: Any) -> type[Options]:
    """Return the class of a method's options.

    Raises:
        TypeError: ``method`` is no name.
        ValueError: It is unknown.
    """
    if not isinstance(method, str):
        raise TypeError(f"method must be a name, got {method!r}")
    if method not in NAMES and not CQ.fullmatch(method):
        raise ValueError(
            f"method must be one of {', '.join(NAMES)} (or any cq-<c>c<b>b), got {method!r}{nearest(method, NAMES)}"
        )
    return METHODS[base_name(method)]


def make_options(method: str, options: Mapping[str, Any]) -> Options:
    """Return a method's options, checked.

    Raises:
        TypeError: ``method`` is no name, or a value has the wrong type.
        ValueError: The method or an option is unknown, or a value out of range.
    """
    made = method_class(method)
    known = _free(method, option_names(made))
    for name in options:
        if name not in known:
            raise ValueError(
                f"options of {method} must be among {', '.join(known)}, got {name!r}{nearest(name, known)}"
            )
    return made(**_preset(method), **options)


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
    """Return the name of a method's family: ``"cq"`` for ``"cq-4c8b"``."""
    return "cq" if CQ.fullmatch(method) else method


def nearest(name: str, known: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"``, or nothing where no known name is like ``name``."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _preset(method: str) -> dict[str, Any]:
    """Return the options that a method's name stands for."""
    match = CQ.fullmatch(method)
    return {"couple": int(match[1]), "bits": int(match[2])} if match else {}


def _free(method: str, names: Iterable[str]) -> list[str]:
    preset = _preset(method)
    return [name for name in names if name not in preset]


def _calibrated_spec(
    method: str | None, calibration: Calibration, options: dict[str, Any]
) -> CacheSpec:
    """Return the spec of a calibration, a layer's spec for each of its layers."""
    if method is not None and method != calibration.method:
        raise ValueError(
            f"calibration must be of method {method}, got one of {calibration.method}; calibrate for {method}"
        )
    method = calibration.method
    made = method_class(method)
    if "query_norm" in options:
        raise ValueError(
            f"query_norm must be left out beside a calibration, which measured it, got {options['query_norm']!r}"
        )
    preset = _preset(method)
    stored = {name: value for name, value in calibration.options.items() if name not in preset}
    for name, value in options.items() if made.calibrated else ():
        fixed = name in option_names(made) and name not in AT_COMPILE
        if fixed and calibration.options.get(name) != value:
            raise ValueError(
                f"{name} must be as calibrated, {calibration.options.get(name)!r}, got {value!r}; "
                "calibrate anew for other options"
            )
    every = make_options(method, stored | options)
    named = [replace(spec, method=method) for spec in every.specs(calibration.layers)]
    return replace(named[0], layers=tuple(enumerate(named)))


def _overrides(layers: Mapping[int, Any]) -> tuple[tuple[int, CacheSpec | None], ...]:
    if not isinstance(layers, Mapping):
        raise TypeError(f"layers must be a dictionary, got {layers!r}")
    for index in layers:
        if not isinstance(index, int) or isinstance(index, bool) or index < 0:
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
