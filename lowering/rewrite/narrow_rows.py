"""Take the rows of a cache that a call reads and writes in place of the whole cache."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from typing import Any

from torch import fx

from kvq_compile.kernels.cache.some_rows import like_rows
from kvq_compile.lowering.graph import copy_module
from kvq_compile.lowering.nodes import FULL, getitem_index, is_full, target_name, value_of
from kvq_compile.lowering.some_rows import SomeRows


def narrow_rows(gm: fx.GraphModule, known: Mapping[fx.Node, range]) -> SomeRows:
    """Return a copy of a graph that takes some rows of caches.

    Before:  cache = placeholder                         # [4, H, S, D]
             cache[:2, :, position] = key; attend(query, cache[:2, :, :end])
    After:   cache = placeholder                         # [2, H, S, D], a view of these rows
             cache[:, :, position] = key; attend(query, cache[:, :, :end])
    Because: rows of a quantized cache are a cache as well, which the passes know. A cache that is returned as it is
             is left out of the results, for it is more than its rows.

    Args:
        gm: The graph that Dynamo captured; it is left untouched.
        known: The rows of its arguments that all readers and writers take.
    """
    module = copy_module(gm)
    graph = module.graph
    copies = dict(zip(gm.graph.nodes, graph.nodes, strict=True))
    places = {node: place for place, node in enumerate(graph.find_nodes(op="placeholder"))}
    results: list[Any] = list(graph.output_node().args[0])  # type: ignore[arg-type]
    for node in known:
        for user in list(copies[node].users):
            _take_all(user, copies[node])
    some = {node: rows for node, rows in known.items() if len(rows) < value_of(node).shape[0]}
    taken = {copies[node]: rows for node, rows in some.items()}
    for node, rows in taken.items():
        node.meta["example_value"] = like_rows(value_of(node), rows)
    returned = {at: places[x] for at, x in enumerate(results) if x in taken}
    graph.output_node().args = (tuple(x for x in results if x not in taken),)
    graph.lint()
    module.recompile()
    return SomeRows(module, {places[node]: rows for node, rows in taken.items()}, returned)


def _take_all(user: fx.Node, node: fx.Node) -> None:
    """Let what takes some rows of a tensor take all."""
    if user.op == "output":
        return
    if target_name(user) == "setitem":
        index = user.args[1] if isinstance(user.args[1], tuple) else (user.args[1],)
        rest = index if index[0] is Ellipsis else (FULL, *index[1:])
        user.args = (node, rest, *user.args[2:])
        return
    index = getitem_index(user) or (FULL,)
    if all(map(is_full, index[1:])):
        user.replace_all_uses_with(node)
        user.graph.erase_node(user)
        return
    assert user.target is operator.getitem
    user.args = (node, (FULL, *index[1:]))
