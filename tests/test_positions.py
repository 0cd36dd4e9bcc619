"""Slots that are not written one behind another give the plain numbers, or a refusal before anything is written."""

import pytest
import torch
from hypothesis import Phase, given, note, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

import kvq_compile
from kvq_compile import QuantizedKV
from kvq_compile.errors import KVQError, KVQWarning
from kvq_compile.history import watching
from thorough import few

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::kvq_compile.errors.KVQWarning"),
]

SLOTS, HEADS, CHANNELS = 96, 2, 32
OPTIONS = {"method": "int8", "sinks": 1, "window": 4, "page_size": 32, "inner": "eager"}
# Scores and outputs are averages of values that are off by half a step of 8 bits of their range of about 8.
TOLERANCE = 0.05
Plan = list[Tensor]


def range_(first: int, last: int) -> Tensor:
    return torch.arange(first, last)


def by_tensor(query, key, value, keys, values, slots, seen):
    keys[:, :, slots] = key
    values[:, :, slots] = value
    return sdpa(query, keys, values, attn_mask=seen)


def by_index_copy(query, key, value, keys, values, slots, seen):
    keys.index_copy_(2, slots, key)
    values.index_copy_(2, slots.clone(), value)
    return sdpa(query, keys, values, attn_mask=seen)


def by_two_masks(query, key, value, keys, values, slots, seen):
    """Regression: ``&`` was taken for an operation in place, and what the mask hides was not looked at."""
    keys.index_copy_(2, slots, key)
    values.index_copy_(2, slots, value)
    return sdpa(query, keys, values, attn_mask=seen & (torch.arange(SLOTS) >= 0))


def by_offset(query, key, value, keys, values, slots, seen):
    places = torch.arange(key.shape[2]) + slots[0]
    keys.index_copy_(2, places, key)
    values.index_copy_(2, places, value)
    return sdpa(query, keys, values, attn_mask=torch.where(seen, 0.0, float("-inf")))


STEPS = {"tensor": by_tensor, "index_copy": by_index_copy}


class Cache:
    def __init__(self) -> None:
        shape = 1, HEADS, SLOTS, CHANNELS
        self.keys, self.values = torch.zeros(shape), torch.zeros(shape)
        self.held = torch.zeros(SLOTS, dtype=torch.bool)
        self.generator = torch.Generator().manual_seed(0)

    def call(self, step, slots: Tensor, hide_behind: bool = False) -> Tensor:
        shape = 1, HEADS, len(slots), CHANNELS
        tokens = [torch.randn(shape, generator=self.generator) for _ in range(3)]
        if hide_behind:
            self.held[int(slots[0]) :] = False
        self.held[slots] = True
        seen = self.held.expand(len(slots), -1).clone()
        return step(*tokens, self.keys, self.values, slots, seen)


def assert_as_plain(step, plan: Plan, hide_behind: bool = False, **more) -> Cache:
    plain, quantized = Cache(), Cache()
    run = torch.compile(step, backend="kvq", options={**OPTIONS, **more})
    with torch.no_grad():
        for slots in plan:
            expected = plain.call(step, slots, hide_behind)
            actual = quantized.call(run, slots, hide_behind)
            torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)
    return quantized


IN_ORDER = [range_(0, 40), *(range_(i, i + 1) for i in range(40, 44))]
PLANS = {
    "every second slot": [2 * slots for slots in IN_ORDER],
    "prompt reversed": [range_(0, 40).flip(0), *IN_ORDER[1:]],
    "a tree": [IN_ORDER[0], torch.tensor([40, 42, 44]), torch.tensor([41]), torch.tensor([43])],
    "an old slot again": [*IN_ORDER, range_(10, 11), range_(44, 45)],
    "right aligned": [range_(50, SLOTS), range_(49, 50), range_(48, 49)],
    "the prefix last": [range_(30, 60), range_(0, 30), range_(60, 61)],
    "a ring": [range_(0, 40), *(range_(i % 42, i % 42 + 1) for i in range(40, 46))],
    "back and forth": [range_(0, 1), range_(1, 3).flip(0), range_(1, 2), range_(0, 1)],
    "a gap": [range_(0, 40), range_(60, 61), range_(61, 62)],
}


@pytest.mark.parametrize("step", list(STEPS))
@pytest.mark.parametrize("name", list(PLANS))
def test_other_orders_of_slots_give_the_plain_numbers(name: str, step: str) -> None:
    cache = assert_as_plain(STEPS[step], PLANS[name])
    assert not isinstance(cache.keys, QuantizedKV)
    assert not isinstance(cache.values, QuantizedKV)


@pytest.mark.parametrize("step", [*STEPS.values(), by_offset], ids=[*STEPS, "offset"])
def test_slots_one_behind_another_are_served(step) -> None:
    assert isinstance(assert_as_plain(step, IN_ORDER, strict=True).keys, QuantizedKV)


@pytest.mark.parametrize("step", [by_tensor, by_two_masks])
def test_a_rollback_behind_a_mask_that_hides_it_stays_quantized(step) -> None:
    plan = [range_(0, 60), range_(60, 61), range_(55, 57), range_(20, 21), range_(21, 23)]
    cache = assert_as_plain(step, plan, hide_behind=True, strict=True)
    assert isinstance(cache.keys, QuantizedKV)
    assert cache.keys.held() == 23


