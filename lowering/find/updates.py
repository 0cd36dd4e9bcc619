"""Find updates of a fixed-size cache: a new tensor that holds the old one with the call's tokens in it.

``index_copy``, ``scatter``, ``slice_scatter``, ``index_put``, ``where`` behind a mask, sums of one-hot products, a
clone that is written: what lies between cache and result is evaluated as growth is (`movement`), here at several cache
positions as well. The result is an update if it equals ``index_copy(past, 2, position, new)`` every time, bit by bit.
Only consecutive cache positions are tried; whether those of a call are is checked before it runs (`slots`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kvq_compile.lowering.find.dependence import carries
from kvq_compile.lowering.find.movement import beside, is_cache_like, made_of
from kvq_compile.lowering.find.trial import (
    CANNOT_BE_RUN,
    MIXING,
    Trial,
    random_like,
    size_of_trial,
)
from kvq_compile.lowering.nodes import (
    order_of,
    root_of,
    same,
    shape_of,
    target_name,
    value_of,
    writers_of,
)
from kvq_compile.lowering.unchanged import once, unchanged

ALLOCATIONS = ("zeros", "new_zeros", "zeros_like", "empty", "new_empty")
_PRODUCTS = ("matmul", "bmm", "mm", "einsum")  # a one-hot product moves elements
ENDS = tuple(name for name in MIXING if name not in _PRODUCTS)
TRIES = 8  # nodes tried as the new tokens, and as the cache positions of each
_TRIALS = 8  # assignments of sizes, of which some leave no room for the tokens


@dataclass(frozen=True)
class Update:
    """A tensor that holds a fixed-size cache with some of its cache positions written.

    Attributes:
        past: The placeholder or allocation that holds the cache as it was.
        new: The new tokens, ``[B, H, T, D]``.
        position: The cache positions, a node of ``T`` integers of any shape; or the first one, a number or its node.
        steps: The nodes from there to the tensor, in order; their writes are into memory of their own.
    """

    past: fx.Node
    new: fx.Node
    position: Any
    steps: tuple[fx.Node, ...]


def find_update(result: fx.Node) -> Update | None:
    """Return what ``result`` ``[B, H, S, D]`` is made of, if it is a fixed-size cache with new tokens in it."""
    with unchanged(result.graph):
        return _find_update(result)


def _find_update(result: fx.Node) -> Update | None:
    candidates = [*_candidates(result)]
    for past, new in candidates:
        if not (carries(past, result) and carries(new, result)):
            continue  # those of another cache that both are joined with
        others = beside(new, {other for _, other in candidates})
        for position in (*positions_among([result], past, new), None):
            for ignored in ((), others) if others else ((),):
                found = UpdateTrial(result, past, new, position, ignored).update()
                if found is not None:
                    return found
    return None


def updated_caches(result: fx.Node) -> list[fx.Node]:
    """Return the caches that ``result`` may be an update of: as large, and shorter tensors are among its parts too."""
    return list(dict.fromkeys(past for past, _ in _candidates(result)))


def _candidates(result: fx.Node) -> Iterator[tuple[fx.Node, fx.Node]]:
    """Yield what may be the cache and the new tokens."""
    shape, like = shape_of(result), value_of(result)
    if shape is None or len(shape) != 4 or not like.is_floating_point():
        return
    if result.op not in ("call_function", "call_method"):
        return
    pasts = {node for node in _fixed_sized(result.graph) if _is_past(node, result)}
    if not pasts:  # as in most graphs: the search below costs far more
        return
    made = [node for node in made_of(result, ENDS) if node is not result]
    near = [node for node in made if is_like(node, like)]
    shorter = [node for node in near if 0 < hint_of(node) < hint_of(result)]
    for past in filter(pasts.__contains__, made):  # which may be cast to another dtype
        yield from ((past, new) for new in shorter[:TRIES])


@once
def _fixed_sized(graph: fx.Graph) -> list[fx.Node]:
    """Return what may be a cache: arguments like one, and memory that the call allocates."""
    nodes = graph.nodes
    return [node for node in nodes if target_name(node) in ALLOCATIONS or is_cache_like(node)]


def _is_past(node: fx.Node, result: fx.Node) -> bool:
    """Return whether one of `_fixed_sized` may be the cache that ``result`` is an update of."""
    both_made = target_name(node) in ALLOCATIONS and target_name(result) in ALLOCATIONS
    is_cast = value_of(node).dtype != value_of(result).dtype
    if node is result or both_made or (is_cast and node.op != "placeholder"):
        return False
    mine, theirs = shape_of(node), shape_of(result)
    if mine is None or theirs is None or len(mine) != 4 or hint_of(node) != hint_of(result):
        return False
    return same(mine[2], theirs[2])


def is_like(node: fx.Node, like: Tensor) -> bool:
    """Return whether a node may be tokens of a cache."""
    mine, value = shape_of(node), value_of(node)
    if mine is None or len(mine) != 4 or value.dtype != like.dtype:
        return False
    return all(same(mine[dim], like.shape[dim]) for dim in (0, 1, 3))


def hint_of(node: fx.Node) -> int:
    """Return how many tokens a tensor has in the call that is being compiled; 0 where that depends on data."""
    size = (shape_of(node) or ())[2]
    if not isinstance(size, torch.SymInt):
        return int(size)
    return int(size.node.hint) if size.node.has_hint() else 0


def positions_among(results: list[fx.Node], past: fx.Node, new: fx.Node) -> list[fx.Node]:
    """Return what may be the cache positions that ``results`` are written at, what is computed last first."""
    tokens = (shape_of(new) or ())[2]
    writers = writers_of(past.graph)
    seen: set[fx.Node] = {past, new}
    stack, found = [*results], []
    while stack:
        node = stack.pop()
        if node in seen or target_name(node) in ENDS:
            continue
        seen.add(node)
        value = value_of(node)
        integers = isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32)
        if integers and (same(value.numel(), tokens) or _are_symbols(value.numel(), tokens)):
            found.append(node)
        stack.extend((*node.all_input_nodes, *writers.get(root_of(node), ())))
    place = order_of(past.graph)
    return sorted(found, key=place.__getitem__, reverse=True)[:TRIES]


def _are_symbols(a: Any, b: Any) -> bool:
    """Return whether two sizes are symbols which are equal in the call that is being compiled."""
    if not (isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt)):
        return False
    known = a.node.has_hint() and b.node.has_hint() and a.node.hint == b.node.hint
    return bool(known and a.node.expr.is_symbol and b.node.expr.is_symbol)


def _are_one(starts: Sequence[tuple[Any, Any]]) -> bool:
    """Return whether some numbers, each with its argument, are one in every call."""
    return bool(starts) and all(same(starts[0][0], value) for value, _ in starts)


class UpdateTrial(Trial):
    """The operations between a cache, new tokens, their cache positions and what may be the updated cache."""

    ignores = True

    def __init__(
        self, result: fx.Node, past: fx.Node, new: fx.Node, position: fx.Node | None,
        others: Collection[fx.Node] = (),
    ) -> None:  # fmt: skip
        super().__init__(result, [past, new, *([] if position is None else [position])], ENDS)
        self.ignored.update(others)
        self._past, self._new, self._position = past, new, position

    def update(self) -> Update | None:
        """Return the update if evaluation bears it out."""
        if not self.collect():
            return None
        starts = None if self._position is not None else self._numbers()
        borne_out = False
        for assigned in self._with_room():
            sizes = self._with_a_position_a_token(assigned)
            slots, tokens = (
                size_of_trial(shape_of(node)[2], sizes)  # type: ignore[index]
                for node in (self._past, self._new)
            )
            if tokens > slots:
                continue
            for first in (slots - tokens, (slots - tokens) // 2, 0):
                try:
                    at = self._written_at(sizes, first)
                    if (
                        at is None
                        and starts is not None
                        and self._is_beyond(sizes, starts, slots - tokens)
                    ):
                        break  # one token fits into a slice of none
                except CANNOT_BE_RUN:
                    at = None
                    if sizes:
                        continue  # these sizes leave no room
                if at is None:
                    return None
                if starts is not None:
                    starts = [start for start in starts if size_of_trial(start[0], sizes) == at]
                borne_out = True
                if starts is not None:
                    break  # nothing depends on `first`
        if not borne_out or (starts is not None and not _are_one(starts)):
            return None
        position = self._position if starts is None else starts[0][1]
        return Update(self._past, self._new, position, tuple(self.steps))

    def _with_room(self) -> Iterator[Mapping[Any, int]]:
        """Yield sizes to try; then the same with a buffer that has room for all tokens, wherever they begin."""
        for sizes in self.assignments(_TRIALS, far=False):
            yield sizes
            roomy = self.with_room(sizes, self._past)
            if roomy != sizes:
                yield roomy

    def _is_beyond(self, sizes: Mapping[Any, int], starts: Sequence[Any], last: int) -> bool:
        """Return whether some of the numbers leave no room for the tokens."""
        return any(size_of_trial(start[0], sizes) > last for start in starts)

    def _with_a_position_a_token(self, sizes: Mapping[Any, int]) -> Mapping[Any, int]:
        """Return sizes by which there are as many cache positions as tokens, which a call is checked for."""
        if self._position is None or not sizes:
            return sizes
        count, tokens = value_of(self._position).numel(), value_of(self._new).shape[2]
        if not isinstance(count, torch.SymInt) or same(count, tokens):
            return sizes
        return {**sizes, count.node.expr: size_of_trial(tokens, sizes)}

    def _written_at(self, sizes: Mapping[Any, int], first: int) -> int | None:
        """Return the first cache position that the new tokens are written at, if that is all that happens."""
        past, new = (random_like(value_of(node), sizes) for node in (self._past, self._new))
        given: dict[fx.Node, Any] = {self._past: past.clone(), self._new: new.clone()}
        if self._position is not None:
            like = value_of(self._position)
            shape = [size_of_trial(size, sizes) for size in like.shape]
            places = self._places(first, new.shape[2], past.shape[2])
            given[self._position] = places.to(like.dtype).reshape(shape)
        result = self.run(sizes, given)
        past = past.to(result.dtype)
        if result.dtype != value_of(self.result).dtype or result.shape != past.shape:
            return None
        if self._position is None:
            first = int((result != past).any(3).any(1).any(0).int().argmax())
            places = torch.arange(first, first + new.shape[2], dtype=torch.int64, device="cpu")
        if first + new.shape[2] > past.shape[2]:
            return None
        expected = past.index_copy(2, places, new)
        return first if torch.equal(result, expected) else None

    def _places(self, first: int, tokens: int, slots: int) -> Tensor:
        """Return the cache positions to try, the first of which is ``first`` where they are consecutive."""
        del slots
        return torch.arange(first, first + tokens, dtype=torch.int64, device="cpu")

    def _numbers(self) -> list[tuple[Any, Any]]:
        """Return what may be the first cache position, as values and as arguments of nodes: numbers among the steps."""
        found: list[tuple[Any, Any]] = [(0, 0)]

        def add(x: Any) -> Any:
            value = value_of(x)
            if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
                found.append((value, x))
            return x

        for node in self.steps:
            fx.node.map_aggregate((node.args, node.kwargs), add)
        return found
