"""The specification's quantizer keeps its promises: it is off by half a step at most, and independent of neighbours."""

import math

import pytest
import torch
from hypothesis import assume, example, find, given
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile.kernels import reference
from kvq_compile.kernels.channelwise_scheme import CLIPS
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.reference import uniform
from kvq_compile.kernels.reference.formats import round_down_fp16, round_up_fp16, sum_pairs
from kvq_compile.testing import changed, kv_tensors, page_layouts
from quantized_pages import WHOLE_WIDTHS, page_of, pages, stored, token_layout

SUBNORMAL = 2.0**-24  # the smallest positive fp16 number
FP16 = torch.arange(-(1 << 15), 1 << 15).to(torch.int16).view(torch.float16)
FINITE_FP16 = FP16[FP16.isfinite()].float().sort().values


# Rounding


def test_rounding_down_is_right_on_and_between_all_numbers_of_fp16() -> None:
    below, above = FINITE_FP16[:-1], FINITE_FP16[1:]
    distinct = below < above  # the two zeros are equal
    between = (below / 2 + above / 2)[distinct]
    just_above = torch.nextafter(below, torch.tensor(math.inf))[distinct]
    just_below = torch.nextafter(above, torch.tensor(-math.inf))[distinct]
    for x in (between, just_above, just_below):
        assert torch.equal(round_down_fp16(x).float(), below[distinct])
    assert torch.equal(round_down_fp16(FINITE_FP16).float(), FINITE_FP16)


def test_rounding_up_is_right_on_and_between_all_numbers_of_fp16_that_are_not_negative() -> None:
    numbers = FINITE_FP16[FINITE_FP16 >= 0].unique()
    below, above = numbers[:-1], numbers[1:]
    between = below / 2 + above / 2
    just_above = torch.nextafter(below, torch.tensor(math.inf))
    just_below = torch.nextafter(above, torch.tensor(-math.inf))
    for x in (between, just_above, just_below):
        assert torch.equal(round_up_fp16(x).float(), above)
    assert torch.equal(round_up_fp16(numbers).float(), numbers)


@pytest.mark.parametrize("x", [0.0, -0.0, 1e-45, -1e-45, SUBNORMAL / 2, -SUBNORMAL / 2])
def test_numbers_about_zero_round_to_a_neighbour_of_zero(x: float) -> None:
    down, up = (float(to(torch.tensor(x))) for to in (round_down_fp16, round_up_fp16))
    assert down == (-SUBNORMAL if x < 0 else 0.0)
    assert up == (SUBNORMAL if x > 0 else 0.0)


# The quantizer


def step_of(params: Tensor, layout: Layout, shape: torch.Size) -> Tensor:
    """Return the step of every element."""
    scale = params[..., 0].float()[..., None].expand(*params.shape[:-1], layout.group_size)
    return reference.from_groups(scale, layout).reshape(shape)


def assert_error_is_at_most_half_a_step(x: Tensor, layout: Layout) -> None:
    """Half a step, and what fp32 rounds: a code by 2^-13 of a step, a number by three units."""
    codes, params = reference.quantize_pages(x, layout)
    assert codes.min() >= 0
    assert codes.max() <= layout.levels
    assert params.isfinite().all()
    error = (reference.dequantize_pages(codes, params, layout).double() - x.double()).abs()
    limit = step_of(params, layout, x.shape).double() * (0.5 + 2**-13)
    limit = limit + 3 * 2**-23 * reference.to_groups(x, layout).abs().max()
    assert (error <= limit).all(), f"error exceeds half a step by {(error - limit).max()}"


