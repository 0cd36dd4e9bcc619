"""Measure how much attention tokens get, where their bits depend on it."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from kvq_compile.kernels import ops
from kvq_compile.kernels.layout import QUERIES
from kvq_compile.lowering.nodes import insert_call, shape_of, value_of
from kvq_compile.lowering.rewrite.frames import FrameNodes
from kvq_compile.lowering.rewrite.unwrap_caches import CacheInput
from kvq_compile.lowering.sites import AttentionSite, Life, State


def weigh_tokens(
    graph: fx.Graph, site: AttentionSite, cache: CacheInput | None, mask: Any
) -> fx.Node | None:
    """Compute the attention that the last queries pay to each token, at the graph's insert point.

    Before:  output = attention(query, keys, values, mask)
    After:   importance = kvq.importance(query, key, *past_keys, mask); output = ...
    Because: QAQ gives tokens that get more attention more bits, and this call knows its queries; those of calls
             before it are in the cache.

    Leaves alone: layouts that do not ask; 16-bit buffers written in place, which are quantized when the call
    is over: their tokens get bits by range alone.

    Args:
        graph: The graph.
        site: The attention.
        cache: The keys held before the call, if they are quantized.
        mask: The mask over slots, or ``None``.
    """
    if not any(
        coding.layout.coder == "mixed" and coding.layout.attentive for _, coding in site.states()
    ):
        return None
    state = site.key
    if state.life is Life.BUFFER_PLAIN:
        return None
    key = state.base if state.life in (Life.FRESH, Life.GROWN_PLAIN) else state.new
    past: tuple[Any, ...] = ()
    where: tuple[Any, Any] = (None, 0)
    frame: FrameNodes = (None, None)
    if cache is not None:
        past, where, frame = cache.parts, first_slot(state, cache), cache.frame
    slots: Any = _length(graph, key) if cache is None else cache.length
    if state.life is Life.GROWN:
        slots = insert_call(graph, operator.add, (slots, _length(graph, key)))
    attention = site.attention
    causal = attention.causal and mask is None
    arguments = (
        *(attention.query, key, past, mask, *where, slots, attention.scale, causal, QUERIES),
        *(site.key_coding.layout.token, *frame),
    )
    return insert_call(graph, ops.importance, arguments)


def query_to_hold(site: AttentionSite, state: State) -> fx.Node | None:
    """Return the call's query, where the cache of this state holds the last ones."""
    holds = state is site.key and site.key_coding.layout.queries > 0
    return site.attention.query if holds else None


def written_at(state: State) -> tuple[Any, Any]:
    """Return the ``position`` and ``start`` arguments of the ops for a write in place."""
    is_tensor = isinstance(value_of(state.position), torch.Tensor)
    return (state.position, None) if is_tensor else (None, state.position)


def first_slot(state: State, cache: CacheInput) -> tuple[Any, Any]:
    """Return the ``position`` and ``start`` arguments of the ops for one state."""
    return (None, cache.length) if state.life is Life.GROWN else written_at(state)


def _length(graph: fx.Graph, node: fx.Node) -> Any:
    size = (shape_of(node) or (0, 0, 0))[2]
    return size if isinstance(size, int) else graph.call_method("size", (node, 2))
