"""Casts of arguments: drop those that change nothing, spell the others by a dtype, find those of quantized caches."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kvq_compile.kernels.cache.arranged import ArrangedKV
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.lowering.graph import copy_graph, module_of
from kvq_compile.lowering.nodes import VIEWS, source_name, target_name, value_of, writes_in_place

_CASTS = ("to", "type_as", "float", "half", "bfloat16", "double")
# Options of a cast that may return another tensor all the same.
_COPYING = ("copy", "memory_format")


def drop_idle_casts(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a graph without casts of arguments to the dtype and the device that they have; itself if it has none.

    Before:  cache = cache.to(query); cache[:, position] = key; return cache
    After:   cache[:, position] = key; return cache
    Because: PyTorch returns the argument itself there, so that what looks like another tensor is the cache. Models
             write this so that their caches follow them to another dtype or device.

    Where they do follow, ``cache.to(query)`` becomes ``cache.to(torch.bfloat16)``, which does not depend on the query.
    """
    if not any(_is_idle(node) or _is_after_another(node) for node in gm.graph.nodes):
        return gm
    graph = copy_graph(gm)
    for node in list(graph.nodes):
        if _is_idle(node):
            node.replace_all_uses_with(node.args[0])
            graph.erase_node(node)
        elif _is_after_another(node):
            node.target, node.args = "to", (node.args[0], value_of(node).dtype)
    return module_of(gm, graph)


def cast_caches(graph: fx.Graph) -> list[str]:
    """Return the model's names of the quantized caches that a call casts to another dtype, writes and returns so.

    Such a call may run as captured: a quantized cache that is cast is a quantized cache, and takes what is written.
    """
    (output,) = graph.find_nodes(op="output")
    casts = [node for node in output.all_input_nodes if _is_of_quantized(node)]
    writes = [node for node in graph.nodes if node.args and writes_in_place(node)]
    written = {_cast_behind(node.args[0]) for node in writes} if casts else ()
    return [source_name(node.args[0]) for node in casts if node in written]


def _is_of_quantized(node: fx.Node) -> bool:
    cast = _cast(node)
    if cast is None or cast[0].dtype == cast[1].dtype:
        return False
    return isinstance(cast[0], (QuantizedKV, ArrangedKV))


def _cast_behind(node: Any) -> Any:
    """Return the cast of an argument that ``node`` is a view of."""
    while isinstance(node, fx.Node) and _cast(node) is None and target_name(node) in VIEWS:
        node = node.args[0]
    return node


def _is_idle(node: fx.Node) -> bool:
    found = _cast(node)
    if found is None or any(node.kwargs.get(name) for name in _COPYING):
        return False
    before, after = found
    return before.dtype == after.dtype and before.device == after.device


def _is_after_another(node: fx.Node) -> bool:
    """Return whether an argument is cast to the dtype of another tensor, whose device it is on."""
    found = _cast(node)
    if found is None or len(node.args) != 2 or not isinstance(value_of(node.args[1]), torch.Tensor):
        return False
    before, after = found
    return target_name(node) in ("to", "type_as") and before.device == after.device


def _cast(node: fx.Node) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Return the tensors before and behind a cast of an argument, whose operands are not more than two."""
    if node.op != "call_method" or target_name(node) not in _CASTS or not 1 <= len(node.args) <= 2:
        return None
    argument: Any = node.args[0]
    if not isinstance(argument, fx.Node) or argument.op != "placeholder":
        return None
    before, after = value_of(argument), value_of(node)
    both = isinstance(before, torch.Tensor) and isinstance(after, torch.Tensor)
    return (before, after) if both else None
