"""Attention is found by what it computes: any order of axes, any spelling of products, scales and masks."""

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile import KVQWarning, QuantizedKV
from kvq_compile.backend import compile_graph
from kvq_compile.lowering.nodes import target_name
from kvq_compile.lowering.pipeline import lower
from kvq_compile.options import make_config

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

B, H, G, D = 3, 2, 4, 16
EXACT = {"method": "int8", "sinks": 1, "window": 256, "page_size": 32, "inner": "eager"}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


class Watch:
    """A backend that keeps what became of each attention, and which calls the last graph has."""

    def __init__(self) -> None:
        self.config = make_config(EXACT)
        self.details: list[str] = []
        self.calls: set[str] = set()

    def __call__(self, gm, inputs, **_):
        lowered = lower(gm, inputs, self.config.spec)
        self.details = [site.detail for site in lowered.reports]
        self.calls = {target_name(node) for node in lowered.module.graph.nodes}
        return compile_graph(gm, inputs, self.config)


def seen(new: int, slots: int) -> Tensor:
    return torch.ones(new, slots, dtype=torch.bool).tril(slots - new)


def heads(x: Tensor) -> Tensor:
    return x.repeat_interleave(G, 1)


@torch.no_grad()
def watch(attend: Attend, dtype: torch.dtype = torch.float32, lengths=(1, 1, 3)) -> Watch:
    """Feed tokens to a decoder's step with a cache that grows; hold it to the same step uncompiled."""

    def step(query, key, value, keys, values):
        keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        return attend(query, keys, values), keys, values

    recorder = Watch()
    compiled = torch.compile(step, backend=recorder)
    torch.manual_seed(0)
    plain = packed = [torch.randn(B, H, 40, D, dtype=dtype) for _ in range(2)]
    eps = torch.finfo(dtype).eps
    for new in lengths:
        own = [torch.randn(B, n, new, D, dtype=dtype) for n in (H * G, H, H)]
        wanted, *plain = step(*own, *plain)
        output, *packed = compiled(*own, *packed)
        assert output.shape == wanted.shape
        assert output.dtype == wanted.dtype
        torch.testing.assert_close(output, wanted, rtol=16 * eps, atol=16 * eps)
    assert all(isinstance(cache, QuantizedKV) for cache in packed)
    return recorder


def assert_fused(recorder: Watch) -> None:
    assert "attend.default" in recorder.calls, recorder.details
    products = {"softmax", "einsum", "bmm", "matmul", "scaled_dot_product_attention"}
    assert not products & recorder.calls


def grouped_products(query, keys, values):
    rows = query.reshape(query.shape[0], H, G * query.shape[2], D)
    scores = (rows @ keys.mT).view(query.shape[0], H, G, query.shape[2], -1) * 0.25
    scores = scores + torch.where(seen(query.shape[2], keys.shape[2]), 0.0, -torch.inf)
    rows = scores.softmax(-1).view(query.shape[0], H, G * query.shape[2], -1) @ values
    return rows.view(query.shape[0], H * G, query.shape[2], D)


def folded_batch(query, keys, values):
    new, slots = query.shape[2], keys.shape[2]
    keys, values = (heads(x).reshape(-1, slots, D) for x in (keys, values))
    scores = torch.bmm(query.reshape(-1, new, D), keys.transpose(1, 2)) * D**-0.5
    scores = scores.view(-1, H * G, new, slots) + torch.where(seen(new, slots), 0.0, -1e4)
    return torch.bmm(scores.softmax(-1).view(-1, new, slots), values).view(-1, H * G, new, D)


def biased_products(query, keys, values):
    """ALiBi in ``baddbmm``, as BLOOM has it."""
    new, slots = query.shape[2], keys.shape[2]
    slopes = 2.0 ** -torch.arange(1, H * G + 1)
    bias = (slopes[:, None, None] * torch.arange(slots)).expand(query.shape[0], -1, -1, -1)
    keys, values = (heads(x).reshape(-1, slots, D) for x in (keys, values))
    scores = bias.reshape(-1, 1, slots).baddbmm(
        query.reshape(-1, new, D), keys.transpose(1, 2), beta=1.0, alpha=D**-0.5
    )
    scores = scores.view(-1, H * G, new, slots)
    scores = scores.masked_fill(~seen(new, slots), torch.finfo(torch.float32).min)
    return torch.bmm(scores.softmax(-1).view(-1, new, slots), values).view(-1, H * G, new, D)


