"""What a model changes in place counts where the model reads it, wherever the rewritten graph does."""

import warnings

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as attend

from kvq_compile import KVQWarning, QuantizedKV
from kvq_compile.history import watching

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

B, H, D, SLOTS = 2, 2, 32, 128
# All tokens stay exact: what differs at all from the plain model is a fault.
OPTIONS = {"method": "int8", "sinks": 1, "window": 4096, "page_size": 32, "inner": "eager"}
GOES_ON = [(0, 40), *[(at, at + 1) for at in range(40, 44)]]
GOES_BACK = [*GOES_ON, (30, 34), (34, 35)]
AROUND = [(0, 40), *[(at, at + 1) for at in range(SLOTS - 2, SLOTS + 2)]]


def tokens(first, last):
    """Return query, key and value of some tokens, ``[B, H, T, D]`` each."""
    generator = torch.Generator().manual_seed(first)
    return tuple(torch.randn(B, H, last - first, D, generator=generator) for _ in range(3))


def calls(step, plan, grown):
    caches = [torch.zeros(B, H, 0 if grown else SLOTS, D) for _ in range(2)]
    results = []
    for first, last in plan:
        if grown:
            result, *caches = step(*tokens(first, last), *caches)
        else:
            result = step(*tokens(first, last), *caches, torch.arange(first, last))
        results.append(result)
    return results, caches


def assert_right(step, plan=GOES_ON, grown=False):
    """Compare with the plain model; return the caches, what became of the last attention, and what was told."""
    with torch.no_grad(), watching() as graphs, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        wanted, _ = calls(step, plan, grown)
        got, caches = calls(torch.compile(step, backend="kvq", options=OPTIONS), plan, grown)
    for mine, plain in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)
    told = [str(w.message) for w in said if issubclass(w.category, KVQWarning)]
    return caches, graphs[-1].sites[-1].detail, " ".join(told)


def are_quantized(caches):
    return {type(cache) for cache in caches} == {QuantizedKV}


def causal(position):
    return torch.arange(SLOTS) <= position[:, None]


def by_operator(position):
    made = torch.arange(position.shape[0])
    made += position[0]
    return made


def by_method(position):
    made = torch.arange(position.shape[0])
    made.add_(position[0])
    return made


def by_assignment(position):
    made = torch.zeros(position.shape[0], dtype=torch.int64)
    made[:] = position
    return made


def by_copy(position):
    made = torch.zeros_like(position)
    made.copy_(position)
    return made


def by_out(position):
    made = torch.zeros_like(position)
    torch.add(position, 0, out=made)
    return made


def through_a_view(position):
    made = torch.zeros(position.shape[0] + 1, dtype=torch.int64)
    made[1:].copy_(position)
    return made[1:]


@pytest.mark.parametrize(
    "positions", [by_operator, by_method, by_assignment, by_copy, by_out, through_a_view]
)
def test_positions_that_are_made_in_place_are_looked_at_as_they_are_written(positions):
    """Regression: they were taken as they were before that, which left the caches in 16 bit for a reason not true."""

    def step(q, k, v, keys, values, position):
        at = positions(position)
        keys[:, :, at] = k
        values[:, :, at] = v
        return attend(q, keys, values, causal(position))

    caches, detail, _ = assert_right(step)
    assert are_quantized(caches)
    assert detail.startswith("reads the quantized buffer"), detail


@pytest.mark.parametrize("added", [0, 1])
def test_positions_that_change_between_keys_and_values_are_those_of_neither(added):
    """Regression: values were written where keys are."""

    def step(q, k, v, keys, values, position):
        at = position.clone()
        keys[:, :, at] = k
        at.add_(added)
        values[:, :, at] = v
        return attend(q, keys, values, causal(position))

    assert_right(step)


def test_positions_that_change_behind_both_writes_are_served():
    def step(q, k, v, keys, values, position):
        at = position.clone()
        keys[:, :, at] = k
        values[:, :, at] = v
        at.add_(1)
        return attend(q, keys, values, causal(at - 1))

    caches, _, _ = assert_right(step)
    assert are_quantized(caches)


def shown_by_assignment(position):
    mask = torch.zeros(position.shape[0], SLOTS, dtype=torch.bool)
    mask[causal(position)] = True
    return mask


def hidden_by_method(position):
    mask = torch.zeros(position.shape[0], SLOTS)
    mask.masked_fill_(~causal(position), float("-inf"))
    return mask


@pytest.mark.parametrize("mask", [shown_by_assignment, hidden_by_method])
def test_a_mask_that_is_made_in_place_is_looked_at_as_attention_sees_it(mask):
    def step(q, k, v, keys, values, position):
        keys[:, :, position] = k
        values[:, :, position] = v
        return attend(q, keys, values, mask(position))

    caches, _, _ = assert_right(step, GOES_BACK)
    assert are_quantized(caches)


