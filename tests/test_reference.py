"""The specification keeps its promises: packing is exact, caches give back what was written, attention is attention."""

import math
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile.kernels import reference
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import Packed
from kvq_compile.kernels.schemes import Uniform
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.kernels.transform import hadamard, rotate
from kvq_compile.testing import HEAD_DIMS, changed, kv_tensors, lengths, page_layouts
from quantized_pages import WHOLE_WIDTHS, pages, stored, token_layout

ALL_UNITS = torch.arange(-(1 << 15), 1 << 15).to(torch.int16)


# Packing


@pytest.mark.parametrize("bits", WHOLE_WIDTHS)
@pytest.mark.parametrize("role", ["key", "value"])
def test_packing_what_was_unpacked_gives_every_unit_back(bits: int, role: str) -> None:
    """Every plane of every width sees all of its 65536 units, at each of its places in a row."""
    spec = Uniform(bits)
    layout = CacheSpec(spec, spec, 0, 0, 32).layout(role, 64)
    units = torch.stack([ALL_UNITS.roll(shift) for shift in range(layout.row_words)], -1)
    units = units.view(-1, layout.rows, layout.row_words)
    codes = reference.unpack(units, layout)
    assert codes.shape == (len(units), 32, 64)
    assert codes.min() == 0
    assert codes.max() == layout.levels
    assert torch.equal(reference.pack(codes, layout), units)


@given(page_layouts(), st.integers(0, 2**16))
@pytest.mark.parametrize("bits", WHOLE_WIDTHS)
def test_unpacking_what_was_packed_gives_every_code_back(
    bits: int, layout: Layout, seed: int
) -> None:
    layout = changed(layout, bits=bits)
    generator = torch.Generator().manual_seed(seed)
    shape = (3, layout.page_size, layout.head_dim)
    codes = torch.randint(0, layout.levels + 1, shape, generator=generator, dtype=torch.int32)
    units = reference.pack(codes, layout)
    assert units.dtype == torch.int16
    assert units.shape == (3, layout.rows, layout.row_words)
    assert torch.equal(reference.unpack(units, layout), codes)


@pytest.mark.parametrize("bits", [bits for bits in WHOLE_WIDTHS if bits != 3])
def test_a_code_lies_in_the_field_that_the_layout_names(bits: int) -> None:
    layout = token_layout(bits)
    for channel in (0, 1, 17, 63):
        codes = torch.zeros(32, 64, dtype=torch.int32)
        codes[5, channel] = layout.levels
        expected = torch.zeros(32, layout.row_words, dtype=torch.int32)
        field, unit = divmod(channel, layout.row_words)
        expected[5, unit] = layout.levels << (field * bits)
        assert torch.equal(reference.pack(codes, layout).int() & 0xFFFF, expected)


