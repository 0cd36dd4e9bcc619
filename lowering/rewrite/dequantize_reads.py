"""Serve what is left that touches a quantized cache: read it as an ordinary tensor, write it quantized."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kvq_compile.kernels.packed import PARTS
from kvq_compile.lowering.cache_nodes import CacheNodes, slots_from, tokens_for
from kvq_compile.lowering.find.writes import is_write, read_write
from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import (
    erase_unread,
    getitem_index,
    root_of,
    target_name,
    value_of,
    writes_in_place,
)
from kvq_compile.lowering.ring_nodes import append
from kvq_compile.lowering.sites import LostWrite, Refusal

_ALWAYS_VIEWS = (
    *("permute", "transpose", "narrow", "select", "unsqueeze", "squeeze", "expand", "view"),
    *("getattr", "detach", "alias", "movedim", "swapaxes", "swapdims"),
)
SIZES = ("numel", "size", "dim", "nelement", "__len__")


def dequantize_reads(graph: Graph) -> PassReport:
    """Replace the remaining users of every quantized cache and drop its wrapped placeholder.

    Before:  cache.index_copy_(2, position, y); x = some_op(cache); cache.zero_()
    After:   dense = kvq.dequantize(*cache); dense.index_copy_(2, position, y); kvq.append_(*cache, y, position)
             x = some_op(dense); cache_cursor.zero_()
    Because: an attention that was refused still reads the cache that an earlier call has quantized. The tokens of the
             call are exact to it, as they are to one that is rewritten.

    Raises:
        LostWrite: A write cannot be expressed on the quantized cache.
    """
    changes = []
    writers = [
        node
        for node in graph.fx.nodes
        if node.op in ("call_function", "call_method") and node.args and writes_in_place(node)
    ]
    for placeholder, cache in graph.caches.items():
        if placeholder not in graph.arguments:
            continue  # rows of another cache, which nothing reads any more
        _write_ring(graph, placeholder, cache)
        writes = [node for node in writers if _writes_into(node, placeholder)]
        for node in writes:
            _write(graph.fx, node, placeholder, cache)
            changes.append(f"{node.name} writes {placeholder} quantized")
        for node in [node for node in graph.fx.nodes if node in placeholder.users]:
            if target_name(node) in SIZES and not node.users:
                graph.fx.erase_node(node)  # Dynamo leaves it behind where it knows the number
        users = [node for node in graph.fx.nodes if node in placeholder.users]
        if set(users) <= set(writes):
            for node in reversed(writes):
                graph.fx.erase_node(node)
        else:
            with graph.fx.inserting_before(users[0]):
                dense = cache.dequantize(graph.fx, placeholder)
            placeholder.replace_all_uses_with(dense)
            changes.append(f"{dense.name} is what others read of {placeholder}")
        graph.fx.erase_node(placeholder)
    return PassReport(tuple(changes))


def _writes_into(node: fx.Node, cache: fx.Node) -> bool:
    """Return whether a node that writes in place does so into a cache or into a view of it."""
    return root_of(node.args[0]) is cache or _seen_by_name(node.args[0]) is cache


def _seen_by_name(node: Any) -> Any:
    """Return what a chain of operations that never copy is a view of."""
    while target_name(node) in _ALWAYS_VIEWS or _is_slice(node):
        node = node.args[0]
    return node


def _is_slice(node: Any) -> bool:
    """Return whether a subscript takes a part that lies in the memory of the whole."""
    index = getitem_index(node) if target_name(node) == "getitem" else None
    return index is not None and not any(
        isinstance(value_of(part), (torch.Tensor, list)) for part in index
    )


def _write_ring(graph: Graph, placeholder: fx.Node, cache: CacheNodes) -> None:
    """Append the new tokens of a ring that no attention has taken over, instead of overwriting what is read of it."""
    for ring in graph.rings.values():
        if ring.past is not placeholder or ring.write not in placeholder.users:
            continue
        with graph.fx.inserting_before(ring.write.next):
            append(graph.fx, cache, ring, tokens_for(graph.fx, ring.new, placeholder))
        kept = [node for node in ring.write.all_input_nodes if node is not placeholder]
        graph.fx.erase_node(ring.write)
        erase_unread(graph.fx, kept)


def _write(graph: fx.Graph, write: fx.Node, placeholder: fx.Node, cache: CacheNodes) -> None:
    """Write quantized, behind ``write``, what that writes into the dense tensor."""
    direct = write.args[0] is placeholder
    with graph.inserting_before(write.next):
        if target_name(write) == "zero_" and direct:
            graph.call_method("zero_", (cache.parts[PARTS.index("cursor")],))
        elif is_write(write) and direct:
            _append(graph, write, placeholder, cache)
        else:
            raise LostWrite(
                f"{target_name(write)} cannot write into a quantized cache; write whole tokens with index_copy_"
            )
    write.replace_all_uses_with(placeholder)


def _append(graph: fx.Graph, write: fx.Node, placeholder: fx.Node, cache: CacheNodes) -> None:
    try:
        position, new = read_write(write)
    except Refusal as reason:
        raise LostWrite(f"a quantized cache cannot take this write: {reason}") from None
    cache.append(graph, tokens_for(graph, new, placeholder), slots_from(position))
