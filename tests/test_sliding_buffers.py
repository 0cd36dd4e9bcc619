"""Buffers that one graph fills and then rolls, by a condition on the device, are stored packed and read as captured."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from kvq_compile import KVQWarning
from kvq_compile.kernels.cache.tensor import QuantizedKV

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

OPTIONS = {"inner": "eager", "method": "int8", "sinks": 0, "window": 8, "page_size": 32}
B, HQ, H, D, S = 2, 4, 2, 32, 96
TOLERANCE = 0.03  # of codes of 8 bits in elements up to 4; a wrong slot is off by one

Write = Callable[[Tensor, Tensor, Tensor], Any]


def by_index(cache: Tensor, new: Tensor, position: Tensor) -> None:
    order = (torch.arange(S) + (position >= S)[-1].int()) % S
    rolled = cache[:, :, order]
    rolled[:, :, position.clamp(max=S - 1)] = new
    cache.copy_(rolled)


def by_sum(cache: Tensor, new: Tensor, position: Tensor) -> None:
    order = (torch.arange(S) + (position[-1] >= S).int()) % S
    rolled = cache[:, :, order]
    rolled.index_copy_(2, position.clamp(0, S - 1), new)
    cache.zero_()
    cache += rolled


def by_where(cache: Tensor, new: Tensor, position: Tensor) -> Tensor:
    rolled = torch.where(position[-1] >= S, cache.roll(-1, 2), cache).clone()
    rolled[:, :, position.clamp(max=S - 1)] = new
    cache.copy_(rolled)
    return rolled  # and attention reads that


def by_choice(cache: Tensor, new: Tensor, position: Tensor) -> None:
    longer = torch.cat([cache[:, :, 1:], new], 2)
    written = cache.index_copy(2, position.clamp(max=S - 1), new)
    cache.copy_(torch.where(position[-1] >= S, longer, written))


def make(write: Write, masked: bool = True, read_twice: bool = False) -> Callable[..., Any]:
    def step(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, at: Tensor) -> Any:
        held = [write(cache, new, at) for cache, new in ((keys, k), (values, v))]
        read = [keys, values] if held[0] is None else held
        mask = (torch.arange(S) <= at[-1])[None, None, None] if masked else None
        output = F.scaled_dot_product_attention(q, *read, attn_mask=mask, enable_gqa=True)
        return (output, keys.sum(3)) if read_twice else output

    return step


def tokens(count: int) -> list[Tensor]:
    return [torch.randn(B, heads, count, D) for heads in (HQ, H, H)]


def buffers(held: int) -> list[Tensor]:
    return [F.pad(x, (0, 0, 0, S - held)) for x in tokens(held)[1:]]


def assert_follows(step: Any, compiled: Any, pairs: list[Any], positions: Any) -> None:
    """Run both over buffers that are alike; the outputs agree."""
    for at in positions:
        new = tokens(1)
        expected = step(*new, *(plain for plain, _ in pairs), torch.tensor([at]))
        output = compiled(*new, *(cache for _, cache in pairs), torch.tensor([at]))
        torch.testing.assert_close(output, expected, atol=TOLERANCE, rtol=0)


def run(step: Any, held: int, positions: Any) -> list[Tensor]:
    torch.manual_seed(0)
    pairs = [(plain, plain.clone()) for plain in buffers(min(held, S))]
    compiled = torch.compile(step, backend="kvq", options=OPTIONS)
    with torch.no_grad():
        assert_follows(step, compiled, pairs, positions)
    return [cache for _, cache in pairs]


@pytest.mark.long(
    but=[
        "by_index-40",
        "by_index-96",
        "by_sum-95",
        "by_sum-103",
        "by_where-96",
        "by_where-40",
        "by_choice-103",
        "by_choice-95",
    ]
)
@pytest.mark.parametrize("held", [40, S - 1, S, S + 7])
@pytest.mark.parametrize("write", [by_index, by_sum, by_where, by_choice])
def test_a_buffer_that_slides_once_it_is_full_is_read_packed(write: Write, held: int) -> None:
    """Regression: evaluated at positions within the buffer alone, it raised at the step that rolls it."""
    caches = run(make(write), held, range(held, held + 90))
    assert all(isinstance(x, QuantizedKV) and x.kind == "ring" for x in caches)


def test_it_may_be_emptied_and_filled_again() -> None:
    step = make(by_where)
    torch.manual_seed(0)
    pairs = [(plain, plain.clone()) for plain in buffers(60)]
    compiled = torch.compile(step, backend="kvq", options=OPTIONS)
    with torch.no_grad():
        assert_follows(step, compiled, pairs, range(60, 130))
        for cache in (cache for pair in pairs for cache in pair):
            cache.zero_()
        assert_follows(step, compiled, pairs, range(110))
    assert all(isinstance(cache, QuantizedKV) for _, cache in pairs)


def rolled_two_early(cache: Tensor, new: Tensor, position: Tensor) -> None:
    """What it does before it is full is what others do; it is rolled two steps too early."""
    order = (torch.arange(S) + (position >= S - 2)[-1].int()) % S
    rolled = cache[:, :, order]
    rolled[:, :, position.clamp(max=S - 1)] = new
    cache.copy_(rolled)


def rolled_by_two(cache: Tensor, new: Tensor, position: Tensor) -> None:
    order = (torch.arange(S) + 2 * (position >= S)[-1].int()) % S
    rolled = cache[:, :, order]
    rolled[:, :, position.clamp(max=S - 1)] = new
    cache.copy_(rolled)


def written_at_one_hot(cache: Tensor, new: Tensor, position: Tensor) -> None:
    """Behind the end of the buffer nothing is written."""
    cache.copy_(torch.where((torch.arange(S) == position)[:, None], new, cache))


@pytest.mark.filterwarnings("ignore::kvq_compile.KVQWarning")
@pytest.mark.parametrize("write", [rolled_two_early, rolled_by_two, written_at_one_hot])
def test_what_does_something_else_at_its_end_runs_as_captured(write: Write) -> None:
    run(make(write), 60, range(60, 110))


@pytest.mark.filterwarnings("ignore::kvq_compile.KVQWarning")
@pytest.mark.parametrize("how", [{"masked": False}, {"read_twice": True}])
def test_what_shows_more_than_its_tokens_is_read_as_captured(how: dict[str, bool]) -> None:
    """Empty slots, seen without a mask, are zeros; a second reader would see the tokens in other slots."""
    step = make(by_index, **how)
    torch.manual_seed(0)
    pairs = [(plain, plain.clone()) for plain in buffers(60)]
    compiled = torch.compile(step, backend="kvq", options=OPTIONS)
    with torch.no_grad():
        for at in range(60, 120):
            new = tokens(1)
            expected = step(*new, *(plain for plain, _ in pairs), torch.tensor([at]))
            output = compiled(*new, *(cache for _, cache in pairs), torch.tensor([at]))
            # A sum of D codes may be off by as many half steps.
            torch.testing.assert_close(output, expected, atol=D * TOLERANCE / 2, rtol=0)


def test_a_position_before_the_last_token_makes_it_an_ordinary_tensor() -> None:
    step = make(by_index)
    torch.manual_seed(0)
    pairs = [(plain, plain.clone()) for plain in buffers(60)]
    compiled = torch.compile(step, backend="kvq", options=OPTIONS)
    with torch.no_grad():
        assert_follows(step, compiled, pairs, range(60, 70))
        with pytest.warns(KVQWarning, match="behind another number of tokens than it holds"):
            assert_follows(step, compiled, pairs, (50, 51))
        assert_follows(step, compiled, pairs, range(52, 120))
    assert all(type(cache) is Tensor for _, cache in pairs)


def test_keys_and_values_of_lengths_with_names_of_their_own_are_one_cache() -> None:
    """Regression: Dynamo's two symbols for one number of tokens were taken for two numbers."""

    def step(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, first: int) -> Tensor:
        for cache, new in ((keys, k), (values, v)):
            cache.index_copy_(2, torch.arange(new.shape[2]) + first, new)
        at = torch.arange(v.shape[2])[:, None] + first
        return F.scaled_dot_product_attention(
            q, keys, values, torch.arange(S) <= at, enable_gqa=True
        )

    compiled = torch.compile(step, backend="kvq", options=OPTIONS)
    for count in (60, 61, 62):
        plain, caches = buffers(0), buffers(0)
        new = tokens(count)
        with torch.no_grad():
            expected = step(*new, *plain, 0)
            torch.testing.assert_close(compiled(*new, *caches, 0), expected)
        assert all(isinstance(cache, QuantizedKV) for cache in caches)
