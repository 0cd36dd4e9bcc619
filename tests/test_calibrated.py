"""Calibrated methods end to end: what the compiled model reads is what the cache stands for, whoever made it."""

import functools
import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

import safetensors
from safetensors.torch import save_file

import kvq_compile
from kvq_compile.calibration.artifact import Calibration
from kvq_compile.calibration.choose import Choice, choose
from kvq_compile.errors import KVQError
from kvq_compile.history import watching
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.kernels.tables import INTEGERS, Tables, read_section
from kvq_compile.kernels.tables import section as place_of
from kvq_compile.options import make_spec
from kvq_compile.testing.small_tables import random_tables
from qaq_model import assert_reads_its_cache

METHODS = ("skvq", "cq-4c4b", "tc", "auto")
RUNTIME = {"window": 8, "page_size": 32}
LOOKS_FAR: list[tuple[str, dict[str, Any]]] = [  # what is judged by attention beyond the window
    ("tc", {}), ("auto", {"bits": 3}),
    ("skvq", {"key_clip": "search"}), ("skvq", {"value_clip": "search"}),
]  # fmt: skip


def make_model(seed: int = 0, layers: int = 2) -> Any:
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=64, vocab_size=64,
        num_hidden_layers=layers, intermediate_size=128, initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def ids(count: int, seed: int = 0, batch: int = 1) -> Tensor:
    return torch.randint(0, 64, (batch, count), generator=torch.Generator().manual_seed(seed))


@functools.cache
def calibrated(method: str) -> Calibration:
    options: dict[str, Any] = {"auto": {"bits": 3}, "skvq": {"value_bits": 1.5}}.get(method, {})
    texts = [ids(300, seed) for seed in range(2)]
    return kvq_compile.calibrate(make_model(), texts, method, tokens=256, **options)


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


def test_the_same_seed_gives_the_same_file(tmp_path: Path) -> None:
    texts = [ids(300, seed) for seed in range(2)]
    again = kvq_compile.calibrate(make_model(), texts, "skvq", tokens=256, value_bits=1.5)
    assert again == calibrated("skvq")
    again.save(tmp_path / "a")
    assert Calibration.load(tmp_path / "a") == again


def test_a_run_that_was_cut_short_goes_on(tmp_path: Path) -> None:
    whole, part = calibrated("skvq"), tmp_path / "part"
    Calibration(whole.method, whole.options, whole.layers[:1], whole.weights).save(part)
    seen: list[int] = []
    texts = [ids(300, seed) for seed in range(2)]

    def advance(stage: str, done: int, total: int) -> None:
        if stage.startswith("fitting"):
            seen.append(done)

    resumed = kvq_compile.calibrate(
        make_model(), texts, "skvq", tokens=256, value_bits=1.5, resume=part, advance=advance
    )
    assert resumed == whole
    assert seen == [1, 2]
    with pytest.raises(ValueError, match="resume must name a file of this model"):
        kvq_compile.calibrate(make_model(1), texts, "skvq", tokens=256, resume=part)


def test_little_memory_means_more_passes_and_the_same_tables() -> None:
    texts = [ids(300, seed) for seed in range(2)]
    small = kvq_compile.calibrate(make_model(), texts, "skvq", tokens=256, value_bits=1.5, memory=1)
    assert small == calibrated("skvq")


def test_a_truncated_or_altered_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "c"
    calibrated("skvq").save(path)
    content = path.read_bytes()
    path.write_bytes(content[:-100])
    with pytest.raises(ValueError, match="whole safetensors file"):
        Calibration.load(path)
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="altered"):
        Calibration.load(path)
    path.write_bytes(content.replace(b'\\"value_bits\\": 1.5', b'\\"value_bits\\": 2.5'))
    with pytest.raises(ValueError, match="altered"):
        Calibration.load(path)
    path.write_text(json.dumps({}))
    with pytest.raises(ValueError, match="whole safetensors file"):
        Calibration.load(path)
    with pytest.raises(FileNotFoundError, match="calibration must be a file"):
        Calibration.load(tmp_path / "none")


def put(section: str, value: float) -> Any:
    """Return a function that writes a number into a section of the first layer's keys, whatever it means there."""

    def alter(words: dict[str, Tensor], about: dict[str, Any]) -> None:
        part = words["layers.0.key"]
        first, _ = place_of(section, 64, True)
        number = torch.tensor(value, dtype=torch.float32).view(torch.int32)
        part[0, first] = int(value) if section in INTEGERS else number

    return alter


def drop_a_column(words: dict[str, Tensor], about: dict[str, Any]) -> None:
    words["layers.1.value"] = words["layers.1.value"][:, :-1].contiguous()


def drop_a_head(words: dict[str, Tensor], about: dict[str, Any]) -> None:
    words["layers.1.value"] = words["layers.1.value"][:1].contiguous()


