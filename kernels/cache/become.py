"""Convert 16-bit cache tensors to quantized ones in place: same objects, less memory."""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_compile.kernels.cache.tensor import QuantizedKV


def check_can_become_quantized(tensor: Tensor) -> None:
    """Make sure that `become` can convert a tensor.

    Raises:
        RuntimeError: The tensor shares its storage, so its memory would not be freed and a write through
            the other tensor would be lost; or it is no plain tensor.
    """
    if type(tensor) is not Tensor:
        raise RuntimeError(f"the buffer must be a plain tensor, got {type(tensor).__name__}")
    if tensor._is_view() or _shares_storage(tensor):
        raise RuntimeError("the buffer must not share its storage with another tensor")


def become(tensor: Tensor, quantized: QuantizedKV) -> None:
    """Make ``tensor`` the quantized cache: every reference to the object sees it, and its storage is freed.

    ``torch.utils.swap_tensors`` would do, but it refuses tensors that anyone refers to weakly, and
    Dynamo's fake-tensor converter refers weakly to every input it has seen. Such references stay right:
    they name the object, which stays the same.

    Raises:
        RuntimeError: See `check_can_become_quantized`. Nothing has changed then.
    """
    check_can_become_quantized(tensor)
    torch._C._swap_tensor_impl(tensor, quantized)
    tensor.__class__, quantized.__class__ = quantized.__class__, tensor.__class__
    mine, theirs = dict(tensor.__dict__), dict(quantized.__dict__)
    tensor.__dict__.clear()
    quantized.__dict__.clear()
    tensor.__dict__.update(theirs)
    quantized.__dict__.update(mine)
    assert isinstance(tensor, QuantizedKV)
    tensor._lineage.add(tensor)


def _shares_storage(tensor: Tensor) -> bool:
    storage = tensor.untyped_storage()
    users = torch._C._storage_Use_Count(storage._cdata)
    return bool(users > 2)  # the tensor and the storage object at hand


def thaw(cache: QuantizedKV, reason: str) -> None:
    """Convert a quantized cache back to an ordinary tensor, in place; slots without a token are zero.

    Every reference to the object sees it. It stays in 16 bit from then on: `stays_plain` has the reason.
    """
    with torch.inference_mode(False), torch.no_grad():
        dense: Tensor = cache.dequantize().clone()
    torch._C._swap_tensor_impl(cache, dense)
    tensor: Tensor = cache
    tensor.__class__, dense.__class__ = Tensor, QuantizedKV
    tensor.__dict__.clear()
    keep_plain(tensor, reason)


def keep_plain(tensor: Tensor, reason: str) -> None:
    """Mark a buffer as not to be quantized, with the reason."""
    tensor._kvq_stays_plain = reason  # type: ignore[attr-defined]


def stays_plain(tensor: object) -> str | None:
    """Return why a buffer is not to be quantized, or ``None``."""
    return getattr(tensor, "_kvq_stays_plain", None) if isinstance(tensor, Tensor) else None
