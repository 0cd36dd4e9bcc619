"""`QuantizedKV`: a tensor that looks like ``[B, H, S, D]`` of the model's dtype and holds packed codes.

To model code, cache classes and Dynamo it is the key or value tensor of a layer. Inside it are the four
parts of `PageLayout`. Operations that a cache performs act on the packed form:

- writes (``cat`` of new tokens, ``index_copy_``, slice and index assignment, ``zero_``) quantize;
- operations along the batch (``index_select``, indexing, ``repeat_interleave``: beam search) gather parts;
- truncation, ``clone``, ``deepcopy``, ``to``, pickling keep the packed form;
- everything else reads: the tokens are dequantized into an ordinary tensor, which is correct and slow.
  A write that is not listed raises, since it would be lost in such a copy.

**Two kinds.** A *grown* cache has exactly as many slots as tokens, and ``cat`` returns a longer view of the
same memory; capacity grows in pages. A *static* cache has a fixed number of slots.

**Views of one memory.** Views of different length share their parts, and each is a prefix of the longest.
Appending to a view that is not the longest alive copies first, so that what a longer view holds is never
overwritten; when no longer view is alive the surplus is forgotten in place, which makes a speculative
reject cost nothing. A token seen through an older view may change once, from its exact value to its
quantized one, when it leaves the window.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

from kvq_compile.kernels import ops
from kvq_compile.kernels.spec import PageLayout

Kind = Literal["grown", "static"]
aten = torch.ops.aten


class _Lineage:
    """The views of one memory, and how many tokens the longest of them has written."""

    def __init__(self, held: int) -> None:
        self.held = held
        self._views: list[weakref.ref[QuantizedKV]] = []

    def add(self, view: QuantizedKV) -> None:
        self._views = [ref for ref in self._views if ref() is not None]
        self._views.append(weakref.ref(view))

    def others(self, view: QuantizedKV) -> list[QuantizedKV]:
        alive = (ref() for ref in self._views)
        return [other for other in alive if other is not None and other is not view]


class QuantizedKV(Tensor):
    """Keys or values of one layer, quantized.

    Build one with `QuantizedKV.from_dense`; ``QuantizedKV(...)`` wraps existing parts.

    Attributes:
        codes, params, exact, cursor: The parts, as `PageLayout` describes them.
        page_layout: Their layout.
        kind: ``"grown"`` or ``"static"``.
    """

    codes: Tensor
    params: Tensor
    exact: Tensor
    cursor: Tensor
    page_layout: PageLayout
    kind: Kind

    @staticmethod
    def __new__(
        cls,
        codes: Tensor,
        params: Tensor,
        exact: Tensor,
        cursor: Tensor,
        layout: PageLayout,
        kind: Kind,
        length: int,
        lineage: _Lineage | None = None,
    ) -> QuantizedKV:
        B, H, _, D = exact.shape
        shape = (B, H, length, D)
        self: QuantizedKV = Tensor._make_wrapper_subclass(
            cls, shape, dtype=exact.dtype, device=exact.device
        )
        self.codes, self.params, self.exact, self.cursor = codes, params, exact, cursor
        self.page_layout, self.kind = layout, kind
        if not isinstance(cursor, FakeTensor):
            for part, page_axis in ((codes, 2), (params, 2)):
                if kind == "grown":
                    torch._dynamo.maybe_mark_dynamic(part, page_axis)
            self._lineage = lineage or _Lineage(int(length))
            self._lineage.add(self)
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def from_dense(
        cls, x: Tensor, layout: PageLayout, *, kind: Kind = "grown", length: int | None = None
    ) -> QuantizedKV:
        """Quantize the first ``length`` (default: all) tokens of ``x`` ``[B, H, S, D]``.

        A static cache gets as many slots as ``x`` has, a grown one as many as it has tokens.
        """
        tokens = x.shape[2] if length is None else length
        slots = x.shape[2] if kind == "static" else tokens
        parts = ops.quantize(x[:, :, :tokens], slots, kind == "grown", layout.token)
        return cls(*parts, layout, kind, slots)

    @property
    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The four parts, in the order of `ops.PARTS`."""
        return self.codes, self.params, self.exact, self.cursor

    def dequantize(self) -> Tensor:
        """Return the tokens as an ordinary tensor ``[B, H, S, D]``; empty slots are zero."""
        return ops.dequantize(*self.parts, self.shape[2], self.page_layout.token)

    def held(self) -> int:
        """Return how many tokens the cache holds; waits for the device if the cache is static."""
        return int(self.cursor[0]) if self.kind == "static" else self.shape[2]

    def part_bytes(self) -> dict[str, int]:
        """Return the bytes of each part's storage."""
        return {name: getattr(self, name).untyped_storage().nbytes() for name in ops.PARTS}

    def claim(self, tokens: int) -> None:
        """Make this view the longest of its memory, with room for ``tokens`` more; copies only if it must."""
        if any(view.shape[2] > self.shape[2] for view in self._lineage.others(self)):
            self._fork(tokens)
        elif self._lineage.held > self.shape[2]:
            if self.device.type == "cpu":
                from kvq_compile.kernels import reference

                reference.truncate_(*self.parts, self.shape[2], self.page_layout)
            else:
                nothing = self.exact[:, :, :0]
                ops.append_(*self.parts, nothing, None, self.shape[2], self.page_layout.token)
            self._lineage.held = self.shape[2]
        if self.page_layout.pages_at(self.shape[2] + tokens) > self.codes.shape[2]:
            if self._lineage.others(self):
                self._fork(tokens)
            else:
                self._grow(tokens)

    def _grow(self, tokens: int) -> None:
        capacity = ops.page_capacity(self.shape[2] + tokens, True, self.page_layout)
        for name in ("codes", "params"):
            old = getattr(self, name)
            new = old.new_zeros(*old.shape[:2], capacity, *old.shape[3:])
            new[:, :, : old.shape[2]] = old
            torch._dynamo.maybe_mark_dynamic(new, 2)
            setattr(self, name, new)

    def _fork(self, tokens: int) -> None:
        copy = self.clone_packed()
        for name in ops.PARTS:
            setattr(self, name, getattr(copy, name))
        self._lineage = _Lineage(copy._lineage.held)
        self._lineage.add(self)
        self.claim(tokens)

    def extended(self, tokens: int) -> QuantizedKV:
        """Return the view that also shows ``tokens`` just appended behind this one."""
        length = self.shape[2] + tokens
        if isinstance(self.cursor, FakeTensor):
            return QuantizedKV(*self.parts, self.page_layout, self.kind, length)
        self._lineage.held = int(length)
        return QuantizedKV(*self.parts, self.page_layout, self.kind, length, self._lineage)

    def clone_packed(self) -> QuantizedKV:
        """Return a copy that shares no memory."""
        return self._map(lambda part: part.clone())

    def _map(self, change: Callable[[Tensor], Tensor]) -> QuantizedKV:
        lineage = None
        if not isinstance(self.cursor, FakeTensor):
            lineage = _Lineage(self._lineage.held)
        return QuantizedKV(*map(change, self.parts), self.page_layout, self.kind, self.shape[2], lineage)

    def _map_batch(self, change: Callable[[Tensor], Tensor]) -> QuantizedKV:
        return self._map(lambda part: part.clone() if part is self.cursor else change(part))

    def _view(self, length: int) -> QuantizedKV:
        lineage = None if isinstance(self.cursor, FakeTensor) else self._lineage
        return QuantizedKV(*self.parts, self.page_layout, self.kind, length, lineage)

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return (
            f"QuantizedKV({list(self.shape)}, {self.page_layout.bits}-bit {self.page_layout.role}s, {self.kind}, "
            f"dtype={self.dtype}, device={self.device})"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedKV:
        copy: QuantizedKV = memo.setdefault(id(self), self.clone_packed())
        return copy

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return rebuild, (*self.parts, self.page_layout.token, self.kind, int(self.shape[2]))

    def __setitem__(self, index: Any, x: Any) -> None:
        index = index if isinstance(index, tuple) else (index,)
        full = slice(None)
        if len(index) not in (3, 4) or any(i != full for i in (*index[:2], *index[3:])):
            raise NotImplementedError(
                f"a QuantizedKV can be assigned along its tokens only, as cache[:, :, positions] = x, got {index}"
            )
        slots, start, position = index[2], None, None
        if isinstance(slots, slice):
            if slots.step not in (None, 1):
                raise NotImplementedError(f"slot slices must have step 1, got {slots}")
            start = slots.start or 0
        elif isinstance(slots, Tensor) and slots.dtype in (torch.int64, torch.int32) and slots.dim() == 1:
            position = slots
        else:
            raise NotImplementedError(f"slots must be a slice or a vector of positions, got {slots!r}")
        _write(self, x, position, start)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(ops.PARTS), (self.page_layout, self.kind)

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], meta: Any, outer_size: Any, outer_stride: Any
    ) -> QuantizedKV:
        layout, kind = meta
        return QuantizedKV(*(inner[name] for name in ops.PARTS), layout, kind, outer_size[2])

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        handler = _HANDLERS.get(func)
        if handler is not None:
            result = handler(*args, **kwargs)
            if result is not NotImplemented:
                return result
        if func._schema.is_mutable and any(
            isinstance(value, QuantizedKV)
            for value, argument in zip(args, func._schema.arguments, strict=False)
            if argument.alias_info is not None and argument.alias_info.is_write
        ):
            raise NotImplementedError(f"{func} cannot write into a QuantizedKV; write to its dequantize() instead")
        return func(*tree_map(_dense, args), **tree_map(_dense, kwargs))


