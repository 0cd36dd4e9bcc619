"""Small questions about FX nodes, asked by every pass."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import attrgetter
from typing import Any

import torch
from torch import fx
from torch._ops import HigherOrderOperator
from torch._subclasses import FakeTensor
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._pytree import tree_leaves

from kvq_compile.lowering.unchanged import once

FULL = slice(None)
NAME = "kvq_name"  # how the model names an argument that a pass has made
EVALUATED = "kvq_evaluated"  # a write that stands for other operations, which evaluation has proved within the buffer
LAYOUT = "kvq_layout"  # in which layout the model keeps what that is
VIEWS = (
    *(
        "getitem",
        "view",
        "view_as",
        "reshape",
        "unsqueeze",
        "squeeze",
        "expand",
        "expand_as",
        "transpose",
    ),
    *(
        "permute",
        "narrow",
        "flatten",
        "unflatten",
        "detach",
        "alias",
        "contiguous",
        "to",
        "getattr",
        "select",
    ),
)


def value_of(node: Any) -> Any:
    """Return the fake tensor or number that a node stands for; other arguments stand for themselves."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


def shape_of(node: Any) -> tuple[Any, ...] | None:
    """Return a node's shape, or ``None`` where it is no tensor."""
    value = value_of(node)
    return tuple(map(as_number, value.shape)) if isinstance(value, torch.Tensor) else None


def as_number(size: Any) -> Any:
    """Return a size as a number where it is one, though Dynamo keeps it as an expression."""
    return int(size) if isinstance(size, torch.SymInt) and size.node.expr.is_number else size


def size_of(node: fx.Node, dim: int) -> Any:
    """Return a size as an argument of a call: a number, or a node, made at the graph's insert point if need be.

    A symbolic size itself is no argument: only some compilers know the symbol by its name. Nodes that know the
    size already come first, so that a buffer which nobody else reads is not kept for its size.
    """
    size = (shape_of(node) or ())[dim]
    if not isinstance(size, torch.SymInt):
        return size
    for known in (*node.graph.find_nodes(op="placeholder"), *node.all_input_nodes):
        value = value_of(known)
        if isinstance(value, torch.SymInt) and value.node.expr == size.node.expr:
            return known
    call = node.graph.call_method("size", (node, dim))
    call.meta["example_value"] = size
    return call


def same(a: Any, b: Any) -> bool:
    """Return whether two sizes are equal for every input that the graph serves; tensors only if they are the same."""
    if isinstance(a, torch.Tensor) or isinstance(b, torch.Tensor):
        return a is b
    if isinstance(a, torch.SymInt) and isinstance(b, torch.SymInt) and a.node.expr == b.node.expr:
        return True  # as what follows says, which takes a while
    return bool(statically_known_true(a == b))


def target_name(node: Any) -> str:
    """Return the plain name of what a call node calls: ``"matmul"``, ``"index_copy_"``."""
    if not isinstance(node, fx.Node) or node.op not in ("call_function", "call_method"):
        return ""
    return (
        node.target
        if isinstance(node.target, str)
        else getattr(node.target, "__name__", str(node.target))
    )


def source_name(node: fx.Node) -> str:
    """Return how the model names an argument of the graph: ``L['past'].layers[0].keys``."""
    if NAME in node.meta:
        return str(node.meta[NAME])
    source = getattr(node, "_dynamo_source", None)
    try:
        return str(source.name() if callable(source.name) else source.name)  # type: ignore[union-attr]
    except (AttributeError, NotImplementedError):
        return node.name


def argument(node: fx.Node, position: int, name: str, default: Any = None) -> Any:
    """Return an argument given by position or by name."""
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def input_of(node: fx.Node, position: int = 0) -> fx.Node:
    """Return the node that a call takes as its argument number ``position``."""
    given = node.args[position]
    assert isinstance(given, fx.Node)
    return given


def calls(graph: fx.Graph, *names: str) -> Iterator[fx.Node]:
    """Yield the nodes that call something of these names, in order."""
    return (node for node in graph.nodes if target_name(node) in names)


