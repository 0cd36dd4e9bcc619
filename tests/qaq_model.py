"""A small decoder, and a call of it that is compiled with QAQ."""

from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

SMALL = {"sinks": 2, "window": 5, "page_size": 32}


def make_model() -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=64, vocab_size=64,
        num_hidden_layers=2, intermediate_size=128, initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def run(model: Any, **options: Any) -> Any:
    torch._dynamo.reset()

    def call(ids: Tensor, cache: Any, **more: Any) -> Tensor:
        return model(ids, past_key_values=cache, use_cache=True, **more).logits

    options = {"method": "qaq", "inner": "eager", **SMALL, **options}
    return torch.compile(call, backend="kvq", options=options, dynamic=False)
