"""Refuse to rewrite where gradients are recorded."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from kvq_compile.kernels.cache.arranged import ArrangedKV
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.lowering.find.bodies import products_of
from kvq_compile.lowering.find.sites import left_alone
from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import target_name, value_of

RECORDING_GRADIENTS = (
    "gradients are being recorded, and rounding has none; "
    "run under torch.no_grad() or torch.inference_mode()"
)

TRANSFORMED = (
    "it is attended to within a transform of torch.func in the compiled code, and operators on packed caches have no "
    "rules for these"
)
_OPENS = ("_increment_nesting", "_enter_dual_level")
_CLOSES = ("_decrement_nesting", "_exit_dual_level")
_ATTENDS = ("scaled_dot_product_attention", "flex_attention")


def is_transformed(graph: fx.Graph) -> bool:
    """Return whether a graph attends, or uses packed caches, within a transform such as ``torch.func.grad``."""
    depth = 0
    for node in graph.nodes:
        name = target_name(node)
        depth += name.endswith(_OPENS) - name.endswith(_CLOSES)
        if depth and (_attends(node) or any(map(_is_packed, node.all_input_nodes))):
            return True
    return False


def _attends(node: fx.Node) -> bool:
    name = target_name(node)
    return name in _ATTENDS or (name == "softmax" and any(products_of(node)))


def _is_packed(node: fx.Node) -> bool:
    return isinstance(value_of(node), (QuantizedKV, ArrangedKV))


def refuse_gradients(graph: Graph) -> PassReport:
    """Refuse all sites where a gradient could flow through them.

    Before:  sites, and an argument that requires a gradient under ``enable_grad``
    After:   no sites
    Because: quantization is piecewise constant: its gradient is zero, and training would go wrong without a word.
    """
    records = records_gradients(graph)
    refused = graph.sites if records else []
    graph.sites = [] if records else graph.sites
    graph.reports += [
        left_alone(site.layer, site.where, site.attention.output, RECORDING_GRADIENTS)
        for site in refused
    ]
    return PassReport(tuple(f"{site.attention.output} is no site" for site in refused))


def records_gradients(graph: Graph) -> bool:
    """Return whether a gradient could flow from an argument of the call."""
    arguments = graph.inputs.values()
    needed = any(isinstance(x, Tensor) and x.requires_grad for x in arguments)
    return torch.is_grad_enabled() and needed
