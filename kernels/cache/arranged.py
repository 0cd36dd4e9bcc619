"""`ArrangedKV`: a tensor in a model's own layout whose tokens are packed.

`QuantizedKV` looks like ``[B, H, S, D]``. A model that keeps its keys as ``[B, S, H, D]``, say, goes on to see that: an
`ArrangedKV` has the shape of the tensor it replaces and holds the caches ``[B, H, S, D]`` that this stands for
(`arrangement`). What a cache does along its axes, this does along its own: ``cat`` along the tokens takes new ones,
indexing along the batch gathers, whole tokens are assigned. Everything else reads: the tokens are dequantized.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_leaves, tree_map

from kvq_compile.kernels.cache.arrangement import AXES, Arrangement
from kvq_compile.kernels.cache.exports import Exports
from kvq_compile.kernels.cache.read_only import read_only
from kvq_compile.kernels.cache.saved import rebuild_arranged
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.kernels.packed import writable

aten = torch.ops.aten
PREFIX = "cache_"


class ArrangedKV(Exports, Tensor):
    """Caches of one tensor of a model, quantized, seen in the model's layout.

    Attributes:
        caches: The caches, ``[B, H, S, D]``.
        arrangement: Where their axes lie in this tensor.
    """

    caches: tuple[QuantizedKV, ...]
    arrangement: Arrangement

    @staticmethod
    def __new__(
        cls, caches: Sequence[QuantizedKV], arrangement: Arrangement, size: Any = None
    ) -> ArrangedKV:
        """Wrap caches of one shape; ``size``: the sizes of the tensor, as tracing names them.

        Raises:
            ValueError: They are not as many, or not as long as one another.
        """
        first = caches[0]
        if len(caches) != arrangement.pieces:
            raise ValueError(
                f"caches must be the {arrangement.pieces} of {arrangement}, got {len(caches)}"
            )
        if len({(cache.kind, cache.dtype, cache.device) for cache in caches}) > 1:
            raise ValueError("caches must be of one kind, dtype and device, got several")
        with writable():
            self: ArrangedKV = Tensor._make_wrapper_subclass(
                cls, size or arrangement.shape(first.shape), dtype=first.dtype, device=first.device
            )
        self.caches, self.arrangement = tuple(caches), arrangement
        if not isinstance(first.cursor, FakeTensor) and first.kind == "grown":
            torch._dynamo.maybe_mark_dynamic(self, arrangement.axis("S"))
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def dequantize(self) -> Tensor:
        """Return the tokens as an ordinary tensor in the model's layout; empty slots are zero."""
        return self.arrangement.join([cache.dequantize() for cache in self.caches]).contiguous()

    def _dense(self) -> Tensor:
        return self.dequantize()

    def _held(self) -> list[Tensor]:
        return [part for cache in self.caches for part in cache._held()]

    def map(self, change: Callable[[QuantizedKV], QuantizedKV]) -> ArrangedKV:
        """Return the tensor of changed caches."""
        return ArrangedKV([change(cache) for cache in self.caches], self.arrangement)

    def __getattr__(self, name: str) -> Any:
        number, _, part = name.removeprefix(PREFIX).partition("_")
        if not name.startswith(PREFIX) or not number.isdecimal() or "caches" not in self.__dict__:
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        cache = self.caches[int(number)]
        return getattr(cache, part) if part else cache

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"ArrangedKV({list(self.shape)} as {self.arrangement} of {self.caches[0]!r})"

    def __copy__(self) -> ArrangedKV:
        return self.map(lambda cache: cache.__copy__())

    def __deepcopy__(self, memo: dict[int, Any]) -> ArrangedKV:
        copy: ArrangedKV = memo.setdefault(id(self), self.map(QuantizedKV.clone_packed))
        return copy

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        how = self.arrangement
        about = how.axes, how.sizes, how.heads
        return rebuild_arranged, (list(self.caches), *about)

    def __getitem__(self, index: Any) -> Tensor:
        read = super().__getitem__(index)
        if isinstance(read, ArrangedKV):
            return read.__copy__()  # autograd would keep the longer one alive
        is_read = type(read) is Tensor and not isinstance(self.caches[0].cursor, FakeTensor)
        return read_only(read) if is_read else read

    def __setitem__(self, index: Any, x: Any) -> None:
        if not isinstance(
            self.caches[0].cursor, FakeTensor
        ):  # of Dynamo: its graph is looked at before it runs
            _assign(self, index, x)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        told = [cache.__tensor_flatten__() for cache in self.caches]
        names = [f"{PREFIX}{number}_{name}" for number, (own, _) in enumerate(told) for name in own]
        return names, (self.arrangement, tuple((tuple(own), meta) for own, meta in told))

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], meta: Any, outer_size: Any, outer_stride: Any
    ) -> ArrangedKV:
        arrangement, told = meta
        slots = outer_size[arrangement.axis("S")]
        caches = []
        for number, (names, own) in enumerate(told):
            parts = {name: inner[f"{PREFIX}{number}_{name}"] for name in names}
            size = (0, 0, slots, 0)  # of which only the slots are read
            caches.append(QuantizedKV.__tensor_unflatten__(parts, own, size, outer_stride))
        # Sizes of axes that share one would be products of symbols, which Dynamo cannot name.
        named = outer_size if any(isinstance(size, torch.SymInt) for size in outer_size) else None
        return ArrangedKV(caches, arrangement, named)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return _dispatch(func, args, kwargs or {})


