"""Pages of mixed widths keep their promises: the budget holds, codes are embedded, errors stay in a segment."""

import math

import pytest
import torch
from hypothesis import assume, example, given
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile.kernels import reference
from kvq_compile.kernels.adaptive.targets import key_bound, value_bound
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.reference import mixed
from kvq_compile.testing import changed, kv_tensors, mixed_layout

FP8_ROUNDING = 1 / 16  # half the distance of neighbours, relative to a normal number of e4m3
FP8_LEAST = 2.0**-10  # half the distance of its subnormal numbers
N = 32  # tokens of a page in most tests


def layout_of(budget: float, **rest: object) -> Layout:
    return mixed_layout(budget, N, 32, **rest)


@st.composite
def layouts(draw: st.DrawFn, **fixed: object) -> Layout:
    low = draw(st.integers(0, 3))
    high = draw(st.integers(low + 1, 8))
    rows = draw(st.integers(max(1, low * N), high * N))
    arguments: dict[str, object] = {
        "head_dim": draw(st.sampled_from([16, 32, 80])),
        "min_bits": low,
        "max_bits": high,
        "outliers": draw(st.sampled_from([0, 2, 4])),
        "params": draw(st.sampled_from(["fp8", "fp16"])),
        "fit": draw(st.booleans()),
        "soften": draw(st.booleans()),
    }
    return mixed_layout(rows / N, N, **(arguments | fixed))


@st.composite
def pages(
    draw: st.DrawFn, finite: bool = True, **fixed: object
) -> tuple[Tensor, Tensor | None, Layout]:
    """Return pages ``[2, N, D]``, their importance and a layout."""
    layout = draw(layouts(**fixed))
    x = draw(kv_tensors((2, N, layout.head_dim), finite=finite)).float()
    seed = draw(st.none() | st.integers(0, 2**16))
    if seed is None:
        return x, None, layout
    generator = torch.Generator().manual_seed(seed)
    return x, torch.rand(2, N, generator=generator) ** 8, layout


def bits_of(codes: Tensor, records: Tensor, layout: Layout) -> Tensor:
    return mixed.unpack(codes, records, layout)[1]


def stored(x: Tensor, importance: Tensor | None, layout: Layout) -> Tensor:
    return mixed.dequantize_pages(*mixed.quantize_pages(x, importance, layout), layout)


