"""Keys whose channels differ in bits, on the CPU: what is written and read is what the specification says."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile.kernels import reference
from kvq_compile.kernels.cpu import append, attend, backend
from kvq_compile.kernels.layout import Layout, Regions
from kvq_compile.kernels.packed import UNCALIBRATED, Calibrated, Packed
from kvq_compile.kernels.reference import backend as specification
from kvq_compile.kernels.reference.channelwise import check_state
from kvq_compile.kernels.schemes import Channelwise, Uniform
from kvq_compile.kernels.score import Score
from kvq_compile.testing import (
    DTYPES,
    changed,
    channelwise_layouts,
    kv_tensors,
    lengths,
    masks,
    rounding_bound,
)
from kvq_compile.testing.small_tables import turning_tables

BATCH, HEADS, PAGES = 2, 2, 4
EVERY_DTYPE = (*DTYPES, torch.float64)
WRITERS = (backend, specification)


def layout_of(bits: float = 3.0, head_dim: int = 64, shared_by: int = 2, **regions: int) -> Layout:
    about = Regions(**({"sinks": 2, "window": 5, "page_size": 32} | regions))
    return Layout("key", head_dim, about, Channelwise(bits), 5 if shared_by else 0, shared_by)


def drawn(seed: int, *shape: int) -> Tensor:
    """Return tokens whose channels differ in size by much."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.randn(*shape[:-2], 1, shape[-1], generator=generator).exp()
    return torch.randn(shape, generator=generator) * size


def unsigned_zeros(params: Tensor) -> Tensor:
    """Return parameters whose centers of -0 are 0: the least of 0 and -0 is either."""
    step, low, high = params.unbind(-3)
    high = torch.where((low == 0) & (high == 0x80), 0, high)
    return torch.stack([step, low, high], -3)


@st.composite
def framed_channels(
    draw: st.DrawFn, head_dims: tuple[int, ...] = (64, 80, 20, 96, 128, 576)
) -> tuple[Layout, Calibrated]:
    """Draw a layout, and tables by which the mean of keys turns, or none."""
    layout = draw(channelwise_layouts(head_dims))
    if draw(st.booleans()):
        return layout, UNCALIBRATED
    return turning(layout, draw(st.integers(0, 99)))


def turning(layout: Layout, seed: int = 0) -> tuple[Layout, Calibrated]:
    weighs = seed % 2 == 1
    tables = turning_tables(layout.head_dim, HEADS, seed, weighs=weighs)
    layout = changed(layout, pairs="halves", tables=tables.digest, weighs=weighs)
    return layout, Calibrated(tables.words)


class Twins:
    """One cache kept twice, by the backend and by the specification."""

    def __init__(
        self, layout: Layout, dtype: torch.dtype, frame: Calibrated = UNCALIBRATED
    ) -> None:
        like = torch.zeros(BATCH, HEADS, 1, layout.head_dim, dtype=dtype)
        self.layout, self.frame, pages = layout, frame, PAGES
        self.caches = [Packed.empty(like, pages, layout) for _ in WRITERS]

    def append(self, x: Tensor, start: int, query: Tensor | None = None) -> None:
        for by, cache in zip(WRITERS, self.caches, strict=True):
            by.append_(cache, self.frame, x, None, start, self.layout, None, query)

    def assert_equal(self) -> None:
        for name, ours, expected in zip(Packed._fields, *self.caches, strict=True):
            if name == "params":
                ours, expected = (unsigned_zeros(x) for x in (ours, expected))
            torch.testing.assert_close(
                ours, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )

    def assert_read_alike(self, length: int) -> None:
        ours, expected = (
            by.dequantize(cache, self.frame, length, self.layout)
            for by, cache in zip(WRITERS, self.caches, strict=True)
        )
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


@given(framed_channels(), st.sampled_from(EVERY_DTYPE), st.data())
def test_what_is_written_cut_and_read_is_bit_by_bit_that_of_the_specification(
    framed: tuple[Layout, Calibrated], dtype: torch.dtype, data: st.DataObject
) -> None:
    layout, frame = framed
    count = data.draw(lengths(layout)) + 1
    x = data.draw(kv_tensors((BATCH, HEADS, count, layout.head_dim), dtype, finite=False))
    shared = layout.shared_by or 1
    asked = data.draw(kv_tensors((BATCH, HEADS * shared, 7, layout.head_dim), dtype, finite=False))
    twins = Twins(layout, dtype, frame)
    cuts = sorted({0, count, *data.draw(st.lists(st.integers(0, count), max_size=2))})
    for first, last in pairwise(cuts):
        told = layout.queries and data.draw(st.booleans())
        rows = data.draw(st.integers(1, min(7, last - first)))
        twins.append(x[:, :, first:last], first, asked[:, :, :rows] if told else None)
        twins.assert_equal()
    twins.assert_read_alike(count + 2)
    kept = data.draw(st.integers(0, count))
    twins.append(x[:, :, : count - kept], kept)
    twins.assert_equal()
    twins.assert_read_alike(count)


@given(channelwise_layouts((64, 80, 20)), st.data())
def test_widths_are_ones_that_a_file_may_have(layout: Layout, data: st.DataObject) -> None:
    count = layout.sinks + layout.window + layout.page_size
    x = data.draw(kv_tensors((BATCH, HEADS, count, layout.head_dim), finite=False))
    twins = Twins(layout, torch.float32)
    check_state(layout.state_of(twins.caches[0].exact), 0, layout)
    twins.append(x, 0)
    check_state(layout.state_of(twins.caches[0].exact), 1, layout)


