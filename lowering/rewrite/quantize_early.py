"""Quantize the caches that a call makes as soon as nothing reads them any more."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from kvq_compile.kernels import ops
from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import changed_roots, order_of, root_of, writes_in_place


def quantize_early(graph: Graph) -> PassReport:
    """Move every quantization to behind the last reader of its tokens.

    Before:  out_1 = attention(query_1, keys_1, ...); out_2 = attention(query_2, keys_2, ...); ...
             return *kvq.quantize(keys_1), *kvq.quantize(keys_2), ...
    After:   out_1 = attention(query_1, keys_1, ...); made_1 = kvq.quantize(keys_1)
             out_2 = attention(query_2, keys_2, ...); made_2 = kvq.quantize(keys_2); ...; return *made_1, *made_2
    Because: the call would hold the tokens of all layers in 16 bit until its end, beside the quantized caches.

    Leaves alone: tokens whose memory the graph writes into, and what follows from such memory.
    """
    order, changed = order_of(graph.fx), changed_roots(graph.fx.nodes)
    moved = []
    for made in [node for node in graph.fx.nodes if node.target is ops.quantize]:
        x = made.args[0]
        if not isinstance(x, fx.Node) or root_of(x) in changed:
            continue
        own = {made, *made.users}
        last = max((*_readers(x, own), x), key=lambda node: order.get(node, 0))
        steps = _between(made, order[last], order)
        if any(writes_in_place(step) or _reads(step, changed) for step in steps):
            continue
        for step in (*steps, made, *sorted(made.users, key=order.__getitem__)):
            if step is not last.next:
                last.append(step)
            last = step
        if steps:  # which other quantizations may follow from, too
            order = order_of(graph.fx)
        moved.append(f"{made} follows the last reader of {x}")
    return PassReport(tuple(moved))


def _reads(step: fx.Node, changed: set[fx.Node]) -> bool:
    """Return whether a node is, or reads, memory that the graph writes into."""
    return any(root_of(node) in changed for node in (step, *step.all_input_nodes))


def _readers(x: fx.Node, own: set[fx.Node]) -> set[fx.Node]:
    """Return what reads a tensor or views of it, but for what returns it and for ``own``."""
    memory, found, waiting = root_of(x), set[fx.Node](), [x]
    while waiting:
        for user in waiting.pop().users:
            if user in found or user in own or user.op == "output":
                continue
            found.add(user)
            if root_of(user) is memory:
                waiting.append(user)
    return found


def _between(node: fx.Node, place: int, order: Mapping[fx.Node, int]) -> list[fx.Node]:
    """Return what a node follows from that comes behind a place, in order."""
    found, waiting = set[fx.Node](), [node]
    while waiting:
        behind = {n for n in waiting.pop().all_input_nodes if order[n] > place} - found
        found |= behind
        waiting += behind
    return sorted(found, key=order.__getitem__)
