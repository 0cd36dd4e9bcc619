"""Keys whose channels differ in bits, on a GPU: packed, read and attended to as the specification says.

Kernels run natively where there is a GPU and in Triton's interpreter elsewhere, the reference always on the CPU.
"""

from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

import written_caches
from attention_site import SHARED, Site, assert_right_under_any_mask, plain_sides, starts
from kvq_compile.kernels import reference
from kvq_compile.kernels.layout import Layout, Regions
from kvq_compile.kernels.packed import UNCALIBRATED, Calibrated, Packed
from kvq_compile.kernels.schemes import Channelwise, Scheme, Uniform
from kvq_compile.kernels.spec import QUERIES, CacheSpec
from kvq_compile.kernels.triton import append, backend, launch
from kvq_compile.testing.small_tables import random_tables
from native import CONVERSIONS, DEVICE, NATIVE, OVERFLOWS, examples, frame_on_device
from uncalibrated import Framed
from written_caches import DTYPES, REOPENING_DTYPES, full, spoil

pytestmark = [CONVERSIONS, OVERFLOWS, pytest.mark.usefixtures("wide_tiles")]
EXAMPLES = examples(Fraction(1, 4))
CAPACITY = 5
BITS = (0.5, 1, 2, 2.5, 3, 4, 5.25, 8)


@st.composite
def schemes(draw: st.DrawFn) -> Channelwise:
    pairs = draw(st.sampled_from(("halves", "halves", "neighbours", "none")))
    return Channelwise(draw(st.sampled_from(BITS)), pairs)


def turned(
    scheme: Channelwise, head_dim: int, heads: int = 2, size: float = 1.0
) -> tuple[Channelwise, Calibrated]:
    """Return the scheme with tables, so that keys are coded without their turned mean."""
    tables = random_tables(
        heads,
        head_dim,
        group_size=head_dim,
        rotary=True,
        codebook=None,
        seed=head_dim,
        size=size,
    )
    scheme = replace(scheme, pairs="halves", tables=tables.digest)
    return scheme, Calibrated(tables.words)


@st.composite
def framed_layouts(draw: st.DrawFn) -> Framed:
    """Draw a layout of keys; of 0 queries per KV head it holds none."""
    page = draw(st.sampled_from([32, 64, 128, 256] if NATIVE else [32, 32, 64]))
    head_dim = draw(st.sampled_from([16, 40, 64, 72, 80, 96, 128, 256]))
    regions = Regions(draw(st.integers(0, 5)), draw(st.integers(0, 40)), page)
    scheme, frame = draw(schemes()), UNCALIBRATED
    if draw(st.booleans()):
        scheme, frame = turned(scheme, head_dim)
    shared_by = draw(st.sampled_from((0, 1, 3)))
    held = QUERIES if shared_by else 0
    return Layout("key", head_dim, regions, scheme, held, shared_by), frame


def dtypes(framed: Framed) -> st.SearchStrategy[torch.dtype]:
    """Return those in which a mean is the same: the interpreter truncates where fp32 becomes bf16."""
    return st.sampled_from(REOPENING_DTYPES if framed[0].takes_mean else DTYPES)


@st.composite
def lengths(draw: st.DrawFn, layout: Layout) -> int:
    """Draw a number of tokens, often one that just does or does not fill a page."""
    boundary = full(layout, 1)
    near = boundary + draw(st.integers(-1, 1)) + layout.page_size * draw(st.integers(0, 1))
    return draw(st.sampled_from([1, 2, near, draw(st.integers(1, boundary))]))


