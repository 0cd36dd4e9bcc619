"""Turn the ``options`` of ``torch.compile`` into a `Config`, checking each of them once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvq_compile.calibration.artifact import Calibration
from kvq_compile.kernels.layout import CacheSpec
from kvq_compile.methods import (
    DEFAULT,
    as_calibration,
    check_method,
    make_spec,
    method_options,
    nearest,
)

INNER = ("inductor", "eager", "aot_eager")
OWN_OPTIONS = ("layers", "strict", "inner", "inductor")


@dataclass(frozen=True)
class Config:
    """What a compilation was asked for.

    Attributes:
        spec: How caches are quantized.
        strict: Whether an attention that keeps a cache and cannot be rewritten is an error.
        inner: Compiler of the rewritten graph.
        inductor: Settings handed on to Inductor.
        calibration: What the spec was made from, if it was.
    """

    spec: CacheSpec
    strict: bool = False
    inner: str = "inductor"
    inductor: Mapping[str, Any] = field(default_factory=dict)
    calibration: Calibration | None = None


def make_config(options: Mapping[str, Any] | None = None) -> Config:
    """Return the `Config` of ``options``.

    Args:
        options: ``method`` and its options, ``calibration``, ``layers``, ``strict``, ``inner``, ``inductor``.

    Raises:
        ValueError: An option is unknown or out of range; the message names the nearest one.
        TypeError: An option has the wrong type.
    """
    rest = dict(options or {})
    strict, inner, inductor = (
        rest.pop("strict", False),
        rest.pop("inner", "inductor"),
        rest.pop("inductor", {}),
    )
    if not isinstance(strict, bool):
        raise TypeError(f"strict must be a bool, got {strict!r}")
    if inner not in INNER:
        raise ValueError(f"inner must be one of {', '.join(INNER)}, got {inner!r}")
    if not isinstance(inductor, Mapping):
        raise TypeError(f"inductor must be a dictionary of Inductor's settings, got {inductor!r}")
    method, calibration = rest.pop("method", None), rest.pop("calibration", None)
    if calibration is not None:
        calibration = as_calibration(calibration)
    known_method = method or (calibration.method if calibration else DEFAULT)
    check_method(known_method, ())
    known = ("method", "calibration", *method_options(known_method), *OWN_OPTIONS)
    for name in rest:
        if name not in known:
            raise ValueError(
                f"option must be one of {', '.join(known)}, got {name!r}{nearest(name, known)}"
            )
    spec = make_spec(method, calibration=calibration, **rest)
    return Config(spec, strict, inner, dict(inductor), calibration)
