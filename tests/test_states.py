"""Every cache that a call grows or writes is served, or told by name with the reason; nothing else is."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import conv2d, linear
from torch.nn.functional import scaled_dot_product_attention as sdpa

import kvq_compile
from kvq_compile.errors import KVQError, KVQWarning
from kvq_compile.history import watching

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

OPTIONS = {"method": "int8", "window": 4, "page_size": 32, "inner": "eager"}


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def reports(step: Callable[..., Any], *args: Tensor) -> list[Any]:
    with watching() as graphs, torch.no_grad():
        torch.compile(step, backend="kvq", options=OPTIONS)(*args)
    return [state for graph in graphs for state in graph.states]


def linear_attention(query, key, value, keys, values):
    keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
    return (query @ keys.mT) @ values, keys, values


def latent(query, x, cache, weight):
    cache = torch.cat([cache, x], 1)
    keys = linear(cache, weight).unflatten(2, (2, 32)).transpose(1, 2)
    return sdpa(query, keys, keys), cache


def only_kept(key, keys):
    return torch.cat([keys, key], 2)


def written_and_multiplied(query, key, keys, position):
    keys[:, :, position] = key
    return query @ keys.mT


HEADS_FIRST = [draw(1, 2, count, 32) for count in (3, 3, 3, 40, 40)]
UNSERVED = {
    "latent": (
        latent,
        [draw(1, 2, 3, 32), draw(1, 3, 16), draw(1, 40, 16), draw(64, 16)],
        "3 dimensions",
    ),
    "kept only": (only_kept, [draw(1, 2, 3, 32), draw(1, 2, 40, 32)], "no attention reads it"),
    "written": (
        written_and_multiplied,
        [draw(1, 2, 3, 32), draw(1, 2, 3, 32), draw(1, 2, 40, 32), torch.arange(5, 8)],
        "no softmax attention",
    ),
}


@pytest.mark.parametrize("name", list(UNSERVED))
def test_a_cache_that_is_not_served_is_told_by_name(name: str) -> None:
    step, args, reason = UNSERVED[name]
    with pytest.warns(KVQWarning):
        states = reports(step, *args)
    assert states
    assert all(state.outcome == "left alone" for state in states)
    assert all(reason in state.detail for state in states), states
    assert {state.name for state in states} <= {"L['keys']", "L['values']", "L['cache']"}


@pytest.mark.parametrize("name", list(UNSERVED))
def test_a_cache_that_is_not_served_ends_a_strict_compilation(name: str) -> None:
    step, args, _ = UNSERVED[name]
    run = torch.compile(step, backend="kvq", options={**OPTIONS, "strict": True})
    with torch.no_grad(), pytest.raises(Exception, match=KVQError.__name__):
        run(*args)


def feature_maps(x, skip, weight):
    joined = torch.cat([skip, x], 1)
    return conv2d(joined, weight), joined


def hidden_states(x, prefix, weight):
    joined = torch.cat([prefix, x], 1)
    return linear(joined, weight), joined


def running_mean(x, mean):
    mean.mul_(0.9).add_(x.mean(0), alpha=0.1)
    return x - mean


def filled_in(x, buffer):
    buffer[:, :1] = x[:, :1]
    return conv2d(buffer, x[:1, :, :1, :1])


def stacked_images(x, weight):
    return torch.cat([x, conv2d(x, weight, padding=1)], 2)


def rows_of_an_image(x, image, weight):
    image[:, :, :1] = x
    return conv2d(image, weight)


def handed_back(x):
    return x, x * 2


def attention_of_its_own_tokens(query, key, value):
    return sdpa(query * 2, key * 2, value * 2)


NO_CACHES = {
    "feature maps": (feature_maps, [draw(1, 4, 8, 8), draw(1, 2, 8, 8), draw(3, 6, 1, 1)]),
    "hidden states": (hidden_states, [draw(1, 5, 16), draw(1, 3, 16), draw(8, 16)]),
    "running mean": (running_mean, [draw(5, 1, 4, 1, 1), draw(1, 4, 1, 1)]),
    "activation filled in": (filled_in, [draw(1, 4, 8, 8), draw(1, 4, 8, 8)]),
    "images joined along their height": (stacked_images, [draw(2, 3, 8, 8), draw(3, 3, 3, 3)]),
    "image filled in by rows": (
        rows_of_an_image,
        [draw(2, 3, 1, 8), draw(2, 3, 8, 8), draw(3, 3, 3, 3)],
    ),
    "handed back": (handed_back, [draw(1, 2, 3, 32)]),
    "no cache": (attention_of_its_own_tokens, [draw(1, 2, 3, 32) for _ in range(3)]),
}


@pytest.mark.parametrize("name", list(NO_CACHES))
def test_what_is_no_cache_is_not_told(name: str) -> None:
    step, args = NO_CACHES[name]
    assert reports(step, *args) == []


def test_a_cache_that_nothing_in_the_graph_reads_is_told() -> None:
    """A graph break may stand between growth and attention; only what reads images shows that it is none."""

    def step(keys, key):
        return torch.cat([keys, key], 2)

    with pytest.warns(KVQWarning, match="no attention reads it"):
        (state,) = reports(step, draw(1, 2, 40, 32), draw(1, 2, 1, 32))
    assert "no attention reads it" in state.detail


def test_keys_and_values_of_one_attention_are_refused_for_one_reason() -> None:
    def step(query, key, value, keys, values):
        keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        weights = torch.softmax(torch.erf(query @ keys.mT), -1).to(values.dtype)
        return weights @ values, keys, values

    with pytest.warns(KVQWarning, match="erf"):
        states = reports(step, *HEADS_FIRST)
    assert {state.detail for state in states} == {"the scores pass through erf before the softmax"}


def test_what_is_served_is_reported_as_such() -> None:
    def step(query, key, value, keys, values):
        keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        return sdpa(query, keys, values), keys, values

    states = reports(step, *HEADS_FIRST)
    assert [(state.name, state.outcome) for state in states] == [
        ("L['keys']", "quantized"),
        ("L['values']", "quantized"),
    ]


def test_an_explanation_names_the_caches_that_are_not_served() -> None:
    step, args, reason = UNSERVED["latent"]
    with torch.no_grad():
        explained = str(kvq_compile.explain(step, *args, options=OPTIONS))
    assert "L['cache'] [1, 40, 16]" in explained
    assert reason in " ".join(explained.split())
