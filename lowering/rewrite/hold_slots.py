"""Keep the cache positions of a write as they were at that write."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kvq_compile.lowering.find.positions import change_between
from kvq_compile.lowering.find.writes import is_write, read_write
from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import changes, input_of, order_of, root_of, value_of
from kvq_compile.lowering.sites import Refusal
from kvq_compile.lowering.unchanged import unchanged


def hold_slots(graph: Graph) -> PassReport:
    """Copy cache positions that the model changes in place between a write and the attention behind it.

    Before:  cache[:, :, slot] = key; slot.add_(1); attend(query, cache)
    After:   written = slot.clone(); cache[:, :, written] = key; slot.add_(1); attend(query, cache)
    Because: `fuse_attention` moves the write behind the attention, where ``slot`` has changed already.
    """
    told = []
    with unchanged(graph.fx):  # clones of slots write into nothing
        changed = [(write, _slots(write)) for write in graph.fx.nodes if _changes_slots(write)]
    copies: dict[fx.Node, fx.Node] = {}
    for write, slots in changed:
        held = copies.get(slots)
        if held is None or change_between([slots], [held, write]):
            with graph.fx.inserting_before(write):
                held = copies[slots] = graph.fx.call_method("clone", (slots,))
            held.meta["example_value"] = value_of(slots).clone()  # memory of its own
        write.replace_input_with(slots, held)
        told.append(f"{write.name} writes at {held}, a copy of {slots}")
    return PassReport(tuple(told))


def _changes_slots(write: fx.Node) -> bool:
    """Return whether the cache positions of a write change before the last use of what it writes into."""
    slots = _slots(write) if is_write(write) else None
    if not isinstance(value_of(slots), torch.Tensor):
        return False
    place = order_of(write.graph)
    last = max(place[user] for user in input_of(write).users)
    return changes(write.graph, (root_of(slots),), place[write] + 1, last)


def _slots(write: fx.Node) -> Any:
    try:
        return read_write(write)[0]
    except Refusal:
        return None
