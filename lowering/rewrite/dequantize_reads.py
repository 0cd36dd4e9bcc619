"""Serve what is left that touches a quantized cache: read it as an ordinary tensor, write it quantized."""

from __future__ import annotations

import torch
from torch import fx

from kvq_compile.kernels.packed import PARTS
from kvq_compile.lowering.cache_nodes import CacheNodes, slots_from
from kvq_compile.lowering.find.writes import is_write, read_write
from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import root_of, target_name, writes_in_place
from kvq_compile.lowering.sites import LostWrite, Refusal


def dequantize_reads(graph: Graph) -> PassReport:
    """Replace the remaining users of every quantized cache and drop its wrapped placeholder.

    Before:  x = some_op(cache); cache.index_copy_(2, position, y); cache.zero_()
    After:   x = some_op(kvq.dequantize(*cache)); kvq.append_(*cache, y, position); cache_cursor.zero_()
    Because: an attention that was refused still reads the cache that an earlier call has quantized.

    Raises:
        LostWrite: A write cannot be expressed on the quantized cache.
    """
    changes = []
    for placeholder, cache in graph.caches.items():
        if placeholder not in graph.arguments:
            continue  # rows of another cache, which nothing reads any more
        for node in [n for n in graph.fx.nodes if _writes_into(n, placeholder)]:
            changes.append(f"{node.name} writes {placeholder} quantized")
            _write(graph.fx, node, placeholder, cache)
        for user in [n for n in graph.fx.nodes if n in placeholder.users]:
            with graph.fx.inserting_before(user):
                dense = cache.dequantize(graph.fx, placeholder)
            user.replace_input_with(placeholder, dense)
            changes.append(f"{user.name} reads {placeholder} as an ordinary tensor")
        graph.fx.erase_node(placeholder)
    return PassReport(tuple(changes))


def _writes_into(node: fx.Node, cache: fx.Node) -> bool:
    """Return whether a node writes into a cache or into a view of it."""
    called = node.op in ("call_function", "call_method") and bool(node.args)
    return called and writes_in_place(node) and root_of(node.args[0]) is cache


def _write(graph: fx.Graph, write: fx.Node, placeholder: fx.Node, cache: CacheNodes) -> None:
    with graph.inserting_before(write):
        if target_name(write) == "zero_" and write.args[0] is placeholder:
            graph.call_method("zero_", (cache.parts[PARTS.index("cursor")],))
        elif is_write(write) and write.args[0] is placeholder:
            _append(graph, write, cache)
        else:
            raise LostWrite(
                f"{target_name(write)} cannot write into a quantized cache; write whole tokens with index_copy_"
            )
    write.replace_all_uses_with(placeholder)
    graph.erase_node(write)


def _append(graph: fx.Graph, write: fx.Node, cache: CacheNodes) -> None:
    try:
        position, new = read_write(write)
    except Refusal as reason:
        raise LostWrite(f"a quantized cache cannot take this write: {reason}") from None
    tokens = graph.call_method("detach", (new,)) if torch.is_grad_enabled() else new
    cache.append(graph, tokens, slots_from(position))
