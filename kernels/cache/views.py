"""Views of different length that share the memory of one dynamic cache.

All views have the same parts, and each is a prefix of the longest, from a slot of its own on where it is trimmed
(`trim`). Appending to a view that is not the longest alive
copies first, so that the tokens of a longer view are never overwritten. If no longer view is alive, the surplus tokens
are dropped in place, so rejecting speculative tokens costs nothing. A token seen through an older view changes once,
from exact to quantized, when it leaves the window. If the layout requantizes, it may become coarser with the
attention of the longest view, and finer again if exact copies are kept. Those copies (`originals`) stay in host memory
and belong to the shared memory.

A static cache has its memory to itself. Where a call returns an updated copy of one (`pass_on`), the copy takes the
memory over, and the cache that was passed in takes a copy of what it held when it is used again, if ever it is.
"""

from __future__ import annotations

import itertools
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kvq_compile.kernels import ops
from kvq_compile.kernels.adaptive.originals import held_by_host
from kvq_compile.kernels.cache.gathered import WAITS
from kvq_compile.kernels.cache.reopened import Reopened
from kvq_compile.kernels.cache.slices import PartOf, drop_parts, take_parts_
from kvq_compile.kernels.cache.trim import drop_pages_, droppable, first_of, new_trim
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import (
    ORIGINALS,
    PARTS,
    Packed,
    part_names,
    room_of,
    with_room,
    writable,
)

if TYPE_CHECKING:
    from kvq_compile.kernels.cache.tensor import QuantizedKV


_MAY_BE_AWAY = frozenset((*PARTS, ORIGINALS))
MANY = 8  # views of a memory, of which some may be gone: they are not counted anew at every step