def test_codes_of_three_bits_lie_in_thirds_of_a_row_and_the_last_in_what_they_leave() -> None:
    layout = token_layout(3)
    for channel in (0, 1, 17, 21, 59, 60, 63):
        field, unit = divmod(channel, 4)
        for code in range(8):
            codes = torch.zeros(32, 64, dtype=torch.int32)
            codes[5, channel] = code
            expected = torch.zeros(32, 3, 4, dtype=torch.int32)
            if field == 15:
                for third in range(3):
                    expected[5, third, unit] = (code >> third & 1) << 15
            else:
                expected[5, field // 5, unit] = code << 3 * (field % 5)
            assert torch.equal(reference.pack(codes, layout).int() & 0xFFFF, expected.flatten(1))


@given(page_layouts(), st.integers(0, 3))
def test_groups_are_put_back_where_they_came_from(layout: Layout, lead: int) -> None:
    shape = (*(2,) * lead, layout.page_size, layout.head_dim)
    x = torch.arange(math.prod(shape)).view(shape)
    grouped = reference.to_groups(x, layout)
    assert grouped.shape == (*shape[:-2], *layout.params_shape, layout.group_size)
    assert torch.equal(reference.from_groups(grouped, layout), x)
    token, channel = x // layout.head_dim, x % layout.head_dim
    inside = channel if layout.grouping == "token" else token
    outside = token if layout.grouping == "token" else channel
    assert (
        reference.to_groups(outside, layout) == reference.to_groups(outside, layout)[..., :1]
    ).all()
    assert (reference.to_groups(inside, layout).diff(dim=-1) == 1).all()


# Rotation


@pytest.mark.parametrize("size", [*HEAD_DIMS, 1, 2, 48, 112, 192])
def test_the_hadamard_matrix_is_orthonormal_symmetric_and_its_own_inverse(size: int) -> None:
    matrix = hadamard(size, torch.device("cpu"))
    assert torch.equal(matrix, matrix.T)
    torch.testing.assert_close(matrix @ matrix, torch.eye(size), rtol=0, atol=1e-6)
    block = size & -size
    assert torch.equal(matrix.abs().sum(1) > 0, torch.ones(size, dtype=torch.bool))
    assert float(matrix.abs().max()) == pytest.approx(block**-0.5)


@given(pages(transform=True))
def test_rotating_twice_changes_nothing_but_rounding(case: tuple[Tensor, Layout]) -> None:
    x, layout = case
    layout = changed(layout, transform="hadamard")
    twice = rotate(rotate(x, layout), layout)
    limit = 2**-22 * layout.head_dim**0.5 * x.double().norm(dim=-1, keepdim=True)
    assert ((twice.double() - x.double()).abs() <= limit).all()


# The cache


def append_all(
    layout: Layout, x: Tensor, splits: list[int], capacity: int = 4
) -> tuple[Tensor, ...]:
    parts = Packed.empty(x, capacity, layout)
    for first, last in zip([0, *splits], [*splits, x.shape[2]], strict=True):
        reference.append_(*parts, x[:, :, first:last], first, layout)
    return parts


@given(st.data())
def test_reading_gives_exact_regions_back_and_packed_tokens_as_their_pages(
    data: st.DataObject,
) -> None:
    layout = data.draw(page_layouts())
    tokens = data.draw(lengths(layout))
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    x = data.draw(kv_tensors((2, 1, tokens, layout.head_dim), dtype))
    parts = append_all(layout, x, [])
    read = reference.read(*parts, tokens, layout)
    pages = layout.pages_at(tokens)
    assert parts[3].tolist() == [tokens, pages]
    first, last = layout.sinks, layout.sinks + pages * layout.page_size
    assert torch.equal(read[:, :, :first], x[:, :, :first])
    assert torch.equal(read[:, :, last:], x[:, :, last:])
    assert tokens - last >= min(layout.window, tokens - layout.sinks) or pages == 0
    expected = stored(x[:, :, first:last].unflatten(2, (pages, layout.page_size)), layout)
    assert torch.equal(read[:, :, first:last], expected.flatten(2, 3).to(dtype))


@given(st.data())
def test_slots_without_a_token_read_as_zero(data: st.DataObject) -> None:
    layout = data.draw(page_layouts())
    tokens, more = data.draw(lengths(layout)), data.draw(st.integers(0, 5))
    x = data.draw(kv_tensors((1, 1, tokens, layout.head_dim)))
    read = reference.read(*append_all(layout, x, []), tokens + more, layout)
    assert read.shape[2] == tokens + more
    assert (read[:, :, tokens:] == 0).all()


@given(st.data())
def test_cutting_a_page_open_changes_nothing_that_is_read(data: st.DataObject) -> None:
    """Regression: going back to fewer tokens than there are sinks failed."""
    layout = data.draw(page_layouts())
    tokens = data.draw(lengths(layout))
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    parts = append_all(layout, data.draw(kv_tensors((1, 2, tokens, layout.head_dim), dtype)), [])
    before = reference.read(*parts, tokens, layout)
    kept = data.draw(st.integers(0, tokens) | st.integers(0, min(layout.sinks, tokens)))
    reference.truncate_(*parts, kept, layout)
    assert int(parts[3][0]) == kept
    assert torch.equal(reference.read(*parts, kept, layout), before[:, :, :kept])


@pytest.mark.parametrize("start", [-1, 11, 1000])
def test_a_gap_is_refused_and_nothing_changes(start: int) -> None:
    layout = CacheSpec(sinks=2, window=5, page_size=32).layout("key", 64)
    parts = append_all(layout, torch.randn(1, 1, 10, 64), [])
    before = [part.clone() for part in parts]
    with pytest.raises(
        ValueError, match=f"position must start at or before the 10 tokens held, got {start}"
    ):
        reference.append_(*parts, torch.randn(1, 1, 40, 64), start, layout)
    assert all(map(torch.equal, parts, before))


def test_tokens_beyond_the_capacity_are_refused_and_nothing_changes() -> None:
    layout = CacheSpec(sinks=2, window=5, page_size=32).layout("key", 64)
    parts = append_all(layout, torch.randn(1, 1, 10, 64), [], capacity=1)
    before = [part.clone() for part in parts]
    with pytest.raises(ValueError, match="the cache must have room for 2 pages, got 1"):
        reference.append_(*parts, torch.randn(1, 1, 80, 64), 3, layout)
    assert all(map(torch.equal, parts, before))


# Attention


@given(st.integers(0, 2**16), st.booleans())
def test_softmax_attention_is_what_pytorch_computes(seed: int, additive: bool) -> None:
    generator = torch.Generator().manual_seed(seed)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    query, key, value = draw(2, 6, 3, 16), draw(2, 2, 9, 16), draw(2, 2, 9, 8)
    seen = torch.rand(2, 1, 3, 9, generator=generator) < 0.7
    seen[..., 0] = True
    mask = (
        torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -math.inf)
        if additive
        else seen
    )
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, mask, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(reference.softmax_attention(query, key, value, mask, 0.3), expected)


def test_a_query_that_may_attend_to_nothing_gets_zeros() -> None:
    x = torch.randn(1, 1, 4, 16)
    output = reference.softmax_attention(x, x, x, torch.zeros(4, 4, dtype=torch.bool), 1.0)
    assert torch.equal(output, torch.zeros_like(x))