ALTERATIONS: list[tuple[str, Any, str]] = [
    ("skvq", put("order", 63), "order must be a permutation of 64 channels"),
    ("skvq", put("order", -1), "order must be a permutation"),
    ("skvq", put("order", 1 << 20), "order must be a permutation"),
    ("skvq", put("mean", float("nan")), "mean must be finite"),
    ("skvq", put("scale", float("inf")), "scale must be finite"),
    ("skvq", put("scale", 0.0), "scale must be positive"),
    ("skvq", put("scale", -1.0), "scale must be positive"),
    ("skvq", put("inverse", 3.0), "inverse must be 1 / scale"),
    ("skvq", put("margin", 0.5), "margin must be in [0, 0.5)"),
    ("cq-4c4b", put("codebook", float("nan")), "codebook must be finite"),
    ("skvq", drop_a_column, "must have"),
    ("skvq", drop_a_head, "for the same heads"),
    ("skvq", lambda w, a: w.update({"layers.0.key": w["layers.0.key"].float()}), "must be int32"),
    ("skvq", lambda w, a: w.pop("layers.0.key"), "for the same heads"),
    (
        "skvq",
        lambda w, a: w.update({"layers.7.key": w["layers.0.key"].clone()}),
        "belong to a layer",
    ),
    ("skvq", lambda w, a: a["head_dims"].update({"layers.0.key": -64}), "tables must be int32"),
    ("skvq", lambda w, a: a["head_dims"].update({"layers.0.key": "64"}), "head_dim must be an int"),
    ("skvq", lambda w, a: a["head_dims"].clear(), "is missing"),
    ("skvq", lambda w, a: a.pop("options"), "'options' is missing"),
    ("skvq", lambda w, a: a["layers"][0].__setitem__(0, "yes"), "rotary must be a bool"),
    ("skvq", lambda w, a: a["layers"].clear(), "belong to a layer"),
    ("cq-4c4b", lambda w, a: a["options"].update(bits=13), "bits of a codebook must be 1 to 12"),
    ("cq-4c4b", lambda w, a: a["options"].update(bits=5), "must have"),
    ("tc", lambda w, a: a["layers"][0][6].clear(), "must have widths of keys and of values"),
    ("tc", lambda w, a: a["layers"][0][5][0].__setitem__(1, -0.5), "change 0 or more, got"),
    ("tc", lambda w, a: a["layers"][0][5][0].__setitem__(0, 9), "widths must be up to 8 bits"),
    ("tc", lambda w, a: a["layers"][0][5][0].__setitem__(1, "0"), "change must be a number"),
]


@pytest.mark.parametrize(("method", "alter", "message"), ALTERATIONS)
def test_a_file_that_was_altered_with_a_digest_to_match_is_refused(
    method: str, alter: Any, message: str, tmp_path: Path
) -> None:
    """The digest protects from accidents, not from intent: what kernels index with must be in range."""
    path = tmp_path / "c"
    calibrated(method).save(path)
    assert Calibration.load(path) == calibrated(method)
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
        words = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    about = json.loads(metadata["about"])
    alter(words, about)
    metadata["about"] = json.dumps(about, sort_keys=True)
    tables = (
        Tables(words[name], about["head_dims"].get(name, 64))
        for index in range(len(about["layers"]))
        for name in (f"layers.{index}.key", f"layers.{index}.value")
        if name in words
    )
    content = metadata["about"] + "".join(x.digest for x in tables)
    metadata["digest"] = hashlib.sha256(content.encode()).hexdigest()
    save_file(words, path, metadata)
    with pytest.raises(ValueError, match="calibration must be as it was saved") as caught:
        Calibration.load(path)
    assert message in str(caught.value)


def test_a_file_of_another_format_says_what_to_do(tmp_path: Path) -> None:
    save_file(
        {"x": torch.zeros(1)}, tmp_path / "c", {"format": "kvq-compile calibration", "version": "0"}
    )
    with pytest.raises(ValueError, match="version 1, got .* version 0; calibrate the model anew"):
        Calibration.load(tmp_path / "c")


def test_a_file_from_before_an_option_is_read_as_it_was_made(tmp_path: Path) -> None:
    whole = calibrated("skvq")
    options = {name: value for name, value in whole.options.items() if name != "equalize"}
    Calibration(whole.method, options, whole.layers, whole.weights).save(tmp_path / "old")
    assert make_spec(calibration=tmp_path / "old") == make_spec(calibration=whole)
    with pytest.raises(ValueError, match="equalize must be as calibrated, None, got 0.5"):
        make_spec(calibration=tmp_path / "old", equalize=0.5)


def test_clips_that_are_searched_differ_by_group() -> None:
    texts = [ids(300, seed) for seed in range(2)]
    options = {"key_clip": "search", "value_clip": "search", "group_size": 32}
    found = kvq_compile.calibrate(make_model(), texts, "skvq", tokens=256, **options)
    found_margins = set()
    for layer in found.layers:
        for tables in (layer.key, layer.value):
            assert tables is not None
            margin = read_section(tables.words, "margin", 64).unflatten(-1, (2, 32))
            assert torch.equal(margin, margin[..., :1].expand_as(margin))
            found_margins |= set(margin.unique().tolist())
    assert len(found_margins) > 1


