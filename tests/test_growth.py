"""A grown cache is served alike however its growth is spelled: packed bytes are read, each token is coded once."""

import functools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import one_hot, pad
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvq_compile import QuantizedKV
from kvq_compile.errors import KVQWarning
from kvq_compile.history import watching
from thorough import few

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

OPTIONS = {"method": "int2", "window": 4, "page_size": 32, "inner": "eager"}
SERVED = "reads the quantized cache, quantizes on write"
Grow = Callable[[Tensor, Tensor], Tensor]
Move = Callable[[Tensor], Tensor]


def slots(past: Tensor, new: Tensor) -> Tensor:
    return torch.arange(past.shape[2], past.shape[2] + new.shape[2])


def padded(past: Tensor, new: Tensor) -> Tensor:
    return pad(past, (0, 0, 0, new.shape[2]))


def behind(past: Tensor, new: Tensor) -> Tensor:
    return pad(new, (0, 0, past.shape[2], 0))


def by_slices(past: Tensor, new: Tensor) -> Tensor:
    B, H, S, D = past.shape
    grown = past.new_empty(B, H, S + new.shape[2], D)
    grown[:, :, :S] = past
    grown[:, :, S:] = new
    return grown


def by_copies(past: Tensor, new: Tensor) -> Tensor:
    B, H, S, D = past.shape
    grown = torch.zeros(B, H, S + new.shape[2], D, dtype=past.dtype)
    grown[:, :, :S].copy_(past)
    grown.narrow(2, S, new.shape[2]).copy_(new)
    return grown


def by_scatter(past: Tensor, new: Tensor) -> Tensor:
    index = slots(past, new)[None, None, :, None].expand_as(new)
    return padded(past, new).scatter(2, index, new)


def by_where(past: Tensor, new: Tensor) -> Tensor:
    held = torch.arange(past.shape[2] + new.shape[2]) < past.shape[2]
    return torch.where(held[:, None], padded(past, new), behind(past, new))


def by_one_hot(past: Tensor, new: Tensor) -> Tensor:
    places = one_hot(slots(past, new), past.shape[2] + new.shape[2]).to(new.dtype)
    return padded(past, new) + (places[:, :, None] * new[:, :, :, None]).sum(2)


def sideways(past: Tensor, new: Tensor) -> Tensor:
    return torch.hstack([past.transpose(1, 2), new.transpose(1, 2)]).transpose(1, 2)


GROWTHS: dict[str, Grow] = {
    "cat": lambda past, new: torch.cat([past, new], 2),
    "cat from behind": lambda past, new: torch.cat((past, new), dim=-2),
    "concat": lambda past, new: torch.concat([past, new], dim=2),
    "concatenate": lambda past, new: torch.concatenate([past, new], axis=2),
    "aten": lambda past, new: torch.ops.aten.cat.default([past, new], 2),
    "hstack": sideways,
    "three parts": lambda past, new: torch.cat([past, new[:, :, :0], new], 2),
    "cat of cat": lambda past, new: torch.cat([torch.cat([past, new[:, :, :0]], 2), new], 2),
    "index_copy": lambda past, new: padded(past, new).index_copy(2, slots(past, new), new),
    "index_copy_": lambda past, new: padded(past, new).index_copy_(2, slots(past, new), new),
    "slice_scatter": lambda past, new: padded(past, new).slice_scatter(new, 2, past.shape[2]),
    "sum": lambda past, new: padded(past, new) + behind(past, new),
    "slices": by_slices,
    "copies": by_copies,
    "scatter": by_scatter,
    "where": by_where,
    "one-hot": by_one_hot,
}
COPIES: dict[str, Move] = {
    "as it is": lambda x: x,
    "contiguous": lambda x: x.contiguous(),
    "clone": torch.clone,
    "detach": lambda x: x.detach(),
    "to": lambda x: x.to(torch.float32),
    "whole slice": lambda x: x[:, :, :, :],
}
ROWS: dict[str, Move] = {
    "index_select": lambda x: x.index_select(0, torch.tensor([1, 0])),
    "index": lambda x: x[torch.tensor([1, 1])],
    "list": lambda x: x[[1, 0]],
    "flip": lambda x: x.flip(0),
    "repeat": lambda x: x[:1].repeat(2, 1, 1, 1),
    "roll": lambda x: torch.roll(x, 1, 0),
    "stack": lambda x: torch.stack([x[1], x[0]]),
}


