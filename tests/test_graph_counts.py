"""No more graphs are made than by a backend that does nothing, whatever the cache and the way to generate."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch

transformers = pytest.importorskip("transformers")

from transformers import Llama4TextConfig

from kvq_compile import KVQWarning
from kvq_compile.history import watching
from small_llama import EXACT, PACKED, generate, make_model, text
from thorough import THOROUGH

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

STATIC = {"cache_implementation": "static"}


class Graphs:
    """A backend that does nothing but count."""

    count = 0

    def __call__(self, gm: Any, inputs: Any) -> Any:
        self.count += 1
        return gm.forward


@dataclass(frozen=True)
class Run:
    """What is done with a model.

    Attributes:
        act: Takes the model.
        window: Its window; ``None`` for none.
        chunk: Its chunks, in one of two layers; ``None`` for none.
        more: How many graphs more than nothing it may take.
        quick: Whether the quick profile runs it.
    """

    act: Callable[[Any], Any]
    window: int | None = None
    chunk: int | None = None
    more: int = 0
    quick: bool = False

    def model(self) -> Any:
        """Return a new model."""
        return make_model(self.window) if self.chunk is None else make_chunked(self.chunk)


def make_chunked(chunk: int) -> Any:
    """Return a Llama 4, one layer of which attends within chunks."""
    torch.manual_seed(0)
    config = Llama4TextConfig(
        vocab_size=64, hidden_size=64, intermediate_size=64, intermediate_size_mlp=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_local_experts=2, moe_layers=[],
        max_position_embeddings=512, attention_chunk_size=chunk, no_rope_layers=[1, 0],
        layer_types=["chunked_attention", "full_attention"],
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).eval()


def padded(model: Any, prompt: torch.Tensor, **options: Any) -> Any:
    """Generate for two rows, the second of which is padded on the left."""
    mask = torch.ones_like(prompt).repeat(2, 1)
    mask[1, : prompt.shape[1] // 4] = 0
    settings = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0} | options
    return model.generate(prompt.repeat(2, 1), attention_mask=mask, **settings)


def each(act: Callable[..., Any], lengths: tuple[int, ...], **options: Any) -> Callable[[Any], Any]:
    """Return what generates for prompts of some lengths, one after the other."""
    return lambda model: [act(model, text(length), **options) for length in lengths]


def compiled_by_nothing(run: Run) -> int:
    """Return how many graphs are made for what is done with a model."""
    torch._dynamo.reset()
    model, graphs = run.model(), Graphs()
    model.compile(backend=graphs)
    run.act(model)
    torch._dynamo.reset()
    return graphs.count


RUNS: dict[str, Run] = {
    "one generation": Run(each(generate, (11,)), quick=True),
    "three lengths": Run(each(generate, (40, 43, 50))),
    "beams": Run(each(generate, (11,), num_beams=3)),
    "a static cache, twice": Run(each(generate, (40, 40), **STATIC), quick=True),
    "static caches of three sizes": Run(each(generate, (40, 43, 50), **STATIC)),
    "a window that fills": Run(each(generate, (66,), max_new_tokens=12), window=72),
    "a window that is full": Run(each(generate, (90,)), window=72, quick=True),
    # A static cache that is rolled for the first time gets room for tokens out of sight: a tensor of another size and
    # kind. The graph of that call is run once and not compiled.
    "a static window that fills, twice": Run(
        each(generate, (11, 11), max_new_tokens=12, **STATIC), window=16, more=1
    ),
    "a static window that is full, twice": Run(each(generate, (90, 90), **STATIC), window=72),
    "rows padded on the left": Run(each(padded, (40, 43))),
    "rows padded on the left, static": Run(each(padded, (40, 40), **STATIC), quick=True),
    "rows padded on the left, a window": Run(each(padded, (90,)), window=72),
    "rows padded on the left, a static window": Run(each(padded, (90,), **STATIC), window=72),
    "chunks that fill": Run(each(generate, (40,), max_new_tokens=12), chunk=48),
    "chunks that are full": Run(each(generate, (90,)), chunk=72, quick=True),
    "static chunks that fill": Run(
        each(generate, (40,), max_new_tokens=12, **STATIC), chunk=48, more=1
    ),
    "static chunks that are full, twice": Run(each(generate, (90, 90), **STATIC), chunk=72),
}


@pytest.mark.long(
    but=["one generation", "a static cache, twice", "rows padded on the left, static"]
)
@pytest.mark.parametrize("name", [name for name, run in RUNS.items() if run.quick or THOROUGH])
def test_no_more_graphs_are_made_than_by_a_backend_that_does_nothing(name: str) -> None:
    run = RUNS[name]
    most = compiled_by_nothing(run) + run.more
    model = run.model()
    model.compile(backend="kvq", options=PACKED)
    with watching() as graphs:
        run.act(model)
    assert 0 < len(graphs) <= most
    assert any(site.outcome == "rewritten" for graph in graphs for site in graph.sites)


def test_layers_that_are_compiled_one_by_one_take_no_more_graphs_than_plain_ones() -> None:
    def generations(backend: Any, **more: Any) -> torch.Tensor:
        torch._dynamo.reset()
        model = make_model(layers=2)
        for layer in model.model.layers:
            layer.compile(backend=backend, **more)
        return torch.cat([generate(model, text(n)).sequences for n in (11, 11)])

    plain = Graphs()
    expected = generations(plain)
    with watching() as graphs:
        assert torch.equal(generations("kvq", options=EXACT), expected)
    assert all(site.outcome == "rewritten" for graph in graphs for site in graph.sites)
    assert len(graphs) <= plain.count


def test_no_graph_is_made_for_a_token_for_a_length_after_the_second_or_for_a_cache() -> None:
    model, counts = make_model(), []
    model.compile(backend="kvq", options=PACKED)
    for length, tokens in ((40, 3), (47, 60), (61, 3), (90, 9), (40, 3)):
        with watching() as graphs:
            generate(model, text(length), max_new_tokens=tokens)
        counts.append(len(graphs))
    assert counts == [2, 1, 0, 0, 0]


def test_no_graph_is_made_for_a_token_where_a_cache_of_three_axes_is_left_alone() -> None:
    """Regression: its tokens were taken for caches beside each other, and their number was guarded on."""

    def step(query, new, held, weight):
        kept = [torch.cat(pair, 1) for pair in zip(held, new.split((24, 8), 2), strict=True)]
        made = (kept[0] @ weight).unflatten(2, (4, 32)).transpose(1, 2)
        shared = kept[1][:, None].expand(-1, 4, -1, -1)
        keys = torch.cat([made[..., :16], shared], 3)
        return torch.nn.functional.scaled_dot_product_attention(query, keys, made[..., 16:]), kept

    def steps(compiled: Any) -> None:
        torch._dynamo.reset()
        held = [torch.ones(2, 50, 24), torch.ones(2, 50, 8)]
        for _ in range(6):
            new = torch.ones(2, 1, 32)
            _, held = compiled(torch.ones(2, 4, 1, 24), new, held, torch.ones(24, 128))

    plain = Graphs()
    steps(torch.compile(step, backend=plain))
    with pytest.warns(KVQWarning), watching() as graphs:
        steps(torch.compile(step, backend="kvq", options=EXACT))
    assert len(graphs) == plain.count
