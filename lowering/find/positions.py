"""Find the cache positions that a call writes, and which of them can be computed before it runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx

from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.lowering.find.movement import moved_from
from kvq_compile.lowering.find.trial import MIXING
from kvq_compile.lowering.nodes import (
    changes,
    order_of,
    root_of,
    same,
    target_name,
    value_of,
    writes_in_place,
)
from kvq_compile.lowering.sites import Refusal

_RESHAPES = ("view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "contiguous")
_LARGEST_PART = 512  # nodes that positions or a mask are computed by, far more than any model takes


def same_value(a: Any, b: Any) -> bool:
    """Return whether two arguments of nodes are equal in every call: the same steps on the same tensors."""
    if a is b:
        return True
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(same_value(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, slice) and isinstance(b, slice):
        return same_value((a.start, a.stop, a.step), (b.start, b.stop, b.step))
    mine, theirs = value_of(a), value_of(b)
    if isinstance(mine, (int, torch.SymInt)) and isinstance(theirs, (int, torch.SymInt)):
        return same(mine, theirs)
    if not (isinstance(a, fx.Node) and isinstance(b, fx.Node)):
        return type(a) is type(b) and not isinstance(a, fx.Node) and bool(a == b)
    if moved_from(a) is moved_from(b):
        return not _changed_between(a, b)
    calls = a.op == b.op and a.op in ("call_function", "call_method") and a.target == b.target
    if (
        not calls
        or _is_random(a)
        or a.is_impure()
        or writes_in_place(a)
        or set(a.kwargs) != set(b.kwargs)
    ):
        return False
    if not all(same_value(a.kwargs[name], b.kwargs[name]) for name in a.kwargs):
        return False
    return same_value(a.args, b.args) and not _changed_between(a, b)


def same_positions(a: Any, b: Any) -> bool:
    """Return whether the cache positions of two writes are equal in every call, in whatever shape each has them."""
    return same_value(a, b) or (
        same_value(_flat(a), _flat(b)) and not (_is_tensor(a, b) and _changed_between(a, b))
    )


def _is_tensor(*nodes: Any) -> bool:
    return all(isinstance(value_of(node), torch.Tensor) for node in nodes)


def _flat(position: Any) -> Any:
    """Return the tensor whose elements cache positions are, in order, walking back along changes of shape."""
    while target_name(position) in _RESHAPES and position.args and _is_tensor(position.args[0]):
        if not same(value_of(position).numel(), value_of(position.args[0]).numel()):
            break
        position = position.args[0]
    return position


def _is_random(node: fx.Node) -> bool:
    name = target_name(node)
    return "rand" in name or name in ("bernoulli", "multinomial", "normal", "dropout", "empty")


def _changed_between(a: fx.Node, b: fx.Node) -> bool:
    place = order_of(a.graph)
    first, last = sorted((place[a], place[b]))
    roots = {root_of(node) for node in (a, b, moved_from(a), moved_from(b))}
    return changes(a.graph, roots, first + 1, last)


def part_of(
    nodes: Sequence[fx.Node], arguments: Mapping[fx.Node, int], on_host: bool = False
) -> fx.GraphModule:
    """Return the part of a graph that computes ``nodes``, as a function of the arguments of a call.

    It runs before the call, on the arguments as they are then; ``on_host``: on copies of them in host memory.

    Raises:
        Refusal: They depend on something that is known only when the graph runs.
    """
    place = order_of(nodes[0].graph)
    needed: set[fx.Node] = set()
    for node in nodes:
        needed |= needed_by(node, arguments)
    return _extract(sorted(needed, key=place.__getitem__), nodes, arguments, on_host)


def needed_by(result: fx.Node, arguments: Mapping[fx.Node, int]) -> set[fx.Node]:
    """Return the nodes that compute ``result`` from the arguments of a call as they are before it.

    Raises:
        Refusal: There are others.
    """
    needed: set[fx.Node] = set()
    stack = [result]
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        needed.add(node)
        if node.op == "placeholder":
            if isinstance(value_of(node), QuantizedKV) or node not in arguments:
                raise Refusal("the cache positions written depend on the contents of a cache")
            continue
        if node.op not in ("call_function", "call_method", "get_attr"):
            raise Refusal(f"the cache positions written depend on a {node.op}")
        if target_name(node) in MIXING or len(needed) > _LARGEST_PART:
            raise Refusal(f"the cache positions written depend on {target_name(node)}")
        if node.op != "get_attr" and (writes_in_place(node) or node.is_impure()):
            raise Refusal(f"the cache positions written pass through {target_name(node)}")
        stack.extend(node.all_input_nodes)
    until = order_of(result.graph)[result] + 1
    if changes(result.graph, {root_of(node) for node in needed}, 0, until):
        raise Refusal("the cache positions written change within the call before they are used")
    return needed


def _extract(
    needed: Sequence[fx.Node],
    results: Sequence[fx.Node],
    arguments: Mapping[fx.Node, int],
    on_host: bool,
) -> fx.GraphModule:
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    names = {index: graph.placeholder(f"argument_{index}") for index in range(len(arguments))}
    for node in needed:
        if node.op == "placeholder":
            copies[node] = names[arguments[node]]
        else:
            copies[node] = copy = graph.node_copy(node, copies.__getitem__)
            if on_host:
                copy.args = fx.node.map_aggregate(copy.args, _host_for)
                copy.kwargs = fx.node.map_aggregate(copy.kwargs, _host_for)
            if on_host and node.op == "get_attr":
                copies[node] = graph.call_method("cpu", (copy,))
    graph.output(tuple(copies[node] for node in results))
    owner = results[0].graph.owning_module
    return fx.GraphModule(owner if owner is not None else torch.nn.Module(), graph)


def _host_for(x: Any) -> Any:
    """Return an argument with devices made the host."""
    is_device = isinstance(x, torch.device) or (isinstance(x, str) and x.startswith("cuda"))
    return torch.device("cpu") if is_device else x