def rebuild(
    codes: Tensor, params: Tensor, exact: Tensor, cursor: Tensor, layout: str, kind: Kind, length: int
) -> QuantizedKV:
    """Wrap unpickled parts."""
    lineage = _Lineage(int(cursor[0]))
    return QuantizedKV(codes, params, exact, cursor, PageLayout.parse(layout), kind, length, lineage)


torch.serialization.add_safe_globals([rebuild])


def _dense(x: Any) -> Any:
    return x.dequantize() if isinstance(x, QuantizedKV) else x


def _dim(x: QuantizedKV, dim: int) -> int:
    return dim % x.dim()


def _write(cache: QuantizedKV, x: Tensor, position: Tensor | None, start: int | None) -> None:
    if cache.kind == "grown":
        raise NotImplementedError("a grown QuantizedKV takes new tokens by torch.cat, not by assignment")
    count = x.shape[2] if position is None else position.shape[0]
    shape = (*cache.shape[:2], count, cache.shape[3])
    ops.append_(*cache.parts, _dense(x).expand(shape), position, start, cache.page_layout.token)


def _cat(tensors: list[Tensor], dim: int = 0) -> Any:
    tensors = [t for t in tensors if not (t.dim() == 1 and t.shape[0] == 0)]
    first = tensors[0]
    if not isinstance(first, QuantizedKV):
        return NotImplemented
    if len(tensors) == 1:
        return first._view(first.shape[2])
    if _dim(first, dim) == 0 and all(
        isinstance(t, QuantizedKV) and t.page_layout == first.page_layout and t.shape[2] == first.shape[2] for t in tensors
    ):
        parts = [torch.cat([getattr(t, name) for t in tensors]) for name in ops.PARTS[:3]] if _aligned(tensors) else None
        if parts is None:
            return NotImplemented
        return QuantizedKV(*parts, first.cursor.clone(), first.page_layout, first.kind, first.shape[2])
    if _dim(first, dim) != 2 or first.kind != "grown":
        return NotImplemented
    new = torch.cat([_dense(t) for t in tensors[1:]], 2)
    if not isinstance(first.cursor, FakeTensor):
        first.claim(new.shape[2])
    ops.append_(*first.parts, new.to(first.dtype), None, first.shape[2], first.page_layout.token)
    return first.extended(new.shape[2])


