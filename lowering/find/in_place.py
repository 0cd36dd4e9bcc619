"""Find writes in place that put a call's tokens at cache positions, whatever operations write.

``scatter_``, ``copy_`` into a slice, ``masked_scatter_``, indices of every dimension, products with one-hot rows: what
writes into a buffer is evaluated as updates are (`updates`), at consecutive cache positions and at others. It is such a
write if the buffer then equals ``index_copy(buffer, 2, position, new)`` every time, bit by bit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator

import torch
from torch import Tensor, fx

from kvq_compile.lowering.find.movement import beside
from kvq_compile.lowering.find.trial import data_of, plain_name
from kvq_compile.lowering.find.updates import (
    ENDS,
    TRIES,
    Update,
    UpdateTrial,
    hint_of,
    is_like,
    positions_among,
)
from kvq_compile.lowering.find.writes import is_write, read_write
from kvq_compile.lowering.nodes import order_of, root_of, value_of, writers_of
from kvq_compile.lowering.sites import Refusal

_REACH = 64  # nodes looked at behind the writes


def find_write(buffer: fx.Node, writers: list[fx.Node]) -> Update | None:
    """Return the tokens and the cache positions that all ``writers`` of a buffer amount to, if they do to that."""
    views = [node for node in buffer.graph.nodes if node is buffer or root_of(node) is buffer]
    known = [*candidates(buffer, writers)]
    for new in known:
        others = beside(new, known)
        for position in (*positions_among(writers, buffer, new), None):
            for ignored in ((), others) if others else ((),):
                found = [
                    kind(buffer, new, position, writers, views, ignored).update()
                    for kind in (
                        (_Scattered, InPlaceTrial) if position is not None else (InPlaceTrial,)
                    )
                ]
                if None not in found:
                    return found[-1]
    return None


def candidates(buffer: fx.Node, writers: list[fx.Node]) -> Iterator[fx.Node]:
    """Yield what may be the new tokens, nearest first."""
    seen: set[fx.Node] = {buffer}
    written = writers_of(buffer.graph)
    front, found = [*writers], 0
    reach = _REACH + 4 * len(writers)
    while front and len(seen) < reach and found < TRIES:
        node = front.pop(0)
        memory = root_of(node)
        others = () if memory is buffer else written.get(memory, ())
        for other in (*data_of(node), *others):
            if other in seen:
                continue
            seen.add(other)
            inside = root_of(other) is buffer
            if (
                not inside
                and is_like(other, value_of(buffer))
                and 0 < hint_of(other) < hint_of(buffer)
            ):
                found += 1
                yield other
            if plain_name(other) not in ENDS and other.op != "placeholder":
                front.append(other)


class InPlaceTrial(UpdateTrial):
    """The writes into a buffer, and what they are computed by from its tokens, the new ones and their positions."""

    def __init__(
        self,
        buffer: fx.Node,
        new: fx.Node,
        position: fx.Node | None,
        writers: list[fx.Node],
        views: list[fx.Node],
        others: Collection[fx.Node] = (),
    ) -> None:
        super().__init__(buffer, buffer, new, position, others)
        self._writers, self._views = writers, views

    @property
    def reach(self) -> int:
        """Steps at most."""
        return _REACH

    def collect(self) -> bool:
        """Collect the nodes to run; say whether they alone decide on the buffer, and nothing reads in between."""
        needed = self._needed(self._writers, ENDS, self.reach)
        if needed is None:
            return False
        place, writers = order_of(self.result.graph), writers_of(self.result.graph)
        self.steps = sorted(needed, key=place.__getitem__)
        last = place[self.steps[-1]]
        for cut in self.cuts[1:]:
            if any(place[cut] < place[node] <= last for node in writers.get(root_of(cut), ())):
                return False
        views = set(self._views)
        readers = {user for node in views for user in node.users} - needed - views
        return all(place[user] > last for user in readers)


class _Scattered(InPlaceTrial):
    """The same at cache positions that do not follow one another."""

    def _places(self, first: int, tokens: int, slots: int) -> Tensor:
        generator = torch.Generator(device="cpu").manual_seed(first)
        order = torch.randperm(slots, generator=generator, dtype=torch.int64, device="cpu")
        return order[:tokens]


def is_spelled(writer: fx.Node, buffer: fx.Node) -> bool:
    """Return whether a write into a buffer is in one of the spellings of `writes`, or empties it."""
    if writer.args[0] is not buffer:
        return False
    try:
        return plain_name(writer) == "zero_" or (is_write(writer) and bool(read_write(writer)))
    except Refusal:
        return False
