"""Find the fixed-size caches of which a graph returns an updated copy."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from kvq_compile.lowering.find.attention import find_attentions
from kvq_compile.lowering.find.movement import moved_from
from kvq_compile.lowering.find.states import read_base
from kvq_compile.lowering.find.updates import find_update
from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import changed_roots, erase_unread, order_of, root_of, value_of
from kvq_compile.lowering.sites import Attention
from kvq_compile.lowering.unchanged import unchanged


def name_updates(graph: Graph) -> PassReport:
    """Name an updated cache by one node, and its cache positions by a vector.

    Before:  keys = where(slots == position, key, past_keys); attend(query, keys); return keys.clone()
    After:   vector = position.reshape(-1); keys = where(...); attend(query, keys); return keys
    Because: later passes write the tokens into the packed cache instead, at these cache positions.

    Leaves alone: the steps of the update, which run as captured while the cache is in 16 bit.
    """
    place = order_of(graph.fx)
    with unchanged(graph.fx):
        attentions = [each for each in find_attentions(graph.fx) if isinstance(each, Attention)]
    bases = {read_base(operand) for found in attentions for operand in (found.key, found.value)}
    returned = set(graph.output.all_input_nodes)
    bases |= returned  # whatever reads them
    known: dict[tuple[Any, ...], fx.Node] = {}
    ordered = sorted(bases, key=place.__getitem__)
    with unchanged(graph.fx):  # as most graphs stay, which have none
        ordered = [*itertools.dropwhile(lambda base: find_update(base) is None, ordered)]
    for base in ordered:
        update = find_update(base)
        if update is None:
            continue
        first = known.setdefault((update.past, update.new, update.position), base)
        if first is not base and first in returned and base not in returned:
            base.replace_all_uses_with(first)
            erase_unread(graph.fx, update.steps)
        else:
            graph.updates[base] = replace(update, position=_vector(graph.fx, update.position))
    if graph.updates:
        _return_themselves(graph)
    return PassReport(
        tuple(f"{node} is {update.past} updated" for node, update in graph.updates.items())
    )


def _vector(graph: fx.Graph, position: Any) -> Any:
    """Return cache positions as a vector, if they are a tensor."""
    value = value_of(position)
    if not isinstance(value, Tensor) or value.dim() == 1:
        return position
    after = position
    while after.next.op == "placeholder":
        after = after.next
    with graph.inserting_after(after):
        vector = graph.call_method("reshape", (position, -1))
    vector.meta["example_value"] = value.reshape(-1)
    return vector


def _return_themselves(graph: Graph) -> None:
    """Return updated caches instead of copies of them."""
    results, changed = graph.results, changed_roots(graph.fx.nodes)
    for number, node in enumerate(results):
        source = moved_from(node)
        is_copy = source is not node and source in graph.updates and source not in results
        if is_copy and root_of(node) not in changed:
            results[number] = source
    graph.results = results
