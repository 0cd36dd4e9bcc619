"""`QuantizedKV`: a tensor that looks like ``[B, H, S, D]`` of the model's dtype and holds packed codes.

Model code, cache classes and Dynamo see the key or value tensor of a layer. Inside are the parts of `Layout`.
The operations of a KV cache act on the packed form:

- writes (``cat`` of new tokens, ``index_copy_``, slice and index assignment, ``zero_``) quantize;
- operations along the batch (``index_select``, indexing, ``repeat_interleave``: beam search) gather parts (`gathered`);
- truncation, ``clone``, ``deepcopy``, ``to``, pickling keep the packed form;
- everything else reads: the tokens are dequantized into an ordinary tensor, which is correct and slow.
  A write that is not listed raises, since it would be lost in such a copy; so does a write into a view,
  such as ``cache[:, :, 3:5].zero_()``, outside compiled code (`ReadOnlyTokens`).

**Three kinds.** A dynamic cache (kind ``"grown"``) has exactly as many slots as tokens, and ``cat`` returns a longer
view of the same memory; capacity grows with the tokens. A *static* cache has a fixed number of slots. Tokens are
written at consecutive positions; outside graphs a write at earlier slots leaves those behind it (`writes`).
A *ring* is a static cache that shows the last tokens of its memory: what joins it behind its last slot puts its first
out of sight (`ring`).

`views` explains which caches share memory, `exports` the ways out of PyTorch, `saved` and `checks` files.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from multiprocessing.reduction import ForkingPickler
from types import EllipsisType
from typing import Any, Literal

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kvq_compile.kernels import ops
from kvq_compile.kernels.adaptive.originals import held_by_host
from kvq_compile.kernels.cache.checks import check_loaded
from kvq_compile.kernels.cache.exports import Exports, send_by_copy
from kvq_compile.kernels.cache.gathered import SETTLING, gather
from kvq_compile.kernels.cache.read_only import read_only
from kvq_compile.kernels.cache.ring import last_slots, slots_for
from kvq_compile.kernels.cache.rows import count_by_row_, fill_rows_
from kvq_compile.kernels.cache.saved import FORMAT, plain_layout, rebuild
from kvq_compile.kernels.cache.slices import PartOf
from kvq_compile.kernels.cache.trim import TRIM, new_trim
from kvq_compile.kernels.cache.views import Lineage, Views
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import (
    CALIBRATED,
    FLAT,
    ORIGINALS,
    PARTS,
    Calibrated,
    Packed,
    calibrated_names,
    flat,
    paged,
    part_names,
    room_of,
    writable,
)

Kind = Literal["grown", "static", "ring"]
HELD = (*PARTS, *CALIBRATED, ORIGINALS)
INNER = (*HELD, TRIM)
FORM = "_form"  # the attribute that keeps what `form_of` has found
OF_FORM = frozenset((*HELD, "page_layout", "kind"))  # what that depends on
OF_EACH = {
    *(*INNER, "page_layout", "kind", "_lineage", "_length", FORM),
    *("_dynamo_weak_dynamic_indices", "_has_dynamo_dim_marking"),  # of `maybe_mark_dynamic`
}  # what every dynamic cache has, once its form was asked for
ATTRIBUTES = {*OF_EACH, "_is_slice_copy", "_part_of"}


class QuantizedKV(Views, Exports, Tensor):
    """Keys or values of one layer, quantized.

    Build one with `QuantizedKV.from_dense`; ``QuantizedKV(...)`` wraps existing parts.

    Attributes:
        codes, params, exact, cursor: The parts, as `packed` describes them.
        tables, shift: What packed tokens are coded relative to, where the layout has it, else ``None``.
            Caches of a layer share their tables.
        originals: Exact packed tokens in host memory, flat pages, where the layout keeps them, else ``None``.
        trim: Of a dynamic cache that forgets its first tokens, a tensor without elements whose size says how many
            slots of the memory are out of sight; else ``None``.
        page_layout: Their layout.
        kind: ``"grown"``, ``"static"`` or ``"ring"``.
    """

    codes: Tensor
    params: Tensor
    exact: Tensor
    cursor: Tensor
    tables: Tensor | None
    shift: Tensor | None
    originals: Tensor | None
    trim: Tensor | None
    page_layout: Layout
    kind: Kind
    _lineage: Lineage
    _length: int  # its slots, as a number that is read faster than a size; not while it is traced
    _is_slice_copy = False  # stands for a view along the batch, which compiled calls cannot write
    _part_of: PartOf | None = None  # of a static cache, whose memory it shares

    @staticmethod
    def __new__(
        cls,
        parts: Sequence[Tensor],
        calibrated: Sequence[Tensor],
        layout: Layout,
        kind: Kind,
        length: int,
        lineage: Lineage | None = None,
        trim: Tensor | None = None,
    ) -> QuantizedKV:
        """Wrap the parts that `part_names` lists as a tensor of ``length`` slots.

        ``calibrated`` is what `Calibrated` lists and the layout has; ``lineage`` names the memory that views share,
        ``trim`` the slots of it before the first of this view (`trim`).

        Raises:
            ValueError: There are more tensors, or fewer, than the layout says.
        """
        names = part_names(layout)
        if len(parts) != len(names):
            raise ValueError(
                f"parts must be [{', '.join(names)}] for {layout}, got {len(parts)} tensors"
            )
        with writable():
            if kind == "grown" and parts[0].dim() != FLAT:
                parts = flat(parts, layout)
            codes, params, exact, cursor = (_outside_inference(part) for part in parts[:4])
            originals = _outside_inference(parts[4]) if layout.keep_exact else None
            B, H, _, D = exact.shape
            shape = (B, H, length, D)
            self: QuantizedKV = Tensor._make_wrapper_subclass(
                cls, shape, dtype=exact.dtype, device=exact.device
            )
        self.codes, self.params, self.exact, self.cursor = codes, params, exact, cursor
        self.page_layout, self.kind = layout, kind
        self.tables, self.shift = Calibrated.of(calibrated, layout)[:2]
        self.originals, self.trim = originals, trim
        if not isinstance(cursor, FakeTensor):
            for part in (codes, params, exact, originals):
                if kind == "grown" and part is not None:
                    torch._dynamo.maybe_mark_dynamic(part, 2)
            if trim is not None:
                torch._dynamo.maybe_mark_dynamic(trim, 0)
            elif kind == "grown":
                torch._dynamo.maybe_mark_dynamic(self, 2)
            self._length = int(length)
            self._lineage = lineage or Lineage(int(self.end), layout.pages_at(int(self.end)))
            self._lineage.add(self)
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def __setattr__(self, name: str, value: Any) -> None:
        if name in OF_FORM:
            self.__dict__.pop(FORM, None)
        super().__setattr__(name, value)

    def __delattr__(self, name: str) -> None:
        self.__dict__.pop(FORM, None)
        super().__delattr__(name)

    @classmethod
    def from_dense(
        cls,
        x: Tensor,
        layout: Layout,
        *,
        kind: Kind = "grown",
        length: int | Sequence[int] | None = None,
        tables: Tensor | None = None,
        shift: Tensor | None = None,
        query: Tensor | None = None,
    ) -> QuantizedKV:
        """Quantize the first ``length`` (default: all) tokens of ``x`` ``[B, H, S, D]``.

        A static cache or a ring gets as many slots as ``x`` has, a grown one as many as it has tokens. ``length``
        may list those of each row of a static cache. ``tables``
        are the words of the layout's `Tables`; ``shift``, ``[B]``, is zero if it is not given. ``query``,
        ``[B, Hq, T, D]``, has the queries of the last of these tokens, where the layout holds queries.

        Raises:
            ValueError: The layout keeps exact copies, and the cache is static; or rows have lengths of their own, and
                it cannot have them: see `rows.count_by_row_`.
        """
        if layout.keep_exact and kind != "grown":
            raise ValueError("keep_exact must go with a cache that grows, got a static one")
        if isinstance(length, Sequence):
            empty = cls.from_dense(x, layout, kind=kind, length=0, tables=tables, shift=shift)
            return fill_rows_(count_by_row_(empty), x, length, query)
        tokens = x.shape[2] if length is None else length
        slots = tokens if kind == "grown" else x.shape[2]
        room = slots_for(slots, 1, layout) if kind == "ring" else slots
        if layout.rotary and shift is None:
            shift = x.new_zeros(x.shape[0], dtype=torch.int32)
        calibrated = [tensor for tensor in (tables, shift) if tensor is not None]
        about = layout, calibrated, None, query
        parts = ops.quantize(x[:, :, :tokens], room, kind == "grown", *about)
        return cls(parts, calibrated, layout, kind, slots)

    @property
    def parts(self) -> list[Tensor]:
        """The parts in the order of `part_names`, as the ops take them."""
        parts = [self.codes, self.params, self.exact, self.cursor]
        return parts if self.originals is None else [*parts, self.originals]

    def paged(self) -> Packed:
        """Return views of the parts with codes and parameters as pages, as `Layout` describes them."""
        return Packed(*paged(self.parts[:4], self.page_layout))

    @property
    def calibrated(self) -> list[Tensor]:
        """The calibration constants, as the ops take them."""
        return [tensor for tensor in (self.tables, self.shift) if tensor is not None]

    def dequantize(self) -> Tensor:
        """Return the tokens as an ordinary tensor ``[B, H, S, D]``; empty slots are zero."""
        if self.kind == "ring":
            about = self.parts, self.calibrated, room_of(self.parts, self.page_layout)
            return last_slots(ops.dequantize(*about, self.page_layout), self.cursor, self.shape[2])
        tokens = ops.dequantize(self.parts, self.calibrated, self.end, self.page_layout)
        return tokens if self.trim is None else tokens[:, :, self.first :]

    def _dense(self) -> Tensor:
        return self.dequantize()

    def _held(self) -> list[Tensor]:
        held = (getattr(self, name) for name in HELD)
        return [part for part in held if part is not None]

    @property
    def by_row(self) -> bool:
        """Whether rows have lengths of their own."""
        return self.cursor.dim() == 2

    def held(self) -> int:
        """Return how many tokens the cache shows, in the longest row; waits for the device if the cache is static."""
        slots = self.shape[2]
        return slots if self.kind == "grown" else min(max(self.held_by_row()), slots)

    def held_by_row(self) -> list[int]:
        """Return how many tokens the memory of each row holds; waits for the device."""
        held: list[int] = self.cursor.view(-1, 2)[:, 0].tolist()
        return held if self.by_row else held * self.shape[0]

    def part_bytes(self) -> dict[str, int]:
        """Return the bytes of each part's storage."""
        return {name: getattr(self, name).untyped_storage().nbytes() for name in PARTS}

    def clone_packed(self) -> QuantizedKV:
        """Return a copy that shares no memory."""
        return self._map(lambda part: part.clone())

    def _map(self, change: Callable[[Tensor], Tensor]) -> QuantizedKV:
        lineage = None
        with writable():
            if not isinstance(self.cursor, FakeTensor):
                lineage = self._lineage.copied(change)
            parts = [change(part) for part in self.parts]
            if self.originals is not None:
                parts[4] = held_by_host(parts[4], parts[0].device)
            calibrated = [] if self.tables is None else [self.tables.to(parts[0].device)]
            if self.shift is not None:
                calibrated.append(change(self.shift))
            trim = None if self.trim is None else new_trim(self.first, parts[3])
        about = self.page_layout, self.kind, self.shape[2], lineage, trim
        return QuantizedKV(parts, calibrated, *about)

    def _map_batch(self, change: Callable[[Tensor], Tensor]) -> QuantizedKV:
        shared = None if self.by_row else self.cursor
        return self._map(lambda part: part.clone() if part is shared else change(part))

    def _view(self, length: int, trim: Tensor | None = None) -> QuantizedKV:
        if isinstance(self.cursor, FakeTensor) or trim is not None:
            lineage = None if isinstance(self.cursor, FakeTensor) else self._lineage
            about = self.page_layout, self.kind, length, lineage
            trim = self.trim if trim is None else trim
            with SETTLING:
                part = QuantizedKV(self.parts, self.calibrated, *about, trim)
            part._is_slice_copy = self._is_slice_copy
            return part
        B, H, _, D = self.shape
        with writable():
            view: QuantizedKV = Tensor._make_wrapper_subclass(
                QuantizedKV, (B, H, length, D), dtype=self.dtype, device=self.device
            )
        with SETTLING:
            gather((self,))
            known = self.__dict__
            if not known.keys() <= ATTRIBUTES:
                known = {name: known[name] for name in ATTRIBUTES if name in known}
            view.__dict__.update(known, _length=length)
            view._lineage.add(view)
        return view

    def _heir(self) -> QuantizedKV:
        about = self.page_layout, self.kind, self.shape[2]
        return QuantizedKV(self.parts, self.calibrated, *about)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return (
            f"QuantizedKV({list(self.shape)}, {self.page_layout.about} {self.page_layout.role}s, {self.kind}, "
            f"dtype={self.dtype}, device={self.device})"
        )

    def repeat_interleave(
        self, repeats: Any, dim: Any = None, *, output_size: Any = None
    ) -> Tensor:
        """Repeat as a tensor does; along the batch the result stays quantized."""
        if dim not in (0, -4):
            return super().repeat_interleave(repeats, dim, output_size=output_size)
        return self._map_batch(
            lambda part: part.repeat_interleave(on(repeats, part), 0, output_size=output_size)
        )

    def __copy__(self) -> QuantizedKV:
        return self._view(self.shape[2])

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedKV:
        copy: QuantizedKV = memo.setdefault(id(self), self.clone_packed())
        return copy

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        # Loaded views would not know of each other, so that each takes memory of its own.
        is_alone = self._part_of is None and not self._lineage.others(self)
        owner = self if is_alone else self.clone_packed()
        about = FORMAT, plain_layout(self.page_layout), self.kind, int(self.shape[2])
        parts = paged(owner.parts, self.page_layout)
        first = () if self.trim is None else (int(self.first),)
        return rebuild, (*about, parts, owner.calibrated, *first)

    def __getitem__(self, index: Any) -> Tensor:
        read = super().__getitem__(index)
        if isinstance(read, QuantizedKV):
            return read._view(read.shape[2])  # autograd would keep the longer one alive
        if type(read) is not Tensor or isinstance(self.cursor, FakeTensor):
            return read
        places = index if isinstance(index, tuple) else (index,)
        is_view = all(i is None or isinstance(i, (int, slice, EllipsisType)) for i in places)
        return read_only(read) if is_view else read

    @torch.compiler.disable
    def __setitem__(self, index: Any, x: Any) -> None:
        from kvq_compile.kernels.cache.assign import assign  # which imports this file

        assign(self, index, x)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        names = list(_inner_names(self.page_layout))
        pages = self.codes.shape[2] if self.kind == "ring" else 0  # compiled graphs are made for it
        about = self.page_layout, self.kind, pages
        return names if self.trim is None else [*names, TRIM], about

    @staticmethod
    def __tensor_unflatten__(
        inner: dict[str, Tensor], meta: Any, outer_size: Any, outer_stride: Any
    ) -> QuantizedKV:
        layout, kind, _ = meta
        parts = [inner[name] for name in part_names(layout)]
        calibrated = [inner[name] for name in calibrated_names(layout)]
        return QuantizedKV(parts, calibrated, layout, kind, outer_size[2], trim=inner.get(TRIM))

    @classmethod
    @torch.compiler.disable  # code that Dynamo has given up on calls this, and it would trace what is in here
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        from kvq_compile.kernels.cache.dispatch import dispatch  # which imports this file

        return dispatch(func, args, kwargs or {})


