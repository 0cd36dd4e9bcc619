"""Rewrite each site: attention onto the quantized cache, the write onto quantize-on-write."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from kvq_compile.kernels import ops
from kvq_compile.kernels.layout import HIDES, PageLayout
from kvq_compile.lowering.nodes import insert_call, shape_of, value_of
from kvq_compile.lowering.rewrite.frames import FrameNodes, Frames
from kvq_compile.lowering.rewrite.unwrap_caches import CacheInput
from kvq_compile.lowering.rewrite.weigh_tokens import (
    first_slot,
    query_to_hold,
    weigh_tokens,
    written_at,
)
from kvq_compile.lowering.sites import Attention, AttentionSite, Life, Seen, State

NOT_HIDDEN = "the attention mask must hide the slots of a cache that hold no token"


def fuse_attention(graph: fx.Graph, site: AttentionSite, caches: dict[fx.Node, CacheInput]) -> None:
    """Let one attention read its quantized history and its own tokens in one op.

    Before:  keys = cat([past_keys, key], 2); values = cat([past_values, value], 2)   # or index_copy_
             output = scaled_dot_product_attention(query, repeat(keys), repeat(values), mask)
    After:   output = kvq.attend(query, key, value, *past_keys, *past_values, mask)
             kvq.append_(*past_keys, key, after=output); kvq.append_(*past_values, value, after=output)
    Because: decoding reads every cached byte once a token, so its time falls with the bytes.

    Leaves alone: attention whose keys and values are all of this call (`Life.FRESH`, `Life.GROWN_PLAIN`,
    `Life.BUFFER_PLAIN`): there is no quantized history yet, and it attends exactly as captured.
    """
    attention, key, value = site.attention, site.key, site.value
    if key.life not in (Life.GROWN, Life.BUFFER):
        return
    assert key.past is not None and value.past is not None
    key_cache, value_cache = caches[key.past], caches[value.past]
    first = first_slot(key, key_cache)
    with graph.inserting_before(attention.output):
        _check_room(graph, key)
        mask = _mask(graph, site, key_cache)
        arguments = (
            *(attention.query, key.new, value.new, *key_cache.parts, *value_cache.parts),
            *(mask, *first, attention.scale),
            *(key_cache.layout.token, value_cache.layout.token),
            *(*key_cache.frame, value_cache.frame[0]),
        )
        fused = insert_call(graph, ops.attend, arguments, value_of(attention.output))
        importance = weigh_tokens(graph, site, key_cache, mask)
        for state, cache in ((key, key_cache), (value, value_cache)):
            first = first_slot(state, cache)
            arguments = (*cache.parts, state.new, *first, cache.layout.token, fused, *cache.frame)
            more = importance, cache.originals, query_to_hold(site, state)
            insert_call(graph, ops.append_, (*arguments, *more))
            if state.write is not None:
                _erase_write(graph, state)
    fused.meta.update({k: v for k, v in attention.output.meta.items() if k not in fused.meta})
    attention.output.replace_all_uses_with(fused)
    graph.erase_node(attention.output)


def attend_to_new_tokens(
    graph: fx.Graph, site: AttentionSite, frames: Frames
) -> dict[fx.Node, tuple[fx.Node, ...]]:
    """Fill a cache that the call allocates without ever allocating it in 16 bit.

    Before:  keys = zeros([B, H, S, D]); keys.index_copy_(2, position, key); ...
             output = scaled_dot_product_attention(query, keys, values, mask)
    After:   output = scaled_dot_product_attention(query, key, value, mask[..., :T])
             keys = kvq.quantize(key[:, :, :0], pages); kvq.append_(*keys, key, position); ...
    Because: all that attention can see are the call's own tokens, and the 16-bit cache is what we avoid.

    Returns:
        The parts that stand for each allocation, and its shift where it has one.
    """
    attention = site.attention
    made: dict[fx.Node, tuple[fx.Node, ...]] = {}
    with graph.inserting_before(attention.output):
        _check_room(graph, site.key)
        exact = graph.call_function(
            torch.nn.functional.scaled_dot_product_attention,
            (attention.query, site.key.new, site.value.new),
            {
                "attn_mask": _own_mask(graph, site),
                "is_causal": attention.causal,
                "scale": attention.scale,
                "enable_gqa": True,
            },
        )
        exact.meta.update(attention.output.meta)
        importance = weigh_tokens(graph, site, None, _seen(graph, attention))
        for state, coding in site.states():
            assert state.past is not None
            frame = frames.of(state, coding)
            seen = importance, query_to_hold(site, state)
            parts = _allocate(graph, state, coding.layout, frame, seen)
            made[state.past] = parts if frame[1] is None else (*parts, frame[1])
            _erase_write(graph, state)
    attention.output.replace_all_uses_with(exact)
    graph.erase_node(attention.output)
    return made


def weigh_fresh_tokens(graph: fx.Graph, site: AttentionSite) -> dict[fx.Node, Seen]:
    """Return what attention says to caches that a call makes of its own tokens, by cache."""
    if site.key.life not in (Life.FRESH, Life.GROWN_PLAIN):
        return {}
    with graph.inserting_before(site.attention.output):
        importance = weigh_tokens(graph, site, None, _seen(graph, site.attention))
    return {state.base: (importance, query_to_hold(site, state)) for state, _ in site.states()}


def _check_room(graph: fx.Graph, state: State) -> None:
    """Let the call fail if it writes behind the last slot, as the write that is replaced did."""
    if state.life is Life.GROWN or written_at(state)[0] is None:
        return  # a cache that grows has room; a slice was checked against the buffer when it was captured
    last = insert_call(graph, operator.getitem, (state.position, -1))
    slots = (shape_of(state.past) or ())[2]
    inside = graph.call_function(
        operator.lt, (last, slots if isinstance(slots, int) else _size(graph, state.past))
    )
    graph.call_function(
        torch._assert_async, (inside, f"the cache has {slots} slots and no room for the new tokens")
    )


def _own_mask(graph: fx.Graph, site: AttentionSite) -> Any:
    """Return the mask over the call's own tokens; the call fails if it shows a slot behind them."""
    mask = _seen(graph, site.attention)
    if mask is None:
        return None
    tokens = _size(graph, site.key.new)
    own = insert_call(graph, operator.getitem, (mask, (..., slice(None, tokens))))
    rest = insert_call(graph, operator.getitem, (mask, (..., slice(tokens, None))))
    dtype = value_of(site.attention.query).dtype
    mask_dtype = value_of(site.attention.mask).dtype
    if mask_dtype == torch.bool:
        hidden = graph.call_method("logical_not", (rest,))
    else:
        hidden = graph.call_function(operator.le, (rest, HIDES))
        own = graph.call_method("to", (own, dtype))
    graph.call_function(torch._assert_async, (graph.call_method("all", (hidden,)), NOT_HIDDEN))
    return own


