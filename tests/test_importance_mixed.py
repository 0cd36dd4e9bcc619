"""The kernel weighs tokens as the specification does, whatever the heads, the mask and the pieces tokens came in.

Kernels run natively where there is a GPU and in Triton's interpreter elsewhere, the specification always on the CPU.
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile.kernels import ops, reference
from kvq_compile.kernels.layout import Layout, Regions
from kvq_compile.kernels.packed import UNCALIBRATED, Calibrated, Packed
from kvq_compile.kernels.reference import importance
from kvq_compile.kernels.schemes import Adaptive, Mixed, Scheme
from kvq_compile.kernels.score import Score
from kvq_compile.kernels.spec import QUERIES, CacheSpec
from kvq_compile.kernels.triton import backend
from kvq_compile.kernels.triton import importance as kernels
from kvq_compile.testing.small_tables import random_tables
from native import CONVERSIONS, DEVICE, NATIVE, OVERFLOWS, examples

pytestmark = [CONVERSIONS, OVERFLOWS]
EXAMPLES = examples(Fraction(1, 3))
CAPACITY = 5  # pages
BATCH, HEADS = 2, 2


def mixed_spec(budget: float, least: int = 0, most: int = 4, **options: Any) -> Scheme:
    return Mixed(budget, least, most, **options)


def layout_of(shared: int = 2, dim: int = 32, **options: Any) -> Layout:
    scheme = mixed_spec(2.5, **options)
    queries = QUERIES if shared else 0
    return Layout("key", dim, Regions(3, 9, 32), scheme, queries, shared)


PLAIN = Score(0.3)
SCORES = (PLAIN, PLAIN, Score(0.3, cap=0.7), Score(0.3, 1.0, -0.4, 0.6))


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    least = draw(st.integers(0, 2))
    spec = mixed_spec(
        draw(st.integers(max(8, 32 * least), 32 * (least + 1))) / 32, least,
        draw(st.sampled_from([least + 1, 4, 8])), params=draw(st.sampled_from(["fp8", "fp16"])),
        outliers=draw(st.sampled_from([0, 0, 2])),
        transform=draw(st.sampled_from(["none", "none", "hadamard"])),
    )  # fmt: skip
    cache = CacheSpec(spec, spec, draw(st.integers(0, 5)), draw(st.integers(0, 20)), 32)
    shared = draw(st.sampled_from([0, 1, 2, 3, 7, 16]))
    return cache.layout("key", draw(st.sampled_from([8, 16, 20, 32, 64, 72, 80, 120, 320])), shared)


def random(heads: int, tokens: int, dim: int, dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(BATCH, tokens, heads, dim, generator=generator).to(dtype).transpose(1, 2)


@dataclass
class Call:
    """A call that follows on ``held`` tokens from slot ``start`` on, with ``asked`` queries to ``new`` keys."""

    layout: Layout
    held: int
    start: int
    new: int
    asked: int
    dtype: torch.dtype = torch.float32
    causal: bool = True
    mask: Tensor | None = None
    queries: int = QUERIES
    score: Score = PLAIN

    def __post_init__(self) -> None:
        dim, shared = self.layout.head_dim, max(1, self.layout.shared_by)
        key = random(HEADS, self.held, dim, self.dtype, 0)
        told = random(HEADS * shared, self.held, dim, self.dtype, 1)
        weights = torch.rand(BATCH, HEADS, self.held, generator=torch.Generator().manual_seed(2))
        self.parts = Packed.empty(key, CAPACITY, self.layout)
        reference.append_(*self.parts, key, 0, self.layout, UNCALIBRATED, weights**6, told)
        self.key = random(HEADS, self.new, dim, self.dtype, 3)
        self.query = random(HEADS * shared, self.asked, dim, self.dtype, 4)
        self.slots = CAPACITY * 32 + 60

    @property
    def end(self) -> int:
        return self.start + self.new

    def expected(self) -> Tensor:
        return importance.recent_importance(
            self.query, self.key, self.parts, self.mask, self.start, self.slots, self.score, self.causal,
            self.queries, self.layout, UNCALIBRATED,
        )  # fmt: skip

    def found(self, by_position: bool = True) -> Tensor:
        query, key = self.query.to(DEVICE), self.key.to(DEVICE)
        codes, params, exact, cursor = (part.to(DEVICE) for part in self.parts)
        mask = None if self.mask is None else self.mask.to(DEVICE)
        position = torch.arange(self.start, self.end, device=DEVICE) if by_position else None
        return backend.importance(
            query, key, Packed(codes, params, exact, cursor), UNCALIBRATED, mask, position,
            None if by_position else self.start, self.slots, self.score, self.causal, self.queries,
            self.layout,
        ).cpu()  # fmt: skip

    def assert_right(self, by_position: bool = True) -> None:
        """Natively, products of 16-bit numbers have errors of their own, which weights have relatively."""
        rtol = 1e-2 if NATIVE else 1e-4
        found, expected = (x[:, :, : self.end] for x in (self.found(by_position), self.expected()))
        assert expected.any()
        torch.testing.assert_close(found, expected, rtol=rtol, atol=1e-6)


@st.composite
def masks(draw: st.DrawFn, call: Call) -> Tensor | None:
    """Draw none, or a causal mask with padding: boolean or additive, for each head or for all, one row or more."""
    kind = draw(st.sampled_from(["none", "boolean", "additive"]))
    if kind == "none":
        return None
    width = draw(st.sampled_from([call.end, call.slots, call.end - 3]))
    heads = draw(st.sampled_from([1, call.query.shape[1]]))
    last = torch.arange(call.end - call.asked, call.end)[:, None]
    mask = (torch.arange(width) <= last).expand(BATCH, heads, -1, -1).clone()
    mask[0, :, :, : draw(st.integers(0, 7))] = False
    mask[:, -1, :, draw(st.integers(0, 30))] = False
    mask = mask[:, :, -1:] if draw(st.booleans()) else mask
    if kind == "boolean":
        return mask
    return torch.zeros(mask.shape, dtype=call.dtype).masked_fill(
        ~mask, draw(st.sampled_from([torch.finfo(call.dtype).min, -float("inf")]))
    )


@EXAMPLES
@given(st.data())
def test_weights_are_those_of_the_specification(data: st.DataObject) -> None:
    layout = data.draw(layouts())
    page = data.draw(st.integers(1, 3)) * 32 + layout.sinks + layout.window  # where one fills
    new = data.draw(st.sampled_from([1, 1, 2, 4, 7, 40]))
    start = page - data.draw(st.integers(1, new))
    held = start + data.draw(st.sampled_from([0, 0, 1, 3, 6]))  # of which the call forgets the last
    if layout.pages_at(held) > layout.pages_at(start):
        held = start
    call = Call(
        layout, held, start, new, data.draw(st.sampled_from([1, new])),
        data.draw(st.sampled_from([torch.float32, torch.float16])), data.draw(st.booleans()),
        queries=data.draw(st.sampled_from([1, 3, QUERIES])), score=data.draw(st.sampled_from(SCORES)),
    )  # fmt: skip
    call.mask = data.draw(masks(call))
    call.assert_right(data.draw(st.booleans()))


@EXAMPLES
@given(st.integers(0, 60), st.integers(0, 40))
def test_a_cache_that_is_rewound_far_is_read_as_attention_reads_it(back: int, more: int) -> None:
    """Pages that the call cuts open are still packed when it is weighed."""
    layout = layout_of()
    held = 3 + 9 + 64 + 20
    start = held - back
    new = 3 + 9 + 96 - start + more
    Call(layout, held, start, new, new).assert_right()


@pytest.mark.parametrize("shares", [1, 3, 200])
def test_the_number_of_shares_does_not_matter(shares: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "PROGRAMS_PER_SM", shares)
    Call(layout_of(), 3 + 9 + 95, 3 + 9 + 95, 1, 1).assert_right()


@pytest.mark.long(but=["32"])
@pytest.mark.parametrize("columns", [32, 64])
def test_queries_taken_in_tiles_weigh_the_same(
    columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The largest weight of a slot may be in any tile: each takes what those before it have left."""
    monkeypatch.setattr(kernels, "MAX_QUERIES", columns)  # a quarter of which fp32 takes
    for shared in (3, 4):
        Call(layout_of(shared), 3 + 9 + 63, 3 + 9 + 63, 1, 1).assert_right()


