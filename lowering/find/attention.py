"""Find every softmax attention of a graph, whatever wrote it.

The walk starts at what cannot be spelled in many ways, the ``scaled_dot_product_attention`` call or the
softmax, and goes outward along named steps::

    scores = matmul(query, key.transpose(-2, -1))
    scores = scores * scale            # or / scale, or neither; tanh makes a soft cap, clamp a clamp
    scores = scores + mask             # or masked_fill(hidden, -inf), or where(seen, scores, -inf), or neither
    scores = cat([scores, sinks], -1)  # or neither; then scores - scores.amax(-1), or not
    weights = softmax(scores, -1)      # then casts, and dropout that does nothing
    weights = weights[..., :-1]        # where there are sinks
    output = matmul(weights, value)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import fx

from kvq_compile.kernels.layout import HIDES
from kvq_compile.kernels.score import Score
from kvq_compile.lowering.find.trial import plain_name
from kvq_compile.lowering.nodes import (
    argument,
    calls,
    fixed_number,
    getitem_index,
    input_of,
    is_full,
    same,
    shape_of,
    sizes_argument,
    target_name,
    value_of,
)
from kvq_compile.lowering.sites import Attention, Refusal, unexpected

MATMUL = ("matmul", "bmm")
SCALINGS = ("mul", "div", "truediv", "mul_", "div_", "imul", "itruediv", "multiply", "divide")
ADDITIONS = ("add", "add_", "iadd")
DIFFERENCES = ("sub", "sub_", "isub")
TANH = ("tanh", "tanh_")
CLAMPS = ("clamp", "clamp_", "clip", "clip_")
BENDS = (*TANH, *CLAMPS, "clamp_min", "clamp_min_", "clamp_max", "clamp_max_")
CASTS = ("to", "type", "type_as", "float", "half", "bfloat16", "contiguous")
SINKS = "what is joined to the scores is not understood as logits whose weights are left out again"
SCALE_IN_GRAPH = "the scale of the scores is computed in the graph"
WHO_USES = "(output_attentions? a graph break behind attention that they outlive?)"
DROPS = "attention drops weights at random; call model.eval() first"
_STEPS = ("dropout", "getitem")
_HIDING = ("masked_fill", "masked_fill_", "where")
_REACH = 12  # steps between a product and its softmax, more than masks, factors, casts, a cap and sinks take


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


def as_spelled(softmax: fx.Node) -> Attention | None:
    """Return the attention of a softmax, if its spelling is known."""
    try:
        return _read_softmax(softmax)
    except Exception:
        return None


def is_unreadable(softmax: fx.Node) -> bool:
    """Return whether a softmax stands before a product, over other axes than ``[B, H, T, S]``."""
    try:
        output, *_ = _follow_to_product(softmax)
    except Refusal:
        return False  # told as it is
    return output is not None and len(shape_of(softmax) or ()) != 4


def _read_sdpa(node: fx.Node) -> Attention:
    query, key, value = (
        argument(node, i, name) for i, name in enumerate(("query", "key", "value"))
    )
    if argument(node, 4, "dropout_p", 0.0) != 0.0:
        raise Refusal(DROPS)
    scale, causal = argument(node, 6, "scale"), argument(node, 5, "is_causal", False)
    shape = shape_of(query)
    assert shape is not None
    factor = 1 / math.sqrt(shape[-1]) if scale is None else fixed_number(scale, of_sizes=True)
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
    output, weights, cut = _follow_to_product(node)
    if output is None:
        return None
    dim = argument(node, 1, "dim")
    shape = shape_of(node)
    if shape is None or len(shape) != 4:
        raise Refusal(f"attention written as products must be over [B, H, T, S], got {shape}")
    if dim not in (-1, 3):
        raise Refusal(f"softmax runs over dimension {dim}, not over the tokens")
    scores, sinks = _split_sinks(argument(node, 0, "input"), cut)
    scores, mask, hides = _split_mask(scores)
    scores, score = _split_score(scores)
    if target_name(scores) not in MATMUL:
        raise Refusal(f"the scores pass through {_obstacle(scores)} before the softmax")
    query, transposed = _factors(scores)
    key = _untransposed(transposed)
    value, end = _factors(output)[1], node
    gate = _read_gate(argument(node, 0, "input"), output) if sinks is None else None
    if gate is not None:
        output, sinks = gate
        end = output
    between = _between(scores, end)
    own = {sinks} if isinstance(sinks, fx.Node) else set()
    if _is_used_outside(between, end) or own & between:
        raise Refusal("the scores are used outside attention")
    if len(node.users) > 1 or _is_used_outside(_between(node, weights), weights):
        raise Refusal(f"the attention weights are used outside attention {WHO_USES}")
    score = replace(score, has_sinks=sinks is not None)
    return Attention(output, query, key, value, mask, score, False, False, hides, sinks)


def _obstacle(scores: Any) -> str:
    """Return the name of the step that keeps scores from being read: behind a mask and factors, if it is there."""
    first = node = scores
    for _ in range(_REACH):
        name = target_name(node)
        if name not in (*ADDITIONS, *SCALINGS, *CASTS, *BENDS):
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


def _follow_to_product(softmax: fx.Node) -> tuple[fx.Node | None, fx.Node, fx.Node | None]:
    """Walk from a softmax to the product with the values.

    Returns:
        The product, the weights entering it, and the subscript that leaves some of them out.
    """
    weights, cut = softmax, None
    while True:
        for user in weights.users:
            if target_name(user) in MATMUL and _factors(user)[0] is weights:
                return user, weights, cut
            if target_name(user) in ("einsum", "baddbmm"):
                raise Refusal(f"the weights meet the values in {target_name(user)}; write matmul")
        steps = [user for user in weights.users if target_name(user) in (*CASTS, *_STEPS)]
        if not steps:
            return None, weights, None
        weights = steps[0]
        if target_name(weights) == "getitem":
            if cut is not None:
                return None, weights, None
            cut = weights
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


def _between(first: fx.Node, last: fx.Node) -> set[fx.Node]:
    """Return the nodes that are made of ``first`` and that ``last`` is made of, these two included."""
    made, node = {first: None}, first  # in order
    while node is not last:
        node = node.next
        if not made.keys().isdisjoint(node.all_input_nodes):
            made[node] = None
    between = {last}
    for node in reversed(made):
        if not between.isdisjoint(node.users):
            between.add(node)
    return between


def _is_used_outside(between: set[fx.Node], last: fx.Node) -> bool:
    """Return whether anything else reads what is on the way to ``last``."""
    return any(user not in between for node in between - {last} for user in node.users)


def _split_sinks(scores: Any, cut: fx.Node | None) -> tuple[Any, fx.Node | float | None]:
    """Return the scores without the logits that are joined to them and whose weights are ``cut`` off; and these.

    Raises:
        Refusal: What is joined is not what is cut off.
    """
    bare = _through_casts(_without_largest(_through_casts(scores)))
    name = target_name(bare)
    if name not in ("cat", "concat", "pad"):
        if cut is not None:
            raise Refusal("only a part of the attention weights meets the values")
        return bare, None
    joined = _padding(bare) if name == "pad" else _joined(bare)
    if joined is None or cut is None or not leaves(cut, joined[0], joined[2]):
        raise Refusal(SINKS)
    return joined[:2]


def _joined(cat: fx.Node) -> tuple[Any, Any, int] | None:
    """Return scores, the logits that are joined to them, and how many of these come first; ``None`` if it is not that.

    Logits that are the same number everywhere are that number, for all of a row.
    """
    parts, dim = argument(cat, 0, "tensors"), argument(cat, 1, "dim", 0)
    own = [place for place, part in enumerate(parts) if _is_behind_product(part)]
    if len(parts) != 2 or len(own) != 1 or dim not in (-1, 3):
        return None
    (place,) = own
    scores, sinks = parts[place], parts[1 - place]
    count = (shape_of(sinks) or (None,))[-1]
    if not isinstance(count, int) or count < 1:
        return None
    fills = {"zeros_like": 0.0, "ones_like": 1.0, "full_like": argument(sinks, 1, "fill_value")}
    number = fixed_number(fills.get(target_name(sinks)))
    logits = sinks if number is None else number + math.log(count)
    return scores, logits, place * count


def _padding(pad: fx.Node) -> tuple[Any, Any, int] | None:
    """Return the same of scores that are padded with a number."""
    sizes, value = argument(pad, 1, "pad"), argument(pad, 3, "value")
    if len(sizes) != 2 or argument(pad, 2, "mode", "constant") != "constant":
        return None
    number = fixed_number(0.0 if value is None else value)
    if number is None or not all(isinstance(n, int) and n >= 0 for n in sizes) or sum(sizes) < 1:
        return None
    return pad.args[0], number + math.log(sum(sizes)), sizes[0]


def _read_gate(scores: Any, output: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return the output times the weight that sinks leave to the tokens, and the logits of the sinks, ``[B, Hq, T]``.

    That weight is ``sigmoid(logsumexp(scores, -1) - sinks)``; ``None`` where the output is multiplied by no such thing.
    """
    sums = [user for user in scores.users if target_name(user) == "logsumexp"]
    if len(sums) != 1 or argument(sums[0], 1, "dim") not in (-1, 3, (-1,), [-1]):
        return None
    steps, node = [sums[0]], sums[0]
    while len(node.users) == 1 and len(steps) < 5:
        (node,) = node.users
        if target_name(node) not in CASTS:
            steps.append(node)
    names = [target_name(step) for step in steps[1:]]
    if names not in (
        ["sub", "sigmoid", "unsqueeze", "mul"],
        ["sub", "sigmoid", "unsqueeze", "imul"],
    ):
        return None
    _, difference, _, wide, gated = steps
    sinks, plain = argument(difference, 1, "other"), len(difference.args) == 2
    is_own = set(output.users) == {gated} and output in gated.args
    if not isinstance(sinks, fx.Node) or len(shape_of(sinks) or ()) > 3 or not plain:
        return None
    if _through_casts_of(difference.args[0]) is not sums[0] or argument(wide, 1, "dim") not in (
        -1,
        3,
    ):
        return None
    return (gated, sinks) if is_own and len(shape_of(sums[0]) or ()) == 3 else None


