"""Caches that follow the model to a dtype or a device are cast at every call, mostly to what they are already."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from kvq_compile.history import watching
from kvq_compile.kernels.cache.arranged import ArrangedKV
from kvq_compile.kernels.cache.tensor import QuantizedKV

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
OPTIONS = {"method": "int8", "sinks": 2, "window": 8, "page_size": 32}


class Attention(nn.Module):
    """Two heads of 16 channels over buffers ``[B, S, H, D]`` or ``[B, H, S, D]``, cast to what tokens are."""

    def __init__(self, tokens_first: bool, dtype: torch.dtype) -> None:
        super().__init__()
        self.project = nn.Linear(32, 96, bias=False)
        self.tokens_first = tokens_first
        shape = (2, 128, 2, 16) if tokens_first else (2, 2, 128, 16)
        self.keys, self.values = torch.zeros(2, *shape, dtype=dtype)
        self.keys, self.values = self.keys.clone(), self.values.clone()

    def forward(self, x: Tensor, start: int) -> Tensor:
        end = start + x.shape[1]
        query, key, value = self.project(x).view(2, -1, 3, 2, 16).unbind(2)
        self.keys, self.values = self.keys.to(query), self.values.type_as(query)
        if self.tokens_first:
            self.keys[:, start:end], self.values[:, start:end] = key, value
            keys, values = (b[:, :end].transpose(1, 2) for b in (self.keys, self.values))
        else:
            self.keys[:, :, start:end] = key.transpose(1, 2)
            self.values[:, :, start:end] = value.transpose(1, 2)
            keys, values = self.keys[:, :, :end], self.values[:, :, :end]
        mask = torch.arange(end)[None] <= torch.arange(start, end)[:, None]
        scores = query.transpose(1, 2) @ keys.transpose(2, 3) / 4.0
        weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
        return (weights @ values).transpose(1, 2).reshape(2, -1, 32)


def outputs(model: nn.Module, forward: nn.Module) -> Tensor:
    drawn, start, found = torch.Generator().manual_seed(0), 0, []
    with torch.no_grad():
        for tokens in (60, 1, 1, 9):
            found.append(forward(torch.randn(2, tokens, 32, generator=drawn), start))
            start += tokens
    return torch.cat(found, 1)


@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("tokens_first", [True, False])
def test_a_cache_that_is_cast_to_what_it_is_becomes_quantized(
    tokens_first: bool, inner: str
) -> None:
    torch.manual_seed(0)
    model = Attention(tokens_first, torch.float32)
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="kvq", options=OPTIONS | {"inner": inner})
    with watching() as graphs:
        found = outputs(model, compiled)
    expected = outputs(plain, plain)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01 * float(expected.abs().max()))
    kind = ArrangedKV if tokens_first else QuantizedKV
    assert isinstance(model.keys, kind)
    assert isinstance(model.values, kind)
    assert {site.outcome for graph in graphs for site in graph.sites} == {"rewritten"}


def test_a_cast_that_makes_another_tensor_is_none_of_these() -> None:
    """Negative twin: the first call makes new buffers of fp16 ones and leaves these as they are; what it returns is
    taken for caches that grow, which is told where they are written.
    """
    torch.manual_seed(0)
    model = Attention(False, torch.float16)
    before, plain = model.keys, copy.deepcopy(model)
    compiled = torch.compile(model, backend="kvq", options=OPTIONS | {"inner": "eager"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = outputs(model, compiled)
    expected = outputs(plain, plain)
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01 * float(expected.abs().max()))
    assert type(before) is Tensor
    assert not before.any()
    assert any("a cache that grows is written in place" in str(told.message) for told in caught)
