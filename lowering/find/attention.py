"""Find every softmax attention of a graph, whatever wrote it.

The walk starts at what cannot be spelled in many ways, the ``scaled_dot_product_attention`` call or the
softmax, and goes outward along named steps::

    scores = matmul(query, key.transpose(-2, -1))
    scores = scores * scale            # or / scale, or neither
    scores = scores + mask             # or masked_fill(hidden, -inf), or where(seen, scores, -inf), or neither
    weights = softmax(scores, -1)      # then casts, and dropout that does nothing
    output = matmul(weights, value)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from kvq_compile.kernels.layout import Score
from kvq_compile.lowering.nodes import (
    argument,
    calls,
    fixed_number,
    input_of,
    shape_of,
    sizes_argument,
    target_name,
    value_of,
)
from kvq_compile.lowering.sites import Attention, Refusal, unexpected

MATMUL = ("matmul", "bmm")
SCALINGS = ("mul", "div", "truediv", "mul_", "div_", "imul", "itruediv", "multiply", "divide")
ADDITIONS = ("add", "add_", "iadd")
CASTS = ("to", "type", "type_as", "float", "half", "bfloat16", "contiguous")
SCALE_IN_GRAPH = "the scale of the scores is computed in the graph"
DROPS = "attention drops weights at random; call model.eval() first"
_REACH = (
    8  # steps between a product and its softmax, more than masks, factors, casts and a cap take
)


def find_attentions(
    graph: fx.Graph, known: Mapping[fx.Node, Attention | Refusal] = MappingProxyType({})
) -> list[Attention | tuple[fx.Node, Refusal]]:
    """Return the attentions in order of execution; where one cannot be read, its node and the reason.

    Args:
        graph: The nodes.
        known: Attentions that were found in another way, or refused, by their softmax.
    """
    found: list[Attention | tuple[fx.Node, Refusal]] = []
    for node in calls(graph, "scaled_dot_product_attention", "softmax", "flex_attention"):
        try:
            attention = known[node] if node in known else _READERS[target_name(node)](node)
        except Exception as error:
            found.append((node, error if isinstance(error, Refusal) else unexpected(error)))
        else:
            if isinstance(attention, Refusal):
                found.append((node, attention))
            elif attention is not None:
                found.append(attention)
    return found


def is_spelled_as_known(softmax: fx.Node) -> bool:
    """Return whether a softmax is that of an attention that can be read."""
    try:
        return _read_softmax(softmax) is not None
    except Exception:
        return False


def _read_sdpa(node: fx.Node) -> Attention:
    query, key, value = (
        argument(node, i, name) for i, name in enumerate(("query", "key", "value"))
    )
    if argument(node, 4, "dropout_p", 0.0) != 0.0:
        raise Refusal(DROPS)
    scale, causal = argument(node, 6, "scale"), argument(node, 5, "is_causal", False)
    shape = shape_of(query)
    assert shape is not None
    factor = 1 / math.sqrt(shape[-1]) if scale is None else fixed_number(scale)
    if factor is None:
        raise Refusal(SCALE_IN_GRAPH)
    if not isinstance(causal, bool):
        raise Refusal("the causal flag is computed in the graph")
    return Attention(
        output=node,
        query=query,
        key=key,
        value=value,
        mask=argument(node, 3, "attn_mask"),
        score=Score(factor),
        causal=causal,
        grouped=bool(argument(node, 7, "enable_gqa", False)),
    )


def _read_flex(node: fx.Node) -> Attention:
    raise Refusal("flex_attention is not rewritten; use scaled_dot_product_attention")


def _read_softmax(node: fx.Node) -> Attention | None:
    """Read an attention written out as products; ``None`` where the softmax is no attention at all."""
    output, weights = _follow_to_product(node)
    if output is None:
        return None
    dim = argument(node, 1, "dim")
    shape = shape_of(node)
    if shape is None or len(shape) != 4:
        raise Refusal(f"attention written as products must be over [B, H, T, S], got {shape}")
    if dim not in (-1, 3):
        raise Refusal(f"softmax runs over dimension {dim}, not over the tokens")
    scores, mask, hides = _split_mask(argument(node, 0, "input"))
    scores, score = _split_score(scores)
    if target_name(scores) not in MATMUL:
        raise Refusal(f"the scores pass through {_obstacle(scores)} before the softmax")
    query, transposed = _factors(scores)
    key = _untransposed(transposed)
    if len(scores.users) > 1 or any(len(n.users) > 1 for n in _between(scores, node)):
        raise Refusal("the scores are used outside attention")
    if len(node.users) > 1 or any(len(n.users) > 1 for n in _between(node, weights)):
        raise Refusal("the attention weights are used outside attention (output_attentions?)")
    return Attention(output, query, key, _factors(output)[1], mask, score, False, False, hides)


def _obstacle(scores: Any) -> str:
    """Return the name of the step that keeps scores from being read: behind a mask and factors, if it is there."""
    first = node = scores
    for _ in range(_REACH):
        name = target_name(node)
        if name not in (*ADDITIONS, *SCALINGS, *CASTS):
            break
        sides = [arg for arg in node.args[:2] if isinstance(arg, fx.Node) and _holds_product(arg)]
        if len(sides) != 1:
            return str(target_name(first) or first)
        (node,) = sides
    return str(target_name(first if name in MATMUL else node) or first)


def _holds_product(node: fx.Node) -> bool:
    """Say whether a product is among the few steps that ``node`` was computed by."""
    front = [node]
    for _ in range(_REACH):
        if any(target_name(each) in MATMUL for each in front):
            return True
        front = [other for each in front for other in each.all_input_nodes]
    return False


def _follow_to_product(softmax: fx.Node) -> tuple[fx.Node | None, fx.Node]:
    """Walk from a softmax to the product with the values; return that and the weights entering it."""
    weights = softmax
    while True:
        for user in weights.users:
            if target_name(user) in MATMUL and _factors(user)[0] is weights:
                return user, weights
            if target_name(user) in ("einsum", "baddbmm"):
                raise Refusal(f"the weights meet the values in {target_name(user)}; write matmul")
        steps = [user for user in weights.users if target_name(user) in (*CASTS, "dropout")]
        if not steps:
            return None, weights
        weights = steps[0]
        if target_name(weights) == "dropout" and drops(weights):
            raise Refusal(DROPS)


def _factors(product: fx.Node) -> tuple[Any, Any]:
    """Return the two operands of a product."""
    return argument(product, 0, "input"), argument(
        product, 1, "other", argument(product, 1, "mat2")
    )


def drops(node: fx.Node) -> bool:
    """Return whether a dropout is active."""
    p, training = argument(node, 1, "p", 0.5), argument(node, 2, "training", True)
    return bool(training) and p != 0.0


def _between(first: fx.Node, last: fx.Node) -> list[fx.Node]:
    """Return the nodes on the chain from ``first``, excluded, to ``last``, included unless it is first."""
    behind, node = {first}, first
    while node is not last:
        node = node.next
        if not behind.isdisjoint(node.all_input_nodes):
            behind.add(node)
    chain: list[fx.Node] = []
    while node is not first:
        chain.append(node)
        node = next(n for n in node.all_input_nodes if n in behind)
    return chain[1:]


def _split_mask(scores: Any) -> tuple[Any, fx.Node | None, bool]:
    """Return the scores before masking, the mask, and whether it marks what is hidden."""
    scores = _through_casts(scores)
    name = target_name(scores)
    if name in ADDITIONS:
        for this, other in ((0, 1), (1, 0)):
            if _is_scores(scores.args[this]) and isinstance(scores.args[other], fx.Node):
                if argument(scores, 2, "alpha", 1) != 1:
                    raise Refusal("the mask is added with a factor")
                if not value_of(scores.args[other]).is_floating_point():
                    raise Refusal("a mask that is not floating is added to the scores")
                return scores.args[this], scores.args[other], False
    if name in ("masked_fill", "masked_fill_"):
        _check_fill(argument(scores, 2, "value"), scores)
        return scores.args[0], argument(scores, 1, "mask"), True
    if name == "where" and _is_scores(scores.args[1]):
        _check_fill(scores.args[2], scores)
        return scores.args[1], scores.args[0], False
    return scores, None, False


def _check_fill(fill: Any, scores: fx.Node) -> None:
    lowest = torch.finfo(value_of(scores).dtype).min
    number = fixed_number(fill)
    if number is None or number > lowest:
        raise not_hidden(fill)


def not_hidden(fill: Any) -> Refusal:
    """Return the refusal of scores that are set to a number that leaves them a weight."""
    return Refusal(f"hidden scores are set to {fill}, which does not hide them")


def _is_scores(node: Any) -> bool:
    name = target_name(_through_casts(node))
    if name in SCALINGS:
        return any(_is_scores(arg) for arg in _through_casts(node).args[:2])
    return name in MATMUL


def _split_score(scores: Any) -> tuple[Any, Score]:
    """Return the bare product and what is done to it."""
    scores = _through_casts(scores)
    factor = 1.0
    while (name := target_name(scores)) in SCALINGS:
        left, right = scores.args[:2]
        if fixed_number(left) is not None:
            if "div" in name:
                raise Refusal("a number is divided by the scores")
            left, right = right, left
        number = fixed_number(right)
        if number is None:
            raise Refusal(SCALE_IN_GRAPH)
        factor = factor / number if "div" in name else factor * number
        scores = _through_casts(left)
    return scores, Score(factor)


def _through_casts(node: Any) -> Any:
    """Walk back along casts that lose nothing."""
    while target_name(node) in ("float", "contiguous", "to", "type"):
        if value_of(node).dtype not in (torch.float32, value_of(node.args[0]).dtype):
            return node
        node = node.args[0]
    return node


def _untransposed(node: Any) -> fx.Node:
    """Return ``key`` from the ``[B, H, D, S]`` operand of the product."""
    name = target_name(node)
    if name in ("transpose", "swapaxes", "swapdims") and {d % 4 for d in node.args[1:3]} == {2, 3}:
        return input_of(node)
    if name == "permute" and tuple(sizes_argument(node)) in ((0, 1, 3, 2), (0, 1, -1, -2)):
        return input_of(node)
    if name == "getattr" and node.args[1] == "mT":
        return input_of(node)
    raise Refusal(f"the keys reach the product through {name or node}, not through a transpose")


_READERS = {
    "scaled_dot_product_attention": _read_sdpa,
    "softmax": _read_softmax,
    "flex_attention": _read_flex,
}
