"""Operators on a `QuantizedKV`: see `tensor` for an overview.

`dispatch` receives the calls from PyTorch. Operators with a handler act on the packed form; all others read a
dequantized copy, and so does a call for which its handler returns ``NotImplemented``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map

from kvq_compile.kernels import ops
from kvq_compile.kernels.adaptive.originals import held_by_host
from kvq_compile.kernels.cache import ring
from kvq_compile.kernels.cache.batch import EAGER, sliced
from kvq_compile.kernels.cache.gathered import gather_later
from kvq_compile.kernels.cache.read_only import read_only
from kvq_compile.kernels.cache.rows import caches_of_rows, count_by_row_, why_not_by_row
from kvq_compile.kernels.cache.tensor import QuantizedKV, on
from kvq_compile.kernels.cache.views import alone
from kvq_compile.kernels.cache.writes import (
    GROWS_BY_CAT,
    check_in_sight,
    check_slots,
    check_writable,
    overwrite_,
)
from kvq_compile.kernels.packed import PARTS, part_names, widened, writable

aten = torch.ops.aten


def dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on the packed form if possible, else on dequantized copies.

    Raises:
        NotImplementedError: The operator would write into a copy.
    """
    handler = _HANDLERS.get(func)
    if handler is None and func in EAGER and not _is_traced(args):
        handler = EAGER[func]
    if handler is not None:
        result = handler(*args, **kwargs)
        if result is not NotImplemented:
            return result
    if func not in _HANDLERS:  # in inference mode composite operators are not decomposed
        result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
    if func._schema.is_mutable and _writes_into_cache(func, args, kwargs):
        given = kwargs.get("out", args[0] if args else None)
        if _is_traced((args, kwargs)):  # by Dynamo, whose graph is looked at before it runs
            if not func._schema.returns:
                return None
            if isinstance(given, QuantizedKV):
                return given
        cache = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, QuantizedKV))
        raise NotImplementedError(
            f"{func} must write whole slots, one behind the other, got {cache!r}; assign new tokens as "
            "cache[:, :, slots] = x, or write to cache.dequantize(), which is a copy"
        )
    if not _is_view(func):
        return func(*tree_map(_dense, args), **tree_map(_dense, kwargs))
    with writable():  # autograd relates a view to its base, which is no tensor of inference mode
        result = func(*tree_map(_dense, args), **tree_map(_dense, kwargs))
    if not any(isinstance(x, FakeTensor) for x in tree_leaves(result)):
        return tree_map(read_only, result)
    return result


def _is_traced(args: Any) -> bool:
    return any(
        isinstance(x, QuantizedKV) and isinstance(x.cursor, FakeTensor) for x in tree_leaves(args)
    )


def _dense(x: Any) -> Any:
    return x.dequantize() if isinstance(x, QuantizedKV) else x


