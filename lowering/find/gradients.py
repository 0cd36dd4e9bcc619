"""Refuse to rewrite where gradients are recorded."""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_compile.lowering.find.sites import left_alone
from kvq_compile.lowering.graph import Graph, PassReport

RECORDING_GRADIENTS = (
    "gradients are being recorded, and rounding has none; "
    "run under torch.no_grad() or torch.inference_mode()"
)


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
