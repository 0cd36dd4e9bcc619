"""Ways to generate and to compile, each against the same model without a cache that is quantized.

Beams that form groups and contrastive search are programs of their own since transformers 5, which call what is
called here: rows of a cache are reordered, repeated, selected and cut.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import settings

transformers = pytest.importorskip("transformers")

from transformers import DynamicCache, StaticCache

from kvq_compile import KVQWarning, QuantizedKV
from kvq_compile.history import watching
from small_llama import EXACT, PACKED, TOLERANCE, generate, make_model, text

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

MANY = pytest.mark.skipif(settings().max_examples < 100, reason="many graphs: the thorough profile")


def both(act: Callable[[Any], Any], options: Any = EXACT, **shape: Any) -> list[Any]:
    """Return what is done with a model, and with the same one compiled."""
    plain, compiled = make_model(**shape), make_model(**shape)
    compiled.compile(backend="kvq", options=options)
    return [act(plain), act(compiled)]


# Ways to generate


class Streamer:
    def __init__(self) -> None:
        self.tokens: list[int] = []

    def put(self, tokens: torch.Tensor) -> None:
        self.tokens += tokens.flatten().tolist()

    def end(self) -> None:
        self.tokens.append(-1)


def test_what_is_streamed_is_what_is_returned() -> None:
    model, streamer = make_model(), Streamer()
    expected = generate(model, text(11)).sequences
    model.compile(backend="kvq", options=EXACT)
    assert torch.equal(generate(model, text(11), streamer=streamer).sequences, expected)
    assert streamer.tokens == [*expected.flatten().tolist(), -1]


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_returned_cache_is_continued_by_another_text(kind: str) -> None:
    def converse(model: Any) -> Any:
        made = {
            "dynamic": lambda: DynamicCache(config=model.config),
            "static": lambda: StaticCache(config=model.config, max_cache_len=64),
        }
        first = generate(model, text(20), past_key_values=made[kind]())
        said = torch.cat([first.sequences, text(7, seed=4)], 1)
        return generate(model, said, past_key_values=first.past_key_values)

    ours, theirs = reversed(both(converse))
    assert torch.equal(ours.sequences, theirs.sequences)
    assert all(isinstance(layer.keys, QuantizedKV) for layer in ours.past_key_values.layers)


@torch.no_grad()
def test_contrastive_search_finds_the_same_tokens() -> None:
    """Rows are repeated for candidates, one row is selected, and steps see the hidden states."""

    def search(model: Any, top: int = 3, penalty: float = 0.6) -> list[int]:
        cache, found = DynamicCache(config=model.config), []
        seen = model(text(17), past_key_values=cache, output_hidden_states=True)
        logits, states = seen.logits[:, -1], seen.hidden_states[-1]
        for _ in range(5):
            likely, tokens = logits.softmax(-1).topk(top)
            cache.batch_repeat_interleave(top)
            seen = model(tokens.T, past_key_values=cache, output_hidden_states=True)
            own = seen.hidden_states[-1]
            alike = F.cosine_similarity(states.expand(top, -1, -1), own, dim=-1).amax(1)
            best = ((1 - penalty) * likely[0] - penalty * alike).argmax()
            cache.batch_select_indices(best[None])
            logits, states = seen.logits[best][None, -1], torch.cat([states, own[best][None]], 1)
            found.append(int(tokens[0, best]))
        return found

    plain, ours = both(search)
    assert plain == ours


@pytest.mark.long
def test_a_model_that_drafts_for_itself_takes_its_own_tokens() -> None:
    def draft(model: Any) -> torch.Tensor:
        return generate(model, text(9), assistant_early_exit=1).sequences

    try:
        draft(make_model(layers=2))
    except TypeError as error:  # of transformers 5.0
        pytest.skip(f"this transformers cannot draft with its own layers: {error}")
    plain, ours = both(draft, layers=2)
    assert torch.equal(plain, ours)


@torch.no_grad()
def test_a_cache_that_is_moved_to_another_device_stays_in_16_bit_and_is_told() -> None:
    """As an offloaded cache is: its layers go to the CPU when they were attended to."""

    def step(query: Any, key: Any, value: Any) -> Any:
        output = F.scaled_dot_product_attention(query, key, value)
        return output, key.to("meta"), value.to("meta")

    new = torch.randn(3, 1, 2, 40, 16)
    with pytest.warns(KVQWarning, match="an offloaded cache.*take a cache that is not offloaded"):
        output, *cache = torch.compile(step, backend="kvq", options=EXACT)(*new)
    assert torch.equal(output, F.scaled_dot_product_attention(*new))
    assert not any(isinstance(x, QuantizedKV) for x in cache)


# Padding


@torch.no_grad()
def test_padding_on_the_right_is_not_attended_to() -> None:
    """The prompt is padded behind its rows; steps hide it by the mask."""
    ids, mask = text(40, batch=2), torch.ones(2, 46, dtype=torch.int64)
    mask[1, 30:40] = 0
    positions = (mask.cumsum(1) - 1).clamp_min(0)

    def feed(model: Any) -> torch.Tensor:
        cache, logits = DynamicCache(config=model.config), []
        more = torch.cat([ids, text(6, batch=2, seed=1)], 1)
        for part in (slice(0, 40), slice(40, 41), slice(41, 46)):
            about = {"attention_mask": mask[:, : part.stop], "position_ids": positions[:, part]}
            logits.append(model(more[:, part], past_key_values=cache, **about).logits)
        return torch.cat(logits, 1)[mask.bool()]

    plain, ours = both(feed, PACKED)
    assert float((plain - ours).abs().max() / plain.abs().max()) <= TOLERANCE


@torch.no_grad()
def test_texts_packed_into_one_row_do_not_see_each_other() -> None:
    """The second text goes on after the call, and its tokens see no other one."""
    lengths, more = (33, 21), 5
    row = torch.repeat_interleave(torch.arange(2), torch.tensor([33, 21 + more]))
    seen = (row[:, None] == row) & torch.ones(len(row), len(row), dtype=torch.bool).tril()
    positions = torch.cat([torch.arange(33), torch.arange(21 + more)])[None]
    ids = text(sum(lengths) + more)

    def feed(model: Any) -> torch.Tensor:
        cache, logits = DynamicCache(config=model.config), []
        for part in (slice(0, 54), slice(54, 55), slice(55, 59)):
            about = {
                "attention_mask": seen[None, None, part, : part.stop],
                "position_ids": positions[:, part],
            }
            logits.append(model(ids[:, part], past_key_values=cache, **about).logits)
        return torch.cat(logits, 1)

    plain, ours = both(feed, PACKED)
    alone = make_model()(ids[:, 33:]).logits
    torch.testing.assert_close(plain[:, 33:], alone)
    assert float((plain - ours).abs().max() / plain.abs().max()) <= TOLERANCE


# Ways to compile


@pytest.mark.parametrize(
    ("way", "window"),
    [
        ({"fullgraph": True}, None),
        ({"dynamic": True}, 16),
        pytest.param({"dynamic": True}, None, marks=MANY),
        pytest.param({"fullgraph": True}, 16, marks=MANY),
    ],
)
def test_a_way_to_compile_takes_the_same_tokens(way: dict[str, Any], window: int | None) -> None:
    """Regression: with ``dynamic=True`` a window's size is a symbol, whose sign was not known: nothing was cut off."""
    expected = generate(make_model(window), text(11), max_new_tokens=12).sequences
    model = make_model(window)
    model.compile(backend="kvq", options=EXACT, **way)
    assert torch.equal(generate(model, text(11), max_new_tokens=12).sequences, expected)


def test_a_ring_whose_size_is_a_symbol_is_made_packed() -> None:
    """Regression: the room of a ring was computed of a node of the graph, and the prompt ran in 16 bit."""
    model = make_model(window=72)
    model.compile(backend="kvq", options=PACKED, dynamic=True)
    with watching() as graphs, torch.no_grad():
        model(text(80), past_key_values=StaticCache(config=model.config, max_cache_len=128))
    assert [site.outcome for graph in graphs for site in graph.sites] == ["rewritten"]
