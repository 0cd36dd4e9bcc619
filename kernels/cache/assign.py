"""Assignments to a `QuantizedKV`, outside graphs: ``cache[:, :, slots] = x``, and to single rows of a static one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import forward_ad

from kvq_compile.kernels.cache.dispatch import write
from kvq_compile.kernels.cache.rows import (
    caches_of_rows,
    count_by_row_,
    rows_written,
    why_not_by_row,
)
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.kernels.cache.writes import check_writable


def assign(cache: QuantizedKV, index: Any, x: Any) -> None:
    """Write tokens: ``cache[index] = x``.

    Raises:
        NotImplementedError: The index is not understood, or packed tokens could not be differentiated or batched.
    """
    try:
        _check_is_plain(x, "tokens written into a quantized cache")
        _check_is_plain(cache, "the slots of a quantized cache that are written")
        _assign(cache, index, x)
    except NotImplementedError:
        if not isinstance(
            cache.cursor, FakeTensor
        ):  # of Dynamo, whose graph is looked at before it runs
            raise


def _check_is_plain(x: Any, what: str) -> None:
    """Make sure that a tensor is none of a transform of ``torch.func``, and carries no tangent.

    Raises:
        NotImplementedError: It is, or does: what is packed would lose its derivatives.
    """
    if not isinstance(x, Tensor):
        return
    if is_functorch_wrapped_tensor(x):
        got = "a tensor of a transform of torch.func (grad, jvp, vmap)"
    elif forward_ad._current_level >= 0 and forward_ad.unpack_dual(x).tangent is not None:
        got = "a tangent of forward-mode differentiation"
    else:
        return
    raise NotImplementedError(
        f"{what} must be ordinary tensors, got {got}; write to cache.dequantize(), which is a copy, or detach() them"
    )


def _assign(cache: QuantizedKV, index: Any, x: Any) -> None:
    if not isinstance(cache.cursor, FakeTensor) and _assign_rows(cache, index, x):
        return
    slots = _token_index(index, cache.shape)
    if isinstance(slots, slice):
        if slots.step not in (None, 1):
            raise NotImplementedError(f"slot slices must have step 1, got {slots}")
        if isinstance(cache.cursor, FakeTensor):
            write(cache, x, None, slots.start or 0, x.shape[2])
        else:
            start, stop, _ = slots.indices(cache.shape[2])
            write(cache, x, None, start, max(0, stop - start))
    elif (
        isinstance(slots, Tensor) and slots.dtype in (torch.int64, torch.int32) and slots.dim() == 1
    ):
        write(cache, x, slots, None, slots.shape[0])
    elif isinstance(slots, int) and not isinstance(slots, bool):
        x = x.unsqueeze(-2) if isinstance(x, Tensor) and x.dim() else x
        write(cache, x, None, slots % cache.shape[2], 1)
    else:
        raise NotImplementedError(f"slots must be a slice or a vector of positions, got {slots!r}")


def _assign_rows(cache: QuantizedKV, index: Any, x: Any) -> bool:
    """Write tokens of some rows of a static cache; say whether an assignment is that."""
    found = rows_written(index, cache.shape[0])
    if found is None or cache.kind != "static" or why_not_by_row(cache.page_layout) is not None:
        return False
    check_writable(cache)
    chosen, inside = found
    _token_index(inside, cache.shape)  # raises where it is not of whole tokens
    rows = caches_of_rows(count_by_row_(cache))
    several = isinstance(x, Tensor) and x.dim() == 4 and x.shape[0] > 1
    for place, row in enumerate(chosen):
        _assign(rows[row], inside, x[place : place + 1] if several else x)
    cache._lineage.counted = cache._lineage.counter = None
    return True


def _is_whole(part: Any, size: Any) -> bool:
    if not isinstance(part, slice) or part.step not in (None, 1) or part.start not in (None, 0):
        return False
    return bool(part.stop is None or part.stop >= size)


def _token_index(index: Any, shape: Sequence[Any]) -> Any:
    """Return the part of an index into ``[B, H, S, D]`` that selects tokens; it must select all of the rest."""
    index = index if isinstance(index, tuple) else (index,)
    dots = [place for place, part in enumerate(index) if part is Ellipsis]
    place = dots[0] if dots else len(index)
    rest = index[place + 1 :]
    index = (*index[:place], *[slice(None)] * (4 - place - len(rest)), *rest)
    if len(index) != 4 or not all(_is_whole(index[dim], shape[dim]) for dim in (0, 1, 3)):
        raise NotImplementedError(
            f"a QuantizedKV can be assigned along its tokens only, as cache[:, :, positions] = x, got {index}"
        )
    return index[2]
