"""Convert 16-bit cache tensors to quantized ones in place: same objects, less memory."""

from __future__ import annotations

import gc
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import Parameter

from kvq_compile.kernels.cache.arranged import ArrangedKV
from kvq_compile.kernels.cache.read_only import ReadOnlyTokens
from kvq_compile.kernels.cache.slices import drop_parts
from kvq_compile.kernels.cache.tensor import QuantizedKV


def check_can_become_quantized(tensor: Tensor) -> None:
    """Make sure that `become` can convert a tensor.

    Raises:
        RuntimeError: The tensor shares its storage, so its memory would not be freed and a write through
            the other tensor would be lost; or it is no plain tensor, nor a parameter that is not trained.
    """
    owner, views = _owner(tensor)
    if isinstance(owner, Parameter) and owner.requires_grad:
        raise RuntimeError("the parameter must not require gradients")
    if type(owner) not in (Tensor, Parameter):
        raise RuntimeError(f"the buffer must be a plain tensor, got {type(owner).__name__}")
    if owner._is_view() or _shares_storage(owner, views):
        raise RuntimeError("the buffer must not share its storage with another tensor")


def lend(owner: Tensor, views: Sequence[Tensor]) -> Sequence[Tensor]:
    """Note that views may be converted in the place of a tensor: `become_arranged` or `become_whole` follows."""
    reason = stays_plain(owner)
    whole, others = _owner(owner)
    for view in views:
        view._kvq_owner = (whole, others + len(views))  # type: ignore[attr-defined]
        if reason is not None:
            keep_plain(view, reason)
    return views


def _owner(tensor: Tensor) -> tuple[Tensor, int]:
    """Return the tensor that views were lent of, and how many they are; any other tensor itself, and none."""
    found: tuple[Tensor, int] = getattr(tensor, "_kvq_owner", (tensor, 0))
    return found


def become(tensor: Tensor, quantized: QuantizedKV) -> None:
    """Make ``tensor`` the quantized cache: every reference to the object sees it, and its storage is freed.

    ``torch.utils.swap_tensors`` would do, but it refuses tensors that anyone refers to weakly, and
    Dynamo's fake-tensor converter refers weakly to every input it has seen. Such references stay right:
    they name the object, which stays the same.

    Raises:
        RuntimeError: See `check_can_become_quantized`. Nothing has changed then.
    """
    check_can_become_quantized(tensor)
    become_whole(tensor, quantized)


def become_arranged(tensor: Tensor, arranged: ArrangedKV) -> None:
    """Make ``tensor``, whose views have become caches, what stands for them in its layout."""
    _swap(tensor, arranged)


def become_whole(tensor: Tensor, quantized: QuantizedKV) -> None:
    """Make ``tensor``, some of whose rows have become a cache, the cache of all of them."""
    _swap(tensor, quantized)
    assert isinstance(tensor, QuantizedKV)
    tensor._lineage.add(tensor)


def _swap(tensor: Tensor, other: Tensor) -> None:
    """Let two objects be what the other one is."""
    torch._C._swap_tensor_impl(tensor, other)
    tensor.__class__, other.__class__ = other.__class__, tensor.__class__
    mine, theirs = dict(tensor.__dict__), dict(other.__dict__)
    tensor.__dict__.clear()
    other.__dict__.clear()
    tensor.__dict__.update(theirs)
    other.__dict__.update(mine)


def _shares_storage(tensor: Tensor, views: int) -> bool:
    storage = tensor.untyped_storage()
    own = 2 + views  # the tensor and the storage object at hand
    if torch._C._storage_Use_Count(storage._cdata) <= own:
        return False
    gc.collect()  # an error that was caught holds frames, and what they looked at, until then
    return bool(torch._C._storage_Use_Count(storage._cdata) > own)


def thaw(cache: QuantizedKV, reason: str) -> None:
    """Convert a quantized cache back to an ordinary tensor, in place; slots without a token are zero.

    Every reference to the object sees it. It stays in 16 bit from then on: `stays_plain` has the reason. A slice of
    another cache's batch can be read, and no more written, for that cache would not see it.
    """
    with torch.inference_mode(False), torch.no_grad():
        dense: Tensor = cache.dequantize().clone()
    drop_parts(cache._lineage, is_gone=True)
    torch._C._swap_tensor_impl(cache, dense)
    tensor: Tensor = cache
    thawed = ReadOnlyTokens if cache._is_slice_copy else Tensor
    tensor.__class__, dense.__class__ = thawed, QuantizedKV
    tensor.__dict__.clear()
    keep_plain(tensor, reason)


def thaw_arranged(arranged: ArrangedKV, reason: str) -> None:
    """Convert a tensor of quantized caches back to an ordinary one, in place, as `thaw` does with a cache.

    Caches of it that have been converted already are taken as they are.
    """
    with torch.inference_mode(False), torch.no_grad():
        caches = [x.dequantize() if isinstance(x, QuantizedKV) else x for x in arranged.caches]
        for cache in arranged.caches:
            if isinstance(cache, QuantizedKV):
                drop_parts(cache._lineage, is_gone=True)
        dense: Tensor = arranged.arrangement.join(caches)
        dense = dense.clone(memory_format=torch.contiguous_format)
    torch._C._swap_tensor_impl(arranged, dense)
    tensor: Tensor = arranged
    tensor.__class__, dense.__class__ = Tensor, ArrangedKV
    tensor.__dict__.clear()
    keep_plain(tensor, reason)


def keep_plain(tensor: Tensor, reason: str) -> None:
    """Mark a buffer as not to be quantized, with the reason."""
    tensor._kvq_stays_plain = reason  # type: ignore[attr-defined]


def stays_plain(tensor: object) -> str | None:
    """Return why a buffer is not to be quantized, or ``None``."""
    return getattr(tensor, "_kvq_stays_plain", None) if isinstance(tensor, Tensor) else None
