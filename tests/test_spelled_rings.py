"""A ring is known by what is computed: in any spelling, and not where other tokens are kept than the last."""

import warnings

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvq_compile import KVQWarning, QuantizedKV
from kvq_compile.history import watching
from refused_steps import tokens
from static_rings import LAYOUT, OPTIONS, SLOTS, SPEC, fill
from thorough import spread

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def roll_right(cache, key):
    rolled = cache.roll(1, dims=2)
    rolled[:, :, :1] = key
    return rolled


def write_last_but_one(cache, key):
    rolled = cache.roll(-1, dims=2)
    rolled[:, :, -2:-1] = key
    return rolled


def skip_one(cache, key):
    return torch.cat([cache[:, :, 2:], key, key], 2)


def keep_the_first(cache, key):
    return torch.cat([cache[:, :, :1], cache[:, :, 2:], key], 2)


def scale(cache, key):
    return torch.cat([cache[:, :, 1:] * 0.99, key], 2)


def swap_heads(cache, key):
    return torch.cat([cache[:, :, 1:].flip(1), key], 2)


def make_other(rolled):
    def step(query, key, value, keys, values, mask):
        keys.copy_(rolled(keys, key))
        values.copy_(rolled(values, value))
        return sdpa(query, keys, values, attn_mask=mask)

    return step


OTHERS = [roll_right, write_last_but_one, skip_one, keep_the_first, scale, swap_heads]


def full_caches() -> list[torch.Tensor]:
    return [tokens(SLOTS, seed=3), tokens(SLOTS, seed=4)]


@pytest.mark.filterwarnings("ignore::kvq_compile.KVQWarning")
@pytest.mark.parametrize(("rolled", "packed_before"), spread(OTHERS, [False, True], 2))
def test_what_does_not_keep_the_last_tokens_in_order_is_no_ring(rolled, packed_before) -> None:
    """It runs as captured, in 16 bit, and a cache that is packed already becomes an ordinary tensor."""
    step = make_other(rolled)
    compiled = torch.compile(step, backend="kvq", options=OPTIONS | {"inner": "eager"})
    caches = full_caches()
    if packed_before:
        layouts = LAYOUT, SPEC.layout("value", 16)
        caches = [
            QuantizedKV.from_dense(x, layout, kind="ring")
            for x, layout in zip(caches, layouts, strict=True)
        ]
    plain = [x.dequantize() if packed_before else x.clone() for x in caches]
    with torch.no_grad(), watching() as graphs:
        for number in range(3):
            query, key, value = (tokens(1, seed=s + number) for s in range(3))
            mask = torch.ones(1, SLOTS, dtype=torch.bool)
            expected = step(query, key, value, *plain, mask)
            torch.testing.assert_close(compiled(query, key, value, *caches, mask), expected)
    assert all(type(x) is torch.Tensor for x in caches)
    assert all(torch.equal(x, y) for x, y in zip(caches, plain, strict=True))
    assert {site.outcome for graph in graphs for site in graph.sites} == {"left alone"}


def by_slices(cache, key):
    return torch.cat([cache, key], 2)[:, :, -SLOTS:]


def by_narrow(cache, key):
    new = key.shape[2]
    return torch.cat([cache.narrow(2, new, SLOTS - new), key], 2)


def by_index(cache, key):
    moved = cache.index_select(2, torch.arange(1, SLOTS + 1).clamp(max=SLOTS - 1))
    return torch.where(torch.arange(SLOTS)[:, None] == SLOTS - 1, key, moved)


def with_other_tokens(cache, key):
    return torch.cat([cache[:, :, 1:], 2 * key.flip(0)], 2)


def by_pad(cache, key):
    rolled = torch.nn.functional.pad(cache[:, :, 1:], (0, 0, 0, 1))
    rolled[:, :, -1:] += key
    return rolled


@pytest.mark.parametrize("rolled", [by_slices, by_narrow, by_index, by_pad, with_other_tokens])
def test_a_ring_is_known_by_what_is_computed_not_by_its_spelling(rolled) -> None:
    step = make_other(rolled)
    compiled = torch.compile(step, backend="kvq", options=OPTIONS | {"inner": "eager"})
    caches = full_caches()
    with torch.no_grad(), watching() as graphs:
        for number in range(100):
            query, key, value = (tokens(1, seed=s + number) for s in range(3))
            plain = [x.dequantize() if isinstance(x, QuantizedKV) else x.clone() for x in caches]
            mask = torch.ones(1, SLOTS, dtype=torch.bool)
            expected = step(query, key, value, *plain, mask)
            output = compiled(query, key, value, *caches, mask)
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert all(x.kind == "ring" for x in caches)
    assert {site.outcome for graph in graphs for site in graph.sites} == {"rewritten"}


def test_without_a_mask_all_of_a_ring_is_seen_and_nothing_else() -> None:
    def step(query, key, value, keys, values):
        keys.copy_(by_slices(keys, key))
        values.copy_(by_slices(values, value))
        return sdpa(query, keys, values)

    compiled = torch.compile(step, backend="kvq", options=OPTIONS | {"inner": "eager"})
    caches = full_caches()
    with torch.no_grad():
        for number in range(100):
            query, key, value = (tokens(1, seed=s + number) for s in range(3))
            plain = [x.dequantize() if isinstance(x, QuantizedKV) else x.clone() for x in caches]
            expected = step(query, key, value, *plain)
            output = compiled(query, key, value, *caches)
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert all(x.kind == "ring" for x in caches)


