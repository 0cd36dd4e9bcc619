"""Sizes that are equal by chance become numbers where they are of a cache, and nothing else does."""

import pytest
import torch

from kvq_compile.lowering.find.settled import settle_sizes
from kvq_compile.lowering.nodes import shape_of

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def sizes_after_settling(*tensors: torch.Tensor) -> list[list[bool]]:
    """Return which sizes of a written tensor and of one that is only read are numbers."""
    found: list[list[bool]] = []

    def look(gm, inputs):
        settle_sizes(gm.graph)
        for node in gm.graph.find_nodes(op="placeholder"):
            shape = shape_of(node) or ()
            if len(shape) == 4:
                found.append([isinstance(size, int) for size in shape])
        return gm.forward

    def step(cache, mask):
        cache[:, :, :1] = 1.0
        return cache.sum() + mask.sum()

    torch.compile(step, backend=look, dynamic=True)(*tensors)
    return found


def test_sizes_of_a_cache_that_are_one_symbol_become_numbers_and_those_of_a_mask_do_not() -> None:
    cache, mask = sizes_after_settling(torch.zeros(3, 3, 40, 8), torch.zeros(5, 1, 7, 7))
    assert cache[:2] == [True, True]
    assert not cache[2]
    assert mask == [False, True, False, False]


def test_sizes_of_a_cache_that_differ_stay_symbols() -> None:
    cache, _ = sizes_after_settling(torch.zeros(3, 2, 40, 8), torch.zeros(5, 1, 7, 7))
    assert not any(cache)
