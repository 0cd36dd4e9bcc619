"""Caches keep the quantized form and the dtype that PyTorch would give them, whatever joins them."""

import itertools

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvq_compile import QuantizedKV
from refused_steps import EXACT, compile_, grown, join, tokens
from thorough import spread

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Rotating(torch.nn.Module):
    """Keys are computed on in fp32 and cached so; queries and values are what autocast makes of them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.project = torch.nn.Linear(16, 48, bias=False)

    def forward(self, x, keys, values):
        query, key, value = self.project(x).split(16, -1)
        keys, values = join(keys, values, key.float() * 1.5, value)
        return sdpa(query, keys, values), keys, values


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_autocast_over_fp32_weights_keeps_keys_and_values_quantized(inner) -> None:
    model, cache = Rotating().eval(), [tokens(0), tokens(0)]
    compiled, plain = compile_(model, inner=inner, strict=True), list(cache)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for number in (40, 1, 1, 3):
            output, *cache = compiled(tokens(number), *cache)
            wanted, *plain = model(tokens(number), *plain)
            assert output.dtype == wanted.dtype == torch.bfloat16
            torch.testing.assert_close(output, wanted, rtol=2**-6, atol=2**-6)
            for mine, theirs in zip(cache, plain, strict=True):
                assert isinstance(mine, QuantizedKV)
                assert mine.dtype == theirs.dtype == torch.float32
    for mine, theirs in zip(cache, plain, strict=True):  # all tokens are in the exact window
        torch.testing.assert_close(mine.dequantize(), theirs, rtol=0, atol=0)


@pytest.mark.parametrize("inner", ["eager", "aot_eager"])
def test_a_cache_takes_the_dtype_of_wider_tokens_as_cat_does(inner) -> None:
    def step(query, key, value, keys, values):
        keys, values = join(keys, values, key, value)
        return sdpa(query, keys, values), keys, values

    query, key, value, *caches = grown(quantized=True, dtype=torch.bfloat16)()
    plain = [cache.dequantize().float() for cache in caches]
    wide = [x.float() for x in (query, key, value)]
    compiled = compile_(step, inner=inner, strict=True)
    with torch.no_grad():
        output, *grown_caches = compiled(*wide, *caches)
        again, *_ = compiled(*wide, *grown_caches)
        wanted, *longer = step(*wide, *plain)
    torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again, step(*wide, *longer)[0], rtol=1e-4, atol=1e-5)
    for mine, before, theirs in zip(grown_caches, caches, longer, strict=True):
        assert isinstance(mine, QuantizedKV)
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine.dequantize(), theirs, rtol=0, atol=0)
        assert before.dtype == torch.bfloat16  # a cache that the caller still has stays what it was
        assert before.shape[2] == mine.shape[2] - 2


def test_tokens_of_another_dtype_are_cast_by_the_buffer_they_are_assigned_to() -> None:
    def step(query, key, value, keys, values, mask, first: int):
        keys[:, :, first : first + key.shape[2]] = key
        values[:, :, first : first + key.shape[2]] = value
        return sdpa(query, keys, values, attn_mask=mask)

    def arguments(number, first):
        mask = torch.arange(64)[None] <= torch.arange(first, first + number)[:, None]
        query, key, value = (tokens(number, seed=seed) for seed in range(3))
        return query.bfloat16(), key, value, *buffers, mask, first

    compiled = compile_(step, strict=True)
    buffers = [torch.zeros(2, 2, 64, 16, dtype=torch.bfloat16) for _ in range(2)]
    with torch.no_grad():
        compiled(*arguments(5, 0))
        output = compiled(*arguments(1, 5))
        quantized = buffers
        buffers = [torch.zeros(2, 2, 64, 16, dtype=torch.bfloat16) for _ in range(2)]
        step(*arguments(5, 0))
        torch.testing.assert_close(output, step(*arguments(1, 5)), rtol=2**-6, atol=2**-6)
    assert all(isinstance(buffer, QuantizedKV) for buffer in quantized)
    torch.testing.assert_close(quantized[0].dequantize()[:, :, :6], buffers[0][:, :, :6])


MODES = {
    "inference_mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "neither": torch.enable_grad,
}


@pytest.mark.parametrize(
    ("modes", "inner"), spread(itertools.permutations(MODES, 2), ["eager", "aot_eager"], 2)
)
def test_a_cache_made_in_one_mode_is_used_in_another(modes, inner) -> None:
    made, used = modes

    def step(query, key, value, keys, values):
        keys, values = join(keys, values, key, value)
        return sdpa(query, keys, values), keys, values

    compiled = compile_(step, inner=inner, strict=True)
    arguments = grown()()
    with MODES[made]():
        _, *cache = compiled(*arguments)
        _, *cache = compiled(*arguments[:3], *cache)
    with MODES[used]():
        output, *longer = compiled(*arguments[:3], *cache)
        crop = [x[:, :, :41] for x in longer]
        cropped, *again = compiled(*arguments[:3], *crop)
    wanted, *plain = step(*arguments)
    for _ in range(2):
        wanted, *plain = step(*arguments[:3], *plain)
    torch.testing.assert_close(output, wanted, rtol=1e-4, atol=1e-5)
    wanted, *plain = step(*arguments[:3], *[x[:, :, :41] for x in plain])
    torch.testing.assert_close(cropped, wanted, rtol=1e-4, atol=1e-5)
    assert all(isinstance(x, QuantizedKV) for x in (*longer, *again))
    assert EXACT["window"] > plain[0].shape[2]  # so that any slip shows at full size
