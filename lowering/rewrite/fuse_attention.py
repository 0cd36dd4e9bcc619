"""Rewrite attention onto the quantized cache and the write onto quantize-on-write."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from kvq_compile.lowering.cache_nodes import CacheNodes, Seen, Slots, same_slots, slots_from
from kvq_compile.lowering.find.rings import Ring
from kvq_compile.lowering.find.sites import HELD
from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import erase_unread, insert_call, shape_of, size_of, value_of
from kvq_compile.lowering.rewrite.absorb_projections import attend
from kvq_compile.lowering.rewrite.weigh_tokens import (
    first_slot,
    seen_by,
    visible_mask,
    weigh_tokens,
)
from kvq_compile.lowering.ring_nodes import (
    columns_of,
    mask_of_memory,
    placed,
    room_for_call,
    slots_held,
)
from kvq_compile.lowering.sites import Attention, AttentionSite, Life, State


def fuse_attention(graph: Graph) -> PassReport:
    """Fuse attention with the reads of its quantized caches; move the writes behind it.

    Before:  keys = cat([past_keys, key], 2); values = cat([past_values, value], 2)   # or index_copy_
             output = scaled_dot_product_attention(query, repeat(keys), repeat(values), mask)
    After:   output = kvq.attend(query, key, value, *past_keys, *past_values, mask)
             kvq.append_both_(*past_keys, *past_values, key, value, after=output)
    Because: decoding is bound by memory bandwidth: it reads every byte of the cache once a step.

    What else reads a buffer reads ``kvq.dequantize(*past_keys)``, into which the write goes.

    Leaves alone: attention whose keys and values are all of this call (`Life.FRESH`, `Life.GROWN_PLAIN`,
    `Life.BUFFER_PLAIN`): nothing is quantized yet, and it runs as captured.
    """
    changes = []
    for number in range(len(graph.sites)):
        site = graph.sites[number]  # as the sites before it have left it
        if site.key.life not in HELD or _reads_none(graph, site):
            continue
        fused = _fuse(graph, site)
        changes.append(f"{fused} replaces {site.attention.output}, reads {site.key.past}")
    return PassReport(tuple(changes))


def _fuse(graph: Graph, site: AttentionSite) -> fx.Node:
    nodes, key, value = graph.fx, site.key, site.value
    assert key.past is not None and value.past is not None
    keys, values = graph.caches[key.past], graph.caches[value.past]
    with nodes.inserting_before(site.attention.output):
        check_room(nodes, key)
    readers = graph.readers_of(site)
    for number in range(len(readers)):  # all attend before the write
        earlier = (site, *graph.readers_of(site))[number]
        with nodes.inserting_before(earlier.attention.output):
            fused, *_ = _attend(graph, earlier, site, keys, values)
        _replace(graph, earlier, fused)
    last = (site, *graph.readers_of(site))[-1]
    with nodes.inserting_before(last.attention.output):
        fused, mask, of_ring = _attend(graph, last, site, keys, values)
        last = replace(last, key=key, value=value)
        weights = weigh_tokens(nodes, last, keys, mask, *of_ring)
        _append(graph, last, (keys, values), fused, weights, of_ring[0] if of_ring else None)
        for state, cache in ((key, keys), (value, values)):
            if state.is_read_elsewhere:
                read_elsewhere(graph, state, cache)
            elif state.write is not None:
                erase_write(graph, state)
    _replace(graph, last, fused)
    return fused


def _append(
    graph: Graph,
    site: AttentionSite,
    caches: tuple[CacheNodes, CacheNodes],
    fused: fx.Node,
    weights: fx.Node | None,
    behind: Slots | None,
) -> None:
    """Write the new tokens of a site, at the insert point: keys and values at once where both go to the same slots.

    ``behind`` says where those of a ring end.
    """
    nodes = graph.fx
    writes: list[tuple[fx.Node, Slots, Seen]] = []
    for (state, _), cache in zip(site.states(), caches, strict=True):
        seen = seen_by(site, state, weights)
        if behind is None:
            writes.append((state.new, first_slot(nodes, state, cache), seen))
        else:
            writes.append(placed(nodes, graph.rings[state.base], state.new, behind, seen))
    (key, slots, seen), (value, other_slots, _) = writes
    if same_slots(slots, other_slots):
        caches[0].append_both(nodes, caches[1], (key, value), slots, fused, seen)
        return
    for cache, (new, at, seen) in zip(caches, writes, strict=True):
        cache.append(nodes, new, at, fused, seen)


def _attend(
    graph: Graph, reader: AttentionSite, site: AttentionSite, keys: CacheNodes, values: CacheNodes
) -> tuple[fx.Node, Any, tuple[Any, ...]]:
    """Insert an attention over the caches of a site; return it, its mask, and of a ring where tokens go.

    ``site`` is the first to read them, and knows the new tokens as they are written.
    """
    ring = graph.rings.get(site.key.base)
    slots, mask, columns = _slots_and_mask(graph.fx, reader, keys, ring)
    new = site.key.new, site.value.new
    fused = attend(graph.fx, reader, keys, values, new, mask, slots)
    return fused, mask, () if ring is None else (slots, columns)


def _replace(graph: Graph, site: AttentionSite, fused: fx.Node) -> None:
    """Let what reads the attention of a site read ``fused``, in its dtype."""
    attention, nodes = site.attention, graph.fx
    fused.meta.update({k: v for k, v in attention.output.meta.items() if k not in fused.meta})
    result, dtype = fused, value_of(attention.output).dtype
    if value_of(attention.query).dtype != dtype:  # autocast
        with nodes.inserting_before(attention.output):
            result = nodes.call_method("to", (fused, dtype))
        result.meta["example_value"] = value_of(attention.output)
    graph.replace(attention.output, result)


def _reads_none(graph: Graph, site: AttentionSite) -> bool:
    """Return whether attention reads nothing of its caches, which are filled anew."""
    ring = graph.rings.get(site.key.base)
    return ring is not None and ring.is_filled_anew


def _slots_and_mask(
    graph: fx.Graph, site: AttentionSite, keys: CacheNodes, ring: Ring | None
) -> tuple[Slots, Any, Any]:
    """Return where the call's tokens go, the mask over cache positions, and of a ring how many columns that has."""
    if ring is None:
        return first_slot(graph, site.key, keys), _mask(graph, site, keys), None
    slots = slots_held(graph, keys, ring)
    columns = columns_of(graph, ring, site.attention.key)
    mask = _own_mask(graph, site, columns)
    if ring.held is not None:
        return slots, mask, columns
    room = room_for_call(graph, keys, ring)
    return slots, mask_of_memory(graph, ring, slots[0], room, columns, mask), room