class Lineage:
    """The views that share one memory.

    Attributes:
        held: Tokens that the longest of them has written.
        pages: Pages that are packed.
        reopened: The first page that is not full, where it was cut open.
        compiled: Of them, those up to the last that a compiled call has written; ``None`` where none did.
        memory: A number that no other memory has: as long as it stays, the parts are where they are. ``None`` while
            they wait for being gathered (`gathered`).
        room: How many tokens that memory has room for; ``None`` until somebody asks.
        counted: Tokens in the memory of a static cache, or in each row, as far as the host knows without asking the
            device: see `ring`.
        lock: Held while tokens are appended (`alone`).
        counter: A tensor in which the model counts them, how often it had been written, and its value then, as far as
            the host knows: see `lowering.slots.Counter`.
        shared: Whether other processes may write the memory, so that the host knows neither.
        lent: Some rows of it as caches of their own, with the parts that these are views of; and ``before``, how many
            tokens each row held when rows were lent last (`some_rows`).
        slices: The lineages of its slices along the batch (`slices`).
    """

    _numbers = itertools.count()

    def __init__(self, held: int, pages: int, reopened: Reopened | None = None) -> None:
        self.held, self.pages, self.reopened = held, pages, reopened
        self.compiled: int | None = None
        self.counted: int | tuple[int, ...] | None = None
        self.lock = threading.RLock()
        self.counter: tuple[Tensor, int, int] | None = None
        self.shared = False
        self.lent: dict[range, tuple[Sequence[Tensor], QuantizedKV]] = {}
        self.before: tuple[int, ...] = ()
        self.slices: weakref.WeakSet[Lineage] | None = None
        self.moved()
        self._views: list[weakref.ref[QuantizedKV]] = []

    def moved(self) -> None:
        """Note that the parts are elsewhere now, with other room."""
        self.memory: int | None = next(self._numbers)
        self.room: int | None = None

    def share(self) -> None:
        """Note that other processes may write the memory from now on."""
        self.shared, self.counted, self.counter = True, None, None

    def copied(self, change: Callable[[Tensor], Tensor] = lambda part: part) -> Lineage:
        """Return the lineage of a copy, whose tensors ``change`` makes."""
        reopened = None if self.reopened is None else self.reopened.map(change)
        return Lineage(self.held, self.pages, reopened)

    def truncate(self, view: Views, length: int) -> None:
        """Record a truncation to ``length`` tokens before it is done, and keep the codes of a page that it cuts."""
        layout, was = view.page_layout, self.reopened
        self.held, packed = length, self.pages
        self.pages = min(packed, max(0, length - layout.sinks) // layout.page_size)
        kept = length - layout.sinks - self.pages * layout.page_size
        if kept <= 0:
            self.reopened = None
        elif self.pages < packed:
            about = self.pages, kept, layout
            codes, params, _, _ = view.paged()
            self.reopened = Reopened.of(codes, params, *about)
        elif was is not None:
            self.reopened = replace(was, kept=min(was.kept, kept))

    def extend(self, view: Views, length: int) -> None:
        """Record an append up to ``length`` tokens, and restore the codes of a cut page that is full again."""
        self.held, packed, layout = length, self.pages, view.page_layout
        if length < layout.sinks + layout.window + (packed + 1) * layout.page_size:
            return  # no page fills, as at nearly every step
        self.pages = max(packed, layout.pages_at(length))
        if self.reopened is not None and self.pages > packed:
            codes, params, _, _ = view.paged()
            self.reopened.restore_(codes, params, layout)
            self.reopened = None

    def drop(self, pages: int, slots: int) -> None:
        """Record that the first pages were dropped, and ``slots`` with them."""
        self.held, self.pages = self.held - slots, self.pages - pages
        if self.compiled is not None:
            self.compiled -= slots
        if self.reopened is not None:
            self.reopened = replace(self.reopened, page=self.reopened.page - pages)

    def take(self, other: Lineage) -> None:
        """Copy the lineage of a cache whose parts were copied into this one."""
        self.held, self.pages, self.reopened = other.held, other.pages, other.reopened
        self.counted = None

    @contextmanager
    def overwritten(self, view: Views, first: int) -> Iterator[None]:
        """Note that a view's tokens from ``first`` on are written anew, unless that fails."""
        before = self.copied()
        self.truncate(view, first)
        try:
            yield
        except Exception:
            self.take(before)
            raise
        self.extend(view, view.end)

    def add(self, view: Any) -> None:
        """Count a view among those of this memory while it lives."""
        if len(self._views) >= MANY:
            self._views = [ref for ref in self._views if ref() is not None]
        self._views.append(weakref.ref(view))

    def others(self, view: Any) -> list[QuantizedKV]:
        """Return the views that are alive and have not gone to other memory, save the one given."""
        alive = (ref() for ref in self._views)
        return [
            other
            for other in alive
            if other is not None and other is not view and other._lineage is self
        ]


_lock = attrgetter("_lineage.lock")


@contextmanager
def alone(views: Sequence[Views], together: bool = False) -> Iterator[None]:
    """Keep other threads from appending to the memory of some views: two may go on from one prefix.

    Those which take tokens ``together``, outside of any other such block, have one lock from then on.
    """
    while True:
        held: list[Any] = []
        locks = list(map(_lock, views))
        try:
            for lock in sorted(set(locks), key=id):  # everywhere in one order
                lock.acquire()
                held.append(lock)
            if locks == list(map(_lock, views)):  # none was given other memory
                if together and len(held) > 1:
                    for view in views:
                        view._lineage.lock = held[0]
                yield
                return
        finally:
            for lock in reversed(held):
                lock.release()


class Views(Tensor):
    """How `QuantizedKV` shares its memory with its views, and makes room in it."""

    codes: Tensor
    params: Tensor
    exact: Tensor
    cursor: Tensor
    trim: Tensor | None
    page_layout: Layout
    _lineage: Lineage
    _part_of: PartOf | None

    @property
    def parts(self) -> list[Tensor]:
        """The parts, as the ops take them."""
        raise NotImplementedError

    def paged(self) -> Packed:
        """Return views of the parts with codes and parameters as pages."""
        raise NotImplementedError

    @property
    def calibrated(self) -> list[Tensor]:
        """The calibration constants, as the ops take them."""
        raise NotImplementedError

    def clone_packed(self) -> QuantizedKV:
        """Return a copy that shares no memory."""
        raise NotImplementedError

    def _view(self, length: int, trim: Tensor | None = None) -> QuantizedKV:
        raise NotImplementedError

    @property
    def first(self) -> Any:
        """Slots of the memory that lie before this view, out of sight: see `trim`."""
        return first_of(self.trim)

    @property
    def end(self) -> Any:
        """Slots of the memory up to the last of this view."""
        slots = self.shape[2]
        return slots if self.trim is None else self.first + slots

    def written_outside(self) -> int:
        """Return how many tokens eager code has appended since a compiled call wrote the last one."""
        compiled = self._lineage.compiled
        return 0 if compiled is None else max(0, self.end - compiled)

    def room(self) -> int:
        """Return how many tokens this memory has room for."""
        lineage = self._lineage
        if lineage.room is None:
            lineage.room = room_of(self.parts, self.page_layout)
        return lineage.room

    def claim(self, tokens: int) -> None:
        """Make this view the longest of its memory, with room for ``tokens`` more; copies only if it must."""
        end: int = self.end
        on_cpu = self.device.type == "cpu"
        shared = on_cpu and self.codes.untyped_storage().is_shared()
        if self._lineage.held == end and end + tokens <= self.room() and not shared:
            return  # as at nearly every step
        longer = any(view.end > end for view in self._lineage.others(self))
        if longer or shared:
            self._fork(tokens)
        elif self._lineage.held > end:
            self._lineage.truncate(self, end)
            if on_cpu:  # kernels truncate as they append
                nothing = self.exact[:, :, :0]
                about = self.end, self.page_layout
                ops.append_(self.parts, self.calibrated, nothing, None, *about)
        if self.end + tokens > self.room():
            if self._lineage.others(self):
                self._fork(tokens)
            else:
                self._drop_pages()
                self._grow(self.end + tokens)

    def _drop_pages(self) -> None:
        pages = droppable(self.first, self._lineage.pages, self.page_layout)
        if pages:
            slots = pages * self.page_layout.page_size
            drop_pages_(self.parts, self.calibrated, pages, self.page_layout)
            self._lineage.drop(pages, slots)
            self._trim(self.first - slots)

    def _trim(self, first: int) -> None:
        self.trim = new_trim(first, self.cursor)
        torch._dynamo.maybe_mark_dynamic(self.trim, 0)

    def _grow(self, length: int) -> None:
        with writable():
            wider = with_room(self.parts, length, self.page_layout)
        for name, old, new in zip(part_names(self.page_layout), self.parts, wider, strict=True):
            if new is not old:
                new = held_by_host(new, self.device) if name == ORIGINALS else new
                torch._dynamo.maybe_mark_dynamic(new, 2)
                setattr(self, name, new)
        self._lineage.moved()

    def _fork(self, tokens: int) -> None:
        copy = self.clone_packed()
        for name in part_names(self.page_layout):
            setattr(self, name, getattr(copy, name))
        lock, self._lineage = self._lineage.lock, copy._lineage.copied()
        self._lineage.lock = lock  # which is held, and is to be until the tokens are appended
        self._lineage.add(self)
        self.claim(tokens)

    def pass_on(self, held: int) -> QuantizedKV:
        """Return a static cache that takes over this one's memory, in which ``held`` tokens are written.

        This one copies what it holds when it is used again. The memory of a slice stays its owner's.
        """
        if self._part_of is not None:
            return self.clone_packed()
        drop_parts(self._lineage)
        heir = self._heir()
        for view in (self, *self._lineage.others(self)):
            view.__dict__["_passed_on"] = (tuple(view.parts), held)
            for name in part_names(self.page_layout):
                delattr(view, name)
        return heir

    def _heir(self) -> QuantizedKV:
        raise NotImplementedError

    def __getattr__(self, name: str) -> Any:
        if name not in _MAY_BE_AWAY:  # Dynamo asks for marks at every step
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if "_part_of" in self.__dict__ and name in part_names(self.page_layout):
            take_parts_(self)  # type: ignore[arg-type]
            return getattr(self, name)
        while name not in self.__dict__ and (waits := self.__dict__.get(WAITS)) is not None:
            waits.settle()  # or another thread does, which may have rows taken once more
        found = self.__dict__.get(name)
        if found is not None:
            return found
        if "_passed_on" not in self.__dict__ or name not in part_names(self.page_layout):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        parts, held = self.__dict__.pop("_passed_on")
        with writable():
            for part, mine in zip(part_names(self.page_layout), parts, strict=True):
                setattr(self, part, mine.clone())
        self._lineage = self._lineage.copied()
        self._lineage.add(self)
        self._forget(held)
        return getattr(self, name)

    def _forget(self, held: int) -> None:
        """Drop the tokens behind the first ``held`` of a static cache."""
        if held == 0:
            self.cursor.zero_()
        elif held < int(self.cursor[0]):
            layout, slots = self.page_layout, self.shape[2]
            last = ops.dequantize(self.parts, self.calibrated, slots, layout)[:, :, held - 1 : held]
            ops.append_(self.parts, self.calibrated, last, None, held - 1, layout)

    def extended(self, tokens: int) -> QuantizedKV:
        """Return the view that also shows ``tokens`` just appended behind this one."""
        length = self.shape[2] + tokens
        if not isinstance(self.cursor, FakeTensor):
            self._lineage.extend(
                self, int(self.first + length) if self.trim is not None else length
            )
        longer = self._view(length)
        longer._is_slice_copy = False  # `torch.cat` returns a tensor of its own
        return longer

    def part(self, first: Any, last: Any) -> QuantizedKV:
        """Return the view of the tokens from ``first`` up to ``last``, counted from this view's first."""
        return self._view(last - first, new_trim(self.first + first, self.cursor))
