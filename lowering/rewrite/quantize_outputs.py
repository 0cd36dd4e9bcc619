"""Hand every cache back quantized: plan what the callable around the graph returns."""

from __future__ import annotations

from typing import Any

from torch import fx

from kvq_compile.kernels.cache.ring import slots_for
from kvq_compile.kernels.cache.tensor import Kind, QuantizedKV
from kvq_compile.lowering.cache_nodes import UNSEEN, quantize
from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import shape_of, size_of, value_of
from kvq_compile.lowering.outputs import Extended, Gathered, Given, Made, Output, Plain
from kvq_compile.lowering.rewrite.add_tables import MAKES_CACHE, empty_cache
from kvq_compile.lowering.sites import Life, Quantization, State

KINDS: dict[Life, Kind] = {Life.ALLOCATED: "static", Life.RING_FRESH: "ring"}  # others grow


def quantize_outputs(graph: Graph) -> PassReport:
    """Return caches as their parts instead of as 16-bit tensors.

    Before:  return (logits, keys, values)                  # keys, values: [B, Hkv, S, D], 16 bit
    After:   return (logits, *kvq.quantize(keys), *kvq.quantize(values))
    Because: returned caches are what stays in memory between calls.
    """
    states = {state.returned: (state, quantization) for state, quantization in graph.states()}
    flat: list[Any] = []
    plans: dict[fx.Node, Output] = {}
    for returned in graph.results:
        if not isinstance(returned, fx.Node):
            flat.append(returned)
            graph.plans.append(Plain(len(flat) - 1))
            continue
        if returned not in plans:
            plans[returned] = _plan(graph, returned, states.get(returned), flat)
        graph.plans.append(plans[returned])
    graph.results = flat
    return PassReport(
        tuple(
            f"{node} leaves as {type(plan).__name__.lower()} cache"
            for node, plan in plans.items()
            if not isinstance(plan, Plain)
        )
    )


def _plan(
    graph: Graph, returned: fx.Node, cache: tuple[State, Quantization] | None, flat: list[Any]
) -> Output:
    """Return how the captured graph's output ``returned`` is made; ``flat`` collects what the graph returns."""
    arguments = graph.arguments
    if isinstance(value_of(returned), QuantizedKV) and returned in arguments:
        return Given(arguments[returned])
    if cache is not None:
        state, quantization = cache
        if state.life is Life.GROWN:
            assert state.past is not None
            tokens = graph.sizes.size((shape_of(state.new) or ())[2])
            kept = None if state.kept is None else graph.sizes.size((shape_of(returned) or ())[2])
            if state.source is None:
                return Extended(arguments[state.past], tokens, kept)
            rows, first = graph.caches[state.past], len(flat)
            flat.extend((*rows.parts, *rows.calibrated[1:]))
            return Gathered(first, arguments[state.source], tokens, kept)
        if state.life in MAKES_CACHE:
            return _made(graph, returned, state, quantization, flat)
    flat.append(returned)
    return Plain(len(flat) - 1)


def _made(
    graph: Graph, x: fx.Node, state: State, quantization: Quantization, flat: list[Any]
) -> Made:
    made = graph.made.get(x)
    if made is None:
        with graph.fx.inserting_before(graph.output):
            like, seen = empty_cache(graph, state, quantization), graph.seen.get(x, UNSEEN)
            room, grows = size_of(x, 2), KINDS.get(state.life, "grown") == "grown"
            if state.life is Life.RING_FRESH:
                slots = int((shape_of(x) or ())[2])  # a guard: a window is a constant of its model
                room = slots_for(slots, 1, quantization.layout)
            made = quantize(graph.fx, x, room, grows, like, seen)
    first = len(flat)
    flat.extend((*made.parts, *made.calibrated[1:]))  # all calls share the tables
    kind = KINDS.get(state.life, "grown")
    length = graph.sizes.size((shape_of(x) or ())[2])
    tables = graph.calibration.tables_of(quantization)
    trimmed = kind == "grown" and state.kept is not None
    return Made(first, quantization.layout, kind, length, tables, trimmed)