@given(pages())
@example((page_of([0.0]), token_layout(4)))
@example((page_of([7.595e-43]), token_layout(8)))  # subnormal in fp32
@example((page_of([2.2e-16, -2.2e-16]), token_layout(8)))  # far below every fp16 number
@example((page_of([2.9e-8, 1e-7, 0.0]), token_layout(8)))  # a range of less than a step of fp16
@example((page_of([65504.0, -65504.0]), token_layout(2)))
@example(
    (page_of([65504.0, -65504.0, 0.0, 1.0]), token_layout(1))
)  # the step itself is beyond fp16
@example((page_of([2049.0, 2049.5, 2050.0]), token_layout(8)))  # less than a unit of fp16 apart
@example((page_of([60000.0, 60001.0]), token_layout(3)))
def test_error_is_at_most_half_a_step(case: tuple[Tensor, Layout]) -> None:
    x, layout = case
    layout = changed(layout, search=False, clip=1.0)
    if layout.bits == 1:
        x = x.clamp(-32752.0, 32752.0)  # beyond it see the test below
    assert_error_is_at_most_half_a_step(x, layout)


@given(pages())
@example((page_of([65504.0, -65504.0, 0.0, 100.0]), token_layout(1)))
def test_error_is_at_most_half_of_the_range(case: tuple[Tensor, Layout]) -> None:
    """Regression: the scale of a 1-bit group that spans all of fp16 overflowed; its numbers read as NaN."""
    x, layout = case
    layout = changed(layout, search=False, clip=1.0)
    groups = reference.to_groups(x.double(), layout)
    spread = (groups.amax(-1) - groups.amin(-1))[..., None].expand(groups.shape)
    error = (stored(x, layout).double() - x.double()).abs()
    largest = groups.abs().amax(-1)[..., None].expand(groups.shape)
    limit = reference.from_groups(spread * (0.5 + 2**-9) + largest * 2**-10, layout) + 2 * SUBNORMAL
    assert (error <= limit).all()


@given(pages(), st.sampled_from([0.99, 0.9, 0.5, 0.1]))
def test_clipping_costs_at_most_the_distance_from_the_clipped_range(
    case: tuple[Tensor, Layout], clip: float
) -> None:
    x, layout = case
    layout = changed(layout, search=False, clip=clip)
    params = reference.quantize_pages(x, layout)[1]
    groups = reference.to_groups(x.double(), layout)
    outside = (groups.amax(-1) - groups.amin(-1)) * ((1 - clip) / 2)
    outside = reference.from_groups(outside[..., None].expand(groups.shape), layout)
    if layout.bits == 1:
        outside = outside + (x.double().abs() - 32752).clamp_min(0) * 2
    error = (stored(x, layout).double() - x.double()).abs()
    half = step_of(params, layout, x.shape).double() * (0.5 + 2**-13)
    largest = float(x.abs().max())
    assert (error <= torch.maximum(outside, half) + 2**-20 * largest).all()


@given(page_layouts(transform=False), st.sampled_from(FINITE_FP16.tolist()))
@example(token_layout(4), 65504.0)
@example(token_layout(1), -65504.0)
@example(token_layout(8), SUBNORMAL)
@example(token_layout(2), -SUBNORMAL)
@example(token_layout(3), 0.0)
def test_constant_groups_of_an_fp16_number_are_exact(layout: Layout, number: float) -> None:
    x = torch.full((1, layout.page_size, layout.head_dim), number)
    codes, params = reference.quantize_pages(x, layout)
    assert (codes == 0).all()
    assert (params[..., 0] == 0).all()
    assert torch.equal(reference.dequantize_pages(codes, params, layout), x)


@given(page_layouts(transform=False), st.integers(0, 2**16))
def test_numbers_on_the_grid_of_an_fp16_step_are_exact(layout: Layout, seed: int) -> None:
    layout = changed(layout, search=False, clip=1.0)
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(
        0, layout.levels + 1, (layout.page_size, layout.head_dim), generator=generator
    )
    groups = reference.to_groups(codes, layout).clone()
    groups[..., 0], groups[..., 1] = 0, layout.levels
    x = reference.from_groups(groups, layout).float() * 0.25 - 8
    assert torch.equal(
        reference.quantize_pages(x, layout)[0], reference.from_groups(groups, layout).int()
    )
    assert torch.equal(stored(x, layout), x)


