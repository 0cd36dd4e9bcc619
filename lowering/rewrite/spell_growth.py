"""Spell every growth of a cache as one ``cat``."""

from __future__ import annotations

import operator
from collections.abc import Iterable

import torch
from torch import fx

from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.lowering.find.attention import find_attentions
from kvq_compile.lowering.find.movement import Growth, find_growth, is_cache_like
from kvq_compile.lowering.find.states import read_base
from kvq_compile.lowering.nodes import (
    argument,
    changed_roots,
    insert_call,
    order_of,
    root_of,
    shape_of,
    target_name,
    value_of,
)
from kvq_compile.lowering.sites import Attention


def spell_growth(graph: fx.Graph) -> None:
    """Write every grown cache as ``cat([past, new], 2)``, and rows of it as ``index_select(past, 0, rows)``.

    Before:  keys = pad(past_keys, ...).index_copy(2, slots, key); attend(query, keys); return keys.clone()
    After:   keys = cat([past_keys, key], 2); attend(query, keys); return keys
    Because: a token is coded once: the cache must be seen to be the same one, whatever spelling the model has.

    Leaves alone: what evaluation does not show to be the cache and the call's tokens behind it.
    """
    _flatten(graph)
    output = next(iter(reversed(graph.nodes)))
    known: dict[tuple[object, ...], fx.Node] = {}
    place = order_of(graph)
    candidates = {read_base(operand) for operand in _operands(graph)} | set(output.all_input_nodes)
    for node in sorted(candidates, key=place.__getitem__):
        if is_spelled(node):
            past, new = argument(node, 0, "tensors")
            known.setdefault((past, None, None, new), node)
            continue
        growth = find_growth(node)
        if growth is None:
            continue
        key = (growth.past, growth.index, growth.rows, growth.new)
        cat = known.get(key)
        if cat is None or _changed(graph, cat, node, growth):
            cat = known[key] = _spell(graph, node, growth)
        _replace(graph, node, cat, growth)


def is_spelled(node: fx.Node) -> bool:
    """Say whether a node joins two tensors along the tokens, the first of them a cache."""
    if target_name(node) != "cat" or argument(node, 1, "dim", 0) not in (2, -2):
        return False
    tensors = argument(node, 0, "tensors")
    return len(tensors) == 2 and is_cache_like(tensors[0])


def _operands(graph: fx.Graph) -> list[fx.Node]:
    found = [attention for attention in find_attentions(graph) if isinstance(attention, Attention)]
    return [operand for attention in found for operand in (attention.key, attention.value)]


def _flatten(graph: fx.Graph) -> None:
    """Join what stands behind the first tensor of a ``cat`` along the tokens beforehand."""
    for node in list(graph.nodes):
        if target_name(node) != "cat" or argument(node, 1, "dim", 0) not in (2, -2):
            continue
        if len(shape_of(node) or ()) != 4:
            continue
        tensors = list(argument(node, 0, "tensors"))
        while isinstance(tensors[0], fx.Node) and _joins_for(tensors[0], node):
            tensors = [*argument(tensors[0], 0, "tensors"), *tensors[1:]]
        tensors = [tensor for tensor in tensors if len(shape_of(tensor) or ()) == 4]
        if len(tensors) < 3 or any(isinstance(value_of(t), QuantizedKV) for t in tensors[1:]):
            continue
        if len({value_of(tensor).dtype for tensor in tensors}) != 1:
            continue
        if not isinstance(tensors[0], fx.Node) or not is_cache_like(tensors[0]):
            continue
        with graph.inserting_before(node):
            rest = torch.cat([value_of(tensor) for tensor in tensors[1:]], 2)
            new = insert_call(graph, torch.cat, (tensors[1:], 2), rest)
        node.args, node.kwargs = ([tensors[0], new], 2), {}


def _joins_for(inner: fx.Node, outer: fx.Node) -> bool:
    along = target_name(inner) == "cat" and argument(inner, 1, "dim", 0) in (2, -2)
    return along and set(inner.users) == {outer}


def _changed(graph: fx.Graph, cat: fx.Node, node: fx.Node, growth: Growth) -> bool:
    """Say whether what was joined has changed since."""
    place = order_of(graph)
    between = [other for other in graph.nodes if place[cat] < place[other] < place[node]]
    return bool({root_of(n) for n in (growth.past, growth.new)} & changed_roots(between))


def _spell(graph: fx.Graph, node: fx.Node, growth: Growth) -> fx.Node:
    place = order_of(graph)
    last = max((node, *growth.written), key=place.__getitem__)
    with graph.inserting_after(last):
        past, index = growth.past, growth.index
        if growth.rows is not None:
            device = value_of(past).device
            made = torch.tensor(growth.rows, device=device)
            index = graph.call_function(torch.tensor, (list(growth.rows),), {"device": device})
            last = index
            index.meta["example_value"] = made
    with graph.inserting_after(last):
        if index is not None:
            value = value_of(past).index_select(0, value_of(index))
            past = last = insert_call(graph, torch.index_select, (past, 0, index), value)
    with graph.inserting_after(last):
        cat = insert_call(graph, torch.cat, ([past, growth.new], 2), value_of(node))
    cat.meta.update({key: x for key, x in node.meta.items() if key not in cat.meta})
    return cat


def _replace(graph: fx.Graph, node: fx.Node, cat: fx.Node, growth: Growth) -> None:
    node.replace_all_uses_with(cat, delete_user_cb=lambda user: user not in growth.written)
    for written in reversed(growth.written):
        if not written.users and not _is_read(root_of(written.args[0]), growth.written):
            graph.erase_node(written)


def _is_read(memory: fx.Node, writers: Iterable[fx.Node]) -> bool:
    """Say whether anything but ``writers`` and views for them uses a tensor's memory."""
    apart = set(writers)
    return any(
        user not in apart and not _only_for(user, apart)
        for user in memory.users
        if user.target is not operator.setitem or user not in apart
    )


def _only_for(view: fx.Node, writers: set[fx.Node]) -> bool:
    return all(user in writers or _only_for(user, writers) for user in view.users)
