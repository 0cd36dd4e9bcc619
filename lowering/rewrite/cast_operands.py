"""Cast the operands of the operators to the dtype of the cache."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import value_of
from kvq_compile.lowering.sites import Life

# Attention runs as it is.
CAPTURED = (Life.FRESH, Life.RING_FRESH, Life.GROWN_PLAIN, Life.BUFFER_PLAIN, Life.RING_PLAIN)


def cast_operands(graph: Graph) -> PassReport:
    """Cast queries and new tokens that have another dtype than the cache.

    Before:  keys = cat([past_keys, key], 2); output = attention(query, keys, ...)     # keys fp32, query and key bf16
    After:   query' = query.to(fp32); key' = key.to(fp32)
             keys = cat([past_keys, key'], 2); output = attention(query', keys, ...)
    Because: the operators take one dtype, that of the cache, to which ``cat`` promotes and an assignment casts. Under
             autocast the captured attention would cast the whole cache as well, and round it.

    Leaves alone: attention over 16-bit caches, which runs as captured.
    """
    changes: list[str] = []
    for number, site in enumerate(graph.sites):
        if site.key.life in CAPTURED:
            continue
        with graph.fx.inserting_before(site.attention.output):
            key, value = (
                replace(state, new=_cast(graph.fx, state.new, state.base, changes))
                for state in (site.key, site.value)
            )
            query = _cast(graph.fx, site.attention.query, site.key.base, changes)
        attention = replace(site.attention, query=query)
        graph.sites[number] = replace(site, attention=attention, key=key, value=value)
    for number, reader in enumerate(graph.readers):
        if reader.key.life not in CAPTURED:
            with graph.fx.inserting_before(reader.attention.output):
                query = _cast(graph.fx, reader.attention.query, reader.key.base, changes)
            attention = replace(reader.attention, query=query)
            graph.readers[number] = replace(reader, attention=attention)
    return PassReport(tuple(changes))


def _cast(graph: fx.Graph, node: fx.Node, like: fx.Node, changes: list[str]) -> fx.Node:
    """Return ``node`` in the dtype of ``like``."""
    dtype = value_of(like).dtype
    if value_of(node).dtype == dtype:
        return node
    cast = graph.call_method("to", (node, dtype))
    cast.meta["example_value"] = value_of(node).to(dtype)
    changes.append(f"{cast} is {node} in {dtype}")
    return cast
