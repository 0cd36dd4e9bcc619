"""Plan which 16-bit buffers are quantized in place once a call has run, and how many tokens they hold then."""

from __future__ import annotations

import torch
from torch import fx

from kvq_compile.lowering.find.writes import writes_of
from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import shape_of, value_of
from kvq_compile.lowering.rewrite.weigh_tokens import keeps_queries
from kvq_compile.lowering.runtime import Conversion
from kvq_compile.lowering.sites import Life, Quantization, State


def plan_conversions(graph: Graph) -> PassReport:
    """Return, as further outputs, the cache positions at which 16-bit buffers are written, and queries.

    Before:  keys.index_copy_(2, position, key); ...; position.add_(1); return logits
    After:   slots = position.clone(); keys.index_copy_(2, position, key); ...; return logits, slots
    Because: `runtime` quantizes the buffers after the call and must know how many tokens they hold by then;
             ``position`` may have changed. Keys whose bits depend on queries take those of the call, a further output.
    """
    changes = []
    queries = {
        (site.key.base, site.key.write): site.attention.query
        for site in graph.sites
        if keeps_queries(site, site.key)
    }
    dense = [state for state, _ in graph.dense]
    for state, quantization in graph.states():
        if state.life is Life.RING_PLAIN:
            asked = queries.get((state.base, state.write))
            graph.conversions.append(_ring(graph, state, quantization, asked))
            changes.append(f"{state.past} is quantized after the call")
            continue
        if state.life is not Life.BUFFER_PLAIN:
            continue
        assert state.past is not None
        if state.write not in (state.base, *writes_of(state.past)[-1:]):
            continue  # a later write tells how many tokens there are in the end
        argument = graph.arguments[state.past]
        asked = queries.get((state.base, state.write))
        query = None if asked is None else _return(graph, asked)
        output = graph.results.index(state.base) if state.is_update else None
        if isinstance(value_of(state.position), torch.Tensor):
            slots, held = _return_slots(graph, state), None
        else:
            end = value_of(state.position) + (shape_of(state.new) or ())[2]
            slots, held = None, graph.sizes.size(end)
        is_read_whole = state.is_read_elsewhere or state in dense
        about = argument, slots, held, quantization, query, output, is_read_whole
        graph.conversions.append(Conversion(*about))
        changes.append(f"{state.base} is quantized after the call")
    return PassReport(tuple(changes))


def _ring(
    graph: Graph, state: State, quantization: Quantization, query: fx.Node | None
) -> Conversion:
    """Return the conversion of a buffer that keeps the last tokens."""
    assert state.past is not None
    held = None if query is None else _return(graph, query)
    place = graph.arguments[state.past]
    if isinstance(value_of(state.position), torch.Tensor):  # it may not be full yet
        positions = _return_slots(graph, state)
        return Conversion(place, positions, None, quantization, held, kind="ring")
    slots = graph.sizes.size((shape_of(state.past) or ())[2])
    return Conversion(place, None, slots, quantization, held, kind="ring")


def _return_slots(graph: Graph, state: State) -> int:
    """Return the number of a new output that holds the cache positions of a write."""
    assert state.write is not None
    with graph.fx.inserting_before(state.write):
        slots = graph.fx.call_method("clone", (state.position,))
    return _return(graph, slots)


def _return(graph: Graph, node: fx.Node) -> int:
    """Return the number of a new output."""
    graph.results = [*graph.results, node]
    return len(graph.results) - 1
