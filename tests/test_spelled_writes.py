"""Every spelling of a write into a buffer is served as an assignment of whole tokens is, where it is one."""

import functools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvq_compile import QuantizedKV
from kvq_compile.history import watching
from kvq_compile.lowering.sites import DENSE

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

OPTIONS = {"method": "int8", "sinks": 1, "window": 4, "page_size": 32, "inner": "eager"}
SLOTS, HEAD = 80, 32
COUNTS = (40, 1, 1, 3, 1)
Write = Callable[[Tensor, Tensor, int, Tensor], None]  # cache, positions, the first one, tokens


def by_assignment(cache, position, first, new):
    cache[:, :, position] = new


def by_slice(cache, position, first, new):
    cache[:, :, first : first + new.shape[2]] = new


def by_copy_into_a_slice(cache, position, first, new):
    cache[:, :, first : first + new.shape[2]].copy_(new)


def by_narrow(cache, position, first, new):
    cache.narrow(2, first, new.shape[2]).copy_(new)


def by_scatter(cache, position, first, new):
    cache.scatter_(2, position[None, None, :, None].expand_as(new), new)


def by_every_index(cache, position, first, new):
    rows, heads = torch.arange(cache.shape[0]), torch.arange(cache.shape[1])
    cache[rows[:, None, None], heads[:, None], position] = new


def by_index_put(cache, position, first, new):
    rows, heads = torch.arange(cache.shape[0]), torch.arange(cache.shape[1])
    cache.index_put_((rows[:, None, None], heads[:, None], position), new)


def by_one_hot(cache, position, first, new):
    places = one_hot(position, SLOTS).to(new.dtype)
    cache.mul_((1 - places.sum(0))[:, None])
    cache.add_((places[:, :, None] * new[:, :, :, None]).sum(2))


def by_select_where(cache, position, first, new):
    places = one_hot(position, SLOTS).to(new.dtype)
    spread = (places[:, :, None] * new[:, :, :, None]).sum(2)
    cache.copy_(torch.where((places.sum(0) > 0)[:, None], spread, cache))


def by_masked_scatter(cache, position, first, new):
    slots = torch.arange(SLOTS)
    inside = (slots >= first) & (slots < first + new.shape[2])
    cache.masked_scatter_(inside[:, None].expand(cache.shape), new)


def by_transposed_copy(cache, position, first, new):
    cache.transpose(1, 2)[:, first : first + new.shape[2]] = new.transpose(1, 2)


def through_a_view(cache, position, first, new):
    cache.view(-1, SLOTS, HEAD).index_copy_(1, position, new.flatten(0, 1))


WRITES = [
    *(by_slice, by_copy_into_a_slice, by_narrow, by_scatter, by_every_index, by_index_put),
    *(by_one_hot, by_select_where, by_masked_scatter, by_transposed_copy, through_a_view),
]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def attention(write: Write):
    def step(query, key, value, keys, values, position, first):
        write(keys, position, first, key)
        write(values, position, first, value)
        seen = torch.arange(SLOTS)[None] <= position[:, None]
        return sdpa(query, keys, values, attn_mask=seen)

    return step


@torch.no_grad()
def generate(write: Write) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """Return the outputs of some calls, the caches after them, and what became of each attention."""
    caches, outputs, first = [torch.zeros(2, 2, SLOTS, HEAD) for _ in range(2)], [], 0
    run = torch.compile(attention(write), backend="kvq", options=OPTIONS)
    with watching() as graphs:
        for number, count in enumerate(COUNTS):
            new = [draw(2, 2, count, HEAD, seed=7 * number + place) for place in range(3)]
            outputs.append(run(*new, *caches, torch.arange(first, first + count), first))
            first += count
    return outputs, caches, [site.outcome for graph in graphs for site in graph.sites]


by_the_usual_spelling = functools.cache(lambda: generate(by_assignment))


@pytest.mark.parametrize("write", WRITES)
def test_every_spelling_of_a_write_is_served_as_an_assignment_is(write: Write) -> None:
    expected, exact, _ = by_the_usual_spelling()
    torch._dynamo.reset()
    outputs, caches, outcomes = generate(write)
    assert set(outcomes) == {"rewritten"}
    for mine, theirs in zip(caches, exact, strict=True):
        assert isinstance(mine, QuantizedKV) and isinstance(theirs, QuantizedKV)
        assert all(torch.equal(a, b) for a, b in zip(mine.parts, theirs.parts, strict=True))
    torch.testing.assert_close(outputs, expected, rtol=0, atol=0)


