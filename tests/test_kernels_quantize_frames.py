"""Quantize-on-write leaves the bytes of the reference in every format, whatever tables say.

As `test_kernels_quantize_kv`, whose layouts are the plain ones: kernels run natively where there is
a GPU and in Triton's interpreter elsewhere, the reference always on the CPU.
"""

from fractions import Fraction
from itertools import pairwise

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

import written_caches
from kvq_compile.kernels import reference
from kvq_compile.kernels.layout import Layout, Regions
from kvq_compile.kernels.packed import Calibrated, Packed, paged
from kvq_compile.kernels.reference import formats as reference_formats
from kvq_compile.kernels.reference import rope
from kvq_compile.kernels.schemes import Codebook, Role, Uniform
from kvq_compile.kernels.tables import Tables
from kvq_compile.kernels.triton import backend, transforms
from kvq_compile.kernels.triton.constants import ReadConstants, WriteConstants
from kvq_compile.kernels.triton.formats import e4m3_value, round_e4m3
from kvq_compile.testing import changed
from kvq_compile.testing.small_tables import framed_layouts, random_tables
from native import CONVERSIONS, DEVICE, OVERFLOWS, examples, frame_on_device
from uncalibrated import Framed, plain_layouts
from written_caches import DTYPES, REOPENING_DTYPES, SPECIAL, SPECIAL_E4M3, full, pieces, spoil

pytestmark = [CONVERSIONS, OVERFLOWS, pytest.mark.usefixtures("wide_tiles")]
EXAMPLES = examples(Fraction(1, 3))


