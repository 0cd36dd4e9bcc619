"""Take rows of a quantized cache along the batch without leaving the packed form."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import fx

from kvq_compile.kernels.packed import ORIGINALS, part_names
from kvq_compile.lowering.cache_nodes import CacheNodes
from kvq_compile.lowering.find.movement import gathered_from
from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import insert_call
from kvq_compile.lowering.sites import Life


def gather_rows(graph: Graph) -> PassReport:
    """Gather rows of a cache in packed form for the sites that read them.

    Before:  keys = cat([index_select(past_keys, 0, rows), key], 2)
    After:   rows_codes = index_select(past_keys_codes, 0, rows); ...; keys = cat([rows_of_past, key], 2)
    Because: beam search reorders the batch at every step; gathering packed rows quantizes no token again.
    """
    changes = []
    for site in graph.sites:
        for state, _ in site.states():
            past = state.past
            found = None if past is None or past in graph.caches else gathered_from(past)
            if state.life is Life.GROWN and past is not None and found is not None:
                graph.caches[past] = rows_of(graph.fx, past, graph.caches[found[0]], found[1])
                changes.append(f"{past} takes packed rows of {found[0]}")
    return PassReport(tuple(changes))


def rows_of(graph: fx.Graph, past: fx.Node, cache: CacheNodes, index: fx.Node) -> CacheNodes:
    """Take rows of a cache along the batch, before ``past``, which reads them as an ordinary tensor."""
    parts, tables = [], cache.calibrated[:1]
    with graph.inserting_before(past):
        for name, part in zip(part_names(cache.layout), cache.parts, strict=True):
            if name == "cursor":
                parts.append(graph.call_method("clone", (part,)))
                continue
            where = graph.call_method("cpu", (index,)) if name == ORIGINALS else index
            parts.append(insert_call(graph, torch.index_select, (part, 0, where)))
        shift = (
            insert_call(graph, torch.index_select, (node, 0, index))
            for node in cache.calibrated[1:]
        )
        calibrated = (*tables, *shift)
    return replace(cache, parts=tuple(parts), calibrated=calibrated, owns_length=False)


def copy_of(graph: fx.Graph, cache: CacheNodes) -> CacheNodes:
    """Copy a cache at the graph's insert point."""
    parts = tuple(graph.call_method("clone", (part,)) for part in cache.parts)
    shift = (graph.call_method("clone", (node,)) for node in cache.calibrated[1:])
    calibrated = (*cache.calibrated[:1], *shift)
    return replace(cache, parts=parts, calibrated=calibrated, owns_length=False)
