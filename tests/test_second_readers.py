"""A static cache that something else reads, too: attention reads it packed, the other an ordinary tensor."""

import copy
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvq_compile.history import watching
from kvq_compile.kernels.cache.arranged import ArrangedKV
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.lowering.runtime import NOT_EMPTY
from refused_steps import (
    assert_read_dense,
    assert_rewritten,
    buffers,
)

pytestmark = pytest.mark.usefixtures("fresh_dynamo")
OPTIONS = {"method": "int8", "sinks": 2, "window": 8, "page_size": 32, "inner": "eager"}
SLOTS = 128


class Attention(nn.Module):
    """Two heads of 16 channels over buffers of 128 positions."""

    def __init__(self, tokens_first: bool = False, by_row: bool = False) -> None:
        super().__init__()
        self.project, self.gate = nn.Linear(32, 96, bias=False), nn.Linear(32, 2)
        self.tokens_first, self.by_row = tokens_first, by_row
        shape = (2, SLOTS, 2, 16) if tokens_first else (2, 2, SLOTS, 16)
        self.keys, self.values = torch.zeros(shape), torch.zeros(shape)

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        query, key, value = self.project(x).view(2, -1, 3, 2, 16).unbind(2)
        for cache, new in ((self.keys, key), (self.values, value)):
            if self.tokens_first:
                cache.index_copy_(1, at, new)
            elif self.by_row:
                cache.scatter_(2, at[:, None, :, None].expand(2, 2, -1, 16), new.transpose(1, 2))
            else:
                cache.index_copy_(2, at, new.transpose(1, 2))
        keys, values = (
            cache.transpose(1, 2) if self.tokens_first else cache
            for cache in (self.keys, self.values)
        )
        seen = torch.arange(SLOTS) <= (at[:, None, :, None] if self.by_row else at[:, None])
        return self.attend(query.transpose(1, 2), keys, values, seen).transpose(1, 2).flatten(2)

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        raise NotImplementedError


class MaskOfValues(Attention):
    """A bias of each key is made of its values, as Doge does."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        bias = self.gate(values.transpose(1, 2).flatten(2)).transpose(1, 2).tanh()
        return sdpa(query, keys, values, bias[:, :, None].masked_fill(~seen, -1e9))


class MeansOfBoth(Attention):
    """What is read behind the attention sees the call's tokens, too."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        out = sdpa(query, keys, values, seen)
        return out + keys.mean(2, keepdim=True) + values.amax(2, keepdim=True)


def outputs(forward: nn.Module, by_row: bool = False) -> Tensor:
    drawn, start, found = torch.Generator().manual_seed(0), 0, []
    with torch.no_grad():
        for tokens in (60, 1, 1, 9):
            x = torch.randn(2, tokens, 32, generator=drawn)
            at = torch.arange(start, start + tokens)
            found.append(forward(x, at.repeat(2, 1) if by_row else at))
            start += tokens
    return torch.cat(found, 1)


def assert_close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0.01 * float(expected.abs().max()))


@pytest.mark.parametrize("kind", [MaskOfValues, MeansOfBoth])
@pytest.mark.parametrize("about", ["", "tokens_first", "by_row"])
def test_attention_reads_packed_what_another_reads_dense(kind: type[Attention], about: str) -> None:
    torch.manual_seed(0)
    model = kind(**{about: True}) if about else kind()
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="kvq", options=OPTIONS)
    with watching() as graphs:
        found = outputs(compiled, model.by_row)
    assert_close(found, outputs(plain, model.by_row))
    sites = [site for graph in graphs for site in graph.sites]
    assert {site.outcome for site in sites} == {"rewritten"}
    assert all("which something else reads dense" in site.detail for site in sites)
    for cache in (model.keys, model.values):
        assert isinstance(cache, ArrangedKV if about == "tokens_first" else QuantizedKV)


def test_going_back_shows_the_other_reader_what_is_behind() -> None:
    """Negative twin: no mask hides that from it, so that the cache becomes an ordinary tensor, told."""
    torch.manual_seed(0)
    model = MeansOfBoth()
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="kvq", options=OPTIONS)
    drawn = torch.Generator().manual_seed(0)
    with torch.no_grad(), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for first, tokens in ((0, 60), (60, 1), (40, 1)):
            x, at = torch.randn(2, tokens, 32, generator=drawn), torch.arange(first, first + tokens)
            assert_close(compiled(x, at), plain(x, at))
    assert type(model.values) is Tensor
    assert len(caught) > 0


def test_what_is_behind_the_tokens_of_a_buffer_is_not_lost_to_the_other_reader() -> None:
    """Negative twin: attention hides it, the other does not, and packed memory would not hold it."""
    torch.manual_seed(0)
    model = MeansOfBoth()
    model.values[:, :, 100] = 3.0
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="kvq", options=OPTIONS)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert_close(outputs(compiled), outputs(plain))
    assert type(model.values) is Tensor
    assert any(NOT_EMPTY in str(told.message) for told in caught)


@pytest.mark.parametrize("quantized", [False, True])
def test_several_writes_of_a_call_are_each_seen_by_the_readers_behind_them(quantized: bool) -> None:
    def step(query, key, value, keys, values, position, mask):
        total = 0
        for token in range(2):
            at = position[token : token + 1]
            keys.index_copy_(2, at, key[:, :, token : token + 1])
            values.index_copy_(2, at, value[:, :, token : token + 1])
            row = query[:, :, token : token + 1]
            total = total + values.mean() + sdpa(row, keys, values, mask[token : token + 1])
        return total

    first = 4 if quantized else 0
    assert_rewritten(step, buffers(first, new=2, quantized=quantized))


def test_a_reader_in_front_of_the_write_is_none_of_these() -> None:
    """Negative twin: it sees the cache as it was."""

    def step(query, key, value, keys, values, position, mask):
        before = values.mean()
        keys.index_copy_(2, position, key)
        values.index_copy_(2, position, value)
        return sdpa(query, keys, values, attn_mask=mask) + before

    assert_read_dense(step, buffers(4, quantized=True), "the cache is read before it is written")


class Doubling(Attention):
    """Values change between their write and the attention."""

    def attend(self, query: Tensor, keys: Tensor, values: Tensor, seen: Tensor) -> Tensor:
        values.mul_(2.0)
        return sdpa(query, keys, values, seen)


def test_a_reader_that_writes_into_the_cache_is_refused() -> None:
    """Negative twin: what it writes is no token."""
    torch.manual_seed(0)
    model = Doubling()
    plain = copy.deepcopy(model)
    compiled = torch.compile(model, backend="kvq", options=OPTIONS)
    with warnings.catch_warnings(record=True) as caught, watching() as graphs:
        warnings.simplefilter("always")
        assert_close(outputs(compiled), outputs(plain))
    assert not any(site.outcome == "rewritten" for graph in graphs for site in graph.sites)
    assert any("mul_ writes L['self'].values" in str(told.message) for told in caught)
    assert type(model.values) is Tensor
