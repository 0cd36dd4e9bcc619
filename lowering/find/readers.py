"""Follow a cache forward to what attends to it, in whatever spelling.

Between a cache and its attention a model may move, cast, rotate, normalize or project the elements, and between the
scores and the weights it may do anything. Three things stay: keys go into a product, what comes of it goes into another
one, and values are the other operand there; a softmax stands in between, or something in its place. Operators that take
keys and values at once (``scaled_dot_product_attention``, ``flex_attention``, a custom operator) are both products in
one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from kvq_compile.kernels.schemes import Role
from kvq_compile.lowering.find.dependence import carries
from kvq_compile.lowering.find.trial import BY_TOKEN, MIXING, data_of, plain_name
from kvq_compile.lowering.nodes import argument, root_of, writes_in_place

PRODUCTS = ("matmul", "bmm", "mm", "mv", "baddbmm", "einsum")
JOINT = ("scaled_dot_product_attention", "flex_attention")
_SOFTMAX = ("softmax", "_softmax")
_ENDS = (*MIXING, *PRODUCTS, *JOINT, *_SOFTMAX)
_REACH = 512  # nodes followed from one node, far more than stand between a cache and its products
_OWN = ("aten", "prims", "kvq")  # operators that are no model's own

Reached = dict[fx.Node, set[fx.Node]]


@dataclass(frozen=True)
class Readers:
    """The nodes that attend to a cache.

    Attributes:
        roles: What the cache is to them: keys, values or both; empty where that is not known.
        attentions: The softmaxes and the joint operators that it takes part in.
        products: The products and the joint operators that it goes into, each with the nodes by which it does.
        behind: The products that follow on those, each with the nodes by which they do.
    """

    roles: frozenset[Role]
    attentions: frozenset[fx.Node]
    products: Reached
    behind: Reached


class Attending:
    """The products and softmaxes of a graph, asked for the readers of one cache after another."""

    def __init__(self, graph: fx.Graph) -> None:
        self._weighing: dict[fx.Node, list[tuple[fx.Node, fx.Node]]] = {}
        for softmax in [node for node in graph.nodes if plain_name(node) in _SOFTMAX]:
            for product, by in _reached([softmax], _ENDS).items():
                self._weighing.setdefault(product, []).extend((softmax, node) for node in by)

    def readers(self, cache: fx.Node, projected: bool = False) -> Readers:
        """Return what attends to a cache.

        Args:
            cache: What is kept.
            projected: Whether its elements may pass through a linear layer on their way, as latent caches do.
        """
        passed = (*BY_TOKEN, "linear") if projected else BY_TOKEN
        ends = tuple(name for name in _ENDS if name not in passed)
        found = _reached([cache], ends)
        products = {node: by for node, by in found.items() if _is_product(node)}
        readers = self._of(products)
        if len(readers.roles) < 2 and readers.products.keys().isdisjoint(readers.behind):
            return readers
        # What is joined with other caches leads wherever they do: the elements tell which of these ways are its own.
        carried = {
            node: {each for each in by if carries(cache, each)} for node, by in products.items()
        }
        return self._of({node: by for node, by in carried.items() if by})

    def _of(self, products: Reached) -> Readers:
        """Return what attends to a cache that goes into some products."""
        roles: set[Role] = set()
        attentions: set[fx.Node] = set()
        behind: Reached = {}
        for product, by in products.items():
            if plain_name(product) in JOINT:
                key, value = argument(product, 1, "key"), argument(product, 2, "value")
                roles |= _among(("key", key in by), ("value", value in by))
                attentions.add(product)
                continue
            weights = [
                softmax for softmax, node in self._weighing.get(product, ()) if node not in by
            ]
            scores = [node for node in _reached([product], _ENDS) if plain_name(node) in _SOFTMAX]
            roles |= _among(("key", bool(scores)), ("value", bool(weights)))
            attentions.update(weights, scores)
            past_softmax = [end for end in _ENDS if end not in _SOFTMAX]
            for node, through in _reached([product], past_softmax).items():
                behind.setdefault(node, set()).update(through)
        return Readers(frozenset(roles), frozenset(attentions), products, behind)


def are_attended_together(keys: Readers, values: Readers) -> bool:
    """Return whether one cache holds the keys and the other the values of an attention, as the products tell."""
    for node, by in values.products.items():
        if _takes_both(node) and not by.issuperset(keys.products.get(node, by)):
            places = [_place(node, keys.products[node]), _place(node, by)]
            return places == sorted(places)
        if not by.issuperset(keys.behind.get(node, by)):
            return True
    return False


def _among(*roles: tuple[Role, bool]) -> set[Role]:
    return {role for role, plays in roles if plays}


def _place(node: fx.Node, by: Collection[fx.Node]) -> int:
    return min(place for place, each in enumerate(node.all_input_nodes) if each in by)


def _is_product(node: fx.Node) -> bool:
    return plain_name(node) in PRODUCTS or _takes_both(node)


def _takes_both(node: fx.Node) -> bool:
    return plain_name(node) in JOINT or _is_own_operator(node)


def _is_own_operator(node: fx.Node) -> bool:
    """Return whether a node calls an operator that a model or one of its libraries has registered."""
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverload):
        return target.namespace not in _OWN
    packet = isinstance(target, torch._ops.OpOverloadPacket)
    return packet and target._qualified_op_name.partition("::")[0] not in _OWN


def _reached(starts: Iterable[fx.Node], ends: Collection[str]) -> Reached:
    """Return the nodes that some nodes lead to and that end the search, each with those by which it was reached."""
    seen = set(starts)
    front, found = list(seen), {}  # type: ignore[var-annotated]
    while front and len(seen) < _REACH:
        node = front.pop(0)
        for user in node.users:
            if user.op == "output" or node not in data_of(user):
                continue
            if plain_name(user) in ends or _is_own_operator(user):
                found.setdefault(user, set()).add(node)
                continue
            written = user.args[0] if user.args and writes_in_place(user) else None
            memory = root_of(written) if written is not node else None
            for following in (user, memory):
                if isinstance(following, fx.Node) and following not in seen:
                    seen.add(following)
                    front.append(following)
    return found
