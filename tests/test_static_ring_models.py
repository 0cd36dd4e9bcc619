"""Static caches of transformers models with sliding or chunked windows are kept packed, as those of other layers."""

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import CompileConfig, StaticCache

from kvq_compile import QuantizedKV
from kvq_compile.history import watching
from kvq_compile.kernels.cache.trim import drop_pages_
from test_models import FAR, OPTIONS, SCORED, SHARED, SLIDING, cache_tensors
from thorough import THOROUGH, spread

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

CONFIGS = SLIDING | SCORED
CHUNKS = (60, 9, 1, 1, 30, 1)  # becomes full, is rolled, joined
SHORT = (60, 9, 1)  # becomes full, is rolled
LONG = (100, *(1,) * 72, 70, 1)  # full at once, drops pages, is filled anew
CASES = [(name, "eager", CHUNKS if name in FAR else SHORT) for name in CONFIGS]
CASES += [("Gemma3", "sdpa", LONG), ("Gemma2", "eager", LONG)]
CASES += [("Mistral", "sdpa", LONG)] * THOROUGH
TOLERANCE = 0.01  # as in `test_models`


def make_model(name: str, attention: str = "eager") -> torch.nn.Module:
    torch.manual_seed(0)
    config = CONFIGS[name]()
    config.max_position_embeddings = 512
    config.num_local_experts = 1  # where an expert is chosen, a small difference may choose another
    auto = transformers.AutoModelForCausalLM
    return auto.from_config(config, attn_implementation=attention).eval()


def make_cache(model: torch.nn.Module, slots: int = 300) -> StaticCache:
    return StaticCache(config=model.config, max_cache_len=slots)


def plain_twin(cache: StaticCache) -> StaticCache:
    """Return the same cache with its tokens dequantized."""
    twin = copy.deepcopy(cache)
    for layer in twin.layers:
        for name in ("keys", "values"):
            held = getattr(layer, name)
            if isinstance(held, QuantizedKV):
                setattr(layer, name, held.dequantize().clone())
    return twin


def ids_of(tokens: int) -> torch.Tensor:
    return torch.randint(1, 64, (2, tokens), generator=torch.Generator().manual_seed(1))


def outcomes(graphs) -> set[str]:
    return {site.outcome for graph in graphs for site in graph.sites}


