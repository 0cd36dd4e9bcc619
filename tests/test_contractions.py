"""Attention is found by what it computes: any order of axes, any spelling of products and masks."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq_compile import KVQWarning, QuantizedKV
from spelled_attention import (
    Attend,
    B,
    D,
    G,
    H,
    Watch,
    assert_fused,
    attended,
    grouped,
    heads,
    hide,
    seen,
    watch,
)
from thorough import few

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


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


@settings(max_examples=few(5))
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


def test_a_window_that_no_trial_is_as_long_as_is_kept() -> None:
    """Regression: a mask that hid nothing at the sizes of the trials was dropped."""

    def attend(query, keys, values):
        place = torch.arange(keys.shape[2])
        near = place > place[-query.shape[2] :, None] - 30
        scores = torch.einsum("bhgtd,bhsd->bhgts", query.unflatten(1, (H, G)), keys)
        scores = scores.masked_fill(~(near & seen(query.shape[2], keys.shape[2])), -1e9)
        return torch.einsum("bhgts,bhsd->bhgtd", scores.softmax(-1), values).flatten(1, 2)

    assert_fused(watch(attend))


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
