"""Every spelling of attention over a cache that is recognised becomes the same two ops and the same numbers."""

import math
from collections import Counter

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvq_compile import QuantizedKV
from kvq_compile.backend import compile_graph
from kvq_compile.lowering.nodes import target_name
from kvq_compile.lowering.pipeline import lower
from kvq_compile.options import make_config

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

# All tokens of these tests lie in the exact window, so that any slip of a mask or a slot shows at full size.
EXACT = {"method": "int8", "sinks": 1, "window": 256, "page_size": 32, "inner": "eager"}
SLOTS = 64
HIDDEN = torch.finfo(torch.float32).min


class Recorder:
    """A backend that counts the calls of each graph before and after the rewriting."""

    def __init__(self, **options) -> None:
        self.config = make_config(EXACT | options)
        self.before: list[Counter] = []
        self.after: list[Counter] = []
        self.details: list[str] = []

    def __call__(self, gm, inputs, **_):
        lowered = lower(gm, inputs, self.config.spec)
        self.before.append(count(gm.graph))
        self.after.append(count(lowered.module.graph))
        self.details += [site.detail for site in lowered.reports]
        return compile_graph(gm, inputs, self.config)

    @property
    def last(self) -> Counter:
        """Counts of the last graph after the rewriting."""
        return self.after[-1]


def count(graph) -> Counter:
    names = (target_name(node).removesuffix(".default") for node in graph.nodes)
    return Counter(filter(None, names))


def tokens(number: int, heads: int = 2, seed: int = 0, batch: int = 2) -> torch.Tensor:
    return torch.randn(
        batch, heads, number, 16, generator=torch.Generator().manual_seed(seed + 100 * number)
    )


def causal_mask(first: int, new: int, slots: int) -> torch.Tensor:
    return torch.arange(slots)[None] <= torch.arange(first, first + new)[:, None]


def repeat_kv(x: torch.Tensor, times: int) -> torch.Tensor:
    B, H, S, D = x.shape
    return x[:, :, None].expand(B, H, times, S, D).reshape(B, H * times, S, D)


def as_products(query, key, value, mask=None, scale=0.25):
    scores = torch.matmul(query, key.transpose(2, 3)) * scale
    if mask is not None:
        scores = scores + mask
    return torch.matmul(
        torch.nn.functional.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype), value
    )


@torch.no_grad()
def grow(step, lengths=(1, 1, 3), query_heads=4, heads=2, masked=False):
    """Feed new tokens to a step that returns its grown cache."""
    keys, values, outputs = tokens(40, heads), tokens(40, heads, seed=1), []
    for new in lengths:
        mask = (causal_mask(keys.shape[2], new, keys.shape[2] + new),) if masked else ()
        query, key, value = (
            tokens(new, query_heads, 2),
            tokens(new, heads, 3),
            tokens(new, heads, 4),
        )
        output, keys, values = step(query, key, value, keys, values, *mask)
        outputs.append(output)
    return outputs, (keys, values)


@torch.no_grad()
def fill(step, lengths=(5, 1, 1, 3), query_heads=4, heads=2):
    """Feed new tokens to a step that writes them into buffers of fixed size."""
    keys, values = torch.zeros(2, heads, SLOTS, 16), torch.zeros(2, heads, SLOTS, 16)
    outputs, first = [], 0
    for new in lengths:
        position, mask = torch.arange(first, first + new), causal_mask(first, new, SLOTS)
        query, key, value = (
            tokens(new, query_heads, 2),
            tokens(new, heads, 3),
            tokens(new, heads, 4),
        )
        outputs.append(step(query, key, value, keys, values, position, mask))
        first += new
    return outputs, (keys, values)


def assert_same(feed, step, recorder, **options) -> None:
    expected, plain = feed(step, **options)
    outputs, caches = feed(torch.compile(step, backend=recorder), **options)
    for output, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)
    for cache, wanted in zip(caches, plain, strict=True):
        assert isinstance(cache, QuantizedKV)
        torch.testing.assert_close(
            cache.dequantize()[:, :, : cache.held()], wanted[:, :, : cache.held()]
        )


# Grown caches


