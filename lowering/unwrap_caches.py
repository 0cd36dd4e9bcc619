"""Replace each quantized cache among a graph's inputs by the tensors inside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import AttrSource

from kvq_compile.kernels.cache import QuantizedKV
from kvq_compile.kernels.ops import PARTS
from kvq_compile.kernels.spec import PageLayout
from kvq_compile.lowering.graph import value_of


@dataclass(frozen=True)
class CacheInput:
    """The inputs that stand for one quantized cache.

    Attributes:
        parts: Placeholders of its four parts.
        length: Placeholder of its length, or the length where it is constant.
        layout: Its layout.
    """

    parts: tuple[fx.Node, ...]
    length: Any
    layout: PageLayout


def unwrap_caches(graph: fx.Graph) -> dict[fx.Node, CacheInput]:
    """Add placeholders for the parts of every quantized cache.

    Before:  cache = placeholder                                   # QuantizedKV [B, H, S, D]
    After:   cache_codes, ..., cache_cursor, cache_length = placeholder, ...
    Because: AOTAutograd would turn each write into a wrapped tensor into a copy of the whole cache.

    The wrapped placeholders keep their users; they go when the rewriting passes have replaced those.
    """
    inputs: dict[fx.Node, CacheInput] = {}
    for node in list(graph.nodes):
        cache = value_of(node)
        if node.op != "placeholder" or not isinstance(cache, QuantizedKV):
            continue
        with graph.inserting_before(node):
            parts = tuple(_part(graph, node, cache, name) for name in PARTS)
            length: Any = cache.shape[2]
            if isinstance(length, torch.SymInt):
                length = graph.placeholder(f"{node.name}_length")
                length.meta["example_value"] = cache.shape[2]
        inputs[node] = CacheInput(parts, length, cache.page_layout)
    return inputs


def _part(graph: fx.Graph, node: fx.Node, cache: QuantizedKV, name: str) -> fx.Node:
    part = graph.placeholder(f"{node.name}_{name}")
    part.meta["example_value"] = getattr(cache, name)
    if cache.kind == "static":  # its address never changes, so a CUDA graph may write into it
        part.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    source = getattr(node, "_dynamo_source", None)
    if source is not None:
        part._dynamo_source = AttrSource(source, name)  # type: ignore[attr-defined]
    return part
