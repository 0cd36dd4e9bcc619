"""What Inductor makes of a whole decoding step: every write into a cache stays a write in place."""

import pytest
import torch
from torch._dynamo.utils import ReinplaceCounters

transformers = pytest.importorskip("transformers")


def test_a_decoding_step_writes_its_caches_in_place() -> None:
    """Regression: Inductor moved the attention behind the write, and so copied every cache at every token."""
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=512,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    options = {"method": "int8", "window": 16, "page_size": 32}
    options["inductor"] = {"fx_graph_cache": False}
    first = torch.compile(model.forward, backend="kvq", options=options | {"inner": "eager"})
    step = torch.compile(model.forward, backend="kvq", options=options)
    cache = transformers.DynamicCache(config=config)
    ids = torch.ones(1, 8, dtype=torch.int64)
    with torch.no_grad():
        first(input_ids=ids, past_key_values=cache, use_cache=True)
        torch._dynamo.reset()
        ReinplaceCounters.clear()
        step(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)
    assert ReinplaceCounters.get_total_missed() == 0
