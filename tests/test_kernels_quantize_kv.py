"""Quantize-on-write leaves the bytes of the reference, however tokens arrive.

Kernels run natively where there is a GPU and in Triton's interpreter elsewhere. The reference
always runs on the CPU.
"""

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import written_caches
from kvq_compile.kernels import reference
from kvq_compile.kernels.layout import Layout, Regions
from kvq_compile.kernels.packed import UNCALIBRATED, Packed
from kvq_compile.kernels.schemes import Mixed, Scheme, Uniform, scheme_of
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.kernels.tables import Tables
from kvq_compile.kernels.triton import append, backend
from kvq_compile.testing.small_tables import random_tables
from native import CONVERSIONS, DEVICE, NATIVE, OVERFLOWS, examples
from written_caches import DTYPES, REOPENING_DTYPES, calibrated, full, spoil

pytestmark = [CONVERSIONS, OVERFLOWS]
EXAMPLES = examples(Fraction(1, 3))
CAPACITY = 5


@st.composite
def layouts(draw: st.DrawFn, transform: str = "none") -> Layout:
    page = draw(st.sampled_from([32, 64, 128, 256] if NATIVE else [32, 32, 64]))
    head_dim = draw(st.sampled_from([8, 20, 40, 64, 72, 80, 88, 96, 100, 104, 120, 128, 256, 320]))
    grouping = draw(st.sampled_from(["token", "channel"]))
    divided = head_dim if grouping == "token" else page
    sizes = (8, 16, 20, 22, 24, 32, 48, 64, 128)  # an own choice is any divisor of the head
    size = draw(st.sampled_from([g for g in sizes if divided % g == 0] + [None]))
    bits = draw(st.sampled_from([1, 2, 3, 4, 8]))
    clip = draw(st.sampled_from([1.0, 0.9]))
    params = draw(st.sampled_from(["fp16", "e5m3"])) if transform == "none" else "fp16"
    search = clip == 1.0 and draw(st.booleans())
    spec = Uniform(bits, grouping, size, clip, transform, params, search=search)
    cache = CacheSpec(spec, spec, draw(st.integers(0, 5)), draw(st.integers(0, 40)), page)
    return cache.layout(draw(st.sampled_from(["key", "value"])), head_dim)


@st.composite
def lengths(draw: st.DrawFn, layout: Layout) -> int:
    """Draw a number of tokens, often one that just does or does not fill a page."""
    boundary = full(layout, 1)
    near = boundary + draw(st.integers(-1, 1)) + layout.page_size * draw(st.integers(0, 1))
    return draw(st.sampled_from([1, 2, near, draw(st.integers(1, boundary))]))


def random_tokens(layout: Layout, tokens: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Return tokens of two sequences with two heads, laid out as a projection leaves them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, 2, layout.head_dim, generator=generator)
    return (
        (x * torch.rand(2, 1, 2, layout.head_dim, generator=generator) * 4)
        .to(dtype)
        .transpose(1, 2)
    )


def make_caches(layout: Layout, dtype: torch.dtype) -> written_caches.Caches:
    return written_caches.Caches(layout, dtype, batch=2, capacity=CAPACITY)


@EXAMPLES
@given(st.data())
def test_tokens_leave_the_bytes_of_the_reference_in_whatever_pieces_they_come(
    data: st.DataObject,
) -> None:
    layout = data.draw(layouts())
    dtype = data.draw(st.sampled_from(DTYPES))
    caches, start = make_caches(layout, dtype), 0
    for piece in range(data.draw(st.integers(1, 3))):
        tokens = data.draw(lengths(layout))
        if layout.pages_at(start + tokens) > CAPACITY:
            break
        caches.append(random_tokens(layout, tokens, dtype, piece), start, data.draw(st.booleans()))
        caches.assert_equal()
        start += tokens


