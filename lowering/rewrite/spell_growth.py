"""Normalize every spelling of a dynamic cache's update to one ``cat``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.lowering.find.arrangements import above, operands_of
from kvq_compile.lowering.find.attention import as_spelled as attention_of
from kvq_compile.lowering.find.attention import find_attentions
from kvq_compile.lowering.find.movement import (
    Growth,
    as_spelled,
    find_growth,
    is_cache_like,
    is_empty,
)
from kvq_compile.lowering.find.states import read_base
from kvq_compile.lowering.find.trims import suffix_of
from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import (
    argument,
    changes,
    erase_unread,
    insert_call,
    order_of,
    root_of,
    same,
    shape_of,
    target_name,
    value_of,
)
from kvq_compile.lowering.sites import Attention
from kvq_compile.lowering.unchanged import unchanged

_NEAR = 8  # tensors before a product, of which one may be a cache


def spell_growth(graph: Graph) -> PassReport:
    """Write every dynamic cache as ``cat([past, new], 2)``, and rows of it as ``index_select(past, 0, rows)``.

    Before:  keys = pad(past_keys, ...).index_copy(2, slots, key); attend(query, keys); return keys.clone()
    After:   keys = cat([past_keys, key], 2); attend(query, keys); return keys
    Because: later passes match one pattern, whatever spelling the model has.

    Leaves alone: a tensor that evaluation does not prove to be the cache followed by the call's tokens.
    """
    nodes, told = graph.fx, []
    place = order_of(nodes)
    for node in [n for n in nodes.nodes if target_name(n) == "cat"]:
        _flatten(nodes, node)
    known: dict[tuple[object, ...], fx.Node] = {}
    outputs = set(graph.output.all_input_nodes)
    candidates = {read_base(operand) for operand in _operands(nodes)} | outputs
    ordered = sorted(candidates, key=place.__getitem__)
    with unchanged(nodes):  # as first calls stay, whose caches are new
        ordered = [*itertools.dropwhile(_stays, ordered)]
    for node in ordered:
        if suffix_of(node) is not None:
            continue  # it may be as long as what it is cut from now, and not in the next call
        _flatten(nodes, node)  # again: what it joins may be spelled as a growth by now
        growth = as_spelled(node) or _found(node)
        if growth is None:
            continue
        key = (growth.past, growth.index, growth.rows, growth.new)
        cat = known.get(key, None if node in outputs else known.get(_of_no_cache(growth)))
        if cat is None or _changed(nodes, cat, node, (growth.past, growth.new)):
            cat = known[key] = _spell(nodes, node, growth) if growth.steps else node
            if is_empty(growth.past):
                known[_of_no_cache(growth)] = cat
        if cat is not node:
            told.append(f"{node} is spelled as {cat}")
            _replace(nodes, node, cat, growth)
    for node in [*of_other_spellings(nodes)] if known else ():
        alike = any(_is_as_large(node, cat) for cat in known.values())
        growth = _found(node) if alike and node not in known.values() else None
        if growth is None:
            continue
        key = (growth.past, growth.index, growth.rows, growth.new)
        cat = known.get(key, known.get(_of_no_cache(growth)))
        if cat is not None and not _changed(nodes, cat, node, (growth.past, growth.new)):
            told.append(f"{node} is spelled as {cat}")
            _replace(nodes, node, cat, growth)
    graph.used |= {node for node in nodes.nodes if node.users}
    return PassReport(tuple(told))


def _of_no_cache(growth: Growth) -> tuple[object, ...]:
    """Return what new tokens are by themselves: evaluation cannot tell which of several empty caches is before them."""
    return None, growth.index, growth.rows, growth.new


def _stays(node: fx.Node) -> bool:
    """Return whether nothing is done to a node that may be a cache."""
    return suffix_of(node) is not None or not (_joins_tokens(node) or find_growth(node))


def _found(node: fx.Node) -> Growth | None:
    with unchanged(node.graph):
        return find_growth(node)


def _is_as_large(node: fx.Node, other: fx.Node) -> bool:
    mine, theirs = shape_of(node) or (), shape_of(other) or ()
    return len(mine) == len(theirs) and all(map(same, mine, theirs))


def of_other_spellings(graph: fx.Graph, of_a_head: bool = False) -> Iterator[fx.Node]:
    """Yield what may be the keys and values of products in a spelling that is not known yet, nearest first.

    ``of_a_head``: those without an axis of heads.
    """
    for operand in operands_of(graph):
        softmax = operand.softmax
        if softmax is None or target_name(softmax) != "softmax" or attention_of(softmax):
            continue
        for node in itertools.islice(above(operand.node), _NEAR):
            if node.op != "placeholder" and len(shape_of(node) or ()) == 4 - of_a_head:
                yield node


def _operands(graph: fx.Graph) -> list[fx.Node]:
    with unchanged(graph):
        found = [each for each in find_attentions(graph) if isinstance(each, Attention)]
    return [operand for attention in found for operand in (attention.key, attention.value)]


def _flatten(graph: fx.Graph, node: fx.Node) -> None:
    """Join what stands behind the first tensor of a ``cat`` along the tokens beforehand."""
    if not _joins_tokens(node):
        return
    tensors = list(argument(node, 0, "tensors"))
    while _joins_tokens(tensors[0]):
        inner = list(argument(tensors[0], 0, "tensors"))
        grown = is_cache_like(inner[0]) and not _changed(graph, tensors[0], node, inner)
        if set(tensors[0].users) != {node} and not grown:
            break
        tensors = [*inner, *tensors[1:]]
    tensors = [tensor for tensor in tensors if len(shape_of(tensor) or ()) == 4]
    if len(tensors) < 3 or any(isinstance(value_of(t), QuantizedKV) for t in tensors[1:]):
        return
    if len({value_of(tensor).dtype for tensor in tensors}) != 1 or not is_cache_like(tensors[0]):
        return
    with graph.inserting_before(node):
        rest = torch.cat([value_of(tensor) for tensor in tensors[1:]], 2)
        new = insert_call(graph, torch.cat, (tensors[1:], 2), rest)
    node.args, node.kwargs = ([tensors[0], new], 2), {}


def _joins_tokens(node: Any) -> bool:
    along = target_name(node) == "cat" and argument(node, 1, "dim", 0) in (2, -2)
    return along and len(shape_of(node) or ()) == 4


def _changed(graph: fx.Graph, first: fx.Node, last: fx.Node, read: Sequence[fx.Node]) -> bool:
    """Return whether what ``first`` has read changes before ``last``."""
    with unchanged(graph):
        place = order_of(graph)
        return changes(graph, {root_of(node) for node in read}, place[first] + 1, place[last])


def _spell(graph: fx.Graph, node: fx.Node, growth: Growth) -> fx.Node:
    place = order_of(graph)
    last = max(growth.steps, key=place.__getitem__)
    with graph.inserting_after(last):
        past, index = growth.past, growth.index
        if growth.rows is not None:
            held = value_of(past)
            like = held.cursor if isinstance(held, QuantizedKV) else held
            index = graph.call_function(
                torch.tensor, (list(growth.rows),), {"dtype": torch.int64, "device": held.device}
            )
            index.meta["example_value"] = like.new_empty(len(growth.rows), dtype=torch.int64)
            last = index
    with graph.inserting_after(last):
        if index is not None:
            value = value_of(past).index_select(0, value_of(index))
            past = last = insert_call(graph, torch.index_select, (past, 0, index), value)
    with graph.inserting_after(last):
        cat = insert_call(graph, torch.cat, ([past, growth.new], 2), value_of(node))
    cat.meta.update({key: x for key, x in node.meta.items() if key not in cat.meta})
    return cat


def _replace(graph: fx.Graph, node: fx.Node, cat: fx.Node, growth: Growth) -> None:
    """Let what reads ``node`` read ``cat``; erase the steps that led to nothing else."""
    steps = set(growth.steps)
    node.replace_all_uses_with(cat, delete_user_cb=lambda user: user not in steps)
    erase_unread(graph, growth.steps)
