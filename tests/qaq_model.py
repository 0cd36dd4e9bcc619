"""A small decoder, a call of it that is compiled with QAQ, and what such a call must return."""

from copy import deepcopy
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from kvq_compile.testing import assert_logits_close, plain_cache

transformers = pytest.importorskip("transformers")

SMALL = {"sinks": 2, "window": 5, "page_size": 32}


def make_model(layers: int = 2) -> Any:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, num_attention_heads=4, num_key_value_heads=2, head_dim=64, vocab_size=64,
        num_hidden_layers=layers, intermediate_size=128, initializer_range=0.2,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


def small_text(count: int) -> Tensor:
    return torch.randint(0, 64, (1, count), generator=torch.Generator().manual_seed(3))


def run(model: Any, **options: Any) -> Any:
    torch._dynamo.reset()

    def call(ids: Tensor, cache: Any, **more: Any) -> Tensor:
        return model(ids, past_key_values=cache, use_cache=True, **more).logits

    options = {"method": "qaq", "inner": "eager", **SMALL, **options}
    return torch.compile(call, backend="kvq", options=options, dynamic=False)


def assert_reads_its_cache(model: Any, call: Any, cache: Any, ids: Tensor, *cuts: int) -> None:
    """Assert that a call gives each piece of a text the logits over what its cache stands for at that time."""
    exact, kinds = deepcopy(model).double(), (torch.float32, torch.float64)
    with torch.no_grad():
        for first, last in pairwise((0, *cuts)):
            before = [plain_cache(cache if first else None, kind) for kind in kinds]
            piece = ids[:, first:last]
            logits = call(piece, cache)
            expected = [
                m(piece, past_key_values=c, use_cache=True).logits
                for m, c in zip((model, exact), before, strict=True)
            ]
            assert_logits_close(logits, *expected, layers=len(cache.layers))