@pytest.mark.usefixtures("wide_tiles")
@EXAMPLES
@given(st.data())
def test_rewriting_from_an_earlier_slot_leaves_the_bytes_of_the_reference(
    data: st.DataObject,
) -> None:
    layout = data.draw(layouts())
    dtype = data.draw(st.sampled_from(REOPENING_DTYPES))
    caches = make_caches(layout, dtype)
    count = full(layout, 2) + data.draw(st.integers(0, 9))
    caches.append(random_tokens(layout, count, dtype, 0), 0, True)
    start = data.draw(st.integers(0, count))
    tokens = data.draw(lengths(layout))
    assume(layout.pages_at(start + tokens + layout.page_size) <= CAPACITY)
    caches.append(random_tokens(layout, tokens, dtype, 1), start, data.draw(st.booleans()))
    caches.assert_equal()
    caches.append(random_tokens(layout, layout.page_size, dtype, 2), start + tokens, True)
    caches.assert_equal()


@pytest.mark.usefixtures("wide_tiles")
@EXAMPLES
@given(st.data())
def test_any_element_is_coded_as_the_reference_codes_it(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    caches = make_caches(layout, torch.float32)
    x = random_tokens(layout, full(layout, 1), torch.float32, 0).contiguous()
    spoil(data, x)
    caches.append(x, 0, True)
    caches.assert_equal()


@pytest.mark.usefixtures("wide_tiles")
@EXAMPLES
@given(st.data())
def test_rotated_tokens_are_read_within_one_step_of_the_reference(data: st.DataObject) -> None:
    """The rotation may round differently, which moves a number at the edge of a code by one."""
    layout = data.draw(layouts(transform="hadamard"))
    caches = make_caches(layout, torch.float32)
    count = full(layout, 2)
    caches.append(random_tokens(layout, count, torch.float32, 0), 0, True)
    start = data.draw(st.integers(0, count))
    caches.append(random_tokens(layout, 3, torch.float32, 1), start, True)
    torch.testing.assert_close(caches.actual[3].cpu(), caches.expected[3])
    pages = int(caches.expected[3][1])
    code_units = [
        reference.unpack(parts[0][:, :, :pages].cpu(), layout)
        for parts in (caches.expected, caches.actual)
    ]
    assert ((code_units[0] - code_units[1]).abs() <= 1).all()
    scale = [parts[1][:, :, :pages].float().cpu() for parts in (caches.expected, caches.actual)]
    eps = torch.finfo(torch.float16).eps  # a parameter may round to the other neighbour
    torch.testing.assert_close(scale[1], scale[0], rtol=2 * eps, atol=1e-4)
    length = int(caches.expected[3][0])
    values = [
        reference.read(*(part.cpu() for part in parts), length, layout)
        for parts in (caches.expected, caches.actual)
    ]
    # One code of one number is one step, spread over a block of the rotated basis.
    step = float(caches.expected[1][..., 0].max()) + 1e-5
    assert float((values[0] - values[1]).abs().max()) <= step


def test_many_heads_take_more_launches_and_leave_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(append, "MAX_ARRIVALS", 3)
    layout = CacheSpec(sinks=2, window=5, page_size=32).layout("key", 64)
    caches = make_caches(layout, torch.float16)
    for start, tokens in ((0, 38), (38, 1), (39, 1), (20, 1)):
        caches.append(random_tokens(layout, tokens, torch.float16, start), start, True)
        caches.assert_equal()


@pytest.mark.parametrize("start", [11, 1000])
def test_a_write_that_would_leave_a_gap_changes_nothing(start: int) -> None:
    layout = CacheSpec(sinks=2, window=5, page_size=32).layout("value", 64)
    caches = make_caches(layout, torch.float16)
    caches.append(random_tokens(layout, 10, torch.float16, 0), 0, True)
    x = random_tokens(layout, 40, torch.float16, 1).to(DEVICE)
    position = torch.arange(start, start + 40, device=DEVICE)
    backend.append_(caches.actual, UNCALIBRATED, x, position, None, layout)
    backend.append_(caches.actual, UNCALIBRATED, x[:, :, :1], position[:1], None, layout)
    caches.assert_equal()


def test_a_write_that_does_not_fit_changes_nothing() -> None:
    layout = CacheSpec(sinks=0, window=0, page_size=32).layout("value", 64)
    caches = make_caches(layout, torch.float16)
    caches.append(random_tokens(layout, 32 * CAPACITY + 31, torch.float16, 0), 0, True)
    x = random_tokens(layout, 1, torch.float16, 1).to(DEVICE)
    start = 32 * CAPACITY + 31
    backend.append_(
        caches.actual, UNCALIBRATED, x, torch.tensor([start], device=DEVICE), None, layout
    )
    caches.assert_equal()
    with pytest.raises(ValueError, match="the cache must have room for 6 pages, got 5"):
        backend.append_(caches.actual, UNCALIBRATED, x, None, start, layout)


MARGIN = 4096  # elements on either side of each part


def inside_margins(parts: Packed) -> tuple[Packed, list[Tensor]]:
    """Return a copy of a cache whose parts lie in larger buffers, and what lies around them."""
    views, margins = [], []
    for part in parts:
        buffer = torch.full((part.numel() + 2 * MARGIN,), 77, dtype=part.dtype, device=DEVICE)
        views.append(buffer[MARGIN:-MARGIN].view(part.shape).copy_(part))
        margins += [buffer[:MARGIN], buffer[-MARGIN:]]
    return Packed(*views), margins


@EXAMPLES
@given(st.data())
def test_positions_of_any_kind_lead_nowhere_outside_the_cache(data: st.DataObject) -> None:
    """Of positions the first counts: what would leave a gap or does not fit is left out as a whole."""
    scheme = data.draw(st.sampled_from([Uniform(2), Uniform(2, "channel", 32), Mixed(2.5, 0, 4)]))
    role = data.draw(st.sampled_from(["key", "value"]))
    layout = Layout(role, 64, Regions(2, 5, 32), scheme)
    held = data.draw(st.sampled_from([0, 1, 38, 39, 60, 70]))
    caches = make_caches(layout, torch.float16)
    caches.append(random_tokens(layout, held, torch.float16, 0), 0, True)
    parts, margins = inside_margins(Packed(*caches.actual))
    near = st.integers(-2, held + 200)
    far = st.sampled_from([-(2**31), 2**31 - 1, -(2**40) - 5, 10**6, -1])
    slots = data.draw(st.lists(near | far, min_size=1, max_size=40))
    x = random_tokens(layout, len(slots), torch.float16, 1).to(DEVICE)
    backend.append_(parts, UNCALIBRATED, x, torch.tensor(slots, device=DEVICE), None, layout)
    assert all((margin == 77).all() for margin in margins)
    if 0 <= slots[0] <= held and layout.pages_at(slots[0] + len(slots)) <= CAPACITY:
        assert parts.cursor[0] == slots[0] + len(slots)
    else:
        assert all(torch.equal(a, b) for a, b in zip(parts, caches.actual, strict=True))


def tabled(
    codebook: tuple[int, int] | None = None, rotary: bool = True, **options: Any
) -> tuple[Scheme, Tables]:
    tables = random_tables(2, 128, group_size=64, rotary=rotary, codebook=codebook, seed=0)
    return scheme_of(options, tables.digest, rotary), tables


CAPTURED = {
    "int2": (Uniform(2), None),
    "kivi": (Uniform(2, "channel", 32), None),
    "qaq": (Mixed(2.5, 1, 4), None),
    "skvq": tabled(bits=2, group_size=64, params="fp8"),
    "trits": tabled(bits=1.5, group_size=64, packing="trits", rotary=False),
    "cq-4c8b": tabled((4, 8), bits=8, couple=4),
}


@pytest.mark.skipif(not NATIVE, reason="CUDA graphs need a GPU")
@pytest.mark.parametrize("name", CAPTURED)
def test_a_captured_graph_serves_every_later_position(name: str) -> None:
    scheme, tables = CAPTURED[name]
    layout = Layout("key", 128, Regions(2, 5, 32), scheme)
    frame = calibrated(layout, tables)
    caches = written_caches.Caches(layout, torch.bfloat16, frame, capacity=CAPACITY)
    tokens = random_tokens(layout, 100, torch.bfloat16, 0)[:1]
    x, position = tokens[:, :, :1].to(DEVICE), torch.zeros(1, dtype=torch.int64, device=DEVICE)

    def write() -> None:
        backend.append_(caches.actual, caches.moved, x, position, None, layout)

    write()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        write()
    for step in range(100):
        x.copy_(tokens[:, :, step : step + 1])
        position.fill_(step)
        graph.replay()
        reference.append_(*caches.expected, tokens[:, :, step : step + 1], step, layout, frame)
    caches.assert_equal()
