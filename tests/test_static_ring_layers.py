"""A static layer of transformers attends to its own ring, whether that is empty, becomes full or has wrapped."""

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvq_compile import KVQWarning, QuantizedKV, backend
from kvq_compile.history import watching
from kvq_compile.kernels.packed import room_of
from kvq_compile.testing import assert_matches_dequantized
from refused_steps import tokens
from static_rings import OPTIONS, SLOTS
from thorough import few

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Layer:
    """The static layer of transformers, as far as a graph sees it."""

    def __init__(self, slots: int = SLOTS, keys=None, values=None) -> None:
        self.keys = torch.zeros(2, 2, slots, 16) if keys is None else keys
        self.values = torch.zeros(2, 2, slots, 16) if values is None else values
        self.slots, self.held = slots, 0
        self.length = torch.tensor(0)

    def update(self, key, value):
        tokens, slots, held = key.shape[2], self.slots, self.held
        self.held += tokens
        if held >= slots and tokens == 1:
            keys, values = self.keys.roll(-1, dims=-2), self.values.roll(-1, dims=-2)
            index = torch.tensor([-1])
            keys[:, :, index], values[:, :, index] = key, value
            self.keys.copy_(keys)
            self.values.copy_(values)
            return self.keys, self.values
        if held >= slots:
            keys = torch.cat((self.keys[:, :, 1:, :], key), dim=-2)
            values = torch.cat((self.values[:, :, 1:, :], value), dim=-2)
        elif held + tokens > slots and held:
            keys = torch.cat((self.keys[:, :, :held, :], key), dim=-2)
            values = torch.cat((self.values[:, :, :held, :], value), dim=-2)
        elif held + tokens > slots:
            keys, values = key, value
        else:
            position = torch.arange(tokens) + self.length
            self.keys.index_copy_(2, position, key)
            self.values.index_copy_(2, position, value)
            self.length.add_(tokens)
            return self.keys, self.values
        self.keys.copy_(keys[:, :, -slots:, :])
        self.values.copy_(values[:, :, -slots:, :])
        return keys, values


def columns_of(slots: int, held: int, new: int) -> int:
    """Return how many keys an attention over a `Layer` reads."""
    full = slots + new - 1 if held >= slots else held + new
    return full if held + new > slots else slots


def mask_of(slots: int, held: int, new: int, padding: tuple[int, ...] = (0, 0)) -> torch.Tensor:
    """Return which columns each query of a `Layer` sees: those of its window that are no padding."""
    columns = columns_of(slots, held, new)
    first = max(held + new - columns, 0)
    places = torch.arange(first, first + columns)
    asked = torch.arange(held, held + new)[:, None]
    seen = (places <= asked) & (places > asked - slots)
    return (seen & (places >= torch.tensor(padding)[:, None, None, None])) | (places == asked)


def make_step(bent: bool = False):
    def step(query, key, value, layer, mask):
        keys, values = layer.update(key, value)
        if bent:
            scores = (query @ keys.mT * 0.25).atan()
            scores = scores.masked_fill(~mask, torch.finfo(torch.float32).min)
            return torch.softmax(scores, -1) @ values
        return sdpa(query, keys, values, attn_mask=mask)

    return step


def packed(layer: Layer):
    """Return copies of the caches of a layer; ``None`` before they are packed."""
    quantized = isinstance(layer.keys, QuantizedKV)
    return (layer.keys.clone(), layer.values.clone()) if quantized else None


def assert_reads_its_own_cache(output, given, layer, before, held, mask) -> None:
    """The output is that over what the caches held before the call, dequantized."""
    query, key, value = given
    new, slots = key.shape[2], layer.slots
    shown = min(held, slots)
    columns = min(columns_of(slots, held, new), shown + new)
    full = torch.nn.functional.pad(mask[..., :columns], (shown + new - columns, 0), value=False)
    exact = layer.plain if before is None else (key, value)
    mask = mask[..., : exact[0].shape[2]] if before is None else full
    assert_matches_dequantized(output, query, *exact, before, mask=mask)


