"""Drop casts of arguments that change nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kvq_compile.lowering.graph import copy_module
from kvq_compile.lowering.nodes import target_name, value_of

_CASTS = ("to", "type_as", "float", "half", "bfloat16", "double")
# Options of a cast that may return another tensor all the same.
_COPYING = ("copy", "memory_format")


def drop_idle_casts(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a graph without casts of arguments to the dtype and the device that they have; itself if it has none.

    Before:  cache = cache.to(query); cache[:, position] = key; return cache
    After:   cache[:, position] = key; return cache
    Because: PyTorch returns the argument itself there, so that what looks like another tensor is the cache. Models
             write this so that their caches follow them to another dtype or device.
    """
    if not any(_is_idle(node) for node in gm.graph.nodes):
        return gm
    gm = copy_module(gm)
    for node in list(gm.graph.nodes):
        if _is_idle(node):
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)
    gm.recompile()
    return gm


def _is_idle(node: fx.Node) -> bool:
    if node.op != "call_method" or target_name(node) not in _CASTS or not node.args:
        return False
    argument: Any = node.args[0]
    if not isinstance(argument, fx.Node) or argument.op != "placeholder":
        return False
    before, after = value_of(argument), value_of(node)
    if not isinstance(before, torch.Tensor) or not isinstance(after, torch.Tensor):
        return False
    same = before.dtype == after.dtype and before.device == after.device
    return same and len(node.args) <= 2 and not any(node.kwargs.get(name) for name in _COPYING)
