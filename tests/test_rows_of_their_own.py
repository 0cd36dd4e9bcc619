"""Sequences that are written at positions of their own (continuous batching) stay in 16 bit, and the reason says so."""

import warnings
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvq_compile import KVQWarning

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

OPTIONS = {"inner": "eager", "method": "int8", "sinks": 0, "window": 8, "page_size": 32}
B, H, D, S = 3, 2, 32, 128
TOLERANCE = 0.03  # of codes of 8 bits in elements up to 4


def by_index(cache: Tensor, new: Tensor, at: Tensor) -> None:
    cache[torch.arange(B)[:, None], :, at] = new.transpose(1, 2)


def by_scatter(cache: Tensor, new: Tensor, at: Tensor) -> None:
    cache.scatter_(2, at[:, None, :, None].expand(B, H, -1, D), new)


def by_index_put(cache: Tensor, new: Tensor, at: Tensor) -> None:
    rows, heads = torch.arange(B)[:, None, None], torch.arange(H)[None, :, None]
    cache.index_put_((rows, heads, at[:, None]), new)


def by_one_hot(cache: Tensor, new: Tensor, at: Tensor) -> None:
    cache.copy_(torch.where((torch.arange(S) == at)[:, None, :, None], new, cache))


def row_by_row(cache: Tensor, new: Tensor, at: Tensor) -> None:
    for row in range(B):
        cache[row].index_copy_(1, at[row], new[row])


def assigned_row_by_row(cache: Tensor, new: Tensor, at: Tensor) -> None:
    for row in range(B):
        cache[row, :, at[row]] = new[row]


def added(cache: Tensor, new: Tensor, at: Tensor) -> None:
    cache.scatter_add_(2, at[:, None, :, None].expand(B, H, -1, D), new)


def tokens(count: int) -> list[Tensor]:
    return [torch.randn(B, H, count, D) for _ in range(3)]


def prefill(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    at = torch.arange(k.shape[2])
    keys[:, :, at], values[:, :, at] = k, v
    return F.scaled_dot_product_attention(q, keys, values, torch.arange(S) <= at[:, None])


def decode(write: Callable[..., None], was_packed: bool) -> str:
    """Check steps of sequences of three lengths against plain ones; return what was told."""

    def step(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, at: Tensor) -> Tensor:
        write(keys, k, at)
        write(values, v, at)
        seen = (torch.arange(S) <= at[:, :, None])[:, None]
        return F.scaled_dot_product_attention(q, keys, values, seen)

    torch.manual_seed(0)
    plain, caches = ([torch.zeros(B, H, S, D) for _ in range(2)] for _ in range(2))
    new, at = tokens(60), torch.tensor([[60], [41], [20]])
    with torch.no_grad(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", KVQWarning)
        prefill(*new, *plain)
        fill = torch.compile(prefill, backend="kvq", options=OPTIONS) if was_packed else prefill
        fill(*new, *caches)
        compiled = torch.compile(step, backend="kvq", options=OPTIONS)
        for number in range(3):
            new = tokens(1)
            expected = step(*new, *plain, at + number)
            output = compiled(*new, *caches, at + number)
            torch.testing.assert_close(output, expected, atol=TOLERANCE, rtol=0)
    assert all(type(cache) is Tensor for cache in caches)
    return "; ".join(str(warning.message) for warning in told)


@pytest.mark.parametrize("was_packed", [False, True])
@pytest.mark.parametrize(
    "write", [by_index, by_scatter, by_index_put, by_one_hot, row_by_row, assigned_row_by_row]
)
def test_rows_at_positions_of_their_own_are_told_in_any_spelling(
    write: Callable[..., None], was_packed: bool
) -> None:
    assert "each row of the cache is written at positions of its own" in decode(write, was_packed)


def test_other_writes_get_reasons_of_their_own() -> None:
    assert "positions of its own" not in decode(added, False)
