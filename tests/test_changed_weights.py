"""Models whose weights were quantized by torchao or adapted by peft keep quantized caches as others do."""

from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from kvq_compile import KVQWarning, QuantizedKV, entry
from kvq_compile.history import watching

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    # What these libraries call may be deprecated.
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning:torchao"),
]

OPTIONS = {"method": "int8", "sinks": 1, "window": 256, "page_size": 32, "inner": "eager"}


def make_model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, initializer_range=0.1, bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def generate(model: Any) -> Any:
    ids = torch.randint(1, 64, (2, 11), generator=torch.Generator().manual_seed(0))
    about = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}
    return model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **about)


def adapted() -> Any:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    about = {"target_modules": ["q_proj", "k_proj", "v_proj"], "task_type": "CAUSAL_LM"}
    config = peft.LoraConfig(r=4, init_lora_weights=False, **about)
    model = make_model()
    torch.manual_seed(1)
    return peft.get_peft_model(model, config).eval()


def assert_same_tokens_of_a_quantized_cache(model: Any, compiled: Any) -> None:
    expected = generate(model).sequences
    compiled.compile(backend="kvq", options=OPTIONS)
    with watching() as graphs:
        result = generate(model)
    assert len(graphs) == 2
    assert torch.equal(result.sequences, expected)
    assert all(isinstance(layer.keys, QuantizedKV) for layer in result.past_key_values.layers)


@pytest.mark.parametrize("name", ["Int8WeightOnlyConfig", "Float8WeightOnlyConfig"])
def test_weights_quantized_by_torchao_go_with_a_quantized_cache(name: str) -> None:
    torchao = pytest.importorskip("torchao.quantization", reason="torchao is not installed")
    model = make_model()
    torchao.quantize_(model, getattr(torchao, name)())
    assert_same_tokens_of_a_quantized_cache(model, model)


def test_a_model_adapted_by_peft_keeps_a_quantized_cache() -> None:
    model = adapted()
    assert_same_tokens_of_a_quantized_cache(model, model.get_base_model())


def test_generate_of_a_compiled_model_of_peft_warns_with_the_line_to_write() -> None:
    """It calls the model inside, which is not compiled."""
    model = adapted()
    entry.watch_peft()  # as when the backend is loaded, which other tests did before
    model.compile(backend="kvq", options=OPTIONS)
    with (
        watching() as graphs,
        pytest.warns(KVQWarning, match=r"model\.get_base_model\(\)\.compile"),
    ):
        generate(model)
    assert not graphs