def _through_casts_of(node: Any) -> Any:
    """Walk back along casts."""
    while target_name(node) in CASTS:
        node = node.args[0]
    return node


def _without_largest(scores: Any) -> Any:
    """Return scores from which the largest of each row is subtracted as they were before; others as they are."""
    if target_name(scores) not in DIFFERENCES or len(scores.args) != 2:
        return scores
    before, largest = scores.args
    if target_name(largest) == "getitem" and largest.args[1] == 0:  # of values and indices
        largest = largest.args[0]
    if target_name(largest) not in ("max", "amax") or largest.args[0] is not before:
        return scores
    of_rows = argument(largest, 1, "dim") in (-1, 3, (-1,), [-1]) and argument(
        largest, 2, "keepdim"
    )
    return before if of_rows else scores


def _is_behind_product(node: Any) -> bool:
    """Return whether steps that scores may pass through lead from a product to ``node``."""
    node = _through_casts(node)
    if target_name(node) not in (*SCALINGS, *BENDS, *ADDITIONS, *_HIDING):
        return target_name(node) in MATMUL
    return any(_is_behind_product(arg) for arg in node.args[:3])


def leaves(cut: fx.Node, scores: fx.Node, first: int) -> bool:
    """Return whether a subscript leaves just the columns of scores, ``first`` columns behind the start."""
    index, before = getitem_index(cut), shape_of(cut.args[0])
    if index is None or before is None or len(index) != len(before):
        return False
    *rows, last = index
    if not all(map(is_full, rows)) or not isinstance(last, slice) or last.step not in (None, 1):
        return False
    start = 0 if last.start is None else value_of(last.start)
    columns = (shape_of(scores) or ())[-1]
    return same(start, first) and same((shape_of(cut) or ())[-1], columns)


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
    if name in _HIDING[:2]:
        _check_fill(argument(scores, 2, "value"))
        return scores.args[0], argument(scores, 1, "mask"), True
    if name == "where" and _is_scores(scores.args[1]):
        _check_fill(scores.args[2])
        return scores.args[1], scores.args[0], False
    return scores, None, False


