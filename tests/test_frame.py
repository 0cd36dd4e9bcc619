"""Calibrated layouts: what is put before the quantizer is undone on reading, whatever the tables hold."""

import math
from itertools import pairwise

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from kvq_compile.kernels import reference
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import Calibrated, Packed
from kvq_compile.kernels.reference.codebook import nearest_centroid
from kvq_compile.kernels.reference.formats import e4m3_value, round_e4m3
from kvq_compile.kernels.reference.rope import cos_sin_table, cosine_and_sine
from kvq_compile.kernels.reference.tables import from_coded, to_coded
from kvq_compile.kernels.tables import Tables
from kvq_compile.testing import changed
from kvq_compile.testing.small_tables import framed_layouts, random_tables

# To coded form and back: two fp32 sums of up to 128 products, as Hadamard's matrix makes them.
CODED_ERROR = 2 * 128 * 2.0**-24

Framed = tuple[Layout, Calibrated]


def tokens(layout: Layout, count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(2, 2, count, layout.head_dim, generator=torch.Generator().manual_seed(seed))


def appended(
    framed: Framed, x: torch.Tensor, cuts: tuple[int, ...] = ()
) -> tuple[torch.Tensor, ...]:
    layout, frame = framed
    parts = Packed.empty(x, 6, layout)
    edges = [0, *sorted(cuts), x.shape[2]]
    for first, last in pairwise(edges):
        reference.append_(*parts, x[:, :, first:last], first, layout, frame)
    return parts


@given(framed_layouts(), st.integers(0, 1000))
def test_a_token_in_coded_form_is_the_same_token(framed: Framed, first: int) -> None:
    layout, frame = framed
    x = tokens(layout, 2 * layout.page_size).unflatten(2, (2, -1))
    back = from_coded(to_coded(x, layout, frame, first), layout, frame, first)
    assert (back - x).abs().max() < CODED_ERROR


@given(framed_layouts())
def test_a_layout_survives_its_text_in_a_graph(framed: Framed) -> None:
    text, names = framed[0].__fx_repr__()
    assert eval(text, dict(names)) == framed[0]


@given(framed_layouts(), st.integers(0, 200), st.lists(st.integers(0, 200), max_size=3))
def test_codes_do_not_depend_on_how_the_prompt_was_cut(
    framed: Framed, count: int, cuts: list[int]
) -> None:
    x = tokens(framed[0], count)
    whole = appended(framed, x)
    cut = appended(framed, x, tuple(min(c, count) for c in cuts))
    pages = framed[0].pages_at(count)
    for one, other in zip(whole[:2], cut[:2], strict=True):
        assert torch.equal(one[:, :, :pages], other[:, :, :pages])


@given(framed_layouts(role="key"))
def test_keys_are_unrotated_by_the_angle_of_their_position(framed: Framed) -> None:
    """Rotating the keys of a model by the angle of their position leaves their coded form as it was."""
    layout, frame = framed
    assume(layout.rotary)
    assert frame.shift is not None
    still = changed(layout, rotary=False)
    y = tokens(layout, layout.page_size).unsqueeze(2)
    first = 40
    cosine, sine = cos_sin_table(frame, layout, first, 1)
    words = frame.tables
    D = layout.head_dim
    without = torch.cat([words[:, : 5 * D], words[:, 5 * D + D // 2 :]], 1)
    unrotated = from_coded(y, still, Calibrated(without), first)
    order = frame.section("order", layout).long()[None, :, None, None, :].expand_as(y)
    a, b = unrotated.gather(-1, order).chunk(2, -1)
    rotated = torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1)
    rotated = torch.zeros_like(y).scatter(-1, order, rotated)
    assert (to_coded(rotated, layout, frame, first) - y).abs().max() < CODED_ERROR


@given(st.lists(st.integers(-(2**45), 2**45), min_size=1, max_size=50))
def test_sine_and_cosine_are_right_to_fp32(phases: list[int]) -> None:
    phase = torch.tensor(phases)
    angle = (phase % 2**32).double() * (2 * math.pi / 2**32)
    cosine, sine = cosine_and_sine(phase)
    assert (cosine - angle.cos()).abs().max() < 1.5e-7
    assert (sine - angle.sin()).abs().max() < 1.5e-7


def test_e4m3_numbers_are_those_of_torch() -> None:
    every = torch.arange(256).to(torch.uint8)
    known = every.view(torch.float8_e4m3fn).float()
    finite = known.isfinite()
    assert torch.equal(e4m3_value(every)[finite], known[finite])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1 << 16, generator=generator) * torch.rand(1 << 16, generator=generator) * 200
    x = x.clamp(-448, 448)  # beyond, PyTorch 2.11 gives NaN and 2.13 the largest number
    assert torch.equal(e4m3_value(round_e4m3(x)), x.to(torch.float8_e4m3fn).float())


@given(st.floats(-448, 448, width=32))
def test_no_e4m3_number_is_nearer_than_the_rounded_one(x: float) -> None:
    every = torch.arange(256).to(torch.uint8).view(torch.float8_e4m3fn).float()
    nearest = (every[every.isfinite()] - x).abs().min()
    assert (e4m3_value(round_e4m3(torch.tensor([x]))) - x).abs() == nearest


@given(st.integers(0, 2**16), st.sampled_from([(1, 3), (2, 4), (4, 8)]))
def test_no_centroid_is_nearer_than_the_stored_one(seed: int, codebook: tuple[int, int]) -> None:
    couple, bits = codebook
    generator = torch.Generator().manual_seed(seed)
    book = torch.randn(2, 16 // couple, 1 << bits, couple, generator=generator)
    y = torch.randn(1, 2, 1, 8, 16, generator=generator)
    grouped = y.unflatten(-1, (-1, couple))
    found = nearest_centroid(y, book)
    for head in range(2):
        for group in range(16 // couple):
            distance = torch.cdist(
                grouped[0, head, 0, :, group].double(), book[head, group].double()
            )
            picked = distance.gather(1, found[0, head, 0, :, group, None].long())[:, 0]
            assert (picked <= distance.amin(1) + 1e-6).all()


@given(framed_layouts(), st.integers(0, 200))
def test_exact_rows_come_back_exactly(framed: Framed, count: int) -> None:
    layout, frame = framed
    x = tokens(layout, count)
    parts = appended(framed, x)
    read = reference.read(*parts, count, layout, frame)
    packed = slice(layout.sinks, layout.sinks + layout.pages_at(count) * layout.page_size)
    exact = torch.ones(count, dtype=torch.bool)
    exact[packed] = False
    assert torch.equal(read[:, :, exact], x[:, :, exact])


@given(framed_layouts(), st.integers(1, 3))
def test_coded_rows_come_back_within_half_a_step_and_what_is_cut(
    framed: Framed, pages: int
) -> None:
    """In coded form, where groups are: half a step, the margin, and parameters rounded to fp16."""
    layout, frame = framed
    assume(layout.scheme.name == "uniform")
    layout = changed(layout, params="fp16")
    first, size = layout.sinks, pages * layout.page_size
    x = tokens(layout, first + size + layout.window)
    read = reference.read(*appended((layout, frame), x), x.shape[2], layout, frame)
    groups, found = (
        reference.to_groups(
            to_coded(t[:, :, first : first + size].unflatten(2, (pages, -1)), layout, frame, first),
            layout,
        )
        for t in (x, read)
    )
    lo, hi = groups.amin(-1), groups.amax(-1)
    margin = frame.margin(layout)
    step = (hi - lo) * (1 - 2 * margin) / (layout.levels - 1)
    largest = groups.abs().amax(-1)
    rounding = 2 * torch.finfo(torch.float16).eps * largest + 2 * CODED_ERROR
    limit = (hi - lo) * margin + step / 2 + rounding
    assert ((found - groups).abs() <= limit[..., None]).all()


@given(framed_layouts(), st.integers(40, 200), st.integers(0, 60))
def test_a_cache_keeps_its_frame_through_everything_a_cache_goes_through(
    framed: Framed, count: int, more: int
) -> None:
    layout, frame = framed
    x = tokens(layout, count + more)
    cache = QuantizedKV.from_dense(x[:, :, :count], layout, tables=frame.tables, shift=frame.shift)
    grown = torch.cat([cache, x[:, :, count:]], 2)
    whole = QuantizedKV.from_dense(x, layout, tables=frame.tables, shift=frame.shift)
    assert torch.equal(grown.dequantize(), whole.dequantize())
    turned = whole.index_select(0, torch.tensor([1, 0]))
    assert torch.equal(turned.dequantize(), whole.dequantize()[[1, 0]])
    assert torch.equal(whole.clone().dequantize(), whole.dequantize())
    doubled = torch.cat([whole.clone(), whole.clone()], 0)
    assert torch.equal(doubled.dequantize(), whole.dequantize().repeat(2, 1, 1, 1))


def test_tables_that_differ_have_layouts_that_differ() -> None:
    one, other = (
        random_tables(2, 64, group_size=64, rotary=False, codebook=None, seed=seed)
        for seed in (0, 1)
    )
    assert one != other
    assert one == Tables(one.words.clone(), 64)


@pytest.mark.parametrize(
    ("name", "value"),
    [("order", torch.zeros(1, 4)), ("scale", torch.zeros(1, 4)), ("margin", torch.full((1, 4), 0.5)),
     ("mean", torch.full((1, 4), math.nan)), ("codebook", torch.zeros(1, 2, 4, 3)),
     ("frequency", torch.zeros(1, 4)), ("scale", torch.tensor([[1.0, 1.0, 1.0, 2.0]]))],
)  # fmt: skip
def test_tables_of_wrong_shape_or_value_are_refused(name: str, value: torch.Tensor) -> None:
    sections = {
        "order": torch.arange(4)[None],
        "mean": torch.zeros(1, 4),
        "scale": torch.ones(1, 4),
        "margin": torch.zeros(1, 4),
        "frequency": torch.zeros(1, 2),
    }
    Tables.build(**sections)
    with pytest.raises(ValueError, match=name):
        Tables.build(**(sections | {name: value}))
