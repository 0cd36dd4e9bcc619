"""What is captured is what the attentions saw; the model is left as it was."""

import importlib.util
import pickle
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from kvq_compile import KVQWarning
from kvq_compile.calibration.attention_change import Text, exact
from kvq_compile.calibration.capture import capture
from kvq_compile.kernels.score import UNBENT

transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


def make_llama(**more) -> nn.Module:
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=64,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        num_hidden_layers=2,
        bos_token_id=None,
        eos_token_id=None,
        **more,
    )
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def texts(batch: int = 2, tokens: int = 12, seed: int = 0) -> Tensor:
    return torch.randint(0, 64, (batch, tokens), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def example(monkeypatch):
    """Load a module of the examples by name."""

    def load(name: str):
        spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)  # Dynamo imports it by name
        spec.loader.exec_module(module)
        return module

    return load


def expected_gradients(model: nn.Module, ids: Tensor, counted: Tensor | None = None) -> list:
    """Return key, value and their gradients of each layer, taken inside transformers' own attention."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    seen: list[Tensor] = []

    def spy(module, query, key, value, *args, **kwargs):
        seen.extend((key, value))
        return sdpa_attention_forward(module, query, key, value, *args, **kwargs)

    transformers.AttentionInterface.register("spy", spy)
    transformers.AttentionMaskInterface.register(
        "spy", transformers.masking_utils.ALL_MASK_ATTENTION_FUNCTIONS["sdpa"]
    )
    kind = model.config._attn_implementation
    model.set_attn_implementation("spy")
    mask = None if counted is None else counted.long()
    logits = model(ids, attention_mask=mask).logits[:, :-1]
    model.set_attn_implementation(kind)
    counted = torch.ones_like(ids, dtype=torch.bool) if counted is None else counted
    counted = counted[:, 1:] & counted[:, :-1]
    loss = cross_entropy(logits[counted], ids[:, 1:][counted])
    return list(zip(seen, torch.autograd.grad(loss, seen), strict=True))


def test_captured_keys_and_values_are_those_that_the_cache_holds() -> None:
    model, ids = make_llama(), texts()
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
    (found,) = capture(model, [ids], gradients=False)
    assert [seen.layer for seen in found] == [0, 1]
    for seen, layer in zip(found, cache.layers, strict=True):
        torch.testing.assert_close(seen.key, layer.keys)
        torch.testing.assert_close(seen.value, layer.values)
        assert seen.query.shape == (2, 4, 12, 16)
        assert seen.key_gradient is None and seen.value_gradient is None and seen.mask is None
        assert seen.rotation is not None and seen.rotation_reason == ""
        assert not seen.key.requires_grad and not seen.query.requires_grad
    pickle.dumps(found)  # nothing holds on to the graph


def test_attention_over_what_is_captured_is_that_of_the_model_whatever_its_scale() -> None:
    model, ids, outputs = make_llama(), texts(1), []
    for layer in model.model.layers:
        layer.self_attn.scaling = 0.7
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: outputs.append(*args))
    with torch.no_grad():
        model(ids)
    (found,) = capture(model, [ids], gradients=False)
    for seen, output in zip(found, outputs[: len(model.model.layers)], strict=True):
        assert seen.scale == pytest.approx(0.7)
        text = Text(seen.query[0], torch.arange(12), seen.key[0], seen.value[0], seen.scale)
        torch.testing.assert_close(exact(text).transpose(0, 1).flatten(1), output[0])
        twin = replace(text, scale=0.25)
        assert float((exact(twin) - exact(text)).abs().max()) > 1e-2 * float(output.abs().max())


def test_attention_over_what_is_captured_is_that_of_the_model_whatever_caps_its_scores() -> None:
    torch.manual_seed(0)
    config = transformers.Gemma2Config(
        vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, attn_logit_softcapping=0.5,
        attn_implementation="eager",  # transformers 5.0 would take torch's attention, which knows no cap
    )  # fmt: skip
    model, ids, outputs = transformers.Gemma2ForCausalLM(config).eval(), texts(1), []
    for layer in model.model.layers:
        layer.self_attn.scaling = 9.0
        layer.self_attn.o_proj.register_forward_pre_hook(lambda module, args: outputs.append(*args))
    with torch.no_grad():
        model(ids)
    (found,) = capture(model, [ids], gradients=False)
    for seen, output in zip(found, outputs[: len(model.model.layers)], strict=True):
        about = seen.query[0], torch.arange(12), seen.key[0], seen.value[0], seen.scale, seen.bend
        text = Text(*about)
        torch.testing.assert_close(exact(text).transpose(0, 1).flatten(1), output[0])
        twin = replace(text, bend=UNBENT)
        assert float((exact(twin) - exact(text)).abs().max()) > 1e-2 * float(output.abs().max())


def test_attentions_with_sinks_are_left_out_by_name() -> None:
    config = transformers.GptOssConfig(
        vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=2, head_dim=16,
        num_attention_heads=4, num_key_value_heads=2, num_local_experts=2, num_experts_per_tok=1,
        experts_implementation="batched_mm",  # torch 2.11 traces grouped products in 16 bit alone
        rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    )  # fmt: skip
    model = transformers.GptOssForCausalLM(config).eval()
    with pytest.raises(ValueError, match="calibration does not know logits of sinks"):
        list(capture(model, [texts(1)], gradients=False))


@pytest.mark.parametrize("trained", [True, False])
def test_gradients_are_those_of_the_next_token_loss(trained) -> None:
    model, ids = make_llama(), texts()
    expected = expected_gradients(model, ids)
    model.requires_grad_(trained)
    with torch.no_grad():  # the caller's mode does not count
        (found,) = capture(model, [ids], gradients=True)
    pairs = [(s.key, s.key_gradient) for s in found], [(s.value, s.value_gradient) for s in found]
    for (tensor, gradient), (wanted, wanted_gradient) in zip(
        [pair for layer in zip(*pairs, strict=True) for pair in layer], expected, strict=True
    ):
        torch.testing.assert_close(tensor, wanted.detach())
        torch.testing.assert_close(gradient, wanted_gradient, rtol=1e-4, atol=1e-8)
        assert float(gradient.abs().max()) > 0


def test_a_gradient_predicts_how_the_loss_changes() -> None:
    model, ids = make_llama(), texts()
    (found,) = capture(model, [ids], gradients=True)
    direction = torch.randn(found[0].value.shape)
    step = 1e-2
    projection = model.model.layers[0].self_attn.v_proj

    def loss(sign: int) -> float:
        change = (sign * step * direction).transpose(1, 2).flatten(2)
        hook = projection.register_forward_hook(lambda module, args, output: output + change)
        with torch.no_grad():
            logits = model(ids).logits[:, :-1].double()
        hook.remove()
        return float(cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))

    predicted = float((found[0].value_gradient * direction).sum())
    assert (loss(1) - loss(-1)) / (2 * step) == pytest.approx(predicted, rel=1e-2)


def test_padding_counts_neither_in_the_loss_nor_unseen() -> None:
    model, ids = make_llama(), texts()
    mask = torch.ones_like(ids)
    mask[0, 9:] = 0
    expected = expected_gradients(model, ids, mask.bool())
    batch = {"input_ids": ids, "attention_mask": mask}
    (found,) = capture(model, [batch], gradients=True)
    for seen, (key, _) in zip(found, (expected[0::2], expected[1::2]), strict=False):
        assert torch.equal(seen.mask, mask.bool())
        assert seen.key.shape == key[0].shape
    for index, seen in enumerate(found):
        gradient = expected[2 * index][1]
        torch.testing.assert_close(seen.key_gradient, gradient, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("gradients", [True, False])
def test_the_model_is_left_as_it_was(gradients) -> None:
    model = make_llama()
    model.train()
    model.model.layers[1].eval()
    frozen = next(model.parameters()).requires_grad_(False)
    modes = [module.training for module in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    list(capture(model, [texts()], gradients=gradients))
    with pytest.raises(ValueError, match="token ids"):
        list(capture(model, [texts().float()], gradients=gradients))
    with pytest.raises(IndexError):
        list(capture(model, [texts() + 1000], gradients=gradients))
    assert [module.training for module in model.modules()] == modes
    assert not frozen.requires_grad
    assert all(p.grad is None and (p.requires_grad or p is frozen) for p in model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    cached = torch._C._dynamo.eval_frame._debug_get_cache_entry_list
    assert not any(cached(type(module).forward.__code__) for module in model.modules())


def test_batches_of_one_shape_share_a_graph() -> None:
    batches = [texts(seed=seed) for seed in range(3)]
    torch._dynamo.utils.counters.clear()
    found = list(capture(make_llama(), batches, gradients=True))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch.equal(found[0][0].key, found[1][0].key)
    found += capture(make_llama(), [texts(), texts(tokens=7), texts(tokens=9)], gradients=False)
    assert [seen[1].key.shape[2] for seen in found[3:]] == [12, 7, 9]
    torch.testing.assert_close(found[3][1].key, found[0][1].key)


@pytest.mark.parametrize("flash", [True, False])
def test_a_model_of_tuples_is_captured(example, flash) -> None:
    model = example("nanogpt_style").make_model(flash=flash)
    ids = texts()
    with torch.no_grad():
        _, cache = model(ids)
    (found,) = capture(model, [ids], gradients=True)
    for seen, (key, value) in zip(found, cache, strict=True):
        torch.testing.assert_close(seen.key, key)
        torch.testing.assert_close(seen.value, value)
        assert float(seen.key_gradient.abs().max()) > 0
        assert "not rotated" in seen.rotation_reason


def test_buffers_that_a_model_writes_keep_their_contents(example) -> None:
    model = example("gpt_fast_style").make_model()
    batches = [{"ids": texts(1, 6, seed), "input_pos": torch.arange(6)} for seed in (0, 0)]
    first, second = capture(model, batches, gradients=True)
    for name, buffer in model.named_buffers():
        if "cache" in name:
            assert not buffer.any() and not buffer.requires_grad
    for a, b in zip(first, second, strict=True):
        torch.testing.assert_close(a.key_gradient, b.key_gradient)
        assert a.key.shape == (1, 2, 6, 16)
        assert a.rotation is None and "not rotated" in a.rotation_reason
        assert float(a.value_gradient.abs().max()) > 0


class Laid(nn.Module):
    """One attention whose cache is ``[B, H, S, D]``, or ``[B, S, H, D]``."""

    def __init__(self, tokens_first: bool) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.embedding, self.tokens_first = nn.Embedding(64, 32), tokens_first
        self.embedding.weight.data = torch.randn(64, 32, generator=generator)

    def forward(self, ids: Tensor):
        query, key, value = (
            self.embedding(ids).mul(factor).unflatten(2, (2, 16)) for factor in (0.3, 0.5, 0.7)
        )
        if not self.tokens_first:
            key, value = key.transpose(1, 2), value.transpose(1, 2)
        heads = [x.transpose(1, 2) if self.tokens_first else x for x in (key, value)]
        output = nn.functional.scaled_dot_product_attention(query.transpose(1, 2), *heads)
        return output.transpose(1, 2).flatten(2) @ self.embedding.weight.mT, (key, value)


@pytest.mark.parametrize("gradients", [False, True])
def test_a_cache_of_another_layout_is_captured_alike(gradients: bool) -> None:
    found = [list(capture(Laid(first), [texts()], gradients=gradients)) for first in (True, False)]
    for (mine,), (theirs,) in zip(*found, strict=True):
        for name in ("query", "key", "value", "key_gradient", "value_gradient"):
            torch.testing.assert_close(getattr(mine, name), getattr(theirs, name))


# What cannot be captured


class Plain(nn.Module):
    """One attention that keeps what it is told to keep."""

    def __init__(self, keep: bool = True, logits: bool = True) -> None:
        super().__init__()
        self.embedding, self.keep, self.logits = nn.Embedding(64, 16), keep, logits

    def forward(self, ids: Tensor, past=None):
        key = self.embedding(ids)[:, None]
        value = key.sin()
        if past is not None:
            key, value = torch.cat([past[0], key], 2), torch.cat([past[1], value], 2)
        output = nn.functional.scaled_dot_product_attention(key, key, value)
        output = output[:, 0] if self.logits else output
        return (output, (key, value)) if self.keep else output


def test_a_model_that_keeps_no_cache_is_refused_by_name() -> None:
    reason = r"model must keep .* in a cache, got none that does \(keys and values are not kept"
    with pytest.raises(ValueError, match=reason):
        list(capture(Plain(keep=False), [texts()], gradients=False))
    batch = {"input_ids": texts(), "use_cache": False}
    with pytest.raises(ValueError, match="call it with use_cache=True"):
        list(capture(make_llama(), [batch], gradients=False))


def test_a_batch_behind_a_filled_cache_is_refused() -> None:
    past = (torch.zeros(2, 1, 3, 16), torch.zeros(2, 1, 3, 16))
    with pytest.raises(ValueError, match="batches must begin with an empty 16-bit cache"):
        list(capture(Plain(), [{"ids": texts(), "past": past}], gradients=False))


def test_what_is_no_batch_or_has_no_loss_is_refused() -> None:
    for batch, error, reason in (
        (["text"], TypeError, "batches must hold token ids or keyword arguments, got list"),
        (texts()[0], ValueError, r"batches must hold token ids \[B, T\]"),
        (texts(tokens=1), ValueError, "2 tokens of a sequence or more"),
    ):
        with pytest.raises(error, match=reason):
            list(capture(Plain(), [batch], gradients=True))
    with pytest.raises(ValueError, match=r"model must return logits \[B, T, V\]"):
        list(capture(Plain(logits=False), [texts()], gradients=True))


def test_attentions_that_cannot_be_quantized_are_told_of() -> None:
    class Twice(Plain):
        def forward(self, ids, past=None):
            output, cache = super().forward(ids)
            key = output[:, None].cos()
            weights = torch.softmax(key @ key.mT, -1)
            return output, cache, weights @ key, key, weights

    with pytest.warns(KVQWarning, match="1 attentions cannot be quantized and were not captured"):
        (found,) = capture(Twice(), [texts()], gradients=False)
    assert [seen.layer for seen in found] == [0]
