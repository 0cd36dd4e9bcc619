"""Scale queries instead of the keys that a cache is read as."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from kvq_compile.lowering.find.trial import plain_name
from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import (
    VIEWS,
    argument,
    fixed_number,
    insert_call,
    root_of,
    shape_of,
    target_name,
    value_of,
    writers_of,
)

_SCALINGS = ("mul", "multiply", "div", "truediv", "divide")
_REPEATS = ("repeat_interleave", "repeat", "tile", "gather", "index_select", "clone")
_OPERANDS = {  # of a product with keys: the place and name of the queries, and those of the keys
    "scaled_dot_product_attention": ((0, "query"), (1, "key")),
    "matmul": ((0, "input"), (1, "other")),
    "bmm": ((0, "input"), (1, "mat2")),
    "baddbmm": ((1, "batch1"), (2, "batch2")),
}
_REACH = 16  # steps between a factor and a product, more than views and repeated heads take


def scale_queries(graph: Graph) -> PassReport:
    """Move a factor of all keys, as they are read, to the queries.

    Before:  attend(query, repeat(cache * 0.25), values)
    After:   attend(query * 0.25, repeat(cache), values)
    Because: later passes know a cache by its elements. A product is the same, whichever factor is scaled.

    Leaves alone: factors of some keys or channels; keys that something else reads as well, such as a cache they join.
    """
    changes = []
    for node in [node for node in graph.fx.nodes if plain_name(node) in _SCALINGS]:
        found = _factor(node)
        products = None if found is None else _products(node)
        if found is None or not products:
            continue
        keys, factor = found
        if root_of(keys).op == "placeholder" and root_of(keys) not in writers_of(graph.fx):
            continue  # no cache that the call fills
        scaling: Any = operator.truediv if "div" in plain_name(node) else operator.mul
        for product in products:
            query = _scale_query(graph.fx, product, scaling, factor)
            changes.append(f"{query} is scaled by {factor}, and {keys} is not")
        node.replace_all_uses_with(keys)
        graph.fx.erase_node(node)
    graph.used |= {node for node in graph.fx.nodes if node.users}
    return PassReport(tuple(changes))


def _scale_query(graph: fx.Graph, product: fx.Node, scaling: Any, factor: Any) -> fx.Node:
    """Scale the query of a product; return it as it was."""
    (place, name), _ = _OPERANDS[plain_name(product)]
    query: fx.Node = argument(product, place, name)
    with graph.inserting_before(product):
        value = scaling(value_of(query), value_of(factor))
        scaled = insert_call(graph, scaling, (query, factor), value)
    if len(product.args) > place:
        product.update_arg(place, scaled)
    else:
        product.update_kwarg(name, scaled)
    return query


def _factor(node: fx.Node) -> tuple[fx.Node, Any] | None:
    """Return the tensor of four dimensions that is scaled and its factor, a number or a tensor of one element."""
    left, right = node.args[0], argument(node, 1, "other")
    if argument(node, 2, "rounding_mode") is not None:
        return None
    pairs = [(left, right)] if "div" in plain_name(node) else [(left, right), (right, left)]
    for keys, factor in pairs:
        value = value_of(keys)
        if not isinstance(value, Tensor) or value.dim() < 3 or not _is_scalar(factor):
            continue
        if value_of(node).dtype == value.dtype and isinstance(keys, fx.Node):
            return keys, factor
    return None


def _is_scalar(factor: Any) -> bool:
    value = value_of(factor)
    if isinstance(value, Tensor):
        return value.dim() == 0 and value.is_floating_point()
    return isinstance(value, torch.SymFloat) or fixed_number(factor) is not None


def _products(node: fx.Node, steps: int = _REACH) -> dict[fx.Node, None] | None:
    """Return the products that take a tensor as keys, or parts of it, repeated or not, if nothing else reads it.

    Several do where each head has a product of its own.
    """
    found: dict[fx.Node, None] = {}
    users = [user for user in node.users if user.users or user.op == "output"]
    for user in users if steps else ():
        name = plain_name(user)
        if name in _OPERANDS:
            queries, keys = (argument(user, *about) for about in _OPERANDS[name])
            taken = sum(given is node for given in (*user.args, *user.kwargs.values()))
            if keys is not node or taken != 1 or _is_weights(queries):
                return None
            found[user] = None
            continue
        moves = name in (*VIEWS, *_REPEATS, "mT", "swapaxes", "swapdims", "stack", "cat")
        given = user.args[0] if user.args else ()
        moved = given if isinstance(given, (list, tuple)) else [given]
        known = shape_of(user) is not None or isinstance(value_of(user), (list, tuple))
        if not moves or not known or any(each is not node for each in moved):
            return None
        further = _products(user, steps - 1)
        if not further:
            return None
        found |= further
    return found


def _is_weights(node: Any) -> bool:
    """Return whether a tensor is the weights of an attention, which meet values."""
    for _ in range(_REACH):
        if plain_name(node) == "softmax":
            return True
        if not isinstance(node, fx.Node) or target_name(node) in _OPERANDS or not node.args:
            return False
        node = node.args[0]
    return False
