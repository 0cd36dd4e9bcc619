"""Attention on the CPU over caches of all codings is that over the tokens that they stand for."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile.kernels import reference
from kvq_compile.kernels.cpu import append, attend, backend, native
from kvq_compile.kernels.cpu.packed import PackedTensor
from kvq_compile.kernels.layout import Layout, Regions
from kvq_compile.kernels.packed import UNCALIBRATED, Calibrated, Packed
from kvq_compile.kernels.reference import backend as specification
from kvq_compile.kernels.schemes import Codebook, Role, Uniform
from kvq_compile.kernels.score import Score
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.kernels.tables import Tables
from kvq_compile.testing import changed, masks
from kvq_compile.testing.small_tables import framed_layouts, random_tables
from uncalibrated import Framed, mixed_layouts, plain_layouts

BATCH, HEADS = 2, 2
ROLES: tuple[Role, ...] = ("key", "value")
PATHS = ("at once", "in blocks", "by the specification")
FULL_TURNS = 1 << 20  # a position at which fp32 angles would be off by a tenth


@contextmanager
def through(path: str) -> Iterator[None]:
    """Send attention through one of its paths, blocks being small enough that there are several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attend, "FEW_ROWS", 10**6 if path == "at once" else 0)
        patch.setattr(append, "SCRATCH_ELEMENTS", 1)
        yield


def plain(role: Role) -> st.SearchStrategy[Framed]:
    return plain_layouts(role, (20, 64, 72, 80, 256), ("none", "hadamard"))


def mixed(role: Role) -> st.SearchStrategy[Framed]:
    return mixed_layouts(role, (8, 16, 64, 72, 80, 320), (32,)).map(
        lambda layout: (layout, UNCALIBRATED)
    )


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Framed, Framed]:
    """Draw layouts of keys and of values, of any coding each, that go into one cache."""
    key, value = (
        draw(st.one_of(framed_layouts(role), framed_layouts(role), plain(role), mixed(role)))
        for role in ("key", "value")
    )
    page_size = min(key[0].page_size, value[0].page_size)
    shared = {"page_size": page_size, "sinks": draw(st.integers(0, 5))}
    shared["window"] = draw(st.integers(0, 40))
    fitted = []
    for layout, frame in (key, value):
        if layout.grouping == "channel":
            fields = shared | {"group_size": min(layout.group_size, page_size)}
            fitted.append((changed(layout, **fields), frame))
        else:
            fitted.append((changed(layout, **shared), frame))
    return fitted[0], fitted[1]


def drawn(seed: int, *shape: int) -> Tensor:
    return torch.randn(BATCH, *shape, generator=torch.Generator().manual_seed(seed))


