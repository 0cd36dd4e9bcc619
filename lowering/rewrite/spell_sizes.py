"""Write numbers where sizes are read that every call of a graph has alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kvq_compile.lowering.graph import copy_graph, module_of
from kvq_compile.lowering.nodes import target_name, value_of


def spell_sizes(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a graph that has settled sizes as numbers; itself if it reads none.

    Before:  size = hidden.size(); tokens = size[1]; positions = arange(tokens) + length
    After:   positions = arange(14) + length
    Because: a size that is symbolic when Dynamo meets it, and that something later in the same graph makes a number, is
             read from the tensor. Cache positions would seem to depend on what the model computed before.

    Leaves alone: sizes that differ from call to call, and what a graph returns.
    """
    if not any(_settled(node) is not None for node in gm.graph.nodes):
        return gm
    graph = copy_graph(gm)
    for node in reversed(graph.nodes):
        number = _settled(node)
        if number is not None:
            _replace(node, number)
        if not node.users and (number is not None or target_name(node) == "size"):
            graph.erase_node(node)
    return module_of(gm, graph)


def _settled(node: fx.Node) -> int | None:
    """Return the number that a node is in every call; ``None`` of tensors and of what differs."""
    value: Any = value_of(node)
    if node.op not in ("call_function", "call_method") or not isinstance(value, torch.SymInt):
        return None
    number: int | None = value.node.maybe_as_int()
    return number


def _replace(node: fx.Node, number: int) -> None:
    def replaced(arg: fx.Node) -> Any:
        return number if arg is node else arg

    for user in list(node.users):
        if user.op != "output":
            user.args = fx.node.map_arg(user.args, replaced)
            user.kwargs = fx.node.map_arg(user.kwargs, replaced)
