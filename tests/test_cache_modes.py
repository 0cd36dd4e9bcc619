"""A cache is used in any mode and with tokens of any dtype, whatever it was made in; movement keeps it packed."""

import itertools
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.testing.small_cache import (
    B,
    D,
    H,
    assert_is_quantized,
    assert_same_bytes,
    grown,
    static,
    tokens,
)

aten = torch.ops.aten
MODES: dict[str, Callable[[], Any]] = {
    "inference": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad": nullcontext,
}
SLOTS = torch.arange(90, 98)


def _assigned(cache: Any, x: Tensor) -> Any:
    cache[:, :, 90:98] = x
    return cache


USES: dict[str, tuple[Callable[[], QuantizedKV], Callable[[Any], Any]]] = {
    "cat": (lambda: grown(90), lambda c: torch.cat([c, tokens(40, 1)], 2)),
    "cat of a crop": (lambda: grown(90), lambda c: torch.cat([c[:, :, :60], tokens(80, 1)], 2)),
    "cat of a copy": (lambda: grown(90), lambda c: torch.cat([c.clone(), tokens(40, 1)], 2)),
    "cat of rows": (lambda: grown(90), lambda c: torch.cat([c[[1, 0]], tokens(40, 1)], 2)),
    "cat of a batch": (lambda: grown(90), lambda c: torch.cat([torch.cat([c, c.clone()])[:B], tokens(3)], 2)),
    "cat in half": (lambda: grown(90), lambda c: torch.cat([c.half(), tokens(40, 1).half()], 2)),
    "assign": (lambda: static(100, 90), lambda c: _assigned(c, tokens(8, 1))),
    "index_copy_": (lambda: static(100, 90), lambda c: c.index_copy_(2, SLOTS, tokens(8, 1))),
    "zero_": (lambda: static(100, 90), lambda c: c.zero_()),
    "copy_": (lambda: static(100, 60), lambda c: c.copy_(static(100, 90, 1))),
    "read a view": (lambda: grown(90), lambda c: c[:, :, 3:50]),
    "crop": (lambda: grown(90), lambda c: c[:, :, :50]),
}  # fmt: skip


@pytest.mark.parametrize("use", sorted(USES))
@pytest.mark.parametrize(("made", "used"), list(itertools.product(MODES, MODES)))
def test_what_is_made_in_one_mode_is_used_in_another(use: str, made: str, used: str) -> None:
    """Regression: parts made in inference mode could not be written outside of it, nor views made inside."""
    make, act = USES[use]
    with MODES[made]():
        cache = make()
    with MODES[used]():
        got = act(cache)
    expected = act(make())
    assert type(got) is type(expected)
    if use == "read a view":
        assert torch.equal(got.clone(), expected.clone())
        return
    assert_same_bytes(got, expected)
    if got.kind == "grown":
        with MODES[made]():
            got = torch.cat([got, tokens(5, 2).to(got.dtype)], 2)
        assert_same_bytes(got, torch.cat([expected, tokens(5, 2).to(got.dtype)], 2))


@given(st.sampled_from(list(itertools.product(MODES, repeat=4))), st.integers(1, 89))
def test_modes_may_change_at_every_step(modes: tuple[str, ...], end: int) -> None:
    first, second, third, fourth = (MODES[name] for name in modes)
    with first():
        cache = grown(90)
    with second():
        cache = cache[:, :, :end]
    with third():
        cache = torch.cat([cache, tokens(70, 1)], 2)
    with fourth():
        cache = torch.cat([cache, tokens(70, 2)], 2)
    expected = torch.cat([torch.cat([grown(90)[:, :, :end], tokens(70, 1)], 2), tokens(70, 2)], 2)
    assert_same_bytes(cache, expected)


def _step(query: Tensor, key: Tensor, value: Tensor, keys: Tensor, values: Tensor) -> Any:
    keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
    return torch.nn.functional.scaled_dot_product_attention(query, keys, values), keys, values


