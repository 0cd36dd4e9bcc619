"""Normalize every spelling of a write into a buffer to one assignment."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from kvq_compile.lowering.find.by_row import find_rows_write
from kvq_compile.lowering.find.in_place import find_write, is_spelled
from kvq_compile.lowering.find.movement import is_cache_like
from kvq_compile.lowering.find.sliding import slides_at
from kvq_compile.lowering.find.updates import ALLOCATIONS, Update
from kvq_compile.lowering.find.writes import write_rows_
from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import (
    EVALUATED,
    FULL,
    bodies_of,
    erase_unread,
    input_of,
    insert_call,
    order_of,
    same,
    shape_of,
    size_of,
    target_name,
    value_of,
    writers_of,
)
from kvq_compile.lowering.unchanged import unchanged


def spell_writes(graph: Graph) -> PassReport:
    """Write the call's tokens into a buffer of fixed size by ``cache[:, :, position] = key``.

    Before:  cache.scatter_(2, index.expand(B, H, T, D), key); cache[:, :, a:b].copy_(key); cache.copy_(where(...))
    After:   cache[:, :, position] = key; or, where each row has positions of its own, write_rows_(cache, position, key)
    Because: later passes match one pattern, whatever spelling the model has.

    Leaves alone: writes that evaluation does not prove to be tokens put at cache positions, whichever these are; those
    that roll a buffer once it is full, which `spell_rings` knows.
    """
    changes = []
    for buffer, writers in writers_of(graph.fx).items():
        if not _may_be_cache(buffer) or all(is_spelled(writer, buffer) for writer in writers):
            continue
        if any(map(bodies_of, writers)):
            continue  # whose other results are needed
        with unchanged(graph.fx):
            found = find_write(buffer, writers)
            by_row = None if found is not None else find_rows_write(buffer, writers)
            slides = found is not None and _slides(buffer, writers, found)
        if by_row is not None:
            _spell(graph.fx, buffer, writers, by_row, write_rows_)
            changes.append(f"{buffer} is written by row at {by_row.position} with {by_row.new}")
        elif found is not None and not slides:
            _spell(graph.fx, buffer, writers, found)
            changes.append(f"{buffer} is written at {found.position} with {found.new}")
    graph.used |= {node for node in graph.fx.nodes if node.users}
    return PassReport(tuple(changes))


def _may_be_cache(node: fx.Node) -> bool:
    allocated = target_name(node) in ALLOCATIONS and len(shape_of(node) or ()) == 4
    return is_cache_like(node) or allocated


def _slides(buffer: fx.Node, writers: list[fx.Node], found: Update) -> bool:
    about = buffer, writers, found.new, found.position
    return isinstance(value_of(found.position), Tensor) and slides_at(*about) is not None


def _spell(
    graph: fx.Graph,
    buffer: fx.Node,
    writers: list[fx.Node],
    found: Update,
    call: Callable[..., Any] = operator.setitem,
) -> None:
    """Replace the writes into a buffer, each of which returns what it writes into."""
    last = max(writers, key=order_of(graph).__getitem__)
    with graph.inserting_before(last.next):
        at = _rows if call is write_rows_ else _index
        write = insert_call(graph, call, (buffer, at(graph, found), found.new))
        write.meta[EVALUATED] = True
    for writer in writers:
        writer.replace_all_uses_with(input_of(writer))
    for writer in reversed(writers):
        graph.erase_node(writer)
    erase_unread(graph, [step for step in found.steps if step not in writers])


def _index(graph: fx.Graph, found: Update) -> Any:
    return FULL, FULL, _slots(graph, found)


def _slots(graph: fx.Graph, found: Update) -> Any:
    position, value = found.position, value_of(found.position)
    if isinstance(value, Tensor):
        if value.dim() == 1:
            return position
        return _vector(graph, position, value)
    tokens = size_of(found.new, 2)
    if isinstance(position, int) and isinstance(tokens, int):
        return slice(position, position + tokens)
    end = insert_call(graph, operator.add, (position, tokens), value + value_of(tokens))
    return slice(position, end)


def _rows(graph: fx.Graph, found: Update) -> fx.Node:
    """Return the positions of a write by row, ``[B, T]``."""
    position: fx.Node = found.position
    value, rows = value_of(position), int((shape_of(found.new) or ())[0])  # a guard
    tokens = (shape_of(found.new) or ())[2]
    if value.dim() == 2 and same(value.shape[0], rows) and same(value.shape[1], tokens):
        return position
    known = (user for user in position.users if user.args == (position, rows, -1))
    made = next((user for user in known if target_name(user) == "reshape"), None)
    if made is None:  # here, so that it serves all caches
        with graph.inserting_after(position):
            made = graph.call_method("reshape", (position, rows, -1))
        made.meta["example_value"] = value.reshape(rows, -1)
    return made


def _vector(graph: fx.Graph, position: fx.Node, value: Tensor) -> fx.Node:
    vector = graph.call_method("reshape", (position, -1))
    vector.meta["example_value"] = value.reshape(-1)
    return vector
