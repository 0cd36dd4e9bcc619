"""What lies between the product of queries and keys and the softmax, read step by step where a trial cannot tell.

Masks, biases and factors that are numbers show in an evaluation (`evaluation`). Caps and clamps may do nothing to
random numbers, and a factor that is a tensor may be 1 in a trial: these are read from the graph, and evaluation bears
them out.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from kvq_compile.kernels.score import Score
from kvq_compile.lowering.find.attention import (
    BENDS,
    CASTS,
    SCALE_IN_GRAPH,
    SCALINGS,
    SINKS,
    leaves,
    take_step,
)
from kvq_compile.lowering.find.trial import data_of, plain_name
from kvq_compile.lowering.nodes import (
    VIEWS,
    argument,
    fixed_number,
    same,
    shape_of,
    value_of,
)
from kvq_compile.lowering.sites import Refusal

JOINS = ("cat", "concat", "pad")


@dataclass(frozen=True)
class Sinks:
    """Columns that scores are joined to.

    Attributes:
        joined: The node that joins them.
        count: How many they are.
        first: Whether they come before the scores.
    """

    joined: fx.Node
    count: int
    first: bool


@dataclass(frozen=True)
class Chain:
    """The steps between a product and its softmax.

    Attributes:
        base: The last cap or clamp; the product where there is none.
        score: What the steps up to there make of the product.
        factors: What the product is multiplied by, and whether it is divided: tensors of an element for each of its
            rows, and numbers that sizes of the call tell.
        scaled: The steps that do so.
        sinks: Logits of sinks that are joined to the scores.
    """

    base: fx.Node
    score: Score
    factors: tuple[tuple[fx.Node, bool], ...]
    scaled: frozenset[fx.Node]
    sinks: Sinks | None

    @staticmethod
    def read(product: fx.Node, steps: Sequence[fx.Node], weights: Sequence[fx.Node]) -> Chain:
        """Read the steps from a product, left out, to its softmax, and those of the weights behind it.

        Raises:
            Refusal: One of them is not understood.
        """
        inside = {product, *steps}
        last = max((n for n, step in enumerate(steps) if plain_name(step) in BENDS), default=-1)
        factors: list[tuple[fx.Node, bool]] = []
        scaled, score = set(), Score(1.0)
        for place, step in enumerate(steps):
            name = plain_name(step)
            by = [other for other in step.all_input_nodes if other not in inside]
            if name in SCALINGS and not all(map(_is_told, by)):
                if place > last >= 0 or not _is_of_rows(step, by, product):
                    raise Refusal(SCALE_IN_GRAPH)
                factors.append((by[0], "div" in name))
                scaled.add(step)
            elif place <= last and name in (*SCALINGS, *BENDS):
                score = take_step(score, step)
            elif place <= last and name not in (*VIEWS, *CASTS):
                bend = plain_name(steps[last])
                raise Refusal(f"the scores pass through {name} before {bend}, which is not read")
        sinks = _sinks(steps, weights, inside)
        base = product if last < 0 else steps[last]
        return Chain(base, score, tuple(factors), frozenset(scaled), sinks)


def _is_told(other: fx.Node) -> bool:
    """Return whether what scores are multiplied by shows in a trial, or is a number that can be guarded on."""
    number = isinstance(value_of(other), torch.SymFloat)
    return fixed_number(other) is not None if number else shape_of(other) is None


def _is_of_rows(step: fx.Node, by: Sequence[fx.Node], product: fx.Node) -> bool:
    """Return whether a step multiplies or divides the rows of a product, as it is laid out, by an element each."""
    shape, made = shape_of(product) or (), shape_of(step) or ()
    alike = len(shape) == len(made) and all(map(same, shape, made))
    factor = (shape_of(by[0]) or ()) if len(by) == 1 else None  # nor has a number any axis
    if factor is None or argument(step, 2, "rounding_mode") is not None:
        return False
    if "div" in plain_name(step) and step.args[0] is by[0]:
        return False
    if is_single(factor):  # wherever the axes are
        return len(factor) <= len(made)
    return alike and isinstance(factor[-1], int) and factor[-1] == 1


def is_single(shape: Sequence[Any]) -> bool:
    """Return whether a tensor of a shape is one element."""
    return all(isinstance(size, int) and size == 1 for size in shape)


def _sinks(
    steps: Sequence[fx.Node], weights: Sequence[fx.Node], inside: Collection[fx.Node]
) -> Sinks | None:
    """Return the columns that scores are joined to, and whose weights are left out again.

    Raises:
        Refusal: There are some, and it is not just that.
    """
    joins = [step for step in steps if plain_name(step) in JOINS]
    if not joins:
        return None
    own = [node for node in data_of(joins[0]) if node in inside]
    before, count = _columns_joined(joins[0], own)
    columns = (shape_of(joins[0]) or (None,))[-1]
    cut = next((node for node in weights if not same((shape_of(node) or (0,))[-1], columns)), None)
    known = len(joins) == len(own) == 1 and count > 0 and before in (0, count)
    if not known or cut is None or not leaves(cut, own[0], before):
        raise Refusal(SINKS)
    return Sinks(joins[0], count, before > 0)


def _columns_joined(join: fx.Node, own: Sequence[fx.Node]) -> tuple[int, int]:
    """Return how many columns are joined to scores in front, and in all; none where that is not known."""
    if plain_name(join) == "pad":
        sizes = argument(join, 1, "pad")
        known = len(sizes) == 2 and all(isinstance(n, int) and n >= 0 for n in sizes)
        return (sizes[0], sum(sizes)) if known else (0, 0)
    parts, dim = argument(join, 0, "tensors"), argument(join, 1, "dim", 0)
    others = [part for part in parts if part not in own]
    rank = len(shape_of(join) or ())
    if len(parts) != 2 or len(others) != 1 or dim not in (-1, rank - 1):
        return 0, 0
    count = (shape_of(others[0]) or (math.nan,))[-1]
    return (count if parts[1] in own else 0, count) if isinstance(count, int) else (0, 0)
