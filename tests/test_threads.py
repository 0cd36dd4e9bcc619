"""Threads share what was compiled, and the caches that they go on from."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

OPTIONS = {"inner": "eager", "method": "int8", "sinks": 0, "window": 8, "page_size": 32}
B, H, D, THREADS = 2, 2, 32, 6
TOLERANCE = 0.02  # of codes of 8 bits in normal elements


def step(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
    keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
    return F.scaled_dot_product_attention(q, keys, values), keys, values


def tokens(count: int, generator: torch.Generator) -> list[Tensor]:
    return [torch.randn(B, H, count, D, generator=generator) for _ in range(3)]


def largest_error(compiled: Callable[..., Any], seed: int, exact: Any, caches: Any) -> float:
    """Decode from a prefix; return by how much an output is off."""
    generator, worst = torch.Generator().manual_seed(seed), 0.0
    with torch.no_grad():
        for _ in range(12):
            new = tokens(1, generator)
            expected, *exact = step(*new, *exact)
            output, *caches = compiled(*new, *caches)
            worst = max(worst, float((output - expected).abs().max()))
    return worst


@pytest.mark.parametrize("append", ["compiled", "eager"])
def test_threads_go_on_from_one_prefix(append: str) -> None:
    """Regression: two threads found the prefix to be the longest view, and wrote the same slots."""
    compiled = torch.compile(step, backend="kvq", options=OPTIONS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        _, *caches = compiled(*tokens(90, generator), *(torch.zeros(B, H, 0, D) for _ in range(2)))
        compiled(*tokens(1, generator), *caches)
    exact = [cache.dequantize() for cache in caches]
    go_on = compiled if append == "compiled" else step
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(4):
            about = [(go_on, seed, exact, caches) for seed in range(THREADS)]
            errors = list(pool.map(lambda given: largest_error(*given), about))
            assert max(errors) < TOLERANCE


def test_caches_of_one_call_have_one_lock() -> None:
    """Which the next call takes once; a cache that joins another call brings its own."""
    first, second = (torch.compile(step, backend="kvq", options=OPTIONS) for _ in range(2))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        empty = [torch.zeros(B, H, 0, D) for _ in range(2)]
        _, *caches = first(*tokens(90, generator), *empty)
        _, *others = second(*tokens(90, generator), *empty)
        assert len({cache._lineage.lock for cache in (*caches, *others)}) == 4
        _, *caches = first(*tokens(1, generator), *caches)
        _, *others = second(*tokens(1, generator), *others)
        assert len({cache._lineage.lock for cache in caches}) == 1
        assert len({cache._lineage.lock for cache in (*caches, *others)}) == 2
        first(*tokens(1, generator), caches[0], others[1])
    assert len({caches[0]._lineage.lock, others[1]._lineage.lock}) == 1
