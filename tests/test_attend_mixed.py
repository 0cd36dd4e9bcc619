"""Fused attention over pages whose tokens differ in bits is attention to what they stand for.

The same claim as in `test_kernels_attention_frames`: the error is that of the same computation in the query's
dtype.
"""

from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from attention_site import (
    DTYPES,
    SHARED,
    Site,
    assert_right_under_any_mask,
    assert_shares_do_not_matter,
    causal,
    plain_sides,
    starts,
)
from kvq_compile.kernels import reference
from kvq_compile.kernels.layout import Layout, Regions
from kvq_compile.kernels.packed import UNCALIBRATED, Calibrated, Packed
from kvq_compile.kernels.schemes import Codebook, Mixed, Scheme, Uniform
from kvq_compile.kernels.score import Score
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.kernels.triton import backend, launch, mixed
from kvq_compile.kernels.triton.constants import ReadConstants
from kvq_compile.testing.small_tables import random_tables
from native import CONVERSIONS, DEVICE, examples

pytestmark = CONVERSIONS
EXAMPLES = examples(Fraction(1, 3))


def mixed_spec(budget: float, least: int = 0, most: int = 4, **options: Any) -> Scheme:
    return Mixed(budget, least, most, **{"params": "fp8"} | options)


def mixed_site(
    cache: CacheSpec, dims: tuple[int, int], shared: int, lengths: tuple[int, int],
    dtype: torch.dtype = torch.float32,
) -> Site:  # fmt: skip
    """The keys hold queries, which attention does not look at."""
    sides = plain_sides(cache, dims, shared)
    return Site(sides, (2, shared), (*lengths, 0), dtype, importance=True)


@st.composite
def specs(draw: st.DrawFn) -> Scheme:
    least = draw(st.integers(0, 2))
    most = draw(st.sampled_from([4, 4, 6, least + 1, 8]))
    rows = draw(st.integers(max(8, 32 * least), 32 * most))
    return mixed_spec(
        rows / 32, least, most, params=draw(st.sampled_from(["fp8", "fp16"])),
        outliers=draw(st.sampled_from([0, 0, 2, 4])), fit=draw(st.booleans()),
        transform=draw(st.sampled_from(["none", "none", "hadamard"])),
    )  # fmt: skip


@st.composite
def sites(draw: st.DrawFn) -> Site:
    page = draw(st.sampled_from((32, 32, 64)))
    cache = CacheSpec(draw(specs()), draw(specs()), draw(st.integers(0, 5)), 20, page)
    dims = st.sampled_from((8, 16, 20, 32, 64, 72, 80, 120, 128, 320))
    start = draw(st.sampled_from(starts(cache.layout("key", 64))))
    return mixed_site(
        cache, (draw(dims), draw(dims)), draw(st.sampled_from(SHARED)),
        (start, draw(st.sampled_from([1, 1, 2, 5]))), draw(st.sampled_from(DTYPES)),
    )  # fmt: skip


@EXAMPLES
@given(sites(), st.data())
def test_attention_has_the_error_of_the_same_computation_in_low_precision(
    site: Site, data: st.DataObject
) -> None:
    assert_right_under_any_mask(site, data)


CASES = {  # keys and values
    "qaq-2.3": (mixed_spec(2.75), mixed_spec(1.4375)),
    "qaq-3": (mixed_spec(3.25), mixed_spec(2.375)),
    "six bits": (mixed_spec(3.5, 1, 6), mixed_spec(3, 0, 6)),
    "eight bits": (mixed_spec(5, 0, 8), mixed_spec(2, 0, 8)),
}


@pytest.mark.parametrize("name", CASES)
def test_a_chunk_of_queries_over_whole_pages_is_right(name: str) -> None:
    site = mixed_site(CacheSpec(*CASES[name], 5, 20, 64), (128, 128), 2, (160, 9))
    site.assert_low_precision_error(site.attend(causal(site)), causal(site))


@pytest.mark.parametrize("dims", [(16, 80), (80, 16), (16, 16)])
def test_small_heads_with_outliers_are_right(dims: tuple[int, int]) -> None:
    """Failed natively: a token of 16 channels has a single unit, and units were unpacked in pairs."""
    cache = CacheSpec(
        mixed_spec(2.5, 0, 3, outliers=2), mixed_spec(3.25, 0, 8, outliers=4), 0, 20, 32
    )
    site = Site(plain_sides(cache, dims), (2, 4), (52, 2, 0), torch.float32, importance=True)
    site.assert_low_precision_error(site.attend(None), None)


def test_pages_of_equal_tokens_have_no_bits_and_are_read() -> None:
    """Their tokens have no extent, so all of them stand for their centres."""
    site = mixed_site(CacheSpec(*CASES["qaq-2.3"], 1, 9, 32), (32, 32), 1, (74, 1))
    for parts, (layout, _) in zip(site.parts, site.sides, strict=True):
        reference.append_(*parts, torch.full((2, 2, 74, 32), 0.5), 0, layout)
        assert not parts[0].any()
    site.assert_low_precision_error(site.attend(None), None)