def _aligned(caches: list[Any]) -> bool:
    """Say whether caches agree in everything but their sequences, so that batches may be joined."""
    if any(isinstance(cache.cursor, FakeTensor) for cache in caches):
        return False
    first = caches[0]
    return all(
        torch.equal(cache.cursor, first.cursor) and cache.codes.shape[2] == first.codes.shape[2] for cache in caches
    )


def _slice(x: QuantizedKV, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> Any:
    size = x.shape[_dim(x, dim)]
    start, end = _bound(start, 0, size), _bound(end, size, size)
    if step != 1:
        return NotImplemented
    if _same(start, 0) and _same(end, size):
        return x._view(x.shape[2])
    if _dim(x, dim) == 0:
        return x._map_batch(lambda part: part[start:end].clone())
    if _dim(x, dim) == 2 and _same(start, 0) and x.kind == "grown":
        return x._view(end)
    return NotImplemented


def _bound(value: Any, default: Any, size: Any) -> Any:
    if value is None:
        return default
    if _is_known(value < 0):
        value = value + size
    return size if _is_known(value > size) else value


def _is_known(condition: Any) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return bool(statically_known_true(condition))


def _same(a: Any, b: Any) -> bool:
    return _is_known(a == b)


def _index(x: QuantizedKV, indices: list[Tensor | None]) -> Any:
    if not isinstance(x, QuantizedKV) or any(i is not None for i in indices[1:]):
        return NotImplemented
    return x._map_batch(lambda part: part[indices[0]]) if indices[0].dim() == 1 else NotImplemented  # type: ignore[union-attr]


def _index_select(x: QuantizedKV, dim: int, index: Tensor) -> Any:
    if not isinstance(x, QuantizedKV) or _dim(x, dim) != 0:
        return NotImplemented
    return x._map_batch(lambda part: part.index_select(0, index))


def _index_copy(x: QuantizedKV, dim: int, index: Tensor, source: Tensor) -> QuantizedKV:
    if not isinstance(x, QuantizedKV) or _dim(x, dim) != 2:
        raise NotImplementedError("index_copy_ writes a QuantizedKV along its tokens (dimension 2) only")
    _write(x, source, index, None)
    return x


def _index_put(x: QuantizedKV, indices: list[Tensor | None], values: Tensor, accumulate: bool = False) -> Any:
    if not isinstance(x, QuantizedKV) or len(indices) != 3 or indices[0] is not None or indices[1] is not None:
        return NotImplemented
    if accumulate or indices[2] is None:
        return NotImplemented
    _write(x, values, indices[2], None)
    return x


def _copy(x: Any, source: Any, non_blocking: bool = False) -> Any:
    if not isinstance(x, QuantizedKV):
        return NotImplemented
    if isinstance(source, QuantizedKV) and source.page_layout == x.page_layout and source.kind == x.kind:
        for mine, theirs in zip(x.parts, source.parts, strict=True):
            mine.copy_(theirs, non_blocking)
        return x
    _write(x, source, None, 0)
    return x


def _zero(x: QuantizedKV) -> QuantizedKV:
    x.cursor.zero_()
    if not isinstance(x.cursor, FakeTensor):
        x._lineage.held = 0
    return x


def _clone(x: QuantizedKV, *, memory_format: Any = None) -> QuantizedKV:
    return x.clone_packed()


def _to_copy(x: QuantizedKV, *, dtype: Any = None, device: Any = None, non_blocking: bool = False, **rest: Any) -> Any:
    def move(part: Tensor) -> Tensor:
        kind = dtype if part is x.exact else None
        moved = part.to(device=device, dtype=kind, non_blocking=non_blocking, copy=True)
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
    aten.copy_.default: _copy,
    aten.zero_.default: _zero,
    aten.clone.default: _clone,
    aten._to_copy.default: _to_copy,
}