def random_tokens(layout: Layout, tokens: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Return tokens of two sequences with two heads, whose channels differ in size and have means."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, tokens, 2, layout.head_dim, generator=generator)
    x = x * torch.rand(2, 1, 2, layout.head_dim, generator=generator) ** 3 * 4
    x = x + torch.randn(2, 1, 2, layout.head_dim, generator=generator)
    return x.to(dtype).transpose(1, 2)


@st.composite
def queries(draw: st.DrawFn, layout: Layout, tokens: int, dtype: torch.dtype) -> Tensor | None:
    """Draw the queries of the last of the tokens of a call: all of them, some, or unknown."""
    if not layout.queries or draw(st.booleans()):
        return None
    known = draw(st.sampled_from([1, 2, tokens]))
    generator = torch.Generator().manual_seed(tokens)
    query = torch.randn(2, 2 * layout.shared_by, known, layout.head_dim, generator=generator)
    query *= torch.rand(layout.head_dim, generator=generator) ** 2
    query[:, :1] *= draw(st.sampled_from([0.0, 1.0]))
    return query.to(dtype)


def make_caches(
    layout: Layout, dtype: torch.dtype, frame: Calibrated = UNCALIBRATED
) -> written_caches.Caches:
    return written_caches.Caches(layout, dtype, frame, batch=2, capacity=CAPACITY)


# --- writing --------------------------------------------------------------------------------------


@EXAMPLES
@given(st.data())
def test_tokens_leave_the_bytes_of_the_reference_in_whatever_pieces_they_come(
    data: st.DataObject,
) -> None:
    layout, frame = data.draw(framed_layouts())
    dtype = data.draw(dtypes((layout, frame)))
    caches, start = make_caches(layout, dtype, frame), 0
    for piece in range(data.draw(st.integers(1, 3))):
        tokens = data.draw(lengths(layout))
        if layout.pages_at(start + tokens) > CAPACITY:
            break
        x = random_tokens(layout, tokens, dtype, piece)
        query = data.draw(queries(layout, tokens, dtype))
        caches.append(x, start, data.draw(st.booleans()), None, query)
        caches.assert_equal()
        start += tokens


@EXAMPLES
@given(st.data())
def test_rewriting_from_an_earlier_slot_keeps_what_the_cache_found_of_itself(
    data: st.DataObject,
) -> None:
    layout, frame = data.draw(framed_layouts())
    dtype = data.draw(st.sampled_from(REOPENING_DTYPES))
    caches = make_caches(layout, dtype, frame)
    count = full(layout, 2) + data.draw(st.integers(0, 9))
    caches.append(random_tokens(layout, count, dtype, 0), 0, True)
    state = layout.state_of(caches.actual[2]).clone()
    start, tokens = data.draw(st.integers(0, count)), data.draw(lengths(layout))
    assume(layout.pages_at(start + tokens + layout.page_size) <= CAPACITY)
    query = data.draw(queries(layout, tokens, dtype))
    by_position = data.draw(st.booleans())
    caches.append(random_tokens(layout, tokens, dtype, 1), start, by_position, None, query)
    caches.assert_equal()
    caches.append(random_tokens(layout, layout.page_size, dtype, 2), start + tokens, True)
    caches.assert_equal()
    assert torch.equal(layout.state_of(caches.actual[2]), state)
    assert set(state[:, :, 0].float().sum(-1).flatten().tolist()) == {layout.bit_rows}


@EXAMPLES
@given(st.data())
def test_any_element_is_coded_as_the_reference_codes_it(data: st.DataObject) -> None:
    layout, frame = data.draw(framed_layouts())
    caches = make_caches(layout, torch.float32, frame)
    x = random_tokens(layout, full(layout, 2), torch.float32, 0).contiguous()
    spoil(data, x)
    query = data.draw(queries(layout, 3, torch.float32))
    if query is not None:
        query = query.contiguous()
        spoil(data, query)
    caches.append(x, 0, True, None, query)
    caches.assert_equal()


@pytest.mark.parametrize("tied", [0.0, 1.0])
def test_bits_of_equal_worth_go_to_lower_bits_and_then_to_channels_that_come_first(
    tied: float,
) -> None:
    """All channels vary alike, or none does: everything is tied."""
    layout = Layout("key", 40, Regions(0, 0, 32), Channelwise(1.2, "none"))
    caches = make_caches(layout, torch.float32)
    x = tied * torch.arange(32.0)[:, None].expand(2, 2, 32, 40).contiguous()
    caches.append(x, 0, True)
    caches.assert_equal()
    expected = torch.tensor([2.0] * 8 + [1.0] * 32)
    assert torch.equal(layout.state_of(caches.actual[2])[0, 0, 0].cpu(), expected)


def test_many_heads_take_more_launches_and_leave_the_same_bytes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(append, "MAX_ARRIVALS", 3)
    layout = Layout("key", 64, Regions(2, 5, 32), Channelwise(2.5), QUERIES, 2)
    caches = make_caches(layout, torch.float16)
    for start, tokens in ((0, 38), (38, 1), (39, 1), (20, 1), (21, 30)):
        query = torch.randn(2, 4, tokens, 64, generator=torch.Generator().manual_seed(start))
        x = random_tokens(layout, tokens, torch.float16, start)
        caches.append(x, start, True, None, query.half())
        caches.assert_equal()


def test_a_write_that_would_leave_a_gap_changes_nothing() -> None:
    layout = Layout("key", 64, Regions(2, 5, 32), Channelwise(2), QUERIES, 2)
    caches = make_caches(layout, torch.float16)
    caches.append(random_tokens(layout, 10, torch.float16, 0), 0, True)
    x = random_tokens(layout, 40, torch.float16, 1).to(DEVICE)
    query = torch.ones(2, 4, 1, 64, dtype=torch.float16, device=DEVICE)
    position = torch.arange(11, 51, device=DEVICE)
    for count in (1, 40):
        backend.append_(
            caches.actual, UNCALIBRATED, x[:, :, :count], position[:count], None, layout, None,
            query,
        )  # fmt: skip
    caches.assert_equal()


@pytest.mark.skipif(not NATIVE, reason="CUDA graphs need a GPU")
def test_a_captured_graph_serves_every_later_position() -> None:
    layout = Layout("key", 128, Regions(2, 5, 32), Channelwise(3), QUERIES, 4)
    caches = written_caches.Caches(layout, torch.bfloat16, capacity=CAPACITY)
    tokens = random_tokens(layout, 100, torch.bfloat16, 0)[:1]
    asked = torch.randn(1, 8, 100, 128, generator=torch.Generator().manual_seed(0)).bfloat16()
    x, query = tokens[:, :, :1].to(DEVICE), asked[:, :, :1].to(DEVICE)
    position = torch.zeros(1, dtype=torch.int64, device=DEVICE)

    def write() -> None:
        backend.append_(caches.actual, UNCALIBRATED, x, position, None, layout, None, query)

    write()  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        write()
    for step in range(100):
        now = slice(step, step + 1)
        x.copy_(tokens[:, :, now])
        query.copy_(asked[:, :, now])
        position.fill_(step)
        graph.replay()
        reference.append_(*caches.expected, tokens[:, :, now], step, layout, query=asked[:, :, now])
    caches.assert_equal()


# --- reading --------------------------------------------------------------------------------------


@EXAMPLES
@given(st.data())
def test_slots_read_as_the_specification_reads_them(data: st.DataObject) -> None:
    layout, frame = data.draw(framed_layouts())
    dtype = data.draw(st.sampled_from(REOPENING_DTYPES))
    held = data.draw(st.sampled_from([1, full(layout, 1), full(layout, 2) + 9]))
    length = data.draw(st.sampled_from([held, 0, 1, held + 40]) | st.integers(0, held))
    x = random_tokens(layout, held, dtype, 0)
    parts = Packed.empty(x, 3, layout)
    parts[2].fill_(9.0)
    layout.state_of(parts[2]).zero_()
    reference.append_(*parts, x, 0, layout, frame)
    found = backend.dequantize(
        Packed(*(p.to(DEVICE) for p in parts)), frame_on_device(frame), length, layout
    )
    expected = reference.read(*parts, length, layout, frame)
    torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=0)


