"""Scores that are scaled, bent or share their weight are found in any spelling; what changes them otherwise is told."""

import math

import pytest
import torch

from kvq_compile import KVQWarning
from spelled_attention import (
    Attend,
    D,
    G,
    H,
    assert_fused,
    attended,
    grouped,
    heads,
    hide,
    seen,
    watch,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def bent_by_erf(query, keys, values):
    scores = torch.erf(query @ heads(keys).mT * 0.05) * 5
    scores = scores.masked_fill(~seen(query.shape[2], keys.shape[2]), -1e9)
    return scores.softmax(-1) @ heads(values)


def clamped(query, keys, values):
    """A clamp that does nothing to small numbers."""
    scores = (query @ heads(keys).mT * 0.25).clamp(-1e3, 1e3)
    scores = scores.masked_fill(~seen(query.shape[2], keys.shape[2]), -1e9)
    return scores.softmax(-1) @ heads(values)


def squared_weights(query, keys, values):
    scores = query @ heads(keys).mT * 0.25
    scores = scores.masked_fill(~seen(query.shape[2], keys.shape[2]), -1e9)
    return scores.softmax(-1).square() @ heads(values)


def scaled_by_head(query, keys, values):
    scores = query @ heads(keys).mT * torch.linspace(0.1, 0.5, H * G)[:, None, None]
    scores = scores.masked_fill(~seen(query.shape[2], keys.shape[2]), -1e9)
    return scores.softmax(-1) @ heads(values)


def keys_reversed(query, keys, values):
    scores = query @ heads(keys.flip(2)).mT * 0.25
    scores = scores.masked_fill(~seen(query.shape[2], keys.shape[2]), -1e9)
    return scores.softmax(-1) @ heads(values)


def crossed_heads(query, keys, values):
    """Keys are shared by blocks of query heads, values in turn."""
    scores = query @ heads(keys).mT * 0.25
    scores = scores.masked_fill(~seen(query.shape[2], keys.shape[2]), -1e9)
    return scores.softmax(-1) @ values.repeat(1, G, 1, 1)


def crossed_heads_of_one_call(query, keys, values):
    keys, values = heads(keys), values.repeat(1, G, 1, 1)
    mask = seen(query.shape[2], keys.shape[2])
    return torch.nn.functional.scaled_dot_product_attention(query, keys, values, mask)


def scaled_by_the_query(query, keys, values):
    scores = query @ heads(keys).mT * query.mean()
    scores = scores.masked_fill(~seen(query.shape[2], keys.shape[2]), -1e9)
    return scores.softmax(-1) @ heads(values)


def far_scores_halved(query, keys, values):
    """What happens to keys that are far away does not show at the sizes of a trial."""
    place = torch.arange(keys.shape[2])
    scores = query @ heads(keys).mT * torch.where(place[-1] - place > 300, 0.5, 1.0)
    scores = scores.masked_fill(~seen(query.shape[2], keys.shape[2]), -1e9)
    return scores.softmax(-1) @ heads(values)


def long_queries_scaled(query, keys, values):
    query = query * torch.arange(keys.shape[2])[-query.shape[2] :, None].clamp(min=300) / 300
    scores = query @ heads(keys).mT * 0.25
    scores = scores.masked_fill(~seen(query.shape[2], keys.shape[2]), -1e9)
    return scores.softmax(-1) @ heads(values)


def far_scores_set(query, keys, values):
    """Far away scores are set to a number that does not hide them: as no trial is long enough to see."""
    place = torch.arange(keys.shape[2])
    scores = query @ heads(keys).mT * 0.25
    scores = scores.masked_fill(~seen(query.shape[2], keys.shape[2]), -1e9)
    return torch.where(place[-1] - place > 300, -2.0, scores).softmax(-1) @ heads(values)


def clamped_by_a_tensor(query, keys, values):
    scores = torch.max(query @ heads(keys).mT * 0.25, torch.tensor(-1e3))
    scores = scores.masked_fill(~seen(query.shape[2], keys.shape[2]), -1e9)
    return scores.softmax(-1) @ heads(values)


def far_weights_set(query, keys, values):
    """Weights are set to zero where their scores were not hidden: as no trial is long enough to see."""
    place = torch.arange(keys.shape[2])
    scores = query @ heads(keys).mT * 0.25
    scores = scores.masked_fill(~seen(query.shape[2], keys.shape[2]), -1e9)
    return scores.softmax(-1).masked_fill(place[-1] - place > 300, 0.0) @ heads(values)


def hidden_weights_set(query, keys, values):
    """Weights of what is hidden are set to something else than zero."""
    hidden = ~seen(query.shape[2], keys.shape[2])
    scores = (query @ heads(keys).mT * 0.25).masked_fill(hidden, -1e9)
    return scores.softmax(-1).masked_fill(hidden, 0.5) @ heads(values)


CAP, SCALE = 4.0, 0.3


def capped_by_its_module(query, keys, values):
    return attended(hide(torch.tanh(grouped(query, keys) * SCALE / CAP) * CAP), values)


def capped_groups(query, keys, values):
    return attended(hide(torch.tanh(grouped(query * 0.25, keys) / 5) * 5) * 0.5, values)


def clamped_in_folded_heads(query, keys, values):
    new, slots = query.shape[2], keys.shape[2]
    keys, values = (heads(x).reshape(-1, slots, D) for x in (keys, values))
    scores = (torch.bmm(query.reshape(-1, new, D), keys.transpose(1, 2)) / 4).clamp_(-1, 0.5)
    scores = hide(scores.view(-1, H * G, new, slots))
    return torch.bmm(scores.softmax(-1).view(-1, new, slots), values).view(-1, H * G, new, D)


def temperature_of_groups(query, keys, values):
    """A factor for each head, before the mask, and one for each query, behind it."""
    scores = hide(grouped(query, keys) * torch.linspace(0.1, 0.5, H * G).view(H, G, 1, 1))
    place = torch.arange(keys.shape[2])[-query.shape[2] :]
    return attended(scores / (place + 2.0).log()[:, None], values)


def one_factor_behind_a_view(query, keys, values):
    new, slots = query.shape[2], keys.shape[2]
    keys, values = (heads(x).reshape(-1, slots, D) for x in (keys, values))
    scores = torch.bmm(query.reshape(-1, new, D), keys.mT).view(-1, H * G, new, slots)
    weights = hide(scores * query.abs().amax().reshape(1, 1, 1) / 20).softmax(-1)
    return torch.bmm(weights.view(-1, new, slots), values).view(-1, H * G, new, D)


def scaled_by_the_length(query, keys, values):
    scores = hide(grouped(query, keys) * (math.log(keys.shape[2]) / 16))
    return attended(scores, values)


def temperature_below_a_cap(query, keys, values):
    factor = torch.linspace(0.1, 0.5, G)[:, None, None]
    return attended(hide(torch.tanh(grouped(query, keys) * factor) * 2), values)


def sinks_of_groups(query, keys, values):
    """Behind two masks, in front of the scores."""
    scores = hide(grouped(query, keys) * 0.25) + torch.arange(keys.shape[2]) / 50
    sinks = torch.linspace(-2, 2, H * G).view(H, G, 1, 1).expand(*scores.shape[:-1], 1)
    weights = torch.cat([sinks, scores], -1).softmax(-1)[..., 1:]
    return torch.einsum("bhgts,bhsd->bhgtd", weights, values).flatten(1, 2)


def shifted_sinks_of_the_query(query, keys, values):
    scores = hide(torch.tanh(grouped(query, keys) * 0.1) * 2)
    sinks = query.unflatten(1, (H, G))[..., :3]
    scores = torch.cat((scores, sinks), dim=4)
    scores = scores - scores.amax(-1, keepdim=True)
    weights = scores.softmax(-1)[:, :, :, :, :-3]
    return torch.einsum("bhgts,bhsd->bhgtd", weights, values).flatten(1, 2)


def one_more(query, keys, values):
    """Off by one, as padding."""
    scores = torch.nn.functional.pad(hide(grouped(query, keys) * 0.25), (0, 1))
    weights = scores.softmax(-1)[..., :-1]
    return torch.einsum("bhgts,bhsd->bhgtd", weights, values).flatten(1, 2)


SCORED = (
    clamped, scaled_by_head, scaled_by_the_query, capped_groups, clamped_in_folded_heads,
    temperature_of_groups, one_factor_behind_a_view, scaled_by_the_length, temperature_below_a_cap,
    sinks_of_groups, shifted_sinks_of_the_query, one_more,
)  # fmt: skip


@pytest.mark.long(
    but=[
        "capped_groups",
        "shifted_sinks_of_the_query",
        "one_more",
        "clamped_in_folded_heads",
        "temperature_below_a_cap",
        "one_factor_behind_a_view",
        "scaled_by_the_length",
        "scaled_by_head",
    ]
)
@pytest.mark.parametrize("attend", SCORED, ids=lambda attend: attend.__name__)
def test_caps_clamps_sinks_and_factors_of_rows_are_fused_in_any_spelling(attend: Attend) -> None:
    assert_fused(watch(attend))


def test_numbers_that_dynamo_keeps_symbolic_are_numbers() -> None:
    """Regression: a cap of a model that is compiled with ``dynamic=True`` was taken for one computed in the graph."""
    assert_fused(watch(capped_by_its_module, dynamic=True))


def capped_behind_a_mask(query, keys, values):
    """What is hidden has weight."""
    return attended(torch.tanh(hide(grouped(query, keys)) / 5) * 5, values)


def scaled_behind_a_cap(query, keys, values):
    factor = torch.linspace(0.1, 0.5, G)[:, None, None]
    return attended(hide(torch.tanh(grouped(query, keys) * 0.25) * factor), values)


def scaled_by_columns(query, keys, values):
    factor = 1 + 0 * torch.arange(keys.shape[2])
    return attended(hide(grouped(query, keys) * 0.25 * factor), values)


def sinks_of_another_place(query, keys, values):
    """The weight of the first token is left out, and not that of the sink."""
    scores = hide(grouped(query, keys) * 0.25)
    scores = torch.cat([scores, torch.zeros(*scores.shape[:-1], 1)], -1)
    weights = scores.softmax(-1)[..., 1:]
    return torch.einsum("bhgts,bhsd->bhgtd", weights, values).flatten(1, 2)


CHANGED = (
    far_scores_set,
    far_weights_set,
    hidden_weights_set,
    clamped_by_a_tensor,
    far_scores_halved,
    bent_by_erf, squared_weights, keys_reversed, crossed_heads, crossed_heads_of_one_call, capped_behind_a_mask,
    scaled_behind_a_cap, scaled_by_columns, sinks_of_another_place,
)  # fmt: skip


@pytest.mark.parametrize("attend", CHANGED, ids=lambda attend: attend.__name__)
def test_what_is_no_plain_attention_is_not_fused(attend: Attend) -> None:
    with pytest.warns(KVQWarning, match="read their caches dense"):
        recorder = watch(attend, lengths=(1, 3))
    assert "attend.default" not in recorder.calls


def test_a_factor_of_the_query_that_changes_with_its_place_is_kept() -> None:
    assert_fused(watch(long_queries_scaled))


def test_a_step_that_is_not_understood_is_named() -> None:
    with pytest.warns(KVQWarning, match="the scores pass through erf before the softmax"):
        watch(bent_by_erf)
