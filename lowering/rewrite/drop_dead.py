"""Erase what the rewriting left without users."""

from __future__ import annotations

from torch import fx

from kvq_compile.lowering.nodes import root_of, writes_in_place


def drop_dead(graph: fx.Graph) -> None:
    """Erase calls whose result nobody uses and that write into nothing that outlives them.

    Before:  scores = matmul(query, keys); scores += mask; weights = softmax(scores)    # no longer used
    After:
    Because: left in place they would read the whole cache as an ordinary tensor.
    """
    for node in reversed(list(graph.nodes)):
        if node.op in ("call_function", "call_method") and not node.users and not _is_seen(node):
            graph.erase_node(node)


def _is_seen(node: fx.Node) -> bool:
    """Say whether a call writes into something that others can see."""
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
