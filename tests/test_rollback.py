"""Rollback is free of drift: what a grown cache still holds is read as it was, however often its end is replaced."""

from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile.kernels.cache.reopened import Reopened
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import Calibrated
from kvq_compile.options import make_spec
from kvq_compile.testing import page_layouts
from kvq_compile.testing.small_cache import assert_same_bytes
from kvq_compile.testing.small_tables import framed_layouts

LENGTH = 260
SMALL: dict[str, Any] = {"sinks": 1, "window": 20, "page_size": 32}
CLIPPED = make_spec("int3", **SMALL)


def tokens(layout: Layout, count: int, seed: int = 0) -> Tensor:
    shape = (2, 2, count, layout.head_dim)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)


def make(framed: tuple[Layout, Calibrated], x: Tensor) -> QuantizedKV:
    layout, frame = framed
    return QuantizedKV.from_dense(x, layout, tables=frame.tables, shift=frame.shift)


def packed_end(cache: QuantizedKV) -> int:
    return cache.page_layout.sinks + int(cache.cursor[1]) * cache.page_layout.page_size


layouts = st.one_of(
    framed_layouts(page_sizes=(32,)), page_layouts().map(lambda layout: (layout, Calibrated()))
)


@given(layouts, st.lists(st.integers(1, LENGTH - 1), min_size=1, max_size=6), st.integers(0, 99))
def test_packed_tokens_that_stay_are_read_as_they_were(
    framed: tuple[Layout, Calibrated], cuts: list[int], seed: int
) -> None:
    layout = framed[0]
    x = tokens(layout, LENGTH, seed)
    cache = make(framed, x)
    before, end = cache.dequantize(), packed_end(cache)
    kept = min([*cuts, end])
    if layout.grouping == "channel":
        kept -= max(0, kept - layout.sinks) % layout.group_size
    for cut in cuts:
        cache = torch.cat([cache[:, :, :cut], x[:, :, cut:]], 2)
    assert torch.equal(cache.dequantize()[:, :, :kept], before[:, :, :kept])


@given(layouts, st.integers(1, LENGTH - 1), st.booleans())
def test_a_hundred_rounds_leave_the_bytes_of_one(
    framed: tuple[Layout, Calibrated], cut: int, overwrites: bool
) -> None:
    layout = framed[0]
    assume(layout.grouping == "token")
    x = tokens(layout, LENGTH)
    cache, once = make(framed, x), None
    for round_ in range(100 if overwrites is False and cut % 8 == 0 else 5):
        if overwrites:
            cache[:, :, cut:] = x[:, :, cut:]
        else:
            cache = torch.cat([cache[:, :, :cut], x[:, :, cut:]], 2)
        if round_ == 0:
            once = cache.clone()
    assert once is not None
    assert_same_bytes(cache, once)


def test_without_the_codes_of_the_page_that_was_cut_its_tokens_shrink(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Negative twin: clipped again at each round, until little is left of them."""
    layout = CLIPPED.layout("key", 64)
    x, errors = tokens(layout, LENGTH), []
    for keeps in (True, False):
        with monkeypatch.context() as patch:
            if not keeps:
                patch.setattr(Reopened, "of", lambda *_: None)
            cache = make((layout, Calibrated()), x)
            for _ in range(40):
                cache = torch.cat([cache[:, :, :150], x[:, :, 150:]], 2)
        errors.append(float((cache.dequantize() - x)[:, :, 129:150].square().mean()))
    assert errors[1] > 9 * errors[0]


@pytest.mark.parametrize("role", ["key", "value"])
def test_a_page_that_fills_slowly_after_it_was_cut_keeps_what_stayed(role: Any) -> None:
    """Token by token, cut again before it is full, first above and then below the first cut."""
    layout = CLIPPED.layout(role, 64)
    x = tokens(layout, LENGTH)
    cache = make((layout, Calibrated()), x)
    before = cache.dequantize()
    for cut, end in ((150, 170), (160, 165), (140, LENGTH)):
        cache = cache[:, :, :cut]
        for slot in range(cut, end):
            cache = torch.cat([cache, x[:, :, slot : slot + 1]], 2)
    assert torch.equal(cache.dequantize()[:, :, :140], before[:, :, :140])


def test_copies_and_reordered_batches_know_of_the_page_that_was_cut() -> None:
    layout = CLIPPED.layout("value", 64)
    x = tokens(layout, LENGTH)
    whole = make((layout, Calibrated()), x)
    before = whole.dequantize()
    order = torch.tensor([1, 0])
    shorter = torch.cat([whole[:, :, :150], x[:, :, 150:155]], 2)
    for copy, rows in (
        (shorter.clone(), slice(None)),
        (shorter.index_select(0, order), order),
        (shorter[:1].clone(), slice(0, 1)),
    ):
        full = torch.cat([copy, x[rows][:, :, 155:]], 2)
        assert torch.equal(full.dequantize()[:, :, :150], before[rows][:, :, :150])


def test_a_token_that_was_overwritten_does_not_come_back() -> None:
    """The codes of a page that was cut belong to the tokens that stayed, and to no other in their place."""
    layout = CLIPPED.layout("key", 64)
    x, other = tokens(layout, LENGTH), tokens(layout, LENGTH, 1)
    cache = torch.cat([make((layout, Calibrated()), x)[:, :, :150], x[:, :, 150:155]], 2)
    cache[:, :, 135:] = other[:, :, 135:155]
    cache = torch.cat([cache, other[:, :, 155:]], 2)
    fresh = torch.cat([x[:, :, :135], other[:, :, 135:]], 2)
    clean = make((layout, Calibrated()), fresh)
    assert torch.equal(cache.dequantize(), clean.dequantize())


def test_a_compiled_step_gives_tokens_that_stayed_their_codes_back(fresh_dynamo: None) -> None:
    def step(query: Tensor, new: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, ...]:
        keys, values = torch.cat([key, new], 2), torch.cat([value, new], 2)
        output = torch.nn.functional.scaled_dot_product_attention(query, keys, values)
        return output, keys, values

    options = {"method": "int3", "inner": "eager", **SMALL}
    run = torch.compile(step, backend="kvq", options=options, dynamic=True)
    layouts = CLIPPED.layout("key", 64), CLIPPED.layout("value", 64)
    x = tokens(layouts[0], LENGTH)
    caches = [make((layout, Calibrated()), x) for layout in layouts]
    before = [cache.dequantize() for cache in caches]
    with torch.no_grad():
        for cut in (150, 145, 150):
            new = x[:, :, cut:]
            _, *caches = run(new, new, *(cache[:, :, :cut] for cache in caches))
    for cache, expected in zip(caches, before, strict=True):
        assert type(cache) is QuantizedKV
        assert torch.equal(cache.dequantize()[:, :, :145], expected[:, :, :145])
