"""Static caches that keep the last tokens are stored packed, and show what a cache shows that keeps all."""

import copy
import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kvq_compile import QuantizedKV, report
from kvq_compile.kernels.packed import UNCALIBRATED, Packed, room_of
from kvq_compile.kernels.score import Score
from kvq_compile.kernels.triton import attend
from kvq_compile.testing import assert_matches_dequantized, channelwise_layouts, page_layouts
from native import CONVERSIONS, DEVICE
from refused_steps import tokens
from static_rings import LAYOUT, SLOTS, SPEC, fill, write

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


@settings(max_examples=30)
@given(
    layout=page_layouts() | channelwise_layouts(head_dims=(64, 80)),
    slots=st.integers(1, 150),
    chunks=st.lists(st.sampled_from((1, 1, 7, 40, 90)), min_size=2, max_size=12),
)
def test_a_ring_shows_the_last_tokens_of_a_cache_that_keeps_all(layout, slots, chunks) -> None:
    """Whatever pages were dropped in the meantime, and bit by bit, as long as a call leaves tokens to be kept."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, sum(chunks), layout.head_dim, generator=generator)
    empty = torch.zeros(2, 2, slots, layout.head_dim)
    cache = QuantizedKV.from_dense(empty, layout, kind="static", length=0)
    whole, held = QuantizedKV.from_dense(x[:, :, :0], layout), 0
    for new in x.split(chunks, 2):
        write(cache, held, new)
        if new.shape[2] >= slots:  # nothing else is kept: the memory begins anew
            whole, new = whole[:, :, :0], new[:, :, -slots:]
        whole = torch.cat([whole, new], 2)
        held = min(held + new.shape[2], slots)
        assert cache.held() == held
        got, expected = cache.dequantize(), whole.dequantize()[:, :, -held:]
        assert torch.equal(got[:, :, :held], expected)
        assert not got[:, :, held:].any()
        assert room_of(cache.parts, layout) <= 2 * slots + slots // 8 + 4 * layout.token_rows


def test_the_memory_of_a_ring_does_not_grow() -> None:
    sizes = [fill(length).nbytes for length in (100, 200, 800)]
    assert len(set(sizes)) == 1
    assert sizes[0] < QuantizedKV.from_dense(tokens(200), LAYOUT).nbytes


def test_reset_empties_a_ring() -> None:
    cache = fill(200)
    cache.zero_()
    assert cache.held() == 0
    assert not cache.dequantize().any()
    new = tokens(5)
    write(cache, 0, new)
    assert torch.equal(cache.dequantize()[:, :, :5], new)


@pytest.mark.parametrize(
    "copied",
    [
        lambda cache: cache.clone(),
        copy.deepcopy,
        lambda cache: torch.cat([cache[:1], cache[1:]]),
        lambda cache: cache.index_select(0, torch.tensor([0, 1])),
        lambda cache: saved(cache),
    ],
)
def test_a_copy_of_a_ring_goes_its_own_way(copied) -> None:
    cache, new = fill(200), tokens(40, seed=7)
    held = cache.dequantize()
    other = copied(cache)
    assert isinstance(other, QuantizedKV)
    assert torch.equal(other.dequantize(), held)
    write(other, SLOTS, new)
    assert torch.equal(cache.dequantize(), held)
    write(cache, SLOTS, new)
    assert torch.equal(other.dequantize(), cache.dequantize())


def saved(cache: QuantizedKV) -> QuantizedKV:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file)


def test_a_file_of_a_ring_whose_memory_is_too_small_is_refused() -> None:
    function, arguments = fill(200).__reduce_ex__(2)
    version, layout, kind, length, parts, *rest = arguments
    parts[3] = parts[3] + torch.tensor([320, 0], dtype=torch.int32)
    with pytest.raises(ValueError, match="cursor must count"):
        function(version, layout, kind, length, parts, *rest)


def test_tokens_that_a_ring_holds_are_not_quantized_again() -> None:
    """A copy that begins with the ring's own tokens leaves their codes as they are."""
    cache = fill(SLOTS)
    codes = cache.paged().codes[:, :, :2].clone()
    for step in range(20):
        write(cache, SLOTS, tokens(1, seed=step))
        assert torch.equal(cache.paged().codes[:, :, :2], codes)


def test_a_copy_of_anything_else_overwrites_a_ring() -> None:
    cache, other = fill(200), tokens(SLOTS, seed=9)
    cache.copy_(other)
    whole = QuantizedKV.from_dense(other, LAYOUT)
    assert torch.equal(cache.dequantize(), whole.dequantize())


def test_a_slot_of_a_ring_that_has_wrapped_cannot_be_overwritten() -> None:
    """What lies behind it would move to other slots."""
    cache = fill(200)
    held = cache.dequantize()
    with pytest.raises(NotImplementedError, match="roll a copy"):
        cache[:, :, 5:6] = tokens(1)
    with pytest.raises(NotImplementedError, match="roll a copy"):
        cache.index_copy_(2, torch.tensor([5]), tokens(1))
    assert torch.equal(cache.dequantize(), held)


def test_reports_count_the_exact_tokens_of_a_ring() -> None:
    cache = fill(200)
    count, pages = cache.cursor.tolist()
    (line,) = report([cache]).tensors
    assert (line.held, line.kept_exact) == (SLOTS, count - 2 - 32 * pages)


@CONVERSIONS
@pytest.mark.parametrize("new", [1, 5])
def test_gpu_kernels_attend_to_a_ring_behind_a_position_on_the_device(new) -> None:
    """The mask has a column for each slot of the memory, those out of sight and those still empty included."""
    device = torch.device(DEVICE)
    layouts = LAYOUT, SPEC.layout("value", 16)
    keys, values = (fill(190, layout, seed=s).to(device) for s, layout in enumerate(layouts))
    query, key, value = (tokens(new, seed=s).to(device) for s in range(3))
    held = keys.cursor[:1].long()
    slots = torch.arange(room_of(keys.parts, LAYOUT), device=device)
    mask = ((slots >= held - SLOTS + 1) & (slots < held + new))[None]
    parts = Packed(*keys.parts), Packed(*values.parts), UNCALIBRATED, UNCALIBRATED
    output = attend.attend(query, key, value, *parts, mask, held, None, Score(0.25), *layouts)
    seen = torch.arange(SLOTS + new, device=device)[None] > 0  # of those that show
    assert_matches_dequantized(output, query, key, value, (keys, values), mask=seen, scale=0.25)