def random_levels(seed: int, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return 8-bit codes ``[3, N, D]`` and bits ``[3, N]`` that fit the budget."""
    generator = torch.Generator().manual_seed(seed)
    levels = torch.randint(0, 256, (3, N, layout.head_dim), generator=generator, dtype=torch.int32)
    return levels, mixed.allocate(torch.rand(3, N, generator=generator), None, layout)


def upper(levels: Tensor, bits: Tensor) -> Tensor:
    """Keep the upper ``bits`` of 8-bit codes."""
    shift = (8 - bits)[..., None]
    return (levels >> shift) << shift


# The budget


@given(pages(finite=False))
def test_a_page_never_exceeds_its_budget(case: tuple[Tensor, Tensor | None, Layout]) -> None:
    x, importance, layout = case
    codes, records = mixed.quantize_pages(x, importance, layout)
    assert codes.shape == (2, 1, layout.row_words)
    assert records.shape == (2, layout.mixed.metadata_bytes(layout.head_dim), N, 1)
    bits = bits_of(codes, records, layout)
    assert bits.sum(-1).max() <= layout.code_rows
    assert layout.mixed.min_bits <= bits.min()
    assert bits.max() <= layout.mixed.max_bits


@given(layouts(), st.integers(0, 2**16))
def test_a_budget_is_used_up_where_all_tokens_differ(layout: Layout, seed: int) -> None:
    """Rows are left over only where one more would be wanted by tokens that need it equally."""
    generator = torch.Generator().manual_seed(seed)
    span = torch.rand(N, generator=generator) + 0.5
    need = span[:, None] * torch.exp2(
        -torch.arange(layout.mixed.min_bits, layout.mixed.max_bits).float()
    )
    assume(len(need.unique()) == need.numel())
    assert mixed.allocate(span, None, layout).sum() == layout.code_rows


@given(pages())
def test_the_bits_are_those_of_the_smallest_bound_that_fits(
    case: tuple[Tensor, Tensor | None, Layout],
) -> None:
    """A bound that is any smaller asks for more rows than there are."""
    x, importance, layout = case
    span = x.amax(-1) - x.amin(-1)
    weighted = span
    if importance is not None:
        weighted = span * (mixed.soften(importance) if layout.mixed.soften else importance)
    bits = mixed.allocate(span, importance, layout)
    more = bits < layout.mixed.max_bits
    gain = torch.where(more, weighted * torch.exp2(-bits.float()), -1.0)
    best = gain == gain.amax(-1, keepdim=True)
    crowd = (best & (gain > 0)).sum(-1)
    assert ((bits.sum(-1) + crowd > layout.code_rows) | (crowd == 0)).all()


def test_bits_held_count_codes_header_and_records() -> None:
    layout = mixed_layout(2.125, 128, 128, outliers=2)
    codes, records = mixed.quantize_pages(torch.randn(5, 128, 128), None, layout)
    held = codes.numel() * codes.element_size() + records.numel() * records.element_size()
    assert layout.bits_per_element == 8 * held / (5 * 128 * 128)
    assert layout.bits_per_element == 2.125 + 8 * 16 / 128**2 + 8 * (3 + 2 * 3) / 128


# Packing


@given(layouts(), st.integers(0, 2**16))
def test_unpacking_gives_back_the_bits_that_were_kept(layout: Layout, seed: int) -> None:
    levels, bits = random_levels(seed, layout)
    records = torch.zeros(3, layout.mixed.metadata_bytes(layout.head_dim), N, 1, dtype=torch.uint8)
    records[:, layout.mixed.rank_field, :, 0] = mixed.rank(bits).to(torch.uint8)
    kept, held = mixed.unpack(mixed.pack(levels, bits, layout), records, layout)
    assert torch.equal(held, bits)
    assert torch.equal(kept, upper(levels, bits))


def test_a_bit_lies_in_the_row_and_unit_that_the_layout_names() -> None:
    layout = layout_of(2.0)
    bits = torch.full((N,), 2, dtype=torch.int32)
    bits[5], bits[7] = 3, 1  # sorted: 5, 0, 1, 2, 3, 4, 6, 8, 9, ..., 31, 7
    levels = torch.zeros(N, 32, dtype=torch.int32)
    levels[5, 18] = 0b00100000  # the third bit of channel 2 of unit 1
    levels[8, 3] = 0b01000000  # the second bit of channel 3 of unit 0
    words = mixed.pack(levels, bits, layout)[0].int() & 0xFFFF
    assert words[:8].tolist() == [N, N - 1, 1, 0, 0, 0, 0, 0]
    rows = words[8:].view(-1, 2)
    expected = torch.zeros_like(rows)
    expected[N + 7, 0] = 1 << 3
    expected[2 * N - 1, 1] = 1 << 2
    assert torch.equal(rows, expected)


@given(layouts(), st.integers(0, 2**16))
def test_ranks_are_a_permutation_that_sorts_the_bits(layout: Layout, seed: int) -> None:
    _, bits = random_levels(seed, layout)
    order = mixed.rank(bits)
    assert torch.equal(order.sort(-1).values, torch.arange(N).expand_as(order))
    in_order = torch.empty_like(bits).scatter(-1, order, bits)
    assert (in_order.diff(dim=-1) <= 0).all()
    slots = torch.empty_like(order).scatter(-1, order, torch.arange(N).expand_as(order))
    assert (slots.diff(dim=-1)[in_order.diff(dim=-1) == 0] > 0).all()  # ties by slot


def test_reading_puts_tokens_back_at_their_slots() -> None:
    """Each token is constant, at a number of its own, so that it is exact whatever its bits are."""
    token = torch.arange(N).float()
    x = token[:, None].expand(N, 32)
    layout = layout_of(1.0, params="fp16")
    assert torch.equal(stored(x, token.flip(0), layout), x)
    noise = torch.linspace(-0.1, 0.1, 32) * (token[:, None] * 7 % 5 + 1)
    read = stored(x + noise, None, layout_of(2.0, params="fp16"))
    assert torch.equal(read.mean(-1).round(), token)


# Codes


@given(pages(finite=False), st.integers(0, 2**16))
def test_dropping_planes_is_quantizing_with_fewer_bits(
    case: tuple[Tensor, Tensor | None, Layout], seed: int
) -> None:
    x, importance, layout = case
    codes, records = mixed.quantize_pages(x, importance, layout)
    levels, bits = mixed.unpack(codes, records, layout)
    generator = torch.Generator().manual_seed(seed)
    wanted = torch.randint(0, 9, bits.shape, generator=generator)
    mixed.requantize_down_(codes, records, wanted, layout)
    fewer = torch.minimum(bits, wanted)
    kept, held = mixed.unpack(codes, records, layout)
    assert torch.equal(held, fewer.int())
    assert torch.equal(kept, upper(levels, fewer))
    _, other = mixed.quantize_pages(x, importance, layout)
    other[..., layout.mixed.rank_field, :, 0] = mixed.rank(fewer).to(torch.uint8)
    full = all_levels(x, layout)
    assert torch.equal(mixed.pack(full, fewer.int(), layout), codes)
    assert torch.equal(other, records)


def all_levels(x: Tensor, layout: Layout) -> Tensor:
    """Return the 8-bit codes of pages, by quantizing them with 8 bits each."""
    wide = changed(layout, bits=8, min_bits=7, max_bits=8)
    codes, records = mixed.quantize_pages(x, None, wide)
    return mixed.unpack(codes, records, wide)[0]


@given(pages(outliers=0))
def test_no_bits_stand_for_the_centre(case: tuple[Tensor, Tensor | None, Layout]) -> None:
    x, importance, layout = case
    codes, records = mixed.quantize_pages(x, importance, layout)
    mixed.requantize_down_(codes, records, torch.zeros(2, N), layout)
    centre = mixed.store(x.amin(-1) * 0.5 + x.amax(-1) * 0.5, layout)
    expected = mixed.stored_value(centre)[..., None].expand_as(x)
    assert torch.equal(mixed.dequantize_pages(codes, records, layout), expected)


def error_limit(x: Tensor, bits: Tensor, layout: Layout) -> Tensor:
    """Return how far numbers ``[..., N, D]`` without outliers may be from what is read.

    A number lies within the stored reach of the stored centre, or beyond it by what rounding the reach has
    taken off, which fp16 never does. There it is off by half a segment, ``reach / 2 ** bits``, and in fp32
    by rounding of the code and of the result.
    """
    lo, hi = x.amin(-1), x.amax(-1)
    centre = mixed.stored_value(mixed.store(lo * 0.5 + hi * 0.5, layout))
    reach = torch.maximum(hi - centre, centre - lo)
    held = mixed.stored_value(mixed.store(reach, layout, up=True))
    beyond = (reach - held).clamp_min(0)
    assert (
        beyond <= (reach * FP8_ROUNDING).clamp_min(FP8_LEAST) + (reach - 448).clamp_min(0)
    ).all()
    rounding = 2.0**-22 * (held + centre.abs())
    return held * torch.exp2(-bits.float()) + beyond + rounding


@given(pages(outliers=0, fit=False))
@example(
    (torch.full((2, N, 16), 3e-8), None, mixed_layout(2.0, N, 16, fit=False))
)  # below the least e4m3
@example(
    (torch.full((2, N, 16), -(2.0**15)), None, mixed_layout(2.0, N, 16, fit=False))
)  # beyond the largest
def test_an_error_is_at_most_half_a_segment(
    case: tuple[Tensor, Tensor | None, Layout],
) -> None:
    x, importance, layout = case
    codes, records = mixed.quantize_pages(x, importance, layout)
    bits = bits_of(codes, records, layout)
    error = (mixed.dequantize_pages(codes, records, layout) - x).abs().amax(-1)
    assert (error <= error_limit(x, bits, layout)).all()


@given(pages(fit=False))
def test_outliers_are_exact_and_widen_no_segment(
    case: tuple[Tensor, Tensor | None, Layout],
) -> None:
    x, importance, layout = case
    half = layout.mixed.outliers // 2
    x = x.clamp(-59000.0, 59000.0)  # nothing drawn reaches further than the outliers
    x[..., 1 : 1 + half], x[..., 8 : 8 + half] = 60000.0, -60000.0
    codes, records = mixed.quantize_pages(x, importance, layout)
    read = mixed.dequantize_pages(codes, records, layout)
    outlier = torch.zeros(layout.head_dim, dtype=torch.bool)
    outlier[1 : 1 + half] = outlier[8 : 8 + half] = True
    assert torch.equal(read[..., outlier], x[..., outlier].half().float())
    kept = x.sort(-1).values[..., half : layout.head_dim - half]
    limit = error_limit(kept, bits_of(codes, records, layout), layout)[..., None]
    error = (read - x.half().float()).abs()
    slack = (x - x.half().float()).abs()  # an outlier is as exact as fp16 is
    assert (error <= limit + slack).all()


@given(st.integers(0, 2**16), st.integers(1, 4), st.floats(-2, 2))
def test_a_fitted_token_keeps_its_product_with_itself(seed: int, bits: int, shift: float) -> None:
    """About the stored centre, and up to the rounding of its reach."""
    x = torch.randn(N, 64, generator=torch.Generator().manual_seed(seed)) + shift
    layout = mixed_layout(bits, N, 64, min_bits=bits - 1, max_bits=bits)
    codes, records = mixed.quantize_pages(x, None, layout)
    centre = mixed.stored_value(records[0])
    offset, read = x - centre, mixed.dequantize_pages(codes, records, layout) - centre
    power = (offset * offset).sum(-1)
    assert (((offset * read).sum(-1) - power).abs() <= power * (FP8_ROUNDING + 1e-5)).all()


@given(pages(outliers=0, finite=True))
def test_fitting_changes_no_code_and_at_most_doubles_the_reach(
    case: tuple[Tensor, Tensor | None, Layout],
) -> None:
    x, importance, layout = case
    plain = mixed.quantize_pages(x, importance, changed(layout, fit=False))
    fitted = mixed.quantize_pages(x, importance, changed(layout, fit=True))
    assert torch.equal(plain[0], fitted[0])
    size = layout.mixed.param_bytes
    before, after = (
        mixed.stored_value(mixed.from_bytes(records[:, size : 2 * size, :, 0].mT))
        for _, records in (plain, fitted)
    )
    lo, hi = x.amin(-1), x.amax(-1)
    reach = torch.maximum(before, hi - lo)  # numbers beyond a reach rounded down count as well
    assert (after <= (2 * reach * (1 + FP8_ROUNDING)).clamp_min(2 * FP8_LEAST)).all()


@given(pages(finite=False))
def test_what_is_read_is_finite(case: tuple[Tensor, Tensor | None, Layout]) -> None:
    x, importance, layout = case
    assert stored(x, importance, layout).isfinite().all()


@given(st.integers(1, 300))
def test_sums_of_pairs_are_sums(length: int) -> None:
    generator = torch.Generator().manual_seed(length)
    x = torch.randint(-1000, 1000, (3, length), generator=generator).float()
    assert torch.equal(mixed.sum_pairs(x), x.sum(-1))


@given(pages(finite=False), st.integers(0, 1))
def test_a_page_is_quantized_independently_of_others(
    case: tuple[Tensor, Tensor | None, Layout], page: int
) -> None:
    x, importance, layout = case
    together = mixed.quantize_pages(x, importance, layout)
    alone = mixed.quantize_pages(x[page], None if importance is None else importance[page], layout)
    for a, b in zip(together, alone, strict=True):
        assert torch.equal(a[page], b)


# Who gets bits


@given(layouts(), st.integers(1, 1000))
def test_equal_tokens_get_equal_bits(layout: Layout, span: int) -> None:
    equal = torch.full((N,), span / 64)
    bits = mixed.allocate(equal, torch.full((N,), 0.25), layout)
    assert (bits == int(layout.bits)).all()


@given(st.integers(0, 2**16))
def test_bits_of_values_fall_by_one_when_attention_halves(seed: int) -> None:
    """In target mode, until bits are clamped; see the paper's sigma ~ 1 / A."""
    layout = layout_of(8.0, max_bits=8, soften=False)
    generator = torch.Generator().manual_seed(seed)
    span = torch.rand(N, generator=generator) + 0.1
    attention = torch.rand(N, generator=generator)
    bound = value_bound(0.01, 1000)
    bits = mixed.allocate(span, attention, layout, bound)
    half = mixed.allocate(span, attention / 2, layout, bound)
    inside = bits < 8
    assert torch.equal(half[inside], (bits[inside] - 1).clamp_min(0))


@given(st.integers(0, 2**16), st.floats(1e-3, 1e3))
def test_bits_are_those_of_the_paper(seed: int, sigma: float) -> None:
    """``ceil(log2(range / (2 sqrt(3) sigma)))``, clamped, away from the steps of the logarithm."""
    layout = layout_of(4.0)
    span = torch.rand(N, generator=torch.Generator().manual_seed(seed)) * 100 + 1e-3
    exponent = (span.double() / (2 * math.sqrt(3) * sigma)).log2()
    clear = (exponent - exponent.round()).abs() > 1e-5
    bits = mixed.allocate(span, None, layout, 2 * math.sqrt(3) * sigma)
    expected = exponent.ceil().clamp(0, 4).int()
    assert torch.equal(bits[clear], expected[clear])


@given(pages())
def test_a_larger_target_never_takes_more_bits(
    case: tuple[Tensor, Tensor | None, Layout],
) -> None:
    x, importance, layout = case
    span = x.amax(-1) - x.amin(-1)
    last = mixed.allocate(span, importance, layout)
    for bound in (0.01, 0.1, 1.0, 10.0):
        bits = mixed.allocate(span, importance, layout, bound)
        assert (bits <= last).all()
        last = bits


def test_bounds_are_those_of_the_paper() -> None:
    """In the form of the paper's code range 10, squared norm 300 and T = 512 give 3.01 bits."""
    bound = key_bound(300.0, 1.0, 512, 1)
    assert math.log2(10 / (2 * bound) + 1) == pytest.approx(3.01, abs=0.005)
    assert key_bound(300.0 * 128, 1.0, 512, 128) == bound
    assert value_bound(0.5, 400) == 2 * math.sqrt(3) * 0.5 / 20


# Importance


@given(st.integers(0, 2**16))
def test_softened_importance_keeps_the_order_and_bounds_what_a_token_can_lose(seed: int) -> None:
    attention = torch.rand(3, N, generator=torch.Generator().manual_seed(seed)) ** 12
    weight = mixed.soften(attention)
    order = attention.argsort(-1)
    assert (weight.gather(-1, order).diff(dim=-1) >= 0).all()
    assert (weight.amax(-1) / weight.amin(-1) <= math.sqrt(1 + N / mixed.FLOOR) * 1.0001).all()
    assert torch.equal(mixed.soften(torch.zeros(N)), torch.ones(N))


@given(st.integers(0, 2**16), st.booleans())
def test_tokens_nobody_looked_at_share_the_budget_by_their_range(seed: int, some: bool) -> None:
    span = torch.rand(N, generator=torch.Generator().manual_seed(seed)) + 0.1
    equal = torch.full((N,), 0.5 if some else 0.0)
    layout = layout_of(2.5)
    assert torch.equal(mixed.allocate(span, equal, layout), mixed.allocate(span, None, layout))


def test_keys_take_no_notice_of_attention_unless_they_are_given_it() -> None:
    """Bits of keys follow from their ranges alone: the caller gives keys no importance."""
    x, layout = torch.randn(N, 32), layout_of(2.0)
    bits = bits_of(*mixed.quantize_pages(x, None, layout), layout)
    assert torch.equal(bits, mixed.allocate(x.amax(-1) - x.amin(-1), None, layout))


@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5), st.booleans())
def test_importance_is_the_largest_weight_of_softmax_attention(
    heads: int, shared: int, rows: int, additive: bool
) -> None:
    generator = torch.Generator().manual_seed(rows)
    query = torch.randn(2, heads * shared, rows, 16, generator=generator)
    key = torch.randn(2, heads, 9, 16, generator=generator)
    mask = torch.ones(rows, 9, dtype=torch.bool).tril(9 - rows)
    if additive:
        mask = torch.zeros(rows, 9).masked_fill(~mask, -math.inf)
    found = mixed.importance(query, key, mask, 0.25)
    identity = torch.eye(9).expand(2, heads, 9, 9)
    weights = reference.softmax_attention(query, key, identity, mask, 0.25)
    expected = weights.unflatten(1, (heads, shared)).amax((2, 3))
    assert found.shape == (2, heads, 9)
    torch.testing.assert_close(found, expected)


