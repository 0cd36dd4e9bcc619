"""Refuse calls that write into a part of a quantized cache: the part is a copy, in which a write would be lost.

``cache[:2]`` and ``cache[:, :, :64]`` are views of an ordinary tensor, and a call that takes one and writes into it
writes into the whole. Packed memory cannot give such views. Whether an argument stands for one is no property that
graphs are guarded by, so each call looks.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves

from kvq_compile.kernels.cache.arranged import ArrangedKV
from kvq_compile.kernels.cache.read_only import ReadOnlyTokens
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.lowering.nodes import root_of, source_name, writes_in_place, written_by


def refusing_lost_writes(gm: fx.GraphModule, call: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``call``, which takes the arguments of a graph, so that it raises where a write would be lost.

    Raises:
        NotImplementedError: When called with a part of a quantized cache that the graph writes into.
    """
    written = written_arguments(gm.graph)
    if not written:
        return call

    def checked(*args: Any) -> Any:
        if _are_whole([args[place] for place in written]):
            return call(*args)  # as nearly always
        for place, name in written.items():
            if _is_part(args[place]):
                raise NotImplementedError(
                    f"{name} must be a whole cache where a call writes into it, got a part of one, "
                    f"{list(args[place].shape)}; write to the whole cache, or clone() the part first"
                )
        return call(*args)

    return checked


def written_arguments(graph: fx.Graph) -> dict[int, str]:
    """Return the places of the tensors that a graph takes and writes into, each with the model's name for it."""
    takes = {node: place for place, node in enumerate(graph.find_nodes(op="placeholder"))}
    found: dict[int, str] = {}
    for node in graph.nodes:
        if node.op in ("call_function", "call_method") and writes_in_place(node):
            given = tree_leaves((node.args[:1], node.kwargs.get("out")))
            roots = [*map(root_of, given), *written_by(node)]
            found |= {takes[root]: source_name(root) for root in roots if root in takes}
    return found


_stands_for_a_view = attrgetter("_is_slice_copy")


def _are_whole(tensors: list[Any]) -> bool:
    """Return whether it is seen at a glance that none of some tensors is a part of a quantized cache."""
    if not {*map(type, tensors)} <= {Tensor, QuantizedKV}:
        return False
    return not any(map(_stands_for_a_view, [x for x in tensors if type(x) is QuantizedKV]))


def _is_part(x: Any) -> bool:
    """Say whether a tensor stands for a view of a quantized cache, and is a copy."""
    if type(x) is QuantizedKV:
        return x._is_slice_copy
    if type(x) is Tensor or not isinstance(x, Tensor):
        return False
    if isinstance(x, ArrangedKV):
        return any(map(_is_part, x.caches))
    return isinstance(x, ReadOnlyTokens) or (isinstance(x, QuantizedKV) and x._is_slice_copy)
