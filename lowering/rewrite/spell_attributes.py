"""Read attributes of tensors that are views by their name."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kvq_compile.lowering.find.trial import plain_name
from kvq_compile.lowering.graph import copy_graph, module_of

_ATTRIBUTES = {
    "mT": "mT",
    "mH": "mH",
    "numpy_T": "T",
    "matrix_H": "H",
}  # by the name of the operator


def spell_attributes(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a graph that reads transposed tensors as attributes; itself if it has no other spelling of them.

    Before:  aten.mT(key)
    After:   getattr(key, "mT")
    Because: Dynamo traces an attribute as one up to PyTorch 2.13, and as the operator behind it from 2.14 on. All who
             look at a graph know the first.
    """
    if not any(_attribute(node) for node in gm.graph.nodes):
        return gm
    graph = copy_graph(gm)
    for node in graph.nodes:
        name = _attribute(node)
        if name:
            node.target, node.args = getattr, (node.args[0], name)
    return module_of(gm, graph)


def _attribute(node: fx.Node) -> str:
    """Return the attribute that an operator of PyTorch stands for; empty where it stands for none."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        own = target.namespace == "aten"
    else:
        packet = isinstance(target, torch._ops.OpOverloadPacket)
        own = packet and target._qualified_op_name.startswith("aten::")
    return _ATTRIBUTES.get(plain_name(node), "") if own and len(node.args) == 1 else ""