def written(framed: Framed, x: Tensor) -> PackedTensor:
    layout, frame = framed
    parts = Packed.empty(x, 2 + x.shape[2] // layout.page_size, layout)
    append.append_(parts, frame, x, 0, layout)
    return PackedTensor(parts, layout, frame)


class Case:
    """A cache of ``held`` tokens and ``new`` ones that attend to all of them."""

    def __init__(
        self, framed: tuple[Framed, Framed], held: int, new: int = 1, shared: int = 1, seed: int = 0
    ) -> None:
        D, Dv = (layout.head_dim for layout, _ in framed)
        key, value = drawn(seed, HEADS, held + new, D), drawn(seed + 1, HEADS, held + new, Dv)
        self.query = drawn(seed + 2, HEADS * shared, new, D)
        self.new = key[:, :, held:], value[:, :, held:]
        self.keys = written(framed[0], key[:, :, :held])
        self.values = written(framed[1], value[:, :, :held])
        self.held, self.scale = held, D**-0.5
        self.mask: Tensor | None = None

    def attend(self, path: str = "at once", **other: Calibrated) -> Tensor:
        keys = other.get("keys", self.keys.calibrated)
        values = other.get("values", self.values.calibrated)
        by = specification if path == PATHS[2] else backend
        with through(path):
            return by.attend(
                *(self.query, *self.new, self.keys.parts, self.values.parts, keys, values),
                *(self.mask, None, self.held, Score(self.scale)),
                *(self.keys.layout, self.values.layout),
            )

    def check(self, path: str = "at once") -> None:
        """Assert that the output is fp64 attention over the tokens read, up to rounding."""
        key, value = (
            torch.cat([reference.read(*x.parts, self.held, x.layout, x.calibrated), new], 2)
            for x, new in zip((self.keys, self.values), self.new, strict=True)
        )
        mask, bias = self.mask, 0.0
        if mask is not None and mask.dtype != torch.bool:
            shown = mask[mask > -1e4]
            mask, bias = mask.double(), float(shown.abs().max()) if shown.numel() else 0.0
        exact = (self.query.double(), key.double(), value.double())
        expected = reference.softmax_attention(*exact, mask, self.scale)
        tolerance = self.rounding(key, value, bias)
        error = float((self.attend(path) - expected).abs().max())
        assert error <= tolerance, f"{error=:.3g}, but must be at most {tolerance:.3g}"

    def rounding(self, key: Tensor, value: Tensor, bias: float) -> float:
        """Bound how far fp32 attention in any order is from fp64: `testing.rounding_bound`, made sharper.

        Changes of basis are sums of ``D`` terms, and make numbers meet that are larger than tokens (`reach`).
        A bound that no sum can pass would be a hundred times what is seen. Errors being independent, a sum of
        ``n`` terms is off by at most ``λ √n u`` of their size but with a probability of ``2 exp(-λ² / 2)``.

        Source: Higham and Mary, A new approach to probabilistic rounding error analysis, 2019.
        """
        unit, likely, D, S = 2.0**-24, 6.0, self.query.shape[3], key.shape[2]
        norms = float(self.query.norm(dim=-1).max()) * reach(self.keys, key)[0]
        scores = unit * likely * (3 * math.sqrt(D) * self.scale * norms + bias)
        sums = unit * likely * (math.sqrt(S) + 3 * math.sqrt(D)) * reach(self.values, value)[1]
        return float(value.abs().max()) * 2 * math.tanh(scores + 4 * unit) + sums


def reach(packed: PackedTensor, tokens: Tensor) -> tuple[float, float]:
    """Return the largest norm, and the largest element, of the numbers that sum up to a token."""
    pages = slice(0, packed.pages)
    codes, params = (part[:, :, pages] for part in packed.parts[:2])
    coded = reference.unpacked_values(codes, params, packed.layout, packed.calibrated)
    norm, element = (
        float(x.max()) if x.numel() else 0.0 for x in (coded.norm(dim=-1), coded.abs())
    )
    if packed.calibrated.tables is not None:
        mean, scale = (packed.calibrated.section(name, packed.layout) for name in ("mean", "scale"))
        norm = float(scale.max()) * norm + float(mean.norm(dim=-1).max())
        element = float(scale.max()) * element + float(mean.abs().max())
    return max(norm, float(tokens.norm(dim=-1).max())), max(element, float(tokens.abs().max()))


@pytest.mark.parametrize("path", PATHS)
@given(pairs(), st.data(), st.integers(0, 260), st.sampled_from((1, 1, 3)), st.sampled_from((1, 3)))
def test_attention_is_that_over_the_tokens_that_a_cache_stands_for(
    path: str, framed: tuple[Framed, Framed], data: st.DataObject, held: int, new: int, shared: int
) -> None:
    case = Case(framed, held, new, shared, data.draw(st.integers(0, 99)))
    case.mask = data.draw(masks(BATCH, HEADS * shared, new, held + new))
    case.check(path)


@given(st.one_of(framed_layouts(), *(kind(role) for kind in (plain, mixed) for role in ROLES)))
def test_unpacked_numbers_are_exactly_those_that_codes_stand_for(framed: Framed) -> None:
    layout, frame = framed
    packed = written(
        framed, drawn(0, HEADS, 3 * layout.page_size + layout.window + 5, layout.head_dim)
    )
    pages = slice(1, 3)
    codes, params = (part[:, :, pages] for part in packed.parts[:2])
    values = reference.unpacked_values(codes, params, layout, frame)
    assert torch.equal(native.unpack(packed, pages, rotated=False), values)


@pytest.mark.parametrize(
    ("couple", "bits"), [(1, 4), (2, 1), (3, 3), (4, 5), (6, 6), (8, 7), (16, 12)]
)
@pytest.mark.parametrize("role", ["key", "value"])
def test_any_number_of_channels_may_share_an_index_of_any_width(
    role: Role, couple: int, bits: int
) -> None:
    head_dim = 32 * couple if couple < 8 else 256
    tables = random_tables(
        HEADS, head_dim, group_size=16, rotary=False, codebook=(couple, bits), seed=0
    )
    spec = Codebook(bits, couple, tables=tables.digest)
    layout = Layout(role, head_dim, Regions(1, 0, 32), spec)
    parts = Packed.empty(drawn(0, HEADS, 1, head_dim), 3, layout)
    parts[0].random_(-(2**15), 2**15 - 1, generator=torch.Generator().manual_seed(0))
    packed = PackedTensor(parts, layout, Calibrated(tables.words))
    values = reference.unpacked_values(*parts[:2], layout, packed.calibrated)
    assert torch.equal(native.unpack(packed, slice(0, 3)), values)


@given(pairs(), st.integers(150, 260))
def test_the_number_of_splits_does_not_change_the_output(
    framed: tuple[Framed, Framed], held: int
) -> None:
    case = Case(framed, held, shared=2)
    expected = case.attend()
    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "PARALLEL_FROM", 0)
        try:
            torch.set_num_threads(3)
            torch.testing.assert_close(case.attend(), expected, rtol=1e-4, atol=1e-5)
        finally:
            torch.set_num_threads(threads)


