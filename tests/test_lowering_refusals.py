"""Attention that is not recognised for certain is left alone: right numbers and a reason, no crash."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvq_compile import make_spec
from kvq_compile.history import watching
from kvq_compile.lowering.find.reasons import NO_CACHE
from kvq_compile.lowering.pipeline import lower
from refused_steps import assert_left_alone, assert_read_dense, compile_, grown, join, tokens

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def test_softmax_over_another_dimension_is_read_dense() -> None:
    def step(query, key, value, keys, values):
        keys, values = join(keys, values, key, value)
        return torch.softmax(query @ keys.transpose(2, 3), 2) @ values, keys, values

    assert_read_dense(step, grown(), "softmax runs over dimension 2, not over the tokens")


def test_attention_weights_that_are_returned_are_read_dense() -> None:
    def step(query, key, value, keys, values):
        keys, values = join(keys, values, key, value)
        weights = torch.softmax(query @ keys.transpose(2, 3), -1)
        return weights @ values, weights, keys, values

    assert_read_dense(step, grown(), "the attention weights are used outside attention")


def test_scores_that_are_returned_are_read_dense() -> None:
    def step(query, key, value, keys, values):
        keys, values = join(keys, values, key, value)
        scores = query @ keys.transpose(2, 3)
        return torch.softmax(scores, -1) @ values, scores, keys, values

    assert_read_dense(step, grown(), "the scores are used outside attention")


def test_active_dropout_is_read_dense() -> None:
    def by_flag(query, key, value, keys, values):
        keys, values = join(keys, values, key, value)
        return sdpa(query, keys, values, dropout_p=1e-9), keys, values

    def written_out(query, key, value, keys, values):
        keys, values = join(keys, values, key, value)
        weights = torch.nn.functional.dropout(
            torch.softmax(query @ keys.mT, -1), 1e-9, training=True
        )
        return weights @ values, keys, values

    for step in (by_flag, written_out):
        assert_read_dense(
            step, grown(), "attention drops weights at random; call model.eval() first"
        )


@pytest.mark.parametrize(
    "divide",
    [lambda scores: 8.0 / scores, lambda scores: scores.reciprocal() * 8.0],
    ids=["division", "reciprocal"],
)
def test_a_softmax_of_reciprocal_scores_is_read_dense(divide) -> None:
    """Regression: the operands of a division were taken in either order, as those of a product may be."""

    def step(query, key, value, keys, values):
        keys, values = join(keys, values, key, value)
        return torch.softmax(divide(query @ keys.mT), -1) @ values, keys, values

    assert_read_dense(step, grown(), "scores")


def test_a_function_of_the_scores_is_named_behind_the_mask_and_the_factor() -> None:
    """Regression: the mask's addition, which is supported, was given as the reason."""

    def step(query, key, value, keys, values):
        keys, values = join(keys, values, key, value)
        scores = torch.erf(query @ keys.transpose(2, 3) / 5.0) * 5.0
        scores = scores + torch.zeros(1, 1, 1, scores.shape[-1])
        return torch.softmax(scores, -1) @ values, keys, values

    assert_read_dense(step, grown(), "the scores pass through erf before the softmax")


@pytest.mark.parametrize("fill", [-1e4, -1e9, -torch.inf])
def test_what_a_mask_sets_is_no_reason_where_it_hides(fill: float) -> None:
    """Regression: where something else kept an attention from being read, a fill of -1e9 was the reason."""

    def step(query, key, value, keys, values):
        keys, values = join(keys, values, key, value)
        scores = torch.erf(query @ keys.transpose(2, 3))
        scores = scores.masked_fill(torch.arange(scores.shape[-1]) < 2, fill)
        return torch.softmax(scores, -1) @ values, keys, values

    assert_read_dense(step, grown(), "the scores pass through erf before the softmax")


def by_index(x, head):
    return x[:, head, None]


def by_slice(x, head):
    return x[:, head : head + 1]


def by_chunk(x, head):
    return x.chunk(x.shape[1], 1)[head]


@pytest.mark.parametrize("attend", ["sdpa", "softmax"])
@pytest.mark.parametrize("take", [by_index, by_slice, by_chunk])
def test_single_heads_of_a_cache_that_is_kept_whole_are_told(take, attend) -> None:
    """Regression: the reason was a sliding window, or keys and values that are computed anew."""

    def step(query, key, value, keys, values):
        keys, values = join(keys, values, key, value)
        outputs = []
        for head in range(query.shape[1]):
            q, k, v = (take(x, head) for x in (query, keys, values))
            if attend == "sdpa":
                outputs.append(torch.nn.functional.scaled_dot_product_attention(q, k, v))
            else:
                outputs.append(torch.softmax(q @ k.mT * 0.25, -1) @ v)
        return torch.cat(outputs, 1), keys, values

    assert_read_dense(step, grown(quantized=True), "attention takes single heads")


