"""Trace the elements of a tensor to where they come from, whatever operations moved them.

A cache that grows can be spelled in many ways: ``cat``, ``F.pad`` and a write, an allocation filled by slices,
``scatter``, ``where``, a sum of one-hot products. None of them is matched here. What lies between the returned
tensor and the cache is *evaluated*, on the CPU and on random numbers, at several lengths where lengths are symbols
of the graph. The tensor is a dynamic cache if it equals ``cat([past, new], 2)`` every time, bit by bit.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kvq_compile.lowering.find.replay import is_integer
from kvq_compile.lowering.find.trial import (
    CANNOT_BE_RUN,
    MIXING,
    Trial,
    data_of,
    plain_name,
    random_like,
)
from kvq_compile.lowering.nodes import (
    VIEWS,
    argument,
    getitem_index,
    is_full,
    is_weight,
    root_of,
    same,
    shape_of,
    target_name,
    value_of,
    writers_of,
    writes_in_place,
)

_REACH = 64  # nodes looked at between a tensor and the cache, far more than any spelling takes
_TRIES = 12  # nodes tried as the new tokens


@dataclass(frozen=True)
class Growth:
    """A tensor that holds the tokens of a cache and new ones behind them.

    Attributes:
        past: The placeholder that holds the cache.
        new: The new tokens, ``[B, H, T, D]``.
        index: Node of the rows of ``past`` that make up the batch; ``None`` for all, in order.
        rows: The same as numbers, where no node has them.
        steps: The nodes from there to the tensor, in order; their writes are into memory of their own.
    """

    past: fx.Node
    new: fx.Node
    index: fx.Node | None = None
    rows: tuple[int, ...] | None = None
    steps: tuple[fx.Node, ...] = ()


def is_cache_like(node: Any) -> bool:
    """Return whether a node is an argument ``[B, H, S, D]`` of floating-point elements."""
    if not isinstance(node, fx.Node) or node.op != "placeholder":
        return False
    value = value_of(node)
    held = isinstance(value, Tensor) and not is_weight(node)
    return held and value.dim() == 4 and value.is_floating_point()


def is_empty(node: Any) -> bool:
    """Return whether a node is a cache-like argument that holds no token."""
    return is_cache_like(node) and same((shape_of(node) or ())[2], 0)


def as_spelled(node: fx.Node) -> Growth | None:
    """Return the growth that a node spells as one ``cat`` of a cache and the call's tokens."""
    if target_name(node) != "cat" or argument(node, 1, "dim", 0) not in (2, -2):
        return None
    tensors = argument(node, 0, "tensors")
    spelled = len(tensors) == 2 and is_cache_like(tensors[0])
    alike = spelled and value_of(tensors[0]).dtype == value_of(tensors[1]).dtype
    return Growth(tensors[0], tensors[1]) if alike else None


def moved_from(node: Any) -> Any:
    """Return the tensor whose elements ``node`` holds unchanged, walking back along copies and whole views."""
    while isinstance(node, fx.Node):
        name = plain_name(node)
        moves = (
            name in ("contiguous", "clone", "detach", "alias")
            or keeps_dtype(node, name)
            or (name == "getitem" and _takes_all(node))
        )
        if moves and not (_is_written(node) and root_of(node) is node):
            node = node.args[0]
        else:
            return node
    return node


def _is_written(node: fx.Node) -> bool:
    """Return whether something writes into a tensor, or into a view of it."""
    return any(
        (writes_in_place(user) and user.args[0] is node)
        or (target_name(user) in VIEWS and _is_written(user))
        for user in node.users
        if user.args
    )


def keeps_dtype(node: fx.Node, name: str) -> bool:
    """Return whether a node, whose plain name is ``name``, is a cast that casts nothing."""
    if name not in ("to", "type", "type_as", "float", "half", "bfloat16"):
        return False
    before, after = value_of(node.args[0]), value_of(node)
    if not isinstance(before, Tensor) or not isinstance(after, Tensor):
        return False
    return (before.dtype, before.device) == (after.dtype, after.device)


def _takes_all(node: fx.Node) -> bool:
    index, shape = getitem_index(node), shape_of(node.args[0])
    if index is None or shape is None or len(index) != len(shape):
        return False
    return all(is_full(part, size) for part, size in zip(index, shape, strict=True))


def is_whole_cache(node: fx.Node) -> bool:
    """Return whether a subscript takes all of a cache: another name for it."""
    return is_cache_like(node.args[0]) and _takes_all(node)


def cache_inputs(node: fx.Node) -> list[fx.Node]:
    """Return the cache-like arguments whose elements may be among those of ``node``, moved or changed."""
    return [found for found in _reached(node) if is_cache_like(found)]


def made_of(node: fx.Node, ends: Collection[str] = MIXING) -> Iterator[fx.Node]:
    """Yield the tensors whose elements, moved or changed, may be among those of ``node``; ``ends`` end the search."""
    return _reached(node, ends)


