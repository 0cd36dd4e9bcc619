"""Fill a cache that the call allocates without ever allocating it in 16 bit."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from kvq_compile.kernels.layout import HIDES
from kvq_compile.lowering.cache_nodes import UNSEEN, CacheNodes, Seen, quantize, slots_from
from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import insert_call, size_of, value_of
from kvq_compile.lowering.rewrite.absorb_projections import attend
from kvq_compile.lowering.rewrite.add_tables import empty_cache
from kvq_compile.lowering.rewrite.fuse_attention import causal_mask, check_room, erase_write
from kvq_compile.lowering.rewrite.weigh_tokens import seen_by, visible_mask, weigh_tokens
from kvq_compile.lowering.sites import AttentionSite, Life, Quantization, State

NOT_HIDDEN = "the attention mask must hide the cache positions that hold no token"


def attend_to_new_tokens(graph: Graph) -> PassReport:
    """Replace attention over a cache that the call allocates by attention over the call's own tokens.

    Before:  keys = zeros([B, H, S, D]); keys.index_copy_(2, position, key); ...
             output = scaled_dot_product_attention(query, keys, values, mask)
    After:   output = scaled_dot_product_attention(query, key, value, mask[..., :T])
             keys = kvq.quantize(key[:, :, :0], S, layout); kvq.append_(*keys, key, position); ...
    Because: the cache holds no other tokens, and its 16-bit form need not be allocated.
    """
    changes = []
    for number in range(len(graph.sites)):
        site = graph.sites[number]  # as the sites before it have left it
        if site.key.life is not Life.ALLOCATED:
            continue
        _attend(graph, site)
        changes.append(f"{site.attention.output} attends to {site.key.new} and {site.value.new}")
    return PassReport(tuple(changes))


def _attend(graph: Graph, site: AttentionSite) -> None:
    nodes, attention = graph.fx, site.attention
    with nodes.inserting_before(attention.output):
        check_room(nodes, site.key)
        mask = visible_mask(nodes, attention)
        keys, values = (_empty(graph, state, quantization) for state, quantization in site.states())
        own = _own_mask(graph, site, mask)
        if attention.score.is_plain and site.expansion is None:
            exact = _exact(nodes, site, own)
        else:  # which torch has no call for
            own = causal_mask(nodes, attention, size_of(site.key.new, 2)) if own is None else own
            new, slots = (site.key.new, site.value.new), slots_from(site.key.position)
            exact = attend(nodes, site, keys, values, new, own, slots)
            exact = nodes.call_method("to", (exact, value_of(attention.output).dtype))
        exact.meta.update(attention.output.meta)
        weights = weigh_tokens(nodes, site, None, mask)
        for state, made in ((site.key, keys), (site.value, values)):
            assert state.past is not None
            seen = seen_by(site, state, weights)
            graph.made[state.past] = _filled(graph, state, made, seen, exact)
            if not state.is_read_elsewhere:  # else the allocation stays, for this call
                erase_write(graph, state)
    graph.replace(attention.output, exact)


def _exact(nodes: fx.Graph, site: AttentionSite, mask: Any) -> fx.Node:
    """Insert torch's attention over the call's own tokens."""
    attention = site.attention
    about = {"attn_mask": mask, "is_causal": attention.causal, "scale": attention.score.scale}
    return nodes.call_function(
        torch.nn.functional.scaled_dot_product_attention,
        (attention.query, site.key.new, site.value.new),
        {**about, "enable_gqa": True},
    )


def allocate(
    graph: Graph, state: State, quantization: Quantization, seen: Seen = UNSEEN
) -> CacheNodes:
    """Make a quantized cache of an allocation and write the new tokens into it, at the graph's insert point."""
    return _filled(graph, state, _empty(graph, state, quantization), seen)


def _empty(graph: Graph, state: State, quantization: Quantization) -> CacheNodes:
    """Make an empty quantized cache of an allocation."""
    assert state.past is not None
    nothing = insert_call(
        graph.fx, operator.getitem, (state.new, (slice(None), slice(None), slice(0, 0)))
    )
    slots, like = size_of(state.past, 2), empty_cache(graph, state, quantization)
    return quantize(graph.fx, nothing, slots, False, like)


def _filled(
    graph: Graph, state: State, made: CacheNodes, seen: Seen, after: fx.Node | None = None
) -> CacheNodes:
    """Write the new tokens into a cache that was made for them."""
    made.append(graph.fx, state.new, slots_from(state.position), after, seen)
    return made


def _own_mask(graph: Graph, site: AttentionSite, mask: Any) -> Any:
    """Return the mask over the call's own tokens; the call fails if it shows a cache position behind them."""
    if mask is None:
        return None
    nodes, tokens = graph.fx, size_of(site.key.new, 2)
    own = insert_call(nodes, operator.getitem, (mask, (..., slice(None, tokens))))
    rest = insert_call(nodes, operator.getitem, (mask, (..., slice(tokens, None))))
    if value_of(site.attention.mask).dtype == torch.bool:
        hidden = nodes.call_method("logical_not", (rest,))
    else:
        hidden = nodes.call_function(operator.le, (rest, HIDES))
        own = nodes.call_method("to", (own, value_of(site.attention.query).dtype))
    nodes.call_function(torch._assert_async, (nodes.call_method("all", (hidden,)), NOT_HIDDEN))
    return own
