"""While a call quantizes what it made or was given in 16 bit, it holds one layer twice and not all of them."""

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from transformers import CompileConfig, DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

from kvq_compile.kernels import ops
from kvq_compile.kernels.cache.arranged import ArrangedKV
from kvq_compile.kernels.cache.tensor import QuantizedKV

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
LAYERS, HEADS, TOKENS, CHANNELS = 5, 2, 300, 16
OPTIONS = {"method": "int4", "sinks": 2, "window": 7, "page_size": 32, "inner": "eager"}
LAYER = 3  # keys and values of a layer, and what one of them is a view of or made from


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=2,
        num_key_value_heads=HEADS, head_dim=CHANNELS,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def histories() -> int:
    """Return how many pieces of memory hold a layer's keys or values in 16 bit or more."""
    gc.collect()
    found = set()
    for x in gc.get_objects():
        plain = issubclass(type(x), Tensor) and not isinstance(
            x, (QuantizedKV, ArrangedKV, FakeTensor)
        )
        if plain and x.dim() == 4 and x.is_floating_point():
            memory = x.untyped_storage()
            if memory.nbytes() >= HEADS * TOKENS * CHANNELS * x.element_size():
                found.add(memory.data_ptr())
    return len(found)


@pytest.fixture
def held(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Return a list of how many there are whenever a whole history is quantized."""
    gc.collect()
    gc.freeze()  # what other tests left is not looked through again and again
    found: list[int] = []
    write: Callable[..., Any] = ops.append_

    def watched(cache: Any, calibrated: Any, x: Tensor, *rest: Any) -> Any:
        if x.shape[2] >= TOKENS and not isinstance(x, FakeTensor):
            found.append(histories())
        return write(cache, calibrated, x, *rest)

    monkeypatch.setattr(ops, "append_", watched)
    yield found
    gc.unfreeze()


def prompt() -> Tensor:
    return torch.randint(0, 97, (1, TOKENS), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_a_prompt_is_quantized_layer_by_layer(model: LlamaForCausalLM, held: list[int]) -> None:
    step = torch.compile(model.forward, backend="kvq", options=OPTIONS)
    cache = DynamicCache(config=model.config)
    step(prompt(), past_key_values=cache, use_cache=True)
    assert all(isinstance(layer.keys, QuantizedKV) for layer in cache.layers)
    assert len(held) == 2 * LAYERS
    assert max(held) <= LAYER


@torch.no_grad()
def test_a_call_copies_one_layer_at_a_time_of_a_cache_that_was_filled_uncompiled(
    model: LlamaForCausalLM, held: list[int]
) -> None:
    cache = DynamicCache(config=model.config)
    model(prompt(), past_key_values=cache, use_cache=True)
    step = torch.compile(model.forward, backend="kvq", options=OPTIONS)
    step(prompt()[:, :1], past_key_values=cache, use_cache=True)
    assert all(isinstance(layer.keys, QuantizedKV) for layer in cache.layers)
    assert len(held) == 2 * LAYERS
    assert max(held) <= 2 * LAYERS + LAYER


def test_buffers_are_freed_one_by_one_as_they_are_quantized(
    model: LlamaForCausalLM, held: list[int]
) -> None:
    cache = StaticCache(config=model.config, max_cache_len=TOKENS + 4)
    compile_config = CompileConfig(backend="kvq", mode=None, options=OPTIONS)
    compile_config._compile_all_devices = True
    model.generate(
        prompt(), attention_mask=torch.ones_like(prompt()), past_key_values=cache,
        max_new_tokens=3, min_new_tokens=3, do_sample=False, pad_token_id=0, compile_config=compile_config,
    )  # fmt: skip
    model.__dict__.pop("_compiled_call", None)
    assert all(isinstance(layer.keys, QuantizedKV) for layer in cache.layers)
    assert len(held) == 2 * LAYERS
    left = [2 * LAYERS - number for number in range(2 * LAYERS)]  # not quantized yet
    assert all(count <= more + 1 for count, more in zip(held, left, strict=True))
