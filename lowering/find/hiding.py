"""Read the steps that hide scores: what they take, and what they set."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from kvq_compile.kernels.layout import HIDES
from kvq_compile.lowering.find.evaluation import Steps
from kvq_compile.lowering.find.trial import CANNOT_BE_RUN, plain_name
from kvq_compile.lowering.nodes import argument, fixed_number, value_of

HIDING = ("masked_fill", "masked_fill_", "where")


def is_constant(node: fx.Node) -> bool:
    """Return whether a value is the same in every call: made of numbers and constants of the model alone.

    Guards on a number that Dynamo keeps symbolic.
    """
    if isinstance(value_of(node), torch.SymFloat):
        return fixed_number(node) is not None
    if node.op == "placeholder" or isinstance(value_of(node), torch.SymInt):
        return False
    return all(is_constant(other) for other in node.all_input_nodes)


def is_number(fill: Any) -> bool:
    """Return whether a fill is the same in every call."""
    return isinstance(fill, (int, float)) or is_constant(fill)


def hiding(node: fx.Node) -> list[Any]:
    """Return the mask of a step that hides scores, and the other two arguments: scores and fill, in some order."""
    names = ("condition", "input", "other")
    if plain_name(node) == "where":
        return [argument(node, place, name) for place, name in enumerate(names)]
    return [
        argument(node, place, name) for place, name in ((1, "mask"), (0, "input"), (2, "value"))
    ]


def hides(fill: Any) -> bool:
    """Return whether a score that is set to ``fill`` has weight 0 in every call."""
    number = fixed_number(fill)
    if number is not None or not isinstance(fill, fx.Node):
        return number is not None and number <= HIDES
    made = Steps(fill, (), ())
    if not is_constant(fill) or not made.collect():
        return False
    try:
        return bool((made.run({}, {}) <= HIDES).all())
    except CANNOT_BE_RUN:
        return False