def fixed_number(x: Any, of_sizes: bool = False) -> float | None:
    """Return an argument that is a number, guarding on one that Dynamo keeps symbolic; ``None`` for all else.

    A float of a model is symbolic once Dynamo has met the same code with another one: in a model of another size. One
    that is computed from sizes may be another in each call, and is a number if ``of_sizes`` says so.
    """
    if isinstance(x, fx.Node):
        x = value_of(x)
    if isinstance(x, torch.SymFloat):
        fixed = of_sizes or not any(symbol.is_integer for symbol in x.node.expr.free_symbols)
        return float(x) if x.node.has_hint() and fixed else None
    return x if isinstance(x, (int, float)) and not isinstance(x, bool) else None


def sizes_argument(node: fx.Node) -> tuple[Any, ...]:
    """Return the sizes that ``x.reshape(sizes)`` or ``x.reshape(*sizes)`` was called with."""
    rest = node.args[1:]
    return tuple(rest[0]) if len(rest) == 1 and isinstance(rest[0], (tuple, list)) else tuple(rest)


def getitem_index(node: fx.Node) -> tuple[Any, ...] | None:
    """Return the index of a subscript node with its ellipsis spelled out, else ``None``."""
    if target_name(node) != "getitem" or node.target is not operator.getitem:
        return None
    shape = shape_of(node.args[0])
    if shape is None:
        return None
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    used = sum(i is not None and i is not Ellipsis for i in index)
    if Ellipsis in [i for i in index if not isinstance(i, fx.Node)]:
        at = next(k for k, i in enumerate(index) if i is Ellipsis)
        index = (*index[:at], *[FULL] * (len(shape) - used), *index[at + 1 :])
    return (*index, *[FULL] * (len(shape) - sum(i is not None for i in index)))


def is_full(index: Any, size: Any = None) -> bool:
    """Return whether an index takes a whole dimension of ``size``."""
    if not isinstance(index, slice) or index.step not in (None, 1):
        return False
    if index.start is not None and not same(value_of(index.start), 0):
        return False
    return index.stop is None or (size is not None and same(value_of(index.stop), size))


def insert_call(
    graph: fx.Graph, target: Callable[..., Any], args: tuple[Any, ...], value: Any = None
) -> fx.Node:
    """Insert a call at the graph's insert point and say what it stands for."""
    node = graph.call_function(target, args)
    node.meta["example_value"] = value
    return node


@once
def order_of(graph: fx.Graph) -> dict[fx.Node, int]:
    """Return each node's place in the graph."""
    return {node: place for place, node in enumerate(graph.nodes)}


@once
def writes_in_place(node: fx.Node) -> bool:
    """Return whether a node changes something that exists already, so that it has to stay where it is."""
    if node.is_impure():
        return True
    if bodies_of(node):
        return bool(_written_operands(node))
    if node.op == "call_method":
        name = str(node.target)
        return name.endswith("_") and not name.endswith("__")
    schema = getattr(node.target, "_schema", None)
    if schema is not None:
        return bool(schema.is_mutable)
    if node.target in (operator.and_, operator.or_, operator.not_, operator.is_):
        return False  # keywords of Python, and no names of methods
    name = getattr(node.target, "__name__", "")
    in_place = name == "setitem" or (name.endswith("_") and not name.endswith("__"))
    return (
        in_place
        or bool(node.kwargs.get("inplace"))
        or "out" in node.kwargs
        or name in _IN_PLACE_OPERATORS
    )


def is_weight(node: fx.Node) -> bool:
    """Return whether a node is a parameter that the graph does not write: a cache may be a parameter, too."""
    value = value_of(node)
    if not isinstance(value, torch.nn.Parameter):
        return False
    return value.requires_grad or value.dim() < 3 or node not in writers_of(node.graph)


@once
def root_of(node: Any) -> Any:
    """Return the tensor whose memory ``node`` may share: the start of its chain of views and in-place writes.

    Dynamo's example values tell: a view and what it is a view of have one storage. Where it keeps none, and of
    quantized caches, which have none of their own, the names of views tell.
    """
    while isinstance(node, fx.Node):
        memory = _memory(node)
        source = next((n for n in node.all_input_nodes if _memory(n) & memory), None)
        if source is None:
            first = node.args[0] if node.args else None
            by_name = target_name(node) in VIEWS or _returns_its_input(node)
            if not by_name or not isinstance(first, fx.Node) or (memory and _memory(first)):
                return node
            source = first
        node = source
    return node


