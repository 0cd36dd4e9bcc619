"""A small Llama with random weights, texts for it, and what is calibrated on them, once a process."""

import functools
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import kvq_compile
from kvq_compile.calibration.artifact import Calibration


def make_model(seed: int = 0, layers: int = 2) -> Any:
    torch.manual_seed(seed)
    config = LlamaConfig(
        hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=64, vocab_size=64,
        num_hidden_layers=layers, intermediate_size=128, initializer_range=0.2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def ids(count: int, seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (1, count), generator=torch.Generator().manual_seed(seed))


@functools.cache
def calibrated(method: str) -> Calibration:
    options: dict[str, Any] = {"auto": {"bits": 3}, "skvq": {"value_bits": 1.5}}.get(method, {})
    texts = [ids(300, seed) for seed in range(2)]
    return kvq_compile.calibrate(make_model(), texts, method, tokens=256, **options)