def generate(grow: Grow, move: Move, back: Move, compiled: bool) -> tuple[list[Tensor], Tensor]:
    """Return the outputs of some steps and the keys after them."""

    def step(query, key, value, keys, values):
        keys, values = grow(move(keys), key), grow(move(values), value)
        return sdpa(query, keys, values), back(keys), back(values)

    run = torch.compile(step, backend="kvq", options=OPTIONS) if compiled else step
    generator = torch.Generator().manual_seed(0)
    keys, values = torch.randn(2, 2, 2, 11, 32, generator=generator)
    outputs = []
    for count in (70, 1, 1, 2, 1):
        tokens = torch.randn(3, 2, 2, count, 32, generator=generator)
        output, keys, values = run(*tokens, keys, values)
        outputs.append(output)
    return outputs, keys


@functools.cache
def by_cat(before: str) -> tuple[list[Tensor], Tensor]:
    with torch.no_grad():
        return generate(GROWTHS["cat"], COPIES[before], COPIES["as it is"], True)


def assert_served_as_by_cat(growth: str, before: str = "as it is", after: str = "as it is") -> None:
    expected, expected_keys = by_cat(before)
    torch._dynamo.reset()
    with watching() as graphs, torch.no_grad():
        actual, keys = generate(GROWTHS[growth], COPIES[before], COPIES[after], True)
    details = [site.detail for graph in graphs for site in graph.sites]
    assert len(details) >= 2
    assert all(detail.startswith(SERVED) for detail in details[1:]), details
    assert isinstance(keys, QuantizedKV) and isinstance(expected_keys, QuantizedKV)
    assert torch.equal(keys.dequantize(), expected_keys.dequantize())
    for mine, theirs in zip(actual, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("name", list(GROWTHS))
def test_every_spelling_of_growth_is_served_as_cat_is(name: str) -> None:
    assert_served_as_by_cat(name)


@settings(max_examples=few(5))
@given(st.sampled_from(list(GROWTHS)), st.sampled_from(list(COPIES)), st.sampled_from(list(COPIES)))
def test_copies_on_the_way_change_nothing(growth: str, before: str, after: str) -> None:
    assert_served_as_by_cat(growth, before, after)


@pytest.mark.parametrize("name", list(ROWS))
def test_rows_of_a_cache_are_taken_in_packed_form(name: str) -> None:
    with torch.no_grad():
        plain, plain_keys = generate(GROWTHS["cat"], ROWS[name], COPIES["as it is"], False)
        with watching() as graphs:
            outputs, keys = generate(GROWTHS["cat"], ROWS[name], COPIES["as it is"], True)
    assert graphs[-1].sites[-1].detail.startswith(SERVED)
    assert isinstance(keys, QuantizedKV)
    # The last four tokens of a cache are exact, so those show which rows were taken.
    assert torch.equal(keys.dequantize()[:, :, -4:], plain_keys[:, :, -4:])
    torch.testing.assert_close(outputs[0], plain[0])


@pytest.mark.parametrize(
    "change",
    [
        lambda past, new: torch.cat([past * 1.5, new], 2),
        lambda past, new: torch.cat([past.flip(2), new], 2),
        lambda past, new: padded(past, new) + 2 * behind(past, new),
        lambda past, new: torch.cat([past, new.roll(1, 3)], 2) * torch.ones(32).cumsum(0),
        lambda past, new: torch.cat([past.roll(1, 1), new], 2),
    ],
    ids=["scaled", "reversed", "doubled", "weighted", "other heads"],
)
def test_what_changes_the_cache_is_never_coded_anew(change: Grow) -> None:
    with watching() as graphs, torch.no_grad(), pytest.warns(KVQWarning):
        outputs, keys = generate(change, COPIES["as it is"], COPIES["as it is"], True)
    plain, plain_keys = generate(change, COPIES["as it is"], COPIES["as it is"], False)
    assert all(site.outcome == "left alone" for graph in graphs for site in graph.sites)
    torch.testing.assert_close(keys, plain_keys, rtol=0, atol=0)
    for mine, theirs in zip(outputs, plain, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=0)