def test_widths_of_a_sequence_stay_when_others_find_theirs() -> None:
    layout = layout_of()
    twins = Twins(layout, torch.float32)
    twins.append(drawn(0, BATCH, HEADS, 39, 64), 0)
    for cache in twins.caches:
        layout.state_of(cache.exact)[1, :, 0] = 0
    before = layout.state_of(twins.caches[0].exact)[0, :, 0].clone()
    twins.append(drawn(1, BATCH, HEADS, 60, 64), 39, drawn(2, BATCH, 2 * HEADS, 3, 64))
    twins.assert_equal()
    found = layout.state_of(twins.caches[0].exact)[:, :, 0]
    assert torch.equal(found[0], before)
    assert found[1].any()


# Attention


class Case:
    """A cache of ``held`` tokens, and new ones that attend to all of them."""

    def __init__(
        self, framed: tuple[Layout, Calibrated], held: int, new: int, shared: int, seed: int = 0
    ) -> None:
        layout, frame = framed
        self.frames = frame, UNCALIBRATED
        D, values = layout.head_dim, Layout("value", 64, layout.regions, Uniform(4, params="e5m3"))
        key, value = (
            drawn(seed, BATCH, HEADS, held + new, D),
            drawn(seed + 1, BATCH, HEADS, held + new, 64),
        )
        self.layouts, self.held, self.scale = (layout, values), held, D**-0.5
        self.query = torch.randn(
            BATCH, HEADS * shared, new, D, generator=torch.Generator().manual_seed(seed + 2)
        )
        self.new, self.caches = (key[:, :, held:], value[:, :, held:]), []
        for x, of, relative in zip((key, value), self.layouts, self.frames, strict=True):
            cache = Packed.empty(x, 2 + held // of.page_size, of)
            backend.append_(cache, relative, x[:, :, :held], None, 0, of)
            self.caches.append(cache)

    def attend(self, mask: Tensor | None = None) -> Tensor:
        return backend.attend(
            *(self.query, *self.new, *self.caches, *self.frames, mask, None),
            *(self.held, Score(self.scale), *self.layouts),
        )

    def check(self, mask: Tensor | None = None) -> None:
        """Assert that the output is fp64 attention over the tokens read, up to rounding."""
        key, value = (
            torch.cat([reference.read(*cache, self.held, layout, frame), new], 2)
            for cache, layout, frame, new in zip(
                self.caches, self.layouts, self.frames, self.new, strict=True
            )
        )
        bias = 0.0
        if mask is not None and mask.dtype != torch.bool:
            shown = mask[mask > -1e4]
            bias, mask = float(shown.abs().max()) if shown.numel() else 0.0, mask.double()
        exact = (self.query.double(), key.double(), value.double())
        expected = reference.softmax_attention(*exact, mask, self.scale)
        # A score is a sum of codes and a constant, each up to three times as large as the key.
        bound = rounding_bound(self.query, 3 * key, value, self.scale, bias=bias)
        assert float((self.attend(mask) - expected).abs().max()) <= bound


@pytest.mark.parametrize("way", ["at once", "in blocks"])
@given(framed_channels(), st.integers(1, 5), st.sampled_from((1, 2, 3, 4, 7)), st.data())
def test_attention_is_that_over_the_tokens_read(
    way: str, framed: tuple[Layout, Calibrated], new: int, shared: int, data: st.DataObject
) -> None:
    layout, frame = changed(framed[0], queries=0, shared_by=0), framed[1]
    held = data.draw(lengths(layout))
    case = Case((layout, frame), held, new, shared, data.draw(st.integers(0, 99)))
    mask = data.draw(masks(BATCH, HEADS * shared, new, held + new))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attend, "FEW_ROWS", 10**6 if way == "at once" else 0)
        patch.setattr(append, "SCRATCH_ELEMENTS", 1)
        case.check(mask)


def test_attention_does_not_depend_on_threads() -> None:
    case = Case(turning(layout_of(shared_by=0)), 400, 1, 4)
    alone = case.attend()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        torch.testing.assert_close(case.attend(), alone)
        case.check()
    finally:
        torch.set_num_threads(threads)


# What a file may hold


@pytest.mark.parametrize("width", [float("nan"), float("inf"), -1.0, 9.0, 0.5, 3e9, 0.0])
def test_widths_that_no_cache_could_find_are_refused_by_name(width: float) -> None:
    case = Case((layout_of(shared_by=0), UNCALIBRATED), 100, 1, 2)
    cache, layout = case.caches[0], case.layouts[0]
    layout.state_of(cache.exact)[0, 0, 0, 5] = width
    damaged = "the cache must hold pages as its layout says"
    with pytest.raises(ValueError, match=damaged):
        case.attend()
    with pytest.raises(ValueError, match=damaged):
        backend.dequantize(cache, UNCALIBRATED, 100, layout)
    with pytest.raises(ValueError, match=damaged):
        backend.append_(cache, UNCALIBRATED, drawn(0, BATCH, HEADS, 40, 64), None, 100, layout)
    with pytest.raises(ValueError, match="widths of channels"):
        check_state(layout.state_of(cache.exact), 2, layout)
