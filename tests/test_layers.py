"""A layer has one number, the model's, in every report and in the option ``layers``."""

import warnings

import pytest
import torch
from torch._dynamo.exc import BackendCompilerFailed
from torch.nn.functional import scaled_dot_product_attention as sdpa

import kvq_compile
from kvq_compile import KVQError, QuantizedKV, report
from kvq_compile.history import watching
from kvq_compile.lowering.find.layers import COUNTED
from refused_steps import EXACT, grown, join

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


class Attention(torch.nn.Module):
    def forward(self, x, caches, layer):
        keys, values = join(*caches[layer], x, x.cos())
        caches[layer] = keys, values
        return sdpa(x, keys, values)


class Mixer(torch.nn.Module):
    """A layer without attention, as hybrids have them."""

    def forward(self, x, caches, layer):
        return x.sin()


class Cross(torch.nn.Module):
    """A layer with two attentions: one over its own tokens, one over those of an encoder."""

    def __init__(self) -> None:
        super().__init__()
        self.own, self.across = Attention(), Attention()

    def forward(self, x, caches, layer):
        return self.across(self.own(x, caches, layer), caches, 10 + layer)


class Model(torch.nn.Module):
    def __init__(self, kinds, breaks=False) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList(kind() for kind in kinds)
        self.breaks = breaks

    def forward(self, x, caches):
        half = len(self.layers) // 2
        for number in range(half):
            x = self.layers[number](x, caches, number)
        if self.breaks:  # not inside the loop: Dynamo would compile each layer alone
            torch._dynamo.graph_break()
        for number in range(half, len(self.layers)):
            x = self.layers[number](x, caches, number)
        return x


def empty_caches() -> dict:
    return {layer: (torch.zeros(2, 2, 0, 16), torch.zeros(2, 2, 0, 16)) for layer in range(20)}


def run(model, calls=2, **options):
    """Compile a model and call it; return the caches and the layers of each graph's sites."""
    model.compile(backend="kvq", options=EXACT | options)
    caches, x = empty_caches(), grown()()[0]
    with torch.no_grad(), watching() as graphs:
        for _ in range(calls):
            model(x, caches)
    return caches, [[(site.layer, site.where) for site in graph.sites] for graph in graphs]


def kinds_of(caches) -> list[bool]:
    return [isinstance(caches[layer][0], QuantizedKV) for layer in range(4)]


@pytest.mark.parametrize("breaks", [False, True])
def test_a_hybrid_numbers_its_layers_as_the_model_does(breaks) -> None:
    model = Model([Mixer, Attention, Mixer, Attention], breaks)
    caches, found = run(model, layers={3: None})
    assert kinds_of(caches) == [False, True, False, False]
    assert {place for graph in found for place in graph} == {(1, "layers.1"), (3, "layers.3")}


def test_layers_compiled_one_by_one_are_told_apart_by_their_cache() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=32,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=2,
        pad_token_id=0,
        eos_token_id=None,
    )
    model = transformers.LlamaForCausalLM(config).eval()
    for layer in model.model.layers:
        layer.compile(backend="kvq", options=EXACT | {"layers": {1: None}, "strict": True})
    cache = transformers.DynamicCache(config=config)
    with torch.no_grad(), watching() as graphs:
        for _ in range(2):
            model(torch.ones(1, 3, dtype=torch.long), past_key_values=cache)
    kinds = [isinstance(layer.keys, QuantizedKV) for layer in cache.layers]
    assert kinds == [True, False, True]
    assert [site.layer for graph in graphs for site in graph.sites] == [0, 1, 2, 0, 1, 2]


def test_self_and_cross_attention_share_a_number_and_have_names_of_their_own() -> None:
    _, found = run(Model([Cross, Cross]))
    assert found[0] == [
        *((0, "layers.0.own"), (0, "layers.0.across")),
        *((1, "layers.1.own"), (1, "layers.1.across")),
    ]


def test_attentions_that_nothing_names_are_counted_and_said_to_be() -> None:
    def step(query, key, value, keys, values):
        keys, values = join(keys, values, key, value)
        return sdpa(query, keys, values), keys, values

    with torch.no_grad(), watching() as graphs:
        torch.compile(step, backend="kvq", options=EXACT)(*grown()())
    (site,) = graphs[0].sites
    assert (site.layer, site.where) == (0, COUNTED)


def test_a_layer_that_no_graph_meets_is_an_error_of_the_first_report_and_of_strict() -> None:
    with watching():
        caches, _ = run(Model([Attention, Attention]), layers={7: None})
    sentence = "layers must name layers of the model, got 7; attentions were met in layers 0 to 1"
    with pytest.raises(KVQError, match=sentence):
        report(list(caches.values())[:2])
    assert report(list(caches.values())[:2]).tokens == 4  # told once
    torch._dynamo.reset()
    with pytest.raises(BackendCompilerFailed, match=sentence.replace("7", "8")):
        run(Model([Attention, Attention]), layers={8: None}, strict=True)


def test_a_layer_behind_a_graph_break_is_no_error_of_strict() -> None:
    caches, _ = run(Model([Attention, Attention], breaks=True), layers={1: None}, strict=True)
    assert kinds_of(caches)[:2] == [True, False]


def test_tokens_appended_outside_compiled_code_are_told() -> None:
    caches, _ = run(Model([Attention]))
    assert "outside" not in str(report(caches[0]))
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Model([Attention])(grown()()[0], caches)
    assert "2 tensors: its last 2 tokens came outside compiled code" in str(report(caches[0]))


def test_explain_prints_no_bound_where_nothing_is_bounded() -> None:
    explanation = kvq_compile.explain(lambda x: torch.softmax(x, -1), torch.ones(2, 3))
    assert explanation.bound is None
