"""Report on every cache that enters a graph: quantized, or the reason why not.

Start from the state: an argument (or an allocation that is returned) of three dimensions or more is a cache if the call

- hands it back longer along one axis, made of its own elements and others;
- writes some of its cache positions in place, from a tensor; or
- hands it back as long as it was, made of its own elements and of a shorter tensor's.

Along the third of four axes, as ``[B, H, S, D]`` grows, that suffices, unless a convolution or a pooling reads it: then
it is a feature map, ``[B, C, H, W]``. Along any other axis, and with three or five of them, it must also be multiplied
with something else that the call computes, as attention does with keys: feature maps and hidden states are joined and
filled in as well. A convolution or a normalization ends that search.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.lowering.find.attention import CASTS
from kvq_compile.lowering.find.bodies import attends_inside
from kvq_compile.lowering.find.movement import as_spelled, made_of
from kvq_compile.lowering.find.reasons import NO_CACHE, in_a_body, is_expected
from kvq_compile.lowering.find.trial import BY_TOKEN, MIXING
from kvq_compile.lowering.find.trims import suffix_of
from kvq_compile.lowering.find.updates import updated_caches
from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import (
    LAYOUT,
    argument,
    is_weight,
    root_of,
    same,
    shape_of,
    source_name,
    target_name,
    value_of,
    writers_of,
    writes_in_place,
)
from kvq_compile.lowering.sites import DENSE, SiteReport, StateReport

PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum", "scaled_dot_product_attention", "flex_attention")
_BY_SLOT = (
    *("index_copy_", "setitem", "index_put_", "copy_", "scatter_", "masked_scatter_"),
    *("index_add_", "scatter_add_"),
)
_OF_IMAGES = (
    *(
        "conv1d",
        "conv2d",
        "conv3d",
        "conv_transpose2d",
        "batch_norm",
        "group_norm",
        "instance_norm",
    ),
    *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "adaptive_max_pool2d", "interpolate"),
)
_PASSED = (*PRODUCTS[:4], "linear", *BY_TOKEN)
_REACH = 256  # nodes followed from a cache to what reads it
_ALLOCATED = ("zeros", "new_zeros", "zeros_like", "empty", "new_empty", "empty_like", "full")


def find_states(graph: Graph) -> PassReport:
    """Report on every cache that the call grows or writes, by the model's name for it.

    Before:  sites, and reports on the attentions that are none
    After:   the same, ``graph.state_reports``
    Because: an attention that no finder knows must not hide the cache that it reads.
    """
    served = {state.cache or state.base: state for state, _ in graph.states()}
    dense = {state.base for state, _ in graph.dense}
    updates = _updates(graph)
    lost = {past for node, past in updates.items() if node not in graph.updates}
    graph.state_reports = []
    for node, axis in _caches(graph, updates):
        shape = tuple(str(size) for size in shape_of(node) or ())
        name, state = source_name(node), served.get(node)
        if state is not None and state.base not in dense:
            layout = f", kept as {node.meta[LAYOUT]}" if LAYOUT in node.meta else ""
            graph.state_reports.append(StateReport(name, shape, "quantized", state.how + layout))
            continue
        told = graph.reasons.get(node if state is None else state.whole)
        reason = graph.thaw or told or _why_not(graph, node, axis)
        stored = state is not None or (isinstance(value_of(node), QuantizedKV) and node not in lost)
        if stored and graph.thaw is None:
            graph.state_reports.append(StateReport(name, shape, DENSE, reason))
            continue
        expected = is_expected(reason) or reason == graph.thaw  # a call that thaws tells so itself
        graph.state_reports.append(StateReport(name, shape, "left alone", reason, expected))
    return PassReport(tuple(f"{report.name} {report.outcome}" for report in graph.state_reports))


def _updates(graph: Graph) -> dict[fx.Node, fx.Node]:
    """Return the caches of which the call returns what may be an update, by that: each once, if possible."""
    returned = graph.output.all_input_nodes
    found = {node: graph.updates[node].past for node in returned if node in graph.updates}
    for node in returned:
        pasts = [] if node in found else updated_caches(node)
        if pasts:
            found[node] = next((past for past in pasts if past not in found.values()), pasts[0])
    return found


def _caches(
    graph: Graph, updates: Mapping[fx.Node, fx.Node]
) -> Iterator[tuple[fx.Node, int | None]]:
    """Yield the caches of a graph, each with the axis along which it grows or is written, where that is known."""
    written = _written(graph)
    returned = graph.output.all_input_nodes
    grown = _grown(graph, written, updates)
    rings = (ring.past for ring in graph.rings.values())
    written = {**dict.fromkeys(updates.values(), 2), **written, **dict.fromkeys(rings, 2)}
    allocated = {node for node in returned if target_name(node) in _ALLOCATED}
    for node in graph.fx.nodes:
        value = value_of(node)
        if not isinstance(value, Tensor) or is_weight(node):
            continue
        if node in updates:
            continue  # what it is made of is the cache
        if not value.is_floating_point() or value.dim() not in (3, 4, 5, 6):
            continue
        if node.op == "placeholder" and isinstance(value, QuantizedKV):
            if node in grown or node in written:
                yield node, grown.get(node, 2)
        elif (node.op == "placeholder" and (node in grown or node in written)) or (
            node in allocated and node in written
        ):
            axis = grown[node] if node in grown else written[node]
            third_of_four = (value.dim(), axis) == (4, 2)
            if _is_multiplied(node) or (third_of_four and not is_feature_map(node)):
                yield node, axis


def _grown(
    graph: Graph, written: Mapping[fx.Node, int | None], updates: Mapping[fx.Node, fx.Node]
) -> dict[fx.Node, int]:
    """Return the arguments that leave the call longer along one axis, with that axis."""
    found: dict[fx.Node, int] = {}
    served = {state.returned: state.cache for state, _ in graph.states()}
    for result in graph.output.all_input_nodes:
        if result in served:  # what is understood need not be guessed
            cache = served[result]
            if cache is not None and cache.op == "placeholder" and cache is not result:
                found.setdefault(cache, 2)
            continue
        if result in updates:
            continue
        spelled = as_spelled(suffix_of(result) or result)
        if spelled is not None:
            found.setdefault(spelled.past, 2)
            continue
        shape = shape_of(result)
        if shape is None or len(shape) not in (3, 4, 5, 6):
            continue
        parts = list(made_of(result))
        if any(node in written and node.op == "placeholder" for node in parts):
            continue  # made of a buffer that the call writes in place, which is told itself
        longest = 0  # of several arguments that a result joins, the cache is the longest
        candidate: tuple[fx.Node, int] | None = None
        for node in parts:
            before = shape_of(node)
            if node.op != "placeholder" or before is None or len(before) != len(shape):
                continue
            if value_of(node).dtype != value_of(result).dtype:
                continue
            if result in written and _is_all_that_is_written(node, result):
                continue  # tokens written into an allocation, which is the cache
            longer = [axis for axis in range(len(shape)) if not same(before[axis], shape[axis])]
            if len(longer) != 1:
                continue
            (axis,) = longer
            if longest < _hint(before[axis]) < _hint(shape[axis]):
                longest, candidate = _hint(before[axis]), (node, axis)
        if candidate is not None:
            found.setdefault(*candidate)
    return found


def _is_all_that_is_written(tokens: fx.Node, memory: fx.Node) -> bool:
    """Return whether some tokens, and nothing else, are written into a tensor."""
    sources = [_source(write) for write in writers_of(memory.graph).get(memory, ())]
    return all(tokens is source or tokens in made_of(source) for source in sources)


def _hint(size: Any) -> int:
    if isinstance(size, torch.SymInt):
        return int(size.node.hint) if size.node.has_hint() else 0
    return int(size)


def _written(graph: Graph) -> dict[fx.Node, int | None]:
    """Return the tensors that the call writes in place at some cache positions, with the axis of these."""
    found: dict[fx.Node, int | None] = {}
    for node in graph.fx.nodes:
        if target_name(node) not in _BY_SLOT or not writes_in_place(node):
            continue
        memory = root_of(node.args[0])
        source = _source(node)
        whole, part = shape_of(memory), shape_of(source)
        if not isinstance(memory, fx.Node) or whole is None or part is None or len(part) < 2:
            continue
        if len(part) == len(whole):
            axes = [axis for axis in range(len(whole)) if not same(whole[axis], part[axis])]
            if axes:
                found.setdefault(memory, axes[0] if len(axes) == 1 else None)
        else:
            found.setdefault(memory, None)
    return found


def _source(write: fx.Node) -> Any:
    """Return what a write in place takes its elements from."""
    place, name = {
        "index_copy_": (3, "source"),
        "copy_": (1, "src"),
        "scatter_": (3, "src"),
        "index_add_": (3, "source"),
        "scatter_add_": (3, "src"),
    }.get(target_name(write), (2, "values"))
    return argument(write, place, name)


def _is_multiplied(cache: fx.Node) -> bool:
    return any(target_name(node) in PRODUCTS for node in _followed(cache))


def is_feature_map(cache: fx.Node) -> bool:
    """Return whether a convolution or a pooling reads a tensor."""
    return any(target_name(node) in _OF_IMAGES for node in _followed(cache))


def _followed(cache: fx.Node) -> Iterator[fx.Node]:
    """Yield what a cache and its copies reach, products and the softmax behind them included."""
    seen: set[fx.Node] = {cache}
    front = [cache]
    while front and len(seen) < _REACH:
        node = front.pop(0)
        for user in node.users:
            if user in seen or user.op == "output":
                continue
            seen.add(user)
            yield user
            if target_name(user) not in MIXING or target_name(user) in _PASSED:
                front.append(user)
        if target_name(node) in _BY_SLOT and isinstance(node.args[0], fx.Node):
            memory = root_of(node.args[0])
            if memory not in seen:
                seen.add(memory)
                front.append(memory)


def _weights_of(product: fx.Node) -> Iterator[fx.Node]:
    """Yield the softmax, and what stands between, whose weights a product takes as its first operand."""
    if target_name(product) not in PRODUCTS[:2]:
        return
    weights = product.args[0] if product.args else None
    while isinstance(weights, fx.Node):
        yield weights
        if target_name(weights) not in (*CASTS, "dropout"):
            return
        weights = weights.args[0]


def _products_of(softmax: fx.Node) -> Iterator[fx.Node]:
    """Yield what stands between a softmax and the product that takes its weights, and that product."""
    users = list(softmax.users) if target_name(softmax) == "softmax" else []
    while users:
        node = users.pop()
        if target_name(node) in (*CASTS, "dropout"):
            users.extend(node.users)
        elif target_name(node) in PRODUCTS[:2]:
            yield node


def _why_not(graph: Graph, cache: fx.Node, axis: int | None) -> str:
    """Return why a cache is not served."""
    refused: dict[str, SiteReport] = {
        report.node: report for report in graph.reports if report.outcome != "rewritten"
    }
    reached = [
        near
        for node in _followed(cache)
        for near in (node, *_weights_of(node), *_products_of(node))
    ]
    met = [refused[node.name] for node in reached if node.name in refused]
    told = [report.detail for report in met if report.detail != NO_CACHE]
    if told:
        return told[0]
    dims = len(shape_of(cache) or ())
    if dims != 4:
        return f"it has {dims} dimensions; [B, H, S, D] in any order is served, and several such in one tensor"
    if axis != 2:
        if axis is None:
            return "it is written at something else than whole tokens"
        return f"it grows along dimension {axis}, which is not understood as the tokens of [B, H, S, D] in any order"
    inside = next(filter(attends_inside, _followed(cache)), None)
    if inside is not None:
        return in_a_body(inside)
    if not _is_multiplied(cache):
        return "no attention reads it in the graph that writes it (a graph break between the two?)"
    return "what reads it is no softmax attention that is rewritten"
