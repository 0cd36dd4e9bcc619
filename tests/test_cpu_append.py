"""What the CPU backend writes, cuts and reads is what the specification does, bit by bit."""

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile.kernels import ops, reference
from kvq_compile.kernels.cpu import append, backend, native
from kvq_compile.kernels.cpu.packed import PackedTensor
from kvq_compile.kernels.layout import Layout, Regions
from kvq_compile.kernels.packed import UNCALIBRATED, Calibrated, Packed
from kvq_compile.kernels.reference import backend as specification
from kvq_compile.kernels.schemes import Codebook, Mixed, Role, Uniform
from kvq_compile.kernels.score import Score
from kvq_compile.testing import DTYPES, kv_tensors, lengths
from kvq_compile.testing.small_tables import framed_layouts, random_tables
from uncalibrated import Framed, mixed_layouts, plain_layouts

BATCH, HEADS, PAGES = 2, 2, 4
ROLES: tuple[Role, ...] = ("key", "value")
EVERY_DTYPE = (*DTYPES, torch.float64)


def coded_layouts() -> st.SearchStrategy[Framed]:
    """Draw layouts of every scheme, with tables and without."""
    return st.one_of(
        framed_layouts(),
        plain_layouts(None, (64, 80, 96, 8, 16, 20, 72, 120), ("none", "none", "hadamard")),
        mixed_layouts().map(lambda layout: (layout, UNCALIBRATED)),
    )


class Twins:
    """One cache kept twice, by the backend and by the specification."""

    def __init__(self, framed: Framed, like: Tensor) -> None:
        self.layout, self.calibrated = framed
        self.ours = Packed.empty(like, PAGES, self.layout)
        self.expected = Packed.empty(like, PAGES, self.layout)

    def append(self, x: Tensor, start: int, importance: Tensor | None = None) -> None:
        about = self.calibrated, x, None, start, self.layout, importance
        backend.append_(self.ours, *about)
        specification.append_(self.expected, *about)

    def assert_equal(self) -> None:
        """Assert that all parts are equal; a NaN that stayed exact equals itself."""
        for name, ours, expected in zip(Packed._fields, self.ours, self.expected, strict=True):
            torch.testing.assert_close(
                ours, expected, rtol=0, atol=0, equal_nan=True, msg=lambda m, n=name: f"{n}: {m}"
            )

    def assert_read_alike(self, length: int) -> None:
        ours, expected = (
            by.dequantize(self.ours, self.calibrated, length, self.layout)
            for by in (backend, specification)
        )
        torch.testing.assert_close(ours, expected, rtol=0, atol=0, equal_nan=True)


@given(coded_layouts(), st.data())
def test_what_is_written_cut_and_read_is_bit_by_bit_that_of_the_specification(
    framed: Framed, data: st.DataObject
) -> None:
    layout = framed[0]
    count = data.draw(lengths(layout)) + 1
    shape, dtype = (BATCH, HEADS, count, layout.head_dim), data.draw(st.sampled_from(EVERY_DTYPE))
    x = data.draw(kv_tensors(shape, dtype, finite=False))
    importance = None
    if layout.attentive and data.draw(st.booleans()):
        generator = torch.Generator().manual_seed(data.draw(st.integers(0, 99)))
        importance = torch.rand(BATCH, HEADS, count + 3, generator=generator) ** 6
    twins = Twins(framed, x)
    cuts = sorted({0, count, *data.draw(st.lists(st.integers(0, count), max_size=2))})
    for first, last in pairwise(cuts):
        twins.append(x[:, :, first:last], first, importance)
    twins.assert_equal()
    twins.assert_read_alike(count + 2)
    kept = data.draw(st.integers(0, count))
    twins.append(x[:, :, : count - kept][:, :, :3], kept)
    twins.assert_equal()
    twins.assert_read_alike(kept)


@pytest.mark.parametrize("stride", ["tokens first", "channels apart", "expanded"])
@pytest.mark.parametrize("grouping", ["token", "channel"])
def test_strides_of_new_tokens_do_not_matter(grouping: str, stride: str) -> None:
    layout = Layout("key", 64, Regions(1, 3, 32), Uniform(4, grouping=grouping))
    x = torch.randn(BATCH, HEADS, 80, 64, generator=torch.Generator().manual_seed(0))
    if stride == "tokens first":
        strided = x.transpose(1, 2).contiguous().transpose(1, 2)
    elif stride == "channels apart":
        strided = torch.stack([x, x], -1)[..., 0]
    else:
        x = strided = x[:1].expand(BATCH, -1, -1, -1)
    twins = Twins((layout, UNCALIBRATED), x)
    twins.append(strided, 0)
    twins.assert_equal()
    assert int(twins.ours.cursor[1]) == 2