@given(pages(transform=True), st.integers(-6, 6))
def test_scaling_by_a_power_of_two_scales_what_is_read(
    case: tuple[Tensor, Layout], exponent: int
) -> None:
    """Away from the ends of fp16 only: its subnormal numbers lose bits, and it has a largest one."""
    x, layout = case
    x = torch.randn(x.shape, generator=torch.Generator().manual_seed(int(x.numel()))) + x.clamp(
        -4, 4
    )
    (codes, params), (scaled_codes, scaled_params) = (
        reference.quantize_pages(x * factor, layout) for factor in (1.0, 2.0**exponent)
    )
    assume(bool((params[..., 0] > 2.0**-8).all() and (params[..., 1].abs() > 2.0**-8).all()))
    assert torch.equal(codes, scaled_codes)
    assert torch.equal(params.float() * 2.0**exponent, scaled_params.float())


@given(pages())
def test_negation_mirrors_codes_up_to_rounding(case: tuple[Tensor, Layout]) -> None:
    """Parameters round away from the middle at one end only, so mirrored numbers differ by a step at most."""
    x, layout = case
    layout = changed(layout, search=False, clip=1.0, bits=max(2, layout.bits))
    params = [reference.quantize_pages(sign * x, layout)[1] for sign in (1, -1)]
    step = sum(step_of(p, layout, x.shape) for p in params) / 2
    difference = (stored(x, layout) + stored(-x, layout)).abs()
    assert (difference <= step * (1 + 2**-12) + 2**-20 * x.abs().max()).all()


@given(pages(transform=True, finite=False), st.data())
def test_tokens_are_quantized_independently(
    case: tuple[Tensor, Layout], data: st.DataObject
) -> None:
    """With groups inside a token, whatever the other tokens are."""
    x, layout = case
    layout = changed(layout, grouping="token", group_size=layout.head_dim)
    token = data.draw(st.integers(0, layout.page_size - 1))
    other = data.draw(kv_tensors(tuple(x.shape), finite=False))
    other[:, token] = x[:, token]
    mine, theirs = stored(x, layout)[:, token], stored(other, layout)[:, token]
    if layout.transform == "hadamard":  # a matrix product may sum in another order
        torch.testing.assert_close(mine, theirs, rtol=2**-8, atol=1e-4, equal_nan=True)
    else:
        assert torch.equal(mine, theirs)


@given(pages(), st.data())
def test_channels_are_quantized_independently(
    case: tuple[Tensor, Layout], data: st.DataObject
) -> None:
    """With groups along a channel, whatever the other channels are."""
    x, layout = case
    layout = changed(layout, grouping="channel", group_size=layout.page_size)
    channel = data.draw(st.integers(0, layout.head_dim - 1))
    other = data.draw(kv_tensors(tuple(x.shape), finite=False))
    other[..., channel] = x[..., channel]
    assert torch.equal(stored(x, layout)[..., channel], stored(other, layout)[..., channel])


@given(pages(), st.data())
@example((page_of([1.0, 2.0, 3.0]), token_layout(2)), None)
def test_elements_that_are_not_finite_change_no_other_element(
    case: tuple[Tensor, Layout], data: st.DataObject | None
) -> None:
    """Regression: a NaN or infinity took part in the range of its group.

    A searched clip weighs the error of every element, of those that stand for others as well.
    """
    x, layout = case
    assume(not getattr(layout.scheme, "search", False))
    place = data.draw(st.integers(0, x.numel() - 1)) if data else 1
    number = data.draw(st.sampled_from([math.nan, math.inf, -math.inf])) if data else math.nan
    spoiled = x.clone()
    spoiled.view(-1)[place] = number
    without = reference.to_groups(spoiled, layout).clone()
    finite = without.isfinite()
    rest = torch.where(finite, without, math.inf).amin(
        -1, keepdim=True
    )  # any finite element of the group
    without = reference.from_groups(
        torch.where(finite, without, rest.nan_to_num(posinf=0.0)), layout
    )
    expected, actual = stored(without, layout), stored(spoiled, layout)
    assert actual.isfinite().all()
    others = spoiled.isfinite()
    assert torch.equal(actual[others], expected[others])


