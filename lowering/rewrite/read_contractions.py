"""Lay out the tensors of attentions that are spelled in other ways as passes know them."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from kvq_compile.lowering.find.attention import as_spelled, is_unreadable
from kvq_compile.lowering.find.chain import is_single
from kvq_compile.lowering.find.contraction import (
    Contraction,
    Find,
    find_contraction,
    product_before,
    product_behind,
    why_none,
)
from kvq_compile.lowering.find.dependence import dependent
from kvq_compile.lowering.find.evaluation import Order
from kvq_compile.lowering.find.hiding import HIDING, hiding
from kvq_compile.lowering.find.movement import made_of
from kvq_compile.lowering.find.positions import same_value
from kvq_compile.lowering.find.states import find_state
from kvq_compile.lowering.find.trial import plain_name
from kvq_compile.lowering.graph import Graph, PassReport
from kvq_compile.lowering.nodes import (
    argument,
    calls,
    insert_call,
    order_of,
    same,
    shape_of,
    size_of,
    target_name,
    value_of,
)
from kvq_compile.lowering.sites import Attention, Refusal, State, unexpected
from kvq_compile.lowering.unchanged import unchanged


def read_contractions(graph: Graph) -> PassReport:
    """Find attentions by evaluation where their spelling is not known, and lay out what passes put a call between.

    Before:  scores = einsum("btkgd,bksd->bkgts", query, keys); weights = softmax(scores + bias, -1)
             output = einsum("bkgts,bksd->btkgd", weights, values)
    After:   the same; query, bias and output also as [B, Hq, T, D], [B, Hq, T, S] and [B, Hq, T, D], by which
             ``graph.contractions`` describes the attention. What read the output reads it from there.
    Because: where a cache is quantized, one call takes the place of all that lies between them.

    Leaves alone: what evaluation does not prove to be an attention over a cache.
    """
    outputs = set(graph.output.all_input_nodes)
    before = set(graph.fx.nodes)
    changes = []
    for softmax in calls(graph.fx, "softmax"):
        product = product_before(softmax)
        if product is not None and target_name(product) == "baddbmm":
            changes.append(f"{product} is a product and a sum: {_split(graph.fx, product)}")

        def find(node: fx.Node, softmax: fx.Node = softmax) -> State:
            return find_state(node, outputs, graph.updates, softmax, graph.rings)

        with unchanged(graph.fx):
            spelled = as_spelled(softmax)
            if spelled is not None and _is_held(spelled, find):
                continue
        try:
            changes += _join_masks(softmax)
            with unchanged(graph.fx):
                contraction = find_contraction(softmax, find)
            attention = None if contraction is None else _Laid(graph.fx, contraction).attention()
        except Exception as error:
            refusal = error if isinstance(error, Refusal) else unexpected(error)
            if spelled is None or isinstance(error, Refusal):
                graph.contractions[softmax] = refusal
            continue
        if contraction is not None and attention is not None:
            given = argument(softmax, 0, "input")  # what has written into it is what is read
            softmax.replace_input_with(given, contraction.scores)
            graph.used.add(contraction.scores)
            graph.contractions[softmax] = attention
            changes.append(f"{softmax} is the softmax of an attention, by evaluation")
        elif contraction is None and is_unreadable(softmax):
            with unchanged(graph.fx):
                graph.contractions[softmax] = Refusal(why_none(softmax, find))
    graph.used |= set(graph.fx.nodes) - before  # what no pass needs is erased again
    return PassReport(tuple(changes))


def _is_held(spelled: Attention, find: Find) -> bool:
    """Return whether keys and values are caches as they are read."""
    try:
        find(spelled.key)
        find(spelled.value)
    except Refusal:
        return False
    return True


def _join_masks(softmax: fx.Node) -> Iterator[str]:
    """Hide weights by the mask that hides their scores where that is the same, computed once more."""
    with unchanged(softmax.graph):
        joined = [*_masks_alike(softmax)]
    for node, mask, known in joined:
        node.replace_input_with(mask, known)
        yield f"{node} hides weights by {known}"


def _masks_alike(softmax: fx.Node) -> Iterator[tuple[fx.Node, fx.Node, Any]]:
    """Yield the nodes that hide weights, by which mask, and the mask of scores that is the same."""
    output, scores = product_behind(softmax), argument(softmax, 0, "input")
    product = product_before(softmax)
    if output is None or product is None:
        return
    masks = [hiding(x)[0] for x in dependent(product, scores) if plain_name(x) in HIDING]
    for node in dependent(softmax, output):
        mask = hiding(node)[0] if plain_name(node) in HIDING else None
        for known in masks:
            if isinstance(mask, fx.Node) and mask is not known and same_value(mask, known):
                yield node, mask, known
                break


def _split(nodes: fx.Graph, joined: fx.Node) -> fx.Node:
    """Spell ``beta * bias + alpha * query . key`` as two steps; return the second."""
    bias, query, key = (argument(joined, place, name) for place, name in enumerate(_BADDBMM))
    alpha, beta = (joined.kwargs.get(name, 1) for name in ("alpha", "beta"))
    value = value_of(joined)
    with nodes.inserting_before(joined):
        result = insert_call(nodes, torch.bmm, (query, key), value)
        if alpha != 1:
            result = insert_call(nodes, operator.mul, (result, alpha), value)
        if beta != 0:  # else the bias is ignored, whatever it holds
            bias = (
                bias
                if beta == 1
                else insert_call(nodes, operator.mul, (bias, beta), value_of(bias))
            )
            result = insert_call(nodes, operator.add, (result, bias), value)
    result.meta.update({k: x for k, x in joined.meta.items() if k not in result.meta})
    joined.replace_all_uses_with(result)
    nodes.erase_node(joined)
    return result


_BADDBMM = ("input", "batch1", "batch2")


class _Laid:
    """The tensors of a contraction, laid out as ``[B, Hq, T, ...]``."""

    def __init__(self, nodes: fx.Graph, found: Contraction) -> None:
        self._nodes, self._found = nodes, found

    def attention(self) -> Attention | None:
        """Insert the nodes and describe the attention; ``None`` where a size cannot be told."""
        nodes, found = self._nodes, self._found
        output, key = found.output, found.key
        with nodes.inserting_before(output):
            columns, channels = self._columns(), size_of(found.value, 3)
            shapes = self._shapes(columns, channels)
            if shapes is None:
                return None
            query = self._scaled(self._apart(found.query, found.query_order, size_of(key, 3)))
            mask, sinks = self._mask(shapes[0], columns) if found.masked else (None, None)
        with nodes.inserting_after(output):
            anchor = nodes.call_function(torch.ops.aten.alias, (output,))
        with nodes.inserting_before(anchor):
            result = self._apart(output, found.output_order, channels, keep=False)
            result.meta.update({k: x for k, x in output.meta.items() if k not in result.meta})
            back = self._together(result, found.output_order, channels, shapes[1])
        nodes.erase_node(anchor)
        place = order_of(nodes)
        inserted = place[back]
        output.replace_all_uses_with(back, delete_user_cb=lambda user: place[user] > inserted)
        score = replace(found.score, has_sinks=sinks is not None)
        about = mask, score, False, True, False, sinks
        return Attention(result, query, key, found.value, *about)

    def _shapes(self, columns: Any, channels: Any) -> tuple[list[Any], list[Any]] | None:
        """Find the sizes of the axes; return the shapes of the product and of the output as arguments.

        The call's tokens may have a symbol of their own in the query.
        """
        found, key = self._found, self._found.key
        asked = [found.query, *made_of(found.query)]
        known = [(node, dim) for node in asked for dim in range(len(shape_of(node) or ()))]
        for node, dim in [(found.new, 2), *known]:
            self._axes = [size_of(key, 0), size_of(key, 1), found.groups, size_of(node, dim)]
            product: list[Any] | None = []
            if found.masked:
                product = self._joined(found.chain.base, found.base_order, columns)
            output = self._joined(found.output, found.output_order, channels)
            query = self._joined(found.query, found.query_order, size_of(key, 3))
            if product is not None and output is not None and query is not None:
                return product, output
        return None

    def _columns(self) -> Any:
        """Return the number of keys as an argument, told by a mask and not by the keys; ``None`` if none does."""
        size = (shape_of(self._found.key) or ())[2]
        if isinstance(size, int):
            return size
        for step in self._found.steps:
            for node in step.all_input_nodes:
                if node in self._found.steps or node is self._found.chain.base:
                    continue
                if same(value_of(node), size) and not isinstance(value_of(node), torch.Tensor):
                    return node
                for dim, other in enumerate(shape_of(node) or ()):
                    if same(other, size):
                        return size_of(node, dim)
        return None

    def _scaled(self, query: fx.Node) -> fx.Node:
        """Return the query times what its rows of the product are multiplied by."""
        found = self._found
        rows = self._joined(found.product, found.product_order, 1, rows=True)
        for factor, divides in found.chain.factors:
            assert rows is not None
            each = factor
            if shape_of(factor) is not None:
                if is_single(shape_of(factor) or ()):
                    factor = self._call("reshape", factor, [])
                each = self._apart(self._call("expand", factor, rows), found.product_order, 1)
            values = value_of(query), value_of(each)
            made = values[0] / values[1] if divides else values[0] * values[1]
            operation = operator.truediv if divides else operator.mul
            query = insert_call(self._nodes, operation, (query, each), made)
        return query

    def _joined(
        self, node: fx.Node, order: Order, last: Any, rows: bool = False
    ) -> list[Any] | None:
        """Return the shape of a tensor of some order as arguments: products of the sizes of its axes; or of its rows,
        with one column.
        """
        if last is None:
            return None
        sizes = [*self._axes, last]
        rest = [sizes[axis] for axis in order]
        shape: list[Any] = []
        known = shape_of(node) or ()
        for wanted in (*known[:-1], 1) if rows else known:
            size: Any = 1
            while not same(value_of(size), wanted):
                if not rest:
                    return None
                size = self._times(size, rest.pop(0))
            shape.append(size)
        return shape

    def _times(self, a: Any, b: Any) -> Any:
        if not isinstance(a, fx.Node) and not isinstance(b, fx.Node):
            return a * b
        if 1 in (a, b):
            return b if a == 1 else a
        return insert_call(self._nodes, operator.mul, (a, b), value_of(a) * value_of(b))

    def _apart(self, node: fx.Node, order: Order, last: Any, keep: bool = True) -> fx.Node:
        """Return a tensor of some order as ``[B, Hq, T, last]``; as it is if it is that, and may be kept."""
        B, H, G, T = self._axes
        shape = shape_of(node) or ()
        if keep and order == (0, 1, 2, 3, 4) and len(shape) == 4 and same(shape[1], H * G):
            return node
        sizes = (B, H, G, T, last)
        node = self._call("reshape", node, [sizes[axis] for axis in order])
        node = self._call("permute", node, [order.index(axis) for axis in range(5)])
        return self._call("reshape", node, [B, self._times(H, G), T, last])

    def _together(self, node: fx.Node, order: Order, last: Any, shape: Sequence[Any]) -> fx.Node:
        """Return ``[B, Hq, T, last]`` as a tensor of some order and shape."""
        node = self._call("reshape", node, [*self._axes, last])
        return self._call("reshape", self._call("permute", node, list(order)), list(shape))

    def _call(self, method: str, node: fx.Node, sizes: list[Any]) -> fx.Node:
        made = self._nodes.call_method(method, (node, sizes))
        value = value_of(node)
        made.meta["example_value"] = getattr(value, method)([value_of(size) for size in sizes])
        return made

    def _mask(self, shape: Sequence[Any], columns: Any) -> tuple[fx.Node, fx.Node | None]:
        """Return what is added to the scores, what enters the softmax where these are 0; and logits of sinks."""
        nodes, found, sinks = self._nodes, self._found, self._found.chain.sinks
        base = found.chain.base
        like = value_of(base)
        zeros = nodes.call_function(
            torch.zeros, (list(shape),), {"dtype": like.dtype, "device": like.device}
        )
        zeros.meta["example_value"] = like
        copies = {base: zeros}
        for step in found.steps:
            copies[step] = nodes.node_copy(step, lambda node: copies.get(node, node))
        whole, order = copies[found.scores], found.scores_order
        if sinks is None:
            return self._apart(whole, order, columns), None
        whole.meta["example_value"] = value_of(found.scores)
        count = sinks.count
        own, more = slice(None, -count), slice(-count, None)
        if sinks.first:
            own, more = slice(count, None), slice(None, count)
        mask, logits = (
            insert_call(nodes, operator.getitem, (whole, (..., part)), value_of(whole)[..., part])
            for part in (own, more)
        )
        return self._apart(mask, order, columns), self._apart(logits, order, count)
