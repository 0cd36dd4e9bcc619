"""A refusal tells the true reason: in `explain`'s reports, in the warning, and in the error of ``strict``."""

import re
import warnings

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.functional import scaled_dot_product_attention as attend
from torch.utils.checkpoint import checkpoint

from kvq_compile import KVQError, KVQWarning, QuantizedKV
from kvq_compile.advice import advice
from kvq_compile.history import watching
from kvq_compile.lowering.sites import DENSE

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

B, H, D, SLOTS = 2, 2, 32, 128
OPTIONS = {"method": "int8", "sinks": 1, "window": 4096, "page_size": 32, "inner": "eager"}
GOES_ON = [(0, 40), (40, 41), (41, 42)]
GOES_BACK = [*GOES_ON, (30, 34)]


def tokens(first, last):
    """Return query, key and value of some tokens, ``[B, H, T, D]`` each."""
    generator = torch.Generator().manual_seed(first)
    return tuple(torch.randn(B, H, last - first, D, generator=generator) for _ in range(3))


def causal(position):
    return torch.arange(SLOTS) <= position[:, None]


def calls(step, plan):
    caches = [torch.zeros(B, H, SLOTS, D) for _ in range(2)]
    results = []
    for first, last in plan:
        result = step(*tokens(first, last), *caches, torch.arange(first, last))
        result, *caches = result if isinstance(result, tuple) else (result, *caches)
        results.append(result)
    return results, caches


def run(step, plan=GOES_ON):
    """Compare with the plain model; return whether the caches are quantized, the reasons of the reports, and what was
    told."""
    with torch.no_grad(), watching() as graphs, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        wanted, _ = calls(step, plan)
        got, caches = calls(torch.compile(step, backend="kvq", options=OPTIONS), plan)
    for mine, plain in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)
    told = " ".join(str(w.message) for w in said if issubclass(w.category, KVQWarning))
    reasons = {site.detail for graph in graphs for site in graph.sites}
    reasons |= {state.detail for graph in graphs for state in graph.states}
    return isinstance(caches[0], QuantizedKV), reasons, told


def assert_refused(step, reason, plan=GOES_ON):
    quantized, reasons, told = run(step, plan)
    assert not quantized
    assert any(reason in each for each in reasons), reasons
    assert reason in told
    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises((BackendCompilerFailed, KVQError), match=re.escape(reason)):
        calls(torch.compile(step, backend="kvq", options={**OPTIONS, "strict": True}), plan)


def assert_served(step, plan=GOES_ON):
    quantized, reasons, told = run(step, plan)
    assert quantized
    assert not told
    assert any("reads the quantized buffer" in each for each in reasons)


# Operators that write otherwise


def by_index(cache, position, new):
    return cache.index_add_(2, position, new)


def by_scatter(cache, position, new):
    return cache.scatter_add_(2, position[None, None, :, None].expand_as(new), new)


def by_folded_heads(cache, position, new):
    cache.view(B * H, SLOTS, D).index_add_(1, position, new.reshape(B * H, -1, D))
    return cache


def by_accumulation(cache, position, new):
    rows, heads = torch.arange(B)[:, None, None], torch.arange(H)[:, None]
    return cache.index_put_((rows, heads, position), new, accumulate=True)


@pytest.mark.parametrize(
    ("add", "name"),
    [
        (by_index, "index_add_"),
        (by_scatter, "scatter_add_"),
        (by_folded_heads, "index_add_"),
        (by_accumulation, "index_put_"),
    ],
)
@pytest.mark.parametrize("chained", [True, False])
def test_a_cache_that_is_added_to_is_refused_for_that(add, name, chained):
    """Regression: it was told that the call does not write the cache."""

    def step(q, k, v, keys, values, position):
        written = add(keys, position, k), add(values, position, v)
        return attend(q, *(written if chained else (keys, values)), causal(position))

    assert_refused(step, f"{name} adds to what the cache holds")
    assert "cache.index_copy_" in advice(f"{name} adds to what the cache holds, ...")


def test_a_copy_of_a_cache_that_is_added_to_is_refused_for_that():
    def step(q, k, v, keys, values, position):
        keys, values = keys.index_add(2, position, k), values.index_add(2, position, v).clone()
        return attend(q, keys, values, causal(position)), keys, values

    assert_refused(step, "index_add adds to what the cache holds")


