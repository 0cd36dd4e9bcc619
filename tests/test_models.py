"""Every attention of every supported model is rewritten, and the model still says what it said."""

import importlib.util
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import DynamicCache, StaticCache

from kvq_compile import QuantizedKV
from kvq_compile.history import watching
from small_llama import positions_for
from thorough import THOROUGH, spread

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

# Small enough that a page is packed within the first call, so that later calls read packed tokens.
OPTIONS = {"method": "int8", "sinks": 1, "window": 4, "page_size": 32, "inner": "eager"}
CHUNKS = (40, 1, 6)
# One step of an 8-bit code is 1/255 of a group's range; two layers of a random model keep logits within this
# fraction of their largest. A wrong mask, slot or head changes them by about their own size.
TOLERANCE = 0.01
EXAMPLES = Path(__file__).resolve().parent.parent / "examples"

SHARED = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
}
CONFIGS = {
    "Llama": lambda **more: transformers.LlamaConfig(**SHARED | more),
    "Qwen2": lambda **more: transformers.Qwen2Config(**SHARED | more),
    "Qwen3": lambda **more: transformers.Qwen3Config(**SHARED | more),
    "Mistral": lambda **more: transformers.MistralConfig(
        **SHARED | {"sliding_window": None} | more
    ),
    "GPT2": lambda num_hidden_layers=1: transformers.GPT2Config(
        vocab_size=64,
        n_embd=64,
        n_layer=num_hidden_layers,
        n_head=4,
        n_positions=128,
        bos_token_id=None,
        eos_token_id=None,
    ),
}


def make_model(
    name: str, attention: str = "sdpa", num_hidden_layers: int = 1, **more
) -> torch.nn.Module:
    torch.manual_seed(0)
    config = CONFIGS[name](num_hidden_layers=num_hidden_layers, **more)
    return transformers.AutoModelForCausalLM.from_config(
        config, attn_implementation=attention
    ).eval()


def make_cache(kind: str, model: torch.nn.Module):
    if kind == "dynamic":
        return DynamicCache(config=model.config)
    return StaticCache(config=model.config, max_cache_len=64)


@torch.no_grad()
def feed(forward, cache, chunks=CHUNKS, batch: int = 2) -> torch.Tensor:
    """Return the logits of a text fed in chunks."""
    ids = torch.randint(0, 64, (batch, sum(chunks)), generator=torch.Generator().manual_seed(1))
    logits, first = [], 0
    for part in ids.split(chunks, 1):
        about = positions_for(forward, first, part.shape[1])
        logits.append(forward(part, past_key_values=cache, **about).logits)
        first += part.shape[1]
    return torch.cat(logits, 1)


def cache_tensors(cache) -> list[torch.Tensor]:
    return [tensor for layer in cache.layers for tensor in (layer.keys, layer.values)]