def _check_fill(fill: Any) -> None:
    number = fixed_number(fill)
    if number is None or number > HIDES:
        raise not_hidden(fill)


def not_hidden(fill: Any) -> Refusal:
    """Return the refusal of scores that are set to a number that leaves them a weight."""
    return Refusal(f"hidden scores are set to {fill}, which does not hide them")


def _is_scores(node: Any) -> bool:
    name = target_name(_through_casts(node))
    if name in (*SCALINGS, *BENDS):
        return any(_is_scores(arg) for arg in _through_casts(node).args[:2])
    return name in MATMUL


def _split_score(scores: Any) -> tuple[Any, Score]:
    """Return the bare product and what is done to it."""
    scores = _through_casts(scores)
    steps: list[fx.Node] = []
    while target_name(scores) in (*SCALINGS, *BENDS):
        steps.append(scores)
        left, right = scores.args[0], argument(scores, 1, "other")
        is_left = target_name(scores) in BENDS or fixed_number(left) is None
        scores = _through_casts(left if is_left else right)
    score = Score(1.0)
    for step in reversed(steps):
        score = take_step(score, step)
    return scores, score


def take_step(score: Score, step: fx.Node) -> Score:
    """Return a score behind one more step: a factor, a cap or a clamp.

    Raises:
        Refusal: The step's numbers are not known, or make something else of it.
    """
    name = plain_name(step)
    try:
        if name in TANH:
            return score.tanh()
        if name in BENDS:
            return score.clamped(*_bounds_of(step))
        left, right = step.args[0], argument(step, 1, "other")
        if fixed_number(left) is not None:
            if "div" in name:
                raise Refusal("a number is divided by the scores")
            left, right = right, left
        number = fixed_number(right)
        if number is None or argument(step, 2, "rounding_mode") is not None:
            raise Refusal(SCALE_IN_GRAPH)
        return score.times(1 / number if "div" in name else number)
    except (ValueError, ZeroDivisionError) as error:
        raise Refusal(f"the scores pass through {step}, which is not understood: {error}") from None


def _bounds_of(clamp: fx.Node) -> tuple[float, float]:
    """Return what a step clamps scores to.

    Raises:
        Refusal: The bounds are not numbers.
    """
    name, bounds = plain_name(clamp), [-math.inf, math.inf]
    if name in CLAMPS:
        given = [argument(clamp, 1, "min"), argument(clamp, 2, "max")]
    else:
        low = "min" in name
        given = [
            argument(clamp, 1, "min") if low else None,
            None if low else argument(clamp, 1, "max"),
        ]
    for place, bound in enumerate(given):
        number = None if bound is None else fixed_number(bound)
        if bound is not None and number is None:
            raise Refusal("the bounds of the scores are computed in the graph")
        bounds[place] = bounds[place] if number is None else number
    return bounds[0], bounds[1]


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