def check_room(graph: fx.Graph, state: State) -> None:
    """Assert that the call writes within the cache, as the write that is replaced did."""
    position, _ = slots_from(state.position)
    if state.life in (Life.GROWN, Life.RING) or position is None:
        return  # a cache that grows has room; a slice was checked against the buffer when it was captured
    assert state.past is not None
    slots = (shape_of(state.past) or ())[2]
    if state.by_row:
        last = graph.call_method("amax", (position,))
    else:
        last = insert_call(graph, operator.getitem, (position, -1))
    inside = graph.call_function(operator.lt, (last, size_of(state.past, 2)))
    graph.call_function(
        torch._assert_async,
        (inside, f"the cache has {slots} positions and no room for the new tokens"),
    )


def erase_write(graph: Graph, state: State) -> None:
    """Erase the write of a state; what has read its result reads the cache, into which it is written otherwise."""
    assert state.write is not None and state.past is not None
    update = graph.updates.get(state.write)
    steps = (state.write,) if update is None else update.steps
    state.write.replace_all_uses_with(state.past, delete_user_cb=lambda user: user not in steps)
    if update is None:
        graph.fx.erase_node(state.write)
    else:
        erase_unread(graph.fx, steps)


def read_elsewhere(graph: Graph, state: State, cache: CacheNodes) -> None:
    """Let what else reads a buffer read an ordinary tensor of its tokens, those of the call written into it."""
    write, past = state.write, state.past
    assert write is not None and past is not None
    with graph.fx.inserting_before(write):
        dense = cache.dequantize(graph.fx, past)
    for node in (write, *state.readers):
        if node in past.users:  # no attention that is replaced already
            node.replace_input_with(past, dense)


def _mask(graph: fx.Graph, site: AttentionSite, keys: CacheNodes) -> Any:
    """Return the mask over cache positions: the model's own, or its causal flag spelled out.

    Without either, every cache position that attention reads holds a token: `find_sites` has made sure. Columns are
    counted from the first slot, those out of sight included.
    """
    attention, key = site.attention, site.key
    columns: Any = None
    if key.life is Life.GROWN:
        tokens = size_of(key.new, 2)
        length = value_of(keys.length) + value_of(tokens)
        columns = insert_call(graph, operator.add, (keys.length, tokens), length)
        if key.last is not None:
            columns = size_of(attention.key, 2)
    mask = _own_mask(graph, site, columns)
    if key.life is not Life.GROWN or (keys.trim is None and key.last is None):
        return mask
    end = insert_call(graph, operator.add, (keys.end(graph), size_of(key.new, 2)))
    hidden = insert_call(graph, operator.sub, (end, columns))
    if mask is None:
        device = value_of(key.new).device
        slots = graph.call_function(torch.arange, (end,), {"dtype": torch.int64, "device": device})
        slots = insert_call(graph, operator.getitem, (slots, None))  # one row for all queries
        return graph.call_function(operator.ge, (slots, hidden))
    return _hide_first(graph, mask, hidden)


def _own_mask(graph: fx.Graph, site: AttentionSite, columns: Any) -> Any:
    """Return the mask over the tokens that attention reads: the model's own, or its causal flag spelled out."""
    attention, key = site.attention, site.key
    if attention.mask is not None:
        return visible_mask(graph, attention)
    if columns is None:
        columns = size_of(key.base, 2) if key.slots is None else key.slots
    return causal_mask(graph, attention, columns)


def causal_mask(graph: fx.Graph, attention: Attention, columns: Any) -> Any:
    """Return the causal flag of an attention as a mask with ``columns`` columns; ``None`` without that flag."""
    if not attention.causal:
        return None
    device = value_of(attention.query).device
    shape = size_of(attention.query, 2), columns
    seen = graph.call_function(torch.ones, shape, {"dtype": torch.bool, "device": device})
    return graph.call_method("tril", (seen,))


def _hide_first(graph: fx.Graph, mask: fx.Node, hidden: Any) -> fx.Node:
    """Return a mask with ``hidden`` further columns in front, which it hides."""
    value = value_of(mask)
    is_bool = value is None or value.dtype == torch.bool
    fill: Any = False if is_bool else torch.finfo(value.dtype).min
    return graph.call_function(torch.nn.functional.pad, (mask, (hidden, 0)), {"value": fill})