def test_held_queries_count() -> None:
    """Negative twin: without their rows the weights are others."""
    call = Call(layout_of(), 3 + 9 + 31, 3 + 9 + 31, 1, 1)
    found = call.found()[:, :, : call.end]
    call.parts[2][:, :, call.layout.token_rows :] = 0
    call.assert_right()
    assert (call.found()[:, :, : call.end] - found).abs().max() > 0.05


@pytest.mark.parametrize("by_position", [True, False])
def test_a_call_that_completes_no_page_computes_nothing(
    by_position: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor does one that would leave a gap or does not fit, whose tokens are not written either."""

    def untouched(x: Tensor, *shape: Any, **options: Any) -> Tensor:
        return x.new_full(shape, 7.0, **options)

    monkeypatch.setattr(Tensor, "new_empty", untouched)
    layout, full = layout_of(), 3 + 9 + 32
    assert (Call(layout, full - 9, full - 9, 8, 8).found(by_position) == 7).all()
    assert (Call(layout, full, full, 31, 31).found(by_position) == 7).all()
    assert (Call(layout, full - 9, full - 8, 30, 30).found() == 7).all()
    assert (Call(layout, full, full, 32 * CAPACITY, 9).found() == 7).all()
    assert not (Call(layout, full - 1, full - 1, 1, 1).found(by_position) == 7).all()


def test_tables_are_refused_by_name() -> None:
    tables = random_tables(2, 32, group_size=32, rotary=False, codebook=None, seed=0)
    layout = layout_of(tables=tables.digest)
    x = torch.zeros(1, 2, 1, 32, device=DEVICE)
    parts = Packed.empty(x, 2, layout)
    relative = Calibrated(tables.words.to(DEVICE))
    with pytest.raises(NotImplementedError, match="tables must be None"):
        backend.importance(
            x, x, parts, relative, None, None, 1, 2, Score(1.0), True, QUERIES, layout
        )


@EXAMPLES
@given(st.data())
def test_a_prompt_weighs_its_own_keys_as_the_specification_does(data: st.DataObject) -> None:
    """Nothing lies before it, so no kernel is needed; where it fills no page, nothing is weighed."""
    layout = layout_of(data.draw(st.sampled_from([0, 1, 3])))
    new = data.draw(st.sampled_from([40, 43, 44, 60]))
    call = Call(
        layout, 1, 0, new, data.draw(st.sampled_from([1, 3, new])), causal=data.draw(st.booleans()),
        queries=data.draw(st.sampled_from([1, QUERIES])), score=data.draw(st.sampled_from(SCORES)),
    )  # fmt: skip
    mask = data.draw(masks(call))
    about = call.slots, call.score, call.causal, call.queries, layout
    expected = importance.recent_importance(
        call.query, call.key, None, mask, 0, *about, UNCALIBRATED
    )
    slots, score, *rest = about
    found = backend.importance(
        call.query.to(DEVICE), call.key.to(DEVICE), None, UNCALIBRATED,
        None if mask is None else mask.to(DEVICE), None, 0, slots, score, *rest,
    ).cpu()  # fmt: skip
    assert found.any() == (new >= 44)
    torch.testing.assert_close(found, expected, rtol=1e-5 * NATIVE, atol=1e-7 * NATIVE)


# --- in a captured graph --------------------------------------------------------------------------


@pytest.mark.skipif(not NATIVE, reason="needs a GPU")
def test_a_captured_step_weighs_when_a_page_fills_and_only_then() -> None:
    """A graph of one step, replayed over three pages, leaves the bytes of steps that are launched one by one."""
    adaptive = Adaptive(0.05, 30.0, requantize=True)
    layout = layout_of(adaptive=adaptive)
    steps = 3 + 9 + 100
    x = random(HEADS, steps, 32, torch.float16, 0).to(DEVICE)
    query = random(2 * HEADS, steps, 32, torch.float16, 1).to(DEVICE)
    position = torch.zeros(1, dtype=torch.int64, device=DEVICE)
    now, asked = x[:, :, :1].clone(), query[:, :, :1].clone()

    def step(parts: Any) -> None:
        weights = ops.importance(
            *(asked, now, parts, [], None, position, None, 160),
            *(Score(0.2), False, QUERIES, layout),
        )
        ops.append_(parts, [], now, position, None, layout, weights, asked)

    results = []
    for captured in (False, True):
        parts = Packed.empty(now, CAPACITY, layout)
        graph = torch.cuda.CUDAGraph()
        if captured:
            warm = Packed.empty(now, CAPACITY, layout)
            step(warm)
            torch.cuda.synchronize()
            with torch.cuda.graph(graph):
                step(parts)
        for slot in range(steps):
            position.fill_(slot)
            now.copy_(x[:, :, slot : slot + 1])
            asked.copy_(query[:, :, slot : slot + 1])
            if captured:
                graph.replay()
            else:
                step(parts)
        results.append(parts)
    for eager, replayed in zip(*results, strict=True):
        assert torch.equal(eager, replayed)
    assert results[0][3].tolist() == [steps, 3]
