"""Compute importance scores of tokens, for layouts that allocate bits by them."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from kvq_compile.lowering.cache_nodes import CacheNodes, Seen, Slots, importance, slots_from
from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import insert_call, size_of, value_of
from kvq_compile.lowering.sites import Attention, AttentionSite, Life, State


def weigh_fresh_tokens(graph: Graph) -> PassReport:
    """Compute importance scores for caches that a call makes of its own tokens.

    Before:  output = attention(query, keys, values, mask); return keys, values
    After:   importance = kvq.importance(query, keys, mask); output = ...
    Because: QAQ allocates bits by the attention that a token receives, and only this call has the queries.

    Leaves alone: layouts without importance scores; 16-bit buffers written in place, which are quantized
    after the call: their tokens get bits by range alone.
    """
    changes = []
    for site in graph.sites:
        if site.key.life not in (Life.FRESH, Life.RING_FRESH, Life.GROWN_PLAIN):
            continue
        weights = None
        if _asks(site):
            with graph.fx.inserting_before(site.attention.output):
                weights = weigh_tokens(graph.fx, site, None, visible_mask(graph.fx, site.attention))
            with graph.fx.inserting_before(graph.output):
                weights = _of_kept(graph.fx, site.key, weights)
            changes.append(f"{weights} scores the tokens of {site.key.base}")
        for state, _ in site.states():
            graph.seen[state.base] = seen_by(site, state, weights)
    return PassReport(tuple(changes))


def weigh_tokens(
    graph: fx.Graph,
    site: AttentionSite,
    cache: CacheNodes | None,
    mask: Any,
    slots: Slots | None = None,
    columns: Any = None,
) -> fx.Node | None:
    """Compute the attention that the last queries pay to each token, at the graph's insert point.

    Args:
        graph: The nodes.
        site: The attention.
        cache: The keys held before the call, if they are quantized.
        mask: The mask over cache positions, or ``None``.
        slots: Where the new tokens go, if a ring takes them.
        columns: The columns of its mask then.

    Returns:
        Importance scores, or ``None`` where no layout uses them.
    """
    if not _asks(site):
        return None
    state = site.key
    key = state.new
    if cache is None:
        empty = CacheNodes((), site.key_quantization.layout)
        return importance(graph, site.attention, key, mask, (None, 0), size_of(key, 2), empty)
    if slots is not None:
        return importance(graph, site.attention, key, mask, slots, columns, cache)
    held = cache.length
    if state.life is Life.GROWN:
        end, tokens = cache.end(graph), size_of(key, 2)
        held = insert_call(graph, operator.add, (end, tokens), value_of(end) + value_of(tokens))
    return importance(
        graph, site.attention, key, mask, first_slot(graph, state, cache), held, cache
    )


def _asks(site: AttentionSite) -> bool:
    return any(quantization.layout.attentive for _, quantization in site.states())


def seen_by(site: AttentionSite, state: State, weights: fx.Node | None) -> Seen:
    """Return importance scores for one of a site's caches, and the queries that it keeps."""
    return weights, site.attention.query if keeps_queries(site, state) else None


def keeps_queries(site: AttentionSite, state: State) -> bool:
    """Return whether one of a site's caches keeps queries."""
    return state is site.key and site.key_quantization.layout.queries > 0


def first_slot(graph: fx.Graph, state: State, cache: CacheNodes) -> Slots:
    """Return where a state's new tokens go in a quantized cache."""
    return (None, cache.end(graph)) if state.life is Life.GROWN else slots_from(state.position)


def _of_kept(graph: fx.Graph, state: State, weights: fx.Node | None) -> fx.Node | None:
    """Return the scores of the tokens that are kept, of scores of all."""
    if weights is None or state.kept is None:
        return weights
    first = insert_call(graph, operator.sub, (size_of(state.new, 2), size_of(state.kept, 2)))
    return insert_call(graph, operator.getitem, (weights, (..., slice(first, None))))


def visible_mask(graph: fx.Graph, attention: Attention) -> Any:
    """Return the model's mask, inverted if it marks what is hidden."""
    if attention.mask is None or not attention.mask_hides:
        return attention.mask
    return insert_call(graph, operator.invert, (attention.mask,))
