"""Measure how much attention tokens get, where their bits depend on it."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from kvq_compile.kernels import ops
from kvq_compile.lowering.graph import insert_call, shape_of
from kvq_compile.lowering.sites import AttentionSite, Life
from kvq_compile.lowering.unwrap_caches import CacheInput

QUERIES = 5  # of a call, the last; the paper's attention window


def weigh_tokens(
    graph: fx.Graph, site: AttentionSite, cache: CacheInput | None, mask: Any
) -> fx.Node | None:
    """Compute the attention that a call's last queries pay to each token, at the graph's insert point.

    Before:  output = attention(query, keys, values, mask)
    After:   importance = kvq.importance(query, key, *past_keys, mask); output = ...
    Because: QAQ gives tokens that get more attention more bits, and this call knows its queries.

    Leaves alone: layouts that do not ask; buffers written in place, whose slots are known on the device only:
    their tokens get bits by range alone.

    Args:
        graph: The graph.
        site: The attention.
        cache: The keys held before the call, if they are quantized.
        mask: The mask over slots, or ``None``.
    """
    layout = site.key_coding.layout
    if not any(
        coding.layout.coder == "mixed" and coding.layout.attentive for _, coding in site.states()
    ):
        return None
    state = site.key
    if state.life in (Life.BUFFER, Life.BUFFER_PLAIN):
        return None
    key = state.base if state.life in (Life.FRESH, Life.GROWN_PLAIN) else state.new
    tokens = _length(graph, key)
    past: tuple[Any, ...] = ()
    start: Any = 0
    if cache is not None:
        past, start = cache.parts, cache.length
    slots = tokens if cache is None else insert_call(graph, operator.add, (start, tokens))
    attention = site.attention
    causal = attention.causal and mask is None
    arguments = (
        *(attention.query, key, past, mask, start, slots, attention.scale, causal, QUERIES),
        *(layout.token, *(cache.frame if cache is not None else (None, None))),
    )
    return insert_call(graph, ops.importance, arguments)


def _length(graph: fx.Graph, node: fx.Node) -> Any:
    size = (shape_of(node) or (0, 0, 0))[2]
    return size if isinstance(size, int) else graph.call_method("size", (node, 2))
