"""Rows of a dynamic cache that are gathered when they are used first, as those of beams are at every step.

By then the cache they come from is gone, nearly always: its place was given to them. Then each part is gathered in
place, so that beams need no second cache, and what a step was recorded for still holds. If it lives on, the rows get
memory of their own. Until then neither of both has its parts: whoever uses one, to read or to write, has them gathered.

Threads may do so at once, and take rows or views of one cache meanwhile. Whether a view is alive decides about its
memory, so that it is not made while that is asked (`SETTLING`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvq_compile.kernels.adaptive.originals import held_by_host
from kvq_compile.kernels.packed import ORIGINALS, part_names, writable

if TYPE_CHECKING:
    from kvq_compile.kernels.cache.tensor import QuantizedKV
    from kvq_compile.kernels.cache.views import Lineage

WAITS = "_gathered"  # the attribute of a cache whose parts wait
CURSOR = "cursor"  # which rows share
# Of all caches. It is taken last: nothing waits for another lock while it is held.
SETTLING = threading.RLock()


class Gathered:
    """Parts that wait for being gathered.

    Attributes:
        parts: Those of the cache that rows are taken from, by name.
        rows: Which of its rows each one is, ``[B]``.
        taken_from, made: The views of that cache, and those of the rows.
    """

    def __init__(self, source: QuantizedKV, rows: Tensor, made: Lineage) -> None:
        self.parts = {name: getattr(source, name) for name in part_names(source.page_layout)}
        self.rows, self.taken_from, self.made = rows, source._lineage, made
        self._place = source._lineage.memory, source._lineage.room
        self._in_place: set[str] = set()  # parts that are gathered where they are

    def settle(self) -> None:
        """Gather the rows, and give all views that are alive their parts; what fails can be done again."""
        with SETTLING, writable(), torch.no_grad():
            before, after = self._waiting(self.taken_from), self._waiting(self.made)
            if before:
                if after:
                    _give(after, {name: self._copy(name) for name in self.parts})
                    self.made.moved()
                self._keep(before, self.taken_from)
            elif after:
                for name, part in self.parts.items():
                    if name != CURSOR and name not in self._in_place:
                        part.copy_(self._row(part))
                        self._in_place.add(name)
                self._keep(after, self.made)

    def _waiting(self, lineage: Lineage) -> list[QuantizedKV]:
        """Return the views that wait for this one: those that another thread has settled may wait for the next."""
        return [view for view in lineage.others(None) if view.__dict__.get(WAITS) is self]

    def _keep(self, views: list[QuantizedKV], lineage: Lineage) -> None:
        _give(views, self.parts)
        lineage.memory, lineage.room = self._place

    def _row(self, part: Tensor) -> Tensor:
        return part.index_select(0, self.rows.to(part.device))

    def _copy(self, name: str) -> Tensor:
        part = self.parts[name]
        if name == CURSOR:
            return part.clone()
        rows = self._row(part)
        rows = held_by_host(rows, self.rows.device) if name == ORIGINALS else rows
        torch._dynamo.maybe_mark_dynamic(rows, 2)
        return rows


def gather_later(cache: QuantizedKV, change: Callable[[Tensor], Tensor]) -> QuantizedKV | None:
    """Return the rows of a dynamic cache that ``change`` takes of a tensor, to be gathered when they are used.

    ``None`` where that is not for later: there are more of them, or fewer, or others use the cache's memory too.
    """
    on_cpu = cache.device.type == "cpu"  # elsewhere storages always say that they are shared
    if cache.kind != "grown" or (on_cpu and cache.codes.untyped_storage().is_shared()):
        return None
    with SETTLING, writable():
        # Who changes the index later on does not change the rows, and one out of range raises here.
        rows = change(torch.arange(cache.shape[0], dtype=torch.int64, device=cache.device))
        if len(rows) != cache.shape[0]:
            return None
        lineage = cache._lineage.copied(change)
        gathered = Gathered(cache, rows, lineage)
        made: QuantizedKV = Tensor._make_wrapper_subclass(
            type(cache), cache.shape, dtype=cache.dtype, device=cache.device
        )
        known = {name: x for name, x in cache.__dict__.items() if name not in gathered.parts}
        made.__dict__.update(known, _lineage=lineage, _is_slice_copy=False)
        if cache.shift is not None:
            made.shift = change(cache.shift)
        lineage.add(made)
        for waits in (cache._lineage, lineage):
            waits.memory = waits.room = None
            for view in waits.others(None):
                # Before its parts go: whoever misses one looks here.
                view.__dict__[WAITS] = gathered
                for name in gathered.parts:
                    if name in view.__dict__:
                        delattr(view, name)
    return made


def gather(caches: Iterable[QuantizedKV]) -> None:
    """Gather those of some caches that wait for it."""
    for cache in caches:
        waits = cache.__dict__.get(WAITS)
        if waits is not None:
            waits.settle()


def _give(views: Iterable[QuantizedKV], parts: Mapping[str, Tensor]) -> None:
    for view in views:
        for name, part in parts.items():
            setattr(view, name, part)
        del view.__dict__[WAITS]
