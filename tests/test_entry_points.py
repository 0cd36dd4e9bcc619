"""Every way in which PyTorch and transformers reach a backend compiles, and as often as it should."""

import subprocess
import sys

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import CompileConfig, DynamicCache, StaticCache

import kvq_compile
from kvq_compile import KVQError, KVQWarning, QuantizedKV
from kvq_compile.history import watching

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

OPTIONS = {"method": "int8", "sinks": 1, "window": 256, "page_size": 32, "inner": "eager"}
PROMPT = torch.arange(1, 8)[None]


def make_model() -> torch.nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=128,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config).eval()


def generate(model, prompt: torch.Tensor = PROMPT, **options):
    settings = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True} | options
    return model.generate(prompt, attention_mask=torch.ones_like(prompt), **settings)


def assert_quantized(cache) -> None:
    assert all(
        isinstance(tensor, QuantizedKV)
        for layer in cache.layers
        for tensor in (layer.keys, layer.values)
    )


def test_a_model_compiled_in_place_generates_in_two_graphs() -> None:
    model = make_model()
    expected = generate(make_model()).sequences
    model.compile(backend="kvq", options=OPTIONS)
    with watching() as graphs:
        result = generate(model)
    assert len(graphs) == 2  # the prompt, any token
    assert result.sequences.tolist() == expected.tolist()
    assert_quantized(result.past_key_values)
    with watching() as graphs:
        generate(model, torch.arange(1, 12)[None])
    assert len(graphs) == 1  # prompts of any length
    with watching() as graphs:
        generate(model, torch.arange(1, 20)[None])
    assert len(graphs) == 0


def test_a_compiled_forward_generates() -> None:
    model = make_model()
    expected = generate(make_model()).sequences
    model.forward = torch.compile(model.forward, backend="kvq", options=OPTIONS)
    with watching() as graphs:
        result = generate(model)
    assert len(graphs) == 2
    assert result.sequences.tolist() == expected.tolist()
    assert_quantized(result.past_key_values)


def test_a_static_cache_compiled_from_the_prompt_on_takes_two_graphs() -> None:
    model = make_model()
    expected = generate(make_model()).sequences
    model.compile(backend="kvq", options=OPTIONS)
    with watching() as graphs:
        result = generate(model, past_key_values=StaticCache(config=model.config, max_cache_len=32))
    assert len(graphs) == 2
    assert result.sequences.tolist() == expected.tolist()
    assert_quantized(result.past_key_values)


def test_transformers_own_compilation_quantizes_the_static_cache_it_filled() -> None:
    model = make_model()
    expected = generate(make_model()).sequences
    compile_config = CompileConfig(backend="kvq", mode=None, options=OPTIONS)
    compile_config._compile_all_devices = (
        True  # transformers compiles on a GPU only, unless it is told
    )
    with watching() as graphs:
        result = generate(model, cache_implementation="static", compile_config=compile_config)
    assert len(graphs) == 2  # the call that converts the buffers, and all others
    assert result.sequences.tolist() == expected.tolist()
    assert_quantized(result.past_key_values)


def test_mode_reaches_inductor_and_is_no_error() -> None:
    def step(x):
        return x + 1

    torch.testing.assert_close(
        torch.compile(step, backend="kvq", mode="default")(torch.ones(2)), torch.full((2,), 2.0)
    )


def attend(query, key, value, keys, values):
    keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
    return torch.nn.functional.scaled_dot_product_attention(query, keys, values), keys, values


class Attend(torch.nn.Module):
    def forward(self, *args):
        return attend(*args)


def decorated():
    return kvq_compile.compile(**OPTIONS)(attend)


def module_in_place():
    return kvq_compile.compile(Attend(), **OPTIONS)


def module_class():
    @kvq_compile.compile(**OPTIONS)
    class Decorated(Attend):
        pass

    return Decorated()


def compiled_function():
    return torch.compile(attend, backend="kvq", options=OPTIONS)


