"""A fixed-size cache that a call updates by making a new tensor is served packed, however that is spelled."""

import copy
import functools
from collections.abc import Callable, Iterator

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import one_hot, pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvq_compile import KVQWarning, QuantizedKV
from kvq_compile.history import watching
from thorough import few

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

OPTIONS = {"method": "int2", "sinks": 1, "window": 4, "page_size": 32, "inner": "eager"}
SLOTS, HELD = 80, 40
Update = Callable[[Tensor, Tensor, int, Tensor], Tensor]  # cache, positions, the first one, tokens


def held(position: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a one-hot row of cache positions a token."""
    return one_hot(position, SLOTS).to(dtype)


def by_slices(past: Tensor, position: Tensor, first: int, new: Tensor) -> Tensor:
    return torch.cat([past[:, :, :first], new, past[:, :, first + new.shape[2] :]], 2)


def by_copies(past: Tensor, position: Tensor, first: int, new: Tensor) -> Tensor:
    made = torch.zeros(past.shape)
    made.copy_(past)
    made.narrow(2, first, new.shape[2]).copy_(new)
    return made


def by_assignment(past: Tensor, position: Tensor, first: int, new: Tensor) -> Tensor:
    made = past.clone()
    made[:, :, position] = new
    return made


def by_index_put(past: Tensor, position: Tensor, first: int, new: Tensor, add=False) -> Tensor:
    rows, heads = torch.arange(past.shape[0]), torch.arange(past.shape[1])
    return torch.index_put(past, (rows[:, None, None], heads[:, None], position), new, add)


def by_where(past: Tensor, position: Tensor, first: int, new: Tensor) -> Tensor:
    slots, last = torch.arange(SLOTS), first + new.shape[2]
    spread = pad(new, (0, 0, first, SLOTS - last))
    return torch.where(((slots >= first) & (slots < last))[:, None], spread, past)


def by_one_hot(past: Tensor, position: Tensor, first: int, new: Tensor) -> Tensor:
    places = held(position, new.dtype)
    return past * (1 - places.sum(0))[:, None] + (places[:, :, None] * new[:, :, :, None]).sum(2)


def by_product(past: Tensor, position: Tensor, first: int, new: Tensor) -> Tensor:
    places = held(position, new.dtype)
    return past * (1 - places.sum(0))[:, None] + places.mT @ new


def by_einsum(past: Tensor, position: Tensor, first: int, new: Tensor) -> Tensor:
    places = held(position, new.dtype)
    return past.mul(1 - places.sum(0)[:, None]).add(torch.einsum("ts,bhtd->bhsd", places, new))


UPDATES: dict[str, Update] = {
    "index_copy": lambda past, position, first, new: past.index_copy(2, position, new),
    "scatter": lambda past, position, first, new: past.scatter(
        2, position[None, None, :, None].expand_as(new), new
    ),
    "slice_scatter": lambda past, position, first, new: past.slice_scatter(
        new, 2, first, first + new.shape[2]
    ),
    "clone and index_copy_": lambda past, position, first, new: past.clone().index_copy_(
        2, position, new
    ),
    "slices": by_slices,
    "copies": by_copies,
    "assignment": by_assignment,
    "index_put": by_index_put,
    "where": by_where,
    "one-hot sum": by_one_hot,
    "one-hot product": by_product,
    "einsum": by_einsum,
}
CHANGED: dict[str, Update] = {
    "index_copy": lambda past, position, first, new: past.index_copy(2, position, new) * 1.5,
    "index_copy of others": lambda past, position, first, new: past.flip(2).index_copy(
        2, position, new
    ),
    "index_add": lambda past, position, first, new: past.index_add(2, position, new),
    "scatter": lambda past, position, first, new: past.neg().scatter(
        2, position[None, None, :, None].expand_as(new), new
    ),
    "slice_scatter": lambda past, position, first, new: past.roll(1, 2).slice_scatter(
        new, 2, first, first + new.shape[2]
    ),
    "clone and index_copy_": lambda past, position, first, new: (
        past.clone().index_copy_(2, position, new).mul_(2)
    ),
    "slices": lambda past, position, first, new: torch.cat(
        [past[:, :, new.shape[2] :], new], 2
    ),  # a sliding window
    "index_put": lambda past, position, first, new: by_index_put(past, position, first, new, True),
    "where": lambda past, position, first, new: torch.where(
        (torch.arange(SLOTS) >= first)[:, None], new[:, :, :1], past
    ),
    "one-hot sum": lambda past, position, first, new: past + held(position, new.dtype).mT @ new,
    "one-hot product": lambda past, position, first, new: (
        past * (1 - held(position, new.dtype).sum(0))[:, None]
        + 2 * (held(position, new.dtype).mT @ new)
        - held(position, new.dtype).mT @ new.flip(1)
    ),
}


def attention(update: Update):
    """Return a step of a decoder whose cache is updated so."""

    def step(query, key, value, keys, values, position, first):
        keys, values = update(keys, position, first, key), update(values, position, first, value)
        mask = torch.arange(SLOTS) <= position[:, None]
        return sdpa(query, keys, values, attn_mask=mask), keys, values

    return step


def drawn(count: int, number: int, seed: int = 0) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(2, 2, count, 32, generator=generator) for _ in range(number))


def plain_caches() -> list[Tensor]:
    return [pad(tokens, (0, 0, 0, SLOTS - HELD)) for tokens in drawn(HELD, 2, seed=9)]


def generate(run, keys, values, counts=(3, 1, 2, 1, 1), first=HELD) -> tuple[list, Tensor, Tensor]:
    """Return the outputs of some calls, and keys and values after them."""
    outputs = []
    for number, count in enumerate(counts):
        position = torch.arange(first, first + count)
        output, keys, values = run(*drawn(count, 3, number), keys, values, position, first)
        outputs.append(output)
        first += count
    return outputs, keys, values


def compiled(update: Update, **options):
    return torch.compile(attention(update), backend="kvq", options=OPTIONS | options)


def written_in_place(query, key, value, keys, values, position, first):
    keys.index_copy_(2, position, key)
    values.index_copy_(2, position, value)
    mask = torch.arange(SLOTS) <= position[:, None]
    return sdpa(query, keys, values, attn_mask=mask), keys, values


@functools.cache
def in_place() -> tuple[list, Tensor, Tensor]:
    with torch.no_grad():
        return generate(
            torch.compile(written_in_place, backend="kvq", options=OPTIONS), *plain_caches()
        )


@pytest.mark.parametrize("name", list(UPDATES))
def test_every_spelling_of_an_update_is_served_as_a_write_in_place_is(name: str) -> None:
    """Regression: all but the write in place stayed in 16 bit, or were quantized anew as a whole."""
    expected = in_place()
    torch._dynamo.reset()
    with torch.no_grad(), watching() as graphs:
        outputs, keys, values = generate(compiled(UPDATES[name], strict=True), *plain_caches())
    states = [state for graph in graphs for state in graph.states]
    assert {state.outcome for state in states} == {"quantized"}
    assert {state.name for state in states} == {"L['keys']", "L['values']"}
    torch.testing.assert_close(outputs, expected[0], rtol=0, atol=0)
    for mine, theirs in zip((keys, values), expected[1:], strict=True):
        assert isinstance(mine, QuantizedKV) and mine.kind == "static"
        torch.testing.assert_close(mine.parts, theirs.parts, rtol=0, atol=0)  # coded once


@pytest.mark.parametrize("name", list(CHANGED))
def test_what_is_no_update_stays_in_16_bit_and_is_told(name: str) -> None:
    """The twins of `UPDATES`: elements change, or stand elsewhere, or new ones are added to old ones."""
    plain, *plain_kept = generate(attention(CHANGED[name]), *plain_caches())
    told = "index_add adds to" if name == "index_add" else r"L\['keys'\]"
    with torch.no_grad(), watching() as graphs, pytest.warns(KVQWarning, match=told):
        outputs, *kept = generate(compiled(CHANGED[name]), *plain_caches())
    assert {state.outcome for graph in graphs for state in graph.states} == {"left alone"}
    assert [type(cache) for cache in kept] == [Tensor, Tensor]
    torch.testing.assert_close([outputs, kept], [plain, plain_kept], rtol=0, atol=0)


def test_an_update_is_served_with_inductor_too() -> None:
    with torch.no_grad():
        expected, *_ = generate(compiled(UPDATES["index_copy"]), *plain_caches())
        torch._dynamo.reset()
        run = compiled(UPDATES["index_copy"], inner="inductor")
        outputs, keys, _ = generate(run, *plain_caches())
    assert isinstance(keys, QuantizedKV)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)


def test_a_returned_copy_of_an_updated_cache_is_the_cache() -> None:
    def step(query, key, value, keys, values, position, first):
        output, keys, values = attention(UPDATES["scatter"])(
            query, key, value, keys, values, position, first
        )
        return output, keys.clone(), values.contiguous()

    with torch.no_grad():
        run = torch.compile(step, backend="kvq", options=OPTIONS | {"strict": True})
        outputs, keys, _ = generate(run, *plain_caches())
    assert isinstance(keys, QuantizedKV)
    torch.testing.assert_close(outputs, in_place()[0], rtol=0, atol=0)


def test_a_cache_allocated_and_updated_in_one_call_is_made_packed() -> None:
    def prefill(query, key, value, keys, values, position, first):
        keys, values = torch.zeros(2, 2, SLOTS, 32), torch.zeros(2, 2, SLOTS, 32)
        return attention(UPDATES["index_copy"])(query, key, value, keys, values, position, first)

    with torch.no_grad(), watching() as graphs:
        run = torch.compile(prefill, backend="kvq", options=OPTIONS | {"strict": True})
        _, keys, _ = generate(run, None, None, counts=(60,), first=0)
    assert graphs[0].sites[0].detail.startswith("attends exactly to its own tokens, writes them")
    assert isinstance(keys, QuantizedKV) and keys.held() == 60
    torch.testing.assert_close(keys.dequantize()[:, :, 56:60], list(drawn(60, 3))[1][:, :, 56:])


def test_a_cache_is_as_it_was_after_an_updated_one_was_made_of_it() -> None:
    run = compiled(UPDATES["index_copy"], window=64)
    with torch.no_grad():
        _, keys, values = generate(run, *plain_caches())
        before, twin = keys.dequantize(), copy.copy(keys)
        longer = generate(run, keys, values, (1, 30), first=HELD + 8)
        assert longer[1].held() == HELD + 39
        assert torch.equal(keys.dequantize(), before)  # the window holds them, so they are exact
        assert torch.equal(twin.dequantize(), before)
        assert keys.held() == HELD + 8


@settings(max_examples=few(8), phases=(Phase.explicit, Phase.generate))
@given(st.lists(st.tuples(st.integers(0, 9), st.integers(1, 3)), min_size=2, max_size=7))
def test_caches_updated_from_one_another_in_any_order_hold_their_own_tokens(steps) -> None:
    """A tree of updates: each of any cache made so far, most of which another one has taken over."""
    torch._dynamo.reset()
    run, plain = compiled(UPDATES["where"], method="int8"), attention(UPDATES["where"])
    with torch.no_grad():
        begun = (generate(each, *plain_caches(), (1,))[1:] for each in (run, plain))
        made = [(*begun, HELD + 1)]
        for number, count in steps:
            packed, exact, first = made[number % len(made)]
            position, new = torch.arange(first, first + count), list(drawn(count, 3, len(made)))
            output, *packed = run(*new, *packed, position, first)
            expected, *exact = plain(*new, *exact, position, first)
            torch.testing.assert_close(output, expected, rtol=0, atol=0.05)
            made.append((packed, exact, first + count))
        for packed, exact, _ in made:
            for mine, theirs in zip(packed, exact, strict=True):
                assert isinstance(mine, QuantizedKV)
                torch.testing.assert_close(mine.dequantize(), theirs, rtol=0, atol=0.05)


def test_positions_that_a_packed_cache_cannot_take_turn_an_updated_cache_plain_and_are_told() -> (
    None
):
    run, plain = compiled(UPDATES["index_copy"], method="int8"), attention(UPDATES["index_copy"])
    with torch.no_grad():
        _, *packed = generate(run, *plain_caches())
        _, *exact = generate(plain, *plain_caches())
        arguments = *drawn(2, 3), *packed, torch.tensor([70, 60]), 0
        with pytest.warns(KVQWarning, match="not consecutive"):
            output, *packed = run(*arguments)
        expected, *exact = plain(*arguments[:3], *exact, *arguments[-2:])
        torch.testing.assert_close([output, *packed], [expected, *exact], rtol=0, atol=0.05)
        assert [type(cache) for cache in packed] == [Tensor, Tensor]
        with pytest.warns(KVQWarning, match="not consecutive"):  # and stays so
            later = run(*drawn(1, 3), *packed, torch.tensor([48]), 48)
        assert [type(cache) for cache in later[1:]] == [Tensor, Tensor]


def test_an_updated_cache_in_16_bit_that_cannot_be_packed_stays_so_and_is_told_once() -> None:
    """A ring: its cache positions are counted from the beginning again at its end."""

    def ring(past, position, first, new):
        return past.index_copy(2, position % SLOTS, new)

    def step(query, key, value, keys, values, position, mask):
        keys, values = ring(keys, position, 0, key), ring(values, position, 0, value)
        return sdpa(query, keys, values, attn_mask=mask), keys, values

    run = torch.compile(step, backend="kvq", options=OPTIONS)
    kept = exact = plain_caches()
    mask = torch.ones(1, SLOTS, dtype=torch.bool)
    with torch.no_grad(), pytest.warns(KVQWarning) as told:
        for first in (SLOTS - 1, SLOTS + 1, SLOTS + 3):
            arguments = list(drawn(2, 3, first)), (torch.arange(first, first + 2), mask)
            output, *kept = run(*arguments[0], *kept, *arguments[1])
            expected, *exact = step(*arguments[0], *exact, *arguments[1])
            torch.testing.assert_close([output, *kept], [expected, *exact], rtol=0, atol=0)
    assert [type(cache) for cache in kept] == [Tensor, Tensor]
    assert len([w for w in told if "not consecutive" in str(w.message)]) == 1


def test_a_cache_that_is_read_as_it_was_and_as_it_is_is_read_dense() -> None:
    def step(query, key, value, keys, values, position, first):
        before = keys.mean(2)
        output, keys, values = attention(UPDATES["index_copy"])(
            query, key, value, keys, values, position, first
        )
        return output + before[:, :, None], keys, values

    exact = OPTIONS | {"window": SLOTS}
    with torch.no_grad(), pytest.warns(KVQWarning, match="read as it was before the write, too"):
        run = torch.compile(step, backend="kvq", options=exact)
        outputs, keys, values = generate(run, *plain_caches())
    assert [type(cache) for cache in (keys, values)] == [QuantizedKV, QuantizedKV]
    torch.testing.assert_close(outputs, generate(step, *plain_caches())[0], rtol=0, atol=0)