@pytest.mark.parametrize("path", PATHS)
@given(framed_layouts("key"), st.sampled_from((-FULL_TURNS, FULL_TURNS, 2**31 - 1000)))
def test_angles_are_exact_at_any_position(
    path: str, framed: tuple[Layout, Calibrated], shift: int
) -> None:
    layout, frame = framed
    assume(layout.rotary)
    shifts = torch.tensor([shift, shift + 3], dtype=torch.int32)
    spec = Uniform(4)
    value = CacheSpec(spec, spec, layout.sinks, layout.window, layout.page_size).layout("value", 64)
    Case(((layout, frame._replace(shift=shifts)), (value, UNCALIBRATED)), 200).check(path)


@pytest.mark.parametrize("path", PATHS)
def test_a_wrong_shift_or_other_tables_change_the_output(path: str) -> None:
    def framed(role: Role, seed: int, shift: tuple[int, int]) -> tuple[Layout, Calibrated]:
        rotary = role == "key"
        tables = random_tables(HEADS, 64, group_size=16, rotary=rotary, codebook=None, seed=seed)
        spec = Uniform(2, group_size=16, params="fp8", rotary=rotary, tables=tables.digest)
        layout = Layout(role, 64, Regions(2, 9, 32), spec)
        return layout, Calibrated(tables.words, torch.tensor(shift).int() if rotary else None)

    key, value = framed("key", 0, (0, -3)), framed("value", 1, (0, 0))
    case = Case((key, value), 150)
    case.check(path)
    right = case.attend(path)
    shifted = case.attend(path, keys=framed("key", 0, (0, -2))[1])
    assert torch.equal(shifted[0], right[0])
    assert (shifted[1] - right[1]).abs().max() > 1e-2
    for wrong in (
        {"keys": framed("key", 2, (0, -3))[1]},
        {"values": framed("value", 2, (0, 0))[1]},
    ):
        assert (case.attend(path, **wrong) - right).abs().max() > 1e-2


def tabled_case() -> tuple[Tables, Case]:
    tables = random_tables(HEADS, 64, group_size=16, rotary=False, codebook=None, seed=0)
    spec = Uniform(4, group_size=16, tables=tables.digest)
    layouts = [Layout(role, 64, Regions(2, 9, 32), spec) for role in ("key", "value")]
    framed = [(layout, Calibrated(tables.words)) for layout in layouts]
    return tables, Case((framed[0], framed[1]), 150)


def test_tables_that_are_written_to_are_read_again() -> None:
    tables, case = tabled_case()
    case.check()
    other = random_tables(HEADS, 64, group_size=16, rotary=False, codebook=None, seed=1)
    tables.words.copy_(other.words)
    case.check()


def test_a_query_that_sees_nothing_gives_zeros() -> None:
    _, case = tabled_case()
    case.mask = torch.zeros(1, 151, dtype=torch.bool)
    for path in PATHS:
        assert not case.attend(path).any()
