"""Erase what the rewriting left without users."""

from __future__ import annotations

from torch import fx

from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import root_of, target_name, writes_in_place

_COPIES = ("copy_", "setitem")  # whose result nothing reads, but what they are written into


def drop_orphans(graph: Graph) -> PassReport:
    """Erase calls that lost all their users to the rewriting and have no other effect.

    Before:  scores = matmul(query, keys); scores += mask; weights = softmax(scores)    # no longer used
    After:   # nothing
    Because: they would dequantize the whole cache for nothing.

    Leaves alone: calls that never had users, but for copies into what nothing reads any more. They are in the graph for
    an effect: custom operators, assertions, functorch's levels, draws of random numbers.
    """
    erased = []
    for node in reversed(list(graph.fx.nodes)):
        lost = node in graph.used or target_name(node) in _COPIES
        if lost and not node.users and not _is_seen(node):
            erased.append(node.name)
            graph.fx.erase_node(node)
    return PassReport(tuple(f"{name} is gone" for name in erased))


def _is_seen(node: fx.Node) -> bool:
    """Return whether a call writes into something that others can see, or has another effect."""
    if not writes_in_place(node):
        return False
    if node.is_impure() or getattr(node.target, "_schema", None) is not None:
        return True
    memory = root_of(node.args[0])
    fresh = isinstance(memory, fx.Node) and memory.op in ("call_function", "call_method")
    return not (fresh and _is_only_written(memory, memory))


def _is_only_written(tensor: fx.Node, memory: fx.Node) -> bool:
    """Return whether nothing reads the elements of a tensor: it and its views are written, and that is all."""
    for user in tensor.users:
        writes = writes_in_place(user) and user.args[0] is tensor and tensor not in user.args[1:]
        if user.op == "output" or not (writes or root_of(user) is memory):
            return False
        if not _is_only_written(user, memory):
            return False
    return True