@pytest.mark.parametrize(("held", "told"), [(40, "before it is full"), (0, "before it is full")])
def test_a_buffer_that_is_rolled_before_it_is_full_becomes_an_ordinary_tensor(held, told) -> None:
    """Its empty slots would have to move, too."""
    step = make_other(by_slices)
    layouts = LAYOUT, SPEC.layout("value", 16)
    caches = [
        QuantizedKV.from_dense(x, layout, kind="static", length=held)
        for x, layout in zip(full_caches(), layouts, strict=True)
    ]
    plain = [x.dequantize() for x in caches]
    compiled = torch.compile(step, backend="kvq", options=OPTIONS | {"inner": "eager"})
    query, key, value = (tokens(1, seed=s) for s in range(3))
    mask = torch.ones(1, SLOTS, dtype=torch.bool)
    with torch.no_grad(), pytest.warns(KVQWarning, match=told):
        output = compiled(query, key, value, *caches, mask)
    torch.testing.assert_close(output, step(query, key, value, *plain, mask))
    assert all(type(x) is torch.Tensor for x in caches)
    assert all(torch.equal(x, y) for x, y in zip(caches, plain, strict=True))


@pytest.mark.parametrize("held", [30, 50, SLOTS, 90])
def test_a_buffer_that_is_written_behind_other_tokens_than_it_holds_becomes_an_ordinary_tensor(
    held,
) -> None:
    """Of a cache that holds as many, or more and has not wrapped, the tokens behind are dropped."""

    def step(query, key, value, keys, values, mask):
        joined = torch.cat([keys[:, :, :50], key], 2), torch.cat([values[:, :, :50], value], 2)
        keys.copy_(joined[0][:, :, -SLOTS:])
        values.copy_(joined[1][:, :, -SLOTS:])
        return sdpa(query, *joined, attn_mask=mask)

    caches = [fill(held, layout) for layout in (LAYOUT, SPEC.layout("value", 16))]
    plain = [x.dequantize() for x in caches]
    compiled = torch.compile(step, backend="kvq", options=OPTIONS | {"inner": "eager"})
    query, key, value = (tokens(30, seed=s) for s in range(3))
    mask = torch.ones(30, 80, dtype=torch.bool).tril(50)
    with torch.no_grad(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        output = compiled(query, key, value, *caches, mask)
    expected = step(query, key, value, *plain, mask)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    fits = held in (50, SLOTS)
    assert all(isinstance(x, QuantizedKV) is fits for x in caches)
    assert any("another number of tokens" in str(warning.message) for warning in told) is not fits


def test_slots_of_a_ring_that_has_wrapped_are_not_written_quantized() -> None:
    def step(query, key, value, keys, values, position, mask):
        keys.index_copy_(2, position, key)
        values.index_copy_(2, position, value)
        return sdpa(query, keys, values, attn_mask=mask)

    caches = [fill(100, layout) for layout in (LAYOUT, SPEC.layout("value", 16))]
    plain = [x.dequantize() for x in caches]
    compiled = torch.compile(step, backend="kvq", options=OPTIONS | {"inner": "eager"})
    query, key, value = (tokens(1, seed=s) for s in range(3))
    mask = (torch.arange(SLOTS) <= 60)[None]
    about = torch.tensor([60]), mask
    with torch.no_grad(), pytest.warns(KVQWarning, match="keeps the last tokens"):
        output = compiled(query, key, value, *caches, *about)
    torch.testing.assert_close(output, step(query, key, value, *plain, *about))
    assert all(torch.equal(x, y) for x, y in zip(caches, plain, strict=True))


def test_a_ring_that_is_read_elsewhere_too_is_read_dense() -> None:
    def step(query, key, value, keys, values, mask):
        norm = keys.square().sum()
        keys.copy_(by_slices(keys, key))
        values.copy_(by_slices(values, value))
        return sdpa(query, keys, values, attn_mask=mask), norm

    compiled = torch.compile(step, backend="kvq", options=OPTIONS | {"inner": "eager"})
    caches, mask = full_caches(), torch.ones(1, SLOTS, dtype=torch.bool)
    dense = pytest.warns(KVQWarning, match="read their caches dense.*read outside attention")
    with torch.no_grad(), dense:
        for number in range(80):
            query, key, value = (tokens(1, seed=s + number) for s in range(3))
            plain = [x.dequantize() if isinstance(x, QuantizedKV) else x.clone() for x in caches]
            expected = step(query, key, value, *plain, mask)
            for got, wanted in zip(
                compiled(query, key, value, *caches, mask), expected, strict=True
            ):
                torch.testing.assert_close(got, wanted)
    assert all(x.kind == "ring" for x in caches)


@pytest.mark.filterwarnings("ignore::kvq_compile.KVQWarning")
def test_what_was_found_of_one_layer_is_not_taken_for_another_that_differs() -> None:
    def step(query, key, value, one, two, mask):
        for caches, factor in ((one, 1.0), (two, 0.5)):
            for cache, new in zip(caches, (key, value), strict=True):
                cache.copy_(torch.cat([cache[:, :, 1:] * factor, new], 2))
            query = sdpa(query, *caches, attn_mask=mask)
        return query

    compiled = torch.compile(step, backend="kvq", options=OPTIONS | {"inner": "eager"})
    one, two, mask = full_caches(), full_caches(), torch.ones(1, SLOTS, dtype=torch.bool)
    plain = [x.clone() for x in two]
    with torch.no_grad():
        for number in range(3):
            query, key, value = (tokens(1, seed=s + number) for s in range(3))
            step(query, key, value, full_caches(), plain, mask)
            compiled(query, key, value, one, two, mask)
    assert all(x.kind == "ring" for x in one)
    assert all(torch.equal(x, y) for x, y in zip(two, plain, strict=True))
