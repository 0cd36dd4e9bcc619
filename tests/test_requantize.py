"""Requantizing as attention moves on: tokens lose what their target needs no more, and nothing else changes."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.utils import ReinplaceCounters

from kvq_compile.kernels import ops, reference
from kvq_compile.kernels.adaptive.requantize import requantize_older_
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.reference import mixed
from kvq_compile.kernels.triton import adaptive
from kvq_compile.options import make_spec
from kvq_compile.testing import changed
from qaq_model import SMALL, assert_reads_its_cache, make_model, run, small_text

transformers = pytest.importorskip("transformers")

pytestmark = [  # of numpy, from Triton's interpreter
    pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning"),
]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TARGETS = {"key_target": 0.05, "value_target": 0.02, "query_norm": 30.0}
Parts = tuple[Tensor, Tensor, Tensor, Tensor]


def layout_of(role: Any, **options: Any) -> Layout:
    options = {"bits": 4, "requantize": True, **SMALL, **TARGETS, **options}
    return make_spec("qaq", **options).layout(role, 64)


@st.composite
def layouts(draw: st.DrawFn, role: str | None = None, **fixed: Any) -> Layout:
    options: dict[str, Any] = {
        "variant": draw(st.sampled_from(["fitted", "paper"])),
        "params": draw(st.sampled_from(["fp8", "fp16"])),
        "bits": draw(st.sampled_from([3, 4])),
        "min_bits": draw(st.integers(0, 1)),
    }
    return layout_of(role or draw(st.sampled_from(["key", "value"])), **options | fixed)


def tokens(count: int, seed: int = 0, heads: int = 2) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, heads, count, 64, generator=generator)
    return x * (0.1 + 3 * torch.rand(2, heads, count, 1, generator=generator) ** 2)


def weights(slots: int, seed: int) -> Tensor:
    return torch.rand(2, 2, slots, generator=torch.Generator().manual_seed(seed)) ** 6


def filled(layout: Layout, pages: int, seed: int) -> tuple[Parts, int]:
    """Return a cache with ``pages`` pages, one token short of another, and its length."""
    count = layout.sinks + layout.window + (pages + 1) * 32 - 1
    importance = weights(count, seed)
    x = tokens(count, seed)
    made = ops.quantize(x, count + 400, False, layout, [], importance)
    return made, count


def bits_of(parts: Parts, pages: slice, layout: Layout) -> Tensor:
    return mixed.held_bits(parts[0][:, :, pages], parts[1][:, :, pages], layout)


def cloned(parts: Parts) -> Parts:
    codes, params, exact, cursor = (part.clone() for part in parts)
    return codes, params, exact, cursor


@given(layouts(), st.integers(1, 4), st.integers(1, 70), st.integers(0, 99))
def test_old_pages_lose_planes_and_nothing_else(
    layout: Layout, pages: int, new: int, seed: int
) -> None:
    """Bits become the least of those held and those that the target needs now; the codes are their upper planes."""
    parts, count = filled(layout, pages, seed)
    before, importance = cloned(parts), weights(count + new, seed + 1)
    x = tokens(new, seed + 1)
    ops.append_(parts, [], x, None, count, layout, importance)
    held, now = bits_of(before, slice(0, pages), layout), bits_of(parts, slice(0, pages), layout)
    assert (now <= held).all()
    weight = importance[:, :, layout.sinks : layout.sinks + pages * 32].unflatten(2, (-1, 32))
    after = layout.sinks + layout.pages_at(count + new) * 32
    span = mixed.stored_span(before[1][:, :, :pages], layout)
    wanted = mixed.needed_bits(
        span, weight if layout.attentive else None, layout, layout.bound_at(after)
    )
    assert torch.equal(now, torch.minimum(held, wanted))
    codes, params = before[0][:, :, :pages].clone(), before[1][:, :, :pages].clone()
    mixed.requantize_down_(codes, params, now, layout)
    assert torch.equal(parts[0][:, :, :pages], codes)
    assert torch.equal(parts[1][:, :, :pages], params)


def test_attention_that_moves_on_frees_bits() -> None:
    """So that the property above speaks of something."""
    for role in ("key", "value"):
        layout = layout_of(role, query_norm=300.0)
        parts, count = filled(layout, 3, 0)
        before = bits_of(parts, slice(0, 3), layout)
        importance = torch.full((2, 2, count + 300), 1e-6)
        x = tokens(300, 1)
        ops.append_(parts, [], x, None, count, layout, importance)
        assert bits_of(parts, slice(0, 3), layout).sum() < before.sum()


@given(layouts(), st.integers(1, 3), st.integers(0, 99))
def test_without_the_option_old_pages_never_change(layout: Layout, pages: int, seed: int) -> None:
    layout = changed(layout, requantize=False)
    parts, count = filled(layout, pages, seed)
    before, importance = cloned(parts), torch.full((2, 2, count + 40), 1e-6)
    x = tokens(40)
    ops.append_(parts, [], x, None, count, layout, importance)
    for a, b in zip(before[:2], parts[:2], strict=True):
        assert torch.equal(a[:, :, :pages], b[:, :, :pages])


@given(layouts("value"), st.integers(0, 99))
def test_nothing_is_taken_without_knowing_the_attention(layout: Layout, seed: int) -> None:
    """Nor in a call that completes no page, whose importance is not computed."""
    parts, count = filled(layout, 2, seed)
    before = cloned(parts)
    ops.append_(parts, [], tokens(40), None, count, layout)
    assert torch.equal(before[0][:, :, :2], parts[0][:, :, :2])
    parts = cloned(before)
    short = count - 20
    nothing = torch.zeros(2, 2, short + 3)
    ops.append_(parts, [], tokens(3), None, short, layout, nothing)
    assert torch.equal(before[0][:, :, :2], parts[0][:, :, :2])


@given(layouts("value", variant="paper", outliers=0, min_bits=0), st.integers(0, 99))
def test_the_error_that_is_left_meets_the_target_of_now(layout: Layout, seed: int) -> None:
    """Of a token that has fewer bits than before: half a segment times its weight is at most half the bound."""
    count = layout.sinks + layout.window + 3 * 32 - 1
    x, importance = tokens(count + 1, seed), weights(count + 1, seed + 1)
    parts = ops.quantize(x[:, :, :count], count + 1, False, layout, [], weights(count, seed))
    before = bits_of(parts, slice(0, 2), layout)
    new = x[:, :, count:]
    ops.append_(parts, [], new, None, count, layout, importance)
    read = reference.read(*parts, count + 1, layout)
    packed = slice(layout.sinks, layout.sinks + 64)
    error = (read - x)[:, :, packed].abs().amax(-1)
    limit = layout.bound_at(layout.sinks + 3 * 32) / importance[:, :, packed] / 2
    fewer = (bits_of(parts, slice(0, 2), layout) < before).flatten(2)
    centre = (
        x[:, :, packed].abs().amax(-1) / 8
    )  # centre and reach rounded to three bits of mantissa
    slack = centre if layout.params == "fp8" else centre / 64
    assert (error <= limit + slack)[fewer].all()


@given(st.data(), st.integers(1, 3), st.integers(1, 40), st.integers(0, 99))
def test_the_kernel_leaves_the_bytes_of_the_reference(
    data: st.DataObject, pages: int, new: int, seed: int
) -> None:
    layout = data.draw(layouts())
    parts, count = filled(layout, pages, seed)
    start = data.draw(st.sampled_from([count, count, count - 9, layout.sinks + 40, 3]))
    importance = weights(start + new, seed + 1)
    scale = data.draw(st.sampled_from([1.0, 1e-3, 0.0]))
    importance *= scale
    if data.draw(st.booleans()):
        importance[0, 0, 3] = float("nan")
    actual = tuple(part.to(DEVICE) for part in cloned(parts))
    codes, params, _, cursor = parts
    requantize_older_(codes, params, cursor, start, new, layout, importance)
    by_position = data.draw(st.booleans())
    position = torch.arange(start, start + new, device=DEVICE) if by_position else None
    adaptive.requantize_older_(
        actual, position, None if by_position else start, new, layout, importance.to(DEVICE)
    )
    for expected, found in zip(parts, actual, strict=True):
        assert torch.equal(expected, found.cpu())


def test_a_long_prompt_is_requantized_once_whatever_the_steps_it_is_appended_in(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from kvq_compile.kernels.cpu import append

    layout = layout_of("value")
    parts, count = filled(layout, 2, 0)
    other, importance, x = cloned(parts), weights(count + 200, 1), tokens(200, 1)
    ops.append_(parts, [], x, None, count, layout, importance)
    monkeypatch.setattr(append, "SCRATCH_ELEMENTS", 1)
    ops.append_(other, [], x, None, count, layout, importance)
    for a, b in zip(parts[:2], other[:2], strict=True):
        assert torch.equal(a, b)


def test_an_older_view_sees_coarser_tokens_and_a_clone_does_not() -> None:
    layout = layout_of("value")
    parts, count = filled(layout, 2, 0)
    view = QuantizedKV(parts, [], layout, "grown", count)
    copy, seen = view.clone(), view.dequantize()
    importance = torch.full((2, 2, count + 1), 1e-6)
    view.claim(1)
    one = tokens(1)
    ops.append_(view.parts, [], one, None, count, layout, importance)
    assert not torch.equal(view.dequantize(), seen)
    assert torch.equal(copy.dequantize(), seen)


def test_requantizing_a_budget_is_refused() -> None:
    with pytest.raises(ValueError, match="requantize must go with error targets, got none"):
        make_spec("qaq", requantize=True)
    with pytest.raises(TypeError, match="requantize must be a bool"):
        make_spec("qaq", requantize="down", key_target=0.1)
    one = make_spec("qaq", requantize=True, value_target=0.1)
    assert (one.key.adaptive, one.value.adaptive.requantize) == (None, True)


# In a model


def test_a_compiled_model_reads_what_its_requantized_cache_stands_for() -> None:
    model = make_model(layers=1)
    cuts, caches = (90, 150, 151, 199), []
    for requantize in (True, False):
        call = run(model, bits=4, **TARGETS, requantize=requantize)
        caches.append(transformers.DynamicCache(config=model.config))
        assert_reads_its_cache(model, call, caches[-1], small_text(200), *cuts)
    held = [
        sum(
            int(bits_of(x.paged(), slice(0, int(x.cursor[1])), x.page_layout).sum())
            for layer in some.layers
            for x in (layer.keys, layer.values)
        )
        for some in caches
    ]
    assert held[0] < held[1]


def test_requantizing_writes_in_place_under_inductor(fresh_dynamo: None) -> None:
    model = make_model(layers=1)
    options = {"method": "qaq", "requantize": True, **SMALL, **TARGETS}
    options["inductor"] = {"fx_graph_cache": False}
    first = torch.compile(model.forward, backend="kvq", options=options | {"inner": "eager"})
    step = torch.compile(model.forward, backend="kvq", options=options)
    cache = transformers.DynamicCache(config=model.config)
    ids = torch.ones(1, 80, dtype=torch.int64)
    with torch.no_grad():
        first(input_ids=ids, past_key_values=cache, use_cache=True)
        torch._dynamo.reset()
        ReinplaceCounters.clear()
        step(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    assert ReinplaceCounters.get_total_missed() == 0
