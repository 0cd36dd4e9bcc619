"""Attributes that are views are read alike, whichever way Dynamo traces them."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from kvq_compile.lowering.nodes import target_name
from kvq_compile.lowering.rewrite.spell_attributes import spell_attributes

ATEN = torch.ops.aten


def traced(target: Callable[..., Any], *args: Any) -> fx.GraphModule:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output((graph.call_function(target, (x, *args)),))
    return fx.GraphModule(torch.nn.Module(), graph)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        (ATEN.mT, "mT"),
        (ATEN.mT.default, "mT"),
        (ATEN.mH, "mH"),
        (ATEN.numpy_T, "T"),
        (ATEN.matrix_H, "H"),
    ],
)
def test_the_operator_behind_an_attribute_is_the_attribute(target: Any, name: str) -> None:
    """Regression: keys that `mT` turns were read dense under PyTorch 2.14, which traces it as an operator."""
    captured, x = traced(target), torch.randn(3, 4)
    spelled = spell_attributes(captured)
    (node,) = spelled.graph.find_nodes(op="call_function", target=getattr)
    assert node.args[1] == name
    assert torch.equal(spelled(x)[0], captured(x)[0])
    assert captured.graph.find_nodes(op="call_function", target=target)  # left untouched


def test_operators_that_only_share_a_name_stay_what_they_are() -> None:
    def mT(x: torch.Tensor) -> torch.Tensor:
        return 2 * x

    for captured in (
        traced(mT),
        traced(getattr, "mT"),
        traced(ATEN.t),
        traced(ATEN.transpose, 0, 1),
    ):
        names = [target_name(node) for node in captured.graph.nodes]
        assert spell_attributes(captured) is captured
        assert [target_name(node) for node in captured.graph.nodes] == names