def grown_grouped(query, key, value, keys, values):
    keys, values = torch.cat([keys, key], 2), torch.cat([values, value], dim=-2)
    return sdpa(query, keys, values, enable_gqa=True), keys, values


def grown_repeated(query, key, value, keys, values):
    keys, values = torch.cat((keys, key), dim=2), torch.cat((values, value), dim=2)
    return sdpa(query, repeat_kv(keys, 2), repeat_kv(values, 2), scale=0.5), keys, values


def grown_interleaved(query, key, value, keys, values):
    keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
    return (
        sdpa(query, keys.repeat_interleave(2, 1), torch.repeat_interleave(values, 2, dim=1)),
        keys,
        values,
    )


def grown_products(query, key, value, keys, values):
    keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
    return as_products(query, repeat_kv(keys, 2), repeat_kv(values, 2)), keys, values


def grown_divided(query, key, value, keys, values):
    keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
    scores = query @ keys.repeat_interleave(2, 1).permute(0, 1, 3, 2) / math.sqrt(16)
    return scores.softmax(-1) @ values.repeat_interleave(2, 1), keys, values


def grown_causal(query, key, value, keys, values):
    keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
    return sdpa(query, keys, values, is_causal=True, enable_gqa=True), keys, values


@pytest.mark.parametrize(
    "step",
    [grown_grouped, grown_repeated, grown_interleaved, grown_products, grown_divided, grown_causal],
)
def test_a_cache_grown_by_cat_is_attended_to_quantized(step) -> None:
    recorder = Recorder()
    assert_same(grow, step, recorder)
    assert recorder.before[-1]["cat"] == 2
    assert recorder.last["attend"] == 1
    assert recorder.last["append_both_"] == 1
    assert not recorder.last.keys() & {
        "cat",
        "softmax",
        "scaled_dot_product_attention",
        "dequantize",
        "matmul",
    }


def test_a_causal_flag_counts_from_the_first_slot_as_pytorch_does() -> None:
    def step(query, key, value, keys, values):
        return grown_causal(query, key, value, keys, values)

    outputs, _ = grow(torch.compile(step, backend=Recorder()), lengths=(1, 3))
    keys, values = tokens(40), tokens(40, seed=1)
    torch.testing.assert_close(outputs[1][:, ::2, 0], values[:, :, 0], rtol=1e-4, atol=1e-5)
    del keys


def test_one_kv_head_serves_all_query_heads() -> None:
    def by_flag(query, key, value, keys, values):
        return grown_grouped(query, key, value, keys, values)

    def by_broadcast(query, key, value, keys, values):
        keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        return as_products(query, keys, values), keys, values

    def by_expand(query, key, value, keys, values):
        keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        return sdpa(query, keys.expand(-1, 4, -1, -1), values.expand(-1, 4, -1, -1)), keys, values

    for step in (by_flag, by_broadcast, by_expand):
        recorder = Recorder()
        assert_same(grow, step, recorder, heads=1)
        assert recorder.last["attend"] == 1


def masked_sdpa(query, keys, values, mask):
    return sdpa(query, keys, values, attn_mask=mask, enable_gqa=True)


def masked_additive(query, keys, values, mask):
    bias = torch.where(mask, 0.0, HIDDEN)
    return as_products(query, repeat_kv(keys, 2), repeat_kv(values, 2), bias)


def masked_fill(query, keys, values, mask):
    scores = query @ repeat_kv(keys, 2).mT / 4
    return scores.masked_fill(mask == 0, float("-inf")).softmax(dim=-1) @ repeat_kv(values, 2)


def masked_where(query, keys, values, mask):
    scores = 0.25 * (query @ repeat_kv(keys, 2).swapaxes(-1, -2))
    return torch.softmax(torch.where(mask, scores, -torch.inf), -1) @ repeat_kv(values, 2)


def masked_in_place(query, keys, values, mask):
    scores = torch.matmul(query, repeat_kv(keys, 2).transpose(-1, -2))
    scores /= 4.0
    scores += torch.where(mask, 0.0, HIDDEN)
    return torch.softmax(scores, -1) @ repeat_kv(values, 2)


