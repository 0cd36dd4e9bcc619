"""Name a cache by one node, whatever has been written into it."""

from __future__ import annotations

from kvq_compile.lowering.find.movement import is_whole_cache
from kvq_compile.lowering.find.writes import is_write
from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import target_name


def unchain_writes(graph: Graph) -> PassReport:
    """Replace the result of a write in place by the cache that was written.

    Before:  written = cache[:B].index_copy_(2, position, key); attend(query, written)    # cache has B rows
    After:   cache.index_copy_(2, position, key); attend(query, cache)
    Because: a write in place returns its first argument; later passes look for the cache under one name.
    """
    changes = []
    for node in list(graph.fx.nodes):
        if target_name(node) == "getitem" and is_whole_cache(node):
            changes.append(f"{node.name} is read as {node.args[0]}")
            node.replace_all_uses_with(node.args[0])
            graph.fx.erase_node(node)
    for node in graph.fx.nodes:
        if (
            is_write(node) and node.users and target_name(node) != "setitem"
        ):  # which returns nothing
            node.replace_all_uses_with(node.args[0])
            changes.append(f"{node.name} is read as {node.args[0]}")
    return PassReport(tuple(changes))
