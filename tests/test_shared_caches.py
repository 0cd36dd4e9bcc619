"""Several attentions read one cache packed, and keys that are scaled as they are read; what only looks alike is not."""

from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

from layout_steps import D, G, H, Step, attend, buffers, compared, empty, nothing

pytestmark = pytest.mark.usefixtures("fresh_dynamo")


def written(key, value, held, position):
    held[0][:, position], held[1][:, position] = key, value
    return held


def in_two_chunks(query, key, value, held, position, mask):
    held = written(key, value, held, position)
    middle = query.shape[1] // 2
    parts = (slice(0, middle), slice(middle, None)) if middle else (slice(None),)
    return torch.cat([attend(query[:, own], *held, mask[own]) for own in parts], 1), held


def each_head_alone(query, key, value, held, position, mask):
    held = written(key, value, held, position)
    outputs = []
    for head in range(H * G):
        keys, values = (x[:, :, head // G] for x in held)
        scores = (query[:, :, head] @ keys.mT * 0.25).masked_fill(~mask, -torch.inf)
        outputs.append(scores.softmax(-1) @ values)
    return torch.stack(outputs, 2), held


def each_head_of_scaled_keys(query, key, value, held, position, mask):
    """Its factor goes to the queries of four products."""
    held = written(key, value, held, position)
    keys, values = (held[0] * 0.25).transpose(1, 2), held[1].transpose(1, 2)
    outputs = []
    for head in range(H * G):
        scores = query[:, :, head] @ keys[:, head // G].mT
        weights = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        outputs.append(weights @ values[:, head // G])
    return torch.stack(outputs, 2), held


def grown_and_read_twice(query, key, value, held, position, mask):
    if held is not None:
        key, value = torch.cat([held[0], key], 1), torch.cat([held[1], value], 1)
    else:
        key, value = key * 1, value * 1
    first = attend(query, key, value, mask)
    return first + attend(query.flip(2), key, value, None), [key, value]


def scaled_as_it_is_read(query, key, value, held, position, mask):
    held = written(key, value, held, position)
    return attend(query, held[0] * 0.5, held[1], mask), held


@pytest.mark.long(
    but=[
        "each_head_alone-buffers",
        "in_two_chunks-buffers",
        "grown_and_read_twice-nothing",
        "scaled_as_it_is_read-buffers",
    ]
)
@pytest.mark.parametrize(
    ("step", "make"),
    [
        (in_two_chunks, buffers),
        (each_head_alone, buffers),
        (each_head_of_scaled_keys, buffers),
        (grown_and_read_twice, nothing),
        (scaled_as_it_is_read, buffers),
    ],
)
def test_every_attention_over_a_cache_reads_it_packed(step: Step, make: Any) -> None:
    _, outcomes, _ = compared(step, make)
    assert {*outcomes} == {"rewritten"}


def longer(key, value, held):
    return [torch.cat([past, new], 1) for past, new in zip(held, (key, value), strict=True)]


def heads_that_grow(query, key, value, held, position, mask):
    held = longer(key, value, held)
    keys, values = (x.repeat_interleave(G, 2).unbind(2) for x in held)
    outputs = []
    for head in range(H * G):
        scores = (query[:, :, head] @ keys[head].mT * 0.25).masked_fill(~mask, -1e9)
        outputs.append(scores.softmax(-1) @ values[head])
    return torch.stack(outputs, 2), held


def kv_heads_that_grow(query, key, value, held, position, mask):
    held = longer(key, value, held)
    outputs = []
    for head, own in enumerate(query.split(G, 2)):
        turn = slice(head, head + 1)
        outputs.append(attend(own, held[0][:, :, turn], held[1][:, :, turn], mask))
    return torch.cat(outputs, 2), held


def chunks_of_heads_that_grow(query, key, value, held, position, mask):
    held = longer(key, value, held)
    outputs = []
    for q, k, v in zip(*(x.transpose(1, 2).chunk(H, 1) for x in (query, *held)), strict=True):
        outputs.append((q @ k.mT * 0.25).masked_fill(~mask, -1e9).softmax(-1) @ v)
    return torch.cat(outputs, 1).transpose(1, 2), held


@pytest.mark.parametrize(
    "step",
    [heads_that_grow, kv_heads_that_grow, chunks_of_heads_that_grow],
    ids=lambda f: f.__name__,
)
def test_heads_of_a_cache_that_begins_empty_are_read_packed(step: Step) -> None:
    """Regression: an argument without tokens told nothing of its layout, so that the first call kept the cache as a
    whole, and all later ones read it dense. Which of the empty heads new tokens stand behind was guessed, too.
    """
    _, outcomes, _ = compared(step, empty)
    assert {*outcomes} == {"rewritten"}


def one_tensor_for_both(query, key, value, held, position, mask):
    """Keys and values grow by the same tokens, each behind a cache of its own."""
    held = longer(key, key, held)
    output = sdpa(query.transpose(1, 2), *(x.transpose(1, 2) for x in held), mask, enable_gqa=True)
    return output.transpose(1, 2), held


def test_empty_caches_that_take_the_same_tokens_stay_two() -> None:
    held, _, _ = compared(one_tensor_for_both, empty)
    assert held[0] is not held[1]


def read_by_a_sum_as_well(query, key, value, held, position, mask):
    output, held = in_two_chunks(query, key, value, held, position, mask)
    return output + held[0].sum(), held


def written_in_between(query, key, value, held, position, mask):
    held = written(key, value, held, position)
    first = attend(query, *held, mask)
    held = written(key * 2, value, held, position)
    return first + attend(query, *held, mask), held


def channels_scaled(query, key, value, held, position, mask):
    held = written(key, value, held, position)
    return attend(query, held[0] * torch.linspace(0.5, 1, D), held[1], mask), held


def scaled_for_values(query, key, value, held, position, mask):
    held = written(key, value, held, position)
    keys, values = (x.transpose(1, 2).repeat_interleave(G, 1) for x in held)
    scores = (query.transpose(1, 2) @ keys.mT).masked_fill(~mask, -torch.inf)
    return (scores.softmax(-1) @ (values * 0.5)).transpose(1, 2), held


def scaled_for_keys_and_values(query, key, value, held, position, mask):
    held = written(key, key, held, position)
    shared = (held[0] * 0.5).transpose(1, 2)
    output = sdpa(query.transpose(1, 2), shared, shared, mask, enable_gqa=True)
    return output.transpose(1, 2), held


def heads_added(query, key, value, held, position, mask):
    """A head reads the keys of another one as well."""
    held = written(key, value, held, position)
    outputs = []
    for head in range(H * G):
        keys, values = (x[:, :, head // G] for x in held)
        scores = query[:, :, head] @ (keys + held[0][:, :, 0]).mT * 0.25
        outputs.append(scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values)
    return torch.stack(outputs, 2), held


ALIKE = (
    *(read_by_a_sum_as_well, written_in_between, channels_scaled, scaled_for_values),
    *(scaled_for_keys_and_values, heads_added),
)


@pytest.mark.parametrize("step", ALIKE)
@pytest.mark.filterwarnings("ignore::kvq_compile.errors.KVQWarning")
def test_what_only_looks_like_that_gives_the_plain_numbers(step: Step) -> None:
    compared(step, buffers)


def heads_among_channels(query, key, value, held, position, mask):
    """A channel of each head side by side, and not the channels of one head."""
    key, value = (x.transpose(2, 3).flatten(2) for x in (key, value))
    if held is not None:
        key, value = torch.cat([held[0], key], 1), torch.cat([held[1], value], 1)
    key, value = key * 1, value * 1
    apart = (x.unflatten(2, (D, H)).permute(0, 3, 1, 2) for x in (key, value))
    output = sdpa(query.transpose(1, 2), *apart, mask, enable_gqa=True)
    return output.transpose(1, 2), [key, value]


@pytest.mark.filterwarnings("ignore::kvq_compile.errors.KVQWarning")
def test_heads_among_channels_are_not_heads_beside_them() -> None:
    _, outcomes, _ = compared(heads_among_channels, nothing)
    assert "rewritten" not in outcomes[1:]