@cache
def _inner_names(layout: Layout) -> tuple[str, ...]:
    """Return the names of the tensors inside a cache, in the order of `INNER`."""
    held = {*part_names(layout), *calibrated_names(layout)}
    return tuple(name for name in INNER if name in held)


def _outside_inference(part: Tensor) -> Tensor:
    """Return a part as one that can be written in every mode: a copy if it was made in inference mode."""
    return part.clone() if part.is_inference() else part


def on(index: Any, part: Tensor) -> Any:
    """Return an index along the batch where ``part`` is: the originals are in host memory."""
    return index.to(part.device) if isinstance(index, Tensor) else index


def wrap_loaded(
    parts: list[Tensor],
    calibrated: list[Tensor],
    layout: Layout,
    kind: Kind,
    length: int,
    first: int | None = None,
) -> QuantizedKV:
    """Check the tensors of a file and wrap copies of them: no other object of the file shares their memory.

    Raises:
        TypeError, ValueError: They are not what the layout says: see `check_loaded`.
    """
    check_loaded(parts, calibrated, layout, kind, length, first)
    with writable():
        parts = [part.clone() for part in parts]
        calibrated = [tensor.clone() for tensor in calibrated]
    return wrap(parts, calibrated, layout, kind, length, first)


def wrap(
    parts: list[Tensor],
    calibrated: list[Tensor],
    layout: Layout,
    kind: Kind,
    length: int,
    first: int | None = None,
) -> QuantizedKV:
    """Wrap tensors as a cache that knows of no other view of them."""
    cursor = parts[PARTS.index("cursor")]
    lineage = Lineage(*cursor.view(-1, 2).amax(0).tolist())
    if layout.keep_exact:
        parts[4] = held_by_host(parts[4], parts[0].device)
    trim = None if first is None else new_trim(first, parts[0])
    return QuantizedKV(parts, calibrated, layout, kind, length, lineage, trim)


ForkingPickler.register(QuantizedKV, send_by_copy)
