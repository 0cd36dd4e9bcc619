"""A cache that stays in 16 bit is told even where no attention was recognized; what keeps nothing is not spoken of."""

import warnings

import pytest
import torch
from torch import nn
from transformers import BertConfig, BertModel, MixtralConfig, MixtralForCausalLM

from kvq_compile import KVQWarning

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
H, D = 2, 16


def told(module, *args, **kwargs):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.no_grad():
            torch.compile(module, backend="kvq", options={"inner": "eager"})(*args, **kwargs)
    return [str(x.message) for x in caught if issubclass(x.category, KVQWarning)]


class Folded(nn.Module):
    """Attention of heads that are folded into the batch, spelled in its own way, to keys that only some models keep."""

    def __init__(self, keeps, spelling="scores that change by row"):
        super().__init__()
        self.project = nn.Linear(H * D, 3 * H * D)
        self.register_buffer("held", torch.zeros(1, 64, H, 2 * D))
        self.keeps, self.spelling = keeps, spelling

    def forward(self, x, at):
        query, key, value = self.project(x).unflatten(-1, (-1, D)).chunk(3, 2)
        if self.keeps:
            hot = nn.functional.one_hot(at, 64).to(x.dtype)
            new = torch.einsum("bthd,ts->bshd", torch.cat([key, value], -1), hot)
            self.held = self.held * (1 - hot.sum(0)).view(1, -1, 1, 1) + new
            key, value = self.held.split(D, -1)
        folded = [y.transpose(1, 2).flatten(0, 1) for y in (query, key, value)]
        return SPELLINGS[self.spelling](*folded), x + 1


def scores_that_change(query, key, value):
    scores = torch.bmm(query, key.mT).unflatten(0, (-1, H))
    weights = torch.softmax(scores - scores.sigmoid().amax(-1, keepdim=True), -1).flatten(0, 1)
    return torch.bmm(weights, value)


def summed(query, key, value):
    weights = (query[:, :, None] * key[:, None]).sum(-1).softmax(-1)
    return (weights[..., None] * value[:, None]).sum(2)


def exponentials(query, key, value):
    scores = torch.bmm(query, key.mT)
    weights = (scores - scores.amax(-1, keepdim=True)).exp()
    return torch.bmm(weights / weights.sum(-1, keepdim=True), value)


def without_softmax(query, key, value):
    weights = torch.bmm(query, key.mT).relu()
    return torch.bmm(weights / weights.sum(-1, keepdim=True), value)


SPELLINGS = {
    "scores that change by row": scores_that_change,
    "products as sums": summed,
    "exponentials": exponentials,
    "no softmax": without_softmax,
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_cache_whose_attention_is_not_recognized_is_told(spelling):
    """It is named as one that stays in 16 bit, or as one that is read dense."""
    x, at = torch.randn(1, 5, H * D), torch.arange(5)
    (text,) = told(Folded(True, spelling).eval(), x, at)
    assert "held" in text or "a result" in text or "stored quantized" in text


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_attention_that_keeps_nothing_is_not_spoken_of(spelling):
    x, at = torch.randn(1, 5, H * D), torch.arange(5)
    assert told(Folded(False, spelling).eval(), x, at) == []


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_an_encoder_that_returns_hidden_states_keeps_nothing(attention):
    config = BertConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=32, attn_implementation=attention,
    )  # fmt: skip
    ids = torch.randint(0, 64, (2, 9))
    assert told(BertModel(config).eval(), ids, output_hidden_states=True) == []


def test_a_router_is_no_attention():
    config = MixtralConfig(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    config._experts_implementation = "eager"  # the grouped product of PyTorch 2.11 takes bf16 only
    ids = torch.randint(0, 64, (1, 9))
    about = {"output_router_logits": True, "output_hidden_states": True, "use_cache": False}
    assert told(MixtralForCausalLM(config).eval(), ids, **about) == []