def test_a_new_cache_that_is_added_to_is_refused_for_that():
    """Regression: the tokens were called the cache."""

    def step(q, k, v, keys, values, position):
        keys = torch.zeros_like(keys).index_add_(2, position, k)
        values = torch.zeros_like(values).index_add_(2, position, v)
        return attend(q, keys, values, causal(position)), keys, values

    assert_refused(step, "index_add_ adds to what the cache holds")


def test_another_operator_that_writes_a_cache_is_named():
    """Regression: it was told that the call does not write the cache."""

    def step(q, k, v, keys, values, position):
        column = torch.arange(SLOTS)[:, None]
        written = (column >= position[0]) & (column <= position[-1])
        keys.masked_scatter_(written.expand_as(keys), k)
        values.masked_scatter_(written.expand_as(values), v)
        return attend(q, keys, values, causal(position))

    _, reasons, told = run(step, [(0, 40)])
    reason = "masked_scatter_ writes L['keys'] in a way that is not understood"
    assert any(reason in each for each in reasons)
    assert reason in told
    assert "mask over" not in advice(reason) and "boolean" not in advice(reason)


def test_an_operator_that_changes_written_tokens_is_named():
    """Regression: it was told to read the cache."""

    def step(q, k, v, keys, values, position):
        keys[:, :, position] = k
        values[:, :, position] = v
        keys.mul_(1.5)
        return attend(q, keys, values, causal(position))

    _, reasons, told = run(step, GOES_ON[:1])
    assert any("mul_ writes L['keys']" in each for each in reasons)
    assert "mul_ writes L['keys']" in told


# Masks


def written(mask):
    def step(q, k, v, keys, values, position):
        keys[:, :, position] = k
        values[:, :, position] = v
        return attend(q, keys, values, mask(position))

    return step


def additive(position):
    return torch.zeros(SLOTS).masked_fill(~causal(position + 3), float("-inf"))


@pytest.mark.parametrize("mask", [lambda position: causal(position + 3), additive])
def test_a_mask_that_shows_empty_positions_is_refused_for_that(mask):
    """Regression: positions that no call had written were called overwritten."""
    assert_refused(written(mask), "the mask shows cache positions behind the new tokens")


def test_a_mask_that_shows_what_lies_behind_overwritten_tokens_is_refused_for_that():
    def shows_all_once_it_goes_back(position):
        return causal(torch.where(position < 36, position.clamp(min=39), position))

    quantized, _, told = run(written(shows_all_once_it_goes_back), GOES_BACK)
    assert not quantized
    assert "overwritten that attention goes on to read" in told
    assert "hold no token" not in told


def test_a_mask_that_goes_back_and_shows_empty_positions_alone_is_refused_for_that():
    def shows_the_last_once_it_goes_back(position):
        first = torch.arange(SLOTS) == SLOTS - 1
        return causal(position) | (first & (position[:, None] >= 30) & (position[:, None] < 34))

    step = written(
        lambda position: (
            causal(position)
            if position.shape[0] > 4
            else shows_the_last_once_it_goes_back(position)
        )
    )
    quantized, _, told = run(step, GOES_BACK)
    assert not quantized
    assert "the mask shows cache positions behind the new tokens" in told
    assert "overwritten" not in told


def test_rows_of_which_a_mask_shows_empty_positions_are_refused_for_that():
    """Regression: it was told that other rows go on there."""

    def step(q, k, v, keys, values, position):
        at = position + torch.arange(B)[:, None]
        keys[torch.arange(B)[:, None], :, at] = k.transpose(1, 2)
        values[torch.arange(B)[:, None], :, at] = v.transpose(1, 2)
        return attend(q, keys, values, torch.arange(SLOTS) <= at[:, None, :, None] + 5)

    quantized, _, told = run(step, [(0, 40)])
    assert not quantized
    assert "the mask shows cache positions behind the new tokens" in told


# Positions


def spelled(key_positions, value_positions=lambda position: position):
    """Return a step that puts keys by ``index_put_`` and values by ``index_copy_``."""

    def step(q, k, v, keys, values, position):
        rows, heads = torch.arange(B)[:, None, None], torch.arange(H)[None, :, None]
        position = position.clone()
        keys.index_put_((rows, heads, key_positions(position)), k)
        values.index_copy_(2, value_positions(position), v)
        return attend(q, keys, values, causal(position))

    return step


