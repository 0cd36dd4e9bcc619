"""Fused attention is as exact as the same computation in the model's dtype, whatever the cache
looks like.

Kernels run natively where there is a GPU and in Triton's interpreter, in fp32, elsewhere.
"""

import math
from importlib import import_module

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
    random_mask,
    starts,
)
from kvq_compile.kernels import ops
from kvq_compile.kernels.layout import exact_row_index
from kvq_compile.kernels.packed import UNCALIBRATED, Packed
from kvq_compile.kernels.schemes import Mixed, Scheme, Uniform
from kvq_compile.kernels.score import Score
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.kernels.triton import backend
from native import CONVERSIONS, DEVICE, NATIVE, examples

pytestmark = CONVERSIONS
EXAMPLES = examples()


@st.composite
def tensor_specs(draw: st.DrawFn, head_dim: int, page: int) -> Scheme:
    grouping = draw(st.sampled_from(["token", "channel"]))
    divided = head_dim if grouping == "token" else page
    sizes = (8, 16, 20, 24, 32, 48, 64, 128)  # an own choice is any divisor of the head
    size = draw(st.sampled_from([g for g in sizes if divided % g == 0] + [None]))
    transform = draw(st.sampled_from(["none", "none", "hadamard"]))
    bits = draw(st.sampled_from([1, 2, 3, 4, 8]))
    return Uniform(bits, grouping, size, 1.0, transform, draw(st.sampled_from(["fp16", "e5m3"])))


@st.composite
def sites(draw: st.DrawFn) -> Site:
    page = draw(st.sampled_from([32, 64, 128, 256] if NATIVE else [32]))
    dims = (
        draw(st.sampled_from([8, 20, 40, 64, 72, 80, 96, 100, 120, 128, 256])),
        draw(st.sampled_from([8, 24, 40, 64, 80, 88, 96, 104, 128, 320])),
    )
    if draw(st.booleans()):
        dims = dims[0], dims[0]
    specs = draw(tensor_specs(dims[0], page)), draw(tensor_specs(dims[1], page))
    spec = CacheSpec(*specs, draw(st.integers(0, 5)), draw(st.integers(0, 40)), page)
    sides = plain_sides(spec, dims)
    lengths = draw(st.sampled_from(starts(sides[0][0]))), draw(st.sampled_from([1, 1, 2, 5]))
    heads = draw(st.sampled_from([1, 2])), draw(st.sampled_from(SHARED))
    extra = draw(st.sampled_from([0, 0, 1, 30]))
    return Site(sides, heads, (*lengths, extra), draw(st.sampled_from(DTYPES)))


@EXAMPLES
@given(sites(), st.data())
def test_attention_has_the_error_of_the_same_computation_in_low_precision(
    site: Site, data: st.DataObject
) -> None:
    assert_right_under_any_mask(site, data)


def plain_site(**changes: object) -> Site:
    defaults = {"bits": 4, "lengths": (140, 2, 0), "dtype": torch.float16}
    values = defaults | changes
    tensor = Uniform(values["bits"])
    spec = CacheSpec(tensor, tensor, 3, 20, 32)
    return Site(plain_sides(spec, (64, 64)), (2, 4), values["lengths"], values["dtype"])


def test_the_kernel_agrees_with_the_cpu_path() -> None:
    site = plain_site(dtype=torch.float32)
    mask = random_mask(site, "heads", 142)
    expected = ops.attend(
        site.query, *site.new, *map(list, site.parts), [], mask, None, site.start,
        site.score, *(layout for layout, _ in site.sides),
    )  # fmt: skip
    torch.testing.assert_close(site.attend(mask), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["bool", "-inf", "lowest"])
def test_a_row_that_sees_nothing_gives_zeros(kind: str) -> None:
    site = plain_site(dtype=torch.float32)
    seen = torch.ones(2, 1, 2, 142, dtype=torch.bool)
    seen[1, 0, 1] = False
    hidden = -math.inf if kind == "-inf" else torch.finfo(torch.float32).min
    out = site.attend(
        seen if kind == "bool" else torch.zeros(seen.shape).masked_fill(~seen, hidden)
    )
    assert bool((out[1, :, 1] == 0).all())
    assert bool((out[0] != 0).all())
    assert bool((out[1, :, 0] != 0).all())


def test_hidden_tokens_do_not_matter() -> None:
    site = plain_site()
    mask = torch.rand(142, generator=torch.Generator().manual_seed(0)) < 0.5
    mask[-1] = True
    before = site.attend(mask)
    recent = exact_row_index(131, 140, site.sides[0][0], mask.device)
    for parts in site.parts:
        parts[2][:, :, recent[~mask[131:140]]] = 100.0
    assert torch.equal(site.attend(mask), before)


