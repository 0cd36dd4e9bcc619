"""Let a quantized cache take the dtype of the tokens that join it."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from kvq_compile.kernels.packed import part_names
from kvq_compile.lowering.cache_nodes import CacheNodes
from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import value_of
from kvq_compile.lowering.sites import Life, State


def promote_caches(graph: Graph) -> PassReport:
    """Promote a quantized cache to the wider dtype of the tokens that join it.

    Before:  keys = cat([past_keys, key], 2)                                           # past bf16, key fp32
    After:   past' = copy of past_keys with exact tokens in fp32; keys = cat([past', key], 2)
    Because: ``cat`` promotes; packed tokens have no dtype, and exact ones are widened without loss.
    """
    changes: list[str] = []
    for number, site in enumerate(graph.sites):
        key, value = (_promoted(graph, state, changes) for state in (site.key, site.value))
        graph.sites[number] = replace(site, key=key, value=value)
    return PassReport(tuple(changes))


def _promoted(graph: Graph, state: State, changes: list[str]) -> State:
    past, dtype = state.past, value_of(state.base).dtype
    if state.life is not Life.GROWN or past is None or value_of(past).dtype == dtype:
        return state
    with graph.fx.inserting_before(state.base):
        wider = graph.fx.call_method("to", (past, dtype))
        graph.caches[wider] = _copied(graph.fx, graph.caches[past], dtype)
    graph.used.add(wider)  # which nobody will read once attention is fused
    state.base.replace_input_with(past, wider)
    changes.append(f"{wider} holds {past} in {dtype}")
    return replace(state, past=wider, source=state.cache)


def _copied(graph: fx.Graph, cache: CacheNodes, dtype: torch.dtype) -> CacheNodes:
    parts = (
        graph.call_method("to", (part, dtype))
        if name == "exact"
        else graph.call_method("clone", (part,))
        for name, part in zip(part_names(cache.layout), cache.parts, strict=True)
    )
    shift = (graph.call_method("clone", (node,)) for node in cache.calibrated[1:])
    calibrated = (*cache.calibrated[:1], *shift)
    return replace(cache, parts=tuple(parts), calibrated=calibrated, owns_length=False)
