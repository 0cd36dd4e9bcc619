"""What supported versions of PyTorch, Triton and transformers cannot do, or do in another way."""

from importlib.metadata import version

import pytest
import torch

OLD_TORCH = torch.__version__.startswith("2.11.")
no_lists_of_parameters = pytest.mark.skipif(
    OLD_TORCH, reason="Dynamo of this PyTorch does not unpack lists of parameters"
)
no_attention_without_heads = pytest.mark.skipif(
    OLD_TORCH, reason="SDPA of this PyTorch ends the process where there are no heads"
)


def need_static_layers_that_count() -> None:
    """Skip a test where static caches do not count their tokens, so that a model reads the cache for them."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(num_hidden_layers=1)
    cache = transformers.StaticCache(config=config, max_cache_len=8)
    if not hasattr(cache.layers[0], "cumulative_length"):
        pytest.skip("static caches of this transformers do not count their tokens")


def need_triton_of_budgets() -> None:
    """Skip the rest of a test, budgets of registers and stack, under a Triton that they were not chosen with."""
    if not version("triton").startswith("3.6."):
        pytest.skip(f"registers and stack are budgeted for Triton 3.6, not {version('triton')}")