def bias_of_distance(query, keys, values):
    new, slots = query.shape[2], keys.shape[2]
    place = torch.arange(slots)
    bias = -(2.0 ** -torch.arange(1, H * G + 1))[:, None, None] * (place - place[-new:, None]).abs()
    scores = (query * D**-0.5) @ heads(keys).mT + bias
    scores = scores + torch.zeros(new, slots).masked_fill(~seen(new, slots), -torch.inf)
    return scores.softmax(-1) @ heads(values)


def in_place(query, keys, values):
    scores = query @ heads(keys).transpose(-1, -2)
    scores /= math.sqrt(D)
    scores.masked_fill_(~seen(query.shape[2], keys.shape[2]), -1e9)
    return scores.softmax(-1) @ heads(values)


def without_the_largest(query, keys, values):
    scores = query @ heads(keys).transpose(-1, -2) * 0.25
    scores = scores.masked_fill(~seen(query.shape[2], keys.shape[2]), -1e9)
    return (scores - scores.amax(-1, keepdim=True)).softmax(-1) @ heads(values)


def heads_in_turn(query, keys, values):
    """Query heads take KV heads in turn, not blocks of them."""
    keys, values = (x.repeat(1, G, 1, 1) for x in (keys, values))
    scores = query @ keys.transpose(-1, -2) * 0.25
    scores = torch.where(seen(query.shape[2], keys.shape[2]), scores, torch.tensor(-1e30))
    return scores.softmax(-1) @ values


def known_products_of_heads_in_turn(query, keys, values):
    """Regression: products that a pattern knew were not evaluated where their heads were not read (JetMoE)."""
    keys, values = (x.repeat(1, G, 1, 1) for x in (keys, values))
    scores = query @ keys.transpose(-1, -2) * 0.25
    scores = scores.masked_fill(~seen(query.shape[2], keys.shape[2]), -torch.inf)
    return scores.softmax(-1) @ values


def heads_in_turn_of_one_call(query, keys, values):
    """What JetMoE does to the operands of ``scaled_dot_product_attention``, with a mask of each head."""
    keys, values = (x.repeat(1, G, 1, 1) for x in (keys, values))
    mask = torch.where(seen(query.shape[2], keys.shape[2]), 0.0, -torch.inf)
    mask = mask - torch.arange(H * G).view(-1, 1, 1) * torch.arange(keys.shape[2]) / 8
    mask = mask.expand(query.shape[0], -1, -1, -1)
    return torch.nn.functional.scaled_dot_product_attention(query, keys, values, mask)


def joined_heads_in_turn(query, keys, values):
    keys, values = (x[:, None].expand(-1, G, -1, -1, -1).flatten(1, 2) for x in (keys, values))
    mask = seen(query.shape[2], keys.shape[2])
    return torch.nn.functional.scaled_dot_product_attention(query, keys, values, mask)


def sums(query, keys, values):
    scores = (query[:, :, :, None] * heads(keys)[:, :, None]).sum(-1) * 0.25
    scores = scores.masked_fill(~seen(query.shape[2], keys.shape[2]), -1e9)
    return scores.softmax(-1) @ heads(values)


def boolean_that_is_added(query, keys, values):
    """Regression: True was taken for "attend" although adding it adds one."""
    scores = query @ heads(keys).mT * 0.25
    scores = scores + (torch.arange(keys.shape[2]) < 7)
    scores = scores.masked_fill(~seen(query.shape[2], keys.shape[2]), -1e9)
    return scores.softmax(-1) @ heads(values)


def raised_to_what_hides(query, keys, values):
    """What is hidden may be raised to the lowest number there is, as XGLM does."""
    scores = query @ heads(keys).mT * 0.25
    scores = scores + torch.where(seen(query.shape[2], keys.shape[2]), 0.0, -torch.inf)
    return torch.max(scores, torch.full((), torch.finfo(scores.dtype).min)).softmax(-1) @ heads(
        values
    )


def hidden_twice(query, keys, values):
    """Weights of what is hidden are set to zero, as CPM-Ant does."""
    scores = query @ heads(keys).mT * 0.25
    scores = scores.masked_fill(seen(query.shape[2], keys.shape[2]) == False, -torch.inf)  # noqa: E712
    weights = scores.softmax(-1)
    weights = weights.masked_fill(seen(query.shape[2], keys.shape[2]) == False, 0.0)  # noqa: E712
    return weights @ heads(values)


SPELLINGS = (
    boolean_that_is_added, raised_to_what_hides, hidden_twice, grouped_products, folded_batch, biased_products,
    bias_of_distance, in_place, without_the_largest, heads_in_turn, known_products_of_heads_in_turn,
    heads_in_turn_of_one_call, joined_heads_in_turn, sums,
)  # fmt: skip


