"""A small Llama, or a Mistral where it has a window: texts for it, and ways to generate."""

import inspect
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig

# EXACT keeps every token of short texts in the window: the same tokens must come out. PACKED packs a page of 32
# tokens as soon as it leaves a window of 4: logits may be off by what 8-bit codes cost.
EXACT: dict[str, Any] = {
    "method": "int8",
    "sinks": 1,
    "window": 256,
    "page_size": 32,
    "inner": "eager",
}
PACKED = EXACT | {"window": 4}
# 8-bit codes move the logits of this model by half a percent of the largest; a wrong mask or slot by a third of it.
TOLERANCE = 0.015


def make_model(
    window: int | None = None, layers: int = 1, seed: int = 0, heads: int = 4, kv_heads: int = 2
) -> Any:
    """Return a decoder of random weights, the same ones for a seed."""
    torch.manual_seed(seed)
    shape = {
        "vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": kv_heads, "max_position_embeddings": 512,
        "initializer_range": 0.1, "bos_token_id": None, "eos_token_id": None, "pad_token_id": 0,
    }  # fmt: skip
    config = (
        LlamaConfig(**shape) if window is None else MistralConfig(**shape, sliding_window=window)
    )
    return AutoModelForCausalLM.from_config(config).eval()


def text(length: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Return tokens ``[batch, length]``."""
    return torch.randint(1, 64, (batch, length), generator=torch.Generator().manual_seed(seed))


def generate(model: Any, prompt: torch.Tensor, **options: Any) -> Any:
    """Return what a model generates, greedily unless told otherwise."""
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | options
    mask = torch.ones_like(prompt)
    return model.generate(prompt, attention_mask=mask, return_dict_in_generate=True, **settings)


def positions_for(model: Any, first: int, count: int) -> dict[str, Any]:
    """Return cache positions where a model takes them, as in transformers 5.0; it would read a static cache for them.

    Later static caches count their tokens, and models know no such argument.
    """
    takes = "cache_position" in inspect.signature(getattr(model, "forward", model)).parameters
    return {"cache_position": torch.arange(count) + first} if takes else {}