def test_skvq_needs_no_gradients() -> None:
    model, seen = make_model(), set()
    model.lm_head.register_forward_pre_hook(lambda *_: seen.add(torch.is_grad_enabled()))
    kvq_compile.calibrate(model, [ids(300)], "skvq", tokens=256)
    assert seen == {False}


@pytest.mark.long(but=["tc-options0"])
@pytest.mark.parametrize(("method", "options"), LOOKS_FAR)
def test_texts_whose_mask_hides_nothing_are_whole_texts(method: str, options: Any) -> None:
    plain = [ids(270, seed) for seed in range(2)]
    masked = [{"input_ids": text, "attention_mask": torch.ones_like(text)} for text in plain]
    made = [
        kvq_compile.calibrate(make_model(), texts, method, tokens=128, **options)
        for texts in (plain, masked)
    ]
    for ours, theirs in zip(made[0].layers, made[1].layers, strict=True):
        changes = [
            torch.tensor(layer.key_changes + layer.value_changes) for layer in (ours, theirs)
        ]
        torch.testing.assert_close(*changes, rtol=1e-2, atol=0)  # a mask is another product
        assert method != "skvq" or ours == theirs


@pytest.mark.long(but=["tc-options0", "skvq-options2"])
@pytest.mark.parametrize(("method", "options"), LOOKS_FAR)
def test_texts_that_no_query_outgrows_are_too_short(method: str, options: Any) -> None:
    most = 133 if method == "skvq" else 260  # by then no page is full
    message = f"sequence without padding of more than {most} tokens for "
    with pytest.raises(ValueError, match=message):
        kvq_compile.calibrate(make_model(), [ids(most)], method, tokens=128, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"key_clip": "serch"},
            "key_clip must be a number in (0, 1], \"search\" or None, got 'serch'",
        ),
        ({"value_clip": 1.5}, "value_clip must be a number in (0, 1]"),
        ({"equalize": -1}, "equalize must be a number from 0, channels as they are, to 1"),
        ({"equalize": "half"}, "got 'half'"),
        ({"reorder": 1}, "reorder must be True or False, got 1"),
        ({"pre_rope": "no"}, "pre_rope must be True or False, got 'no'"),
    ],
)
def test_options_that_cannot_be_fitted_are_named_before_texts_are_read(
    options: Any, message: str
) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared below, brackets and all
        kvq_compile.calibrate(torch.nn.Identity(), [ids(20)], "skvq", **options)
    assert message in str(caught.value)


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


def test_the_choice_is_the_best_within_the_budget() -> None:
    generator = torch.Generator().manual_seed(0)
    tables = random_tables(1, 16, group_size=16, rotary=False, codebook=None, seed=0)
    widths = (1.0, 2.125, 3.5)
    errors = torch.rand(4, 3, generator=generator).tolist()
    tensors = [
        [Choice({}, tables, w, e) for w, e in zip(widths, row, strict=True)] for row in errors
    ]
    for bits in (1.0, 1.7, 2.2, 3.0, 4.0):
        best = min(
            sum(errors[i][j] for i, j in enumerate(pick))
            for pick in torch.cartesian_prod(*[torch.arange(3)] * 4).tolist()
            if sum(widths[j] for j in pick) <= bits * 4
        )
        chosen = choose(tensors, bits)
        assert sum(c.error for c in chosen) == pytest.approx(best)
        assert sum(c.bits for c in chosen) <= bits * 4
    with pytest.raises(ValueError, match="bits must be 1.00 or more"):
        choose(tensors, 0.9)


def test_batches_that_cannot_be_calibrated_on_are_named() -> None:
    with pytest.raises(ValueError, match="batches must hold a sequence"):
        kvq_compile.calibrate(make_model(), [], "skvq")
    with pytest.raises(ValueError, match="must be one that is calibrated"):
        kvq_compile.calibrate(make_model(), [ids(20)], "int4")
    assert issubclass(KVQError, Exception)


@pytest.mark.parametrize(
    ("batches", "got"),
    [
        (ids(20), "got one Tensor; put it into a list"),
        ({"input_ids": ids(20)}, "got one dict; put it into a list"),
        ("text", "got one str"),
        (3, "got one int"),
        ([ids(20)[0]], "got torch.int64 [20] at place 0"),
        ([ids(20), torch.zeros(1, 20)], "got torch.float32 [1, 20] at place 1"),
        (["text"], "got str at place 0"),
    ],
)
def test_what_is_no_list_of_texts_is_named_before_anything_is_read(batches: Any, got: str) -> None:
    with pytest.raises(TypeError) as caught:
        kvq_compile.calibrate(torch.nn.Identity(), batches)
    assert got in str(caught.value)