@pytest.mark.parametrize(
    "spelling",
    [
        lambda position: position[None, None],
        lambda position: position.expand(1, 1, -1),
        lambda position: position[None][0][None, None],
        lambda position: position.int().long()[None, None],
        lambda position: position[: position.shape[0]].view(1, 1, -1),
    ],
)
def test_positions_in_any_shape_are_the_same(spelling):
    """Regression: an axis that a subscript adds made other positions of them."""
    assert_served(spelled(spelling))


@pytest.mark.parametrize(
    "changed",
    [
        lambda position: position.add_(1),
        lambda position: position.flip(0),
        lambda position: position[torch.arange(position.shape[0] - 1, -1, -1)],
        lambda position: position + 1 - 1,
    ],
)
def test_positions_that_are_not_shown_to_be_the_same_are_refused_for_that(changed):
    _, reasons, told = run(spelled(lambda position: position[None, None], changed), GOES_ON[:1])
    assert "or at such as are not understood to be the same" in told
    assert any("written at different cache positions" in each for each in reasons)


@pytest.mark.parametrize(
    "again",
    [
        lambda position: position + 0,
        lambda position: position.to(torch.int32),
        lambda position: position.int().reshape(-1),
        lambda position: (position + 0).view(-1),
    ],
)
def test_positions_of_the_same_steps_are_others_once_what_they_are_made_of_changes(again):
    """Regression: values were written where keys were, though the model had gone on by then."""

    def step(q, k, v, keys, values, position):
        own = position.clone()
        at = again(own)
        own.add_(1)
        behind = again(own)
        keys[:, :, at] = k
        values[:, :, behind] = v
        return attend(q, keys, values, causal(position))

    _, reasons, told = run(step, GOES_ON[:1])
    assert "or at such as are not understood to be the same" in told
    assert any("written at different cache positions" in each for each in reasons)


# Bodies of higher-order operators


def plain_attention(q, keys, values):
    return attend(q, keys, values)


def by_matmul(q, keys, values):
    return (q @ keys.mT * 0.2).softmax(-1) @ values


def checkpointed(attention):
    return lambda *given: checkpoint(attention, *given, use_reentrant=False)


def in_a_branch(q, keys, values):
    return torch.cond(
        q.sum() > 0, plain_attention, lambda q, k, v: by_matmul(q, k, v), (q, keys, values)
    )


def mapped(q, keys, values):
    return torch._higher_order_ops.map(plain_attention, q, keys, values)


BODIES = [
    (checkpointed(plain_attention), "torch.utils.checkpoint"),
    (checkpointed(by_matmul), "torch.utils.checkpoint"),
    (checkpointed(checkpointed(plain_attention)), "torch.utils.checkpoint"),
    (in_a_branch, "torch.cond"),
    (mapped, "map"),
]


def grow(q, k, v, keys, values, body):
    keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
    return body(q, keys, values), keys, values


def lengthen(step, plan=GOES_ON):
    caches, results = [torch.zeros(B, H, 0, D) for _ in range(2)], []
    for first, last in plan:
        result, *caches = step(*tokens(first, last), *caches)
        results.append(result)
    return results, caches


def assert_grown(step):
    """Compare with the plain model; return the caches, what became of the attentions, and what was told."""
    with torch.no_grad(), watching() as graphs, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        wanted, _ = lengthen(step)
        got, caches = lengthen(torch.compile(step, backend="kvq", options=OPTIONS))
    for mine, plain in zip(got, wanted, strict=True):
        torch.testing.assert_close(mine, plain, rtol=1e-4, atol=1e-5)
    told = " ".join(str(w.message) for w in said if issubclass(w.category, KVQWarning))
    return caches, [site for graph in graphs for site in graph.sites], told


@pytest.mark.parametrize(("body", "name"), BODIES)
def test_an_attention_in_a_body_is_refused_for_that(body, name):
    """Regression: a graph break was suspected where there was none, and no attention was reported."""
    caches, sites, told = assert_grown(lambda *given: grow(*given, body))
    reason = f"in the body of a higher-order operator, which is not looked into: {name}"
    assert type(caches[0]) is torch.Tensor
    assert sites and all(site.detail.endswith(reason) for site in sites)
    assert reason in told
    assert "graph break" not in told
    torch._dynamo.reset()
    strict = torch.compile(
        lambda *given: grow(*given, body), backend="kvq", options={**OPTIONS, "strict": True}
    )
    with torch.no_grad(), pytest.raises(BackendCompilerFailed, match=name):
        lengthen(strict)


