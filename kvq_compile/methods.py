"""The methods by name: each a small function that returns a `CacheSpec`."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from kvq_compile.kernels.spec import CacheSpec, TensorSpec, Transform

DEFAULT = "int4"


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
    def tensor(width: int | None) -> TensorSpec:
        return TensorSpec(bits if width is None else width, "token", group_size, clip, transform)

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
    key = TensorSpec(bits if key_bits is None else key_bits, "channel", group_size, clip)
    value = TensorSpec(bits if value_bits is None else value_bits, "token", group_size, clip)
    return CacheSpec(key, value, sinks, window, page_size)


METHODS: dict[str, Callable[..., CacheSpec]] = {
    function.__name__: function for function in (int8, int4, int3, int2, kivi)
}


def make_spec(
    method: str = DEFAULT, *, layers: Mapping[int, Any] | None = None, **options: Any
) -> CacheSpec:
    """Return the `CacheSpec` of a method.

    Args:
        method: A name in `METHODS`.
        layers: What single layers get instead, by number: a method's name, a dictionary with
            ``"method"`` and its options, or ``None`` for 16 bit.
        **options: The method's options; see its function.

    Raises:
        ValueError: The name, an option or a value is unknown or out of range.
        TypeError: A value has the wrong type.
    """
    if not isinstance(method, str):
        raise TypeError(f"method must be a name, got {method!r}")
    if method not in METHODS:
        raise ValueError(
            f"method must be one of {', '.join(METHODS)}, got {method!r}{nearest(method, METHODS)}"
        )
    known = method_options(method)
    for name in options:
        if name not in known:
            raise ValueError(
                f"options of {method} must be among {', '.join(known)}, got {name!r}{nearest(name, known)}"
            )
    spec = METHODS[method](**options)
    return replace(spec, method=method, layers=_overrides({} if layers is None else layers))


def method_options(method: str) -> tuple[str, ...]:
    """Return the names of a method's options."""
    function = _uniform if METHODS[method] in (int8, int4, int3, int2) else METHODS[method]
    parameters = inspect.signature(function).parameters.values()
    return tuple(p.name for p in parameters if p.kind is p.KEYWORD_ONLY)


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
