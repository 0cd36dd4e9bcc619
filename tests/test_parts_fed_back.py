"""Whatever is made of a returned cache goes into the next call; a part that stands for a view is not written."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor

from kvq_compile.kernels.cache.arranged import ArrangedKV
from kvq_compile.kernels.cache.arrangement import Arrangement
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.testing.small_cache import grown

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

OPTIONS = {"inner": "eager", "method": "int8", "sinks": 4, "window": 16, "page_size": 32}
B, H, D = 4, 2, 32
PLACES = torch.tensor([0, 5, 9, 60])
PARTS: dict[str, Callable[[Tensor], Tensor]] = {
    "a part of the tokens": lambda cache: cache[:, :, 2:25],
    "no tokens": lambda cache: cache[:, :, 30:30],
    "every other token": lambda cache: cache[:, :, ::2],
    "every third of the last": lambda cache: cache[:, :, -50::3],
    "the last": lambda cache: cache[:, :, -20:],
    "all but the last": lambda cache: cache[..., :-5, :],
    "from both ends": lambda cache: cache[:, :, -30:60],
    "a part of a trimmed part": lambda cache: cache[:, :, 5:][:, :, 2:25],
    "every other sequence": lambda cache: cache[::2],
    "one sequence": lambda cache: cache[1][None],
    "a head": lambda cache: cache[:, 1:],
    "listed tokens": lambda cache: cache[:, :, [1, 2, 40]],
    "masked tokens": lambda cache: cache[:, :, torch.arange(cache.shape[2]) % 2 == 0],
    "narrow": lambda cache: cache.narrow(2, 3, 20),
    "select": lambda cache: cache.select(2, 3).unsqueeze(2),
    "index_select": lambda cache: cache.index_select(2, PLACES),
    "a chunk": lambda cache: cache.chunk(4, 2)[3],
    "a chunk of sequences": lambda cache: cache.chunk(2)[1],
    "a piece": lambda cache: cache.split(30, 2)[1],
    "a piece of sequences": lambda cache: cache.split(1)[2],
    "tensor_split": lambda cache: cache.tensor_split(3, 2)[1],
    "flip": lambda cache: cache.flip(2),
    "roll": lambda cache: cache.roll(1, 2),
    "clone": lambda cache: cache[:, :, 2:25].clone(),
    "contiguous": lambda cache: cache[:, :, ::2].contiguous(),
    "a dtype": lambda cache: cache.to(torch.float64).float(),
    "detach": lambda cache: cache[:, :, 3:60].detach(),
    "cat of sequences": lambda cache: torch.cat([cache, cache.flip(0)]),
    "cat of parts": lambda cache: torch.cat([cache[:, :, :4], cache[:, :, -30:]], 2),
    "stack": lambda cache: torch.stack([cache, cache])[0],
    "expand": lambda cache: cache[:1].expand(3, -1, -1, -1),
    "transposed": lambda cache: cache.transpose(1, 2)[:, 4:30].transpose(1, 2),
}


def step(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, ...]:
    keys, values = torch.cat([keys, k], 2), torch.cat([values, v], 2)
    return F.scaled_dot_product_attention(q, keys, values), keys, values


def tokens(count: int, batch: int = B, heads: int = H) -> list[Tensor]:
    return [torch.randn(batch, heads, count, D) for _ in range(3)]


@pytest.mark.parametrize(
    ("mode", "name"),
    [
        *((torch.no_grad, name) for name in PARTS),
        *((torch.inference_mode, name) for name in PARTS if "chunk" in name or name == "narrow"),
    ],
)
def test_a_part_of_a_returned_cache_is_a_cache_of_these_tokens(mode: Any, name: str) -> None:
    """Regression: autograd noted a part as a view of the whole, whose length Dynamo then looked for."""
    torch.manual_seed(0)
    compiled = torch.compile(step, backend="kvq", options=OPTIONS)
    with mode():
        _, *caches = compiled(*tokens(90), *(torch.zeros(B, H, 0, D) for _ in range(2)))
        _, *caches = compiled(*tokens(1), *caches)
        exact = [PARTS[name](cache.dequantize()) for cache in caches]
        caches = [PARTS[name](cache) for cache in caches]
        for _ in range(2):
            new = tokens(1, *exact[0].shape[:2])
            expected, *exact = step(*new, *exact)
            output, *caches = compiled(*new, *caches)
            torch.testing.assert_close(output, expected)
            assert all(isinstance(cache, QuantizedKV) for cache in caches)
            exact = [cache.dequantize() for cache in caches]


@torch.no_grad()
def test_a_layer_of_a_returned_cache_may_be_cut() -> None:
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=2, pad_token_id=0,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(config).eval()
    compiled = torch.compile(model.forward, backend="kvq", options=OPTIONS)
    ids = torch.randint(1, 64, (1, 80))
    cache = compiled(ids, use_cache=True).past_key_values
    plain = transformers.DynamicCache()
    for number, layer in enumerate(cache.layers):
        layer.keys, layer.values = layer.keys[:, :, 8:72], layer.values[:, :, 8:72]
        plain.update(layer.keys.clone(), layer.values.clone(), number)
    expected = model(ids[:, :1], past_key_values=plain, use_cache=True)
    output = compiled(ids[:, :1], past_key_values=cache, use_cache=True)
    torch.testing.assert_close(output.logits, expected.logits)
    assert all(isinstance(layer.keys, QuantizedKV) for layer in cache.layers)


def write(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, at: Tensor) -> Tensor:
    slots = torch.arange(keys.shape[2])
    keys.index_copy_(2, at, k)
    values[:, :, at] = v
    return F.scaled_dot_product_attention(q, keys, values, (slots <= at[:, None])[None, None])


@pytest.mark.parametrize(
    "part",
    [
        lambda cache: cache[:2],
        lambda cache: cache.chunk(2)[0],
        lambda cache: cache[:2].detach(),
        lambda cache: cache[:, :1],
        lambda cache: cache[:, :, :128],
        lambda cache: cache.narrow(2, 0, 128),
    ],
)
@torch.no_grad()
def test_a_call_does_not_lose_what_it_writes_into_a_part(part: Callable[[Any], Any]) -> None:
    """Regression: the part was a copy, and the whole cache never saw what a compiled call wrote."""
    caches = [torch.zeros(B, H, 200, D) for _ in range(2)]
    compiled = torch.compile(write, backend="kvq", options=OPTIONS)
    compiled(*tokens(100), *caches, torch.arange(100))
    before = [cache.dequantize() for cache in caches]
    parts, at = [part(cache) for cache in caches], torch.tensor([100])
    with pytest.raises(NotImplementedError, match="must be a whole cache where a call writes"):
        compiled(*tokens(1, *parts[0].shape[:2]), *parts, at)
    assert all(
        torch.equal(cache.dequantize(), was) for cache, was in zip(caches, before, strict=True)
    )
    new = tokens(1)
    expected = write(*new, *before, at)
    torch.testing.assert_close(compiled(*new, *caches, at), expected)
    copies = [part(cache).clone() for cache in caches]
    new = tokens(1, *copies[0].shape[:2])
    expected = write(*new, *(copy + 0 for copy in copies), at + 1)
    torch.testing.assert_close(compiled(*new, *copies, at + 1), expected)


def test_a_part_of_an_arranged_cache_is_not_written() -> None:
    """Regression: a slice along the batch forgot that it stands for a view."""
    cache = ArrangedKV([grown(40)], Arrangement("BSHD"))
    with pytest.raises(NotImplementedError, match="sliced along its batch is a copy"):
        cache[:1][:, 39] = 1.0


@pytest.mark.filterwarnings("ignore:.*another attention has taken over the same cache")
@torch.no_grad()
def test_layers_that_start_with_the_same_tokens_go_their_own_ways() -> None:
    """Regression: their caches were of the same parts, and each thought itself alone."""

    def layers(q: Tensor, k: Tensor, v: Tensor, caches: Any, apart: bool) -> tuple[Tensor, Any]:
        grown = []
        for cache in caches:
            output, *cache = step(q, k, v, *cache)
            q, k, grown = q + output, k + 1 if apart else k, [*grown, cache]
        return q, grown

    torch.manual_seed(0)
    compiled = torch.compile(layers, backend="kvq", options=OPTIONS)
    empty = [torch.zeros(B, H, 0, D) for _ in range(2)]
    _, caches = compiled(*tokens(90), [empty] * 2, False)
    for _ in range(30):  # a page is full after 18
        exact = [[each.dequantize() for each in cache] for cache in caches]
        new = tokens(1)
        expected, _ = layers(*new, exact, True)
        output, caches = compiled(*new, caches, True)
        torch.testing.assert_close(output, expected)