@pytest.mark.parametrize(
    "attention", [masked_sdpa, masked_additive, masked_fill, masked_where, masked_in_place]
)
def test_a_mask_goes_into_the_op(attention) -> None:
    def step(query, key, value, keys, values, mask):
        keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        return attention(query, keys, values, mask), keys, values

    recorder = Recorder()
    assert_same(grow, step, recorder, lengths=(2, 1, 1, 3), masked=True)
    assert recorder.last["attend"] == 1
    assert not recorder.last.keys() & {
        "cat",
        "softmax",
        "scaled_dot_product_attention",
        "dequantize",
        "matmul",
    }


def test_a_prompt_of_one_token_has_a_mask_of_one_column() -> None:
    def first(query, key, value, mask):
        key, value = key * 1, value * 1
        return sdpa(query, key, value, attn_mask=mask), key, value

    arguments = tokens(1), tokens(1, seed=1), tokens(1, seed=2), torch.zeros(2, 1, 1, 1)
    with torch.no_grad():
        output, *cache = torch.compile(first, backend=Recorder(strict=True))(*arguments)
    torch.testing.assert_close(output, first(*arguments)[0])
    assert all(isinstance(tensor, QuantizedKV) for tensor in cache)


def test_dropout_that_does_nothing_is_seen_through() -> None:
    def step(query, key, value, keys, values):
        keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        weights = torch.softmax(query @ keys.transpose(-1, -2), -1)
        return torch.nn.functional.dropout(weights, 0.1, training=False) @ values, keys, values

    recorder = Recorder()
    assert_same(grow, step, recorder, query_heads=2)
    assert recorder.last["attend"] == 1


def test_growing_lengths_are_one_graph() -> None:
    recorder = Recorder()
    grow(torch.compile(grown_grouped, backend=recorder), lengths=(1,) * 8)
    assert len(recorder.after) == 2  # a plain cache, a quantized one of any length


# Buffers of fixed size


def buffer_index_copy(query, key, value, keys, values, position, mask):
    keys.index_copy_(2, position, key)
    values.index_copy_(2, position, value)
    return sdpa(query, keys, values, attn_mask=mask, enable_gqa=True)


def buffer_chained(query, key, value, keys, values, position, mask):
    return sdpa(
        query,
        repeat_kv(keys.index_copy_(2, position, key), 2),
        repeat_kv(values.index_copy_(2, position, value), 2),
        attn_mask=mask,
    )


def buffer_assigned(query, key, value, keys, values, position, mask):
    keys[:, :, position] = key
    values[:, :, position] = value
    return sdpa(query, keys, values, attn_mask=mask, enable_gqa=True)


def buffer_assigned_fully(query, key, value, keys, values, position, mask):
    keys[:, :, position, :] = key
    values[..., position, :] = value
    return as_products(
        query, repeat_kv(keys, 2), repeat_kv(values, 2), torch.where(mask, 0.0, HIDDEN)
    )


@pytest.mark.parametrize("step", [buffer_index_copy, buffer_chained, buffer_assigned])
def test_a_buffer_written_in_place_becomes_quantized_and_is_read_so(step) -> None:
    recorder = Recorder()
    assert_same(fill, step, recorder)
    assert recorder.last["attend"] == 1
    assert recorder.last["append_both_"] == 1
    written = {"index_copy_", "setitem", "scaled_dot_product_attention", "dequantize", "softmax"}
    assert not recorder.last.keys() & written
    assert len(recorder.after) == 3  # a plain buffer, one token, several tokens


def test_only_the_slots_read_are_masked() -> None:
    def step(query, key, value, keys, values, position, mask, end: int):
        keys[:, :, position] = key
        values[:, :, position] = value
        return sdpa(
            query, keys[:, :, :end], values[:, :, :end], attn_mask=mask[:, :end], enable_gqa=True
        )

    def at(query, key, value, keys, values, position, mask):
        return compiled(query, key, value, keys, values, position, mask, int(position[-1]) + 1)

    recorder = Recorder()
    compiled = step
    expected, _ = fill(at)
    compiled = torch.compile(step, backend=recorder, dynamic=True)
    for output, wanted in zip(fill(at)[0], expected, strict=True):
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)
    assert recorder.last["attend"] == 1


