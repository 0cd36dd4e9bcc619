"""Attention that is not recognised for certain is left alone: right numbers and a reason, no crash."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvq_compile import make_spec
from kvq_compile.history import watching
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