@pytest.mark.parametrize("attend", SPELLINGS, ids=lambda attend: attend.__name__)
def test_a_spelling_that_no_pattern_knows_is_fused(attend: Attend) -> None:
    assert_fused(watch(attend))


@st.composite
def einsums(draw: st.DrawFn) -> Attend:
    """Attention as two einsums over axes in any order, a scale at any place, and masks of several kinds."""
    rows = "".join(draw(st.permutations("bhgt"))) + "d"
    scores = "".join(draw(st.permutations("bhgt"))) + "s"
    result = "".join(draw(st.permutations("bhgt"))) + "d"
    place = draw(st.sampled_from(["query", "scores", "both", "none"]))
    hide = draw(st.sampled_from(["fill", "where", "add", "two", "bias"]))
    fill = draw(st.sampled_from([-torch.inf, -1e9, -3e4, torch.finfo(torch.float32).min]))
    single = draw(st.booleans())  # softmax in float32 whatever the dtype

    def attend(query, keys, values):
        new, slots = query.shape[2], keys.shape[2]
        query = query.view(query.shape[0], H, G, new, D).permute(["bhgtd".index(c) for c in rows])
        query = query * 0.5 if place in ("query", "both") else query
        found = torch.einsum(f"{rows},bhsd->{scores}", query, keys)
        found = found * 0.5 if place in ("scores", "both") else found
        shape = [{"t": new, "s": slots}.get(axis, 1) for axis in scores]
        mask = seen(new, slots)
        mask = (mask if scores.index("t") < scores.index("s") else mask.mT).reshape(shape)
        if hide == "fill":
            found = found.masked_fill(~mask, fill)
        elif hide == "where":
            found = torch.where(mask, found, torch.full((), fill, dtype=found.dtype))
        elif hide == "add":
            found = found + torch.where(mask, 0.0, fill).to(found.dtype)
        elif hide == "two":
            found = found + torch.where(mask, 0.0, -2e4).to(found.dtype)
            found = found.masked_fill(~mask, fill)
        else:
            slopes = torch.arange(1, H * G + 1).reshape(H, G)
            sizes = [{"h": H, "g": G}.get(axis, 1) for axis in scores]
            slopes = slopes if scores.index("h") < scores.index("g") else slopes.mT
            found = found + slopes.reshape(sizes).to(found.dtype) * 0.125 * mask
            found = found.masked_fill(~mask, fill)
        weights = found.softmax(-1, dtype=torch.float32) if single else found.softmax(-1)
        found = torch.einsum(f"{scores},bhsd->{result}", weights.to(values.dtype), values)
        return found.permute([result.index(c) for c in "bhgtd"]).reshape(-1, H * G, new, D)

    return attend


@settings(max_examples=15)
@given(einsums())
def test_any_order_of_axes_is_fused(attend: Attend) -> None:
    torch._dynamo.reset()
    assert_fused(watch(attend, lengths=(1, 3)))


def test_low_precision_with_a_softmax_in_float32_is_fused() -> None:
    def attend(query, keys, values):
        scores = torch.einsum("bhgtd,bhsd->bhgts", query.unflatten(1, (H, G)), keys) * 0.25
        scores = scores.float().masked_fill(~seen(query.shape[2], keys.shape[2]), -torch.inf)
        weights = scores.softmax(-1).to(values.dtype)
        return torch.einsum("bhgts,bhsd->bhgtd", weights, values).flatten(1, 2)

    assert_fused(watch(attend, torch.bfloat16))


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


def grouped(query, keys):
    return torch.einsum("bhgtd,bhsd->bhgts", query.unflatten(1, (H, G)), keys)


def attended(scores, values):
    return torch.einsum("bhgts,bhsd->bhgtd", scores.softmax(-1), values).flatten(1, 2)


def hide(scores):
    return scores.masked_fill(~seen(*scores.shape[-2:]), -1e9)


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
    temperature_of_groups, temperature_below_a_cap, sinks_of_groups, shifted_sinks_of_the_query, one_more,
)  # fmt: skip


@pytest.mark.parametrize("attend", SCORED, ids=lambda attend: attend.__name__)
def test_caps_clamps_sinks_and_factors_of_rows_are_fused_in_any_spelling(attend: Attend) -> None:
    assert_fused(watch(attend))


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
        recorder = watch(attend)
    assert "attend.default" not in recorder.calls


def test_a_factor_of_the_query_that_changes_with_its_place_is_kept() -> None:
    assert_fused(watch(long_queries_scaled))


