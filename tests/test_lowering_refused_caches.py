"""Caches that are kept in another way are left alone; quantized ones stay right and quantized all the same."""

import warnings

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvq_compile import KVQWarning, QuantizedKV, quantize_cache_
from kvq_compile.history import watching
from refused_steps import (
    assert_grows_alike,
    assert_left_alone,
    assert_read_dense,
    assert_rewritten,
    buffers,
    compile_,
    grown,
    join,
    tokens,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def test_no_cache_is_left_alone_without_a_warning() -> None:
    def step(query, key, value):
        return sdpa(query, key * 2, value * 2, is_causal=True)

    assert_left_alone(
        step, lambda: grown()()[:3], "keys and values are not kept after the call", warns=False
    )


def test_keys_and_values_repeated_in_different_orders_are_read_dense() -> None:
    """Regression: this was reported as a call that keeps no cache, which warns nobody."""

    def step(query, key, value, keys, values):
        keys, values = join(keys, values, key, value)
        query = torch.cat([query, query], 1)
        return sdpa(query, keys.repeat(1, 2, 1, 1), values.repeat_interleave(2, 1)), keys, values

    assert_read_dense(step, grown(), "the cache reaches attention through repeat")


def test_keys_rotated_after_they_are_read_are_read_dense() -> None:
    def step(query, key, value, keys, values):
        keys, values = join(keys, values, key, value)
        angle = torch.arange(keys.shape[2])[:, None] / 10
        return sdpa(query, keys * angle.cos() + keys.flip(-1) * angle.sin(), values), keys, values

    assert_read_dense(step, grown(), "the cache reaches attention through add")


def test_keys_and_values_in_one_tensor_are_read_dense() -> None:
    """Regression: the shared tensor came back quantized as values and was refused as keys in the next call."""

    def step(query, key, keys):
        keys = torch.cat([keys, key], 2)
        return sdpa(query, keys, keys), keys

    assert_read_dense(
        step, lambda: [tokens(2), tokens(2, seed=1), tokens(40)], "keys and values are one tensor"
    )


def test_a_buffer_of_which_other_rows_are_read_than_written_is_left_alone_for_that_reason() -> None:
    """Regression: the attention was said to keep nothing, and the cache to be written within tokens."""

    def step(query, key, value, keys, values, position, mask):
        others = keys[1:].sum() + values[1:].sum()
        keys = keys[:1].index_copy_(2, position, key[:1])
        values = values[:1].index_copy_(2, position, value[:1])
        return sdpa(query[:1], keys, values, attn_mask=mask) + others

    reason = "only some rows of the cache are written or read"
    with watching() as graphs:
        assert_left_alone(step, buffers(), reason)
    assert [state.detail[: len(reason)] for state in graphs[0].states] == [reason] * 2


def test_a_buffer_without_a_mask_is_read_dense() -> None:
    def step(query, key, value, keys, values, position, mask):
        keys.index_copy_(2, position, key)
        values.index_copy_(2, position, value)
        return sdpa(query, keys, values)

    given = assert_read_dense(
        step, buffers(), "attention reads cache positions that hold no token: there is no mask"
    )
    assert given[3].held() == 5


def test_an_attention_found_by_evaluation_that_has_no_mask_is_told_that() -> None:
    """Regression: it was told that what becomes of its softmax is not understood."""

    def step(query, key, value, keys, values, position, mask):
        keys.index_copy_(2, position, key)
        values.index_copy_(2, position, value)
        weights = torch.einsum("bhtd,bhsd->bhts", query, keys).softmax(-1)
        return torch.einsum("bhts,bhsd->bhtd", weights, values)

    assert_read_dense(
        step, buffers(), "attention reads cache positions that hold no token: there is no mask"
    )


def write_channels(keys, position, key):
    keys[:, :, position, :8] = key[..., :8]


def write_one_sequence(keys, position, key):
    keys[:1, :, position] = key[:1]


def write_with_gaps(keys, position, key):
    keys[:, :, : 2 * key.shape[2] : 2] = key


def write_one_token_everywhere(keys, position, key):
    keys[:, :, :5] = key[:, :, :1]


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (write_channels, "the cache is written at something else than whole tokens"),
        (write_one_sequence, "the cache is written at something else than whole tokens"),
        (write_with_gaps, "the cache is written with gaps"),
        (write_one_token_everywhere, "one token is written to several cache positions"),
    ],
)
def test_a_write_of_something_else_than_whole_tokens_is_left_alone(write, reason) -> None:
    def step(query, key, value, keys, values, position, mask):
        write(keys, position, key)
        write(values, position, value)
        return sdpa(query, keys, values, attn_mask=mask)

    given = assert_left_alone(step, buffers(), reason)
    assert type(given[3]) is torch.Tensor