def at_three(cache, position, first, new):
    cache.narrow(2, 3, new.shape[2]).copy_(new)


@pytest.mark.filterwarnings("ignore::kvq_compile.KVQWarning")
@pytest.mark.parametrize("write", [by_narrow, by_slice, by_masked_scatter, at_three])
@torch.no_grad()
def test_a_first_position_that_varies_is_no_number_that_it_was_once(write: Write) -> None:
    """Regression: a start that Dynamo kept as a symbol, and that was 0 at first, was taken to be 0 in every call."""
    run = torch.compile(attention(write), backend="kvq", options=OPTIONS, dynamic=True)
    for first, count in ((0, 5), (7, 5), (9, 3)):  # too few to be packed
        plain = [draw(2, 2, SLOTS, HEAD, seed=place) for place in range(2)]
        caches = [cache.clone() for cache in plain]
        new = [draw(2, 2, count, HEAD, seed=first + place) for place in range(3)]
        position = torch.arange(first, first + count)
        expected = attention(write)(*new, *plain, position, first)
        torch.testing.assert_close(run(*new, *caches, position, first), expected)
        for cache, tensor in zip(caches, plain, strict=True):
            held = cache.dequantize() if isinstance(cache, QuantizedKV) else cache
            shown = slice(0, first + count)  # what lies behind is forgotten
            torch.testing.assert_close(held[:, :, shown], tensor[:, :, shown], rtol=0, atol=0)


def half_a_token(cache, position, first, new):
    cache[:, :, first : first + new.shape[2], : HEAD // 2].copy_(new[..., : HEAD // 2])


def added(cache, position, first, new):
    cache.scatter_add_(2, position[None, None, :, None].expand_as(new), new)


def added_to(cache, position, first, new):
    cache[:, :, first : first + new.shape[2]] += new


def one_row(cache, position, first, new):
    cache[0].index_copy_(1, position, new[0])


def reversed_slots(cache, position, first, new):
    cache.scatter_(2, (SLOTS - 1 - position)[None, None, :, None].expand_as(new), new)


@pytest.mark.filterwarnings("ignore::kvq_compile.KVQWarning")
@pytest.mark.parametrize("write", [half_a_token, added, one_row, reversed_slots, added_to])
@torch.no_grad()
def test_a_write_of_something_else_stays_as_it_is(write: Write) -> None:
    plain = [torch.zeros(2, 2, SLOTS, HEAD) for _ in range(2)]
    caches = [cache.clone() for cache in plain]
    run = torch.compile(attention(write), backend="kvq", options=OPTIONS)
    for first, count in ((0, 40), (40, 1), (41, 3)):
        new = [draw(2, 2, count, HEAD, seed=first + place) for place in range(3)]
        position = torch.arange(first, first + count)
        expected = attention(write)(*new, *plain, position, first)
        torch.testing.assert_close(run(*new, *caches, position, first), expected, rtol=0, atol=0)
    assert [type(cache) for cache in caches] == [Tensor, Tensor]
    torch.testing.assert_close(caches, plain, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*read their caches dense")
@torch.no_grad()
def test_a_buffer_in_any_spelling_is_stored_quantized_whatever_reads_it() -> None:
    def step(query, key, value, keys, values, position):
        by_scatter(keys, position, 0, key)
        by_scatter(values, position, 0, value)
        return torch.softmax(torch.erf(query @ keys.mT), -1) @ values

    caches = [torch.zeros(2, 2, SLOTS, HEAD) for _ in range(2)]
    run = torch.compile(step, backend="kvq", options=OPTIONS)
    with watching() as graphs:
        for first, count in ((0, 40), (40, 1), (41, 3)):
            new = [draw(2, 2, count, HEAD, seed=first + place) for place in range(3)]
            position = torch.arange(first, first + count)
            held = [x.dequantize() if isinstance(x, QuantizedKV) else x.clone() for x in caches]
            expected = step(*new, *held, position)
            torch.testing.assert_close(run(*new, *caches, position), expected, rtol=0, atol=0)
    assert all(isinstance(cache, QuantizedKV) and cache.held() == 44 for cache in caches)
    assert {site.outcome for graph in graphs for site in graph.sites} == {DENSE}