def test_a_cache_that_grows_in_a_body_is_refused_for_that():
    def step(q, k, v, keys, values):
        return checkpoint(grow, q, k, v, keys, values, plain_attention, use_reentrant=False)

    _, sites, told = assert_grown(step)
    assert sites and all("torch.utils.checkpoint" in site.detail for site in sites)
    assert "graph break" not in told


@pytest.mark.parametrize("layout", ["BHSD", "BSHD"])
def test_a_quantized_cache_that_a_body_attends_to_is_told_to_be_read_dense(layout):
    def step(q, k, v, keys, values):
        if layout == "BSHD":
            keys = torch.cat([keys.transpose(1, 2), k.transpose(1, 2)], 1).transpose(1, 2)
            values = torch.cat([values.transpose(1, 2), v.transpose(1, 2)], 1).transpose(1, 2)
        else:
            keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        attention = attend if q.shape[2] > 1 else checkpointed(plain_attention)
        return attention(q, keys, values), keys, values

    caches, sites, told = assert_grown(step)
    assert isinstance(caches[0], QuantizedKV)
    assert sites[-1].outcome == DENSE
    assert "torch.utils.checkpoint" in sites[-1].detail
    assert "read their caches dense" in told


def test_a_body_that_keeps_nothing_is_left_without_a_word():
    def step(q, k, v, keys, values):
        keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
        encoded = checkpointed(plain_attention)(q * 2, q, q)
        return attend(q, keys, values) + encoded, keys, values

    caches, _, told = assert_grown(step)
    assert isinstance(caches[0], QuantizedKV)
    assert not told


def test_a_body_without_an_attention_leaves_caches_quantized():
    def step(q, k, v, keys, values):
        feed = checkpointed(lambda x: torch.nn.functional.gelu(x).softmax(-1) * 2)
        return grow(q, k, v, keys, values, lambda *given: feed(attend(*given)))

    caches, sites, told = assert_grown(step)
    assert isinstance(caches[0], QuantizedKV)
    assert sites[-1].detail.startswith("reads the quantized cache")
    assert not told


@pytest.mark.parametrize("late", [False, True])
def test_a_body_that_writes_a_static_cache_leaves_quantization(late):
    """Regression: it wrote into a dense copy of a quantized cache, and the tokens were lost; nothing was told."""

    def write(q, k, v, keys, values, position):
        keys[:, :, position] = k
        values[:, :, position] = v
        return attend(q, keys, values, causal(position))

    def step(*given):
        return write(*given) if late and given[0].shape[2] > 1 else checkpointed(write)(*given)

    quantized, reasons, told = run(step)
    assert not quantized
    reason = (
        "in the body of a higher-order operator, which is not looked into: torch.utils.checkpoint"
    )
    assert any(each.endswith(reason) for each in reasons)
    assert reason in told


def test_a_body_that_writes_and_attends_to_nothing_is_told_to_write():
    def step(q, k, v, keys, values, position):
        keys[:, :, position], values[:, :, position] = k, v

        def double(keys, position):
            keys[:, :, position] = keys[:, :, position] * 2
            return position.sum()

        count = checkpoint(double, keys, position, use_reentrant=False)
        return attend(q, keys, values, causal(position)) + count * 0

    _, _, told = run(step)
    assert "the body of tag_activation_checkpoint writes it" in told
    assert "in the body of" not in told


def test_values_that_a_branch_changes_are_told_though_keys_stay_quantized():
    """Regression: values went back to 16 bit without a word, since both were taken for updates of the keys."""

    def write(keys, values, k, v, position):
        return keys.index_copy(2, position, k), values.index_copy(2, position, v)

    def write_other_values(keys, values, k, v, position):
        return keys.index_copy(2, position, k), values.index_copy(2, position, v * 2)

    def step(q, k, v, keys, values, position):
        given = keys, values, k, v, position
        keys, values = torch.cond(position[0] < 41, write, write_other_values, given)
        return attend(q, keys, values, causal(position)), keys, values

    quantized, _, told = run(step)
    assert quantized
    assert "1 of 2 caches are not served: L['values']" in told
