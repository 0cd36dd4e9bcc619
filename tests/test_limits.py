"""PyTorch's limit of recompilations applies to each layer, where layers compiled one by one share their code."""

import inspect
import warnings

import pytest
import torch
from torch._dynamo import config
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvq_compile import KVQWarning, QuantizedKV, report
from refused_steps import EXACT, join, tokens

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

LIMIT = 3
LAYERS = 5


class Layer(torch.nn.Module):
    """A layer that names no number: it keeps its caches in a list of its caller."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x, caches):
        keys, values = join(*caches[self.number], x, x.cos())
        caches[self.number] = keys, values
        return sdpa(x, keys, values)


class Deep(Layer):
    """The same with a module of its own."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.norm = torch.nn.LayerNorm(16)

    def forward(self, x, caches):
        return super().forward(self.norm(x), caches)


def compiled_layers(kind=Layer, inner="eager", **arguments) -> list[torch.nn.Module]:
    layers = [kind(number) for number in range(LAYERS)]
    for layer in layers:
        layer.compile(backend="kvq", options=EXACT | {"inner": inner}, **arguments)
    return layers


def empty_caches(batch: int = 2) -> list:
    return [(torch.zeros(batch, 2, 0, 16), torch.zeros(batch, 2, 0, 16)) for _ in range(LAYERS)]


def are_quantized(caches) -> list[bool]:
    return [isinstance(keys, QuantizedKV) for keys, _ in caches]


@pytest.fixture
def few_recompiles():
    with torch.no_grad(), config.patch(recompile_limit=LIMIT, accumulated_recompile_limit=LIMIT):
        yield


@pytest.mark.long(but=["Layer-inductor", "Deep-eager"])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("kind", [Layer, Deep])
def test_every_layer_of_a_model_compiled_layer_by_layer_is_quantized(
    few_recompiles, kind, inner
) -> None:
    """Regression: Dynamo's limit, meant for one layer, was spent on the first; others stayed in 16 bit."""
    layers, caches = compiled_layers(kind, inner), empty_caches()
    with warnings.catch_warnings():
        warnings.simplefilter("error", KVQWarning)
        for number in (3, 1):
            for layer in layers:
                layer(tokens(number), caches)
    assert are_quantized(caches) == [True] * LAYERS
    assert {keys.shape[2] for keys, _ in caches} == {4}
    assert config.recompile_limit == LIMIT + 2 * (LAYERS - 1)  # two graphs a layer, of four others


def test_layers_of_a_transformers_model_are_quantized_past_the_limit(few_recompiles) -> None:
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 32, "intermediate_size": 32, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": LAYERS}
    settings = transformers.LlamaConfig(**sizes, **heads, pad_token_id=0, eos_token_id=None)
    model = transformers.LlamaForCausalLM(settings).eval()
    for layer in model.model.layers:
        layer.compile(backend="kvq", options=EXACT | {"strict": True})
    cache = transformers.DynamicCache(config=settings)
    for number in (3, 1):
        model(torch.ones(1, number, dtype=torch.long), past_key_values=cache)
    assert [type(layer.keys) for layer in cache.layers] == [QuantizedKV] * LAYERS


def test_a_layer_recompiled_again_and_again_meets_the_limit_as_the_user_set_it(
    few_recompiles,
) -> None:
    layer, *_ = compiled_layers(dynamic=False)
    for batch in range(1, LIMIT):
        layer(torch.ones(batch, 2, 1, 16), empty_caches(batch))
    caches = empty_caches(LIMIT)
    with pytest.warns(KVQWarning, match="compiled 3 times, which is PyTorch's limit"):
        layer(torch.ones(LIMIT, 2, 1, 16), caches)
    assert are_quantized(caches)[0]
    caches = empty_caches(LIMIT + 1)
    layer(torch.ones(LIMIT + 1, 2, 1, 16), caches)
    assert not any(are_quantized(caches))
    assert config.recompile_limit == config.accumulated_recompile_limit == LIMIT
    assert "in 16 bit: no compiled graph" in " ".join(str(report(list(caches[0]))).split())


def test_a_layer_gains_no_recompilation_by_the_layers_beside_it(few_recompiles) -> None:
    layers = compiled_layers(dynamic=False)
    for batch in range(1, LIMIT + 1):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", KVQWarning)  # told at the first layer's last graph
            for layer in layers[: 1 if batch > 1 else LAYERS]:
                layer(torch.ones(batch, 2, 1, 16), caches := empty_caches(batch))
    assert are_quantized(caches)[0]
    layers[0](torch.ones(LIMIT + 1, 2, 1, 16), caches := empty_caches(LIMIT + 1))
    assert not any(are_quantized(caches))
    assert config.recompile_limit == LIMIT + LAYERS - 1


@pytest.mark.skipif(
    "recompile_limit" not in inspect.signature(torch.compile).parameters, reason="torch.compile's"
)
def test_a_limit_of_one_compile_call_is_left_as_it_is_and_told() -> None:
    layers, caches = compiled_layers(recompile_limit=LIMIT), empty_caches()
    with torch.no_grad(), pytest.warns(KVQWarning, match="compiled 3 times"):
        for layer in layers:
            layer(tokens(1), caches)
    assert are_quantized(caches) == [number < LIMIT for number in range(LAYERS)]


def test_the_limit_is_raised_from_what_the_user_sets_not_from_what_was_raised() -> None:
    for _ in range(2):
        torch._dynamo.reset()
        with torch.no_grad(), config.patch(recompile_limit=LIMIT):
            for layer, caches in zip(compiled_layers(), [empty_caches()] * LAYERS, strict=True):
                layer(tokens(1), caches)
            assert config.recompile_limit == LIMIT + LAYERS - 1