@once
def _memory(node: fx.Node) -> set[int]:
    """Return the storages of the tensors that a node stands for; empty where they are not known."""
    value = value_of(node)
    values = value if isinstance(value, (tuple, list)) else (value,)
    try:
        return {x.untyped_storage()._cdata for x in values if type(x) in (FakeTensor, torch.Tensor)}
    except (NotImplementedError, RuntimeError):
        return set()  # what functorch wraps has no storage


def _returns_its_input(node: fx.Node) -> bool:
    return (
        node.op in ("call_function", "call_method")
        and writes_in_place(node)
        and not node.is_impure()
        and not bodies_of(node)
    )


@once
def bodies_of(node: fx.Node) -> list[fx.Graph]:
    """Return the graphs that a higher-order operator runs, as ``torch.cond`` does; none of any other node."""
    owner = node.graph.owning_module
    if not isinstance(node.target, HigherOrderOperator) or owner is None:
        return []
    given = [x for x in node.all_input_nodes if x.op == "get_attr"]
    found = [attrgetter(str(x.target))(owner) for x in given]
    return [body.graph for body in found if isinstance(body, fx.GraphModule)]


def _written_operands(node: fx.Node) -> list[fx.Node]:
    """Return the arguments of a higher-order operator that its bodies write: these take the last ones of it."""
    operands = tree_leaves(node.args)
    found: list[fx.Node] = []
    for body in bodies_of(node):
        takes = body.find_nodes(op="placeholder")
        places = {taken: at - len(takes) for at, taken in enumerate(takes)}
        written = {root for inner in body.nodes for root in written_by(inner) if root in places}
        found += [operands[places[root]] for root in written if len(takes) <= len(operands)]
    return [x for x in found if isinstance(x, fx.Node)]


def changed_roots(nodes: Iterable[fx.Node]) -> set[fx.Node]:
    """Return the tensors whose memory some of ``nodes`` may write into."""
    return {root for node in nodes for root in written_by(node)}


@once
def written_by(node: fx.Node) -> list[fx.Node]:
    """Return the tensors whose memory a node may write into: its first argument, what ``out`` or a body says."""
    if node.op not in ("call_function", "call_method") or not writes_in_place(node):
        return []
    if bodies_of(node):
        return [root_of(operand) for operand in _written_operands(node)]
    given = node.kwargs["out"] if "out" in node.kwargs else node.args[:1]
    roots = map(root_of, tree_leaves(given))
    return [root for root in roots if isinstance(root, fx.Node)]


@once
def writers_of(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Return the nodes that write in place, in order, by the tensor whose memory they write into."""
    writers: dict[fx.Node, list[fx.Node]] = {}
    for node in graph.nodes:
        for memory in written_by(node):
            writers.setdefault(memory, []).append(node)
    return writers


def changes(graph: fx.Graph, roots: Iterable[Any], first: int, last: int) -> bool:
    """Return whether memory of one of ``roots`` may be written into by a node from place ``first`` up to ``last``."""
    place, writers = order_of(graph), writers_of(graph)
    written = (node for root in roots for node in writers.get(root, ()))
    return any(first <= place[node] < last for node in written)


def is_static(placeholder: fx.Node) -> bool:
    """Return whether an argument is a parameter or a buffer of the model, which stay where they are in memory."""
    return "_dynamo_static_input_type" in placeholder.meta.get("tensor_dict", ())


def erase_unread(graph: fx.Graph, steps: Sequence[fx.Node]) -> None:
    """Erase those of some steps that lead to nothing else, writes into memory of their own included."""
    among = set(steps)
    for step in reversed(steps):
        if not step.users and (not writes_in_place(step) or _is_own(root_of(step.args[0]), among)):
            graph.erase_node(step)


def _is_own(memory: fx.Node, steps: set[fx.Node]) -> bool:
    """Return whether nothing but ``steps`` uses a tensor's memory."""
    views = (user for user in memory.users if root_of(user) is memory)
    return set(memory.users) <= steps and all(_is_own_view(view, steps) for view in views)


def _is_own_view(view: fx.Node, steps: set[fx.Node]) -> bool:
    return set(view.users) <= steps and all(_is_own_view(user, steps) for user in view.users)


# What positions are computed with; each call of one gives the same result.
_IN_PLACE_OPERATORS = (
    "iadd",
    "isub",
    "imul",
    "itruediv",
    "ifloordiv",
    "ipow",
    "iand",
    "ior",
    "ixor",
)
