"""Lowering a graph takes work in proportion to its layers: what is asked of a graph is answered once."""

import cProfile
import pstats
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import fx

from kvq_compile import backend
from kvq_compile.lowering.find.arrangements import propose
from kvq_compile.lowering.nodes import order_of, writers_of
from kvq_compile.lowering.pipeline import lower
from kvq_compile.lowering.unchanged import once, remembering, unchanged
from kvq_compile.options import make_spec
from recorded_steps import OPTIONS, Recorder, llama
from thorough import THOROUGH

transformers = pytest.importorskip("transformers")


def graphs_of(layers: int, static: bool) -> list[Callable[[], object]]:
    """Return the lowering of each graph of a prefill and a step."""
    config = transformers.LlamaConfig(
        vocab_size=32, hidden_size=32, intermediate_size=32, num_hidden_layers=layers,
        num_attention_heads=2, num_key_value_heads=1, head_dim=16,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    kept: list[Callable[[], object]] = []

    def keep(gm: fx.GraphModule, inputs: list[torch.Tensor]) -> fx.GraphModule:
        spec = make_spec("tc")
        kept.append(lambda: lower(gm, inputs, spec, record=True))
        return gm

    if static:
        cache = transformers.StaticCache(config=config, max_cache_len=300)
    else:
        cache = transformers.DynamicCache(config=config)
    torch._dynamo.reset()
    call = torch.compile(model, backend=keep)
    with torch.no_grad():
        for tokens in (9, 1):
            call(torch.ones(1, tokens, dtype=torch.int64), past_key_values=cache)
    return kept


def count_calls(run: Callable[[], object], gradients: bool) -> int:
    """Return how many functions are called."""
    with cProfile.Profile() as profile, torch.set_grad_enabled(gradients):
        run()
    calls: int = pstats.Stats(profile).total_calls  # type: ignore[attr-defined]
    return calls


@pytest.mark.long(but=["False-True"])
@pytest.mark.parametrize(
    ("static", "gradients"), [*[(False, False)] * THOROUGH, (True, False), (False, True)]
)
def test_twice_the_layers_take_about_twice_the_calls(static: bool, gradients: bool) -> None:
    """Calls that every pair of layers takes would make it four times; where gradients are recorded, caches are left."""
    few, many = (graphs_of(layers, static) for layers in (4, 8))
    assert len(few) == len(many) > 1
    for one, two in zip(few, many, strict=True):
        count_calls(one, gradients)  # what is imported, and remembered for good
        assert count_calls(two, gradients) < 3 * count_calls(one, gradients)


@torch.no_grad()
def test_so_do_steps_under_a_mask_that_are_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Regression: what writes into a parameter was asked of the whole graph for each of them."""
    Recorder.on_cpu(monkeypatch)
    calls: list[int] = []

    def counted(*args: Any, **options: Any) -> Any:
        with cProfile.Profile() as profile:
            lowered = lower(*args, **options)
        calls.append(pstats.Stats(profile).total_calls)  # type: ignore[attr-defined]
        return lowered

    monkeypatch.setattr(backend, "lower", counted)
    steps = []
    for layers in (1, 4, 8):  # the first for what is imported, and remembered for good
        torch._dynamo.reset()
        model, cache = llama(layers), transformers.DynamicCache()
        model.compile(backend="kvq", options=OPTIONS)
        mask = torch.arange(80)[None] > 0
        for first, end in ((0, 79), (79, 80)):
            ids = torch.ones(1, end - first, dtype=torch.int64)
            model(ids, past_key_values=cache, attention_mask=mask[:, :end])
        steps.append(calls[-1])
    assert steps[2] < 2.3 * steps[1]  # 2.7 then, 2.0 now


def rotated_layers(layers: int) -> fx.Graph:
    """Return the graph of a first call whose layers keep the last tokens of keys and values that they have rotated."""
    kept: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, inputs: list[torch.Tensor]) -> fx.GraphModule:
        kept.append(gm)
        return gm

    def decode(x: torch.Tensor, angles: torch.Tensor, weight: torch.Tensor) -> list[torch.Tensor]:
        cached: list[torch.Tensor] = []
        for _ in range(layers):
            query, key, value = (x @ weight).reshape(1, 9, 3, 2, 16).permute(2, 0, 3, 1, 4)
            query, key = (each * angles + each.flip(-1) * angles.sin() for each in (query, key))
            weights = torch.softmax(query @ key.mT, -1)
            x = x + (weights @ value).transpose(1, 2).reshape(1, 9, 32)
            cached += [key[:, :, -4:], value[:, :, -4:]]
        return [x, *cached]

    torch._dynamo.reset()
    torch.compile(decode, backend=keep)(torch.ones(1, 9, 32), torch.ones(9, 16), torch.ones(32, 96))
    return kept[0].graph


def test_what_layers_have_in_common_is_followed_once() -> None:
    """Regression: angles were followed from each layer to each other one, through all layers between."""
    few, many = map(rotated_layers, (4, 8))
    assert count_calls(lambda: propose(many), False) < 3 * count_calls(lambda: propose(few), False)


def small_graph() -> fx.Graph:
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(graph.call_method("add_", (x, 1)))
    return graph


def test_answers_are_remembered_only_while_the_graph_does_not_change() -> None:
    graph, asked = small_graph(), []

    @once
    def count(subject: fx.Graph, other: object) -> int:
        asked.append(other)
        return len(list(subject.nodes))

    other = object()
    with unchanged(graph):
        assert [count(graph, other), count(graph, other), count(graph, "")] == [3, 3, 3]
        assert asked == [other, ""]
        assert count(small_graph(), other) == 3  # of a graph that may change nothing is remembered
        assert writers_of(graph) is writers_of(graph)
    assert len(asked) == 3
    graph.placeholder("y")
    assert count(graph, other) == 4
    assert order_of(graph) is not order_of(graph)


def test_answers_serve_again_until_the_graph_is_another() -> None:
    graph, asked = small_graph(), []

    @once
    def first_argument(subject: fx.Node) -> object:
        asked.append(subject)
        return subject.args[0]

    x, add, _ = graph.nodes

    def ask() -> object:
        with unchanged(graph):
            return first_argument(add)

    with remembering():
        assert [ask(), ask()] == [x, x]
        assert len(asked) == 1
        with graph.inserting_after(x):
            other = graph.placeholder("y")
        assert [ask(), ask()] == [x, x]
        assert len(asked) == 2
        add.args = (other, 1)  # the same nodes in the same order
        assert [ask(), ask()] == [other, other]
        assert len(asked) == 3
        add.meta["example_value"] = torch.ones(())
        assert ask() is other
        assert len(asked) == 4
    assert ask() is other
    assert len(asked) == 5


def test_a_pass_that_changes_what_it_should_only_look_at_is_found() -> None:
    graph = small_graph()
    with pytest.raises(AssertionError, match="has changed it"), unchanged(graph):
        graph.placeholder("y")
    x, add, *_ = graph.nodes
    with pytest.raises(AssertionError, match="has changed it"), unchanged(graph):
        add.args = (x, 2)
