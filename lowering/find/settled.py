"""Make numbers of sizes that Dynamo keeps symbolic, where no other call has others."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

from kvq_compile.kernels.cache.arranged import ArrangedKV
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.lowering.find.arrangements import kept_by
from kvq_compile.lowering.nodes import value_of


def settle_sizes(graph: fx.Graph) -> None:
    """Guard on sizes of caches: heads and channels of packed ones, and what several axes share by chance.

    Dynamo gives sizes that are equal in the call that is being compiled one symbol. Batch, heads and layers of a cache
    are no more equal for that, and what the model computes with one of them cannot be run at other sizes of all.
    """
    arguments = graph.find_nodes(op="placeholder")
    shared = {node: sizes for node in arguments if (sizes := _shared(value_of(node)))}
    kept = {node: shared.get(node, []) for node in (kept_by(graph) if shared else ())}
    for node in arguments:
        for size in (*_packed(value_of(node)), *kept.get(node, ())):
            int(size)  # a guard


def _packed(value: Any) -> Iterator[Any]:
    """Yield the heads and the channels of packed caches."""
    for cache in value.caches if isinstance(value, ArrangedKV) else (value,):
        if isinstance(cache, QuantizedKV):
            yield from (cache.shape[1], cache.shape[3])


def _shared(value: Any) -> list[torch.SymInt]:
    """Return the sizes of a tensor that are one symbol and stand at several axes."""
    if not isinstance(value, torch.Tensor):
        return []
    shape: tuple[Any, ...] = tuple(value.shape)
    sizes = [size for size in shape if isinstance(size, torch.SymInt)]
    times = Counter(size.node.expr for size in sizes)
    return [size for size in sizes if size.node.expr.is_symbol and times[size.node.expr] > 1]
