"""Attention over the first tokens of a buffer, without a mask: whether these are all that it holds is looked at."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvq_compile import KVQWarning, QuantizedKV
from kvq_compile.history import watching

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

OPTIONS = {"method": "int8", "sinks": 1, "window": 4, "page_size": 32, "inner": "eager"}
# Outputs are averages of values that are off by half a step of 8 bits of their range of about 8.
TOLERANCE = 0.05
MATCH = "reads other cache positions than those up to the new tokens"


def copied(query, key, value, keys, values, position, end):
    keys.index_copy_(2, position, key)
    values.index_copy_(2, position, value)
    return sdpa(query, keys[:, :, :end], values[:, :, :end])


def written_out(query, key, value, keys, values, position, end):
    keys[:, :, position] = key
    values[:, :, position] = value
    scores = query @ keys[:, :, :end].mT * 0.25
    return scores.softmax(-1) @ values[:, :, :end]


def sliced(query, key, value, keys, values, first, end):
    keys[:, :, first : first + key.shape[2]] = key
    values[:, :, first : first + key.shape[2]] = value
    return sdpa(query, keys[:, :, :end], values[:, :, :end])


def narrowed(query, key, value, keys, values, first, end):
    keys.narrow(2, first, key.shape[2]).copy_(key)
    values.narrow(2, first, key.shape[2]).copy_(value)
    return sdpa(query, keys.narrow(2, 0, end), values.narrow(2, 0, end))


NUMBERS = (sliced, narrowed)


def run(step, plan) -> list[torch.Tensor]:
    """Feed a step with writes of so many tokens and reads up to so many; hold it to the same step uncompiled.

    A step of ``NUMBERS`` takes the first cache position as a number. A third number says where it is not the next.
    """
    compiled = torch.compile(step, backend="kvq", options=OPTIONS)
    torch.manual_seed(0)
    plain, packed = ([torch.zeros(2, 2, 64, 16) for _ in range(2)] for _ in range(2))
    first = 0
    for count, end, *other in plan:
        first = other[0] if other else first
        own = [torch.randn(2, 2, count, 16) for _ in range(3)]
        position = first if step in NUMBERS else torch.arange(first, first + count)
        with torch.no_grad():
            expected = step(*own, *plain, position, end)
            output = compiled(*own, *packed, position, end)
        torch.testing.assert_close(output, expected, rtol=0, atol=TOLERANCE)
        first += count
    return packed


@pytest.mark.parametrize("step", [copied, written_out, *NUMBERS])
def test_reads_up_to_a_number_that_is_where_tokens_end_are_packed(step) -> None:
    with watching() as graphs:
        packed = run(step, [(40, 40), (1, 41), (1, 42), (3, 45)])
    assert all(isinstance(cache, QuantizedKV) for cache in packed)
    assert packed[0].held() == 45
    assert {site.outcome for graph in graphs for site in graph.sites} == {"rewritten"}


@pytest.mark.parametrize("step", [copied, *NUMBERS])
@pytest.mark.parametrize("end", [44, 41])
def test_reads_up_to_another_number_thaw_the_cache_before_anything_is_read(step, end: int) -> None:
    """Regression: where the first cache position is a number, where attention stops reading was not looked at."""
    with pytest.warns(KVQWarning, match=MATCH):
        packed = run(step, [(40, 40), (1, 41), (1, end), (1, 43)])
    assert not any(isinstance(cache, QuantizedKV) for cache in packed)


@pytest.mark.parametrize("step", [copied, *NUMBERS])
def test_a_buffer_written_again_from_its_start_and_read_whole_thaws(step) -> None:
    """Regression: a ring whose slots are taken in turn was read as the tokens since it began anew, without a word."""
    with pytest.warns(KVQWarning, match=MATCH):
        packed = run(step, [(40, 40), (22, 62), (2, 64), (1, 64, 0), (1, 64, 1), (2, 64, 2)])
    assert not any(isinstance(cache, QuantizedKV) for cache in packed)
