"""Replace each quantized cache among a graph's inputs by the tensors inside it."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx
from torch._dynamo.source import AttrSource, TensorProperty, TensorPropertySource

from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.kernels.cache.trim import TRIM
from kvq_compile.kernels.packed import calibrated_names, part_names
from kvq_compile.lowering.cache_nodes import CacheNodes
from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import value_of


def unwrap_caches(graph: Graph) -> PassReport:
    """Add placeholders for the parts of every quantized cache.

    Before:  cache = placeholder                                   # QuantizedKV [B, H, S, D]
    After:   cache_codes, ..., cache_cursor, cache_length = placeholder, ...
    Because: AOTAutograd functionalizes a write into a tensor subclass by copying the whole cache.

    The wrapped placeholders keep their users until `dequantize_reads` erases them.
    """
    rings = {ring.past for ring in graph.rings.values()}
    for node in graph.inputs:
        cache = value_of(node)
        if not isinstance(cache, QuantizedKV):
            continue
        with graph.fx.inserting_before(node):
            layout = cache.page_layout
            parts, calibrated = (
                tuple(_part(graph.fx, node, cache, name) for name in names(layout))
                for names in (part_names, calibrated_names)
            )
            trim = None if cache.trim is None else _part(graph.fx, node, cache, TRIM)
            length = _length(graph.fx, node, cache)
        is_ring = cache.kind == "ring" or node in rings
        graph.caches[node] = CacheNodes(parts, layout, calibrated, *length, trim, is_ring)
    return PassReport(tuple(f"{node} becomes its parts" for node in graph.caches))


def _length(graph: fx.Graph, node: fx.Node, cache: QuantizedKV) -> tuple[Any, bool]:
    """Return the cache's length, a number or a placeholder, and whether that placeholder is new."""
    length: Any = cache.shape[2]
    if not isinstance(length, torch.SymInt):
        return length, False
    for other in graph.find_nodes(op="placeholder"):
        value = value_of(other)
        if isinstance(value, torch.SymInt) and value.node.expr == length.node.expr:
            return other, False
    made = graph.placeholder(f"{node.name}_length")
    made.meta["example_value"] = length
    if hasattr(node, "_dynamo_source"):
        made._dynamo_source = TensorPropertySource(node._dynamo_source, TensorProperty.SIZE, 2)
    return made, True


def _part(graph: fx.Graph, node: fx.Node, cache: QuantizedKV, name: str) -> fx.Node:
    part = graph.placeholder(f"{node.name}_{name}")
    part.meta["example_value"] = getattr(cache, name)
    if (
        cache.kind != "grown" or name == "tables"
    ):  # its address never changes, so a CUDA graph may write into it
        part.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    source = getattr(node, "_dynamo_source", None)
    if source is not None:
        part._dynamo_source = AttrSource(source, name)
    return part
