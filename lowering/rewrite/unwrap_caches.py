"""Replace each quantized cache among a graph's inputs by the tensors inside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._dynamo.source import AttrSource, TensorProperty, TensorPropertySource

from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.kernels.layout import PageLayout
from kvq_compile.kernels.ops import FRAME, ORIGINALS, PARTS
from kvq_compile.lowering.nodes import value_of


@dataclass(frozen=True)
class CacheInput:
    """The inputs that stand for one quantized cache.

    Attributes:
        parts: Placeholders of its four parts.
        frame: Placeholders of its tables and its shift; ``None`` for what it has not.
        originals: Placeholder of its exact copies in host memory, if it has them.
        length: Placeholder of its length, or the length where it is constant.
        owns_length: Whether that placeholder was made for this cache.
        layout: Its layout.
    """

    parts: tuple[fx.Node, ...]
    frame: tuple[fx.Node | None, fx.Node | None]
    length: Any
    owns_length: bool
    layout: PageLayout
    originals: fx.Node | None = None


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
            tables, shift, originals = (
                None if getattr(cache, name) is None else _part(graph, node, cache, name)
                for name in (*FRAME, ORIGINALS)
            )
            length, owned = _length(graph, node, cache)
        about = length, owned, cache.page_layout
        inputs[node] = CacheInput(parts, (tables, shift), *about, originals)
    return inputs


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
        cache.kind == "static" or name == "tables"
    ):  # its address never changes, so a CUDA graph may write into it
        part.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    source = getattr(node, "_dynamo_source", None)
    if source is not None:
        part._dynamo_source = AttrSource(source, name)
    return part