def test_a_scale_for_each_token_is_read_dense() -> None:
    def step(query, key, value, keys, values):
        keys, values = join(keys, values, key, value)
        scores = query @ keys.transpose(2, 3) * torch.ones(keys.shape[2])
        return torch.softmax(scores, -1) @ values, keys, values

    assert_read_dense(step, grown(), "the scale of the scores is computed in the graph")


def test_a_mask_that_only_lowers_scores_is_read_dense() -> None:
    def step(query, key, value, keys, values):
        keys, values = join(keys, values, key, value)
        scores = (query @ keys.transpose(2, 3)).masked_fill(query[..., :1] > 0, -2.0)
        return torch.softmax(scores, -1) @ values, keys, values

    assert_read_dense(step, grown(), "hidden scores are set to -2.0, which does not hide them")


def test_one_mask_column_for_all_slots_is_read_dense() -> None:
    """Regression: a mask of width 1 was read as the mask of slot 0."""

    def step(query, key, value, keys, values):
        keys, values = join(keys, values, key, value)
        return sdpa(query, keys, values, attn_mask=torch.zeros(query.shape[2], 1)), keys, values

    assert_read_dense(step, grown(), "one column of the mask stands for all cache positions")


def test_flex_attention_is_left_alone() -> None:
    from torch.nn.attention.flex_attention import flex_attention

    def step(query, key, value, keys, values):
        keys, values = join(keys, values, key, value)
        return flex_attention(query, keys, values), keys, values

    details = []

    def backend(
        gm, inputs
    ):  # flex_attention runs under Inductor only, so the graph is not run here
        details.extend(site.detail for site in lower(gm, inputs, make_spec()).reports)
        return lambda *args: args[:3]

    torch.compile(step, backend=backend)(*grown()())
    assert details == ["flex_attention is not rewritten; use scaled_dot_product_attention"]


def test_a_softmax_that_is_no_attention_is_not_mentioned() -> None:
    def step(query, key):
        return torch.softmax(query, -1) * key

    with watching() as graphs:
        compile_(step)(tokens(3), tokens(3))
    assert [graph.sites for graph in graphs] == [()]


def test_double_precision_is_left_alone() -> None:
    def step(query, key, value, keys, values):
        keys, values = join(keys, values, key, value)
        return sdpa(query, keys, values), keys, values

    assert_left_alone(step, grown(dtype=torch.float64), "dtype torch.float64 is not supported")


def head_by_head(attend):
    """Return a step that attends with one head after the other, ``[B, T, D]`` each."""

    def step(query, key, value, keys, values):
        keys, values = join(keys, values, key, value)
        heads = [attend(query[:, h], keys[:, h], values[:, h]) for h in range(keys.shape[1])]
        return torch.stack(heads, 1), keys, values

    return step


def over_queries(query, keys, values):
    return torch.softmax(query @ keys.mT, 1) @ values


def of_used_weights(query, keys, values):
    weights = torch.softmax(query @ keys.mT, -1)
    return weights @ values + weights.sum(-1, keepdim=True)


def of_other_weights(query, keys, values):
    weights = torch.softmax(query @ keys.mT, -1)
    return (weights * weights) @ values


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (over_queries, "softmax runs over dimension 1, not over the last"),
        (of_used_weights, "the attention weights are used outside attention"),
        (of_other_weights, "the weights pass through mul before the product"),
    ],
)
def test_what_is_refused_of_heads_one_by_one_is_told_by_its_reason(attend, reason) -> None:
    """Regression: all were told to be written over four axes, which is no condition."""
    assert_read_dense(head_by_head(attend), grown(), reason)


def test_heads_one_by_one_are_served() -> None:
    """Negative twin."""

    def attend(query, keys, values):
        return torch.softmax(query @ keys.mT, -1) @ values

    with watching() as graphs:
        compile_(head_by_head(attend))(*grown()())
    assert {site.outcome for graph in graphs for site in graph.sites} == {"rewritten"}


def test_a_softmax_over_experts_is_no_attention_over_a_cache() -> None:
    """Regression: it was told that it should have four axes, with a warning."""
    experts = torch.randn(8, 16, generator=torch.Generator().manual_seed(0))

    def step(query, key, value, keys, values):
        keys, values = join(keys, values, key, value)
        out = sdpa(query, keys, values)
        rows = query.reshape(-1, 16)
        return out + (torch.softmax(rows @ experts.mT, -1) @ experts).view_as(out), keys, values

    with watching() as graphs:
        compile_(step)(*grown()())
    attention, router = (site for graph in graphs for site in graph.sites)
    assert attention.outcome == "rewritten"
    assert (router.outcome, router.detail, router.expected) == ("left alone", NO_CACHE, True)