@pytest.mark.parametrize(
    ("couple", "bits"), [(1, 4), (2, 1), (3, 3), (4, 5), (6, 6), (8, 7), (16, 12)]
)
@pytest.mark.parametrize("role", ["key", "value"])
def test_the_nearest_centroid_is_found_at_any_width(role: str, couple: int, bits: int) -> None:
    head_dim = 32 * couple if couple < 8 else 256
    tables = random_tables(
        HEADS, head_dim, group_size=16, rotary=False, codebook=(couple, bits), seed=0
    )
    layout = Layout(role, head_dim, Regions(1, 0, 32), Codebook(bits, couple, tables=tables.digest))
    x = torch.randn(1, HEADS, 40, head_dim, generator=torch.Generator().manual_seed(0))
    twins = Twins((layout, Calibrated(tables.words)), x)
    twins.append(x, 0)
    twins.assert_equal()
    assert int(twins.ours.cursor[1]) == 1


@pytest.fixture
def many_threads(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Share even the smallest page among threads."""
    monkeypatch.setattr(native, "PARALLEL_FROM", 0)
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("many_threads")
@given(coded_layouts())
def test_threads_and_blocks_do_not_change_a_bit(framed: Framed) -> None:
    layout = framed[0]
    count = layout.sinks + layout.window + 3 * layout.page_size
    x = torch.randn(
        BATCH, HEADS, count, layout.head_dim, generator=torch.Generator().manual_seed(0)
    )
    twins = Twins(framed, x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(append, "SCRATCH_ELEMENTS", 1)
        twins.append(x, 0)
    twins.assert_equal()
    twins.assert_read_alike(count)


@pytest.mark.parametrize(("start", "tokens"), [(-1, 3), (41, 1), (0, 500)])
def test_tokens_that_do_not_fit_are_refused_before_anything_is_written(
    start: int, tokens: int
) -> None:
    layout = Layout("key", 64, Regions(1, 3, 32), Uniform(4))
    x = torch.randn(1, 1, 500, 64, generator=torch.Generator().manual_seed(0))
    cache = Packed.empty(x, PAGES, layout)
    ops.append_(list(cache), [], x[:, :, :40], None, 0, layout)
    before = [part.clone() for part in cache]
    with pytest.raises(ValueError, match="must"):
        ops.append_(list(cache), [], x[:, :, :tokens], None, start, layout)
    for part, copy in zip(cache, before, strict=True):
        assert torch.equal(part, copy)


def test_a_page_read_for_attention_is_rotated_as_the_specification_rotates_it() -> None:
    tables = random_tables(HEADS, 64, group_size=16, rotary=True, codebook=None, seed=0)
    scheme = Uniform(4, group_size=16, rotary=True, tables=tables.digest)
    layout = Layout("key", 64, Regions(2, 5, 32), scheme)
    calibrated = Calibrated(tables.words, torch.tensor([0, -3], dtype=torch.int32))
    x = torch.randn(BATCH, HEADS, 80, 64, generator=torch.Generator().manual_seed(0))
    cache = Packed.empty(x, PAGES, layout)
    backend.append_(cache, calibrated, x, None, 0, layout)
    rotated = native.unpack(PackedTensor(cache, layout, calibrated), slice(0, 2))
    codes, params = (part[:, :, :2] for part in cache[:2])
    tokens = reference.dequantize_packed(codes, params, layout, calibrated)
    order = calibrated.section("order", layout)[None, :, None].long()
    assert torch.equal(rotated.flatten(2, 3), tokens.gather(-1, order.expand(tokens.shape)))


SIZES = (4, 8, 12, 16, 20, 24, 40, 72, 80, 88, 100, 104, 120, 136, 256, 320, 576)
SIZED = (
    *(Uniform(bits, group_size=4) for bits in (8, 4, 3, 2, 1)),
    Uniform(1.5, group_size=4, packing="trits"),
    Uniform(2, "channel", 32),
    Uniform(3, "channel", 32, params="fp8"),
    Mixed(2.5),
    Mixed(3.5, 1, 6, outliers=2, params="fp8"),
)


@pytest.mark.parametrize("head_dim", SIZES)
def test_every_head_size_is_served_by_every_scheme(head_dim: int) -> None:
    generator = torch.Generator().manual_seed(head_dim)
    x = torch.randn(2, 1, HEADS, 80, head_dim, generator=generator)
    query = torch.randn(1, 2 * HEADS, 1, head_dim, generator=generator)
    for scheme in SIZED:
        layouts = [Layout(role, head_dim, Regions(1, 3, 32), scheme) for role in ROLES]
        twins = [Twins((layout, UNCALIBRATED), x[0]) for layout in layouts]
        for twin, tokens in zip(twins, x, strict=True):
            twin.append(tokens[:, :, :79], 0)
            twin.assert_equal()
            twin.assert_read_alike(79)
        new = x[0, :, :, 79:], x[1, :, :, 79:]
        about = UNCALIBRATED, UNCALIBRATED, None, None, 79, Score(head_dim**-0.5), *layouts
        ours = backend.attend(query, *new, twins[0].ours, twins[1].ours, *about)
        expected = specification.attend(query, *new, twins[0].ours, twins[1].ours, *about)
        torch.testing.assert_close(ours, expected)