def test_tokens_that_nobody_may_see_have_no_importance() -> None:
    mask = torch.tensor([[True, False, True]])
    found = mixed.importance(torch.randn(1, 2, 1, 16), torch.randn(1, 1, 3, 16), mask, 1.0)
    assert found[0, 0, 1] == 0
    nothing = torch.zeros(1, 3, dtype=torch.bool)
    found = mixed.importance(torch.randn(1, 2, 1, 16), torch.randn(1, 1, 3, 16), nothing, 1.0)
    assert (found == 0).all()


# What the paper counts


def test_counted_bits_give_the_ratios_that_were_published() -> None:
    assert round(16 / mixed.counted_bits(2, 0.01), 3) == 7.477
    assert round(16 / mixed.counted_bits(2, 0.0, group=4096), 3) == 7.969


def test_arguments_out_of_range_are_refused() -> None:
    for wrong, message in (
        ({"bits": 2.01}, "bits must be a multiple of 1/128, the rows of a page, got 2.01"),
        ({"bits": 5.0}, "bits must be positive and between min_bits=0 and max_bits=4, got 5.0"),
        ({"bits": 2.0, "page_size": 48}, "page_size must be one of (32, 64, 128, 256), got 48"),
        ({"bits": 2.0, "outliers": 3}, "outliers must be an even number of 0 or more, got 3"),
        ({"bits": 2.0, "outliers": 128}, "outliers must be an even number below 128, got 128"),
        ({"bits": 4.0, "min_bits": 4}, "min_bits and max_bits must be two ascending numbers"),
    ):
        with pytest.raises(ValueError, match=message.replace("(", r"\(").replace(")", r"\)")):
            mixed_layout(**wrong)
