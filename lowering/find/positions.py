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
    writers_of,
    writes_in_place,
)
from kvq_compile.lowering.sites import Refusal

# What keeps the elements and their order, if it keeps their number.
_RESHAPES = (
    *("view", "reshape", "unsqueeze", "squeeze", "flatten", "unflatten", "contiguous", "ravel"),
    *("expand", "expand_as", "view_as", "reshape_as", "select", "narrow"),
)
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
    return same_value(a.args, b.args) and not _read_apart(a, b)


def same_positions(a: Any, b: Any) -> bool:
    """Return whether the cache positions of two writes are equal in every call, in whatever shape each has them."""
    if same_value(a, b):
        return True
    mine, theirs = _reshaped(a), _reshaped(b)
    if not same_value(mine[-1], theirs[-1]):
        return False
    if not _is_tensor(a, b):
        return True
    steps = {*mine, *theirs}
    if mine[-1] is theirs[-1]:  # read by both, whenever it came to be
        return not _change_among({a, b, *mine[:-1], *theirs[:-1]}, steps)
    return not _change_among(steps, steps)


def change_between(positions: Sequence[Any], readers: Sequence[fx.Node | None]) -> bool:
    """Return whether tensors that are equal but for changes in place change between those who read them."""
    nodes = [x for x in positions if isinstance(x, fx.Node) and _is_tensor(x)]
    ends = [reader for reader in readers if reader is not None]
    if not nodes or not ends:
        return False
    place = order_of(nodes[0].graph)
    if any(node is not nodes[0] for node in nodes):
        ends += nodes  # of one node it does not matter how it came to be
    first, *_, last = sorted(place[node] for node in ends)
    roots = {root_of(x) for node in nodes for x in (node, moved_from(node))}
    return changes(nodes[0].graph, roots, first + 1, last)


def _is_tensor(*nodes: Any) -> bool:
    return all(isinstance(value_of(node), torch.Tensor) for node in nodes)


def _reshaped(position: Any) -> list[Any]:
    """Return cache positions, and what they are in other shapes, walking back to the tensor whose elements they are."""
    steps = [position]
    while _may_reshape(position) and position.args and _is_tensor(position.args[0]):
        if not same(value_of(position).numel(), value_of(position.args[0]).numel()):
            break
        position = position.args[0]
        steps.append(position)
    return steps


def _may_reshape(node: Any) -> bool:
    """Return whether a node keeps elements and their order, if as many are left: a cast of integers, too."""
    name = target_name(node)
    if name == "getitem":
        index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
        basic = (type(None), type(Ellipsis), int, slice)
        return all(isinstance(part, basic) and not isinstance(part, bool) for part in index)
    if name in ("to", "type", "int", "long"):
        return _is_tensor(node.args[0]) and all(
            value_of(x).dtype in (torch.int32, torch.int64) for x in (node, node.args[0])
        )
    return name in _RESHAPES


def _is_random(node: fx.Node) -> bool:
    name = target_name(node)
    return "rand" in name or name in ("bernoulli", "multinomial", "normal", "dropout", "empty")


def _changed_between(a: fx.Node, b: fx.Node) -> bool:
    return _change_among({a, b}, {a, b})


def _read_apart(a: fx.Node, b: fx.Node) -> bool:
    """Return whether what two like steps read, or one of them made, may change before the other."""
    mine, theirs = {*a.all_input_nodes}, {*b.all_input_nodes}
    return _change_among({a, b} | (mine ^ theirs), {a, b} | mine | theirs)


def _change_among(nodes: set[fx.Node], read: set[fx.Node]) -> bool:
    """Return whether memory of what is ``read`` changes between the first and the last of some nodes."""
    graph = next(iter(nodes)).graph
    places = [*map(order_of(graph).__getitem__, nodes)]
    roots = {root_of(x) for node in read for x in (node, moved_from(node))}
    return changes(graph, roots, min(places) + 1, max(places))


def part_of(
    nodes: Mapping[fx.Node, fx.Node], arguments: Mapping[fx.Node, int], on_host: bool = False
) -> fx.GraphModule:
    """Return the part of a graph that computes some nodes, as a function of the arguments of a call.

    It runs before the call, on the arguments as they are then; ``on_host``: on copies of them in host memory.

    Args:
        nodes: What is computed, each with the node that reads it: what has been written into it by then counts.
        arguments: Place of each placeholder among the arguments of a call.
        on_host: Whether the arguments will be copies in host memory.

    Raises:
        Refusal: They depend on something that is known only when the graph runs.
    """
    place = order_of(next(iter(nodes)).graph)
    needed = needed_by(nodes, arguments)
    return _extract(sorted(needed, key=place.__getitem__), [*nodes], arguments, on_host)


def needed_by(results: Mapping[fx.Node, fx.Node], arguments: Mapping[fx.Node, int]) -> set[fx.Node]:
    """Return the nodes that compute ``results``, each with its reader, from the arguments of a call as they are before.

    Writes into memory of their own are among them, up to where it is read.

    Raises:
        Refusal: There are others.
    """
    graph = next(iter(results)).graph
    place, writers = order_of(graph), writers_of(graph)
    read_at: dict[fx.Node, int] = {}  # the last place where a node, or a view of it, is read
    stack = [(node, place[reader]) for node, reader in results.items()]
    while stack:
        node, end = stack.pop()
        if read_at.get(node, -1) >= end:
            continue
        read_at[node] = end
        if len(read_at) > _LARGEST_PART:
            raise Refusal("the cache positions written take too many steps to compute beforehand")
        memory = root_of(node)
        _check_step(node, memory, arguments)
        earlier = [writer for writer in writers.get(memory, []) if place[writer] < end]
        if earlier and memory.op not in ("call_function", "call_method"):
            raise Refusal("the cache positions written change within the call before they are used")
        stack += [(writer, place[writer]) for writer in earlier]
        stack += [
            (source, end if root_of(source) is memory else place[node])
            for source in node.all_input_nodes
        ]
    return {*read_at}


def _check_step(node: fx.Node, memory: fx.Node, arguments: Mapping[fx.Node, int]) -> None:
    """Make sure that a node can run before the call.

    Raises:
        Refusal: It cannot.
    """
    if node.op == "placeholder":
        if isinstance(value_of(node), QuantizedKV) or node not in arguments:
            raise Refusal("the cache positions written depend on the contents of a cache")
        return
    if node.op not in ("call_function", "call_method", "get_attr"):
        raise Refusal(f"the cache positions written depend on a {node.op}")
    if target_name(node) in MIXING:
        raise Refusal(f"the cache positions written depend on {target_name(node)}")
    if node.op == "get_attr" or not writes_in_place(node):
        return
    has_effects = node.is_impure() and target_name(node) != "setitem"
    if has_effects or memory.op not in ("call_function", "call_method"):
        raise Refusal(f"the cache positions written pass through {target_name(node)}")


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