def _dim(x: QuantizedKV, dim: int) -> int:
    return dim % x.dim()


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _writes_into_cache(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            if any(isinstance(x, QuantizedKV) for x in tree_leaves(value)):
                return True
    return False


def write(
    cache: QuantizedKV,
    x: Any,
    position: Tensor | None,
    start: int | None,
    count: int | torch.SymInt,
) -> None:
    """Write ``count`` tokens at the slots ``position`` or from ``start`` on."""
    if not isinstance(x, Tensor):
        x = cache.exact.new_full((1, 1, 1, 1), x)
    x = _dense(x).expand(*cache.shape[:2], count, cache.shape[3])
    if not isinstance(cache.cursor, FakeTensor):
        if count == 0:
            return
        check_writable(cache)
        first = check_slots(cache, position, start, int(count))
        x = x.to(cache.dtype)
        if cache.kind == "grown":
            assert first is not None
            first += cache.first
            with cache._lineage.overwritten(cache, first):
                ops.append_(cache.parts, cache.calibrated, x, None, first, cache.page_layout)
            return
        check_in_sight(cache, int(count))
        if cache.by_row and first is not None:
            for b, row in enumerate(caches_of_rows(cache)):
                write(row, x[b : b + 1], None, first, count)
            cache._lineage.counted = None
            return
        held = 0 if first is None else min(ring.count(cache), cache.shape[2])
        if first is not None and first + int(count) < held:
            overwrite_(cache, x, first, held)
            return
        cache._lineage.counted = None
    elif cache.kind == "grown":
        raise NotImplementedError(GROWS_BY_CAT)
    ops.append_(cache.parts, cache.calibrated, x, position, start, cache.page_layout)


def _cat(tensors: list[Tensor], dim: int = 0) -> Any:
    tensors = [t for t in tensors if not (t.dim() == 1 and t.shape[0] == 0)]
    first = tensors[0]
    if not isinstance(first, QuantizedKV):
        return NotImplemented
    if len(tensors) == 1:
        return first._view(first.shape[2]) if first.kind == "grown" else first.clone_packed()
    if _dim(first, dim) == 0 and all(
        isinstance(t, QuantizedKV)
        and t.page_layout == first.page_layout
        and t.shape[2] == first.shape[2]
        for t in tensors
    ):
        if not _aligned(tensors):
            return NotImplemented
        return _join_batches(tensors)  # type: ignore[arg-type]
    if _dim(first, dim) != 2 or first.kind != "grown":
        return NotImplemented
    new = torch.cat([_dense(t) for t in tensors[1:]], 2)
    if new.shape[:2] != first.shape[:2] or new.shape[3] != first.shape[3]:
        return NotImplemented  # torch raises the error
    dtype = torch.promote_types(first.dtype, new.dtype)
    if not dtype.is_floating_point:
        return NotImplemented
    if dtype != first.dtype:
        first = _to_copy(first, dtype=dtype)
    if isinstance(first.cursor, FakeTensor):
        return _appended(first, new)
    with alone([first]):
        first.claim(new.shape[2])
        return _appended(first, new)


def _appended(cache: QuantizedKV, new: Tensor) -> QuantizedKV:
    about = new.to(cache.dtype), None, cache.end, cache.page_layout
    ops.append_(cache.parts, cache.calibrated, *about)
    return cache.extended(new.shape[2])


def _join_batches(caches: list[QuantizedKV]) -> QuantizedKV:
    """Concatenate caches along the batch; they agree in everything else (`_aligned`)."""
    first = caches[0]
    tails = {"exact": first.page_layout.tail_rows}
    with writable():
        parts = [
            _join([getattr(cache, name) for cache in caches], tails.get(name, 0))
            for name in part_names(first.page_layout)
            if name != "cursor"
        ]
    parts.insert(PARTS.index("cursor"), _joined_cursor(caches))
    if first.originals is not None:
        parts[4] = held_by_host(parts[4], first.device)
    calibrated = first.calibrated
    if first.shift is not None:
        calibrated[1] = torch.cat([cache.shift for cache in caches])  # type: ignore[misc]
    about = first.page_layout, first.kind, first.shape[2]
    return QuantizedKV(parts, calibrated, *about, trim=first.trim)


def _joined_cursor(caches: list[QuantizedKV]) -> Tensor:
    """Return one length for all rows where caches are equally long, else one for each."""
    first = caches[0]
    if not first.by_row and all(torch.equal(cache.cursor, first.cursor) for cache in caches):
        return first.cursor.clone()
    return torch.cat([cache.cursor.expand(cache.shape[0], 2) for cache in caches])


def _join(parts: list[Tensor], tail: int) -> Tensor:
    """Concatenate a part of several caches along the batch; some may have more room than others."""
    most = max(part.shape[2] for part in parts)
    return torch.cat([widened(part, most, tail) for part in parts])


def _aligned(caches: list[Any]) -> bool:
    """Say whether caches agree in everything but their sequences, so that batches may be joined."""
    if any(isinstance(cache.cursor, FakeTensor) for cache in caches):
        return False
    first = caches[0]
    counts_rows = first.kind == "static" and why_not_by_row(first.page_layout) is None
    return all(
        (counts_rows or torch.equal(cache.cursor, first.cursor))
        and (cache.kind, cache.trim is None, cache.first)
        == (first.kind, first.trim is None, first.first)
        for cache in caches
    )


def _slice(x: QuantizedKV, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    size = x.shape[_dim(x, dim)]
    from_its_end = (
        start is not None and end is not None and _is_negative(start) and _is_negative(end)
    )
    start, end = _bound(start, 0, size), _bound(end, size, size)
    if step != 1:
        return NotImplemented
    if _same(start, 0) and _same(end, size):
        return x._view(x.shape[2])
    if _dim(x, dim) == 0:
        return sliced(x, start, end)
    if _dim(x, dim) != 2 or x.kind != "grown":
        return NotImplemented
    if _same(start, 0):
        return x._view(end)
    if not (_same(end, size) or from_its_end):  # else it is read, not kept
        return NotImplemented
    return x._view(end) if start < 0 else x.part(start, end)  # a guard, as slicing a tensor sets


def _bound(value: Any, default: Any, size: Any) -> Any:
    if value is None:
        return default
    if _is_negative(value):
        value = value + size
    if _is_known(value < 0):
        return 0
    # A slice without an end is handed over with the largest integer, which no symbolic size is known to be below.
    return size if _is_known(value == sys.maxsize) or _is_known(value > size) else value


def _is_known(condition: Any) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(condition))


def _is_negative(bound: Any) -> bool:
    """Return whether a bound counts from the end: a guard, as slicing a tensor sets, where it is an argument."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false

    return bool(guard_or_false(bound < 0))


def _same(a: Any, b: Any) -> bool:
    return _is_known(a == b)


def _index(x: QuantizedKV, indices: list[Tensor | None]) -> Any:
    if not isinstance(x, QuantizedKV) or any(i is not None for i in indices[1:]):
        return NotImplemented
    if indices[0].dim() != 1:  # type: ignore[union-attr]
        return NotImplemented
    return _gathered(x, lambda part: part[on(indices[0], part)])


def _index_select(x: QuantizedKV, dim: int, index: Tensor) -> Any:
    if not isinstance(x, QuantizedKV) or _dim(x, dim) != 0:
        return NotImplemented
    return _gathered(x, lambda part: part.index_select(0, on(index, part)))


def _gathered(x: QuantizedKV, change: Callable[[Tensor], Tensor]) -> QuantizedKV:
    if isinstance(x.cursor, FakeTensor):
        return x._map_batch(change)
    with alone([x]):
        later = gather_later(x, change)
        return x._map_batch(change) if later is None else later


def _index_copy(x: QuantizedKV, dim: int, index: Tensor, source: Tensor) -> Any:
    if not isinstance(x, QuantizedKV) or _dim(x, dim) != 2:
        return NotImplemented
    write(x, source, index.reshape(-1), None, index.numel())
    return x


def _index_copied(x: QuantizedKV, dim: int, index: Tensor, source: Tensor) -> Any:
    if not _goes_behind(x, index):
        return NotImplemented
    return _index_copy(x.clone_packed(), dim, index, source)


def _index_written(
    x: QuantizedKV, indices: list[Tensor | None], values: Tensor, accumulate: bool = False
) -> Any:
    if len(indices) != 3 or not _goes_behind(x, indices[2]):
        return NotImplemented
    return _index_put(x.clone_packed(), indices, values, accumulate)


def _goes_behind(x: Any, index: Tensor | None) -> bool:
    """Say whether slots are those behind the tokens of a static cache, so that a write to a copy changes no other."""
    if not isinstance(x, QuantizedKV) or x.kind == "grown" or isinstance(x.cursor, FakeTensor):
        return False
    if index is None or index.dim() > 1 or index.dtype == torch.bool:
        return False
    if x.by_row:
        return False
    places, held = index.reshape(-1).tolist(), x.held()
    return places == list(range(held, held + len(places)))


def _index_put(
    x: QuantizedKV, indices: list[Tensor | None], values: Tensor, accumulate: bool = False
) -> Any:
    if (
        not isinstance(x, QuantizedKV)
        or len(indices) != 3
        or indices[0] is not None
        or indices[1] is not None
    ):
        return NotImplemented
    position = indices[2]
    if accumulate or position is None or position.dim() != 1 or position.dtype == torch.bool:
        return NotImplemented
    write(x, values, position, None, position.shape[0])
    return x


def _copy(x: Any, source: Tensor, non_blocking: bool = False) -> Any:
    if not isinstance(x, QuantizedKV):
        return NotImplemented
    if not isinstance(x.cursor, FakeTensor):
        check_writable(x)
        if isinstance(source, QuantizedKV) and source.by_row and x.kind == "static":
            count_by_row_(x)
    if not _is_alike(x, source):
        if not _rolled(x, source):
            write(x, source, None, 0, x.shape[2])
        return x
    for mine, theirs in zip(x.parts, source.parts, strict=True):  # type: ignore[attr-defined]
        mine.copy_(theirs, non_blocking)
    if x.shift is not None:
        x.shift.copy_(source.shift, non_blocking)  # type: ignore[attr-defined]
    if not isinstance(x.cursor, FakeTensor):
        x._lineage.take(source._lineage)  # type: ignore[attr-defined]
        counted = source._lineage.counted  # type: ignore[attr-defined]
        known = x.by_row is source.by_row and not x._lineage.shared  # type: ignore[attr-defined]
        x._lineage.counted = counted if known else None
    return x


def _rolled(x: QuantizedKV, source: Tensor) -> bool:
    """Append what is new of ``source``, where it begins with this cache's own last tokens; say whether it does.

    So a static cache with a sliding window is written; its tokens are not quantized a second time.
    """
    if x.kind == "grown" or isinstance(x.cursor, FakeTensor) or isinstance(source, QuantizedKV):
        return False
    if x.by_row:
        return False
    held = x.held()
    shift = ring.shift_of(x.dequantize(), source, held)
    if shift is None:
        return False
    new = source[:, :, held - shift :]
    ring.append(x, new)
    return True


def _is_alike(x: QuantizedKV, source: Tensor) -> bool:
    return (
        isinstance(source, QuantizedKV)
        and (source.page_layout, source.kind, source.first) == (x.page_layout, x.kind, x.first)
        and source.shape == x.shape
        and [part.shape for part in source.parts[:3]] == [part.shape for part in x.parts[:3]]
        and (x.by_row or not source.by_row)
    )


def _zero(x: QuantizedKV) -> QuantizedKV:
    if x.kind == "grown" and not isinstance(x.cursor, FakeTensor):
        write(x, 0.0, None, 0, x.shape[2])
    else:
        if not isinstance(x.cursor, FakeTensor):
            check_writable(x)
            x._lineage.counted = None if x.by_row else 0
        x.cursor.zero_()
    return x


def _fill(x: QuantizedKV, value: Any) -> Any:
    if isinstance(x.cursor, FakeTensor):
        return NotImplemented
    number = float(value)
    if number == 0:
        return _zero(x)
    write(x, number, None, 0, x.shape[2])
    return x


def _clone(x: QuantizedKV, *, memory_format: Any = None) -> QuantizedKV:
    return x.clone_packed()


def _to_copy(
    x: QuantizedKV,
    *,
    dtype: Any = None,
    device: Any = None,
    non_blocking: bool = False,
    **rest: Any,
) -> Any:
    if dtype is not None and not dtype.is_floating_point:
        return NotImplemented

    def move(part: Tensor) -> Tensor:
        kind = dtype if part is x.exact or part is x.originals else None
        where = part.device if part is x.originals else device
        moved = part.to(device=where, dtype=kind, non_blocking=non_blocking, copy=True)
        return moved

    return x._map(move)


_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: lambda x: x._view(x.shape[2]),
    aten.alias.default: lambda x: x._view(x.shape[2]),
    aten.cat.default: _cat,
    aten.slice.Tensor: _slice,
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
    aten.index_copy_.default: _index_copy,
    aten.index_put_.default: _index_put,
    aten.index_copy.default: _index_copied,
    aten.index_put.default: _index_written,
    aten.copy_.default: _copy,
    aten.zero_.default: _zero,
    aten.fill_.Scalar: _fill,
    aten.fill_.Tensor: _fill,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
}
