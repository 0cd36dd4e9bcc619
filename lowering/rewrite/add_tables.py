"""Pass calibration constants to a graph's new caches: tables, and shifts from cache position to RoPE position."""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource

from kvq_compile.lowering.cache_nodes import CacheNodes, CalibrationInputs
from kvq_compile.lowering.find.rotation import find_rotation
from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import insert_call, size_of, value_of
from kvq_compile.lowering.sites import Life, Quantization, Refusal, State

MAKES_CACHE = (Life.FRESH, Life.RING_FRESH, Life.GROWN_PLAIN, Life.ALLOCATED)


def add_tables(graph: Graph) -> PassReport:
    """Add a placeholder for the tables of every cache that the graph makes.

    Before:  return kvq.quantize(keys, layout)
    After:   tables = placeholder; shift = zeros([B]); return kvq.quantize(keys, layout, [tables, shift])
    Because: a calibrated layout needs its tables. As inputs they are shared by all graphs and all caches of a
        layer, and their address is fixed, as CUDA graphs need.
    """
    graph.calibration = CalibrationInputs(positions=_positions(graph))
    tensors = graph.calibration.tensors
    for state, quantization in graph.states():
        if state.life in MAKES_CACHE and quantization.tables is not None:
            tables = quantization.tables.on(value_of(state.base).device)
            tensors[quantization.tables.digest] = tables
    first = next(node for node in graph.fx.nodes if node.op != "placeholder")
    for number, (digest, words) in enumerate(tensors.items()):
        with graph.fx.inserting_before(first):
            graph.calibration.nodes[digest] = _placeholder(graph.fx, f"kvq_tables_{number}", words)
    return PassReport(tuple(f"{node} is an input" for node in graph.calibration.nodes.values()))


def empty_cache(graph: Graph, state: State, quantization: Quantization) -> CacheNodes:
    """Return a new cache without parts: its layout, its tables and its shift, at the graph's insert point."""
    if quantization.tables is None:
        return CacheNodes((), quantization.layout)
    calibrated = [graph.calibration.nodes[quantization.tables.digest]]
    if quantization.layout.rotary:
        calibrated.append(_shift(graph, state))
    return CacheNodes((), quantization.layout, tuple(calibrated))


def _shift(graph: Graph, state: State) -> fx.Node:
    """Return position minus cache position of each sequence, taken from the last token of the call.

    Where the graph does not show positions, cache positions stand for them. Under left padding that costs
    quality, never correctness: rotation and inverse rotation use the same angle.
    """
    nodes, device = graph.fx, value_of(state.base).device
    sequences = size_of(state.base, 0)
    position = graph.calibration.positions.get(state.new)
    if position is None:
        return nodes.call_function(
            torch.zeros, ([sequences],), {"dtype": torch.int32, "device": device}
        )
    last = insert_call(nodes, operator.getitem, (position, (..., -1)))
    if isinstance(value_of(state.position), Tensor):
        slot = insert_call(nodes, operator.getitem, (state.position, -1))
    else:
        if state.life is Life.ALLOCATED:
            slots = insert_call(nodes, operator.add, (state.position, size_of(state.new, 2)))
        else:
            slots = size_of(state.base, 2)
        slot = insert_call(nodes, operator.sub, (slots, 1))
    shift = insert_call(nodes, operator.sub, (last, slot))
    shift = nodes.call_method("to", (shift,), {"device": device, "dtype": torch.int32})
    shift = nodes.call_method("expand", (shift, sequences))
    return nodes.call_method("clone", (shift,))


def _positions(graph: Graph) -> dict[fx.Node, fx.Node | None]:
    """Return the node of the positions of each layer's new keys, where keys are quantized before RoPE."""
    found: dict[fx.Node, fx.Node | None] = {}
    position: fx.Node | None = None
    for state, quantization in graph.states():
        if not quantization.layout.rotary or state.life not in MAKES_CACHE:
            continue
        if position is None:  # one search serves all layers: a model's layers share their positions
            try:
                position = find_rotation(state.new, graph.inputs).position
            except Refusal:
                return {}
        found[state.new] = position
    return found


def _placeholder(graph: fx.Graph, name: str, words: Tensor) -> fx.Node:
    node = graph.placeholder(name)
    node.meta["tensor_dict"] = {"_dynamo_static_input_type": "unguarded"}
    node._dynamo_source = ConstantSource(name)
    return node