@pytest.mark.parametrize("bits", WHOLE_WIDTHS)
def test_an_infinity_is_stored_as_an_end_of_the_range_and_nan_near_zero(bits: int) -> None:
    x = page_of([-1.0, 1.0, 0.5])
    x[0, :3] = torch.tensor([math.nan, math.inf, -math.inf])
    read = stored(x, token_layout(bits))[0]
    assert read[1] >= 1.0
    assert read[2] <= -1.0
    assert abs(float(read[0])) <= (1.001 if bits == 1 else 1.001 / token_layout(bits).levels)


@given(pages())
def test_requantizing_keeps_codes_whose_group_reaches_both_ends(
    case: tuple[Tensor, Layout],
) -> None:
    """Where a group uses its lowest and highest code and fp32 holds its numbers, it is quantized for good."""
    x, layout = case
    layout = changed(layout, search=False, clip=1.0)
    x = x.clamp(-1000, 1000).half().float()
    codes, params = reference.quantize_pages(x, layout)
    again, params_again = reference.quantize_pages(
        reference.dequantize_pages(codes, params, layout), layout
    )
    grouped = reference.to_groups(codes, layout)
    scale, zero = params.float().unbind(-1)
    exact = (scale.double() * layout.levels + zero.double()).float().double()
    exact = exact == scale.double() * layout.levels + zero.double()
    whole = (grouped.amin(-1) == 0) & (grouped.amax(-1) == layout.levels) & exact
    assert torch.equal(params[whole], params_again[whole])
    assert torch.equal(grouped[whole], reference.to_groups(again, layout)[whole])


def test_requantizing_is_not_idempotent_in_general() -> None:
    """Why a token is quantized once: a group that misses its lowest code is coded anew, differently."""

    def moves(case: tuple[Tensor, Layout]) -> bool:
        read = stored(*case)
        return not torch.equal(read, stored(read, case[1]))

    x, layout = find(pages(), moves)
    assert (stored(stored(x, layout), layout) - stored(x, layout)).abs().max() > 0


def test_the_strategy_reaches_codes_that_saturate() -> None:
    """Numbers beyond a clipped range must be drawn, or the clipping of codes would go untested."""

    def saturates(case: tuple[Tensor, Layout]) -> bool:
        x, layout = case
        params = reference.quantize_pages(x, layout)[1].float()
        groups = reference.to_groups(x, layout)
        scale, zero = params[..., :1], params[..., 1:]
        code = (groups - zero) / scale.clamp_min(1e-9)
        return bool(((code > layout.levels + 1) & (scale > 0)).any())

    find(pages(), saturates)


@pytest.mark.parametrize(
    "corner", ["subnormal scale", "zero scale", "negative zero point", "one group"]
)
def test_the_strategy_reaches(corner: str) -> None:
    def reached(case: tuple[Tensor, Layout]) -> bool:
        x, layout = case
        scale, zero = reference.quantize_pages(x, layout)[1].float().unbind(-1)
        return {
            "subnormal scale": bool(((scale > 0) & (scale < 6e-5)).any()),
            "zero scale": bool((scale == 0).any()),
            "negative zero point": bool((zero < 0).any()),
            "one group": scale.shape[-2] == 1,
        }[corner]

    find(pages(), reached)


@given(kv_tensors((2, 8, 64)))
def test_the_strategy_of_finite_tokens_draws_no_other(x: Tensor) -> None:
    assert x.isfinite().all()


@given(pages(), st.sampled_from(CLIPS))
@example((page_of([1.0, -1.0, 0.0, 1e-7]), token_layout(1)), 0.5)
def test_a_searched_clip_leaves_no_more_error_than_any_that_is_tried(
    case: tuple[Tensor, Layout], clip: float
) -> None:
    x, layout = case
    groups = reference.to_groups(x, layout)

    def error(codes: Tensor, params: Tensor) -> Tensor:
        off = uniform.group_values(codes, params, layout.levels, layout.params) - groups
        return sum_pairs(off * off)

    found = error(*uniform.quantize_searched(groups, layout.levels, layout.params))
    margin = (1.0 - clip) / 2.0
    tried = error(*uniform.quantize_groups(groups, layout.levels, layout.params, margin))
    assert bool((found <= tried).all())
