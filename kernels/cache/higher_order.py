"""Let ``flex_attention`` take quantized caches: it reads them as ordinary tensors.

A higher-order operator is no operator of a tensor's ``__torch_dispatch__``. Each has rules of its own for every kind of
tensor, and that for fake tensors refuses tensors of other classes before their rules are asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch._higher_order_ops.flex_attention import flex_attention
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._pytree import tree_map

from kvq_compile.kernels.cache.tensor import QuantizedKV


def register() -> None:
    """Add the rules, once."""
    rules: dict[Any, Callable[..., Any]] = flex_attention.python_key_table
    if QuantizedKV in rules:
        return
    traced = rules[FakeTensorMode]
    rules[FakeTensorMode] = lambda mode, *args, **kwargs: traced(
        mode, *_dense(args), **_dense(kwargs)
    )
    rules[QuantizedKV] = lambda *args, **kwargs: flex_attention(*_dense(args), **_dense(kwargs))


def _dense(x: Any) -> Any:
    return tree_map(lambda each: each.dequantize() if isinstance(each, QuantizedKV) else each, x)
