"""A cache is found from its tensor, whatever the order of its axes: it is quantized, and looks as it did."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvq_compile import KVQWarning
from kvq_compile.history import watching
from kvq_compile.kernels.cache.arranged import ArrangedKV
from kvq_compile.testing import assert_matches_dequantized, assert_within_bound
from kvq_compile.testing.small_decoder import LAYOUTS, SPELLINGS, Decoder
from layout_steps import (
    EXACT,
    SLOTS,
    B,
    D,
    G,
    H,
    Step,
    attend,
    buffers,
    compared,
    feed,
    grown,
    nothing,
    tokens,
    with_heads,
)
from thorough import spread

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

OPTIONS = {"method": "int8", "sinks": 1, "window": 4, "page_size": 32, "group_size": 16}


def check(model: Decoder, **options: Any) -> None:
    """Check every attention of a decoder against the tokens it is over, dequantized and exact."""
    for call in model.run(**options):
        seen = call.query, call.key, call.value
        assert_matches_dequantized(call.output, *seen, call.caches, mask=call.mask)
        held = call.held if call.caches is not None else 0
        about = {"held": held, "mask": call.mask}
        assert_within_bound(call.output, call.query, *call.history, model.spec, **about)
    assert call.caches is not None
    assert int(call.caches[0].cursor[1]) == 1  # a page is packed


def decoder(layout: str, spelling: str, kind: Any) -> Decoder:
    about = {"heads": (H * G, H), "head_dim": D, "dtype": torch.float32, "chunks": (40, 1, 5, 1)}
    rest = {"padding": (0, 3), "mask_kind": "bool", "options": OPTIONS, "seed": 0}
    return Decoder(1, kind=kind, layout=layout, spelling=spelling, **about, **rest)


@pytest.mark.long(but=["0-grown", "1-static", "4-grown", "7-static", "9-static"])
@pytest.mark.parametrize(("place", "kind"), spread(range(len(LAYOUTS)), ["grown", "static"], 2))
def test_every_layout_is_read_packed(place: int, kind: str) -> None:
    spelling = sorted(SPELLINGS)[(place + (kind == "static")) % len(SPELLINGS)]
    with watching() as graphs:
        check(decoder(LAYOUTS[place], spelling, kind), inner="eager")
    assert {site.outcome for graph in graphs for site in graph.sites} == {"rewritten"}


@pytest.mark.parametrize(("layout", "kind"), [("BSHD", "grown"), ("PBHSD", "static")])
def test_so_it_is_by_what_inductor_makes_of_it(layout: str, kind: str) -> None:
    check(decoder(layout, "sdpa", kind))


# Steps of hand-written decoders


def by_scatter(cache: Tensor, position: Tensor, new: Tensor) -> None:
    cache.scatter_(1, position[None, :, None, None].expand_as(new), new)


def by_index_copy(cache: Tensor, position: Tensor, new: Tensor) -> None:
    cache.index_copy_(1, position, new)


def by_view(cache: Tensor, position: Tensor, new: Tensor) -> None:
    cache.transpose(1, 2)[:, :, position] = new.transpose(1, 2)


@pytest.mark.parametrize("write", [by_scatter, by_index_copy, by_view])
def test_a_buffer_is_served_however_it_is_written(write: Callable[..., None]) -> None:
    def step(query, key, value, held, position, mask):
        write(held[0], position, key)
        write(held[1], position, value)
        return attend(query, *held, mask), held

    held, outcomes, _ = compared(step, buffers)
    assert [type(cache) for cache in held] == [ArrangedKV] * 2
    assert {*outcomes} == {"rewritten"}


def test_a_packed_buffer_may_take_one_token_at_a_position() -> None:
    def step(query, key, value, held, position, mask):
        if (
            key.shape[1] == 1
        ):  # PyTorch itself breaks the graph at such a write into an ordinary tensor
            held[0][:, position[0]], held[1][:, position[0]] = key[:, 0], value[:, 0]
        else:
            held[0][:, position], held[1][:, position] = key, value
        return attend(query, *held, mask), held

    held, outcomes, _ = compared(step, buffers, lengths=(9, 1, 1))
    assert [type(cache) for cache in held] == [ArrangedKV] * 2
    assert {*outcomes} == {"rewritten"}


def test_only_the_positions_that_are_written_may_be_read() -> None:
    def step(query, key, value, held, end, mask):
        first, last = end - key.shape[1], end
        held[0][:, first:last], held[1][:, first:last] = key, value
        mask = torch.ones(key.shape[1], end, dtype=torch.bool).tril(end - key.shape[1])
        return attend(query, held[0][:, :end], held[1][:, :end], mask), held

    def at(step):
        return lambda q, k, v, held, position, mask: step(
            q, k, v, held, int(position[-1]) + 1, mask
        )

    expected, _ = feed(at(with_heads(step)), buffers(), (40, 1, 1))
    compiled = torch.compile(with_heads(step), backend="kvq", options=EXACT)
    with watching() as graphs:
        outputs, held = feed(at(compiled), buffers(), (40, 1, 1))
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
    assert [type(cache) for cache in held] == [ArrangedKV] * 2
    assert {site.outcome for graph in graphs for site in graph.sites} == {"rewritten"}


def all_layers(query, key, value, held, position, mask):
    (cache,) = held
    for layer in range(2):
        cache[layer, 0][:, position] = key
        cache[layer, 1, :, position] = value + layer
        query = query + attend(query, cache[layer, 0], cache[layer, 1], mask)
    return query, held


def each_layer_grown(query, key, value, held, position, mask):
    keys, values = [], []
    for layer in range(2):
        new = key * (1 + layer), value + layer
        if held is not None:
            new = [torch.cat([x[layer], y], 1) for x, y in zip(held, new, strict=True)]
        query = query + attend(query, *new, mask)
        keys.append(new[0])
        values.append(new[1])
    return query, [torch.stack(keys), torch.stack(values)]


def test_all_layers_may_lie_in_one_buffer() -> None:
    (cache,), outcomes, _ = compared(all_layers, lambda: [torch.zeros(2, 2, B, SLOTS, H, D)])
    assert isinstance(cache, ArrangedKV)
    assert len(cache.caches) == 4
    assert {*outcomes} == {"rewritten"}


def test_growing_caches_of_all_layers_may_be_stacked() -> None:
    held, outcomes, _ = compared(each_layer_grown, nothing)
    assert [str(cache.arrangement) for cache in held] == ["[2, B, S, H, D]"] * 2
    assert {*outcomes} == {"rewritten"}


# What must not be taken for a cache of some layout


def rows_left_out(query, key, value, held, position, mask):
    held[0][:1, position], held[1][:1, position] = key[:1], value[:1]
    return attend(query, *held, mask), held


def read_as_it_was(query, key, value, held, position, mask):
    before = [cache.clone() for cache in held]
    held[0][:, position], held[1][:, position] = key, value
    mask = mask.clone()
    mask[:, 0] = True
    return attend(query, *before, mask), held


def added_to(query, key, value, held, position, mask):
    held[0][:, position] += key
    held[1][:, position] += value
    return attend(query, *held, mask), held


def with_a_layer_unread(query, key, value, held, position, mask):
    cache = held[0]
    cache[0, 0][:, position], cache[0, 1][:, position] = key, value
    return attend(query, cache[0, 0], cache[0, 1], mask) + cache.sum(), held


@pytest.mark.parametrize(
    ("step", "make"),
    [
        (rows_left_out, buffers),
        (read_as_it_was, buffers),
        (added_to, buffers),
        (with_a_layer_unread, lambda: [torch.zeros(2, 2, B, SLOTS, H, D)]),
    ],
)
@pytest.mark.filterwarnings("ignore::kvq_compile.errors.KVQWarning")
def test_what_is_not_tokens_at_cache_positions_stays_as_it_is(step: Step, make: Any) -> None:
    held, outcomes, _ = compared(step, make)
    assert [type(cache) for cache in held] == [Tensor] * len(held)
    assert {*outcomes} == {"left alone"}


def tokens_in_front(query, key, value, held, position, mask):
    if held is not None:
        key, value = torch.cat([key, held[0]], 1), torch.cat([value, held[1]], 1)
    return attend(query, key * 1, value * 1, None), [key * 1, value * 1]


def heads_turned(query, key, value, held, position, mask):
    output, held = grown(query, key, value, held, position, mask)
    return output + attend(query, held[0].flip(2), held[1].flip(2), mask), held


@pytest.mark.parametrize("step", [tokens_in_front, heads_turned])
@pytest.mark.filterwarnings("ignore::kvq_compile.errors.KVQWarning")
def test_what_is_not_the_cache_with_new_tokens_behind_it_is_not_read_packed(step: Step) -> None:
    compared(step, nothing)


def test_a_write_that_a_packed_buffer_cannot_take_makes_it_an_ordinary_tensor_again() -> None:
    def step(query, key, value, held, position, mask):
        held[0][:, position], held[1][:, position] = key, value
        return attend(query, *held, mask), held

    def twice(step):
        def call(held):
            outputs, held = feed(step, held, lengths=(8, 1))
            again, held = feed(step, held, lengths=(2,), first=20)
            return outputs + again, held

        return call

    step = with_heads(step)
    expected, plain = twice(step)(buffers())
    with pytest.warns(KVQWarning, match="tokens are written behind empty cache positions"):
        outputs, held = twice(torch.compile(step, backend="kvq", options=EXACT))(buffers())
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)
    assert [type(cache) for cache in held] == [Tensor] * 2
    torch.testing.assert_close(held, plain)
    assert all(cache.is_contiguous() for cache in held)


def test_a_buffer_that_shares_its_memory_stays_as_it_is() -> None:
    def step(query, key, value, held, position, mask):
        held[0][:, position], held[1][:, position] = key, value
        return attend(query, *held, mask), held

    both = torch.zeros(2, B, SLOTS, H, D)
    with pytest.warns(KVQWarning, match="must not share its storage"):
        held, *_ = compared(step, lambda: list(both.clone()))
    assert [type(cache) for cache in held] == [Tensor] * 2


# What else a graph may do with such a cache


def in_a_new_buffer(query, key, value, held, position, mask):
    held = held or [torch.zeros(B, SLOTS, H, D), key.new_zeros((B, SLOTS, H, D))]
    held[0][:, position], held[1][:, position] = key, value
    mask = torch.nn.functional.pad(mask, (0, SLOTS - mask.shape[1]))
    return attend(query, *held, mask), held


def in_a_new_buffer_for_both(query, key, value, held, position, mask):
    (cache,) = held or [torch.zeros(2, B, SLOTS, H, D)]
    cache[:, :, position] = torch.stack([key, value])
    mask = torch.nn.functional.pad(mask, (0, SLOTS - mask.shape[1]))
    return attend(query, cache[0], cache[1], mask), [cache]


@pytest.mark.parametrize("step", [in_a_new_buffer, in_a_new_buffer_for_both])
def test_a_buffer_that_the_call_allocates_is_served(step: Step) -> None:
    held, outcomes, _ = compared(step, nothing)
    assert {type(cache) for cache in held} == {ArrangedKV}
    assert {*outcomes} == {"rewritten"}
    assert {cache.caches[0].kind for cache in held} == {"static"}


def test_an_updated_copy_of_a_buffer_is_served() -> None:
    def step(query, key, value, held, position, mask):
        held = [x.index_copy(1, position, y) for x, y in zip(held, (key, value), strict=True)]
        return attend(query, *held, mask), held

    held, outcomes, _ = compared(step, buffers)
    assert [type(cache) for cache in held] == [ArrangedKV] * 2
    assert {*outcomes} == {"rewritten"}


def test_rows_are_gathered_packed_before_new_tokens_join() -> None:
    def step(query, key, value, held, position, mask):
        if held is not None:
            beams = 1 - position[:1].expand(B).remainder(2)
            held = [held[0].index_select(0, beams), held[1][beams]]
        return grown(query, key, value, held, position, mask)

    held, outcomes, _ = compared(step, nothing)
    assert [type(cache) for cache in held] == [ArrangedKV] * 2
    assert {*outcomes} == {"rewritten"}


def test_a_view_that_needs_its_tokens_side_by_side_gets_them() -> None:
    """A dequantized cache is ``[B, H, S, D]`` in memory, and the model views it as it lay in its own tensor."""

    def step(query, key, value, held, position, mask):
        output, held = grown(query, key, value, held, position, mask)
        joined = held[0].view(B, -1, H * D).sin()
        return output + joined.mean(1).view(B, 1, H, D).repeat(1, 1, G, 1), held

    compared(step, nothing)


@pytest.mark.filterwarnings("ignore::kvq_compile.errors.KVQWarning")
def test_a_window_of_another_layout_gives_the_plain_numbers() -> None:
    def step(query, key, value, held, position, mask):
        if held is not None:
            key, value = torch.cat([held[0], key], 1), torch.cat([held[1], value], 1)
        return attend(query, key, value, None), [key[:, -44:] * 1, value[:, -44:] * 1]

    compared(step, nothing, lengths=(40, 1, 1, 3, 1, 1))


def test_rows_at_positions_of_their_own_are_told_by_name() -> None:
    def step(query, key, value, held, position, mask):
        rows = torch.arange(B)[:, None]
        places = position + rows
        held[0][rows, :, places], held[1][rows, :, places] = key, value
        seen = torch.arange(SLOTS) <= places[:, None, :, None]
        return attend(query, *(x.transpose(1, 2) for x in held), seen), held

    with pytest.warns(
        KVQWarning, match="rows of an index, which is not understood as all its rows"
    ):
        held, *_ = compared(
            step, lambda: [torch.zeros(B, H, SLOTS, D) for _ in range(2)], lengths=(9, 1)
        )
    assert [type(cache) for cache in held] == [Tensor] * 2


def clamped(x):
    return x.clamp(-4, 4)


def positive(x):
    return x.relu()


def without_the_first(x):
    return x * (torch.arange(x.shape[1]) > 0)[:, None, None]


@pytest.mark.parametrize("change", [clamped, positive, without_the_first])
@pytest.mark.filterwarnings("ignore::kvq_compile.errors.KVQWarning")
def test_a_cache_that_is_changed_on_its_way_to_attention_is_not_read_packed(change: Any) -> None:
    """What does nothing to random numbers, or at small sizes, does something to those of a model."""

    def longer(held, *new):
        held = [x[:, :0] for x in new] if held is None else held
        return [torch.cat(pair, 1) for pair in zip(held, new, strict=True)]

    def on_the_way(query, key, value, held, position, mask):
        held = longer(held, key, value)
        return attend(query, *(change(x) for x in held), mask), held

    def before_it_is_kept(query, key, value, held, position, mask):
        held = [change(x) for x in longer(held, key, value)]
        return attend(query, *held, mask), held

    for step in (on_the_way, before_it_is_kept):
        _, outcomes, _ = compared(step, nothing)
        assert "rewritten" not in outcomes[1:]


@pytest.mark.filterwarnings("ignore::kvq_compile.errors.KVQWarning")
def test_a_packed_cache_stays_packed_where_what_reads_it_is_not_understood() -> None:
    def linear(query, key, value, held, position, mask):
        held = [torch.cat(pair, 1) for pair in zip(held, (key, value), strict=True)]
        keys, values = (x.transpose(1, 2).repeat_interleave(G, 1) for x in held)
        return (query.transpose(1, 2) @ keys.mT @ values).transpose(1, 2) / 99, held

    def both(linear, grown):
        def call(held):
            outputs, held = feed(with_heads(grown), held, (40, 1))
            new = [tokens(2, heads, seed) for seed, heads in enumerate((H * G, H, H))]
            with torch.no_grad():
                output, held = with_heads(linear)(*new, held, None, None)
            return [*outputs, output], held

        return call

    expected, plain = both(linear, grown)(None)
    compiled = (torch.compile(x, backend="kvq", options=EXACT) for x in (linear, grown))
    outputs, held = both(*compiled)(None)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-4)
    for cache, wanted in zip(held, plain, strict=True):
        assert isinstance(cache, ArrangedKV)
        torch.testing.assert_close(cache.dequantize(), wanted)


def test_tokens_that_are_arguments_join_a_cache_whose_heads_are_read_one_by_one() -> None:
    """Regression: they were split as a cache is, after the cache they join had cut its heads out of them."""

    def step(query, key, value, held, position, mask):
        keys, values = (torch.cat(pair, 2) for pair in zip(held, (key, value), strict=True))
        heads = []
        for n in range(H):
            scores = query[:, G * n] @ keys[:, n].mT / 4
            hidden = ~mask[:, : keys.shape[2]]
            heads.append(scores.masked_fill(hidden, -math.inf).softmax(-1) @ values[:, n])
        return torch.stack(heads, 1), [keys, values]

    def outside(step):  # the graph begins at the heads
        def call(*given):
            new = (x.unflatten(2, (-1, D)).transpose(1, 2) for x in given[:3])
            return step(*new, *given[3:])

        return call

    empty = [torch.zeros(B, H, 0, D) for _ in range(2)]
    fed = {"held": empty, "lengths": (40, 9, 1, 5)}
    compiled = torch.compile(step, backend="kvq", options=EXACT)
    with watching() as graphs:
        outputs, held = feed(outside(compiled), **fed)
    for output, wanted in zip(outputs, feed(outside(step), **fed)[0], strict=True):
        torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)
    assert [type(cache) for cache in held] == [ArrangedKV] * 2
    assert {site.outcome for graph in graphs for site in graph.sites} == {"rewritten"}