def _reached(node: fx.Node, ends: Collection[str] = MIXING) -> Iterator[fx.Node]:
    """Yield the tensors of three dimensions and more that ``node`` is made of, nearest first, up to ``ends``."""
    writers = writers_of(node.graph)
    seen: set[fx.Node] = set()
    front = [] if plain_name(node) in ends else [node]
    for _ in range(_REACH):
        following: list[fx.Node] = []
        for current in front:
            for other in (*data_of(current), *writers.get(root_of(current), ())):
                wide = len(shape_of(other) or ()) >= 3 or plain_name(other) == "setitem"
                several = isinstance(value_of(other), (tuple, list))
                if other not in seen and (wide or several):
                    seen.add(other)
                    if wide:
                        yield other
                    if plain_name(other) not in ends:
                        following.append(other)
        front = following


def beside(node: fx.Node, others: Collection[fx.Node]) -> set[fx.Node]:
    """Return those of some tensors that are not made of ``node``, nor ``node`` of them."""
    found = {other for other in others if other is not node and node not in _reached(other)}
    return found.difference(_reached(node)) if found else found


def find_growth(grown: fx.Node) -> Growth | None:
    """Return what ``grown`` ``[B, H, S + T, D]`` is made of, if it is a cache with new tokens behind it."""
    shape = shape_of(grown)
    if shape is None or len(shape) != 4 or grown.op == "placeholder":
        return None
    near = list(_reached(grown))
    for past in [node for node in near if gathered_from(node) is not None or is_cache_like(node)]:
        before = shape_of(past) or ()
        if not (same(before[1], shape[1]) and same(before[3], shape[3])):
            continue
        size = shape[0], shape[1], shape[2] - before[2], shape[3]
        fitting = [new for new in near if new is not past and _fits(new, past, size)]
        for new in fitting[:_TRIES]:
            if any(other is past or is_empty(other) for other in _reached(new)):
                continue  # joined to a cache that is empty
            found = _Trial(grown, past, new).growth()
            others = beside(new, fitting) if found is None else ()
            if others:
                found = _Trial(grown, past, new, others).growth()
            if found is not None:
                return found
    return None


def _fits(new: fx.Node, past: fx.Node, shape: tuple[Any, ...]) -> bool:
    mine, value, held = shape_of(new), value_of(new), value_of(past)
    if mine is None or len(mine) != 4 or value.dtype != held.dtype:
        return False
    return all(same(a, b) for a, b in zip(mine, shape, strict=True))


def gathered_from(node: Any) -> tuple[fx.Node, fx.Node] | None:
    """Return the cache and the index of which ``node`` takes rows along the batch."""
    name = plain_name(node)
    index: Any = None
    if name == "index_select" and argument(node, 1, "dim") in (0, -4):
        index = argument(node, 2, "index")
    elif name == "getitem" and (found := getitem_index(node)) is not None and len(found) == 4:
        shape = shape_of(node.args[0]) or ()
        if len(shape) == 4 and all(is_full(found[dim], shape[dim]) for dim in (1, 2, 3)):
            index = found[0]
    if not isinstance(index, fx.Node) or not is_integer(index) or len(shape_of(index) or ()) != 1:
        return None
    if value_of(index).dtype == torch.bool:
        return None
    past = moved_from(node.args[0])
    return (past, index) if is_cache_like(past) else None


class _Trial(Trial):
    """The operations between a cache and its new tokens and what may be the dynamic cache.

    Args:
        grown: What may be the dynamic cache.
        past: A cache-like placeholder, or rows taken from one.
        new: What may be the new tokens.
        others: What may be those of other caches.
    """

    ignores = True

    def __init__(
        self, grown: fx.Node, past: fx.Node, new: fx.Node, others: Collection[fx.Node] = ()
    ) -> None:
        super().__init__(grown, (past, new), MIXING)
        self.ignored.update(others)
        self._past, self._new = past, new

    def growth(self) -> Growth | None:
        """Return the growth if evaluation bears it out."""
        if not self.collect():
            return None
        gathered = gathered_from(self._past)
        past, index = gathered if gathered is not None else (self._past, None)
        rows: tuple[int, ...] | None = None
        try:
            for sizes in self.assignments(3):
                found = self._holds(sizes, fixed=gathered is not None)
                if found is None or (rows is not None and rows != found):
                    return None
                rows = found
        except CANNOT_BE_RUN:
            return None  # what cannot be evaluated is not understood
        if rows is None:
            return None
        return Growth(past, self._new, index, rows or None, tuple(self.steps))

    def _holds(self, sizes: Mapping[Any, int], fixed: bool) -> tuple[int, ...] | None:
        """Return the rows of the past in the dynamic cache, ``()`` for all in order; ``None`` if it is none."""
        past, new = (random_like(value_of(node), sizes) for node in (self._past, self._new))
        grown, length = self.run(sizes, {self._past: past, self._new: new}), past.shape[2]
        if grown.dtype != past.dtype or grown.shape[2] != length + new.shape[2]:
            return None
        if not torch.equal(grown[:, :, length:], new):
            return None
        kept = grown[:, :, :length]
        if torch.equal(kept, past):
            return ()
        if fixed or length == 0 or isinstance((shape_of(self.result) or ())[0], torch.SymInt):
            return None
        rows = tuple(
            next((row for row in range(past.shape[0]) if torch.equal(past[row], one)), -1)
            for one in kept
        )
        return None if -1 in rows else rows
