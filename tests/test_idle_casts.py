"""Caches that follow the model to a dtype or a device are cast at every call, mostly to what they are already."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn

from kvq_compile.history import watching
from kvq_compile.kernels.cache.arranged import ArrangedKV
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.lowering.find.reasons import CHANGES_DTYPE
from kvq_compile.lowering.sites import DENSE

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


def outputs(model: Attention, forward: nn.Module, then: torch.dtype | None = None) -> Tensor:
    """Return the outputs of four calls in fp32; before the third the model is cast to ``then``."""
    drawn, start, found = torch.Generator().manual_seed(0), 0, []
    with torch.no_grad():
        for number, tokens in enumerate((60, 1, 1, 9)):
            if number == 2 and then is not None:
                model.project.to(then)
            x = torch.randn(2, tokens, 32, generator=drawn).to(model.project.weight.dtype)
            found.append(forward(x, start).float())
            start += tokens
    return torch.cat(found, 1)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01 * float(expected.abs().max()))


@pytest.mark.long(but=["True-eager", "False-inductor"])
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
    assert_close(found, expected)
    kind = ArrangedKV if tokens_first else QuantizedKV
    assert isinstance(model.keys, kind)
    assert isinstance(model.values, kind)
    assert {site.outcome for graph in graphs for site in graph.sites} == {"rewritten"}


@pytest.mark.parametrize(
    "dtypes", [(torch.float16, torch.float32), (torch.float32, torch.bfloat16)]
)
@pytest.mark.parametrize("tokens_first", [True, False])
def test_a_buffer_that_is_cast_to_another_dtype_is_quantized_in_that(
    tokens_first: bool, dtypes: tuple[torch.dtype, torch.dtype]
) -> None:
    """Regression: what the first call makes of the buffer was taken for a cache that grows, which nothing writes in
    place, so that it left quantization with the second call. The buffer itself stays as it is.
    """
    torch.manual_seed(0)
    model = Attention(tokens_first, dtypes[0])
    model.project.to(dtypes[1])
    before, plain = model.keys, copy.deepcopy(model)
    compiled = torch.compile(model, backend="kvq", options=OPTIONS | {"inner": "eager"})
    with watching() as graphs:
        found = outputs(model, compiled)
    assert_close(found, outputs(plain, plain))
    assert type(before) is Tensor
    assert not before.any()
    assert isinstance(model.keys, ArrangedKV if tokens_first else QuantizedKV)
    assert model.keys.dtype == dtypes[1]
    assert {site.outcome for graph in graphs for site in graph.sites} == {"rewritten"}


@pytest.mark.parametrize("tokens_first", [True, False])
def test_a_quantized_cache_follows_its_model_to_another_dtype(tokens_first: bool) -> None:
    torch.manual_seed(0)
    model = Attention(tokens_first, torch.float32)
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="kvq", options=OPTIONS | {"inner": "eager"})
    with warnings.catch_warnings(record=True) as caught, watching() as graphs:
        warnings.simplefilter("always")
        found = outputs(model, compiled, then=torch.bfloat16)
    assert_close(found, outputs(plain, plain, then=torch.bfloat16))
    assert isinstance(model.keys, ArrangedKV if tokens_first else QuantizedKV)
    assert model.keys.dtype == model.values.dtype == torch.bfloat16
    assert [site.outcome for graph in graphs for site in graph.sites] == [
        "rewritten",
        "rewritten",
        DENSE,
        "rewritten",
    ]
    (told,) = (str(each.message) for each in caught if "another dtype" in str(each.message))
    assert CHANGES_DTYPE in told


class OtherRows(Attention):
    """What is made of the buffer holds other elements: a cast and a factor."""

    def forward(self, x: Tensor, start: int) -> Tensor:
        if self.keys.dtype != x.dtype:
            self.keys = self.keys * 2
        return super().forward(x, start)


def test_what_is_more_than_a_cast_is_no_update() -> None:
    """Negative twin: the tokens that the buffer held leave the call as others."""
    torch.manual_seed(0)
    model = OtherRows(False, torch.float16)
    model.keys[:, :, 100] = 1.0
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="kvq", options=OPTIONS | {"inner": "eager"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = compiled_call(compiled)
    assert_close(found, compiled_call(plain))
    assert type(model.keys) is Tensor
    torch.testing.assert_close(model.keys[:, :, 60:], plain.keys[:, :, 60:])
    assert any("not understood" in str(told.message) for told in caught)


def compiled_call(forward: nn.Module) -> Tensor:
    with torch.no_grad():
        out: Tensor = forward(torch.ones(2, 60, 32), 0)
    return out


class Showing(Attention):
    """A cast of what the cache was leaves the call beside the cache."""

    def forward(self, x: Tensor, start: int) -> Tensor:
        out = super().forward(x, start)
        self.shown = self.keys[:, :, :8].to(torch.float16), self.keys.to(torch.float16)
        return out


def test_a_cast_of_a_cache_that_is_only_shown_leaves_attention_as_it_is() -> None:
    """Negative twin: the cache keeps its dtype, and so its calls are compiled."""
    torch.manual_seed(0)
    model = Showing(False, torch.float32)
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="kvq", options=OPTIONS | {"inner": "eager"})
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = outputs(model, compiled)
    assert_close(found, outputs(plain, plain))
    assert model.keys.dtype == torch.float32
    assert not any("another dtype" in str(told.message) for told in caught)