def assert_close_to(logits: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((logits - expected).abs().max() / expected.abs().max()) <= TOLERANCE


def assert_all_rewritten(graphs, layers: int) -> None:
    assert graphs
    for graph in graphs:
        assert [site.outcome for site in graph.sites] == ["rewritten"] * layers, graph.sites


WAYS = [("sdpa", "dynamic"), ("sdpa", "static"), ("eager", "static"), ("eager", "dynamic")]


@pytest.mark.long(but=["Qwen2-way2", "Mistral-way6", "GPT2-way9", "Qwen3-way5"])
@pytest.mark.parametrize(("name", "way"), spread(CONFIGS, WAYS, 2))
def test_every_attention_of_a_transformers_model_is_rewritten(name, way) -> None:
    """Of each with both attentions and both caches."""
    attention, kind = way
    layers = 2 if (name, attention) == ("Llama", "sdpa") else 1
    model = make_model(name, attention, layers)
    expected = feed(model, make_cache(kind, model))
    cache = make_cache(kind, model)
    with watching() as graphs:
        logits = feed(torch.compile(model.forward, backend="kvq", options=OPTIONS), cache)
    assert_all_rewritten(graphs, layers)
    assert_close_to(logits, expected)
    assert all(isinstance(tensor, QuantizedKV) for tensor in cache_tensors(cache))
    assert all(int(tensor.cursor[1]) == 1 for tensor in cache_tensors(cache))  # one page is packed


@pytest.mark.long(but=["sdpa"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_models_of_one_class_may_scale_their_scores_differently(attention) -> None:
    """From the second on Dynamo keeps the scale symbolic; another one than was compiled for compiles anew."""
    model = make_model("Llama", attention)
    outputs, chunks = [], (40, 5)
    for scale in (0.25, 3.0, 0.05):
        model.model.layers[0].self_attn.scaling = scale
        expected = feed(model, make_cache("dynamic", model), chunks)
        cache = make_cache("dynamic", model)
        forward = torch.compile(model.forward, backend="kvq", options=OPTIONS)
        with watching() as graphs:
            logits = feed(forward, cache, chunks)
        assert all(site.outcome == "rewritten" for graph in graphs for site in graph.sites)
        assert all(isinstance(tensor, QuantizedKV) for tensor in cache_tensors(cache))
        assert_close_to(logits, expected)
        outputs.append(expected)
    assert float((outputs[1] - outputs[2]).abs().max() / outputs[1].abs().max()) > 5 * TOLERANCE


MIXED = {"num_hidden_layers": 2, "layer_types": ["sliding_attention", "full_attention"]}
# Two layers of which one slides, or one that does; the window is longer than the exact region of `OPTIONS`.
SLIDING = {
    "Mistral": lambda: transformers.MistralConfig(**SHARED, num_hidden_layers=1, sliding_window=64),
    "Qwen2": lambda: transformers.Qwen2Config(
        **SHARED | MIXED, use_sliding_window=True, sliding_window=64
    ),
    "Gemma3": lambda: transformers.Gemma3TextConfig(
        **SHARED | MIXED | {"num_key_value_heads": 1, "head_dim": 256}, sliding_window=64
    ),
    "Phi3": lambda: transformers.Phi3Config(
        **SHARED, num_hidden_layers=1, sliding_window=64, pad_token_id=0
    ),
    "Cohere2": lambda: transformers.Cohere2Config(**SHARED | MIXED, sliding_window=64),
    "Starcoder2": lambda: transformers.Starcoder2Config(
        **SHARED, num_hidden_layers=1, sliding_window=64
    ),
    "Olmo3": lambda: transformers.Olmo3Config(**SHARED | MIXED, sliding_window=64),
    "Exaone4": lambda: transformers.Exaone4Config(
        **SHARED | MIXED, sliding_window=64, pad_token_id=0
    ),
    "Llama4": lambda: transformers.Llama4TextConfig(
        **SHARED | MIXED | {"layer_types": ["chunked_attention", "full_attention"]},
        **{"attention_chunk_size": 64, "no_rope_layers": [1, 0], "attn_temperature_tuning": False},
        **{"num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 64},
    ),
}


# Models whose masks or scores differ from those of the others, which the quick suite does not follow as far.
FAR = {"Mistral", "Gemma3", "Llama4", "GptOss"} | (set(SLIDING) | {"Gemma2"} if THOROUGH else set())


@pytest.mark.long(but=["Llama4", "Starcoder2", "Phi3"])
@pytest.mark.parametrize("name", SLIDING)
def test_layers_with_sliding_and_chunked_windows_are_served(name) -> None:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(SLIDING[name]()).eval()
    chunks = (70, 1, 30, 1, 6) if name in FAR else (70, 1, 1)
    expected = feed(model, make_cache("dynamic", model), chunks)
    cache = make_cache("dynamic", model)
    with watching() as graphs:
        logits = feed(torch.compile(model.forward, backend="kvq", options=OPTIONS), cache, chunks)
    assert_all_rewritten(graphs, model.config.num_hidden_layers)
    assert_close_to(logits, expected)
    assert all(isinstance(tensor, QuantizedKV) for tensor in cache_tensors(cache))
    assert [tensor.shape[2] for tensor in cache_tensors(cache)[:2]] == [63, 63]


SCORED = {  # a soft cap; logits of sinks
    "Gemma2": lambda: transformers.Gemma2Config(
        **SHARED | MIXED, sliding_window=64, attn_logit_softcapping=0.5
    ),
    "GptOss": lambda: transformers.GptOssConfig(
        **SHARED | MIXED, sliding_window=64, num_local_experts=2, num_experts_per_tok=1,
        experts_implementation="batched_mm",  # torch 2.11 traces grouped products in 16 bit alone
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    ),
}  # fmt: skip


def make_scored(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(SCORED[name]()).eval()
    for module in model.modules():
        if hasattr(module, "scaling"):
            module.scaling = 3.0  # or a cap would do nothing to scores this small
        if hasattr(module, "sinks"):
            torch.nn.init.normal_(module.sinks, 2.0)
    return model


@pytest.mark.long(but=["GptOss"])
@pytest.mark.parametrize("name", SCORED)
def test_scores_that_are_capped_or_share_weight_with_sinks_are_read_packed(name) -> None:
    model = make_scored(name)
    expected = feed(model, make_cache("dynamic", model), (70, 1, 30, 6))
    cache = make_cache("dynamic", model)
    with watching() as graphs:
        forward = torch.compile(model.forward, backend="kvq", options=OPTIONS)
        logits = feed(forward, cache, (70, 1, 30, 6))
    assert_all_rewritten(graphs, model.config.num_hidden_layers)
    assert_close_to(logits, expected)
    assert all(isinstance(tensor, QuantizedKV) for tensor in cache_tensors(cache))


@pytest.mark.long
@pytest.mark.parametrize("name", SCORED)
def test_a_static_layer_without_a_window_is_capped_and_has_sinks(name) -> None:
    """Its prompt is attended to through the empty cache: torch's attention knows neither."""
    model = make_scored(name)
    chunks = (40, 20, 6, 1, 1, 7)
    expected = feed(model, make_static(model), chunks)
    cache = make_static(model)
    with watching() as graphs:
        forward = torch.compile(model.forward, backend="kvq", options=OPTIONS)
        logits = feed(forward, cache, chunks)
    assert_all_rewritten(graphs, model.config.num_hidden_layers)
    assert_close_to(logits, expected)
    assert all(isinstance(tensor, QuantizedKV) for tensor in cache_tensors(cache))


def make_static(model: torch.nn.Module) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=100)


def test_a_cache_that_the_model_makes_itself_comes_back_quantized() -> None:
    model = make_model("Llama")
    ids = torch.randint(0, 64, (2, 40))
    with watching() as graphs, torch.no_grad():
        forward = torch.compile(model.forward, backend="kvq", options=OPTIONS)
        first = forward(ids, use_cache=True)
        second = forward(ids[:, :3], past_key_values=first.past_key_values)
        expected = model(torch.cat([ids, ids[:, :3]], 1)).logits
    assert_all_rewritten(graphs, 1)
    assert all(isinstance(tensor, QuantizedKV) for tensor in cache_tensors(second.past_key_values))
    assert_close_to(torch.cat([first.logits, second.logits], 1), expected)


@pytest.mark.long
def test_half_precision_and_inductor_change_nothing() -> None:
    model = make_model("Llama").to(torch.bfloat16)
    expected = feed(model, make_cache("dynamic", model), (40, 1))
    cache = make_cache("dynamic", model)
    options = {name: value for name, value in OPTIONS.items() if name != "inner"}
    with watching() as graphs:
        logits = feed(torch.compile(model.forward, backend="kvq", options=options), cache, (40, 1))
    assert_all_rewritten(graphs, 1)
    # Eight bits of mantissa at each of a dozen roundings outweigh the 8-bit codes.
    assert float((logits - expected).abs().max() / expected.abs().max()) <= 12 * 2**-8


# Models that are not transformers' -------------------------------------------------------------------------------


def load_example(name: str):
    """Import an example by its path: examples are scripts, not a package."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiled_twin(module: torch.nn.Module) -> torch.nn.Module:
    module.compile(backend="kvq", options=OPTIONS)
    return module


@torch.no_grad()
def test_buffers_of_the_module_written_by_index_become_quantized() -> None:
    example = load_example("gpt_fast_style")
    plain, compiled = example.make_model(), compiled_twin(example.make_model())
    ids = torch.randint(0, 64, (1, sum(CHUNKS)))
    with watching() as graphs:
        first = 0
        for part in ids.split(CHUNKS, 1):
            position = torch.arange(first, first + part.shape[1])
            assert_close_to(compiled(part, position), plain(part, position))
            first += part.shape[1]
    assert_all_rewritten(graphs, len(compiled.layers))
    for layer in compiled.layers:
        assert isinstance(layer.attention.k_cache, QuantizedKV)
        assert isinstance(layer.attention.v_cache, QuantizedKV)


@pytest.mark.parametrize("flash", [True, False])
@torch.no_grad()
def test_tuples_grown_by_cat_become_quantized(flash) -> None:
    example = load_example("nanogpt_style")
    plain, compiled = (
        example.make_model(flash=flash),
        compiled_twin(example.make_model(flash=flash)),
    )
    ids = torch.randint(0, 64, (2, sum(CHUNKS)))
    mine = theirs = None
    with watching() as graphs:
        for part in ids.split(CHUNKS, 1):
            logits, mine = compiled(part, mine)
            expected, theirs = plain(part, theirs)
            assert_close_to(logits, expected)
    assert_all_rewritten(graphs, len(compiled.blocks))
    assert all(isinstance(tensor, QuantizedKV) for pair in mine for tensor in pair)


@torch.no_grad()
def test_a_decorated_function_keeps_its_cache_quantized() -> None:
    example = load_example("decorated_function")
    mine = theirs = (torch.empty(0), torch.empty(0))
    with watching() as graphs:
        for number, new in enumerate(CHUNKS):
            query, key, value = torch.randn(
                3, 2, 4, new, 16, generator=torch.Generator().manual_seed(number)
            )
            output, *mine = example.attend(query, key, value, *mine)
            expected, *theirs = example.attend.__wrapped__(query, key, value, *theirs)
            assert_close_to(output, expected)
    assert_all_rewritten(graphs, 1)
    assert all(isinstance(tensor, QuantizedKV) for tensor in mine)
