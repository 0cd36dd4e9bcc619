"""A size that is settled later in a graph is a number to all who ask where cache positions come from."""

from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch.nn.functional import embedding
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvq_compile import QuantizedKV
from kvq_compile.lowering.nodes import target_name
from kvq_compile.lowering.rewrite.spell_sizes import spell_sizes

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

TOKENS, HEADS, DIM = 14, 2, 16
OPTIONS = {"method": "int8", "sinks": 1, "window": 4, "page_size": 32, "inner": "eager"}


def attended(ids: Tensor, table: Tensor, keys: Tensor, values: Tensor, length: Tensor) -> Tensor:
    """Write and read a static cache; how many tokens there are is read from what was computed of them."""
    hidden = embedding(ids, table)
    heads = hidden.view(1, hidden.shape[1], -1, DIM).transpose(1, 2)
    positions = torch.arange(heads.shape[2]) + length
    keys.index_copy_(2, positions, heads)
    values.index_copy_(2, positions, heads)
    seen = torch.arange(keys.shape[2]) <= positions[:, None]
    return sdpa(heads, keys, values, seen)


def settled(ids: Tensor, *args: Tensor) -> Tensor:
    return attended(ids, *args) + torch.zeros(TOKENS, 1)


def arguments() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(32, HEADS * DIM, generator=generator)
    caches = [torch.zeros(1, HEADS, 96, DIM) for _ in range(2)]
    return [torch.arange(TOKENS)[None], table, *caches, torch.tensor([0])]


def sizes_read(gm: fx.GraphModule) -> int:
    return sum(target_name(node) == "size" for node in gm.graph.nodes)


@pytest.mark.parametrize("function", [settled, attended])
def test_sizes_that_are_settled_are_numbers(function: Any) -> None:
    """And those that are not stay what they are, with the graph that has them."""
    graphs: list[tuple[fx.GraphModule, fx.GraphModule]] = []

    def keep(gm: fx.GraphModule, _example: Any) -> Any:
        graphs.append((gm, spell_sizes(gm)))
        return graphs[-1][1]

    out = torch.compile(function, backend=keep, dynamic=True)(*arguments())
    torch.testing.assert_close(out, function(*arguments()), rtol=0, atol=0)
    captured, spelled = graphs[-1]
    assert (spelled is captured) == (function is attended)
    if function is settled:
        assert sizes_read(captured) > sizes_read(spelled) == 0


@pytest.mark.parametrize("function", [settled, attended])
def test_a_cache_written_at_positions_of_such_a_size_is_quantized(function: Any) -> None:
    """Regression: the cache stayed in 16 bit, told, since its positions seemed to depend on an embedding."""
    args = arguments()
    compiled = torch.compile(
        function, backend="kvq", dynamic=True, options={**OPTIONS, "strict": True}
    )
    with torch.no_grad():
        out = compiled(*args)
    torch.testing.assert_close(out, function(*arguments()), rtol=0, atol=2e-2)
    assert all(isinstance(cache, QuantizedKV) for cache in args[2:4])
