"""Exports of a `QuantizedKV`: to numpy, lists, DLPack, other processes, raw memory.

These methods of a tensor bypass the dispatcher, and PyTorch would run them on memory that the wrapper claims but does
not have. Methods that copy return dense elements. Methods that need an address raise an error that names an
alternative, since a packed cache has no memory with its elements side by side. Shared and pinned memory hold the
packed parts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvq_compile.kernels.cache.read_only import stands_alone
from kvq_compile.kernels.cache.saved import receive

if TYPE_CHECKING:
    from kvq_compile.kernels.cache.tensor import QuantizedKV
    from kvq_compile.kernels.cache.views import Lineage


def _refusing(method: str, instead: str) -> Any:
    """Return a method that raises and names the alternative to ``method``."""

    def refuse(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(
            f"{method} must be called on a tensor whose elements lie in memory, got {self!r}; {instead}"
        )

    refuse.__name__ = method
    refuse.__doc__ = f"Raise NotImplementedError: {instead}."
    return refuse


_ADDRESS = (
    "write cache.dequantize() for a 16-bit copy (safetensors takes that), or torch.save(cache, file), "
    "which keeps it packed"
)
_STORAGE = (
    "write cache.dequantize() for a 16-bit copy; cache.nbytes is what the packed parts take, and "
    "cache.parts are the tensors that hold them"
)
_no_storage = _refusing("untyped_storage", _STORAGE)
_WRITE = (
    "write to cache.dequantize(), which is a copy, or assign new tokens as cache[:, :, slots] = x"
)


class Exports(Tensor):
    """Methods of `QuantizedKV` that are not operators.

    Methods that need the elements side by side in memory raise NotImplementedError.
    """

    data_ptr = _refusing("data_ptr", _ADDRESS)
    const_data_ptr = _refusing("const_data_ptr", _ADDRESS)
    mutable_data_ptr = _refusing("mutable_data_ptr", _ADDRESS)
    storage = _refusing("storage", _STORAGE)
    _typed_storage = _refusing("storage", _STORAGE)
    apply_ = _refusing("apply_", _WRITE)
    map_ = _refusing("map_", _WRITE)
    map2_ = _refusing("map2_", _WRITE)

    _is_view, _base = stands_alone, None
    _lineage: Lineage

    def untyped_storage(self) -> Any:
        """Raise NotImplementedError, save where PyTorch itself compares storages while it traces."""
        if torch._guards.TracingContext.try_get() is not None:
            return super().untyped_storage()
        return _no_storage(self)

    @property
    def data(self) -> Tensor:
        """The cache itself, seen without autograd; another tensor cannot be put in its place."""
        return self.detach()

    @data.setter
    def data(self, other: Tensor) -> None:
        raise NotImplementedError(
            f"data must be set of a tensor whose elements lie in memory, got {self!r}; write cache.copy_(other)"
        )

    def _dense(self) -> Tensor:
        raise NotImplementedError

    def _held(self) -> list[Tensor]:
        raise NotImplementedError

    def numpy(self, *, force: bool = False) -> Any:
        """Return the tokens as a numpy array ``[B, H, S, D]``: a copy."""
        return self._dense().numpy(force=force)

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        return self._dense().__array__(*args, **kwargs)

    def tolist(self) -> Any:
        """Return the tokens as nested lists of floats."""
        return self._dense().tolist()

    def __dlpack__(self, *args: Any, **kwargs: Any) -> Any:
        return self._dense().__dlpack__(*args, **kwargs)

    @property
    def nbytes(self) -> int:  # type: ignore[override]
        """Bytes of the packed parts, spare pages and tables included."""
        return sum(part.untyped_storage().nbytes() for part in self._held())

    def share_memory_(self) -> Any:
        """Move the packed parts to shared memory.

        Another process that inherits the cache reads it there. A grown cache takes new tokens in memory of its
        own, so that no process overwrites what another one holds.
        """
        for part in self._held():
            part.share_memory_()  # so are all others of their storage
        owner = getattr(self.__dict__.get("_part_of"), "owner", None)
        for cache in (self,) if owner is None else (self, owner):
            cache._lineage.share()
            cache._lineage.moved()
        return self

    def is_shared(self) -> bool:
        """Say whether the packed parts are in shared memory; those on a GPU always are."""
        return all(part.is_shared() for part in self._held())

    def is_pinned(self, *args: Any, **kwargs: Any) -> bool:
        """Say whether the packed parts are in pinned memory."""
        return all(part.is_pinned(*args, **kwargs) for part in self._held())


def send_by_copy(cache: QuantizedKV) -> tuple[Any, ...]:
    """Pickle a cache for another process: a dynamic one as a copy, independent of later tokens of the sender."""
    is_copied = cache.kind == "grown" or cache._part_of is not None
    sent = cache.clone_packed() if is_copied else cache
    sent._lineage.share()
    first = None if cache.trim is None else int(cache.first)
    about = cache.page_layout, cache.kind, int(cache.shape[2]), first
    return receive, (sent.parts, sent.calibrated, *about)