def test_the_number_of_shares_does_not_change_the_output(monkeypatch: pytest.MonkeyPatch) -> None:
    site = mixed_site(CacheSpec(*CASES["six bits"], 1, 20, 32), (64, 64), 4, (120, 1))
    assert_shares_do_not_matter(site, 1000, monkeypatch)


def test_tables_are_refused_by_name() -> None:
    tables = random_tables(2, 32, group_size=32, rotary=False, codebook=None, seed=0)
    key = mixed_spec(2, tables=tables.digest)
    spec = CacheSpec(key, mixed_spec(2), 1, 20, 32, key_tables=tables)
    layouts = [spec.layout(role, 32) for role in ("key", "value")]
    parts = [Packed.empty(torch.zeros(1, 2, 1, 32, device=DEVICE), 2, layout) for layout in layouts]
    x = torch.zeros(1, 2, 1, 32, device=DEVICE)
    frame = Calibrated(tables.words.to(DEVICE))
    with pytest.raises(NotImplementedError, match="tables must be None"):
        backend.attend(x, x, x, *parts, frame, UNCALIBRATED, None, None, 1, Score(1.0), *layouts)


# --- instructions ---------------------------------------------------------------------------------


def execute(ptx: str, registers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Execute straight-line PTX on 32-bit registers that hold any number of lanes, int64."""

    def value(operand: str) -> Tensor:
        if operand in registers:
            return registers[operand]
        return torch.tensor(int(operand, 0))

    def halves(x: Tensor) -> Tensor:
        words = torch.stack([x & 0xFFFF, x >> 16], -1)
        return torch.where(words >= 1 << 15, words - (1 << 16), words).short().view(torch.float16)

    for line in ptx.strip("{} ").replace("\n", " ").split(";"):
        if not line.strip() or ".reg" in line:
            continue
        name, rest = line.strip().split(" ", 1)
        to, *operands = (operand.strip() for operand in rest.split(","))
        args = [value(operand) for operand in operands]
        if name == "mov.b32":
            result = args[0]
        elif name == "shl.b32":
            result = (args[0] << args[1]) & 0xFFFFFFFF
        elif name == "shr.b32" or name == "shr.u32":
            result = args[0] >> args[1]
        elif name == "and.b32":
            result = args[0] & args[1]
        elif name == "lop3.b32":
            a, b, c, table = args
            bits = [((x[..., None] if x.dim() else x) >> torch.arange(32)) & 1 for x in (a, b, c)]
            chosen = (table >> (bits[0] * 4 + bits[1] * 2 + bits[2])) & 1
            result = (chosen << torch.arange(32)).sum(-1)
        else:
            assert name == "sub.f16x2", name
            difference = halves(args[0]) - halves(args[1])
            words = difference.view(torch.int16).long() & 0xFFFF
            result = words[..., 0] | (words[..., 1] << 16)
        registers[to] = result
    return registers


@pytest.mark.parametrize("bits", range(1, 9))
def test_merged_planes_are_the_codes_in_fp16(bits: int) -> None:
    """All places of the two units of a register, with bits of other fields all zero, all one and random."""
    generator = torch.Generator().manual_seed(bits)
    codes = torch.randint(0, 1 << bits, (64, 2, 16), generator=generator)
    codes[0], codes[1] = 0, (1 << bits) - 1
    planes = {}
    for plane in range(bits):
        fields = (codes >> (bits - 1 - plane)) & 1
        units = (fields << torch.arange(16)).sum(-1)
        planes[f"${16 + plane}"] = units[:, 0] | (units[:, 1] << 16)
    registers = execute(mixed.merge_planes(bits), planes)
    for field in range(16):
        pair = torch.stack([registers[f"${field}"] & 0xFFFF, registers[f"${field}"] >> 16], -1)
        words = torch.where(pair >= 1 << 15, pair - (1 << 16), pair).short()
        assert torch.equal(words.view(torch.float16).long(), codes[:, :, field])


# --- launch settings ------------------------------------------------------------------------------


def test_rotary_keys_and_codebooks_take_two_programs_an_sm_and_others_three() -> None:
    def programs(key: Scheme, value: Scheme) -> int:
        layouts = Layout("key", 64, Regions(), key), Layout("value", 64, Regions(), value)
        return launch.programs_per_sm(*(ReadConstants.of(x) for x in layouts), 8, {})

    def tables(rotary: bool, codebook: tuple[int, int] | None = None) -> str:
        made = random_tables(2, 64, group_size=64, rotary=rotary, codebook=codebook, seed=0)
        return made.digest

    assert programs(Uniform(2), Uniform(2)) == 3
    assert programs(*CASES["qaq-2.3"]) == 3
    assert programs(Uniform(2, tables=tables(True), rotary=True), Uniform(2)) == 2
    book = Codebook(4, 2, tables=tables(False, (2, 4)))
    assert programs(Uniform(2), book) == 2
