"""Sizes of a graph's tensors are computed from the arguments of a call."""

from collections.abc import Callable

import pytest
import torch

from kvq_compile.lowering.nodes import value_of
from kvq_compile.lowering.sizes import SizeReader

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

SIZES: dict[str, Callable[[int], int]] = {
    "itself": lambda n: n,
    "half": lambda n: n // 2,
    "product over sum": lambda n: (n * n) // (n + 1),
    "rest": lambda n: n % 5,
    "power": lambda n: n**2 - n,
    "at least": lambda n: max(n - 3, 4),
    "at most": lambda n: min(2 * n, 17),
}


@pytest.mark.parametrize("name", SIZES)
def test_a_size_is_computed_whatever_expression_it_is(name: str) -> None:
    """Regression: an integer division was called by a name that nothing had."""
    readers, size = [], SIZES[name]

    def look(gm, inputs):
        made = next(node for node in reversed(gm.graph.nodes) if node.op == "call_function")
        reader = SizeReader(gm.graph.find_nodes(op="placeholder"))
        readers.append((reader.size(value_of(made).shape[0]), inputs))
        return gm.forward

    compiled = torch.compile(lambda x: torch.ones(size(x.shape[0])), backend=look, dynamic=True)
    compiled(torch.ones(7))
    ((read, inputs),) = readers
    for n in (7, 9, 30):
        args = [torch.ones(n) if isinstance(x, torch.Tensor) else n for x in inputs]
        assert read(args) == size(n)
