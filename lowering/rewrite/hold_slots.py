"""Keep the cache positions of a write as they were at that write."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kvq_compile.lowering.find.writes import is_write, read_write
from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import changed_roots, order_of, root_of, value_of
from kvq_compile.lowering.sites import Refusal


def hold_slots(graph: Graph) -> PassReport:
    """Copy cache positions that the model changes in place between a write and the attention behind it.

    Before:  cache[:, :, slot] = key; slot.add_(1); attend(query, cache)
    After:   written = slot.clone(); cache[:, :, written] = key; slot.add_(1); attend(query, cache)
    Because: `fuse_attention` moves the write behind the attention, where ``slot`` has changed already.
    """
    changes = []
    nodes, place = list(graph.fx.nodes), order_of(graph.fx)
    for write in filter(is_write, nodes):
        slots = _slots(write)
        if not isinstance(value_of(slots), torch.Tensor):
            continue
        last = max(place[user] for user in write.args[0].users)
        if root_of(slots) in changed_roots(nodes[place[write] + 1 : last]):
            with graph.fx.inserting_before(write):
                held = graph.fx.call_method("clone", (slots,))
            held.meta["example_value"] = value_of(slots).clone()  # memory of its own
            write.replace_input_with(slots, held)
            changes.append(f"{write.name} writes at {held}, a copy of {slots}")
    return PassReport(tuple(changes))


def _slots(write: fx.Node) -> Any:
    try:
        return read_write(write)[0]
    except Refusal:
        return None
