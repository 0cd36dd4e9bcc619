"""A cache whose rows have lengths of their own is, row by row, a cache of one sequence."""

from fractions import Fraction
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile.kernels import many_queries
from kvq_compile.kernels.cpu import backend as cpu
from kvq_compile.kernels.layout import Layout, Regions, exact_row_index
from kvq_compile.kernels.packed import UNCALIBRATED, Calibrated, Packed
from kvq_compile.kernels.reference import backend as specification
from kvq_compile.kernels.rows import calibrated_row, rows_of
from kvq_compile.kernels.schemes import Uniform
from kvq_compile.kernels.score import Score
from kvq_compile.kernels.triton import backend as triton
from kvq_compile.testing import kv_tensors
from kvq_compile.testing.small_tables import framed_layouts, turning_tables
from kvq_compile.testing.strategies import changed, channelwise_layouts
from native import CONVERSIONS, DEVICE, OVERFLOWS, examples, frame_on_device
from uncalibrated import plain_layouts

pytestmark = [CONVERSIONS, OVERFLOWS, pytest.mark.usefixtures("wide_tiles")]
ROWS, HEADS, PAGES = 3, 2, 4
BACKENDS = [cpu, triton] if DEVICE == "cpu" else [triton]
EXAMPLES = examples(Fraction(1, 3))


def layouts() -> st.SearchStrategy[tuple[Layout, Calibrated]]:
    plain = plain_layouts(None, (64, 72, 16), ("none", "none", "hadamard"))
    widths = channelwise_layouts((64, 20), (32,))
    without = widths.map(lambda layout: (layout, UNCALIBRATED))
    return st.one_of(
        plain,
        without,
        widths.map(turning),
        framed_layouts(batch=ROWS, head_dims=(64,), page_sizes=(32,)),
    )


def turning(layout: Layout) -> tuple[Layout, Calibrated]:
    """Return a layout whose keys are coded without their rotated mean, and its tables."""
    tables = turning_tables(layout.head_dim, HEADS)
    return changed(layout, pairs="halves", tables=tables.digest), Calibrated(tables.words)


def by_row(like: Tensor, layout: Layout) -> Packed:
    """Return an empty cache whose rows have lengths of their own."""
    cache = Packed.empty(like, PAGES, layout)
    return cache._replace(cursor=cache.cursor.repeat(like.shape[0], 1))