# --- attention ------------------------------------------------------------------------------------


@st.composite
def values(draw: st.DrawFn, head_dim: int, page: int) -> Scheme:
    grouping = draw(st.sampled_from(["token", "token", "channel"]))
    divided = head_dim if grouping == "token" else page
    size = draw(st.sampled_from([g for g in (16, 32, 64) if divided % g == 0] + [None]))
    transform = draw(st.sampled_from(["hadamard", "none"] if head_dim % 16 == 0 else ["none"]))
    params = draw(st.sampled_from(["e5m3", "fp16"]))
    return Uniform(draw(st.sampled_from([2, 4, 8])), grouping, size, 1.0, transform, params)


@st.composite
def sites(draw: st.DrawFn) -> Site:
    page = draw(st.sampled_from([32, 64, 128, 256] if NATIVE else [32]))
    dims = (
        draw(st.sampled_from([16, 40, 64, 72, 80, 96, 128, 256])),
        draw(st.sampled_from([40, 64, 80, 128])),
    )
    key, value = draw(schemes()), draw(values(dims[1], page))
    spec = CacheSpec(key, value, draw(st.integers(0, 5)), draw(st.integers(0, 40)), page)
    heads = draw(st.sampled_from([1, 2])), draw(st.sampled_from(SHARED))
    sides = plain_sides(spec, dims, heads[1])
    if draw(st.booleans()):
        scheme, frame = turned(key, dims[0], heads[0])
        sides = (replace(sides[0][0], scheme=scheme), frame), sides[1]
    lengths = draw(st.sampled_from(starts(sides[0][0]))), draw(st.sampled_from([1, 1, 2, 9]))
    extra = draw(st.sampled_from([0, 0, 1, 30]))
    return Site(sides, heads, (*lengths, extra), draw(st.sampled_from(DTYPES)))