@pytest.mark.usefixtures("fresh_dynamo")
def test_a_compiled_step_takes_caches_of_every_mode() -> None:
    """Regression: a cache that a compiled call made in inference mode could not be cropped or written in another."""
    step = torch.compile(
        _step, backend="kvq", options={"method": "int4", "sinks": 1, "window": 8, "page_size": 32, "inner": "eager"}
    )  # fmt: skip
    seen = []
    for modes in (("no_grad", "no_grad"), ("inference", "no_grad"), ("grad", "inference")):
        torch._dynamo.reset()
        keys, values = tokens(40)[:1], tokens(40, 1)[:1]
        for call, count in enumerate((20, 1, 40, 1)):
            if call == 2:
                keys, values = keys[:, :, :50], values[:, :, :50]
            new = [tokens(count, 5 * call + place)[:1] for place in range(3)]
            with MODES[modes[call % 2]]():
                _, keys, values = step(*new, keys, values)
        assert type(keys) is QuantizedKV
        seen.append((keys.dequantize(), values.dequantize()))
    for got in seen[1:]:
        assert torch.equal(got[0], seen[0][0])
        assert torch.equal(got[1], seen[0][1])


DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@pytest.mark.parametrize("mine", DTYPES)
@pytest.mark.parametrize("theirs", DTYPES)
def test_cat_promotes_as_pytorch_does(mine: torch.dtype, theirs: torch.dtype) -> None:
    """Regression: the cache kept its dtype, and attention was given keys of another one than queries."""
    cache, new = grown(90).to(mine), tokens(3, 1).to(theirs)
    plain = torch.cat([cache.dequantize(), new], 2)
    longer = torch.cat([cache, new], 2)
    assert longer.dtype == plain.dtype
    assert type(longer) is QuantizedKV
    read = longer.dequantize()
    assert torch.equal(read[:, :, 90:], plain[:, :, 90:])
    # Packed tokens are rounded to the dtype in which they are read, here for the first time to the wider one.
    assert torch.equal(read[:, :, :90].to(mine), cache.dequantize())
    assert cache.dtype == mine


@pytest.mark.parametrize(
    "act",
    [
        lambda x: x.bfloat16(),
        lambda x: x.half(),
        lambda x: x.double(),
        lambda x: x.to(torch.bfloat16),
        lambda x: x.to("cpu", torch.half),
        lambda x: x.type_as(torch.ones(1, dtype=torch.bfloat16)),
        lambda x: x.to(torch.ones(1, dtype=torch.float64)),
        lambda x: x.type(torch.float16),
        lambda x: x.cpu(),
    ],
)
def test_another_dtype_keeps_the_packed_form_and_takes_new_tokens(
    act: Callable[[Any], Any],
) -> None:
    cache, dense = act(grown(90)), act(grown(90).dequantize())
    assert_is_quantized(cache, dense)
    new = tokens(3, 1).to(cache.dtype)
    assert_is_quantized(torch.cat([cache, new], 2), torch.cat([dense, new], 2))


# Spellings


@pytest.mark.parametrize(
    "act",
    [
        lambda x, k: torch.cat([x, k], 2),
        lambda x, k: torch.cat((x, k), dim=-2),
        lambda x, k: torch.cat(tensors=[x, k], dim=2),
        lambda x, k: torch.concat([x, k], dim=2),
        lambda x, k: torch.concatenate([x, k], axis=2),
        lambda x, k: torch.concatenate((x, k), axis=-2),
        lambda x, k: torch.cat([x, k[:, :, :1], k[:, :, 1:]], 2),
        lambda x, k: torch.cat([torch.cat([x, k[:, :, :2]], 2), k[:, :, 2:]], 2),
        lambda x, k: aten.cat.default([x, k], 2),
        lambda x, k: torch.cat([x.contiguous(), k], 2),
        lambda x, k: torch.cat([x.to(k.dtype), k], 2),
        lambda x, k: torch.cat([x.view(x.shape), k], 2),
        lambda x, k: torch.cat([x.reshape(B, H, -1, D), k], 2),
        lambda x, k: torch.cat([x.expand(-1, -1, -1, -1), k], 2),
        lambda x, k: torch.cat([x.narrow(2, 0, x.shape[2]), k], 2),
        lambda x, k: torch.cat([torch.empty(0), x, k], 2),
    ],
)
@pytest.mark.parametrize("mode", sorted(MODES))
def test_every_spelling_of_growth_appends(act: Callable[[Any, Tensor], Any], mode: str) -> None:
    new = tokens(40, 1)
    with MODES[mode]():
        longer = act(grown(90), new)
    assert_same_bytes(longer, torch.cat([grown(90), new], 2))