def writes(data: st.DataObject, layout: Layout) -> list[tuple[list[int], int]]:
    """Draw where the rows of a cache are written, and how many tokens: behind their ends, before them, from slot 0."""
    room, held, drawn = layout.sinks + layout.window + PAGES * layout.page_size, [0] * ROWS, []
    for _ in range(data.draw(st.integers(1, 3))):
        tokens = data.draw(st.sampled_from([1, 1, 2, layout.page_size, layout.token_rows + 9]))
        tokens = min(tokens, room)
        first = []
        for length in held:
            most = min(length, room - tokens)
            first.append(data.draw(st.sampled_from(sorted({0, most // 2, max(0, most - 3), most}))))
        drawn.append((first, tokens))
        held = [start + tokens for start in first]
    return drawn


def positions(first: list[int], tokens: int) -> Tensor:
    return torch.tensor(first)[:, None] + torch.arange(tokens)


def held(row: Packed, layout: Layout) -> list[Tensor]:
    """Return what counts of a row: packed pages, exact rows that hold a token, the tail, cursor."""
    length, pages = row.cursor.tolist()
    first = layout.sinks + pages * layout.page_size
    recent = exact_row_index(first, max(first, length), layout, row.exact.device)
    sinks = recent.new_tensor(range(min(length, layout.sinks)))
    tail = recent.new_tensor(range(layout.token_rows, layout.exact_rows))
    exact = row.exact[:, :, torch.cat([sinks, recent, tail])]
    return [row.codes[:, :, :pages], row.params[:, :, :pages], exact, row.cursor]


@pytest.mark.parametrize("backend", [specification, *BACKENDS])
@EXAMPLES
@given(data=st.data())
def test_a_row_holds_the_bytes_of_a_cache_of_its_own(
    backend: ModuleType, data: st.DataObject
) -> None:
    layout, frame = data.draw(layouts())
    like = torch.zeros(ROWS, HEADS, 1, layout.head_dim, device=DEVICE)
    frame, ours = frame_on_device(frame), by_row(like, layout)
    alone = [Packed.empty(like[:1], PAGES, layout) for _ in range(ROWS)]
    frames = [calibrated_row(frame, row) for row in range(ROWS)]
    for first, tokens in writes(data, layout):
        x = data.draw(kv_tensors((ROWS, HEADS, tokens, layout.head_dim))).to(DEVICE)
        query = x.repeat_interleave(layout.shared_by, 1) if layout.queries else None
        at = positions(first, tokens).to(DEVICE)
        backend.append_(ours, frame, x, at, None, layout, None, query)
        for row, (cache, own, start) in enumerate(zip(alone, frames, first, strict=True)):
            mine = slice(row, row + 1)
            asked = None if query is None else query[mine]
            backend.append_(cache, own, x[mine], None, start, layout, None, asked)
    length = int(ours.cursor[:, 0].max())
    read = backend.dequantize(ours, frame, length, layout)
    for row, (cache, own) in enumerate(zip(alone, frames, strict=True)):
        mine, expected = held(rows_of(ours)[row], layout), held(cache, layout)
        for part, theirs in zip(mine, expected, strict=True):
            torch.testing.assert_close(part, theirs, rtol=0, atol=0, equal_nan=True)
        theirs = backend.dequantize(cache, own, length, layout)
        torch.testing.assert_close(read[row : row + 1], theirs, rtol=0, atol=0, equal_nan=True)


def key_layouts() -> st.SearchStrategy[tuple[Layout, Calibrated]]:
    """Draw layouts of keys whose codes are uniform, or whose channels differ in bits."""
    regions = st.builds(Regions, st.integers(0, 3), st.integers(0, 20), st.just(32))
    schemes = st.sampled_from([2, 3, 4, 8]).map(Uniform)
    uniform = st.builds(Layout, st.just("key"), st.sampled_from([64, 16]), regions, schemes)
    widths = channelwise_layouts((64,), (32,))
    without = st.one_of(uniform, widths).map(lambda layout: (layout, UNCALIBRATED))
    return st.one_of(without, widths.map(turning))


@pytest.mark.parametrize("backend", BACKENDS)
@EXAMPLES
@given(data=st.data())
def test_attention_ends_where_each_row_ends(backend: ModuleType, data: st.DataObject) -> None:
    keys, frame = data.draw(key_layouts())
    values = Layout("value", keys.head_dim, keys.regions, Uniform(4))
    sides, frames, dim = (keys, values), (frame, UNCALIBRATED), keys.head_dim
    shared = keys.shared_by or data.draw(st.sampled_from([1, 3]))
    tokens, slots = data.draw(st.sampled_from([1, 1, 3])), 130
    held = [data.draw(st.integers(0, slots - tokens)) for _ in range(ROWS)]
    start = [data.draw(st.integers(0, length)) for length in held]
    torch.manual_seed(data.draw(st.integers(0, 99)))
    caches = [by_row(torch.zeros(ROWS, HEADS, 1, dim), layout) for layout in sides]
    for cache, layout, own in zip(caches, sides, frames, strict=True):
        for row, length in zip(rows_of(cache), held, strict=True):
            x = torch.randn(1, HEADS, length, dim)
            specification.append_(row, own, x, None, 0, layout)
    query = torch.randn(ROWS, HEADS * shared, tokens, dim)
    new = torch.randn(2, ROWS, HEADS, tokens, dim)
    at = positions(start, tokens)
    mask = (torch.arange(slots) <= at[:, :, None])[:, None]
    if data.draw(st.booleans()):
        mask = torch.zeros(mask.shape).masked_fill(~mask, -1e30)
    about = *frames, mask, at, None, Score(dim**-0.5), *sides
    expected = specification.attend(query, *new, *caches, *about)
    moved = [Packed(*(part.to(DEVICE) for part in cache)) for cache in caches]
    about = *map(frame_on_device, frames), mask.to(DEVICE), at.to(DEVICE), *about[4:]
    actual = backend.attend(query.to(DEVICE), *new.to(DEVICE), *moved, *about).cpu()
    torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3)


def test_a_chunk_of_many_tokens_ends_where_each_row_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(many_queries, "MANY_ROWS", {"cuda": 64, "cpu": 64})
    torch.manual_seed(0)
    sides = [Layout(role, 64, Regions(3, 20, 32), Uniform(4)) for role in ("key", "value")]
    start, tokens, x = [90, 0, 41], 32, torch.randn(ROWS, HEADS, 90, 64)
    caches = [by_row(x, layout) for layout in sides]
    for cache, layout in zip(caches, sides, strict=True):
        for row, length in zip(rows_of(cache), start, strict=True):
            specification.append_(row, UNCALIBRATED, x[:1, :, :length], None, 0, layout)
    query, new = torch.randn(ROWS, HEADS * 2, tokens, 64), torch.randn(2, ROWS, HEADS, tokens, 64)
    at, score = positions(start, tokens), Score(0.125)
    mask = (torch.arange(130) <= at[:, :, None])[:, None]
    about = UNCALIBRATED, UNCALIBRATED, mask, at, None, score, *sides
    expected = specification.attend(query, *new, *caches, *about)
    moved = [Packed(*(part.to(DEVICE) for part in cache)) for cache in caches]
    about = *about[:2], mask.to(DEVICE), at.to(DEVICE), *about[4:]
    actual = triton.attend(query.to(DEVICE), *new.to(DEVICE), *moved, *about).cpu()
    assert many_queries.takes(query, *new, score)
    torch.testing.assert_close(actual, expected, rtol=2e-3, atol=2e-3)