@st.composite
def codebooks(draw: st.DrawFn) -> Framed:
    """Draw codebooks whose entries and tokens are so coarse that many distances are equal."""
    role: Role = draw(st.sampled_from(["key", "value"]))
    couple = draw(st.sampled_from([2, 4, 8]))
    bits = sum(draw(st.sets(st.sampled_from((1, 2, 4, 8)), min_size=1, max_size=3)))
    bits = min(bits, 10)
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    order = torch.stack([torch.randperm(64, generator=generator) for _ in range(2)])
    rotary = role == "key" and draw(st.booleans())
    frequency = torch.randint(-(2**31), 2**31, (2, 32), generator=generator)
    tables = Tables.build(
        order=order, mean=torch.zeros(2, 64), scale=torch.ones(2, 64), margin=torch.zeros(2, 64),
        frequency=frequency if rotary else None,
        codebook=torch.randint(-3, 4, (2, 64 // couple, 1 << bits, couple), generator=generator),
    )  # fmt: skip
    scheme = Codebook(bits, couple, rotary, tables.digest)
    layout = Layout(role, 64, Regions(1, draw(st.integers(0, 9)), 32), scheme)
    return layout, Calibrated(
        tables.words, torch.tensor([-5], dtype=torch.int32) if rotary else None
    )


def uniform(framed: Framed) -> bool:
    """Return whether a layout is one that the interpreter runs fast and the reference exactly."""
    return framed[0].scheme.name == "uniform" and framed[0].transform == "none"


def formats(batch: int = 1) -> st.SearchStrategy[Framed]:
    tabled = framed_layouts(batch=batch, head_dims=(64, 72, 80, 96), page_sizes=(32,)).filter(
        uniform
    )
    return st.one_of(tabled, tabled, plain_layouts())


def random_tokens(layout: Layout, tokens: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Return tokens of two sequences with two heads, laid out as a projection leaves them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, 2, layout.head_dim, generator=generator)
    return (2 * x).to(dtype).transpose(1, 2)


def make_caches(framed: Framed, dtype: torch.dtype, batch: int = 1) -> written_caches.Caches:
    layout, frame = framed
    return written_caches.Caches(layout, dtype, frame, batch)


@EXAMPLES
@given(st.data())
def test_tokens_leave_the_bytes_of_the_reference_in_whatever_pieces_they_come(
    data: st.DataObject,
) -> None:
    framed = data.draw(formats(batch=2))
    dtype = data.draw(st.sampled_from(DTYPES))
    caches, count = make_caches(framed, dtype, batch=2), full(framed[0], 2)
    x = random_tokens(framed[0], count, dtype, 0)
    for start, stop in pairwise(pieces(data, framed[0], count)):
        caches.append(x[:, :, start:stop], start, data.draw(st.booleans()))
    caches.assert_equal()


@pytest.mark.long(but=["1", "2"])
@pytest.mark.parametrize("heads", [1, 2, 3])
def test_a_growing_cache_without_parameters_is_written_for_any_number_of_heads(heads: int) -> None:
    tables = random_tables(heads, 64, group_size=64, rotary=False, codebook=(4, 8), seed=0)
    layout = Layout("value", 64, Regions(1, 3, 32), Codebook(8, 4, False, tables.digest))
    x = torch.randn(2, heads, full(layout, 2), 64)
    expected, actual = (list(Packed.growing(y, y.shape[2], layout)) for y in (x, x.to(DEVICE)))
    reference.append_(*paged(expected, layout), x, 0, layout, Calibrated(tables.words), None, None)
    frame = frame_on_device(Calibrated(tables.words))
    backend.append_(actual, frame, x.to(DEVICE), None, 0, layout, None, None)
    for ours, theirs in zip(actual, expected, strict=True):
        assert torch.equal(ours.cpu(), theirs)


@EXAMPLES
@given(st.data())
def test_rewriting_from_an_earlier_slot_leaves_the_bytes_of_the_reference(
    data: st.DataObject,
) -> None:
    framed = data.draw(formats() | codebooks())
    layout = framed[0]
    dtype = data.draw(st.sampled_from(REOPENING_DTYPES))
    caches, count = make_caches(framed, dtype), full(layout, 1) + data.draw(st.integers(0, 9))
    caches.append(random_tokens(layout, count, dtype, 0), 0, True)
    # A page is cut open where fewer tokens are left than it has.
    start = data.draw(st.integers(layout.sinks, layout.sinks + 31) | st.integers(0, count))
    tokens = data.draw(st.integers(1, 3))
    caches.append(random_tokens(layout, tokens, dtype, 1), start, data.draw(st.booleans()))
    caches.assert_equal()
    start += tokens
    rest = max(1, full(layout, 1) - start)
    caches.append(random_tokens(layout, rest, dtype, 2), start, False)
    caches.assert_equal()


@EXAMPLES
@given(st.data())
def test_any_element_is_coded_as_the_reference_codes_it(data: st.DataObject) -> None:
    framed = data.draw(formats() | codebooks())
    caches = make_caches(framed, torch.float32)
    x = random_tokens(framed[0], full(framed[0], 1), torch.float32, 0)[:1].contiguous()
    spoil(data, x, SPECIAL + SPECIAL_E4M3)
    caches.append(x, 0, True)
    caches.assert_equal()


@EXAMPLES
@given(st.data())
def test_entries_are_the_nearest_and_the_first_of_those_as_near(data: st.DataObject) -> None:
    framed = data.draw(codebooks())
    caches = make_caches(framed, torch.float16)
    x = (random_tokens(framed[0], full(framed[0], 1), torch.float32, 0) * 2).round() / 2
    caches.append(x.half(), 0, data.draw(st.booleans()))
    caches.assert_equal()


@EXAMPLES
@given(st.data())
def test_a_rotation_that_does_not_round_leaves_the_bytes_of_the_reference(
    data: st.DataObject,
) -> None:
    """Sums of integers do not round, nor do products by the root of 16 or 64 numbers."""
    head_dim = data.draw(st.sampled_from([64, 80]))
    tables = random_tables(
        2, head_dim, group_size=16, rotary=False, codebook=None, seed=data.draw(st.integers(0, 99))
    )
    order, _, _, _, margin = (
        tables.words.view(2, -1)[:, : 5 * head_dim].unflatten(1, (5, -1)).unbind(1)
    )
    tables = Tables.build(
        order=order, mean=(order % 5).float(), scale=2.0 ** (order % 3), margin=margin.view(torch.float32)
    )  # fmt: skip
    spec = Uniform(
        data.draw(st.sampled_from([1.5, 2, 4])), group_size=16, transform="hadamard", tables=tables.digest,
        params=data.draw(st.sampled_from(["fp16", "fp8"])),
    )  # fmt: skip
    role = data.draw(st.sampled_from(["key", "value"]))
    layout = Layout(role, head_dim, Regions(1, 3, 32), spec)
    caches = make_caches((layout, Calibrated(tables.words)), torch.float32)
    caches.append(random_tokens(layout, full(layout, 1), torch.float32, 0).round(), 0, True)
    caches.assert_equal()
    caches.append(random_tokens(layout, 1, torch.float32, 1), 20, True)
    exact = [caches.held(parts)[2] for parts in (caches.actual, caches.expected)]
    torch.testing.assert_close(*exact, rtol=1e-5, atol=1e-4)


@triton.jit
def turn_kernel(phase, cosine, sine, N: tl.constexpr):
    where = tl.arange(0, N)
    c, s = transforms.cosine_and_sine(tl.load(phase + where))
    tl.store(cosine + where, c)
    tl.store(sine + where, s)


@triton.jit
def round_kernel(x, byte, value, N: tl.constexpr):
    where = tl.arange(0, N)
    rounded = round_e4m3(tl.load(x + where))
    tl.store(byte + where, rounded)
    tl.store(value + where, e4m3_value(rounded))


@given(st.lists(st.integers(-(2**45), 2**45), min_size=64, max_size=64))
@example([k * 2**29 + d for k in range(-8, 8) for d in (-1, 0, 1, 2**50)])
def test_angles_that_wrap_have_the_cosine_and_sine_of_those_that_do_not(phases: list[int]) -> None:
    phase = torch.tensor(phases)
    wrapped = ((phase + 2**31) % 2**32 - 2**31).int().to(DEVICE)
    actual = torch.empty(2, 64, device=DEVICE)
    turn_kernel[(1,)](wrapped, actual[0], actual[1], N=64, enable_fp_fusion=False)
    expected = torch.stack(rope.cosine_and_sine(phase))
    assert torch.equal(actual.cpu().view(torch.int32), expected.view(torch.int32))


def test_every_e4m3_number_and_what_lies_around_it_is_rounded_as_the_reference_rounds() -> None:
    known = reference_formats.e4m3_value(torch.arange(128, dtype=torch.uint8))
    halves = (known[1:] + known[:-1]) / 2
    points = torch.cat([known, halves, torch.tensor([500.0, 7e4])])
    bits = points.view(torch.int32)
    around = torch.cat([(bits + d).clamp_min(0).view(torch.float32) for d in (-1, 0, 1)])
    x = torch.cat([around, -around, torch.zeros(2048 - 2 * len(around))]).to(DEVICE)
    byte, value = torch.empty_like(x, dtype=torch.int32), torch.empty_like(x)
    round_kernel[(1,)](x, byte, value, N=2048, enable_fp_fusion=False)
    expected = reference_formats.round_e4m3(x.cpu())
    assert torch.equal(byte.cpu(), expected.int())
    assert torch.equal(value.cpu(), reference_formats.e4m3_value(expected))


def test_tables_of_the_same_form_share_a_kernel() -> None:
    layouts = [
        Layout("key", 64, Regions(), Uniform(2, tables=tables.digest))
        for tables in (
            random_tables(2, 64, group_size=64, rotary=False, codebook=None, seed=seed)
            for seed in (0, 1)
        )
    ]
    assert layouts[0] != layouts[1]
    for constants in (ReadConstants, WriteConstants):
        one, other = (constants.of(layout) for layout in layouts)
        assert one is other
        assert repr(constants.of(changed(layouts[0], bits=4))) != repr(one)


def test_layouts_that_differ_only_in_how_pages_are_written_share_the_kernels_that_read_them() -> (
    None
):
    layouts = [Layout("key", 64, Regions(), Uniform(2, clip=clip)) for clip in (1.0, 0.9)]
    assert ReadConstants.of(layouts[0]) is ReadConstants.of(layouts[1])
    assert repr(WriteConstants.of(layouts[0])) != repr(WriteConstants.of(layouts[1]))