@EXAMPLES
@given(sites(), st.data())
def test_attention_has_the_error_of_the_same_computation_in_low_precision(
    site: Site, data: st.DataObject
) -> None:
    assert_right_under_any_mask(site, data)


def plain_site(dtype: torch.dtype, dim: int = 128, bits: float = 2.5, tokens: int = 1) -> Site:
    spec = CacheSpec(Channelwise(bits), Uniform(2, params="e5m3"), 3, 20, 32)
    return Site(plain_sides(spec, (dim, dim), 4), (2, 4), (260, tokens, 0), dtype)


SIZES = [(65504.0, 1e-3), (65504.0, 64.0), (1e-6, 1.0), (1e-3, 3e4)]


@pytest.mark.long(but=["size6-True", "size3-False", "size0-False"])
@pytest.mark.parametrize(
    ("size", "takes_mean"),
    [*((s, False) for s in SIZES), *((s, True) for s in SIZES[:1] + SIZES[2:])],
)
def test_keys_and_queries_of_any_size_keep_the_error_of_low_precision(
    size: tuple[float, float], takes_mean: bool
) -> None:
    """Steps and queries are multiplied in fp16, where neither may leave its range.

    Scores of the second size are in the millions, and there the mean is not taken off: fp32 would add both of its parts
    to within 1.
    """
    site = plain_site(torch.float16)
    if takes_mean:
        (key, _), value = site.sides
        scheme, frame = turned(key.channelwise, 128, size=min(size[0], 1.0))
        site.sides = (replace(key, scheme=scheme), frame), value
    generator = torch.Generator().manual_seed(0)
    keys = torch.rand(2, 2, 260, 128, generator=generator) * 2 - 1
    keys *= torch.rand(128, generator=generator) ** 4 * size[0]
    site.parts[0] = Site.fill(keys.half(), site.sides[0])
    site.query = (site.query.float().clamp(-2, 2) * size[1]).half()
    exact = site.expected(None, torch.float64)
    found = site.attend(None)
    assert bool(found.isfinite().all())
    # Keys and their mean are two products, and steps a third rounding; what overflowed fp16 would differ more.
    plain = (site.expected(None, torch.bfloat16).double() - exact).abs().max()
    assert (found.double() - exact).abs().max() <= 3 * plain + 1e-3


def test_many_queries_are_attended_in_tiles() -> None:
    site = plain_site(torch.float32, 64, 2, tokens=20)
    site.assert_low_precision_error(site.attend(None), None)


@pytest.mark.parametrize(
    ("heads", "pages", "to_an_sm", "splits"),
    [
        (64, 255, 2, 4),
        (64, 255, 3, 6),
        (8, 1023, 2, 33),
        (8, 255, 2, 32),
        (1, 511, 1, 128),
        (8, 31, 3, 31),
    ],
)
def test_pages_are_split_so_that_few_are_read_in_turn(
    heads: int, pages: int, to_an_sm: int, splits: int
) -> None:
    """On 132 SMs. Regression: 64 heads, two programs to an SM, were split 33 times, where four were timed faster."""
    assert launch.count_splits(heads, pages, 128, to_an_sm * 132)[1] == splits


@pytest.mark.parametrize("late", [0, 1, 2])
def test_splits_that_start_late_leave_no_page_out(
    late: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of them takes two pages less than the others, of which there are enough."""
    monkeypatch.setattr(launch, "count_splits", lambda *_: (2, 3))
    monkeypatch.setattr(launch, "count_late", lambda *_: late)
    spec = CacheSpec(Channelwise(2.5), Uniform(2, params="e5m3"), 3, 20, 32)
    site = Site(plain_sides(spec, (64, 64), 2), (1, 2), (480, 1, 0), torch.float32)
    site.assert_low_precision_error(site.attend(None), None)
