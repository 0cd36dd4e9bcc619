"""Attention over a quantized cache is as far from the exact one as was derived, and no further."""

import math
from typing import Any

import pytest
import sympy
import torch
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile import bounds, error_bound, make_spec
from kvq_compile.kernels import ops, reference
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.schemes import Uniform
from kvq_compile.kernels.score import Score
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.kernels.transform import hadamard
from kvq_compile.testing import (
    DTYPES,
    HEAD_DIMS,
    assert_decodes_like,
    assert_matches_dequantized,
    assert_within_bound,
    bound_for,
    changed,
    decoders,
    kv_tensors,
    lengths,
    masks,
    page_layouts,
    specs,
)
from kvq_compile.testing.small_decoder import Decoder

SYMBOLS = (
    bounds.QUERY_NORM,
    bounds.KEY_RANGE,
    bounds.VALUE_RANGE,
    bounds.KEY_MAX,
    bounds.VALUE_MAX,
    bounds.VALUE_SPREAD,
    bounds.SCALE,
)
# An example compiles a model three times.
FEWER = settings(
    max_examples=max(1, settings.default.max_examples // 5),  # type: ignore[union-attr]
    suppress_health_check=list(HealthCheck),
)


def numbers(values: list[float], head_dim: int = 64) -> dict[sympy.Symbol, float]:
    return dict(zip(SYMBOLS, values, strict=True)) | {bounds.HEAD_DIM: head_dim}


def tiny_rows() -> tuple[Tensor, Layout]:
    """Return a page whose range is smaller than the smallest step that fp16 can express."""
    spec = Uniform(8)
    x = torch.zeros(1, 32, 64)
    x[..., 1::2], x[..., 2::4] = 1e-7, 2.9e-8
    return x, CacheSpec(spec, spec, 0, 0, 32).layout("key", 64)


# The pieces of the derivation


@st.composite
def coded_pages(draw: st.DrawFn) -> tuple[Tensor, Layout]:
    layout = draw(page_layouts())
    x = draw(kv_tensors((1, layout.page_size, layout.head_dim)))
    if layout.transform == "hadamard":
        x = (
            x / 16
        )  # a rotated number may be sqrt(head_dim) times as large, and must stay within fp16
    return x, layout


@given(coded_pages())
@example(tiny_rows())
def test_a_stored_element_of_a_range_about_zero_is_off_by_at_most_its_bound(
    case: tuple[Tensor, Layout],
) -> None:
    x, layout = case[0] / 2, changed(case[1], params="e5m3")
    coded = x.double()
    if layout.transform == "hadamard":
        coded = coded @ hadamard(layout.head_dim, x.device).double()
    groups = reference.to_groups(coded, layout)
    codes, params = reference.quantize_pages(x, layout)
    stored = reference.to_groups(reference.coded_values(codes, params, layout).double(), layout)
    spread = float((groups.amax(-1) - groups.amin(-1)).max())
    about = sympy.Float(spread), sympy.Float(float(groups.abs().max()))
    limit = bounds.element_error(layout.scheme, None, *about)
    error = float((stored - groups).abs().max())
    assert error <= float(limit.subs(bounds.HEAD_DIM, layout.head_dim))


@given(coded_pages())
@example(tiny_rows())
def test_a_stored_element_is_off_by_at_most_its_bound(case: tuple[Tensor, Layout]) -> None:
    """Regression: the bound took the step of tiny groups, which is subnormal in fp16, for exact."""
    x, layout = case
    spec = Uniform(
        *(layout.bits, layout.grouping, layout.group_size, layout.clip, layout.transform),
        search=layout.search,
    )
    rotated = x.double()
    if layout.transform == "hadamard":
        rotated = rotated @ hadamard(layout.head_dim, x.device).double()
    groups = reference.to_groups(rotated, layout)
    codes, params = reference.quantize_pages(x, layout)
    scale, zero = params.double().unbind(-1)
    stored = reference.to_groups(codes, layout) * scale[..., None] + zero[..., None]
    spread = float((groups.amax(-1) - groups.amin(-1)).max())
    limit = bounds.element_error(
        spec, None, sympy.Float(spread), sympy.Float(float(groups.abs().max()))
    )
    assert float((stored - groups).abs().max()) <= float(
        limit.subs(bounds.HEAD_DIM, layout.head_dim)
    )


@given(st.integers(0, 2**16), st.integers(2, 9), st.floats(1e-3, 20))
def test_weights_move_by_at_most_the_hyperbolic_tangent(
    seed: int, count: int, shift: float
) -> None:
    """Scores that move by at most ``d`` move the weights by at most ``2 tanh(d / 2)`` in sum."""
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(count, generator=generator, dtype=torch.float64) * 3
    moved = (
        torch.rand(count, generator=generator, dtype=torch.float64)
        .mul(2)
        .sub(1)
        .mul(3)
        .clamp(-1, 1)
    )
    change = ((scores + shift * moved).softmax(0) - scores.softmax(0)).abs().sum()
    assert float(change) <= 2 * math.tanh(shift / 2) + 1e-12


@given(st.floats(1e-3, 20))
def test_weights_can_move_by_the_hyperbolic_tangent(shift: float) -> None:
    share = torch.tensor(
        [1 / (1 + math.exp(shift)), 1 / (1 + math.exp(-shift))], dtype=torch.float64
    )
    moved = (share.log() + torch.tensor([shift, -shift], dtype=torch.float64)).softmax(0)
    assert float((moved - share).abs().sum()) == pytest.approx(2 * math.tanh(shift / 2))


@given(
    st.lists(st.floats(0, 1e4), min_size=7, max_size=7), st.sampled_from(["key", "value", "both"])
)
def test_more_bits_bound_the_error_more_closely(values: list[float], which: str) -> None:
    at = numbers(values)
    found = []
    for bits in (1, 2, 3, 4, 8):
        key, value = (Uniform(bits if which in (role, "both") else 4) for role in ("key", "value"))
        found.append(float(error_bound(CacheSpec(key, value)).evalf(subs=at)))
    assert found == sorted(found, reverse=True)


@given(
    st.lists(st.floats(0, 1e3), min_size=7, max_size=7),
    st.integers(0, 6),
    st.floats(1, 1e3),
    st.data(),
)
@FEWER
def test_the_bound_grows_with_everything_it_depends_on(
    values: list[float], which: int, factor: float, data: st.DataObject
) -> None:
    bound = error_bound(data.draw(specs(64)))
    more = [value * (factor if place == which else 1) for place, value in enumerate(values)]
    less, greater = (float(bound.evalf(subs=numbers(v))) for v in (values, more))
    assert less <= greater * (1 + 1e-12)


@pytest.mark.parametrize("method", ["int8", "int4", "int3", "int2", "kivi"])
def test_the_bound_names_only_symbols_that_are_documented(method: str) -> None:
    assert error_bound(make_spec(method)).free_symbols <= {*SYMBOLS, bounds.HEAD_DIM}
    for symbol in SYMBOLS:
        assert symbol.name in (error_bound.__doc__ or "")


# The bound and the CPU's attention


class Case:
    """One call of an attention: a cache, new tokens, a mask."""

    def __init__(self, data: st.DataObject, dtype: torch.dtype, rewinds: bool = False) -> None:
        draw = data.draw
        D, Dv = draw(st.sampled_from([(d, d) for d in HEAD_DIMS] + [(64, 128), (128, 64)]))
        self.spec = draw(specs(min(D, Dv)))
        layouts = self.spec.layout("key", D), self.spec.layout("value", Dv)
        batch, kv, shared = (
            draw(st.integers(1, 2)),
            draw(st.integers(1, 2)),
            draw(st.sampled_from([1, 3])),
        )
        self.held, new = draw(lengths(layouts[0])), draw(st.sampled_from([1, 1, 2, 5]))
        later = draw(st.integers(0, 70)) if rewinds else 0
        size = 2.0 ** draw(st.sampled_from([-6, -3, 0]))
        limit = 65504 / (
            16 if "hadamard" in (self.spec.key.transform, self.spec.value.transform) else 1
        )
        tokens = self.held + max(new, later)
        strided = draw(st.booleans())  # as a projection leaves its heads

        def drawn(heads: int, count: int, dim: int) -> Tensor:
            x = draw(kv_tensors((batch, heads, count, dim), torch.float32)) * size
            x = x.clamp(-limit, limit).to(dtype)
            return x.transpose(1, 2).contiguous().transpose(1, 2) if strided else x

        self.query = drawn(kv * shared, new, D).clamp(-100, 100)
        key, value = drawn(kv, tokens, D), drawn(kv, tokens, Dv)
        caches = [
            QuantizedKV.from_dense(x[:, :, : self.held + later], layout)
            for x, layout in zip((key, value), layouts, strict=True)
        ]
        self.key, self.value = key[:, :, : self.held + new], value[:, :, : self.held + new]
        self.caches = caches[0][:, :, : self.held], caches[1][:, :, : self.held]
        self.mask = draw(masks(batch, kv * shared, new, self.held + new))
        self.scale = draw(st.sampled_from([D**-0.5, 1.0, 0.01]))
        self.layouts, self.new = (
            layouts,
            (self.key[:, :, self.held :], self.value[:, :, self.held :]),
        )

    def attend(self) -> Tensor:
        return ops.attend(
            *(self.query, *self.new, self.caches[0].parts, self.caches[1].parts, []),
            *(self.mask, None, self.held, Score(self.scale), *self.layouts),
        )


@given(st.data())
def test_attention_is_within_the_bound_of_exact_attention(data: st.DataObject) -> None:
    case = Case(data, torch.float32)
    at = {"held": case.held, "mask": case.mask, "scale": case.scale}
    assert_within_bound(case.attend(), case.query, case.key, case.value, case.spec, **at)


@given(st.data())
def test_fp64_attention_over_the_dequantized_cache_is_within_the_bound(data: st.DataObject) -> None:
    case = Case(data, torch.float32)
    read = [
        torch.cat([cache.dequantize(), new], 2).double()
        for cache, new in zip(case.caches, case.new, strict=True)
    ]
    exact = [x.double() for x in (case.query, case.key, case.value)]
    mask = case.mask if case.mask is None or case.mask.dtype == torch.bool else case.mask.double()
    got, expected = (
        reference.softmax_attention(exact[0], *kv, mask, case.scale) for kv in (read, exact[1:])
    )
    bound = bound_for(case.spec, *exact, scale=case.scale, held=case.held)
    rounding = 1e-12 * float(exact[2].abs().max()) * max(1.0, float(exact[0].norm(dim=-1).max()))
    assert float((got - expected).abs().max()) <= bound * (1 + 1e-9) + rounding


@given(st.data(), st.sampled_from(DTYPES), st.booleans())
def test_attention_is_that_over_the_dequantized_tokens(
    data: st.DataObject, dtype: torch.dtype, rewinds: bool
) -> None:
    """For any mask, grouping of heads, number of new tokens, specs, and a cache with tokens to forget."""
    case = Case(data, dtype, rewinds)
    output = case.attend()
    assert output.dtype == dtype
    assert_matches_dequantized(
        output, case.query, *case.new, case.caches, mask=case.mask, scale=case.scale
    )


def test_attention_does_not_depend_on_strides() -> None:
    """Regression: the CPU kernel read queries whose heads lie side by side as if they were contiguous."""
    spec = CacheSpec(Uniform(4), Uniform(4), 0, 0, 32)
    layouts = spec.layout("key", 64), spec.layout("value", 64)
    x = torch.randn(5, 1, 2, 3, 64, generator=torch.Generator().manual_seed(0))
    caches = [QuantizedKV.from_dense(x[i], layouts[i]).parts for i in range(2)]
    strided = x.transpose(2, 3).contiguous().transpose(2, 3)
    about = None, None, 3, Score(0.125)
    outputs = [ops.attend(*at[2:], *caches, [], *about, *layouts) for at in (x, strided)]
    torch.testing.assert_close(*outputs)


@given(st.data(), st.integers(1, 40))
def test_columns_of_slots_that_hold_no_token_are_not_attended_to(
    data: st.DataObject, more: int
) -> None:
    case = Case(data, torch.float32)
    assume(case.mask is not None)
    expected = case.attend()
    hidden = False if case.mask.dtype == torch.bool else -math.inf
    case.mask = torch.nn.functional.pad(case.mask, (0, more), value=hidden)
    assert torch.equal(case.attend(), expected)


@pytest.mark.parametrize("clip", [1.0, 0.5])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_values_reach_the_bound(bits: int, clip: float) -> None:
    """A query that sees one packed value, half a step off or at the end of a clipped range."""
    spec = CacheSpec(Uniform(8), Uniform(bits, clip=clip), 0, 0, 32)
    levels = 2**bits - 1
    value = torch.zeros(1, 1, 33, 64)
    value[..., 1] = levels
    if clip == 1.0:
        value[..., 2:] = levels // 2 + 0.5
    key = torch.zeros(1, 1, 33, 64)
    caches = [
        QuantizedKV.from_dense(x[:, :, :32], spec.layout(role, 64))
        for x, role in ((key, "key"), (value, "value"))
    ]
    query, mask = torch.zeros(1, 1, 1, 64), torch.arange(33) == 7
    new = key[:, :, 32:], value[:, :, 32:]
    output = ops.attend(
        *(query, *new, caches[0].parts, caches[1].parts, [], mask[None], None, 32, Score(1.0)),
        *(caches[0].page_layout, caches[1].page_layout),
    )
    error = float((output - value[:, :, 7:8]).abs().max())
    bound = bound_for(spec, query, key, value, scale=1.0, held=32)
    assert 0.98 * bound <= error <= bound


@pytest.mark.parametrize("strength", [0.01, 0.3, 3.0])
@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_keys_reach_the_bound(bits: int, strength: float) -> None:
    """Two keys whose every element errs along the query, one up, one down, and values at the two ends."""
    spec = CacheSpec(Uniform(bits), Uniform(8), 0, 0, 32)
    levels = 2**bits - 1
    key, value = torch.zeros(1, 1, 33, 64), torch.zeros(1, 1, 33, 64)
    key[..., 1] = levels
    key[:, :, 0, 2:] = levels // 2 + 0.5  # is rounded up
    key[:, :, 1, 2:] = levels // 2 + 0.499  # down
    value[:, :, 0], value[:, :, 1] = 1.0, -1.0
    caches = [
        QuantizedKV.from_dense(x[:, :, :32], spec.layout(role, 64))
        for x, role in ((key, "key"), (value, "value"))
    ]
    query = torch.full((1, 1, 1, 64), strength)
    shift = strength * 62 * 0.5
    scores = (query @ key.transpose(2, 3))[0, 0, 0]
    mask = torch.full((1, 33), -math.inf)
    mask[0, 0], mask[0, 1] = -float(scores[0]) - shift / 2, -float(scores[1]) + shift / 2
    output = ops.attend(
        *(query, key[:, :, 32:], value[:, :, 32:], caches[0].parts, caches[1].parts),
        *([], mask, None, 32, Score(1.0)),
        *(caches[0].page_layout, caches[1].page_layout),
    )
    exact = reference.softmax_attention(query, key, value, mask, 1.0)
    error = float((output - exact).abs().max())
    bound = bound_for(spec, query, key, value, scale=1.0, held=32)
    assert 0.9 * bound <= error <= bound


# Compiled decoders


def check(decoder: Decoder, **options: Any) -> int:
    torch._dynamo.reset()
    packed = 0
    for call in decoder.run(**options):
        held = call.held if call.caches is not None else 0
        seen = call.query, call.key, call.value
        assert_matches_dequantized(call.output, *seen, call.caches, mask=call.mask)
        assert_within_bound(
            call.output, call.query, *call.history, decoder.spec, held=held, mask=call.mask
        )
        packed += bool(call.caches is not None and int(call.caches[0].cursor[1]))
    return packed


@given(decoders())
@FEWER
def test_a_rewritten_graph_attends_to_the_dequantized_tokens_within_the_bound(
    decoder: Decoder,
) -> None:
    check(decoder, inner="eager")


@pytest.mark.long(but=["static"])
@pytest.mark.parametrize("kind", ["grown", "static"])
def test_so_does_what_inductor_makes_of_it(kind: Any, fresh_dynamo: None) -> None:
    options = {"method": "kivi", "sinks": 2, "window": 7, "page_size": 32, "group_size": 16}
    decoder = Decoder(
        layers=1,
        heads=(4, 2),
        head_dim=80,
        dtype=torch.bfloat16,
        kind=kind,
        chunks=(90, 1, 1, 33),
        padding=(3, 0),
        mask_kind="bool",
        options=options,
        seed=0,
    )
    assert check(decoder) >= 2


def tiny_llama(dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
    )
    return LlamaForCausalLM(config).eval().to(dtype)


@pytest.mark.parametrize(("dtype", "chunk"), [(torch.float32, 1), (torch.bfloat16, 5)])
def test_a_model_decodes_as_on_its_dequantized_cache(
    dtype: torch.dtype, chunk: int, fresh_dynamo: None
) -> None:
    ids = torch.randint(0, 97, (2, 100), generator=torch.Generator().manual_seed(0))
    ids = ids[:, :100] if chunk == 1 else ids
    options = {"inner": "eager", "method": "int2", "sinks": 2, "window": 7, "page_size": 32}
    assert_decodes_like(tiny_llama(dtype), ids, options=options, chunk=chunk)


def test_the_assertions_refuse_an_output_that_is_off() -> None:
    spec = CacheSpec(Uniform(4), Uniform(4), 0, 0, 32)
    key = torch.randn(1, 1, 40, 64, generator=torch.Generator().manual_seed(0))
    layouts = spec.layout("key", 64), spec.layout("value", 64)
    caches = tuple(QuantizedKV.from_dense(key[:, :, :39], layout) for layout in layouts)
    new = key[:, :, 39:]
    output = ops.attend(
        *(new, new, new, caches[0].parts, caches[1].parts, [], None, None, 39, Score(0.125)),
        *layouts,
    )
    bound = bound_for(spec, new, key, key, scale=0.125, held=39)
    assert_matches_dequantized(output, new, new, new, caches)
    assert_within_bound(output, new, key, key, spec, held=39)
    with pytest.raises(AssertionError, match=r"error=.*, but must be at most .* \(rounding\)"):
        assert_matches_dequantized(output + 1e-2, new, new, new, caches)
    with pytest.raises(AssertionError, match=r"error bound .* \+ rounding"):
        assert_within_bound(output + 2 * bound, new, key, key, spec, held=39)
    with pytest.raises(AssertionError, match="shape="):
        assert_matches_dequantized(output[..., :3], new, new, new, caches)


@pytest.mark.parametrize("method", ["int8", "int4", "int2", "kivi", "tc"])
def test_a_bound_is_given_for_a_method_by_name(method: str) -> None:
    assert error_bound(method) == error_bound(make_spec(method))


@pytest.mark.parametrize(
    ("spec", "error", "message"),
    [
        ("int5", ValueError, "got 'int5'"),
        ("skvq", ValueError, "calibration must"),
        (4, TypeError, "got int"),
    ],
)
def test_a_bound_of_nothing_is_refused_by_name(spec: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        error_bound(spec)