@pytest.mark.parametrize("make", [decorated, module_in_place, module_class, compiled_function])
def test_a_function_a_module_and_a_class_are_compiled(make) -> None:
    step, arguments = make(), torch.randn(5, 1, 2, 3, 16)
    with watching() as graphs:
        output, *cache = step(*arguments)
        again, *cache = step(*arguments[:3], *cache)
    assert len(graphs) == 2
    assert all(isinstance(tensor, QuantizedKV) for tensor in cache)
    expected, *plain = attend(*arguments)
    torch.testing.assert_close(output, expected)
    torch.testing.assert_close(again, attend(*arguments[:3], *plain)[0])


def test_what_cannot_be_compiled_is_named() -> None:
    with pytest.raises(
        TypeError, match="target must be a function, a module or a module class, got int"
    ):
        kvq_compile.compile(3)


def test_generate_of_a_wrapped_model_warns_with_the_line_to_write() -> None:
    model = torch.compile(make_model(), backend="kvq", options=OPTIONS)
    with (
        watching() as graphs,
        pytest.warns(KVQWarning, match=r'write model\.compile\(backend="kvq"\)'),
    ):
        generate(model)
    assert not graphs  # which is what the warning is about


def test_generate_of_a_model_wrapped_for_another_backend_is_not_our_business() -> None:
    generate(torch.compile(make_model(), backend="eager"))


class HoldsAFunction(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.step = decorated()

    def forward(self, *args):
        return self.step(*args)


@pytest.mark.parametrize("make", [module_in_place, module_class, HoldsAFunction])
@pytest.mark.parametrize("strict", [False, True])
def test_what_kvq_compiled_is_not_exported(make, strict) -> None:
    """torch.export would trace the original forward, and return a program that keeps 16-bit caches."""
    arguments = tuple(torch.randn(5, 1, 2, 3, 16))
    with pytest.raises(
        KVQError, match=r"must not be compiled by kvq to be exported.* export a copy"
    ):
        torch.export.export(make(), arguments, strict=strict)


@pytest.mark.parametrize("strict", [False, True])
def test_a_quantized_cache_is_not_exported(strict) -> None:
    tensors = torch.randn(5, 1, 2, 3, 16)
    module_in_place()  # whatever loads the backend
    cache = kvq_compile.quantize_cache_([x.clone() for x in tensors[3:]], "int8")
    with pytest.raises(
        KVQError, match=r"must be plain tensors, got a QuantizedKV; pass cache\.dequantize"
    ):
        torch.export.export(Attend(), (*tensors[:3], *cache), strict=strict)


def test_what_another_backend_compiled_is_exported_as_before() -> None:
    module = Attend()
    module.compile(backend="eager")
    arguments = tuple(torch.randn(5, 1, 2, 3, 16))
    exported = torch.export.export(module, arguments, strict=False)
    torch.testing.assert_close(exported.module()(*arguments), attend(*arguments))


def test_explain_lists_every_attention_and_what_it_became() -> None:
    model = make_model()
    with torch.no_grad():
        explanation = kvq_compile.explain(
            model, PROMPT, past_key_values=DynamicCache(config=model.config)
        )
    text = " ".join(str(explanation).split())
    assert (
        "attention 0 rewritten: attends exactly to its own tokens, returns them quantized" in text
    )
    assert "modeling_" in str(
        explanation
    )  # of the model, not of what transformers calls for all models
    explanation = kvq_compile.explain(model, PROMPT, use_cache=False)
    assert "left alone" in str(explanation)


def test_the_backend_is_found_by_name_without_an_import() -> None:
    program = """
import sys, torch
def step(q, k, v):
    k, v = k + 1, v + 1
    return torch.nn.functional.scaled_dot_product_attention(q, k, v), k, v
step = torch.compile(step, backend="kvq", options={"inner": "eager"})
assert "kvq" in torch._dynamo.list_backends()
x = torch.randn(1, 2, 4, 16)
print(type(step(x, x, x)[1]).__name__)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert done.stdout.strip() == "QuantizedKV", done.stderr
