"""Normalize every spelling of a static cache that keeps the last tokens to ``cat`` and a cut."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import fx

from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.lowering.find.in_place import is_spelled
from kvq_compile.lowering.find.movement import is_cache_like
from kvq_compile.lowering.find.rings import Ring, RolledBuffer, base_of, copied_by, find_ring
from kvq_compile.lowering.find.sliding import SlidingBuffer, find_sliding
from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import (
    FULL,
    erase_unread,
    insert_call,
    order_of,
    same,
    shape_of,
    size_of,
    value_of,
    writers_of,
)


def spell_rings(graph: Graph) -> PassReport:
    """Join a full buffer and the call's tokens, attend to the end of that, and keep its last tokens.

    Before:  rolled = cache.roll(-1, 2); rolled[:, :, [-1]] = key; cache.copy_(rolled); attend(query, cache)
             whole = cat([cache[:, :, 1:], key], 2); cache.copy_(whole[:, :, -S:]); attend(query, whole)
    After:   joined = cat([cache, key], 2)
             cache.copy_(joined[:, :, T:]); attend(query, joined[:, :, T:])     # or joined[:, :, 1:]
    Before:  cache = zeros([B, H, S, D]); cache.copy_(key[:, :, -S:]); attend(query, key); return cache
    After:   attend(query, key); return key[:, :, -S:].clone()
    Because: later passes match one pattern, whatever spelling the model has: tokens that join those held.

    Before:  rolled = where(position >= S, cache.roll(-1, 2), cache)
             rolled[:, :, position.clamp(max=S - 1)] = key; cache.copy_(rolled); attend(query, cache)
    After:   as above, if the cache is quantized: what stands for its tokens is true of a full one, and is never run

    Leaves alone: buffers of which evaluation does not prove that.
    """
    changes = []
    known: dict[str, bool | None] = {}
    for buffer, writers in writers_of(graph.fx).items():
        if not isinstance(buffer, fx.Node) or not shape_of(buffer):
            continue
        ring = _ring(graph.fx, buffer, writers, known)
        if ring is not None:
            graph.rings[ring.base] = ring
            changes.append(f"{buffer} keeps the last tokens of {ring.base}")
    graph.used |= {node for node in graph.fx.nodes if node.users}
    return PassReport(tuple(changes))


def _ring(
    graph: fx.Graph, buffer: fx.Node, writers: list[fx.Node], known: dict[str, bool | None]
) -> Ring | None:
    found = find_ring(buffer, writers, known)
    if found is not None:
        return _spell(graph, found)
    if not is_cache_like(buffer) or all(is_spelled(writer, buffer) for writer in writers):
        return None
    sliding = find_sliding(buffer, writers)
    return None if sliding is None else _spell_sliding(graph, buffer, writers, sliding)


def _spell_sliding(
    graph: fx.Graph, past: fx.Node, writers: list[fx.Node], found: SlidingBuffer
) -> Ring:
    """Spell a buffer that is rolled once it is full; one in 16 bit runs as captured."""
    place = order_of(graph)
    last = max(writers, key=place.__getitem__)
    copied = copied_by(last, past) if len(writers) == 1 else None
    steps = {*found.steps, *writers}
    if copied is not None:  # attention may read what is copied, which the buffer then holds
        late = {user for user in copied.users if user not in steps and place[user] > place[last]}
        copied.replace_all_uses_with(past, delete_user_cb=late.__contains__)
    for writer in writers:
        writer.replace_all_uses_with(past, delete_user_cb=lambda user: user not in steps)
    if not isinstance(value_of(past), QuantizedKV):
        return Ring(past, found.new, None, last, past, found.position)
    readers = [user for user in past.users if user not in steps and place[user] > place[last]]
    with graph.inserting_before(last.next):
        joined = insert_call(graph, torch.cat, ([past, found.new], 2))
        shape = [*(shape_of(past) or ())]
        shape[2] += (shape_of(found.new) or ())[2]
        joined.meta["example_value"] = value_of(found.new).new_empty(shape)
        joined.meta.update({k: v for k, v in last.meta.items() if k not in joined.meta})
        kept = _last_of(graph, joined, past)
        write = graph.call_method("copy_", (past, kept))
        write.meta["example_value"] = value_of(past)
    for user in readers:
        user.replace_input_with(past, kept)
    for step in sorted(steps, key=place.__getitem__, reverse=True):
        if step in writers:
            graph.erase_node(step)
        else:
            erase_unread(graph, [step])
    return Ring(past, found.new, None, write, joined, found.position)


def _spell(graph: fx.Graph, found: RolledBuffer) -> Ring:
    past, new, whole, write = found.past, found.new, found.whole, found.write
    write.replace_all_uses_with(past)
    if past.op != "placeholder":
        return _return_last(graph, found)
    if new is whole:
        return Ring(past, new, 0, write, base_of(new))
    given = set(graph.nodes)
    place = order_of(graph)
    last = max((whole, *found.steps), key=place.__getitem__)
    at = last.next
    with graph.inserting_before(at):
        held: Any = None
        before = past
        if not found.is_full:
            held = _difference(graph, whole, new)
            before = insert_call(graph, operator.getitem, (past, (FULL, FULL, slice(held))))
            shape = [*(shape_of(past) or ())]
            shape[2] = value_of(held)
            before.meta["example_value"] = value_of(whole).new_empty(shape)
        sizes = [*(shape_of(whole) or ())]
        sizes[2] = (shape_of(before) or ())[2] + (shape_of(new) or ())[2]
        joined = insert_call(graph, torch.cat, ([before, new], 2))
        joined.meta["example_value"] = value_of(whole).new_empty(sizes)
        joined.meta.update({k: v for k, v in whole.meta.items() if k not in joined.meta})
        read = _last_of(graph, joined, whole)
        kept = _last_of(graph, joined, past)
    place = order_of(graph)
    steps = {*found.steps, write, *(node for node in graph.nodes if node not in given)}
    for user in [user for user in past.users if place[user] > place[write]]:
        user.replace_input_with(past, kept)
    whole.replace_all_uses_with(read, delete_user_cb=lambda user: user not in steps)
    copied = write.args[1] if write.args[1:2] and len(write.args) == 2 else write.args[2]
    assert isinstance(copied, fx.Node)
    write.replace_input_with(copied, kept)
    left = [copied] if copied not in (read, kept, *found.steps) else []
    erase_unread(graph, [*found.steps, *left, *({read} - {joined, kept})])
    return Ring(past, new, held, write, joined)


def _return_last(graph: fx.Graph, found: RolledBuffer) -> Ring:
    """Return the last tokens of a call themselves, and not a buffer that is allocated and filled with them."""
    (copied,) = found.steps
    with graph.inserting_before(found.write):
        kept = graph.call_method("clone", (copied,), {"memory_format": torch.contiguous_format})
    kept.meta["example_value"] = value_of(copied).clone(memory_format=torch.contiguous_format)
    graph.erase_node(found.write)
    found.past.replace_all_uses_with(kept)
    graph.erase_node(found.past)
    return Ring(kept, found.new, 0, None, base_of(found.new))


def _last_of(graph: fx.Graph, joined: fx.Node, like: fx.Node) -> fx.Node:
    """Return as many of the last tokens of ``joined`` as ``like`` has."""
    if same((shape_of(joined) or ())[2], (shape_of(like) or ())[2]):
        return joined
    first = _difference(graph, joined, like)
    cut = (FULL, FULL, slice(first, None))
    return insert_call(
        graph, operator.getitem, (joined, cut), value_of(joined)[:, :, value_of(first) :]
    )


def _difference(graph: fx.Graph, longer: fx.Node, shorter: fx.Node) -> Any:
    """Return how many tokens more one tensor has than another: a number, or a node."""
    tokens, fewer = ((shape_of(node) or ())[2] for node in (longer, shorter))
    difference = tokens - fewer
    if isinstance(difference, torch.SymInt) and difference.node.expr.is_number:
        return int(difference)
    if not isinstance(difference, torch.SymInt):
        return difference
    for known in graph.find_nodes(op="placeholder"):
        value = value_of(known)
        if isinstance(value, torch.SymInt) and value.node.expr == difference.node.expr:
            return known
    sizes = size_of(longer, 2), size_of(shorter, 2)
    return insert_call(graph, operator.sub, sizes, difference)
