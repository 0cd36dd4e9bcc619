"""The nodes by which a graph reads and writes a ring: which slots of its memory show, and where new tokens go."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from kvq_compile.kernels.packed import PARTS
from kvq_compile.lowering.cache_nodes import UNSEEN, CacheNodes, Seen, Slots
from kvq_compile.lowering.find.rings import Ring
from kvq_compile.lowering.nodes import FULL, insert_call, same, shape_of, size_of, value_of


def overwrites(ring: Ring) -> bool:
    """Return whether the new tokens are so many that a ring keeps nothing else; guards on it if need be."""
    tokens, slots = ((shape_of(node) or ())[2] for node in (ring.new, ring.past))
    return bool(tokens >= slots)


def slots_held(graph: fx.Graph, cache: CacheNodes, ring: Ring) -> Slots:
    """Return the slot of the memory behind the tokens that come before the new ones, at the graph's insert point."""
    if ring.held is not None:
        return None, ring.held
    cursor = cache.parts[PARTS.index("cursor")]
    held = insert_call(graph, operator.getitem, (cursor, slice(0, 1)), value_of(cursor)[:1])
    vector = graph.call_method("to", (held, torch.int64))
    vector.meta["example_value"] = value_of(held).to(torch.int64)
    return vector, None


def placed(
    graph: fx.Graph, ring: Ring, new: fx.Node, slots: Slots, seen: Seen = UNSEEN
) -> tuple[fx.Node, Slots, Seen]:
    """Return what a ring writes of ``new``, of more than it keeps the last, and where, at the graph's insert point.

    Args:
        graph: The nodes.
        ring: What the graph writes.
        new: The new tokens.
        slots: Where the tokens held end.
        seen: What comes with the new tokens.
    """
    if not overwrites(ring):
        return new, slots, seen
    slots_kept = (shape_of(ring.past) or ())[2]
    if not same((shape_of(new) or ())[2], slots_kept):
        last, kept = slice(-int(slots_kept), None), value_of(new)[:, :, -int(slots_kept) :]
        new = insert_call(graph, operator.getitem, (new, (FULL, FULL, last)), kept)
    return new, (None, 0), (None, seen[1])  # bits by range alone


def append(graph: fx.Graph, cache: CacheNodes, ring: Ring, new: fx.Node) -> None:
    """Write ``new`` behind the tokens held, at the graph's insert point; of more than the ring keeps, the last."""
    held = (None, 0) if overwrites(ring) else slots_held(graph, cache, ring)
    cache.append(graph, *placed(graph, ring, new, held)[:2])


def columns_of(graph: fx.Graph, ring: Ring, key: fx.Node) -> Any:
    """Return how many tokens attention reads, ``key``, without a reader of these: they are never made."""
    size, tokens = (shape_of(key) or ())[2], size_of(ring.new, 2)
    before = size - value_of(tokens)
    if isinstance(before, torch.SymInt) and before.node.expr.is_number:
        before = int(before)
    if ring.held is not None and same(before, value_of(ring.held)):
        before = ring.held
    elif isinstance(before, torch.SymInt):
        return size_of(key, 2)
    if isinstance(before, int) and isinstance(tokens, int):
        return before + tokens
    return insert_call(graph, operator.add, (tokens, before), size)


def room_for_call(graph: fx.Graph, cache: CacheNodes, ring: Ring) -> fx.Node:
    """Return for how many tokens there is a slot in the memory or in the call, at the graph's insert point."""
    room = cache.room(graph)
    if not overwrites(ring):
        return room
    tokens = size_of(ring.new, 2)
    return insert_call(graph, operator.add, (room, tokens), value_of(room) + value_of(tokens))


def mask_of_memory(
    graph: fx.Graph, ring: Ring, held: fx.Node, room: fx.Node, columns: Any, mask: Any
) -> fx.Node:
    """Return a mask with a column for each slot of a ring's memory, at the graph's insert point.

    Args:
        graph: The nodes.
        ring: What the graph writes into the keys.
        held: How many tokens the memory holds before the call, ``[1]`` on the device.
        room: How many columns the mask is to have.
        columns: How many of the last tokens attention reads, the call's own included.
        mask: Over those, or ``None``.
    """
    tokens = size_of(ring.new, 2)
    device = value_of(ring.new).device
    slots = graph.call_function(torch.arange, (room,), {"dtype": torch.int64, "device": device})
    more = insert_call(graph, operator.sub, (columns, tokens), value_of(columns) - value_of(tokens))
    first = insert_call(graph, operator.sub, (held, more))  # slot of the first that is read
    if ring.position is not None:
        first = graph.call_method("clamp", (first, 0))
    column = insert_call(graph, operator.sub, (slots, first))
    last = insert_call(graph, operator.sub, (columns, 1))
    seen = insert_call(
        graph,
        operator.and_,
        (
            insert_call(graph, operator.ge, (column, 0)),
            insert_call(graph, operator.le, (column, last)),
        ),
    )
    if mask is None:
        return insert_call(graph, operator.getitem, (seen, None))  # one row for all queries
    clamped = graph.call_method("clamp", (column, 0, last))
    gathered = graph.call_method("index_select", (mask, -1, clamped))
    value: Tensor | None = value_of(mask)
    if value is None or value.dtype == torch.bool:
        return insert_call(graph, operator.and_, (gathered, seen))
    return graph.call_function(torch.where, (seen, gathered, torch.finfo(value.dtype).min))
