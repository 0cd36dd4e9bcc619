"""Programs that write to one state several times in one graph give what plain PyTorch gives."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, note, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvq_compile import QuantizedKV, make_spec
from kvq_compile.errors import KVQWarning
from kvq_compile.history import watching
from kvq_compile.kernels.cache.tensor import Kind
from kvq_compile.lowering.sites import DENSE
from thorough import few

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::kvq_compile.errors.KVQWarning"),
]

OPTIONS = {"method": "int8", "sinks": 1, "window": 4, "page_size": 32, "inner": "eager"}
BATCH, HEADS, CHANNELS, SLOTS = 2, 2, 32, 80
TOLERANCE = 0.05  # elements are off by half a step of 8 bits of their range of about 8
Step = Callable[..., Any]


BANK = torch.randn(
    160, BATCH, HEADS, SLOTS, CHANNELS, generator=torch.Generator().manual_seed(0)
)  # a constant of the graphs, which draw no numbers themselves


def tokens(count: int, number: int) -> Tensor:
    return BANK[number, :, :, :count]


def quantized(x: Tensor, role: str, kind: Kind, held: int) -> QuantizedKV:
    layout = make_spec("int8", sinks=1, window=4, page_size=32).layout(role, CHANNELS)
    return QuantizedKV.from_dense(x, layout, kind=kind, length=held)


def dense(x: Tensor) -> Tensor:
    return x.dequantize() if isinstance(x, QuantizedKV) else x


def assert_alike(step: Step, plain: list[Tensor], caches: list[Tensor], rounds: int = 1) -> list[Tensor]:  # fmt: skip
    """Run a step on both, feeding what it returns first back in; compare everything it returns."""
    compiled = torch.compile(step, backend="kvq", options=OPTIONS)
    actual = caches
    for number in range(rounds):
        with torch.no_grad():
            expected, actual = step(number, *plain), compiled(number, *actual)
        for mine, theirs in zip(actual, expected, strict=True):
            torch.testing.assert_close(dense(mine), theirs, rtol=0, atol=TOLERANCE)
        plain, actual_all = list(expected[:2]), actual
        actual = list(actual[:2])
    return list(actual_all)


# --- caches that grow -----------------------------------------------------------------------------


def grown(held: int = 60) -> tuple[list[Tensor], list[Tensor]]:
    plain = [tokens(held, 0), tokens(held, 1)]
    return plain, [quantized(plain[0], "key", "grown", held), quantized(plain[1], "value", "grown", held)]  # fmt: skip


def test_two_branches_grown_from_one_cache_hold_their_own_tokens() -> None:
    def step(number, keys, values):
        one = torch.cat([keys, tokens(1, 3)], 2), torch.cat([values, tokens(1, 4)], 2)
        two = torch.cat([keys, tokens(1, 5)], 2), torch.cat([values, tokens(1, 6)], 2)
        query = tokens(1, 7)
        return *one, *two, sdpa(query, *one), sdpa(query, *two)

    with watching() as graphs:
        results = assert_alike(step, *grown(), rounds=3)
    assert all(isinstance(cache, QuantizedKV) for cache in results[:4])
    assert all("grows more than once" in site.detail for site in graphs[-1].sites)
    caches = graphs[-1].states
    assert caches and all(cache.outcome == DENSE for cache in caches)


def test_the_warning_says_that_caches_which_are_read_dense_are_stored_quantized() -> None:
    def step(keys, values, new):
        one = torch.cat([keys, new], 2), torch.cat([values, new], 2)
        two = torch.cat([keys, new + 1], 2), torch.cat([values, new + 1], 2)
        return *one, *two, sdpa(new, *one), sdpa(new, *two)

    _, packed = grown()
    compiled = torch.compile(step, backend="kvq", options=OPTIONS)
    told = (
        r"2 of 2 attentions read their caches dense, which are stored quantized.*: the cache grows"
    )
    with torch.no_grad(), pytest.warns(KVQWarning, match=told):
        results = compiled(*packed, tokens(1, 3))
    assert all(isinstance(cache, QuantizedKV) for cache in results[:4])


def test_a_cache_grown_twice_in_a_row_is_attended_to_at_both_lengths() -> None:
    def step(number, keys, values):
        one = torch.cat([keys, tokens(1, 3)], 2), torch.cat([values, tokens(1, 4)], 2)
        output = sdpa(tokens(1, 7), *one)
        two = torch.cat([one[0], output], 2), torch.cat([one[1], tokens(2, 6)[:, :, :1]], 2)
        return *two, *one, sdpa(output, *two)

    results = assert_alike(step, *grown(), rounds=3)
    assert all(isinstance(cache, QuantizedKV) for cache in results[:4])


def test_one_growth_spelled_twice_is_still_fused() -> None:
    def step(number, keys, values):
        key, value = tokens(1, 3), tokens(1, 4)
        again = torch.cat([keys, key], 2)
        keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        return keys, values, sdpa(tokens(1, 7), keys, values), again

    with watching() as graphs:
        assert_alike(step, *grown(), rounds=2)
    assert [site.outcome for graph in graphs for site in graph.sites] == [
        "rewritten"
    ]  # one graph for both lengths


@settings(max_examples=few(8), phases=(Phase.explicit, Phase.generate))
@given(st.data())
def test_programs_over_a_growing_cache_give_the_plain_numbers(data: st.DataObject) -> None:
    torch._dynamo.reset()
    program: list[tuple[str, int, int]] = []
    versions = 1
    for _ in range(data.draw(st.integers(1, 5))):
        what = data.draw(st.sampled_from(["append", "append", "attend", "rows", "sum"]))
        program.append(
            (what, data.draw(st.integers(0, versions - 1)), data.draw(st.integers(1, 3)))
        )
        versions += what in ("append", "rows")
    kept = data.draw(st.lists(st.integers(0, versions - 1), min_size=1, max_size=3))
    note(f"{program}, {kept=}")

    def step(number, keys, values):
        states, outputs = [(keys, values)], []
        for place, (what, of, count) in enumerate(program):
            keys, values = states[of]
            if what == "append":
                new = tokens(count, 10 + place), tokens(count, 30 + place)
                states.append((torch.cat([keys, new[0]], 2), torch.cat([values, new[1]], 2)))
            elif what == "rows":
                rows = torch.tensor([1, count % 2])
                states.append((keys.index_select(0, rows), values[rows]))
            elif what == "attend":
                outputs.append(sdpa(tokens(count, 50 + place), keys, values))
            else:
                outputs.append(keys.mean(2))
        states = [states[place] for place in kept]
        return *(cache for pair in states for cache in pair), *outputs

    assert_alike(step, *grown(data.draw(st.sampled_from([3, 36, 60]))), rounds=2)


# --- caches of fixed size -------------------------------------------------------------------------


def static(held: int = 40) -> tuple[list[Tensor], list[Tensor]]:
    plain = [torch.zeros(BATCH, HEADS, SLOTS, CHANNELS) for _ in range(2)]
    for place, cache in enumerate(plain):
        cache[:, :, :held] = tokens(held, place)
    return plain, [
        quantized(plain[0], "key", "static", held),
        quantized(plain[1], "value", "static", held),
    ]


def seen(first: int, count: int) -> Tensor:
    return torch.arange(SLOTS) <= torch.arange(first, first + count)[:, None]


def test_an_unrolled_loop_over_a_buffer_is_right() -> None:
    def step(number, keys, values):
        outputs = []
        for slot in range(40 + 3 * number, 43 + 3 * number):
            keys[:, :, slot : slot + 1] = tokens(1, slot)
            values[:, :, slot : slot + 1] = tokens(1, 100 + slot)
            outputs.append(sdpa(tokens(1, 7), keys, values, attn_mask=seen(slot, 1)))
        return keys, values, *outputs

    results = assert_alike(step, *static(), rounds=2)
    assert isinstance(results[0], QuantizedKV)


@settings(max_examples=few(8), phases=(Phase.explicit, Phase.generate))
@given(st.data())
def test_programs_over_a_buffer_give_the_plain_numbers(data: st.DataObject) -> None:
    torch._dynamo.reset()
    program = data.draw(
        st.lists(
            st.tuples(
                st.sampled_from(["write", "write", "index_copy", "attend", "view"]),
                st.sampled_from([0, 0, 0, -1, 2]),
                st.integers(1, 3),
            ),
            min_size=1,
            max_size=5,
        )
    )
    note(f"{program}")

    def step(number, keys, values):
        outputs, end, view = [], 40, None
        for place, (what, shift, count) in enumerate(program):
            first = max(0, end + shift)
            new = tokens(count, 10 + place), tokens(count, 30 + place)
            if what == "write":
                keys[:, :, first : first + count] = new[0]
                values[:, :, first : first + count] = new[1]
                end = first + count
            elif what == "index_copy":
                slots = torch.arange(first, first + count)
                keys.index_copy_(2, slots, new[0])
                values.index_copy_(2, slots, new[1])
                end = first + count
            elif what == "view":
                view = keys[:, :, 2:5]
            else:
                query = tokens(1, 50 + place)
                outputs.append(sdpa(query, keys, values, attn_mask=seen(end - 1, 1)))
        return keys, values, *outputs, *(() if view is None else (view.sum(2),))

    assert_alike(step, *static())


def kinds_and_details(step: Step, calls: int) -> tuple[set[type], list[str]]:
    """Run a step on buffers in 16 bit, compare; return what they are then and what became of each attention."""
    plain, _ = static()
    caches = [cache.clone() for cache in plain]
    compiled = torch.compile(step, backend="kvq", options=OPTIONS)
    with torch.no_grad(), watching() as graphs:
        for number in range(calls):
            expected, actual = step(*plain, 40 + 3 * number), compiled(*caches, 40 + 3 * number)
            torch.testing.assert_close(actual, expected, rtol=0, atol=TOLERANCE)
    return {type(cache) for cache in caches}, [site.detail for graph in graphs for site in graph.sites]  # fmt: skip


def unrolled(attends: list[int], write: Step) -> Step:
    """Return a step that writes three tokens, one after the other, and attends after some of the writes."""

    def step(keys, values, first):
        outputs = []
        for place in range(3):
            write(keys, first + place, tokens(1, place))
            write(values, first + place, tokens(1, 100 + place))
            if place in attends:
                mask = torch.arange(SLOTS) <= first + place
                outputs.append(sdpa(tokens(1, 7), keys, values, attn_mask=mask[None]))
        return outputs

    return step


def by_slice(cache: Tensor, slot: int, token: Tensor) -> None:
    cache[:, :, slot : slot + 1] = token


def by_position(cache: Tensor, slot: int, token: Tensor) -> None:
    cache.index_copy_(2, torch.arange(slot, slot + 1), token)


@pytest.mark.parametrize("write", [by_slice, by_position])
@pytest.mark.parametrize("attends", [[2], [0, 2], [0, 1, 2]])
def test_a_buffer_written_several_times_in_a_call_is_quantized_and_read_packed(
    attends, write
) -> None:
    """Regression: it stayed in 16 bit for good, and a quantized one was read dense."""
    kinds, details = kinds_and_details(unrolled(attends, write), 4)
    first, later = details[: len(attends)], details[len(attends) :]
    assert kinds == {QuantizedKV}
    assert later and all(detail.startswith("runs as captured once") for detail in first)
    assert all(detail.startswith("reads the quantized buffer") for detail in later)


def test_a_buffer_in_16_bit_written_again_behind_its_last_attention_stays_so_and_is_told() -> None:
    kinds, details = kinds_and_details(unrolled([0, 1], by_slice), 2)
    assert set(details) == {"the cache is written again behind its last attention"}
    assert kinds == {Tensor}


def test_a_cache_written_between_a_read_and_its_attention_is_read_dense() -> None:
    def step(keys, values, first):
        by_slice(keys, first, tokens(1, 40))
        by_slice(values, first, tokens(1, 140))
        read = keys.repeat_interleave(2, 1)
        by_slice(keys, first + 1, tokens(1, 41))
        by_slice(values, first + 1, tokens(1, 141))
        query = torch.cat([tokens(1, 7), tokens(1, 8)], 1)
        mask = torch.arange(SLOTS)[None] <= first
        return sdpa(query, read, values.repeat_interleave(2, 1), attn_mask=mask)

    kinds, details = kinds_and_details(step, 1)
    assert set(details) == {"the cache is written between its read and the attention"}
    assert kinds == {QuantizedKV}