def assert_near(logits: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((logits - expected).abs().max() / expected.abs().max()) <= TOLERANCE


@pytest.mark.long(but=["GptOss-eager-chunks10", "Gemma3-sdpa-chunks11", "Starcoder2-eager-chunks5"])
@pytest.mark.parametrize(("name", "attention", "chunks"), CASES)
def test_a_model_attends_to_its_own_static_rings(name, attention, chunks) -> None:
    """Each call says what the plain model says on the dequantized cache, and nearly what that says on its own."""
    model = make_model(name, attention)
    cache, exact = make_cache(model), make_cache(model)
    forward = torch.compile(model.forward, backend="kvq", options=OPTIONS)
    given, expected = [], []
    with torch.no_grad(), watching() as graphs:
        for part in ids_of(sum(chunks)).split(chunks, 1):
            twin = plain_twin(cache)
            logits = forward(part, past_key_values=cache).logits
            again = model(part, past_key_values=twin).logits
            torch.testing.assert_close(logits, again, rtol=1e-4, atol=1e-4)
            given.append(logits)
            expected.append(model(part, past_key_values=exact).logits)
    assert_near(torch.cat(given, 1), torch.cat(expected, 1))
    assert all(isinstance(tensor, QuantizedKV) for tensor in cache_tensors(cache))
    assert outcomes(graphs) == {"rewritten"}
    assert cache.layers[0].keys.kind == "ring"
    assert cache.layers[0].keys.shape[2] == 64


@pytest.mark.long(but=["100-45"])
@pytest.mark.parametrize(("prompt", "steps"), [(20, 100), (100, 45)])
def test_rotated_keys_of_a_ring_are_coded_without_their_mean(prompt, steps) -> None:
    """Where pages are dropped the mean is turned, and the codes of the others stand for the same keys."""
    model = make_model("Mistral")
    cache = make_cache(model)
    forward = torch.compile(model.forward, backend="kvq", options=OPTIONS | {"method": "tc"})
    chunks = (prompt, *(1,) * steps)
    with torch.no_grad(), watching() as graphs:
        for part in ids_of(sum(chunks)).split(chunks, 1):
            twin = plain_twin(cache)
            logits = forward(part, past_key_values=cache).logits
            again = model(part, past_key_values=twin).logits
            torch.testing.assert_close(logits, again, rtol=1e-4, atol=1e-4)
    assert outcomes(graphs) == {"rewritten"}
    keys = cache.layers[0].keys
    held, count = keys.dequantize(), int(keys.cursor[0])
    assert keys.page_layout.takes_mean
    drop_pages_(keys.parts, keys.calibrated, 1, keys.page_layout)
    assert int(keys.cursor[0]) == count - 32
    torch.testing.assert_close(keys.dequantize(), held, rtol=1e-5, atol=1e-5)


def compile_with(options=OPTIONS) -> CompileConfig:
    config = CompileConfig(backend="kvq", mode=None, fullgraph=False, options=options)
    config._compile_all_devices = True
    return config


def generate(model, ids, cache=None, **more):
    """Return what a model generates, and the scores of each token."""
    kept = {"cache_implementation": "static"} if cache is None else {"past_key_values": cache}
    output = model.generate(
        ids,
        **kept,
        **{"max_new_tokens": 90, "min_new_tokens": 90, "do_sample": False, "pad_token_id": 0},
        **{"return_dict_in_generate": True, "output_logits": True},
        **more,
    )
    return output, torch.stack(output.logits, 1)


def logits_of(model, sequences: torch.Tensor, prompt: int) -> torch.Tensor:
    """Return the scores that the plain model gives each generated token in one call."""
    with torch.no_grad():
        whole = model(sequences[:, :-1]).logits
    return whole[:, prompt - 1 :]


@pytest.mark.long(but=["Mistral-20", "Gemma3-100"])
@pytest.mark.parametrize(
    ("name", "prompt"), spread(["Mistral", "Gemma2", "Gemma3", "Cohere2"], [20, 64, 100], 2)
)
def test_generate_with_a_static_cache_keeps_rings_packed(name, prompt) -> None:
    """The prompt fills a ring in 16 bit, eagerly; the first compiled call packs it."""
    model, ids = make_model(name), ids_of(prompt)
    with watching() as graphs:
        output, logits = generate(model, ids, compile_config=compile_with())
    assert outcomes(graphs) == {"rewritten"}
    assert all(isinstance(x, QuantizedKV) for x in cache_tensors(output.past_key_values))
    assert output.past_key_values.layers[0].keys.kind == "ring"
    assert_near(logits, logits_of(model, output.sequences, prompt))


def test_generate_hides_left_padding_in_rings() -> None:
    model, ids = make_model("Gemma3"), ids_of(30)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    output, logits = generate(model, ids, attention_mask=mask, compile_config=compile_with())
    assert output.past_key_values.layers[0].keys.kind == "ring"
    alone = logits_of(model, output.sequences[:1, 11:], 19)
    assert_near(logits[:1], alone)
    assert_near(logits[1:], logits_of(model, output.sequences[1:], 30))


def test_a_cache_that_was_reset_serves_a_second_generation() -> None:
    model, cache = make_model("Mistral"), None
    cache = make_cache(model)
    config = compile_with()
    for prompt in (100, 30, 80):
        ids = ids_of(prompt)
        output, logits = generate(model, ids, cache, compile_config=config)
        assert all(isinstance(x, QuantizedKV) for x in cache_tensors(cache))
        assert_near(logits, logits_of(model, output.sequences, prompt))
        cache.reset()


def test_a_conversation_goes_on_in_its_rings() -> None:
    """The second prompt is fed eagerly to a ring that is packed already."""
    model = make_model("Mistral")
    cache = make_cache(model, 400)
    first, _ = generate(model, ids_of(40), cache, compile_config=compile_with())
    longer = torch.cat([first.sequences, ids_of(25)], 1)
    output, logits = generate(model, longer, cache, compile_config=compile_with())
    assert cache.layers[0].keys.kind == "ring"
    assert_near(logits, logits_of(model, output.sequences, longer.shape[1]))


def test_the_bytes_of_a_ring_are_those_of_its_window() -> None:
    model = make_model("Mistral")
    cache = make_cache(model)
    forward = torch.compile(model.forward, backend="kvq", options=OPTIONS)
    sizes = set()
    with torch.no_grad():
        for part in ids_of(200).split((70, *(1,) * 130), 1):
            forward(part, past_key_values=cache)
            sizes.add(sum(tensor.nbytes for tensor in cache_tensors(cache)))
    assert len(sizes) == 1


def test_a_window_no_longer_than_the_exact_region_stays_as_it_is() -> None:
    torch.manual_seed(0)
    config = transformers.MistralConfig(**SHARED, num_hidden_layers=1, sliding_window=16)
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    cache, exact = make_cache(model), make_cache(model)
    forward = torch.compile(model.forward, backend="kvq", options=OPTIONS)
    with torch.no_grad(), watching() as graphs:
        for part in ids_of(32).split((30, 1, 1), 1):
            logits = forward(part, past_key_values=cache).logits
            torch.testing.assert_close(logits, model(part, past_key_values=exact).logits)
    assert outcomes(graphs) == {"left alone"}
    assert all(site.expected for graph in graphs for site in graph.sites)