def _seen(graph: fx.Graph, attention: Attention) -> Any:
    """Return the model's mask, turned over if it marks what is hidden."""
    if attention.mask is None or not attention.mask_hides:
        return attention.mask
    return insert_call(graph, operator.invert, (attention.mask,))


def _allocate(
    graph: fx.Graph,
    state: State,
    layout: PageLayout,
    frame: FrameNodes,
    seen: Seen,
) -> tuple[fx.Node, ...]:
    slots = (shape_of(state.past) or (0, 0, 0))[2]
    nothing = insert_call(
        graph, operator.getitem, (state.new, (slice(None), slice(None), slice(0, 0)))
    )
    made = insert_call(graph, ops.quantize, (nothing, slots, False, layout.token, *frame))
    parts = tuple(insert_call(graph, operator.getitem, (made, i)) for i in range(len(ops.PARTS)))
    arguments = (*parts, state.new, *written_at(state), layout.token, None, *frame)
    insert_call(graph, ops.append_, (*arguments, seen[0], None, seen[1]))
    return parts


def _erase_write(graph: fx.Graph, state: State) -> None:
    assert state.write is not None and state.past is not None
    state.write.replace_all_uses_with(state.past)  # an in-place write returns what it wrote into
    graph.erase_node(state.write)


def _mask(graph: fx.Graph, site: AttentionSite, cache: CacheInput) -> Any:
    """Return the mask over slots: the model's own, or its causal flag spelled out.

    Without either, every slot that attention reads holds a token: `find_sites` has made sure.
    """
    attention, key = site.attention, site.key
    if attention.mask is not None:
        return _seen(graph, attention)
    if not attention.causal:
        return None
    rows, new = _size(graph, attention.query), _size(graph, key.new)
    if key.life is Life.GROWN:
        columns = insert_call(graph, operator.add, (cache.length, new))
    else:
        columns = (shape_of(key.base) or (0, 0, 0))[2] if key.slots is None else key.slots
    device = value_of(attention.query).device
    seen = graph.call_function(torch.ones, (rows, columns), {"dtype": torch.bool, "device": device})
    return graph.call_method("tril", (seen,))


def _size(graph: fx.Graph, node: Any) -> Any:
    size = (shape_of(node) or (0, 0, 0))[2]
    return size if isinstance(size, int) else graph.call_method("size", (node, 2))
