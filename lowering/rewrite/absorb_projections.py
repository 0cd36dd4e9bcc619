"""Attend to latents themselves, where keys and values are made of them by projections."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import fx

from kvq_compile.lowering.cache_nodes import CacheNodes, Slots
from kvq_compile.lowering.nodes import insert_call, size_of, value_of
from kvq_compile.lowering.sites import AttentionSite, Projection


def attend(
    graph: fx.Graph,
    site: AttentionSite,
    keys: CacheNodes,
    values: CacheNodes,
    new: tuple[fx.Node, fx.Node],
    mask: Any,
    slots: Slots,
) -> fx.Node:
    """Attend to the caches of a site and to the exact new tokens behind them, at the graph's insert point.

    Before:  latents = cat([past, latent], 2); key = cat([up(latents), rotary], -1); value = down(latents)
             output = attention(query, key, value)
    After:   query' = cat([query[rope], query[nope] @ up], -1)
             output = kvq.attend(query', rotary, latents, scores of both) @ down
    Because: the keys and values of all heads are some hundred times as large as what is kept. They would have to be
             made anew at each step, from a cache that is read dense.
    """
    attention, expansion = site.attention, site.expansion
    if expansion is None:
        return keys.attend(graph, values, attention, new, mask, slots)
    dtype = value_of(new[1]).dtype
    query = [
        _absorbed(graph, attention.query, part, cache, dtype)
        for part, cache in ((expansion.key, new[0]), (expansion.latent_key, new[1]))
    ]
    joined = _call(graph, torch.cat, (query, -1))
    score = replace(attention.score, of_values=True)
    wide = replace(attention, query=joined, score=score)
    weighted = keys.attend(graph, values, wide, new, mask, slots)
    shape = *value_of(joined).shape[:3], value_of(new[1]).shape[3]
    weighted.meta["example_value"] = value_of(joined).new_empty(shape)
    if expansion.value.weight is None:
        return weighted
    output = _by_heads(graph, weighted, _matrix(graph, expansion.value), expansion.value.heads)
    return _cast(graph, output, value_of(attention.output).dtype)


def _absorbed(
    graph: fx.Graph, query: fx.Node, part: Projection | None, kept: fx.Node, dtype: torch.dtype
) -> fx.Node:
    """Return what of a query meets the channels of a kept tensor, in that one's dtype."""
    if part is None:
        width = value_of(kept).shape[3]
        size = [size_of(query, dim) for dim in range(3)]
        return _cast(graph, _call(graph, "new_zeros", (query, (*size, width))), dtype)
    channels = _call(graph, "narrow", (query, 3, part.first, part.last - part.first))
    if part.weight is not None:
        matrix = _call(graph, "transpose", (_matrix(graph, part), 1, 2))
        channels = _by_heads(graph, channels, matrix, part.heads)
    return _cast(graph, channels, dtype)


def _matrix(graph: fx.Graph, part: Projection) -> fx.Node:
    """Return the weight of a projection as ``[heads, kept channels, channels]``, a view."""
    assert part.weight is not None
    node = part.weight
    for name, arguments in part.views:
        node = _call(graph, name, (node, *arguments))
    return node


def _by_heads(graph: fx.Graph, rows: fx.Node, matrix: fx.Node, heads: int) -> fx.Node:
    """Return ``[B, Hq, T, n]`` rows times the matrix of their head; neighbours share one where there are fewer.

    Sequences stand beside the tokens of a head, so that no matrix is copied for each of them.
    """
    query_heads, tokens = size_of(rows, 1), size_of(rows, 2)
    first = _call(graph, "transpose", (rows, 0, 1))
    first = _call(graph, "reshape", (first, (heads, -1, value_of(rows).shape[3])))
    first = _cast(graph, first, value_of(matrix).dtype)
    made = _call(graph, torch.bmm, (first, matrix))
    made = _call(graph, "view", (made, (query_heads, -1, tokens, value_of(matrix).shape[2])))
    return _call(graph, "transpose", (made, 0, 1))


def _cast(graph: fx.Graph, node: fx.Node, dtype: torch.dtype) -> fx.Node:
    """Return a node in a dtype; autocast may have given it another one than its operands have."""
    return _call(graph, "to", (node, dtype))


def _call(graph: fx.Graph, target: Any, args: tuple[Any, ...]) -> fx.Node:
    """Insert a call, and evaluate it on what stands for its arguments."""
    values = fx.node.map_arg(args, value_of)
    if isinstance(target, str):
        node = graph.call_method(target, args)
        node.meta["example_value"] = getattr(values[0], target)(*values[1:])
        return node
    return insert_call(graph, target, args, target(*values))