@pytest.mark.parametrize("programs", [1, 8, 1000])
def test_the_number_of_shares_does_not_change_the_output(
    programs: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert_shares_do_not_matter(plain_site(dtype=torch.float32), programs, monkeypatch)


def test_many_queries_are_attended_in_tiles() -> None:
    site = plain_site(lengths=(70, 20, 0), dtype=torch.float32)
    site.assert_low_precision_error(site.attend(causal(site)), causal(site))


@pytest.mark.parametrize("by_position", [True, False])
def test_a_prompt_attends_to_itself(by_position: bool) -> None:
    site = plain_site(lengths=(0, 9, 0))
    mask = torch.arange(12) <= torch.arange(9)[:, None]
    site.assert_low_precision_error(site.attend(mask, by_position), mask)
    site.assert_low_precision_error(site.attend(None, by_position), None)


def test_tokens_that_the_cache_does_not_hold_give_nan() -> None:
    assert bool(plain_site().attend(None, start=141).isnan().all())


def test_large_and_constant_values_survive() -> None:
    """Regression: scales folded into fp16 weights overflow, and a scale of 0 has no logarithm."""
    for fill in (60000.0, 0.0, 1e-6):
        site = plain_site(dtype=torch.float32)
        value = torch.randn(2, 2, 140, 64, generator=torch.Generator().manual_seed(0)).sign() * fill
        value[:, :, :70] = 3.0
        site.parts[1] = Site.fill(value, site.sides[1])
        exact = site.expected(None, torch.float64)
        error = (site.attend(None).double() - exact).abs().max()
        assert error <= 1e-4 * (1 + fill)


@pytest.mark.skipif(not NATIVE, reason="CUDA graphs need a GPU")
def test_a_captured_graph_serves_every_later_length() -> None:
    site = plain_site(lengths=(0, 1, 0), dtype=torch.bfloat16)
    layouts = [layout for layout, _ in site.sides]
    parts = [
        tuple(p.to(DEVICE) for p in Packed.empty(x, 6, layout))
        for x, layout in zip(site.new, layouts, strict=True)
    ]
    tensors = [t.to(DEVICE) for t in (site.query, *site.new)]
    position = torch.zeros(1, dtype=torch.int64, device=DEVICE)

    def step() -> Tensor:
        out = backend.attend(
            *tensors, *parts, UNCALIBRATED, UNCALIBRATED, None, position, None,
            site.score, *layouts,
        )  # fmt: skip
        for x, part, layout in zip(tensors[1:], parts, layouts, strict=True):
            backend.append_(part, UNCALIBRATED, x, position, None, layout)
        return out

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for index in range(120):
        position.fill_(index)
        graph.replay()
        if index % 17 == 0:
            site.start = index
            site.parts = [
                Site.fill(x.expand(-1, -1, index, -1), side)
                for x, side in zip(site.new, site.sides, strict=True)
            ]
            site.assert_low_precision_error(out.cpu(), None)


@pytest.mark.skipif(NATIVE, reason="a GPU is dispatched to; here the interpreter stands in for one")
def test_operators_hand_gpus_what_they_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """What dispatch does for CUDA, done on CPU tensors: written, weighed, read and attended to as on the CPU."""
    monkeypatch.setattr(import_module(ops.BACKENDS["CUDA"]), "is_available", lambda: True)
    spec = CacheSpec(Mixed(2.5, 0, 4), Mixed(2, 0, 4), 1, 4, 32)
    layouts = [spec.layout("key", 64, 2), spec.layout("value", 64)]
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, h, 41, 64, generator=generator) for h in (4, 2, 2))
    caches = {}
    for name in ("CPU", "CUDA"):
        on = ops.Backend(ops.BACKENDS[name])
        weights = ops._importance_on(
            on, query, key, [], [], None, None, 0, 41, Score(0.1), True, 5, layouts[0]
        )
        caches[name] = [
            list(Packed.empty(x, 2, layout))
            for x, layout in zip((key, value), layouts, strict=True)
        ]
        for cache, x, layout in zip(caches[name], (key, value), layouts, strict=True):
            asked = query if layout.queries else None
            ops.append_on(on, cache, [], x, None, 0, layout, weights, asked)
    for one, other in zip(caches["CPU"], caches["CUDA"], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    on = ops.Backend(ops.BACKENDS["CUDA"])
    read = ops._dequantize_on(on, caches["CUDA"][1], [], 41, layouts[1])
    torch.testing.assert_close(
        read, ops.dequantize(caches["CPU"][1], [], 41, layouts[1]), rtol=0, atol=0
    )
    step = [t[:, :, :1] for t in (query, key, value)]
    rest = *caches["CPU"], [], None, None, 41, Score(0.1), *layouts
    torch.testing.assert_close(
        ops._attend_on(on, *step, *rest), ops.attend(*step, *rest), rtol=1e-5, atol=1e-5
    )
