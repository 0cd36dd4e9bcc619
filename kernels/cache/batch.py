"""Operations along the batch of a `QuantizedKV`, outside graphs: the result stays packed.

A slice of a batch is a view of an ordinary tensor. Of a static cache that can count each row it shares the memory
(`slices`); of others it is a copy, in which a write would be lost and is refused (`slice_copy`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kvq_compile.kernels.cache.rows import why_not_by_row
from kvq_compile.kernels.cache.slices import slice_rows
from kvq_compile.kernels.cache.tensor import QuantizedKV

aten = torch.ops.aten


def slice_copy(x: QuantizedKV, rows: Callable[[Tensor], Tensor]) -> QuantizedKV:
    """Return a copy that stands for a view along the batch."""
    copy = x._map_batch(rows)
    copy._is_slice_copy = True
    return copy


def sliced(x: QuantizedKV, first: Any, last: Any) -> QuantizedKV:
    """Return the rows from ``first`` up to ``last``."""
    is_traced = isinstance(x.cursor, FakeTensor)
    is_copy = x._is_slice_copy and x._part_of is None
    counts_rows = x.kind == "static" and why_not_by_row(x.page_layout) is None
    if counts_rows and not is_traced and not is_copy:
        return slice_rows(x, range(x.shape[0])[first:last])
    return slice_copy(x, lambda part: part[first:last].clone())


def _split(x: QuantizedKV, size: int | Sequence[int], dim: int = 0) -> Any:
    """Split along the batch into pieces of ``size``, or of the sizes that it lists."""
    if dim % 4 != 0 or size == 0:
        return NotImplemented
    B = x.shape[0]
    lengths = [size] * -(-B // size) if isinstance(size, int) else list(size)
    if not isinstance(size, int) and sum(lengths) != B:
        return NotImplemented  # torch raises the error
    ends = list(accumulate(lengths))
    return [sliced(x, end - n, end) for n, end in zip(lengths, ends, strict=True)]


def _expand(x: QuantizedKV, size: Sequence[int], *, implicit: bool = False) -> Any:
    """Expand one sequence to many."""
    del implicit
    if len(size) != 4 or not _keeps(size[1:], x.shape[1:]):
        return NotImplemented
    if _keeps(size[:1], x.shape[:1]):
        return x._view(x.shape[2])
    return slice_copy(x, lambda part: part.expand(size[0], *part.shape[1:]).clone())


def _repeat(x: QuantizedKV, repeats: Sequence[int]) -> Any:
    """Repeat the sequences of the batch."""
    if len(repeats) != 4 or list(repeats[1:]) != [1, 1, 1] or repeats[0] < 1:
        return NotImplemented
    return x._map_batch(lambda part: part.repeat(repeats[0], *[1] * (part.dim() - 1)))


def _view(x: QuantizedKV, size: Sequence[int]) -> Any:
    """View a cache in its own shape; any other shape is left to a dense copy."""
    whole = len(size) == 4 and _keeps(size, x.shape)
    return x._view(x.shape[2]) if whole else NotImplemented


def _keeps(size: Sequence[int], shape: Sequence[int]) -> bool:
    return all(asked in (-1, given) for asked, given in zip(size, shape, strict=True))


EAGER: dict[Any, Callable[..., Any]] = {
    aten.split.Tensor: _split,
    aten.split_with_sizes.default: _split,
    aten.expand.default: _expand,
    aten.repeat.default: _repeat,
    aten.view.default: _view,
}