def test_rows_that_an_index_chooses_are_left_alone_for_that_reason() -> None:
    """Regression: the analysis failed where what is read does not follow from the write by uses alone."""

    def step(query, key, value, keys, values, rows, position):
        keys[rows, :, position] = key[:, :, 0]
        values[rows, :, position] = value[:, :, 0]
        seen = torch.arange(keys.shape[2]) <= position[:, None]
        return sdpa(query, keys[rows], values[rows], attn_mask=seen[:, None, None])

    def given():
        cache = [torch.zeros(4, 2, 40, 16) for _ in range(2)]
        return *[tokens(1, seed=seed) for seed in range(3)], *cache, torch.tensor([3, 1]), position

    position = torch.tensor([0, 5])
    assert_left_alone(step, given, "only some rows of the cache are written or read")


def attend_to_one_head(query, keys, values, mask):
    return (query @ keys.mT).masked_fill(~mask, -torch.inf).softmax(-1) @ values


def write_in_place(keys, values, position, key, value):
    return keys.index_copy_(2, position, key), values.index_copy_(2, position, value)


def write_a_copy(keys, values, position, key, value):
    return keys.index_copy(2, position, key), values.index_copy(2, position, value)


def write_an_allocation(keys, values, position, key, value):
    return write_in_place(
        keys.new_zeros(2, 1, 64, 16), values.new_zeros(2, 1, 64, 16), position, key, value
    )


@pytest.mark.parametrize("write", [write_in_place, write_a_copy, write_an_allocation])
def test_a_view_that_an_attention_shares_with_another_reader_shows_that_new_tokens(
    write,
) -> None:
    """Regression: the new tokens are written behind the attention, and the other reader did not see them."""

    def step(query, key, value, keys, values, position, mask):
        key, value = key[:, :1], value[:, :1]
        keys, values = write(keys, values, position, key, value)
        one, other = keys.squeeze(1), values.squeeze(1)
        output = attend_to_one_head(query[:, 0], one, other, mask)
        return output + (query[:, 1] @ one.mT).exp().masked_fill(~mask, 0) @ other, keys, values

    first = 0 if write is write_an_allocation else 4
    reason = "the cache is read outside attention in the same call"
    if write is write_a_copy:
        assert_read_dense(step, of_one_head(first), reason)
    else:
        assert_rewritten(step, of_one_head(first))


def test_a_view_that_only_attentions_share_is_read_packed() -> None:
    def step(query, key, value, keys, values, position, mask):
        keys, values = write_in_place(keys, values, position, key[:, :1], value[:, :1])
        one, other = keys.squeeze(1), values.squeeze(1)
        outputs = [attend_to_one_head(query[:, head], one, other, mask) for head in (0, 1)]
        return torch.stack(outputs), one.shape[1]

    given = of_one_head(4)()
    with torch.no_grad(), watching() as graphs:
        output, _ = compile_(step)(*given)
        expected, _ = step(*of_one_head(4)())
    assert {site.outcome for graph in graphs for site in graph.sites} == {"rewritten"}
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)


def of_one_head(first: int):
    """Return what makes the arguments of a step over quantized buffers of one head."""

    def make():
        query, key, value, *caches, position, mask = buffers(first)()
        caches = [cache[:, :1].clone() for cache in caches]
        if first:
            quantize_cache_(caches, method="int8", sinks=1, window=256, page_size=32, length=first)
        return [query, key, value, *caches, position, mask]

    return make


def test_a_buffer_read_before_it_is_written_is_read_dense() -> None:
    """Regression: attention was shown the new tokens although it had read the cache before they were written."""

    def step(query, key, value, keys, values, position, mask):
        output = sdpa(query, keys, values, attn_mask=mask)
        keys.index_copy_(2, position, key)
        values.index_copy_(2, position, value)
        return output

    assert_read_dense(step, buffers(first=4, new=1), "the cache is read before it is written")


def test_tokens_changed_after_they_are_written_are_read_dense() -> None:
    """Regression: the write moves behind the attention and took the changed tokens along."""

    def step(query, key, value, keys, values, position, mask):
        key = key * 1
        keys.index_copy_(2, position, key)
        values.index_copy_(2, position, value)
        key.mul_(2)
        position.add_(1)
        return sdpa(query, keys, values, attn_mask=mask)

    assert_read_dense(
        step, buffers(), "what is written changes between the write and the attention"
    )


