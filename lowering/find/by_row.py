"""Find writes that put each sequence's tokens at positions of its own, as continuous batching does.

``cache[arange(B), :, position] = new``, ``scatter_``, a loop over rows, products with one-hot rows: whatever writes is
evaluated at several positions, which differ from row to row. It is such a write if each row then has its tokens at
positions of its own and the buffer is otherwise as it was, bit by bit. Whether those of a call follow one another in a
row is checked before it runs (`slots`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from kvq_compile.lowering.find.in_place import InPlaceTrial, candidates
from kvq_compile.lowering.find.trial import (
    CANNOT_BE_RUN,
    data_of,
    random_like,
    size_of_trial,
)
from kvq_compile.lowering.find.updates import TRIES, Update
from kvq_compile.lowering.nodes import order_of, root_of, same, shape_of, value_of, writers_of

_REACH = 64  # nodes looked at behind the writes, besides some for each of them
_MORE = 4


def find_rows_write(buffer: fx.Node, writers: list[fx.Node]) -> Update | None:
    """Return the tokens and the ``[B, T]`` positions that all ``writers`` of a buffer amount to, if they do to that."""
    sizes = shape_of(buffer) or ()
    if len(sizes) != 4 or same(sizes[0], 1):
        return None
    views = [node for node in buffer.graph.nodes if node is buffer or root_of(node) is buffer]
    for new in candidates(buffer, writers):
        for position in _positions(writers, new, sizes[0]):
            found = _RowsTrial(buffer, new, position, writers, views)
            if found.is_borne_out():
                return Update(buffer, new, position, tuple(found.steps))
    return None


def _positions(writers: list[fx.Node], new: fx.Node, rows: Any) -> list[fx.Node]:
    """Return what may be the positions of all rows, integers, one a token of the batch; in the order of the graph."""
    wanted = (shape_of(new) or ())[2] * rows
    written = writers_of(new.graph)
    seen: set[fx.Node] = set()
    front, found = [*writers], []
    while front and len(seen) < _REACH + _MORE * len(writers):
        node = front.pop(0)
        if node in seen:
            continue
        seen.add(node)
        value = value_of(node)
        integers = isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32)
        if integers and _are_equal(value.numel(), wanted):
            found.append(node)
        front.extend((*data_of(node), *(written.get(root_of(node), ()) if integers else ())))
    place = order_of(new.graph)
    return sorted(found, key=place.__getitem__)[:TRIES]


def _are_equal(a: Any, b: Any) -> bool:
    """Return whether two sizes are equal; guards on it where Dynamo knows them by symbols of their own."""
    if same(a, b):
        return True
    if not (isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt)):
        return False
    known = a.node.has_hint() and b.node.has_hint()
    return bool(known and a.node.hint == b.node.hint and a == b)


class _RowsTrial(InPlaceTrial):
    """The writes into a buffer, at positions that differ from row to row."""

    @property
    def reach(self) -> int:
        """Steps at most."""
        return super().reach + _MORE * len(self._writers)

    def is_borne_out(self) -> bool:
        """Return whether each row's tokens are at its own positions then, and all else is as it was."""
        if not self.collect():
            return False
        borne_out = False
        for sizes in self._with_room():
            slots, tokens = (
                size_of_trial(shape_of(node)[2], sizes)  # type: ignore[index]
                for node in (self._past, self._new)
            )
            if tokens > slots:
                continue
            rows = size_of_trial(shape_of(self._past)[0], sizes)  # type: ignore[index]
            for first in self._firsts(rows, slots - tokens):
                try:
                    if not self._writes_rows_at(sizes, first):
                        return False
                except CANNOT_BE_RUN:
                    if sizes:
                        continue  # these sizes leave no room
                    return False
                borne_out = True
        return borne_out

    def _firsts(self, rows: int, last: int) -> Iterator[Tensor]:
        """Yield the first position of each row, up to ``last``."""
        row = torch.arange(rows, dtype=torch.int64, device="cpu")
        yield row * 3 % (last + 1)
        yield last - row * 5 % (last + 1)
        yield row * 0

    def _writes_rows_at(self, sizes: Mapping[Any, int], first: Tensor) -> bool:
        assert self._position is not None
        past, new = (random_like(value_of(node), sizes) for node in (self._past, self._new))
        tokens, like = new.shape[2], value_of(self._position)
        places = first[:, None] + torch.arange(tokens, dtype=torch.int64, device="cpu")
        index = places[:, None, :, None].expand(-1, past.shape[1], -1, past.shape[3])
        shape = [size_of_trial(size, sizes) for size in like.shape]
        given = {
            self._past: past.clone(),
            self._new: new.clone(),
            self._position: places.to(like.dtype).reshape(shape),
        }
        return torch.equal(self.run(sizes, given), past.scatter(2, index, new))
