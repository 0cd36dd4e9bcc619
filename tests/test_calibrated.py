"""Calibrated methods end to end: what the compiled model reads is what the cache stands for, whoever made it."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

import kvq_compile
from calibrated_llama import calibrated, ids, make_model
from kvq_compile.calibration.artifact import Calibration
from kvq_compile.history import watching
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.options import make_spec
from qaq_model import assert_reads_its_cache

METHODS = ("skvq", "cq-4c4b", "tc", "auto")
RUNTIME = {"window": 8, "page_size": 32}


def compiled(model: Any, calibration: Calibration, **options: Any) -> Any:
    torch._dynamo.reset()  # every test compiles the same function
    options = {"calibration": calibration, "inner": "eager", **RUNTIME, **options}

    def call(tokens: Tensor, cache: Any, **more: Any) -> Tensor:
        return model(tokens, past_key_values=cache, use_cache=True, **more).logits

    return torch.compile(call, backend="kvq", options=options, dynamic=False)


def dense(cache: Any) -> Any:
    """Return an ordinary cache of what a quantized one stands for."""
    copy = transformers.DynamicCache()
    for index, layer in enumerate(cache.layers):
        copy.update(layer.keys.dequantize(), layer.values.dequantize(), index)
    return copy


@pytest.mark.long(but=["cq-4c4b"])
@pytest.mark.parametrize("method", METHODS)
def test_a_compiled_model_reads_what_its_cache_stands_for(method: str) -> None:
    model, text = make_model(), ids(120, 5)
    run, cache = (
        compiled(model, calibrated(method)),
        transformers.DynamicCache(config=make_model().config),
    )
    assert_reads_its_cache(model, run, cache, text, 90, 91, 118, 119)
    for layer in cache.layers:
        assert isinstance(layer.keys, QuantizedKV)
        layout = layer.keys.page_layout
        assert layout.has_tables
        assert layout.rotary == (method not in ("tc", "auto"))  # which code keys after RoPE


@pytest.mark.long(but=["skvq"])
@pytest.mark.parametrize("method", ["skvq", "cq-4c4b"])
def test_keys_are_coded_after_rope_where_the_option_says_so(method: str) -> None:
    model = make_model(layers=1)
    calibration = kvq_compile.calibrate(model, [ids(300)], method, tokens=256, pre_rope=False)
    assert all(
        not layer.rotary and "the option pre_rope" in layer.note for layer in calibration.layers
    )
    cache = transformers.DynamicCache(config=model.config)
    assert_reads_its_cache(model, compiled(model, calibration), cache, ids(120, 5), 90, 91, 119)
    for layer in cache.layers:
        assert layer.keys.page_layout.has_tables and not layer.keys.page_layout.rotary
    with pytest.raises(ValueError, match="pre_rope must be as calibrated, False, got True"):
        make_spec(calibration=calibration, pre_rope=True)


@pytest.mark.long(but=["cq-2c8b-4-options1"])
@pytest.mark.parametrize(
    ("method", "bits", "options"), [("skvq", 3, {"bits": 3}), ("cq-2c8b", 4, {"balance": True})]
)
def test_values_after_hadamard_need_no_tables(
    method: str, bits: int, options: dict[str, Any], tmp_path: Path
) -> None:
    model = make_model(layers=1)
    made = kvq_compile.calibrate(
        model, [ids(300)], method, tokens=256, values="hadamard", **options
    )
    made.save(tmp_path / "made.safetensors")
    loaded = Calibration.load(tmp_path / "made.safetensors")
    assert loaded == made
    assert all(layer.key is not None and layer.value is None for layer in loaded.layers)
    cache = transformers.DynamicCache(config=model.config)
    assert_reads_its_cache(model, compiled(model, loaded), cache, ids(120, 5), 90, 91, 119)
    for layer in cache.layers:
        assert layer.keys.page_layout.has_tables
        found = layer.values.page_layout
        assert not found.has_tables
        assert (found.bits, found.transform, found.params) == (bits, "hadamard", "e5m3")


@pytest.mark.long(but=["skvq"])
@pytest.mark.parametrize("method", ["skvq", "cq-4c4b"])
def test_a_static_cache_is_calibrated_too(method: str) -> None:
    model, text = make_model(), ids(90, 6)
    run = compiled(model, calibrated(method))
    cache = transformers.StaticCache(config=model.config, max_cache_len=128)
    grown = transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        for first, last in ((0, 70), (70, 71), (71, 72)):
            position = torch.arange(first, last)
            logits = run(text[:, first:last], cache, cache_position=position)
            expected = run(text[:, first:last], grown)
            assert (logits - expected).abs().max() < 1e-3 * expected.abs().max()
    assert isinstance(cache.layers[0].keys, QuantizedKV)


def test_left_padding_is_a_shift_of_the_positions() -> None:
    model, text, pad = make_model(), ids(80, 7), 6
    padded = torch.cat([torch.zeros(1, pad, dtype=torch.long), text[:, : 80 - pad]], 1)
    both = torch.cat([padded, text])
    mask = torch.ones_like(both)
    mask[0, :pad] = 0
    position = (mask.cumsum(-1) - 1).clamp_min(0)
    run, cache = compiled(model, calibrated("skvq")), transformers.DynamicCache(config=model.config)
    with torch.no_grad():
        run(both[:, :79], cache, attention_mask=mask[:, :79], position_ids=position[:, :79])
        before = dense(cache)
        more = {"attention_mask": mask, "position_ids": position[:, 79:]}
        logits = run(both[:, 79:], cache, **more)
        expected = model(both[:, 79:], past_key_values=before, use_cache=True, **more).logits
    assert cache.layers[0].keys.shift.tolist() == [-pad, 0]
    assert (logits - expected).abs().max() < 1e-3 * expected.abs().max()


def test_another_model_is_refused() -> None:
    cache = transformers.DynamicCache(config=make_model().config)
    run = compiled(make_model(seed=1), calibrated("skvq"))
    with pytest.raises(Exception, match="calibration must be of this model"), torch.no_grad():
        run(ids(20), cache)


def test_a_graph_with_other_attentions_is_refused() -> None:
    model = make_model()
    model.model.layers = model.model.layers[:1]
    run = compiled(model, calibrated("skvq"))
    with pytest.raises(Exception, match="1 attentions, got one of 2 layers"), torch.no_grad():
        run(ids(20), transformers.DynamicCache())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "skvq"}, "calibration must be given for skvq"),
        (
            {"method": "cq-4c8b", "calibration": "skvq"},
            "must be of method cq-4c8b, got one of skvq",
        ),
        ({"calibration": "skvq", "key_bits": 3}, "key_bits must be as calibrated, None, got 3"),
        ({"calibration": "skvq", "winbow": 3}, "did you mean 'window'"),
        ({"method": "cq"}, "method must be one of"),
        ({"calibration": "skvq", "values": "hadamard"}, "values must be as calibrated, 'groups'"),
        ({"calibration": 3}, "calibration must be a Calibration or a file"),
    ],
)
def test_options_that_do_not_fit_the_calibration_are_named(options: Any, message: str) -> None:
    if options.get("calibration") == "skvq":
        options = options | {"calibration": calibrated("skvq")}
    with pytest.raises((ValueError, TypeError), match=message):
        kvq_compile.compile(lambda x: x, **options)


def test_single_layers_can_be_taken_out() -> None:
    spec = make_spec(calibration=calibrated("skvq"), layers={1: None})
    assert spec.for_layer(1) is None
    assert spec.for_layer(0) is not None


def test_explain_shows_what_a_calibrated_layer_becomes() -> None:
    model = make_model()
    with watching(), torch.no_grad():
        told = str(
            kvq_compile.explain(
                model, input_ids=ids(20), use_cache=True,
                past_key_values=transformers.DynamicCache(config=model.config),
                options={"calibration": calibrated("cq-4c4b")},
            )
        )  # fmt: skip
    assert "4 channels in 4 bits keys" in told


def test_effective_bits_are_the_bytes_held() -> None:
    model, cache = make_model(), transformers.DynamicCache(config=make_model().config)
    with torch.no_grad():
        compiled(model, calibrated("skvq"))(ids(120), cache)
    found = kvq_compile.report(cache)
    storages = {
        part.untyped_storage()._cdata: part.untyped_storage().nbytes()
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
        for part in (*tensor.parts, *tensor.calibrated)
        if part is not None
    }
    assert found.bytes == sum(storages.values())
    assert found.tensors[0].packed_bits == 2 + 16 / 64