# Refused although the cache is quantized: read as ordinary tensors, kept quantized


def test_a_refused_attention_over_a_grown_cache_is_right_and_keeps_it_quantized() -> None:
    def step(query, key, value, keys, values):
        keys, values = join(keys, values, key, value)
        return torch.softmax(torch.erf(query @ keys.transpose(2, 3)), -1) @ values, keys, values

    compiled, state, plain = compile_(step), grown(quantized=True)()[3:], grown()()[3:]
    with torch.no_grad(), pytest.warns(KVQWarning, match="erf"):
        assert_grows_alike(compiled, step, state, plain)


def test_a_buffer_that_is_read_elsewhere_is_right() -> None:
    def step(query, key, value, keys, values, position, mask):
        keys = keys.index_copy_(2, position, key)
        values = values.index_copy_(2, position, value)
        return sdpa(query, keys, values, attn_mask=mask) + keys.mean(), keys

    given = assert_rewritten(step, buffers(4, quantized=True))
    assert given[3].held() == 9


def test_a_quantized_cache_may_pass_through() -> None:
    """Regression: a cache that a call hands back unchanged crashed the backend."""

    def step(keys, x):
        return keys, x + keys.sum()

    keys = grown(quantized=True)()[3]
    same, total = compile_(step)(keys, torch.zeros(()))
    assert isinstance(same, QuantizedKV)
    torch.testing.assert_close(same.dequantize(), keys.dequantize())
    torch.testing.assert_close(total, keys.dequantize().sum())


def test_a_quantized_buffer_can_be_emptied_in_the_graph() -> None:
    def step(keys, x):
        keys.zero_()
        return x + 1

    keys = buffers(4, quantized=True)()[3]
    compile_(step)(keys, torch.zeros(()))
    assert keys.held() == 0


def test_a_write_that_a_quantized_buffer_cannot_take_thaws_it_and_is_not_lost() -> None:
    """Regression: a write into a view went into a copy."""

    def step(keys, x):
        keys[:, :, 1:2, :8].copy_(x)
        return keys + 1

    keys, x = buffers(4, quantized=True)()[3], tokens(1)[..., :8]
    expected = keys.dequantize()
    with pytest.warns(KVQWarning, match="copy_ writes"):
        result = compile_(step)(keys, x)
    expected[:, :, 1:2, :8] = x
    assert type(keys) is torch.Tensor
    assert torch.equal(keys, expected)
    assert torch.equal(result, expected + 1)


def test_keys_and_values_of_different_length_are_an_error() -> None:
    def step(query, key, value, keys, values):
        keys, values = join(keys, values, key, value)
        return sdpa(query, keys, values), keys, values

    compiled = compile_(step)
    for new in (2, 1, 1):
        compiled(*grown(40 + new, new, quantized=True)())
    query, key, value, keys, _ = grown(quantized=True)()
    told = "equally many tokens|must match|Expected|different numbers of tokens"  # Dynamo decides
    with pytest.raises((ValueError, RuntimeError), match=told):
        compiled(query, key, value, keys, grown(45, quantized=True)()[4])


@pytest.mark.parametrize(
    ("heads", "reason"),
    [
        (4, "the cache reaches attention through repeat; repeat heads next to one another"),
        (2, "keys have 2 KV heads and values 1"),
    ],
)
def test_values_whose_heads_are_paired_with_others_are_told_as_such(heads, reason) -> None:
    """Regression: behind ``chunk``, whose result is a tuple, a cache was taken for something computed anew; and keys of
    two heads were read beside values of one, which the kernel refused when it ran.
    """

    def step(query, key, value, keys, values):
        keys, values = join(keys, values, key, value)
        halves = torch.chunk(values, 2, dim=1)
        outputs = [sdpa(query, keys, half.repeat(1, 2, 1, 1)) for half in halves]
        return torch.cat(outputs, -1), keys, values

    given = [tokens(count, heads, seed) for seed, count in enumerate((1, 1, 1, 40, 40))]
    plain, compiled = [*given], compile_(step)
    for _ in range(2):
        with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            output, *given[3:] = compiled(*given)
            expected, *plain[3:] = step(*plain)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
        assert any(reason in str(told.message) for told in caught)
    assert all(type(cache) is not torch.Tensor for cache in given[3:])
