"""Erase what the rewriting left without users."""

from __future__ import annotations

from torch import fx

from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import root_of, writes_in_place


def drop_orphans(graph: Graph) -> PassReport:
    """Erase calls that lost all their users to the rewriting and have no other effect.

    Before:  scores = matmul(query, keys); scores += mask; weights = softmax(scores)    # no longer used
    After:   # nothing
    Because: they would dequantize the whole cache for nothing.

    Leaves alone: calls that never had users. They are in the graph for an effect: custom operators,
    assertions, functorch's levels, draws of random numbers.
    """
    erased = []
    for node in reversed(list(graph.fx.nodes)):
        if node in graph.used and not node.users and not _is_seen(node):
            erased.append(node.name)
            graph.fx.erase_node(node)
    return PassReport(tuple(f"{name} is gone" for name in erased))


def _is_seen(node: fx.Node) -> bool:
    """Return whether a call writes into something that others can see, or has another effect."""
    if not writes_in_place(node):
        return False
    if node.is_impure() or getattr(node.target, "_schema", None) is not None:
        return True
    written = node.args[0]
    while (
        isinstance(written, fx.Node)
        and len(written.users) == 1
        and written.op in ("call_function", "call_method")
    ):
        if root_of(written) is written:
            return False  # a fresh tensor that only this call has touched
        written = written.args[0]
    return True