def _dispatch(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run an operator on the caches if it is one of theirs, else on dequantized copies.

    Raises:
        NotImplementedError: The operator would write into a copy.
    """
    handler = _HANDLERS.get(func)
    if handler is not None:
        result = handler(func, *args, **kwargs)
        if result is not NotImplemented:
            return result
    if func not in _HANDLERS:  # in inference mode composite operators are not decomposed
        result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
    written = _written(func, args, kwargs)
    if written is not None:
        if isinstance(written.caches[0].cursor, FakeTensor) and written is args[0]:
            return written  # to Dynamo, whose graph is looked at before it runs
        raise _lost(func, written)
    is_view = any(
        r.alias_info is not None and not r.alias_info.is_write for r in func._schema.returns
    )
    with writable():  # autograd relates a view to its base, which is no tensor of inference mode
        result = func(*tree_map(_dense, args), **tree_map(_dense, kwargs))
    traced = any(isinstance(x, FakeTensor) for x in tree_leaves(result))
    return tree_map(read_only, result) if is_view and not traced else result


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> ArrangedKV | None:
    """Return the caches that an operator writes into, if any."""
    for place, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            for x in tree_leaves(value):
                if isinstance(x, ArrangedKV):
                    return x
    return None


def _lost(func: Any, cache: ArrangedKV) -> NotImplementedError:
    return NotImplementedError(
        f"{func} must write whole tokens, one behind the other, got {cache!r}; assign new tokens along "
        f"axis {cache.arrangement.axis('S')}, or write to cache.dequantize(), which is a copy"
    )


def _dense(x: Any) -> Any:
    return x.dequantize() if isinstance(x, ArrangedKV) else x


def _axis_of_caches(x: Any, dim: int) -> int | None:
    """Return the axis of the caches that an axis of a tensor is; ``None`` if it is none, and for a plain tensor."""
    if not isinstance(x, ArrangedKV):
        return None
    name = x.arrangement.groups[dim % x.dim()]
    return AXES.index(name) if len(name) == 1 and name in AXES else None


def _assign(cache: ArrangedKV, index: Any, x: Any) -> None:
    """Write whole tokens: ``cache[..., slots, ...] = x``, at the axis of the tokens; of some rows, if that is asked."""
    index = index if isinstance(index, tuple) else (index,)
    places = [at for at, part in enumerate(index) if part is Ellipsis]
    at = places[0] if places else len(index)
    rest = index[at + 1 :]
    full = [slice(None)] * (cache.dim() - len(index[:at]) - len(rest))
    index, tokens = (*index[:at], *full, *rest), cache.arrangement.axis("S")
    slots = index[tokens] if len(index) == cache.dim() else None
    batch = cache.arrangement.axis("B")
    rows = index[batch] if slots is not None and cache.arrangement.groups[batch] == "B" else None
    apart = (tokens, batch) if isinstance(rows, slice) and rows.step in (None, 1) else (tokens,)
    whole = (part == slice(None) for dim, part in enumerate(index) if dim not in apart)
    if not all(isinstance(part, bool) and part for part in whole) or slots is None:
        raise _lost("an assignment", cache)
    if isinstance(slots, Tensor) and slots.dim() == 0 and slots.dtype != torch.bool:
        slots = int(slots)
    if isinstance(slots, int) and isinstance(x, Tensor) and x.dim() == cache.dim() - 1:
        x = x.unsqueeze(tokens)
    if isinstance(slots, int):
        slots %= cache.shape[tokens]
        slots = slice(slots, slots + 1)
    taken: slice = rows if isinstance(rows, slice) else slice(None)
    shape = list(cache.shape)
    shape[batch] = len(range(shape[batch])[taken])
    _write(cache, x, lambda each, new: each.__setitem__((taken, slice(None), slots), new), shape)


def _write(
    cache: ArrangedKV,
    x: Any,
    write: Callable[[QuantizedKV, Any], None],
    shape: list[int] | None = None,
) -> None:
    """Write ``x`` into each of the caches, or into that ``shape`` of it; nothing is written unless each can take it."""
    if not isinstance(x, Tensor):
        x = cache.caches[0].exact.new_full((1,) * cache.dim(), x)
    shape = list(cache.shape) if shape is None else shape
    tokens = cache.arrangement.axis("S")
    shape[tokens] = x.shape[tokens] if x.dim() == cache.dim() else 1
    for each, new in zip(cache.caches, cache.arrangement.split(x.expand(shape)), strict=True):
        write(each, new)


def _each(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    return _joined(x, [func(cache, *args, **kwargs) for cache in x.caches])


def _joined(x: ArrangedKV, caches: list[Any]) -> Any:
    """Return the tensor of what an operator made of the caches, if that is caches still."""
    if not all(isinstance(cache, QuantizedKV) for cache in caches):
        return NotImplemented
    return ArrangedKV(caches, x.arrangement)


def _in_place(func: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
    for cache in x.caches:
        func(cache, *args, **kwargs)
    return x


def _cat(func: Any, tensors: list[Tensor], dim: int = 0) -> Any:
    tensors = [tensor for tensor in tensors if not (tensor.dim() == 1 and tensor.shape[0] == 0)]
    first = tensors[0]
    axis = _axis_of_caches(first, dim)
    if not isinstance(first, ArrangedKV) or axis not in (0, 2):
        return NotImplemented
    if isinstance(first.caches[0].cursor, FakeTensor):
        return NotImplemented  # the graph shows what is joined
    rest = [_split(tensor, first) for tensor in tensors[1:]]
    if any(pieces is None for pieces in rest):
        return NotImplemented
    joined = [
        func([cache, *(pieces[number] for pieces in rest)], axis)  # type: ignore[index]
        for number, cache in enumerate(first.caches)
    ]
    return _joined(first, joined)


def _split(x: Tensor, like: ArrangedKV) -> Sequence[Tensor] | None:
    if isinstance(x, ArrangedKV):
        return x.caches if x.arrangement == like.arrangement else like.arrangement.split(_dense(x))
    if x.dim() != like.dim():
        return None  # torch raises the error
    return like.arrangement.split(x)


def _along(func: Any, x: Any, dim: int, *args: Any, **kwargs: Any) -> Any:
    """Run an operator along an axis of the caches, where they stay packed."""
    axis = _axis_of_caches(x, dim)
    if axis is None or isinstance(x.caches[0].cursor, FakeTensor):
        return NotImplemented
    return _joined(x, [func(cache, axis, *args, **kwargs) for cache in x.caches])


def _slice(func: Any, x: Any, dim: int = 0, *args: Any, **kwargs: Any) -> Any:
    return _along(func, x, dim, *args, **kwargs)


def _index(func: Any, x: Any, indices: list[Tensor | None]) -> Any:
    if not isinstance(x, ArrangedKV):
        return NotImplemented
    batch = x.arrangement.axis("B")
    others = [i for at, i in enumerate(indices) if at != batch and i is not None]
    if others or len(indices) <= batch or indices[batch].dim() != 1:  # type: ignore[union-attr]
        return NotImplemented
    return _along(aten.index_select.default, x, batch, _numbers(indices[batch]))


def _numbers(index: Any) -> Tensor:
    """Return an index as numbers of rows."""
    found: Tensor = index.nonzero().reshape(-1) if index.dtype == torch.bool else index
    return found


def _index_copy(func: Any, x: Any, dim: int, index: Tensor, source: Tensor) -> Any:
    if not isinstance(x, ArrangedKV) or _axis_of_caches(x, dim) != 2:
        return NotImplemented
    if isinstance(x.caches[0].cursor, FakeTensor):
        return x
    _write(x, source, lambda each, new: func(each, 2, index, new))
    return x


def _index_put(
    func: Any, x: Any, indices: list[Tensor | None], values: Tensor, accumulate: bool = False
) -> Any:
    if not isinstance(x, ArrangedKV) or isinstance(x.caches[0].cursor, FakeTensor):
        return x if isinstance(x, ArrangedKV) else NotImplemented
    tokens = x.arrangement.axis("S")
    if accumulate or [at for at, i in enumerate(indices) if i is not None] != [tokens]:
        return NotImplemented
    given = None, None, indices[tokens]
    _write(x, values, lambda each, new: func(each, list(given), new, accumulate))
    return x


def _copy(func: Any, x: Any, source: Tensor, non_blocking: bool = False) -> Any:
    if not isinstance(x, ArrangedKV) or isinstance(x.caches[0].cursor, FakeTensor):
        return x if isinstance(x, ArrangedKV) else NotImplemented
    pieces = _split(source.expand(x.shape) if type(source) is Tensor else source, x)
    for cache, piece in zip(x.caches, pieces or (), strict=True):
        func(cache, piece, non_blocking)
    return x


_HANDLERS: dict[Any, Callable[..., Any]] = {
    aten.detach.default: _each,
    aten.alias.default: _each,
    aten.clone.default: lambda func, x, *, memory_format=None: x.map(QuantizedKV.clone_packed),
    aten._to_copy.default: _each,
    aten.zero_.default: _in_place,
    aten.fill_.Scalar: _in_place,
    aten.fill_.Tensor: _in_place,
    aten.cat.default: _cat,
    aten.slice.Tensor: _slice,
    aten.index.Tensor: _index,
    aten.index_select.default: _along,
    aten.index_copy_.default: _index_copy,
    aten.index_put_.default: _index_put,
    aten.copy_.default: _copy,
}
