"""Refuse writes into a dequantized copy.

Reading a `QuantizedKV` through a view, such as ``cache[:, :, 3:5]``, returns a dequantized copy. A write to the copy
would look like a write to the cache and be lost. The copy is therefore a `ReadOnlyTokens`: an ordinary tensor for
readers that raises when it is written to. Results computed from it are ordinary tensors, except views of the same
memory.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import get_unwrapped, is_functorch_wrapped_tensor
from torch.utils._pytree import tree_map


def stands_alone(self: Tensor) -> bool:
    """Say that a tensor is no view of another one, whatever autograd noted when an operator for views made it.

    A part of a quantized cache has lengths of its own. Dynamo would relate them to those of the whole cache.
    """
    return False


class ReadOnlyTokens(Tensor):
    """Elements read from a `QuantizedKV` through a view; writing to them raises.

    ``clone()`` gives an ordinary tensor. To write to the cache, assign to it whole slots:
    ``cache[:, :, positions] = x``.
    """

    _is_view = stands_alone
    _base = None

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if torch.compiler.is_compiling():
                return func(*args, **kwargs)
            written = kwargs.get("out") if "out" in kwargs else args[0] if _writes(func) else None
            if isinstance(written, ReadOnlyTokens):
                raise NotImplementedError(
                    f"{func.__name__} would write into a dequantized copy and be lost; assign to the "
                    f"cache itself, as cache[:, :, positions] = x, or clone() the copy first"
                )
            result = func(*args, **kwargs)
            memory = {_memory(x) for x in args if isinstance(x, ReadOnlyTokens)} - {None}
            return tree_map(lambda x: read_only(x) if _memory(x) in memory else _plain(x), result)


def read_only(x: Any) -> Any:
    """Return a tensor as `ReadOnlyTokens`, sharing its memory; anything else as it is."""
    return x.as_subclass(ReadOnlyTokens) if isinstance(x, Tensor) else x


def _plain(x: Any) -> Any:
    return x.as_subclass(Tensor) if isinstance(x, ReadOnlyTokens) else x


def _memory(x: Any) -> int | None:
    if isinstance(x, Tensor) and is_functorch_wrapped_tensor(x):
        return _memory(get_unwrapped(x))  # a tensor of a transform has no storage of its own
    return int(x.untyped_storage()._cdata) if isinstance(x, Tensor) and x.numel() else None


def _writes(func: Any) -> bool:
    name = getattr(func, "__name__", "")
    if name.startswith("__"):
        return name == "__setitem__" or name in _IN_PLACE
    return bool(name.endswith("_")) and name not in ("requires_grad_", "retain_grad_")


_IN_PLACE = frozenset(
    f"__i{name}__" for name in ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow")
) | {"__iand__", "__ior__", "__ixor__", "__ilshift__", "__irshift__"}
