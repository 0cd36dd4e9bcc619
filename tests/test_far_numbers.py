"""What a program does from some length on shows in trials, whose sizes reach beyond the numbers that it names."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvq_compile import ArrangedKV

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

# Every token stays exact: results are those of the plain program, or the program was misunderstood.
OPTIONS = {"method": "int8", "sinks": 1, "window": 512, "page_size": 32, "inner": "eager"}
COUNTS = (30, 1, 6, 1, 7, 1, 1)  # lengths up to 47, past the 40 that the programs name
Change = Callable[[Tensor], Tensor]


def near(x: Tensor) -> Tensor:
    behind = x.shape[2] - 1 - torch.arange(x.shape[2])
    return x * (behind < 40)[:, None]


def doubled(x: Tensor) -> Tensor:
    return x * (1 + x.shape[2] // 40)


def parted(x: Tensor) -> Tensor:
    return torch.cat([x[:, :, :40], 2 * x[:, :, 40:]], 2)


def rolled(x: Tensor) -> Tensor:
    return x.roll(x.shape[2] // 40, 1)


def repeated(x: Tensor) -> Tensor:
    return x.index_select(2, torch.arange(x.shape[2]) % 40)


CHANGES = (near, doubled, parted, rolled, repeated)


def tokens(count: int, seed: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(1, 2, count, 32, generator=generator) for _ in range(3)]


def generated(step: Any) -> list[Tensor]:
    outputs, past = [], tuple(torch.zeros(1, 2, 0, 32) for _ in range(2))
    with torch.no_grad():
        for seed, count in enumerate(COUNTS):
            output, past = step(*tokens(count, seed), *past)
            outputs.append(output)
    return outputs


def assert_as_written(step: Any) -> None:
    expected = generated(step)
    found = generated(torch.compile(step, backend="kvq", options=OPTIONS))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore::kvq_compile.KVQWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_what_attention_reads_of_a_long_cache_is_as_written(change: Change) -> None:
    def step(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Any:
        keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        return sdpa(query, keys, change(values)), (keys, values)

    assert_as_written(step)


@pytest.mark.filterwarnings("ignore::kvq_compile.KVQWarning")
@pytest.mark.parametrize("change", CHANGES)
def test_what_a_long_cache_keeps_is_as_written(change: Change) -> None:
    def step(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Any:
        keys, values = torch.cat([keys, key], 2), torch.cat([change(values), value], 2)
        return sdpa(query, keys, values), (keys, values)

    assert_as_written(step)


@pytest.mark.parametrize("cut", [slice(3, None), slice(-20, None), slice(None, 1), slice(None, 25)])
def test_a_part_of_a_cache_in_another_layout_goes_on(cut: slice) -> None:
    def step(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Any:
        keys, values = (
            torch.cat([old, new.transpose(1, 2)], 1) for old, new in ((keys, key), (values, value))
        )
        return sdpa(query, keys.transpose(1, 2), values.transpose(1, 2)), (keys, values)

    compiled = torch.compile(step, backend="kvq", options=OPTIONS)
    ours = theirs = tuple(torch.zeros(1, 0, 2, 32) for _ in range(2))
    with torch.no_grad():
        for seed, count in enumerate(COUNTS):
            one, ours = compiled(*tokens(count, seed), *ours)
            other, theirs = step(*tokens(count, seed), *theirs)
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
            assert all(isinstance(cache, ArrangedKV) for cache in ours)
            ours, theirs = ([x[:, cut] for x in caches] for caches in (ours, theirs))
