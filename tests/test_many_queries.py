"""Many query tokens attend to dequantized pieces of a cache as exactly as the same computation in the model's dtype.

The same claim as in `test_kernels_attention`, of the other way to attend. On a CPU PyTorch's flash attention is another
one than on a GPU.
"""

import math
from dataclasses import replace
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
    causal,
    plain_sides,
    random_mask,
    starts,
)
from kvq_compile.kernels import many_queries, ops
from kvq_compile.kernels.layout import Layout, Regions
from kvq_compile.kernels.packed import UNCALIBRATED, Calibrated, flat
from kvq_compile.kernels.schemes import Channelwise, Mixed, Uniform, scheme_of
from kvq_compile.kernels.score import Score
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.testing.small_tables import random_tables, turning_tables
from native import CONVERSIONS, examples

pytestmark = CONVERSIONS
EXAMPLES = examples(Fraction(1, 3))
LAYOUT = CacheSpec(Uniform(4), Uniform(4), 3, 20, 32).layout("key", 64)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Call few queries many, and cut what is a piece in a model."""
    monkeypatch.setattr(many_queries, "MANY_ROWS", {"cuda": 1, "cpu": 1})
    monkeypatch.setattr(many_queries, "MANY_TOKENS", 1)
    monkeypatch.setattr(many_queries, "SCRATCH_BYTES", 1 << 16)


@pytest.fixture
def masked(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list of how many tokens each attention under a mask is over."""
    found: list[int] = []
    biased = many_queries._biased

    def watched(query: Tensor, key: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        found.append(key.shape[2])
        return biased(query, key, *rest)

    monkeypatch.setattr(many_queries, "_biased", watched)
    return found


def make_site(tokens: int, dtype: torch.dtype, start: int = 180, heads: Any = (2, 2)) -> Site:
    spec = CacheSpec(Uniform(4), Uniform(4, "channel"), 3, 20, 32)
    return Site(plain_sides(spec, (64, 64)), heads, (start, tokens, 0), dtype)


@st.composite
def sites(draw: st.DrawFn) -> Site:
    dim = draw(st.sampled_from((8, 40, 64, 96, 128)))
    spec = CacheSpec(
        Uniform(draw(st.sampled_from((1, 3, 4, 8)))), Uniform(4), draw(st.integers(0, 5)),
        draw(st.integers(0, 40)), 32,
    )  # fmt: skip
    sides = plain_sides(spec, (dim, dim))
    tokens, extra = draw(st.sampled_from((1, 2, 5, 40))), draw(st.sampled_from((0, 0, 30)))
    lengths = draw(st.sampled_from([0, *starts(sides[0][0])])), tokens, extra
    heads = draw(st.sampled_from((1, 2))), draw(st.sampled_from(SHARED))
    return Site(sides, heads, lengths, draw(st.sampled_from(DTYPES)))


@EXAMPLES
@given(sites(), st.data())
def test_attention_has_the_error_of_the_same_computation_in_low_precision(
    site: Site, data: st.DataObject
) -> None:
    assert_right_under_any_mask(site, data)


@pytest.mark.long(
    but=[
        "257-dtype0-True",
        "257-dtype0-False",
        "257-dtype1-False",
        "257-dtype1-True",
        "64-dtype0-True",
        "64-dtype1-False",
    ]
)
@pytest.mark.parametrize("by_position", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [64, 257, 2048])
def test_a_chunk_attends_causally_to_itself_and_to_all_that_was_before(
    tokens: int, dtype: torch.dtype, by_position: bool, masked: list[int]
) -> None:
    site = make_site(tokens, dtype, heads=(1, 2))
    mask, paged = causal(site), site.parts
    if not by_position:  # as in a cache that grows
        site.parts = [
            tuple(flat(parts, layout)) for parts, (layout, _) in zip(paged, site.sides, strict=True)
        ]
    out = site.attend(mask, by_position)
    assert out.is_contiguous()  # what a compiler is told of it
    site.parts = paged
    site.assert_low_precision_error(out, mask)
    assert masked == []


@pytest.mark.long(but=["dtype1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_edges_of_padding_and_windows_are_masked(
    dtype: torch.dtype, masked: list[int]
) -> None:
    site = make_site(64, dtype, start=350)
    slot, token = torch.arange(414), torch.arange(350, 414)[:, None]
    mask = ((slot <= token) & (slot > token - 256)).expand(2, 1, 64, 414).clone()
    site.assert_low_precision_error(site.attend(mask), mask)
    assert sum(masked) <= 64 + 2 * 32  # slots that some queries see, in whole pages
    masked.clear()
    mask = (slot <= token).expand(2, 1, 64, 414).clone()
    mask[1, ..., :40] = False
    site.assert_low_precision_error(site.attend(mask), mask)
    assert sum(masked) <= 40 + 2 * 32


KEYS: dict[str, dict[str, Any]] = {
    "rotary": {"bits": 2, "rotary": True, "group_size": 32, "params": "fp8"},
    "rotary codebook": {"bits": 8, "rotary": True, "couple": 4},
    "rotated": {"bits": 4, "transform": "hadamard"},
    "trits": {"bits": 1.5, "packing": "trits", "group_size": 32, "params": "fp8"},
}


def calibrated_side(role: Any, seed: int, **options: Any) -> tuple[Layout, Calibrated]:
    couple, rotary = options.get("couple"), options.pop("rotary", False)
    tables = random_tables(
        2, 64, group_size=options.get("group_size") or 64, seed=seed, rotary=rotary,
        codebook=None if couple is None else (couple, options["bits"]),
    )  # fmt: skip
    layout = Layout(role, 64, Regions(3, 20, 32), scheme_of(options, tables.digest, rotary))
    shift = torch.tensor([5, -3], dtype=torch.int32) if layout.rotary else None  # left padding
    return layout, Calibrated(tables.words, shift)


@pytest.mark.long(but=["rotary codebook", "trits"])
@pytest.mark.parametrize("key", KEYS)
def test_calibrated_and_shifted_keys_are_attended_to_in_pieces(key: str) -> None:
    sides = calibrated_side("key", 0, **dict(KEYS[key])), calibrated_side("value", 1, bits=4)
    site = Site(sides, (2, 4), (300, 30, 0), torch.float32)
    site.assert_low_precision_error(site.attend(causal(site)), causal(site))


def test_pages_whose_tokens_differ_in_bits_are_attended_to_in_pieces() -> None:
    spec = CacheSpec(Mixed(2.5, 0, 4), Mixed(2, 0, 4), 1, 4, 32)
    site = Site(plain_sides(spec, (64, 64), 2), (2, 2), (200, 30, 0), torch.float32, True)
    site.assert_low_precision_error(site.attend(causal(site)), causal(site))


def test_pages_whose_channels_differ_in_bits_are_attended_to_in_pieces() -> None:
    tables = turning_tables(64)
    key = Layout("key", 64, Regions(3, 20, 64), Channelwise(3, tables=tables.digest))
    value = CacheSpec(Uniform(4), Uniform(4), 3, 20, 64).layout("value", 64)
    sides = (key, Calibrated(tables.words)), (value, UNCALIBRATED)
    site = Site(sides, (2, 2), (300, 30, 0), torch.float32)
    site.assert_low_precision_error(site.attend(causal(site)), causal(site))


def test_tokens_that_the_cache_does_not_hold_give_nan() -> None:
    site = make_site(5, torch.float32)
    assert bool(site.attend(None, start=181).isnan().all())


@pytest.mark.parametrize("hidden", [False, -math.inf, torch.finfo(torch.float32).min])
def test_a_row_that_sees_nothing_gives_zeros(hidden: float | bool) -> None:
    site = make_site(5, torch.float32)
    seen = torch.rand(2, 1, 5, 185, generator=torch.Generator().manual_seed(0)) < 0.5
    seen[1, 0, 3] = False
    mask = seen if hidden is False else torch.zeros(seen.shape).masked_fill(~seen, hidden)
    out = site.attend(mask)
    assert bool((out[1, :, 3] == 0).all())
    assert bool((out[0] != 0).all())
    site.assert_low_precision_error(out, mask)


@pytest.mark.parametrize("mask", [torch.zeros(5, 185, dtype=torch.bool), torch.ones(5, 0) > 0])
def test_a_call_that_sees_nothing_gives_zeros(mask: Tensor) -> None:
    assert bool((make_site(5, torch.float32).attend(mask) == 0).all())


# Plans


def plan_of(mask: Tensor | None, start: int, new: int) -> many_queries.Plan | None:
    query = torch.zeros(1, 2, new, 64)
    return many_queries.find_plan(query, new, mask, None, start, LAYOUT)


@EXAMPLES
@given(st.data())
def test_spans_cover_what_is_seen_and_call_shown_what_all_see(data: st.DataObject) -> None:
    end = data.draw(st.integers(1, 400))
    edges = sorted(data.draw(st.lists(st.integers(0, end), max_size=4)))
    kinds = torch.zeros(end, dtype=torch.uint8)
    for first, last in zip([0, *edges], [*edges, end], strict=True):
        kinds[first:last] = data.draw(st.sampled_from((0, 1, 2)))
    spans = many_queries._spans(kinds, LAYOUT)
    covered = torch.zeros(end, dtype=torch.bool)
    for span in spans:
        assert span.first == 0 or (span.first - LAYOUT.sinks) % LAYOUT.page_size == 0
        assert span.last > span.first
        assert span.view == "masked" or bool((kinds[span.first : span.last] == 2).all())
        assert not covered[span.first : span.last].any()
        covered[span.first : span.last] = True
    assert bool(covered[kinds > 0].all())
    whole = [bool((kinds[a : a + 32] == 2).all()) for a in range(3, end - 31, 32)]
    shown = [span for span in spans if span.view == "shown"]
    assert sum(whole) <= sum((span.last - span.first) for span in shown) / 32


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_a_causal_mask_is_recognized(dtype: torch.dtype) -> None:
    mask = torch.arange(220) <= torch.arange(180, 200)[:, None]
    if dtype != torch.bool:
        mask = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(dtype).min)
    plan = plan_of(mask, 180, 20)
    assert plan == (180, [(0, 180, "shown")], (180, 200, "causal"))
    mask[7, 185] = not mask[7, 185] if dtype == torch.bool else 1.0
    assert plan_of(mask, 180, 20) == (180, [(0, 180, "shown")], (180, 200, "masked"))


def test_without_a_mask_all_is_shown() -> None:
    assert plan_of(None, 180, 20) == (180, [(0, 180, "shown")], (180, 200, "shown"))
    assert plan_of(None, 0, 20) == (0, [], (0, 20, "shown"))


def test_a_bias_that_the_dtype_of_queries_would_round_is_left_to_the_kernel() -> None:
    query = torch.zeros(1, 2, 20, 64, dtype=torch.bfloat16)
    mask = torch.randn(20, 200)
    assert many_queries.find_plan(query, 20, mask, None, 180, LAYOUT) is None
    assert many_queries.find_plan(query, 20, mask.bfloat16(), None, 180, LAYOUT) is not None


@pytest.mark.parametrize("view", ["shown", "masked"])
def test_what_is_dequantized_at_once_fits_scratch_memory(
    view: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(many_queries, "SCRATCH_BYTES", 1 << 20)
    query, key = torch.zeros(2, 8, 5, 64, dtype=torch.bfloat16), torch.zeros(2, 2, 5, 64)
    side = many_queries.Side(key, torch.zeros(2), lambda first, last, out: None, LAYOUT)
    span = many_queries.Span(0, 100_000, view)
    pieces = list(many_queries._pieces(span, query, side))
    assert [piece.first for piece in pieces] == [0, *(piece.last for piece in pieces[:-1])]
    assert pieces[-1].last == 100_000
    heads = 8 if view == "masked" else 2
    longest = max(piece.last - piece.first for piece in pieces)
    assert (1 << 19) < 2 * 2 * heads * longest * 64 * 2 <= 1 << 20


# Which calls


@pytest.mark.parametrize(
    "changed",
    [
        {"score": Score(0.1, cap=30.0)},
        {"score": Score(-0.1)},
        {"score": Score(0.1, has_sinks=True)},
        {"tokens": 31},
        {"heads": 2},
        {"key_dim": 60},
        {"value_dim": 32},
        {"dtype": torch.float64},
    ],
)
def test_other_calls_are_left_to_the_kernel(
    changed: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def is_taken(**given: Any) -> bool:
        call = {
            "score": Score(0.1),
            "tokens": 32,
            "heads": 4,
            "key_dim": 64,
            "value_dim": 64,
        } | given
        dtype = given.get("dtype", torch.float32)
        shape = 1, call["heads"], call["tokens"]
        query = torch.zeros(*shape, call["key_dim"], dtype=dtype)
        key, value = (
            torch.zeros(1, 2, 32, call[name], dtype=dtype) for name in ("key_dim", "value_dim")
        )
        return many_queries.takes(query, key, value, call["score"])

    monkeypatch.setattr(many_queries, "MANY_ROWS", {"cpu": 64})
    monkeypatch.setattr(many_queries, "MANY_TOKENS", 32)
    assert is_taken()
    assert not is_taken(**changed)


def test_both_ways_agree(monkeypatch: pytest.MonkeyPatch) -> None:
    site = make_site(20, torch.float32)
    in_pieces = site.attend(causal(site))
    monkeypatch.setattr(many_queries, "MANY_ROWS", {})
    torch.testing.assert_close(site.attend(causal(site)), in_pieces, rtol=1e-5, atol=1e-5)
    site.score = replace(site.score, cap=20.0)
    site.assert_low_precision_error(site.attend(causal(site)), causal(site))


@EXAMPLES
@given(sites(), st.data())
def test_a_cpu_attends_in_pieces_of_its_own_as_exactly(site: Site, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(["none", "tokens", "batch", "heads", "additive", "lowest"]))
    end = site.start + site.query.shape[2]
    mask = random_mask(site, kind, end + data.draw(st.sampled_from((0, 13))))
    calibrated = [x for _, frame in site.sides for x in frame if x is not None]
    out = ops.attend(
        site.query, *site.new, *map(list, site.parts), calibrated, mask, None, site.start,
        site.score, *(layout for layout, _ in site.sides),
    )  # fmt: skip
    site.assert_low_precision_error(out, mask)


@pytest.mark.parametrize("key", KEYS)
def test_a_cpu_reads_calibrated_and_shifted_keys_in_pieces(
    key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    sides = calibrated_side("key", 0, **dict(KEYS[key])), calibrated_side("value", 1, bits=4)
    site = Site(sides, (2, 4), (300, 30, 0), torch.float32)
    calibrated = [x for _, frame in sides for x in frame if x is not None]
    given_ = (
        *(site.query, *site.new, *map(list, site.parts), calibrated, causal(site), None, 300),
        *(site.score, *(layout for layout, _ in sides)),
    )
    in_pieces = ops.attend(*given_)
    site.assert_low_precision_error(in_pieces, causal(site))
    monkeypatch.setattr(many_queries, "MANY_ROWS", {})
    torch.testing.assert_close(ops.attend(*given_), in_pieces, rtol=1e-4, atol=1e-4)
