"""Reading a packed cache in Triton gives the bits that the specification reads, in every scheme.

Kernels run natively where there is a GPU and in Triton's interpreter elsewhere, the reference always on the CPU.
"""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile.kernels import reference
from kvq_compile.kernels.layout import Layout, Regions
from kvq_compile.kernels.packed import UNCALIBRATED, Packed
from kvq_compile.kernels.schemes import Mixed, Scheme, Uniform
from kvq_compile.kernels.triton import backend
from kvq_compile.testing.small_tables import framed_layouts
from native import CONVERSIONS, DEVICE, OVERFLOWS, examples, frame_on_device
from uncalibrated import Framed, mixed_layouts, plain_layouts
from written_caches import REOPENING_DTYPES, full

pytestmark = [CONVERSIONS, OVERFLOWS]
EXAMPLES = examples()


def filled(framed: Framed, tokens: int, dtype: torch.dtype, capacity: int = 3) -> Packed:
    """Return a cache of ``tokens`` random tokens in two heads; what nothing was written to is not zero."""
    layout, frame = framed
    generator = torch.Generator().manual_seed(tokens)
    x = 2 * torch.randn(1, 2, tokens, layout.head_dim, generator=generator)
    parts = Packed.empty(x.to(dtype), capacity, layout)
    parts[2].fill_(9.0)
    weights = torch.rand(1, 2, tokens, generator=generator) ** 6
    reference.append_(*parts, x.to(dtype), 0, layout, frame, weights)
    return parts


def both(framed: Framed, parts: Packed, length: int) -> tuple[Tensor, Tensor]:
    layout, frame = framed
    found = backend.dequantize(
        Packed(*(p.to(DEVICE) for p in parts)), frame_on_device(frame), length, layout
    )
    return found.cpu(), reference.read(*parts, length, layout, frame)


def lengths(data: st.DataObject, layout: Layout) -> tuple[int, int]:
    """Draw how many tokens are held, often just a page or none, and how many slots are read."""
    edges = [1, full(layout, 1) - 1, full(layout, 1), full(layout, 2) + 9]
    held = data.draw(st.sampled_from(edges))
    return held, data.draw(st.sampled_from([held, 0, 1, held + 40]) | st.integers(0, held))


def formats() -> st.SearchStrategy[Framed]:
    tabled = framed_layouts(batch=1, head_dims=(64, 72, 80), page_sizes=(32,))
    plain = st.one_of(plain_layouts(), mixed_layouts().map(lambda layout: (layout, UNCALIBRATED)))
    return st.one_of(tabled.filter(lambda framed: framed[0].transform == "none"), plain)


@EXAMPLES
@given(st.data())
def test_slots_read_as_the_specification_reads_them(data: st.DataObject) -> None:
    framed = data.draw(formats())
    held, length = lengths(data, framed[0])
    parts = filled(framed, held, data.draw(st.sampled_from(REOPENING_DTYPES)))
    found, expected = both(framed, parts, length)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@EXAMPLES
@given(st.data())
def test_a_rotated_cache_reads_as_the_specification_reads_it_but_for_rounding(
    data: st.DataObject,
) -> None:
    """Sums of up to 64 terms of about the size of the largest, in another order."""
    framed = data.draw(plain_layouts(transforms=("hadamard",)))
    held, length = lengths(data, framed[0])
    parts = filled(framed, held, torch.float32)
    found, expected = both(framed, parts, length)
    largest = float(expected.abs().max()) if expected.numel() else 0.0
    torch.testing.assert_close(found, expected, rtol=0, atol=64 * 2.0**-23 * largest)


@pytest.mark.parametrize("scheme", [Uniform(2), Mixed(2.5, 0, 4)])
def test_a_truncated_cache_reads_its_page_up_to_where_it_was_cut(scheme: Scheme) -> None:
    """Negative twin: with the cursor as it was, the tokens behind the cut are read too."""
    layout = Layout("key", 64, Regions(2, 5, 32), scheme)
    framed = layout, UNCALIBRATED
    parts = filled(framed, full(layout, 2), torch.float32)
    length = int(parts[3][0])
    before, _ = both(framed, parts, length)
    assert bool((before != 0).any(-1).all())
    parts[3][0] = 20
    found, expected = both(framed, parts, length)
    assert torch.equal(found, expected)
    assert torch.equal(found[:, :, :20], before[:, :, :20])
    assert not found[:, :, 20:].any()


def test_pages_beyond_the_capacity_are_not_read() -> None:
    """A page count that is not believed: what it counts too many reads as exact rows do, inside the buffers."""
    layout = Layout("key", 64, Regions(2, 5, 32), Uniform(2))
    parts = filled((layout, UNCALIBRATED), full(layout, 2), torch.float32, capacity=2)
    parts[3][:] = torch.tensor([10_000, 300])
    found = backend.dequantize(
        Packed(*(p.to(DEVICE) for p in parts)), UNCALIBRATED, 400, layout
    ).cpu()
    parts[3][:] = torch.tensor([66, 2])
    assert torch.equal(found[:, :, :66], both((layout, UNCALIBRATED), parts, 66)[0])