MOVES: list[Callable[[Any], Any]] = [
    lambda x: x.repeat(3, 1, 1, 1),
    lambda x: x.tile(2, 1, 1, 1),
    lambda x: x.chunk(2)[1],
    lambda x: x.split(1)[0],
    lambda x: x.split([1, 1], dim=-4)[1],
    lambda x: x.tensor_split(2)[0],
    lambda x: x.narrow(0, 1, 1),
    lambda x: x.split([2, 0])[1],
    lambda x: x.split(3)[0],
    lambda x: x[2:],
    lambda x: x[[]],
    lambda x: x[:1].expand(5, -1, -1, -1),
    lambda x: x[1:].expand(3, H, x.shape[2], D),
    lambda x: x.view(B, H, -1, D),
    lambda x: torch.vstack([x, x.clone()]),
    lambda x: torch.index_select(x, 0, torch.tensor([1, 1])),
]


@pytest.mark.parametrize("place", range(len(MOVES)))
@pytest.mark.parametrize("make", [lambda: grown(90), lambda: static(100, 90)])
@pytest.mark.parametrize("mode", sorted(MODES))
def test_movement_along_the_batch_keeps_the_packed_form(
    place: int, make: Callable[[], QuantizedKV], mode: str
) -> None:
    """Regression: in inference mode composite operators arrived whole, and were read as unknown ones."""
    cache, act = make(), MOVES[place]
    with MODES[mode]():
        moved = act(cache)
    assert_is_quantized(moved, act(cache.dequantize()))


def test_a_write_into_expanded_rows_is_refused() -> None:
    cache = static(100, 90)
    with pytest.raises(NotImplementedError, match=r"clone\(\)"):
        cache[:1].expand(3, -1, -1, -1)[:, :, 90:91] = 1.0
    assert_same_bytes(cache, static(100, 90))


@pytest.mark.parametrize(
    "act",
    [
        lambda x, k: x.index_copy(2, SLOTS, k),
        lambda x, k: torch.index_put(x, (torch.arange(B)[:, None, None], torch.arange(H)[:, None], SLOTS), k),
        lambda x, k: aten.index_put(x, [None, None, SLOTS], k),
        lambda x, k: x.slice_scatter(k, 2, 90, 98),
        lambda x, k: torch.nn.functional.pad(x, (0, 0, 0, 8)),
        lambda x, k: x.index_copy(2, SLOTS.flip(0), k),
        lambda x, k: x.index_copy(2, SLOTS - 20, k),
        lambda x, k: x.scatter(2, SLOTS[None, None, :, None].expand(B, H, 8, D), k),
        lambda x, k: x.masked_fill(torch.tensor(False), 0.0),
        lambda x, k: x.roll(1, 2),
        lambda x, k: torch.hstack([x, x]),
        lambda x, k: x.flip(0),
        lambda x, k: x.select(0, 1),
        lambda x, k: x.gather(2, SLOTS[None, None, :, None].expand(B, H, 8, D)),
    ],
)  # fmt: skip
def test_a_functional_write_gives_what_the_dequantized_tokens_give(
    act: Callable[[Any, Tensor], Any],
) -> None:
    cache, new = static(100, 90), tokens(8, 1)
    got, expected = act(cache, new), act(cache.dequantize(), new)
    assert torch.equal(got.dequantize() if isinstance(got, QuantizedKV) else got, expected)
    assert_same_bytes(cache, static(100, 90))


def test_a_functional_write_behind_all_tokens_stays_packed() -> None:
    cache, new = static(100, 90), tokens(8, 1)
    for got in (cache.index_copy(2, SLOTS, new), aten.index_put(cache, [None, None, SLOTS], new)):
        assert_same_bytes(got, _assigned(static(100, 90), new))


@pytest.mark.parametrize(
    "slots", [SLOTS.flip(0), SLOTS * 1 // 2 * 2, SLOTS[[0, 2, 4, 6, 1, 3, 5, 7]]]
)
@pytest.mark.parametrize(
    "write",
    [
        lambda cache, at, x: cache.index_copy_(2, at, x),
        lambda cache, at, x: cache.__setitem__((slice(None), slice(None), at), x),
        lambda cache, at, x: aten.index_put_(cache, [None, None, at], x),
    ],
)
def test_slots_in_another_order_are_refused_before_anything_is_written(
    slots: Tensor, write: Callable[[Any, Tensor, Tensor], Any]
) -> None:
    cache = static(100, 90)
    with pytest.raises(ValueError, match="positions must follow one another"):
        write(cache, slots, tokens(8, 1))
    assert_same_bytes(cache, static(100, 90))