@settings(max_examples=few(5), phases=set(Phase) - {Phase.shrink, Phase.explain})
@given(
    slots=st.integers(39, 90),
    prompt=st.integers(1, 120),
    more=st.lists(st.sampled_from((1, 1, 1, 5, 33, 100)), min_size=4, max_size=9),
    padding=st.sampled_from(((0, 0), (3, 0), (0, 30))),
    additive=st.booleans(),
)
def test_a_decoder_attends_to_its_own_ring(slots, prompt, more, padding, additive) -> None:
    """The output is that over the dequantized cache, whether it is empty, becomes full or has wrapped."""
    torch._dynamo.reset()
    compiled = torch.compile(make_step(), backend="kvq", options=OPTIONS | {"inner": "eager"})
    many = torch._dynamo.config.patch(recompile_limit=64)
    layer, twin, position = Layer(slots), Layer(slots), 0
    query, key, value = (tokens(prompt + sum(more), seed=s) for s in range(3))
    with many, torch.no_grad(), watching() as graphs:
        for new in (prompt, *more):
            now = slice(position, position + new)
            given = tuple(x[:, :, now] for x in (query, key, value))
            mask = mask_of(slots, position, new, padding)
            bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
            before = packed(layer)
            layer.plain = [x.clone() for x in twin.update(*given[1:])]
            output = compiled(*given, layer, bias if additive else mask)
            about = given, layer, before, position, mask
            assert_reads_its_own_cache(output, *about)
            position += new
    assert all(isinstance(x, QuantizedKV) for x in (layer.keys, layer.values))
    assert all(site.outcome == "rewritten" for graph in graphs for site in graph.sites)


@pytest.mark.parametrize("new", [1, 5, 100])
def test_a_ring_that_is_read_packed_is_not_dequantized(new, monkeypatch) -> None:
    """Regression: a cut of the joined tokens that nobody read kept a dense copy of the ring in the graph."""
    graphs = []
    monkeypatch.setattr(
        backend, "_compile_inner", lambda module, *_: graphs.append(module) or module
    )
    compiled = torch.compile(make_step(), backend="kvq", options=OPTIONS | {"inner": "eager"})
    layer, position = Layer(), 0
    with torch.no_grad():
        for number, tokens_now in enumerate((SLOTS - 3, 3, new, new, new)):
            query, key, value = (tokens(tokens_now, seed=s + number) for s in range(3))
            mask = mask_of(SLOTS, position, tokens_now)
            compiled(query, key, value, layer, mask)
            position += tokens_now
    called = {str(node.target) for graph in graphs for node in graph.graph.nodes}
    assert "kvq.attend.default" in called
    assert "kvq.dequantize.default" not in called


@pytest.mark.long(but=["tc-eager", "int4-eager", "kivi-eager", "qaq-eager", "int4-inductor"])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("method", ["tc", "kivi", "qaq", "int4"])
def test_every_method_serves_a_ring(method, inner) -> None:
    options = {"method": method, "sinks": 2, "window": 4, "page_size": 32, "inner": inner}
    compiled = torch.compile(make_step(), backend="kvq", options=options)
    layer, position = Layer(60), 0
    with torch.no_grad(), watching() as graphs:
        for number, new in enumerate((50, 8, *(1,) * 100)):
            query, key, value = (tokens(new, seed=s + number) for s in range(3))
            mask = mask_of(60, position, new)
            before = packed(layer)
            if before is None:
                layer.plain = key, value
            output = compiled(query, key, value, layer, mask)
            about = (query, key, value), layer, before, position, mask
            assert_reads_its_own_cache(output, *about)
            position += new
    assert all(isinstance(x, QuantizedKV) and x.shape[2] == 60 for x in (layer.keys, layer.values))
    assert all(x.kind == "ring" for x in (layer.keys, layer.values))
    assert {site.outcome for graph in graphs for site in graph.sites} == {"rewritten"}
    assert room_of(layer.keys.parts, layer.keys.page_layout) <= 60 + 60 // 8 + 1 + 3 * 36


def dense_twin(layer: Layer, held: int) -> Layer:
    """Return the same layer with its tokens dequantized."""
    caches = layer.keys, layer.values
    dense = [x.dequantize() if isinstance(x, QuantizedKV) else x.clone() for x in caches]
    twin = Layer(layer.slots, *dense)
    twin.held, twin.length = held, torch.tensor(held)
    return twin


def test_a_refused_attention_reads_a_ring_dense_and_keeps_it_packed() -> None:
    step = make_step(bent=True)
    compiled = torch.compile(step, backend="kvq", options=OPTIONS | {"inner": "eager"})
    layer, position = Layer(60), 0
    dense = pytest.warns(KVQWarning, match="read their caches dense")
    with torch.no_grad(), watching() as graphs, dense:
        for number, new in enumerate((50, 15, *(1,) * 90, 20, 70, 1)):
            query, key, value = (tokens(new, seed=s + number) for s in range(3))
            mask = mask_of(60, position, new)
            expected = step(query, key, value, dense_twin(layer, position), mask)
            output = compiled(query, key, value, layer, mask)
            torch.testing.assert_close(output, expected)
            position += new
            last = layer.keys.dequantize()[:, :, min(position, 60) - 1]
            assert torch.equal(last, key[:, :, -1])
    assert all(x.kind == "ring" for x in (layer.keys, layer.values))
    told = {site.outcome for graph in graphs for site in graph.sites}
    assert told == {"stored quantized, read dense"}
