"""Turn the ``options`` of ``torch.compile`` into a `Config`, checking each of them once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.methods import DEFAULT, METHODS, make_spec, method_options, nearest

INNER = ("inductor", "eager", "aot_eager")


@dataclass(frozen=True)
class Config:
    """What a compilation was asked for.

    Attributes:
        spec: How caches are quantized.
        strict: Whether an attention that keeps a cache and cannot be rewritten is an error.
        inner: Compiler of the rewritten graph.
        inductor: Settings handed on to Inductor.
    """

    spec: CacheSpec
    strict: bool = False
    inner: str = "inductor"
    inductor: Mapping[str, Any] = field(default_factory=dict)


def make_config(options: Mapping[str, Any] | None = None) -> Config:
    """Return the `Config` of ``options``.

    Args:
        options: ``method`` and its options, ``layers``, ``strict``, ``inner``, ``inductor``.

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
    method = rest.pop("method", DEFAULT)
    if isinstance(method, str) and method in METHODS:
        known = ("method", *method_options(method), "layers", "strict", "inner", "inductor")
        for name in rest:
            if name not in known:
                raise ValueError(
                    f"option must be one of {', '.join(known)}, got {name!r}{nearest(name, known)}"
                )
    return Config(make_spec(method, **rest), strict, inner, dict(inductor))