def test_a_slice_of_known_slots_needs_no_mask() -> None:
    def step(query, key, value, keys, values, first: int):
        end = first + key.shape[2]
        keys[:, :, first:end] = key
        values[:, :, first:end] = value
        return sdpa(query, keys[:, :, :end], values[:, :, :end], enable_gqa=True)

    def at(query, key, value, keys, values, position, mask):
        return compiled(query, key, value, keys, values, int(position[0]))

    recorder = Recorder()
    compiled = step
    expected, _ = fill(at)
    compiled = torch.compile(step, backend=recorder)
    outputs, caches = fill(at)
    for output, wanted in zip(outputs, expected, strict=True):
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)
    assert recorder.last["attend"] == 1
    assert all(isinstance(cache, QuantizedKV) for cache in caches)


def test_positions_changed_in_place_afterwards_do_not_move_the_write() -> None:
    """Regression: the slots were read when the call was over, and a model that counts in place was off by one."""

    def step(query, key, value, keys, values, position, mask):
        keys[:, :, position] = key
        values[:, :, position] = value
        output = sdpa(query, keys, values, attn_mask=mask, enable_gqa=True)
        position.add_(key.shape[2])
        return output

    assert_same(fill, step, Recorder())


# Caches allocated in the call


def allocate(query, key, value, position, mask):
    keys = torch.zeros(2, 2, SLOTS, 16)
    values = key.new_zeros((2, 2, SLOTS, 16))
    keys.index_copy_(2, position, key)
    values[:, :, position] = value
    return sdpa(query, keys, values, attn_mask=mask, enable_gqa=True), keys, values


def test_a_cache_allocated_in_the_call_is_never_allocated_in_16_bit() -> None:
    recorder = Recorder()
    arguments = (
        tokens(7, 4, 2),
        tokens(7),
        tokens(7, seed=1),
        torch.arange(7),
        causal_mask(0, 7, SLOTS),
    )
    expected, *plain = allocate(*arguments)
    output, *caches = torch.compile(allocate, backend=recorder)(*arguments)
    torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)
    assert not recorder.last.keys() & {"zeros", "new_zeros", "index_copy_", "setitem"}
    for cache, wanted in zip(caches, plain, strict=True):
        assert isinstance(cache, QuantizedKV)
        torch.testing.assert_close(cache.dequantize(), wanted)


def test_a_mask_that_shows_an_empty_slot_of_a_new_cache_is_an_error() -> None:
    """Regression: the columns behind the call's own tokens were cut off unread."""
    mask = causal_mask(0, 7, SLOTS)
    mask[:, 20] = True
    with pytest.raises((RuntimeError, AssertionError), match="must hide the cache positions"):
        torch.compile(allocate, backend=Recorder())(
            tokens(7, 4, 2), tokens(7), tokens(7, seed=1), torch.arange(7), mask
        )


def test_keys_of_a_first_call_are_returned_quantized() -> None:
    def first(query, key, value):
        keys, values = key * 2, value + 1
        return sdpa(query, keys, values, is_causal=True, enable_gqa=True), keys, values

    recorder = Recorder()
    compiled = torch.compile(first, backend=recorder)
    for length in (40, 41, 50):
        output, keys, values = compiled(tokens(length, 4), tokens(length), tokens(length))
        assert isinstance(keys, QuantizedKV)
        assert isinstance(values, QuantizedKV)
        assert keys.shape == (2, 2, length, 16)
        torch.testing.assert_close(
            output, first(tokens(length, 4), tokens(length), tokens(length))[0]
        )
    assert recorder.last["quantize"] == 2
    assert len(recorder.after) == 2


def test_fresh_keys_may_be_joined_from_channels() -> None:
    """Regression: keys that end in a cat of rotated and passed channels were refused as grown oddly."""

    def first(query, keys, values):
        keys, values = keys * 1.0, values * 1.0
        keys = torch.cat([-keys[..., 8:], keys[..., :8]], -1)
        return sdpa(query, keys, values), keys, values

    query, keys, values = tokens(5), tokens(5, seed=1), tokens(5, seed=2)
    compiled = torch.compile(first, backend=Recorder())
    output, new_keys, new_values = compiled(query, keys, values)
    assert isinstance(new_keys, QuantizedKV)
    assert isinstance(new_values, QuantizedKV)
    assert torch.allclose(output, first(query, keys, values)[0], atol=1e-5)
