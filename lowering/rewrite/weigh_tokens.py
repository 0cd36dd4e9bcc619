"""Measure how much attention tokens get, where their bits depend on it."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from kvq_compile.lowering.cache_nodes import CacheNodes, Seen, Slots, importance, slots_from
from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import insert_call, size_of
from kvq_compile.lowering.sites import Attention, AttentionSite, Life, State


def weigh_fresh_tokens(graph: Graph) -> PassReport:
    """Weigh the tokens of caches that a call makes of its own tokens.

    Before:  output = attention(query, keys, values, mask); return keys, values
    After:   importance = kvq.importance(query, keys, mask); output = ...
    Because: QAQ gives tokens that get more attention more bits, and only this call knows its queries.

    Leaves alone: layouts that do not ask; 16-bit buffers written in place, which are quantized when the call
    is over: their tokens get bits by range alone.
    """
    changes = []
    for site in graph.sites:
        if site.key.life not in (Life.FRESH, Life.GROWN_PLAIN):
            continue
        weights = None
        if _asks(site):
            with graph.fx.inserting_before(site.attention.output):
                weights = weigh_tokens(graph.fx, site, None, turned_mask(graph.fx, site.attention))
            changes.append(f"{weights} weighs the tokens of {site.key.base}")
        for state, _ in site.states():
            graph.seen[state.base] = seen_by(site, state, weights)
    return PassReport(tuple(changes))


def weigh_tokens(
    graph: fx.Graph, site: AttentionSite, cache: CacheNodes | None, mask: Any
) -> fx.Node | None:
    """Compute the attention that the last queries pay to each token, at the graph's insert point.

    Args:
        graph: The nodes.
        site: The attention.
        cache: The keys held before the call, if they are quantized.
        mask: The mask over slots, or ``None``.

    Returns:
        Their importance, or ``None`` where no layout asks for it.
    """
    if not _asks(site):
        return None
    state = site.key
    key = state.base if state.life is Life.GROWN_PLAIN else state.new
    if cache is None:
        empty = CacheNodes((), site.key_coding.layout)
        return importance(graph, site.attention, key, mask, (None, 0), size_of(key, 2), empty)
    held = cache.length
    if state.life is Life.GROWN:
        held = insert_call(graph, operator.add, (held, size_of(key, 2)))
    return importance(graph, site.attention, key, mask, first_slot(state, cache), held, cache)


def _asks(site: AttentionSite) -> bool:
    return any(coding.layout.attentive for _, coding in site.states())


def seen_by(site: AttentionSite, state: State, weights: fx.Node | None) -> Seen:
    """Return what the attention says to one of its caches: importance, and the queries that it is to hold."""
    holds = state is site.key and site.key_coding.layout.queries > 0
    return weights, site.attention.query if holds else None


def first_slot(state: State, cache: CacheNodes) -> Slots:
    """Return where a state's new tokens go in a quantized cache."""
    return (None, cache.length) if state.life is Life.GROWN else slots_from(state.position)


def turned_mask(graph: fx.Graph, attention: Attention) -> Any:
    """Return the model's mask, turned over if it marks what is hidden."""
    if attention.mask is None or not attention.mask_hides:
        return attention.mask
    return insert_call(graph, operator.invert, (attention.mask,))