def test_a_window_that_no_trial_is_as_long_as_is_kept() -> None:
    """Regression: a mask that hid nothing at the sizes of the trials was dropped."""

    def attend(query, keys, values):
        place = torch.arange(keys.shape[2])
        near = place > place[-query.shape[2] :, None] - 30
        scores = torch.einsum("bhgtd,bhsd->bhgts", query.unflatten(1, (H, G)), keys)
        scores = scores.masked_fill(~(near & seen(query.shape[2], keys.shape[2])), -1e9)
        return torch.einsum("bhgts,bhsd->bhgtd", scores.softmax(-1), values).flatten(1, 2)

    assert_fused(watch(attend))


def test_a_step_that_is_not_understood_is_named() -> None:
    with pytest.warns(KVQWarning, match="the scores pass through erf before the softmax"):
        watch(bent_by_erf)


def test_a_softmax_over_a_tensor_with_a_new_axis_is_no_fault() -> None:
    """Regression: a subscript that inserts an axis was looked at as one that cuts a cache (Jamba)."""

    def attend(query, keys, values):
        rows = query[:, 0]
        other = rows[:, :, None, :]
        query = query + ((other @ other.mT).softmax(-1) @ other).transpose(1, 2)
        return attended(hide(grouped(query, keys) * 0.25), values)

    recorder = watch(attend)
    assert "attend.default" in recorder.calls
    assert not [detail for detail in recorder.details if "fault" in detail]


def test_weights_that_are_used_elsewhere_are_not_lost() -> None:
    def attend(query, keys, values):
        scores = torch.einsum("bhgtd,bhsd->bhgts", query.unflatten(1, (H, G)), keys)
        weights = scores.softmax(-1)
        found = torch.einsum("bhgts,bhsd->bhgtd", weights, values).flatten(1, 2)
        return found + weights.amax()

    with pytest.warns(KVQWarning, match="weights are used outside attention"):
        watch(attend)


def test_a_cache_of_fixed_size_is_read_through_einsum() -> None:
    slots = 64

    def step(query, key, value, keys, values, place):
        keys.index_copy_(2, place, key)
        values.index_copy_(2, place, value)
        rows = query.unflatten(1, (H, G))
        scores = torch.einsum("bhgtd,bhsd->bhgts", rows, keys) * 0.25
        scores = scores.masked_fill(torch.arange(slots) > place[:, None], -1e9)
        return torch.einsum("bhgts,bhsd->bhgtd", scores.softmax(-1), values).flatten(1, 2)

    recorder = Watch()
    compiled = torch.compile(step, backend=recorder)
    torch.manual_seed(0)
    plain, packed = ([torch.zeros(B, H, slots, D) for _ in range(2)] for _ in range(2))
    first = 0
    with torch.no_grad():
        for new in (5, 1, 1, 3):
            place = torch.arange(first, first + new)
            own = [torch.randn(B, n, new, D) for n in (H * G, H, H)]
            wanted = step(*own, *plain, place)
            torch.testing.assert_close(compiled(*own, *packed, place), wanted, rtol=2e-6, atol=2e-6)
            first += new
    assert all(isinstance(cache, QuantizedKV) for cache in packed)
    assert_fused(recorder)


@pytest.mark.parametrize("cleared", [False, True])
def test_a_cache_that_is_allocated_in_the_call_is_read_through_einsum(cleared: bool) -> None:
    """Regression: how it was filled was taken for a part of the attention.

    Where something writes into it between its read and the attention, the call stays as it was.
    """
    slots, new = 64, 5

    def step(query, key, value, mix, place):
        keys = torch.zeros(B, H, slots, D).index_copy_(2, place, key @ mix)
        values = torch.zeros(B, H, slots, D).index_copy_(2, place, value @ mix)
        rows = query.unflatten(1, (H, G))
        scores = torch.einsum("bhgtd,bhsd->bhgts", rows, keys) * 0.25
        scores = scores.masked_fill(torch.arange(slots) > place[:, None], -1e9)
        if cleared:
            values[:, :, 0] = 0.0
        return (
            torch.einsum("bhgts,bhsd->bhgtd", scores.softmax(-1), values).flatten(1, 2),
            keys,
            values,
        )

    recorder = Watch()
    torch.manual_seed(0)
    own = [*(torch.randn(B, n, new, D) for n in (H * G, H, H)), torch.randn(D, D) / 4]
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", KVQWarning)
        wanted, *_ = step(*own, torch.arange(new))
        output, *_ = torch.compile(step, backend=recorder)(*own, torch.arange(new))
    torch.testing.assert_close(output, wanted, rtol=2e-6, atol=2e-6)
    assert ("einsum" in recorder.calls) is cleared, recorder.details
