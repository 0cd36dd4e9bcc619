"""A huge bias of the key projection, the field's known silent failure, does no harm to uniform methods."""

from typing import Any

import pytest
import torch
from torch import Tensor

transformers = pytest.importorskip("transformers")

import kvq_compile
from kvq_compile.kernels import reference
from kvq_compile.kernels.schemes import Uniform
from kvq_compile.kernels.spec import CacheSpec


def make_model(bias: float) -> Any:
    """Return a random Qwen2 with a key bias of magnitude ``bias`` in some slowly rotating channels.

    In fast ones it would make every attention a choice of one token, whatever the cache does.
    """
    torch.manual_seed(0)
    config = transformers.Qwen2Config(
        hidden_size=128, num_attention_heads=2, num_key_value_heads=2, vocab_size=64,
        num_hidden_layers=1, intermediate_size=128, initializer_range=0.1,
    )  # fmt: skip
    model = transformers.Qwen2ForCausalLM(config).eval()
    for layer in model.model.layers:
        sign = torch.randn(2, 64).sign()
        rare = (torch.rand(2, 64) < 0.5) & (torch.arange(64) % 32 >= 26)
        layer.self_attn.k_proj.bias.data = (bias * sign * rare).flatten()
    return model


def logits(model: Any, ids: Tensor, compile_: bool = True, **method: object) -> tuple[Tensor, Any]:
    torch._dynamo.reset()
    cache = transformers.DynamicCache(config=model.config)

    def call(piece: Tensor) -> Tensor:
        return model(piece, past_key_values=cache, use_cache=True).logits

    options = {"inner": "eager", "window": 5, "page_size": 32, **method}
    run = torch.compile(call, backend="kvq", options=options) if compile_ else call
    with torch.no_grad():
        run(ids[:, :100])
        return run(ids[:, 100:]), cache


def divergence(found: Tensor, exact: Tensor) -> float:
    p = exact.log_softmax(-1)
    return float((p.exp() * (p - found.log_softmax(-1))).sum(-1).mean())


METHODS: tuple[dict[str, object], ...] = ({}, {"method": "int4"}, {"method": "kivi", "bits": 4})


@pytest.mark.long(but=["600.0"])
@pytest.mark.parametrize("bias", [20.0, 600.0])
def test_no_method_breaks_on_a_huge_key_bias(bias: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is left of the error is a small part of that of keys coded per token as they are. The default takes the
    bias off with the mean that turns, which holds it.
    """
    model, ids = make_model(bias), torch.randint(0, 64, (1, 104))
    exact, _ = logits(model, ids, compile_=False)
    left = []
    for method in METHODS:
        found, cache = logits(model, ids, **method)
        layout = cache.layers[0].keys.page_layout
        assert layout.rotary != layout.takes_mean, method
        left.append(divergence(found, exact))
    monkeypatch.setattr("kvq_compile.lowering.find.sites.without_bias", lambda spec, *_: spec)
    broken, cache = logits(model, ids, method="int4")
    assert not cache.layers[0].keys.page_layout.rotary
    assert max(left) < 0.2 * divergence(broken, exact), left


def test_a_model_without_a_huge_bias_keeps_its_fast_layout() -> None:
    _, cache = logits(make_model(0.0), torch.randint(0, 64, (1, 104)))
    assert not cache.layers[0].keys.page_layout.rotary


def test_without_that_the_keys_would_be_lost() -> None:
    """Negative twin: the same keys coded as they are have an error as large as what tells them apart."""
    model, ids = make_model(600.0), torch.randint(0, 64, (1, 104))
    _, cache = logits(model, ids, compile_=False)
    key = cache.layers[0].keys[:, :, :96].unflatten(2, (3, 32))
    plain = CacheSpec(Uniform(4), page_size=32).layout("key", 64)
    lost = reference.dequantize_pages(*reference.quantize_pages(key, plain), plain) - key
    _, quantized = logits(model, ids)
    read = quantized.layers[0].keys.dequantize()[:, :, 5:69]
    kept = read - cache.layers[0].keys[:, :, 5:69]
    assert float(lost.abs().mean()) > 20 * float(kept.abs().mean())


def test_explain_tells_where_keys_are_coded_before_their_rotation() -> None:
    model = make_model(600.0)
    cache = transformers.DynamicCache(config=model.config)
    ids = torch.zeros(1, 10, dtype=torch.long)
    with torch.no_grad():
        told = str(
            kvq_compile.explain(
                model,
                options={"method": "int4"},
                input_ids=ids,
                use_cache=True,
                past_key_values=cache,
            )
        )
    assert "keys before RoPE" in " ".join(told.split())


def test_a_cache_that_was_quantized_by_hand_stays_as_it_is() -> None:
    """The compiled call goes on with the coding that the cache has, and clips as the method says elsewhere."""
    model, ids = make_model(600.0), torch.randint(0, 64, (1, 104))
    _, cache = logits(model, ids, compile_=False)
    kvq_compile.quantize_cache_(cache, window=5, page_size=32)
    torch._dynamo.reset()
    options = {"inner": "eager", "window": 5, "page_size": 32}
    run = torch.compile(
        lambda piece: model(piece, past_key_values=cache, use_cache=True).logits,
        backend="kvq",
        options=options,
    )
    with torch.no_grad():
        assert run(ids[:, :1]).isfinite().all()
    assert not cache.layers[0].keys.page_layout.has_tables
