"""A model under Inductor, as users compile it, says what it says without."""

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::kvq_compile.errors.KVQWarning"),
    pytest.mark.filterwarnings("ignore:_compile flag:DeprecationWarning"),
]


@pytest.mark.parametrize("attention", ["sdpa", "flex_attention"])
def test_a_growing_cache_is_served_under_inductor_as_without(attention: str) -> None:
    """Regression: sizes of alike caches were merged in tracing, and Inductor named one that no input had."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=128, intermediate_size=256, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, pad_token_id=0, eos_token_id=None,
        attn_implementation=attention,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(2, 128, (1, 200))
    found = []
    for inner in ("eager", "inductor"):
        torch._dynamo.reset()
        model.compile(backend="kvq", options={"method": "int8", "inner": inner})
        found.append(model.generate(ids, max_new_tokens=3, do_sample=False))
    assert torch.equal(*found)
