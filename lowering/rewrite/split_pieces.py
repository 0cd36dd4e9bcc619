"""Split a tensor that holds several caches, along the axes that number them, into one node for each."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from kvq_compile.kernels.cache.arrangement import PIECE
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.lowering.find.trial import plain_name
from kvq_compile.lowering.nodes import (
    FULL,
    argument,
    insert_call,
    is_full,
    root_of,
    shape_of,
    sizes_argument,
    value_of,
    writers_of,
)
from kvq_compile.lowering.sites import Refusal

_PIECEWISE = (
    "index_copy_",
    "index_copy",
    "scatter_",
    "scatter",
)  # with a dimension, an index and a source
_COPIES = ("clone", "size", "dim", "numel")  # read a tensor that is written, and give no view of it
Make = Callable[[], fx.Node]


@dataclass(frozen=True)
class Pieces:
    """What a node stands for.

    Attributes:
        axes: A letter for each of its axes, ``P`` for those that number pieces.
        made: What makes each piece at the graph's insert point, by its place along the axes ``P``.
    """

    axes: str
    made: Mapping[tuple[int, ...], Make]

    @property
    def numbered(self) -> list[int]:
        """The axes that number pieces."""
        return [at for at, name in enumerate(self.axes) if name == PIECE]

    def size(self, at: int) -> int:
        """Return how many pieces lie along axis ``at`` of those that number them."""
        return 1 + max(place[at] for place in self.made)


class Splitter:
    """Splits nodes of a graph.

    Args:
        graph: The nodes.
        kept: Those of which all pieces are returned.

    Attributes:
        split: The nodes that were split, and into what.
    """

    def __init__(self, graph: fx.Graph, kept: Collection[fx.Node]) -> None:
        self._graph, self._kept, self._written = graph, kept, {*writers_of(graph)}
        self.split: dict[fx.Node, Pieces] = {}
        self._parts: set[fx.Node] = set()  # cut out of what is no cat or stack of them

    def take(self, node: fx.Node, pieces: Pieces) -> None:
        """Let what reads ``node`` read its pieces.

        Raises:
            Refusal: Something writes into it, or into a view of it, that cannot be told piece by piece.
        """
        self.split[node] = pieces
        for user in [user for user in node.users if user.op != "output"]:
            if user not in node.users or user in self._parts:
                continue
            with self._graph.inserting_before(user):
                self._take_user(node, user, pieces)

    def _take_user(self, node: fx.Node, user: fx.Node, pieces: Pieces) -> None:
        name = plain_name(user)
        made: Pieces | None = None
        if name in ("getitem", "select"):
            made = self._indexed(pieces, _index(user, pieces.axes))
        elif name in ("permute", "transpose", "swapaxes"):
            made = self._permuted(pieces, user)
        elif name == "cat" and argument(user, 0, "tensors")[0] is node:
            made = self._joined(pieces, user)
        elif name in ("unbind", "chunk", "split"):
            if self._several(pieces, user, name):
                return
        elif name == "setitem" and user.args[0] is node:
            if self._assigned(pieces, user):
                return
        elif name in _PIECEWISE and user.args[0] is node:
            made = self._each(pieces, user)
            if made is not None and name.endswith("_"):
                self._write(user, pieces, made)
                return
            if made is not None:  # here and now: what is copied may be written before it is read
                nodes = {place: make() for place, make in made.made.items()}
                made = self._fixed(made.axes, nodes)
        if made is not None:
            self._stand_for(user, made)
            return
        if root_of(node) in self._written and name not in _COPIES:
            raise Refusal(
                f"several caches lie in one tensor, which {name} writes or views as a whole"
            )
        user.replace_input_with(node, self._whole(pieces, value_of(node)))

    def _write(self, user: fx.Node, pieces: Pieces, writes: Pieces) -> None:
        """Write into each piece instead of into all at once; the result is what was written."""
        for make in writes.made.values():
            make()
        self.take(user, pieces)
        if not user.users:
            self._graph.erase_node(user)

    def _stand_for(self, user: fx.Node, made: Pieces) -> None:
        """Let pieces, or the one piece that is left, stand for a node."""
        if made.numbered:
            if user not in self._kept and any(each.op == "output" for each in user.users):
                raise Refusal("a part of a tensor of several caches is returned")
            self.take(user, made)
            return
        (make,) = made.made.values()
        with self._graph.inserting_before(user):
            user.replace_all_uses_with(make())
        self._graph.erase_node(user)

    def _whole(self, pieces: Pieces, value: Tensor) -> fx.Node:
        """Return the tensor of all pieces: a copy."""
        nodes = [make() for make in pieces.made.values()]
        sizes = [pieces.size(at) for at in range(len(pieces.numbered))]
        order = [
            *pieces.numbered,
            *(at for at in range(len(pieces.axes)) if at not in pieces.numbered),
        ]
        stacked = insert_call(self._graph, torch.stack, (nodes,), None)
        flat = self._graph.call_method("unflatten", (stacked, 0, sizes))
        whole = self._graph.call_method(
            "permute", (flat, [order.index(at) for at in range(len(order))])
        )
        for node in (stacked, flat, whole):
            node.meta["example_value"] = value
        return whole

    def _indexed(self, pieces: Pieces, index: Sequence[Any] | None) -> Pieces | None:
        """Return the pieces of a subscript of whole pieces, or of the same part of each."""
        if index is None:
            return None
        chosen: list[int | None] = []
        for at in pieces.numbered:
            size = pieces.size(len(chosen))
            if isinstance(index[at], int) and not isinstance(index[at], bool):
                chosen.append(index[at] % size)
            elif is_full(index[at], size):
                chosen.append(None)
            else:
                return None
        rest = [part for at, part in enumerate(index) if at not in pieces.numbered]
        if not all(isinstance(part, (int, slice)) for part in rest):
            return None
        axes = "".join(
            name for at, name in enumerate(pieces.axes) if not isinstance(index[at], int)
        )
        made = {
            tuple(n for n, one in zip(place, chosen, strict=True) if one is None): self._part(
                make, rest
            )
            for place, make in pieces.made.items()
            if all(one in (None, n) for n, one in zip(place, chosen, strict=True))
        }
        return Pieces(axes, made)

    def _part(self, make: Make, index: Sequence[Any]) -> Make:
        if all(is_full(part) for part in index):
            return make
        return lambda: self._call(operator.getitem, make(), tuple(index))

    def _call(self, target: Any, node: fx.Node, index: tuple[Any, ...]) -> fx.Node:
        values = fx.node.map_arg(index, value_of)
        return insert_call(self._graph, target, (node, index), value_of(node)[values])

    def _permuted(self, pieces: Pieces, user: fx.Node) -> Pieces | None:
        dims = len(pieces.axes)
        if plain_name(user) == "permute":
            order: list[int] = [at % dims for at in sizes_argument(user)]
        else:
            one, other = (argument(user, place, f"dim{place - 1}") % dims for place in (1, 2))
            order = list(range(dims))
            order[one], order[other] = order[other], order[one]
        axes = "".join(pieces.axes[at] for at in order)
        left = [at for at in range(dims) if at not in pieces.numbered]
        own = [left.index(at) for at in order if at in left]
        numbers = [pieces.numbered.index(at) for at in order if at in pieces.numbered]

        def turned(make: Make) -> Make:
            def call() -> fx.Node:
                node = make()
                made = self._graph.call_method("permute", (node, own))
                made.meta["example_value"] = value_of(node).permute(own)
                return made

            return call

        return Pieces(
            axes,
            {tuple(place[n] for n in numbers): turned(make) for place, make in pieces.made.items()},
        )

    def _joined(self, pieces: Pieces, user: fx.Node) -> Pieces | None:
        """Return the pieces of a ``cat`` along an axis of them: nodes of their own."""
        dims = len(pieces.axes)
        tensors, dim = argument(user, 0, "tensors"), argument(user, 1, "dim", 0) % dims
        if dim in pieces.numbered or any(len(shape_of(x) or ()) != dims for x in tensors):
            return None
        along = dim - sum(at < dim for at in pieces.numbered)
        parts = [pieces, *(self.pieces_of(x, pieces) for x in tensors[1:])]

        def join(place: tuple[int, ...]) -> fx.Node:
            nodes = [part.made[place]() for part in parts]
            value = torch.cat([dense(value_of(node)) for node in nodes], along)
            return insert_call(self._graph, torch.cat, (nodes, along), value)

        return self._fixed(pieces.axes, {place: join(place) for place in pieces.made})

    def _fixed(self, axes: str, nodes: Mapping[tuple[int, ...], fx.Node]) -> Pieces:
        """Return pieces that are nodes already."""
        return Pieces(axes, {place: _always(node) for place, node in nodes.items()})

    def pieces_of(self, node: fx.Node, like: Pieces) -> Pieces:
        """Return the pieces of any tensor that has the axes of ``like``."""
        if node in self.split:
            return self.split[node]
        numbered = like.numbered
        if plain_name(node) == "stack":
            tensors, dim = argument(node, 0, "tensors"), argument(node, 1, "dim", 0)
            if dim % len(like.axes) in numbered:
                return self._stacked(tensors, numbered.index(dim % len(like.axes)), like)

        def part(place: tuple[int, ...]) -> Make:
            numbers = iter(place)
            index = tuple(next(numbers) if at in numbered else FULL for at in range(len(like.axes)))
            return lambda: self._cut(node, index)

        return Pieces(like.axes, {place: part(place) for place in like.made})

    def _stacked(self, tensors: Sequence[fx.Node], axis: int, like: Pieces) -> Pieces:
        """Return the pieces of a stack along one of the axes that number them: those of each tensor in turn."""
        at = like.numbered[axis]
        axes = like.axes[:at] + like.axes[at + 1 :]
        made: dict[tuple[int, ...], Make] = {}
        for number, tensor in enumerate(tensors):
            left = {
                (*place[:axis], *place[axis + 1 :]): place
                for place in like.made
                if place[axis] == number
            }
            own: Mapping[tuple[int, ...], Make] = {(): _always(tensor)}
            if PIECE in axes:
                inner = {rest: like.made[place] for rest, place in left.items()}
                own = self.pieces_of(tensor, Pieces(axes, inner)).made
            made |= {place: own[rest] for rest, place in left.items()}
        return Pieces(like.axes, made)

    def _cut(self, node: fx.Node, index: tuple[Any, ...]) -> fx.Node:
        made = self._call(operator.getitem, node, index)
        self._parts.add(made)
        return made

    def _several(self, pieces: Pieces, user: fx.Node, name: str) -> bool:
        """Split what ``unbind`` and ``chunk`` return along an axis that numbers pieces."""
        dim = argument(user, 1 if name == "unbind" else 2, "dim", 0) % len(pieces.axes)
        if dim not in pieces.numbered or not all(
            plain_name(x) == "getitem" and isinstance(x.args[1], int) for x in user.users
        ):
            return False
        at = pieces.numbered.index(dim)
        size = pieces.size(at)
        given = argument(user, 1, "chunks" if name == "chunk" else "split_size_or_sections")
        single = given == (size if name == "chunk" else 1) or given == [1] * size
        if name != "unbind" and not single:
            return False
        for part in list(user.users):
            number = part.args[1] % size  # type: ignore[operator]
            axes = pieces.axes if name != "unbind" else pieces.axes[:dim] + pieces.axes[dim + 1 :]
            made = {
                (*place[:at], *([0] if name != "unbind" else []), *place[at + 1 :]): make
                for place, make in pieces.made.items()
                if place[at] == number
            }
            with self._graph.inserting_before(part):
                self._stand_for(part, Pieces(axes, made))
        for part in list(user.users):
            self._graph.erase_node(part)
        self._graph.erase_node(user)
        return True

    def _assigned(self, pieces: Pieces, user: fx.Node) -> bool:
        """Assign to each piece what an assignment gives it."""
        index, value = _index(user, pieces.axes), user.args[2]
        if index is None:
            return False
        numbers = [
            part % pieces.size(place) if isinstance(part, int) else part
            for place, part in enumerate(index[at] for at in pieces.numbered)
        ]
        rest = tuple(part for at, part in enumerate(index) if at not in pieces.numbered)
        chosen = tuple(n for n in numbers if isinstance(n, int))
        if len(chosen) == len(numbers):
            insert_call(self._graph, operator.setitem, (pieces.made[chosen](), rest, value))
        elif all(is_full(part) for part in numbers) and isinstance(value, fx.Node):
            kept = [
                name
                for part, name in zip(index, pieces.axes, strict=True)
                if not isinstance(part, int)
            ]
            if len(shape_of(value) or ()) != len(kept):
                return False
            given = self.pieces_of(value, Pieces("".join(kept), pieces.made))
            for place, make in pieces.made.items():
                insert_call(self._graph, operator.setitem, (make(), rest, given.made[place]()))
        else:
            return False
        self._graph.erase_node(user)
        return True

    def _each(self, pieces: Pieces, user: fx.Node) -> Pieces | None:
        """Return the pieces of an operation along one axis of each of them."""
        dims, dim = len(pieces.axes), argument(user, 1, "dim")
        index, source = (
            argument(user, 2, "index"),
            argument(user, 3, "source", user.kwargs.get("src")),
        )
        if not isinstance(source, fx.Node) or dim % dims in pieces.numbered:
            return None
        along = dim % dims - sum(at < dim % dims for at in pieces.numbered)
        is_wide = len(shape_of(index) or ()) == dims
        sources = self.pieces_of(source, pieces)
        indices = self.pieces_of(index, pieces) if is_wide else None
        target = user.target

        def make(place: tuple[int, ...]) -> Make:
            def call() -> fx.Node:
                node = pieces.made[place]()
                where = index if indices is None else indices.made[place]()
                args = node, along, where, sources.made[place]()
                made = self._graph.create_node(user.op, target, args)
                made.meta["example_value"] = value_of(node)
                return made

            return call

        return Pieces(pieces.axes, {place: make(place) for place in pieces.made})


def _always(node: fx.Node) -> Make:
    return lambda: node


def dense(value: Any) -> Any:
    """Return the ordinary tensor of a value that may be a quantized cache."""
    return value.dequantize() if isinstance(value, QuantizedKV) else value


def _index(user: fx.Node, axes: str) -> tuple[Any, ...] | None:
    """Return a subscript with a part for each axis; ``None`` if it adds axes or is no subscript."""
    if plain_name(user) == "select":
        dim = argument(user, 1, "dim") % len(axes)
        return tuple(argument(user, 2, "index") if at == dim else FULL for at in range(len(axes)))
    index: Any = user.args[1]
    parts = list(index) if isinstance(index, (tuple, list)) else [index]
    if any(part is None for part in parts):
        return None
    dots = [at for at, part in enumerate(parts) if part is Ellipsis]
    at = dots[0] if dots else len(parts)
    rest = parts[at + 1 :]
    missing = len(axes) - len(parts[:at]) - len(rest)
    return None if missing < 0 else (*parts[:at], *[FULL] * missing, *rest)


def places(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """Return the places along axes of some sizes, the last axis fastest."""
    return list(itertools.product(*(range(size) for size in sizes)))