def test_what_cannot_be_served_is_told_once_and_remembered() -> None:
    run = torch.compile(by_tensor, backend="kvq", options=OPTIONS)
    cache = Cache()
    keys = cache.keys
    with torch.no_grad():
        cache.call(run, range_(0, 40))
        assert isinstance(keys, QuantizedKV)
        with (
            watching() as graphs,
            pytest.warns(KVQWarning, match="cache positions written are not consecutive"),
        ):
            cache.call(run, torch.tensor([40, 42]))
        assert cache.keys is keys
        assert type(keys) is Tensor
        assert "not consecutive" in graphs[-1].sites[0].detail
        seen = torch.ones(2, SLOTS, dtype=torch.bool)
        tokens = *three(2), cache.keys, cache.values, range_(43, 45), seen
        explained = kvq_compile.explain(by_tensor, *tokens, options=OPTIONS)
    assert "not consecutive" in " ".join(str(explained).split())
    assert type(keys) is Tensor


def three(tokens: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(1, HEADS, tokens, CHANNELS, generator=generator) for _ in range(3)]


def test_strict_raises_before_anything_is_written() -> None:
    run = torch.compile(by_tensor, backend="kvq", options={**OPTIONS, "strict": True})
    cache = Cache()
    with torch.no_grad():
        cache.call(run, range_(0, 40))
        before = cache.keys.clone().dequantize()
        with pytest.raises(KVQError, match="cache positions written are not consecutive"):
            cache.call(run, torch.tensor([40, 42]))
        assert isinstance(cache.keys, QuantizedKV)
        assert torch.equal(cache.keys.dequantize(), before)


@settings(max_examples=few(6), phases=(Phase.explicit, Phase.generate))
@given(st.data())
def test_any_plan_of_slots_gives_the_plain_numbers(data: st.DataObject) -> None:
    torch._dynamo.reset()
    plan: Plan = []
    end = 0
    for _ in range(data.draw(st.integers(2, 5))):
        count = data.draw(st.sampled_from([1, 1, 2, 3, 40]))
        first = data.draw(st.sampled_from([end, end, end, max(0, end - 2), end + 1, 0]))
        first = min(first, SLOTS - 2 * count)
        slots = first + data.draw(st.sampled_from([1, 1, 1, 2])) * torch.arange(count)
        plan.append(slots.flip(0) if data.draw(st.integers(0, 5)) == 0 else slots)
        end = int(slots.max()) + 1
    hide_behind = data.draw(st.booleans())
    note(f"{[slots.tolist() for slots in plan]}, {hide_behind=}")
    assert_as_plain(by_tensor, plan, hide_behind)


def test_slots_that_the_model_moves_on_itself_are_served() -> None:
    class Block(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            shape = 1, HEADS, SLOTS, CHANNELS
            self.register_buffer("keys", torch.zeros(shape))
            self.register_buffer("values", torch.zeros(shape))
            self.register_buffer("slots", torch.arange(SLOTS))

        def forward(self, query, key, value, seen):
            count = key.shape[2]
            self.keys[:, :, self.slots[:count]] = key
            self.values[:, :, self.slots[:count]] = value
            self.slots.add_(count)
            return sdpa(query, self.keys, self.values, attn_mask=seen)

    plain, quantized = Block(), Block()
    quantized.compile(backend="kvq", options={**OPTIONS, "strict": True})
    with torch.no_grad():
        for first, last in ((0, 40), (40, 41), (41, 43)):
            tokens = three(last - first)
            seen = torch.arange(SLOTS) <= torch.arange(first, last)[:, None]
            expected = plain(*tokens, seen)
            torch.testing.assert_close(quantized(*tokens, seen), expected, rtol=0, atol=TOLERANCE)
    assert isinstance(quantized.keys, QuantizedKV)


@pytest.mark.parametrize("rows", [2, 4])
def test_a_buffer_written_through_its_first_rows_is_served(rows: int) -> None:
    def step(query, key, value, keys, values, first: int):
        count = query.shape[2]
        keys[: query.shape[0], :, first : first + count] = key
        values[: query.shape[0], :, first : first + count] = value
        seen = torch.arange(first + count) <= torch.arange(first, first + count)[:, None]
        read = keys[:2, :, : first + count], values[:2, :, : first + count]
        return sdpa(query, *read, attn_mask=seen)

    shape = rows, HEADS, SLOTS, CHANNELS
    caches = [[torch.zeros(shape), torch.zeros(shape)] for _ in range(2)]
    run = torch.compile(step, backend="kvq", options=OPTIONS)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for first, count in ((0, 40), (40, 1), (41, 2), (43, 1)):
            shape = 2, HEADS, count, CHANNELS
            tokens = [torch.randn(shape, generator=generator) for _ in range(3)]
            expected = step(*tokens, *caches[0], first)
            actual = run(*tokens, *caches[1], first)
            torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)
    assert isinstance(caches[1][0], QuantizedKV)
