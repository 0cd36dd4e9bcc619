"""QAQ end to end: bits go where attention and range are, within the budget, and nowhere is anything assumed."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kvq_compile
from kvq_compile.calibration.artifact import Calibration
from kvq_compile.kernels import ops, reference
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import UNCALIBRATED
from kvq_compile.kernels.reference import mixed
from kvq_compile.kernels.reference.importance import recent_importance
from kvq_compile.kernels.reference.queries import recall
from kvq_compile.kernels.schemes import Adaptive, Mixed, Uniform
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.options import make_spec
from kvq_compile.testing import changed
from qaq_model import SMALL, assert_reads_its_cache, make_model, run, small_text

transformers = pytest.importorskip("transformers")


def layouts(**options: Any) -> tuple[Layout, Layout]:
    spec = make_spec("qaq", **SMALL, **options)
    return spec.layout("key", 64), spec.layout("value", 64)


def tokens(count: int, seed: int = 0, heads: int = 2) -> Tensor:
    return torch.randn(2, heads, count, 64, generator=torch.Generator().manual_seed(seed))


def test_a_transform_is_that_of_keys_and_values() -> None:
    assert {layout.transform for layout in layouts(transform="hadamard")} == {"hadamard"}
    assert {layout.transform for layout in layouts()} == {"none"}


def test_a_layout_survives_its_text_in_a_graph() -> None:
    targets = {"key_target": 0.1, "value_target": 1 / 3, "query_norm": 123.4567}
    for layout in (*layouts(bits=2.3, outliers=2), *layouts(**targets)):
        text, names = layout.__fx_repr__()
        assert eval(text, dict(names)) == layout


@given(
    st.integers(0, 150), st.integers(1, 60), st.integers(1, 6), st.booleans(), st.integers(0, 99)
)
def test_importance_is_what_attention_over_the_cache_gives(
    start: int, new: int, queries: int, causal: bool, seed: int
) -> None:
    """Against the definition: softmax over every token as it is read, the largest of the last queries."""
    layout = layouts()[0]
    x = tokens(start + new, seed)
    parts = ops.quantize(x[:, :, :start], start, False, layout, [])
    rows = min(new, 7)
    query = tokens(rows, seed + 1, heads=4)
    found = recent_importance(
        query,
        x[:, :, start:],
        parts,
        None,
        start,
        start + new,
        0.125,
        causal,
        queries,
        layout,
        UNCALIBRATED,
    )
    if layout.pages_at(start + new) == layout.pages_at(start):
        assert not found.any()
        return
    seen = torch.cat([reference.read(*parts, start, layout), x[:, :, start:]], 2)
    mask = torch.ones(rows, start + new, dtype=torch.bool)
    mask = mask.tril(start + new - rows) if causal else mask
    count = min(queries, rows)
    expected = mixed.importance(query[:, :, -count:], seen, mask[-count:], 0.125)
    assert (found - expected).abs().max() < 1e-5


def test_what_is_attended_to_gets_more_bits() -> None:
    layout = layouts(bits=2.3)[1]
    x = tokens(39)
    importance = torch.full((2, 2, 39), 1e-4)
    importance[:, :, 10:14] = 0.5
    codes, params, *_ = ops.quantize(x, 39, False, layout, [], importance)
    _, bits = mixed.unpack(codes[:, :, :1], params[:, :, :1], layout)
    first = layout.sinks
    assert (bits[:, :, 0, 10 - first : 14 - first].amin(-1) > bits.float().mean((2, 3))).all()
    plain = ops.quantize(x, 39, False, layout, [])
    _, even = mixed.unpack(plain[0][:, :, :1], plain[1][:, :, :1], layout)
    assert not torch.equal(bits, even)


@pytest.mark.parametrize("options", [{"bits": 2.3}, {"bits": 4}, {"bits": 3, "variant": "paper"}])
def test_a_compiled_model_reads_what_its_cache_stands_for(options: dict[str, Any]) -> None:
    model = make_model(layers=1)
    call, cache = run(model, **options), transformers.DynamicCache(config=model.config)
    assert_reads_its_cache(model, call, cache, small_text(120), 90, 91, 118, 119)
    assert isinstance(cache.layers[0].keys, QuantizedKV)
    assert "bits" in repr(cache.layers[0].keys)


def test_the_compiled_call_weighs_tokens_by_its_own_queries() -> None:
    """Negative twin: without attention the same prompt gives other bits."""
    model = make_model()
    ids = torch.randint(0, 64, (1, 90), generator=torch.Generator().manual_seed(3))
    kept = []
    for _ in range(2):
        cache = transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            run(model)(ids, cache)
        kept.append(cache.layers[1].values)
    layout = kept[0].page_layout
    assert torch.equal(kept[0].paged().codes[:, :, :2], kept[1].paged().codes[:, :, :2])
    even = QuantizedKV.from_dense(kept[0].dequantize(), layout)
    _, with_attention = mixed.unpack(
        kept[0].paged().codes[:, :, :1], kept[0].paged().params[:, :, :1], layout
    )
    _, without = mixed.unpack(even.paged().codes[:, :, :1], even.paged().params[:, :, :1], layout)
    assert not torch.equal(with_attention, without)


@pytest.mark.long(but=["options0"])
@pytest.mark.parametrize("options", [{}, {"requantize": True, "value_target": 0.02, "bits": 4}])
def test_a_static_cache_holds_the_bytes_of_a_grown_one(options: dict[str, Any]) -> None:
    """Its pages are weighed alike, where it is filled in a compiled call; of the first layer, so that no rounding
    of the attention before it matters.
    """
    model = make_model()
    ids = torch.randint(0, 64, (1, 72), generator=torch.Generator().manual_seed(3))
    static = transformers.StaticCache(config=model.config, max_cache_len=128)
    caches = [transformers.DynamicCache(config=model.config), static]
    for cache in caches:
        call = run(model, **options)
        with torch.no_grad():
            for first, last in ((0, 66), *((slot, slot + 1) for slot in range(66, 72))):
                more = {"cache_position": torch.arange(first, last)} if cache is static else {}
                logits = call(ids[:, first:last], cache, **more)
    assert logits.isfinite().all()
    for name in ("keys", "values"):
        grown, fixed = (getattr(cache.layers[0], name) for cache in caches)
        assert isinstance(fixed, QuantizedKV)
        assert torch.equal(grown.cursor, fixed.cursor)
        assert int(fixed.cursor[1]) == 2
        for a, b in zip(grown.paged()[:2], fixed.paged()[:2], strict=True):
            assert torch.equal(a[:, :, :2], b[:, :, :2])
        even = QuantizedKV.from_dense(fixed.dequantize()[:, :, :72], fixed.page_layout)
        bits = bits_held(fixed.parts, fixed.page_layout), bits_held(even.paged(), even.page_layout)
        assert name == "keys" or not torch.equal(*bits)


def test_a_buffer_that_was_filled_in_16_bit_is_quantized_by_range_and_weighed_from_then_on() -> (
    None
):
    model = make_model()
    ids = torch.randint(0, 64, (1, 100), generator=torch.Generator().manual_seed(3))
    cache = transformers.StaticCache(config=model.config, max_cache_len=128)
    with torch.no_grad():
        model(ids[:, :70], past_key_values=cache, use_cache=True)
        dense = cache.layers[0].values.clone()
        call = run(model)
        for slot in range(70, 74):
            call(ids[:, slot : slot + 1], cache, cache_position=torch.tensor([slot]))
    values = cache.layers[0].values
    layout = values.page_layout
    assert int(values.cursor[1]) == 2
    even = QuantizedKV.from_dense(dense[:, :, :70], layout)
    assert torch.equal(even.paged().codes[:, :, 0], values.paged().codes[:, :, 0])
    keys = cache.layers[0].keys
    held, first = recall(keys.exact, 74, 0, 74, keys.page_layout)
    assert first == 69
    assert [bool(held[:, :, i].any()) for i in range(5)] == [False, True, True, True, True]


@pytest.mark.parametrize("bits", [2.3, 3, 4])
def test_bits_asked_for_are_bits_held(bits: float) -> None:
    key, value = (
        make_spec("qaq", bits=bits).layout(role, 128).bits_per_element for role in ("key", "value")
    )
    assert bits - 0.02 < (key + value) / 2 <= bits


# Error targets

TARGETS = {"key_target": 0.05, "value_target": 0.02, "bits": 4}


def bits_held(parts: tuple[Tensor, ...], layout: Layout) -> Tensor:
    """Return the bits of each packed token, ``[B, H, P, N]``."""
    pages = int(parts[3][1])
    return mixed.unpack(parts[0][:, :, :pages], parts[1][:, :, :pages], layout)[1]


@pytest.mark.parametrize("role", [0, 1])
def test_a_target_gives_a_token_the_bits_of_the_formula_and_no_more(role: int) -> None:
    """``ceil(log2(range / (2 sqrt(3) sigma)))`` with the paper's sigma, T the page's end, up to a power of two."""
    layout = layouts(**TARGETS, max_bits=8, min_bits=0)[role]
    layout = changed(layout, bits=8)
    x, importance = tokens(300), torch.rand(2, 2, 300) ** 4
    parts = ops.quantize(x, 300, False, layout, [], importance)
    for page in range(int(parts[3][1])):
        first = layout.sinks + page * 32
        T = 1 << (first + 31).bit_length()
        span = (
            x[:, :, first : first + 32].amax(-1) - x[:, :, first : first + 32].amin(-1)
        ).double()
        if role == 0:
            sigma = math.sqrt(math.log(T**3 / (T - 1) * 0.05**2 + 1) / (300 / 64))
            exponent = (span / (2 * math.sqrt(3) * sigma)).log2()
        else:
            sigma = 0.02 / math.sqrt(T) / importance[:, :, first : first + 32].double()
            exponent = (span / (2 * math.sqrt(3) * sigma)).log2()
        clear = (exponent - exponent.round()).abs() > 1e-4
        expected = exponent.ceil().clamp(0, 8).int()
        assert torch.equal(bits_held(parts, layout)[:, :, page][clear], expected[clear])


@given(st.lists(st.integers(1, 200), max_size=4), st.integers(0, 9))
def test_a_target_is_met_alike_in_whatever_pieces_a_prompt_comes(
    cuts: list[int], seed: int
) -> None:
    for layout in layouts(**TARGETS):
        x = tokens(200, seed)
        whole = ops.quantize(x, 200, False, layout, [])
        parts = ops.quantize(x[:, :, :0], 200, False, layout, [])
        edges = sorted({0, 200, *cuts})
        for first, last in pairwise(edges):
            ops.append_(parts, [], x[:, :, first:last], None, first, layout)
        pages = int(whole[3][1])
        for a, b in zip(whole[:2], parts[:2], strict=True):
            assert torch.equal(a[:, :, :pages], b[:, :, :pages])


def test_the_budget_stays_the_cap() -> None:
    spec = {"key_target": 1e-6, "value_target": 1e-6, "bits": 2.3}
    for layout in layouts(**spec):
        parts = ops.quantize(tokens(200), 200, False, layout, [])
        assert bits_held(parts, layout).sum(-1).max() <= layout.code_rows
        loose = changed(layout, min_bits=0, target=50.0)
        none = ops.quantize(tokens(200), 200, False, loose, [])
        assert bits_held(none, loose).float().mean() < 0.1


def test_a_report_says_how_many_bits_are_read() -> None:
    layout = layouts(**TARGETS | {"value_target": 20.0})[1]
    cache = QuantizedKV.from_dense(tokens(200), layout)
    report = kvq_compile.report([cache, cache])
    assert report.read_bits < report.packed_bits - 0.5
    rows = bits_held(cache.paged(), layout).float().mean()
    assert report.read_bits == pytest.approx(
        layout.bits_per_element - layout.bits + float(rows), abs=1e-4
    )
    assert f"{report.read_bits:.2f} are read" in str(report)
    assert "fewer where they meet target 20" in layout.about


@pytest.mark.parametrize("scale", [64**-0.5, 0.25])
def test_query_norms_are_measured_by_head(scale: float) -> None:
    """Against the definition, on the queries that a hook sees; as of the usual scale, whatever the model's is."""
    model = make_model()
    for layer in model.model.layers:
        layer.self_attn.scaling = scale
    texts = [
        torch.randint(0, 64, (1, 80), generator=torch.Generator().manual_seed(i)) for i in (1, 2)
    ]
    made = kvq_compile.calibrate(model, texts, "qaq", tokens=1000)
    seen: list[Tensor] = []
    hook = model.model.layers[1].self_attn.q_proj.register_forward_hook(
        lambda module, args, output: seen.append(output.unflatten(-1, (4, 64))[0, 5:])
    )
    with torch.no_grad():
        for text in texts:
            model(text)
    hook.remove()
    norms = (torch.cat(seen) * scale * 8).square().sum(-1).sort(0).values  # RoPE keeps them
    found = torch.tensor(made.layers[1].query_norms)
    expected = norms[math.ceil(0.9 * len(norms)) - 1].view(2, 2).amax(-1)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_a_calibration_of_qaq_sets_the_bound_of_each_layer(tmp_path: Any) -> None:
    model = make_model()
    text = torch.randint(0, 64, (1, 90), generator=torch.Generator().manual_seed(1))
    made = kvq_compile.calibrate(model, [text], "qaq", key_target=0.05)
    made.save(tmp_path / "norms")
    assert Calibration.load(tmp_path / "norms") == made
    spec = make_spec(calibration=made, value_target=0.02, **SMALL)
    for index, layer in enumerate(made.layers):
        own = spec.for_layer(index)
        assert own is not None
        assert own.key.adaptive == Adaptive(0.05, max(layer.query_norms))
        assert own.value.adaptive == Adaptive(0.02)
    cache = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        run(model, method=None, calibration=made, value_target=0.02)(text, cache)
    layouts = [layer.keys.page_layout for layer in cache.layers]
    assert layouts[0].adaptive.query_norm != layouts[1].adaptive.query_norm
    with pytest.raises(ValueError, match="query_norm must be left out beside a calibration"):
        make_spec(calibration=made, query_norm=10.0)
    with pytest.raises(ValueError, match="one that is calibrated"):
        kvq_compile.calibrate(model, [text], "int4")


def test_what_calibration_measures_or_does_not_know_is_refused_before_texts_are_read() -> None:
    def never():
        raise AssertionError("a text was read")
        yield

    with pytest.raises(ValueError, match="query_norm must be left out of a calibration"):
        kvq_compile.calibrate(make_model(), never(), method="qaq", query_norm=10.0)
    with pytest.raises(ValueError, match="key_target must be a positive number"):
        kvq_compile.calibrate(make_model(), never(), method="qaq", key_target=-1.0)


@pytest.mark.parametrize("name", ["key_target", "value_target", "query_norm"])
def test_targets_out_of_range_are_named(name: str) -> None:
    for wrong in (0.0, -1.0, math.inf):
        with pytest.raises(ValueError, match=f"{name} must be a positive number"):
            make_spec("qaq", **{name: wrong})


def test_specs_that_make_no_sense_are_named() -> None:
    mixed_spec = Mixed(2.5, 1, 4, params="fp8")
    with pytest.raises(ValueError, match="both be in mixed pages"):
        CacheSpec(mixed_spec, Uniform(4))
    with pytest.raises(ValueError, match="variant must be"):
        make_spec("qaq", variant="code")