def test_a_mask_that_shows_empty_positions_by_assignment_leaves_quantization():
    """Regression: it was looked at without what is assigned, and attention raised or read other positions."""

    def step(q, k, v, keys, values, position):
        keys[:, :, position] = k
        values[:, :, position] = v
        mask = causal(position).repeat(1, 1)
        mask[:, SLOTS - 1] = True
        return attend(q, keys, values, mask)

    caches, _, told = assert_right(step)
    assert not are_quantized(caches)
    assert "behind the new tokens" in told


def test_a_ring_whose_mask_is_made_in_place_leaves_quantization():
    def step(q, k, v, keys, values, position):
        keys[:, :, position % SLOTS] = k
        values[:, :, position % SLOTS] = v
        return attend(q, keys, values, shown_by_assignment(position))

    caches, _, told = assert_right(step, AROUND)
    assert not are_quantized(caches)
    assert told


def query_after_the_scores(q, keys, values):
    query = q * 1.0
    scores = query @ keys.mT * 0.2
    query.zero_()
    return scores.softmax(-1) @ values + query.sum()


def mask_after_the_scores(q, keys, values):
    mask = torch.zeros(keys.shape[2])
    scores = q @ keys.mT * 0.2 + mask
    mask[:20] = -1e9
    return scores.softmax(-1) @ values + 0 * mask.sum()


def repeated_keys(q, keys, values):
    wide = keys.repeat_interleave(2, 1)
    wide.mul_(3)
    return attend(q.repeat_interleave(2, 1), wide, values.repeat_interleave(2, 1))


@pytest.mark.parametrize(
    "attention", [query_after_the_scores, mask_after_the_scores, repeated_keys]
)
def test_what_attention_reads_and_is_changed_before_its_result_is_read_dense(attention):
    """Regression: one operator read it behind the change, and the answer was another."""

    def step(q, k, v, keys, values):
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        return attention(q, keys, values), keys, values

    caches, detail, _ = assert_right(step, grown=True)
    assert are_quantized(caches)
    assert "changed in place" in detail


def query_before_the_scores(q, keys, values):
    query = torch.empty_like(q)
    query[..., :16], query[..., 16:] = q[..., :16] * 2, q[..., 16:]
    return attend(query, keys, values)


def mask_before_the_scores(q, keys, values):
    mask = torch.zeros(q.shape[2], keys.shape[2])
    mask[:, 7] = float("-inf")
    return attend(q, keys, values, mask)


def scores_by_operators(q, keys, values):
    scores = q @ keys.mT
    scores *= 0.2
    scores += torch.arange(keys.shape[2]) * 0.01
    return scores.softmax(-1) @ values


def counter_of_a_bias(q, keys, values):
    count = torch.zeros(())
    bias = (torch.arange(keys.shape[2]) + count) * 0.01
    scores = (q @ keys.mT * 0.2).masked_fill(torch.arange(keys.shape[2]) == 3, float("-inf"))
    scores = scores + bias
    count.add_(1)
    return scores.softmax(-1) @ values + 0 * count


def output_behind(q, keys, values):
    output = attend(q, keys, values)
    output.mul_(2)
    return output


@pytest.mark.parametrize(
    "attention",
    [
        query_before_the_scores,
        mask_before_the_scores,
        scores_by_operators,
        counter_of_a_bias,
        output_behind,
    ],
)
def test_what_is_changed_before_or_behind_all_of_an_attention_is_read_packed(attention):
    def step(q, k, v, keys, values):
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        return attention(q, keys, values), keys, values

    caches, detail, _ = assert_right(step, grown=True)
    assert are_quantized(caches)
    assert detail.startswith("reads the quantized cache"), detail


@pytest.mark.parametrize("behind", [True, False])
@pytest.mark.parametrize(
    "change",
    [
        lambda keys: keys.mul_(0.9),
        lambda keys: keys[:, :, -1:].mul_(2),
        lambda keys: torch.mul(keys, 0.9, out=keys),
    ],
)
def test_grown_tokens_that_change_in_place_leave_quantization(change, behind):
    """Regression: the cache took the new tokens, and the change was lost."""

    def step(q, k, v, keys, values):
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        if not behind:
            change(keys)
        result = attend(q, keys, values)
        if behind:
            change(keys)
        return result, keys, values

    caches, _, told = assert_right(step, GOES_ON[:3], grown=True)
    assert type(caches[0]) is torch.Tensor
    assert "changed in place" in told


def test_values_that_are_made_of_the_written_keys_see_these():
    """Regression: they were computed from the keys before the write."""

    def step(q, k, v, keys, values, position):
        keys[:, :, position] = k
        values[:, :, position] = keys[:, :, position] * 2
        return attend(q, keys, values, causal(position))

    caches, detail, _ = assert_right(step)
    assert are_quantized(caches)
    assert "something else reads dense" in detail


def test_a_list_of_buffers_that_is_changed_in_place_leaves_quantization():
    """Regression: the write was overlooked, and its operator raised in the middle of a generation."""

    def step(q, k, v, keys, values, position):
        keys[:, :, position] = k
        values[:, :, position] = v
        torch._foreach_mul_([keys, values], 0.99)
        return attend(q, keys, values, causal(position))

    caches, _, told = assert_right(step)
    assert not are_quantized(caches)
    assert told
