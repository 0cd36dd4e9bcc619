"""The calls a user makes beside ``torch.compile``: decorate, quantize a cache by hand."""

from __future__ import annotations

import functools
from typing import Any, TypeVar

import torch
from torch import Tensor

from kvq_compile.backend import kvq, tell_of_cost
from kvq_compile.errors import KVQError
from kvq_compile.kernels.cache.become import become, check_can_become_quantized
from kvq_compile.kernels.cache.tensor import Kind, QuantizedKV
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.schemes import Role
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.kernels.tables import Tables
from kvq_compile.options import make_config, make_spec
from kvq_compile.reports import cache_tensors

T = TypeVar("T")


def compile(target: T | None = None, /, *, mode: str | None = None, **options: Any) -> Any:
    """Compile a function, a module or a module class onto quantized caches.

    >>> @kvq_compile.compile(method="int4")
    ... def step(query, key, value, past_keys, past_values): ...

    Args:
        target: What to compile; without it, a decorator is returned. Of a module its ``forward`` is
            compiled in place, so that methods such as ``generate`` go through it; of a class, that of
            every instance.
        mode: As for ``torch.compile``.
        **options: As in ``torch.compile(options=...)``: ``method`` and its options.

    Raises:
        ValueError: An option is unknown or out of range.
        TypeError: ``target`` cannot be compiled.
    """
    make_config(options)
    if target is None:
        return functools.partial(compile, mode=mode, **options)
    backend = functools.partial(kvq, mode=mode, options=options)
    if isinstance(target, torch.nn.Module):
        target.compile(backend=backend)
        return target
    if isinstance(target, type) and issubclass(target, torch.nn.Module):
        target.forward = torch.compile(target.forward, backend=backend)
        return target
    if callable(target):
        return torch.compile(target, backend=backend)
    raise TypeError(
        f"target must be a function, a module or a module class, got {type(target).__name__}"
    )


def quantize_cache_(
    cache_or_module: Any, method: str | CacheSpec | None = None, **options: Any
) -> Any:
    """Quantize the 16-bit tensors of a cache in place, freeing their storage.

    Args:
        cache_or_module: A transformers cache, or any nesting of tensors `report` understands; key and
            value tensors must alternate.
        method: A method's name or a `CacheSpec`; the default is the backend's.
        **options: The method's options; ``length``, the tokens held, for caches of fixed size.

    Returns:
        What was passed in.

    Raises:
        KVQError: A tensor cannot be converted in place. None has been then.
        ValueError: The method, an option, or a head dimension that it cannot serve.
    """
    length = options.pop("length", None)
    kind: Kind = "grown" if length is None else "static"
    spec = method if isinstance(method, CacheSpec) else make_spec(method, **options)
    tell_of_cost(spec)
    planned: list[tuple[Tensor, Layout, Tables | None]] = []
    tensors = list(cache_tensors(cache_or_module))
    for index, (name, tensor) in enumerate(tensors):
        layer_spec = spec.for_layer(index // 2)
        if isinstance(tensor, QuantizedKV) or layer_spec is None:
            continue
        try:
            check_can_become_quantized(tensor)
        except RuntimeError as reason:
            raise KVQError(f"{name} cannot be quantized in place: {reason}") from reason
        role: Role = "key" if index % 2 == 0 else "value"
        tables = layer_spec.tables(role)
        widest = max(int(x.shape[3]) for _, x in tensors[index - index % 2 :][:2])
        planned.append((tensor, layer_spec.layout(role, int(tensor.shape[3]), 0, widest), tables))
    for tensor, layout, tables in planned:
        words = tables.on(tensor.device) if tables else None
        with torch.no_grad():
            become(
                tensor,
                QuantizedKV.from_dense(tensor, layout, kind=kind, length=length, tables=words),
            )
    return cache_or_module
