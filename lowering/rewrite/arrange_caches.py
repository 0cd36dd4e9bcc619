"""Lay out the caches of a graph as ``[B, H, S, D]``, whatever layout the model keeps them in."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.source import AttrSource

from kvq_compile.kernels.cache.arranged import PREFIX, ArrangedKV
from kvq_compile.kernels.cache.arrangement import AXES, PIECE, Arrangement, walk
from kvq_compile.lowering.arranged import Arranged
from kvq_compile.lowering.find.arrangements import above, can_be_allocated, sizes_of_allocation
from kvq_compile.lowering.find.trial import MIXING, data_of, plain_name
from kvq_compile.lowering.graph import copy_module
from kvq_compile.lowering.nodes import (
    FULL,
    LAYOUT,
    NAME,
    VIEWS,
    argument,
    getitem_index,
    insert_call,
    is_full,
    order_of,
    root_of,
    same,
    shape_of,
    source_name,
    target_name,
    value_of,
    writers_of,
    writes_in_place,
)
from kvq_compile.lowering.rewrite.rejoin_pieces import joined, rejoin, revalue
from kvq_compile.lowering.rewrite.split_pieces import Pieces, Splitter, dense, places

_REACH = 256  # nodes followed from a cache
Writers = Mapping[Any, list[fx.Node]]


def arrange_caches(
    gm: fx.GraphModule, known: Mapping[fx.Node, Arrangement], rejoins: bool = False
) -> Arranged:
    """Return a copy of a graph that takes and returns caches as ``[B, H, S, D]``.

    Before:  past = placeholder                          # [B, S, H, D]
             keys = cat([past, key], 1); attend(query, keys.transpose(1, 2)); return keys
    After:   cache = placeholder                         # [B, H, S, D]
             past = cache.permute(0, 2, 1, 3); tokens = key.permute(0, 2, 1, 3)
             keys = cat([past, tokens.permute(0, 2, 1, 3)], 1); whole = keys.permute(0, 2, 1, 3)
             attend(query, whole.permute(0, 2, 1, 3).transpose(1, 2)); return whole
    Because: later passes know caches as ``[B, H, S, D]``, and find by evaluation that ``whole`` is
             ``cat([cache, tokens], 2)``, whatever is between. It is the same program, whether or not they find that.

    Args:
        gm: The graph that Dynamo captured; it is left untouched.
        known: Arrangements of its arguments, allocations and results.
        rejoins: Whether to join the caches of one tensor wherever the graph reads it or writes into it, instead of
            following it piece by piece.

    Raises:
        Refusal: A tensor of several caches cannot be followed.
    """
    module = copy_module(gm)
    graph = module.graph
    copies = dict(zip(gm.graph.nodes, graph.nodes, strict=True))
    originals = {copy: node for node, copy in copies.items()}
    arranged = {copies[node]: how for node, how in known.items()}
    arguments = [node for node in arranged if node.op == "placeholder"]
    inputs = [arranged.get(node) for node in graph.find_nodes(op="placeholder")]
    results = list(graph.output_node().args[0])  # type: ignore[arg-type]
    outputs = [arranged.get(x) if isinstance(x, fx.Node) else None for x in results]
    read = {node for node in graph.nodes if node.users}
    views = [copies[node] for node in _views_of_packed(gm.graph, known)]
    caches = _Arranger(graph, arranged, rejoins).caches()
    for node in [node for node in graph.nodes if node in views]:
        revalue(node)
    flat: list[Any] = []
    now: Any = graph.output_node().args[0]
    for before, after in zip(results, now, strict=True):
        flat.extend(caches.get(before, [after]) if isinstance(before, fx.Node) else [after])
    writers = writers_of(gm.graph)
    packed = {node for node in arguments if _is_packed(node, writers, originals)}
    graph.output_node().args = (tuple(flat),)
    taken = [cache for cache in graph.find_nodes(op="placeholder") if cache not in arguments]
    places = {
        originals[node]: (
            tuple(taken.index(x) for x in own if node in packed),
            tuple(at for at, x in enumerate(flat) if x in own and node not in packed),
        )
        for node, own in caches.items()
    }
    for node in reversed(list(graph.nodes)):
        is_new = node in read or node not in originals
        if node in arguments or (is_new and not node.users and not _has_effect(node)):
            graph.erase_node(node)
    graph.lint()
    module.recompile()
    return Arranged(module, tuple(inputs), tuple(outputs), places)


def _views_of_packed(graph: fx.Graph, known: Mapping[fx.Node, Arrangement]) -> Iterator[fx.Node]:
    """Yield the views of arguments that are packed already.

    These have no memory of their own; what Dynamo takes for the memory of their views is that of copies.
    """
    packed = {node for node in known if isinstance(value_of(node), ArrangedKV)}
    for node in graph.nodes:
        if packed and target_name(node) in VIEWS and root_of(node) in packed:
            yield node


def _has_effect(node: fx.Node) -> bool:
    return node.op in ("placeholder", "output") or writes_in_place(node)


def _is_packed(
    node: fx.Node, writers: Mapping[Any, list[fx.Node]], originals: Mapping[fx.Node, fx.Node]
) -> bool:
    """Return whether an argument is packed, or is to be once the call has run."""
    return isinstance(value_of(node), ArrangedKV) or originals[node] in writers


class _Arranger:
    """Lays out the caches of a graph."""

    def __init__(
        self, graph: fx.Graph, arranged: Mapping[fx.Node, Arrangement], rejoins: bool
    ) -> None:
        self._graph, self._arranged, self._rejoins = graph, arranged, rejoins
        self._splitter = Splitter(graph, arranged)

    def caches(self) -> dict[fx.Node, list[fx.Node]]:
        """Return the caches that arguments and results are laid out as."""
        made: dict[fx.Node, list[fx.Node]] = {}
        for node, how in self._arranged.items():
            if node.op == "placeholder":
                made[node] = self._take(node, how)
        for node, pieces in list(self._splitter.split.items()):
            self._splitter.take(node, pieces)
        for node, how in self._arranged.items():
            if can_be_allocated(node, how) and not self._is_joined(how):
                made[node] = self._allocate(node, how)
        for node, how in self._arranged.items():
            if node not in made:
                made[node] = self._pass_all(node, how)
        writers = writers_of(self._graph)
        for node, own in made.items():
            how = self._arranged[node]
            like = value_of(node)
            if how.sizes and not self._is_joined(how):
                like = like[tuple(0 if name == PIECE else FULL for name in how.axes)]
                how = how.of_one()
            _pass_tokens(self._graph, own, like, how, writers)
        place = order_of(self._graph)
        for own in made.values():
            _loosen_views(own, writers, place)
        return made

    def _is_joined(self, how: Arrangement) -> bool:
        return how.is_joined or (self._rejoins and bool(how.sizes))

    def _take(self, node: fx.Node, how: Arrangement) -> list[fx.Node]:
        """Replace an argument by its caches, and return these.

        Whoever reads it gets a view of its own: one that was taken before a write would be read after it.
        """
        value, graph = value_of(node), self._graph
        is_held = isinstance(value, ArrangedKV)
        caches: list[fx.Node] = []
        with graph.inserting_before(node):
            for number, one in enumerate(value.caches if is_held else how.split(value)):
                cache = graph.placeholder(f"{node.name}_{number}" if how.sizes else node.name)
                name = source_name(node) + (f", {number + 1} of {how.pieces}" if how.sizes else "")
                cache.meta.update(node.meta | {"example_value": one, NAME: name, LAYOUT: str(how)})
                source = getattr(node, "_dynamo_source", None)
                if source is not None:
                    named = AttrSource(source, f"{PREFIX}{number}")
                    cache._dynamo_source = named if is_held or how.sizes else source
                caches.append(cache)
        if self._is_joined(how):
            rejoin(graph, node, caches, how, _caller(graph))
            return caches
        if how.sizes:
            made = [partial(self._seen, cache, how.of_one()) for cache in caches]
            pieces = Pieces(how.axes, dict(zip(places(how.sizes), made, strict=True)))
            self._splitter.split[node] = pieces  # known to all before the first reader is looked at
            return caches
        self._show(node, caches[0], how)
        return caches

    def _allocate(self, node: fx.Node, how: Arrangement) -> list[fx.Node]:
        """Allocate caches instead of what the model allocates for them, and return these."""
        sizes = sizes_of_allocation(node)
        assert sizes is not None
        of = {name: size for name, size in zip(how.axes, sizes, strict=True) if name != PIECE}
        shape, value = [of.get(name, 1) for name in AXES], value_of(node)
        caches = []
        with self._graph.inserting_before(node):
            for one in how.split(value):
                cache = self._graph.call_function(
                    torch.zeros, (shape,), {"dtype": value.dtype, "device": value.device}
                )
                cache.meta.update(node.meta | {"example_value": one})
                caches.append(cache)
        if how.sizes:
            made = [partial(self._seen, cache, how.of_one()) for cache in caches]
            self._splitter.take(
                node, Pieces(how.axes, dict(zip(places(how.sizes), made, strict=True)))
            )
        else:
            self._show(node, caches[0], how)
        return caches

    def _show(self, node: fx.Node, cache: fx.Node, how: Arrangement) -> None:
        """Let what reads a tensor read a cache, each by a view of its own."""
        for user in [user for user in node.users if user.op != "output"]:
            rows = _rows_of(user, node, how)
            with self._graph.inserting_before(user):
                if rows is not None:
                    part = insert_call(self._graph, torch.index_select, (cache, 0, rows))
                    part.meta["example_value"] = value_of(cache).index_select(0, value_of(rows))
                    user.replace_all_uses_with(self._seen(part, how))
                    continue
                seen = self._seen(cache, how)
            if seen is not cache:
                seen.meta["example_value"] = value_of(node)
            user.replace_input_with(node, seen)

    def _seen(self, cache: fx.Node, how: Arrangement) -> fx.Node:
        """Return a cache in the model's layout, at the graph's insert point."""
        (seen,) = walk(cache, how.from_caches(), _caller(self._graph))
        return seen

    def _pass_all(self, node: fx.Node, how: Arrangement) -> list[fx.Node]:
        """Let what reads a result read it by way of its caches, and return these."""
        if not how.sizes or self._is_joined(how):
            return _pass(self._graph, node, how)
        like = Pieces(how.axes, dict.fromkeys(places(how.sizes), lambda: node))
        with self._graph.inserting_before(_behind(node)):
            pieces = self._splitter.pieces_of(node, like)
            parts = [make() for make in pieces.made.values()]
        if node not in self._splitter.split:
            made = {
                place: partial(_itself, part)
                for place, part in zip(pieces.made, parts, strict=True)
            }
            self._splitter.take(node, Pieces(how.axes, made))
        return [cache for part in parts for cache in _pass(self._graph, part, how.of_one())]


def _rows_of(user: fx.Node, node: fx.Node, how: Arrangement) -> fx.Node | None:
    """Return the index by which ``user`` takes rows of a tensor along the batch, if that is what it does."""
    if "B" not in how.axes:
        return None
    batch, dims = how.axis("B"), len(how.axes)
    index: Any = None
    if target_name(user) == "index_select" and user.args[0] is node:
        index = argument(user, 2, "index") if argument(user, 1, "dim") % dims == batch else None
    elif (parts := getitem_index(user)) is not None and user.args[0] is node:
        rest = [part for at, part in enumerate(parts) if at != batch]
        index = parts[batch] if len(parts) == dims and all(map(is_full, rest)) else None
    value = value_of(index)
    is_index = isinstance(value, Tensor) and value.dtype in (torch.int64, torch.int32)
    return index if is_index and value.dim() == 1 else None


def _itself(node: fx.Node) -> fx.Node:
    return node


def _behind(node: fx.Node) -> fx.Node:
    """Return the first node behind another, and behind the arguments."""
    after = node.next
    while after.op == "placeholder":
        after = after.next
    return after


def _pass(graph: fx.Graph, node: fx.Node, how: Arrangement) -> list[fx.Node]:
    """Let what reads a tensor read it by way of its caches, and return these.

    What is read before the last write into it stays as it is: the caches may be copies, which a write would not reach.
    """
    if not how.to_caches():
        return [node]
    place = order_of(graph)
    writes = [x for x in writers_of(graph).get(root_of(node), ()) if place[x] > place[node]]
    last = max(writes, key=place.__getitem__, default=node)
    with graph.inserting_before(_behind(last)):
        caches = walk(node, how.to_caches(), _caller(graph))
        seen = joined(graph, caches, how, _caller(graph))
    node.replace_all_uses_with(
        seen,
        delete_user_cb=lambda user: user.op != "output" and place.get(user, -1) > place[last],
    )
    return caches


def _pass_tokens(
    graph: fx.Graph, caches: list[fx.Node], like: Tensor, how: Arrangement, writers: Writers
) -> None:
    """Let the tokens that join a cache pass through ``[B, H, T, D]``, so that a node stands for them."""
    region = _region(caches, writers)
    tokens = dict.fromkeys(
        found
        for node in region
        for given in data_of(node)
        if given not in region
        for found in [_tokens(given, like, region, how)]
        if found is not None
    )
    for node in tokens:
        _pass(graph, node, how)


def _loosen_views(caches: list[fx.Node], writers: Writers, place: Mapping[fx.Node, int]) -> None:
    """Let ``view`` of a cache be ``reshape``: elements of a cache that is dequantized lie in another order in memory.

    Not where something writes into that memory later on, which a copy would not see.
    """
    for node in _region(caches, writers):
        if node.op == "call_method" and node.target in ("view", "view_as"):
            writes = writers.get(root_of(node), ())
            if all(place[write] < place[node] for write in writes):
                node.target = "reshape" if node.target == "view" else "reshape_as"


def _region(caches: list[fx.Node], writers: Writers) -> dict[fx.Node, None]:
    """Return what caches are moved to, and what writes into them."""
    region = dict.fromkeys(caches)
    region |= dict.fromkeys(x for cache in caches for x in writers.get(root_of(cache), []))
    front = [*region]
    while front and len(region) < _REACH:
        node = front.pop(0)
        for user in node.users:
            if user.op != "output" and user not in region and plain_name(user) not in MIXING:
                region[user] = None
                front.append(user)
    return region


def _tokens(
    given: fx.Node, like: Tensor, region: Mapping[fx.Node, None], how: Arrangement
) -> fx.Node | None:
    """Return the nearest tensor that ``given`` is made of and that may be tokens of a cache."""
    whole, axis = like.shape, how.axis("S")
    for node in above(given):
        shape, value = shape_of(node) or (), value_of(node)
        if node in region or not isinstance(value, Tensor) or value.dtype != like.dtype:
            continue
        if len(shape) != len(whole) or same(shape[axis], whole[axis]):
            continue
        if all(same(shape[at], whole[at]) for at in range(len(shape)) if at != axis):
            return node
    return None


def _caller(graph: fx.Graph) -> Any:
    """Return what inserts a call of a method at the graph's insert point; it returns a node, or several."""

    def call(node: fx.Node, method: str, arguments: tuple[Any, ...]) -> Any:
        made = graph.call_method(method, (node, *arguments))
        values = fx.node.map_arg(arguments, value_of)
        found = getattr(dense(value_of(node)), method)(*values)
        made.meta["example_value"] = found
        if not isinstance(found, tuple):
            return made
        return [
            insert_call(graph, operator.getitem, (made, number), value)
            for number, value in enumerate(found)
        ]

    return call
