"""Find attentions in the bodies of higher-order operators: ``torch.utils.checkpoint``, ``torch.cond``, ``map``.

Dynamo captures what such an operator runs as a graph of its own. No pass looks into it, so what attends there reads
ordinary tensors. `nodes.written_by` tells which of the operator's arguments it writes.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import fx

from kvq_compile.lowering.find.attention import CASTS
from kvq_compile.lowering.find.dependence import PRODUCTS
from kvq_compile.lowering.find.movement import is_cache_like, made_of
from kvq_compile.lowering.find.reasons import NO_CACHE, in_a_body, is_kept
from kvq_compile.lowering.nodes import bodies_of, calls, same, shape_of, target_name, written_by
from kvq_compile.lowering.sites import Refusal


def attentions_in_bodies(graph: fx.Graph, outputs: set[fx.Node]) -> list[tuple[fx.Node, Refusal]]:
    """Return the higher-order operators whose bodies attend, each with the reason why it is left alone.

    Args:
        graph: The nodes.
        outputs: Nodes that the graph returns.
    """
    found = []
    for node in graph.nodes:
        if attends_inside(node):
            reason = in_a_body(node) if _has_cache(node, outputs) else NO_CACHE
            found.append((node, Refusal(reason)))
    return found


def attends_inside(node: fx.Node) -> bool:
    """Return whether a node is a higher-order operator whose body has an attention."""
    return any(map(_attends, bodies_of(node)))


def is_of_a_body(result: fx.Node) -> bool:
    """Return whether a node is what such an operator returns, or one of several tensors of that."""
    return any(map(attends_inside, (result, *result.all_input_nodes)))


def bodies_that_read(graph: fx.Graph, cache: fx.Node) -> set[fx.Node]:
    """Return the higher-order operators whose bodies attend, and that a cache, or what is made of it, is given to."""
    inside = filter(attends_inside, graph.nodes)
    return {
        node
        for node in inside
        if any(cache is x or cache in made_of(x) for x in node.all_input_nodes)
    }


def _attends(body: fx.Graph) -> bool:
    """Return whether a body, or one within it, has an attention."""
    if any(calls(body, "scaled_dot_product_attention", "flex_attention")):
        return True
    if any(next(products_of(softmax), None) is not None for softmax in calls(body, "softmax")):
        return True
    return any(map(attends_inside, body.nodes))


def products_of(softmax: fx.Node) -> Iterator[fx.Node]:
    """Yield the products that take the weights of a softmax."""
    users = [*softmax.users]
    while users:
        node = users.pop()
        if target_name(node) in PRODUCTS:
            yield node
        elif target_name(node) in (*CASTS, "dropout"):
            users.extend(node.users)


def _has_cache(node: fx.Node, outputs: set[fx.Node]) -> bool:
    """Return whether an operator reads, grows or writes what is kept after the call."""
    wide = [x for x in node.all_input_nodes if len(shape_of(x) or ()) >= 4]
    if written_by(node) or any(
        is_kept(x, outputs) for given in wide for x in (given, *made_of(given))
    ):
        return True
    results = [user for user in node.users if user in outputs]
    return any(_is_longer(x, result) for x in filter(is_cache_like, wide) for result in results)


def _is_longer(cache: fx.Node, result: fx.Node) -> bool:
    """Return whether a result may be a cache with more tokens: it has another size along one axis."""
    mine, theirs = shape_of(cache) or (), shape_of(result) or ()
    alike = len(mine) == len(theirs)
    return alike and sum(not same(a, b) for a, b in zip(mine, theirs, strict=True)) == 1
