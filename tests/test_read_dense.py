"""A cache is stored quantized whatever reads it: what is not understood reads an ordinary tensor of its tokens."""

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.functional import layer_norm, rms_norm
from torch.nn.functional import scaled_dot_product_attention as sdpa

import kvq_compile
from kvq_compile import ArrangedKV, KVQWarning, QuantizedKV
from kvq_compile.history import watching
from kvq_compile.lowering.sites import DENSE

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile"),
]

OPTIONS = {"method": "int8", "sinks": 1, "window": 4, "page_size": 32, "inner": "eager"}
SLOTS, HEAD = 128, 32
COUNTS = (40, 1, 1, 3, 1)  # tokens of each call; a page is packed in the first
Reader = Callable[[Tensor, Tensor, Tensor], Tensor]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape)))


def weights(scores: Tensor) -> Tensor:
    return torch.softmax(scores, -1)


def capped_by_erf(query, keys, values):
    return weights(5 * torch.erf(query @ keys.mT / 5)) @ values


def spelled_out(query, keys, values):
    shares = torch.exp(query @ keys.mT / 8)
    return (shares / shares.sum(-1, keepdim=True)) @ values


def with_a_shared_sink(query, keys, values):
    """The weight of a sink is spread over all tokens."""
    scores = query @ keys.mT
    shares = weights(torch.cat([scores, torch.ones_like(scores[..., :1])], -1))
    return (shares[..., :-1] + shares[..., -1:] / keys.shape[2]) @ values


def flexible(query, keys, values):
    return flex_attention(query, keys, values, score_mod=lambda score, b, h, i, j: score + 0.01 * j)


def in_chunks(query, keys, values):
    heads = zip(query.split(1, 1), keys.split(1, 1), values.split(1, 1), strict=True)
    parts = [weights(torch.erf(one @ part.mT)) @ other for one, part, other in heads]
    return torch.cat(parts, 1)


def rotated_at_read(query, keys, values):
    angle = torch.arange(keys.shape[2])[:, None] / 10
    return sdpa(query, keys * angle.cos() + keys.flip(-1) * angle.sin(), values)


def normalized_at_read(query, keys, values):
    """Keys stayed in 16 bit: a norm was taken for what ends the way to an attention."""
    return sdpa(query, rms_norm(keys, (HEAD,)), layer_norm(values, (HEAD,)))


def linear(query, keys, values):
    return (query @ keys.mT) @ values


@torch.library.custom_op("kvq_test::attend", mutates_args=())
def own_operator(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    """Attend in a way that no graph shows."""
    return sdpa(query, keys, values)


@own_operator.register_fake
def _(query: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    return torch.empty_like(query)


READERS = [
    *(capped_by_erf, spelled_out, with_a_shared_sink, flexible, own_operator),
    *(in_chunks, rotated_at_read, normalized_at_read, linear),
]


def grown(reader: Reader):
    def step(query, key, value, keys, values, first):
        del first
        keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        return reader(query, keys, values), keys, values

    return step


def written(reader: Reader):
    def step(query, key, value, keys, values, first):
        slots = first + torch.arange(key.shape[2])
        keys.index_copy_(2, slots, key)
        values.index_copy_(2, slots, value)
        return reader(query, keys, values), keys, values

    return step


def assigned(reader: Reader):
    def step(query, key, value, keys, values, first):
        slots = first + torch.arange(key.shape[2])
        keys[:, :, slots], values[:, :, slots] = key, value
        return reader(query, keys, values), keys, values

    return step


def updated(reader: Reader):
    def step(query, key, value, keys, values, first):
        slots = first + torch.arange(key.shape[2])
        keys, values = keys.index_copy(2, slots, key), values.index_copy(2, slots, value)
        return reader(query, keys, values), keys, values

    return step


def none() -> list[Tensor]:
    return [torch.zeros(2, 2, 0, HEAD), torch.zeros(2, 2, 0, HEAD)]


def empty() -> list[Tensor]:
    return [torch.zeros(2, 2, SLOTS, HEAD), torch.zeros(2, 2, SLOTS, HEAD)]


def plain(cache: Tensor) -> Tensor:
    return cache.dequantize() if isinstance(cache, (QuantizedKV, ArrangedKV)) else cache.clone()


def parts(cache: Tensor) -> Sequence[Tensor]:
    """Return the caches that a tensor stands for: of single heads, where these are read one by one."""
    return cache.caches if isinstance(cache, ArrangedKV) else [cache]


@torch.no_grad()
def generate(step: Any, caches: list[Tensor], **options: Any) -> tuple[list[Tensor], list[Any]]:
    """Generate; each call must give, bit by bit, what the step gives on the tokens that the caches stand for."""
    run, held = torch.compile(step, backend="kvq", options=OPTIONS | options), 0
    with watching() as graphs:
        for number, count in enumerate(COUNTS):
            new = [draw(2, 2, count, HEAD, seed=7 * number + place) for place in range(3)]
            first = torch.tensor(held)
            expected = step(*new, *map(plain, caches), first)
            output, *caches = run(*new, *caches, first)
            torch.testing.assert_close(output, expected[0], rtol=0, atol=0)
            held += count
    return caches, [site for graph in graphs for site in graph.sites]


@pytest.mark.filterwarnings("ignore:.*read their caches dense")
@pytest.mark.parametrize("reader", READERS)
def test_a_dynamic_cache_is_kept_quantized_whatever_reads_it(reader: Reader) -> None:
    caches, sites = generate(grown(reader), none())
    held = [part for cache in caches for part in parts(cache)]
    assert all(isinstance(part, QuantizedKV) and int(part.cursor[1]) == 1 for part in held)
    assert sites and {site.outcome for site in sites} == {DENSE}


@pytest.mark.filterwarnings("ignore:.*read their caches dense")
@pytest.mark.parametrize("spell", [written, assigned, updated])
@pytest.mark.parametrize("reader", [capped_by_erf, spelled_out, flexible])
def test_a_cache_of_fixed_size_is_kept_quantized_whatever_reads_it(reader: Reader, spell) -> None:
    caches, sites = generate(spell(reader), empty())
    assert all(isinstance(cache, QuantizedKV) and cache.held() == sum(COUNTS) for cache in caches)
    assert sites and {site.outcome for site in sites} == {DENSE}


@pytest.mark.filterwarnings("ignore:.*read their caches dense")
@pytest.mark.parametrize("method", ["tc", "int4", "kivi", "qaq"])
@pytest.mark.parametrize("spell", [grown, written])
def test_every_method_without_calibration_serves_a_dense_reader(method: str, spell) -> None:
    caches, _ = generate(spell(capped_by_erf), none() if spell is grown else empty(), method=method)
    assert all(isinstance(cache, QuantizedKV) and int(cache.cursor[1]) == 1 for cache in caches)


@pytest.mark.filterwarnings("ignore:.*read their caches dense")
@pytest.mark.parametrize("spell", [grown, written, updated])
@torch.no_grad()
def test_compiled_code_reads_what_the_cache_held_and_the_exact_new_tokens(spell) -> None:
    """Tokens are written beside what is read: to the attention those of its own call are exact."""
    caches = none() if spell is grown else empty()
    run = torch.compile(
        spell(capped_by_erf), backend="kvq", options=OPTIONS | {"inner": "inductor"}
    )
    for first, count in ((0, 30), (30, 40), (70, 1)):
        new = [draw(2, 2, count, HEAD, seed=seed + first) for seed in range(3)]
        expected = spell(capped_by_erf)(*new, *map(plain, caches), torch.tensor(first))
        output, *caches = run(*new, *caches, torch.tensor(first))
        torch.testing.assert_close(output, expected[0])
    assert all(isinstance(cache, QuantizedKV) and int(cache.cursor[1]) == 2 for cache in caches)


@pytest.mark.filterwarnings("ignore:.*read their caches dense")
@pytest.mark.parametrize("spell", [grown, written])
def test_what_is_read_dense_is_stored_as_what_is_read_packed(spell) -> None:
    """The tokens do not depend on what reads them, and each is quantized once."""

    def served(query, keys, values):
        return sdpa(query, keys, values)

    def served_masked(query, key, value, keys, values, first):
        seen = torch.arange(SLOTS)[None] < first + key.shape[2]
        return spell(lambda *x: sdpa(*x, attn_mask=seen))(query, key, value, keys, values, first)

    step = spell(served) if spell is grown else served_masked
    caches = none() if spell is grown else empty()
    dense, _ = generate(spell(capped_by_erf), [cache.clone() for cache in caches])
    run, held = torch.compile(step, backend="kvq", options=OPTIONS), 0
    with torch.no_grad(), watching() as graphs:
        for number, count in enumerate(COUNTS):
            new = [draw(2, 2, count, HEAD, seed=7 * number + place) for place in range(3)]
            _, *caches = run(*new, *caches, torch.tensor(held))
            held += count
    assert {site.outcome for graph in graphs for site in graph.sites} == {"rewritten"}
    for mine, theirs in zip(dense, caches, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(mine.parts, theirs.parts, strict=True))


def from_one_tensor(query, keys, values):
    both = torch.stack([keys, values]) * 2
    return capped_by_erf(query, both[0], both[1])


@pytest.mark.filterwarnings("ignore:.*read their caches dense")
@pytest.mark.parametrize("spell", [grown, written, updated])
def test_halves_of_one_tensor_are_stored_as_what_attention_takes_them_for(spell) -> None:
    """Regression: both halves lead to both products, and keys were taken for values."""
    caches, sites = generate(spell(from_one_tensor), none() if spell is grown else empty())
    assert [cache.page_layout.role for cache in caches] == ["key", "value"]
    assert sites and {site.outcome for site in sites} == {DENSE}


@torch.no_grad()
def test_a_cache_quantized_as_values_that_holds_keys_is_read_dense() -> None:
    """Regression: it was an error, and PyTorch runs it."""
    step = grown(lambda *operands: sdpa(*operands))
    run = torch.compile(step, backend="kvq", options=OPTIONS)
    prompt = [draw(2, 2, 40, HEAD, seed=seed) for seed in range(3)]
    _, keys, values = run(*prompt, *none(), torch.tensor(0))
    new = [draw(2, 2, 1, HEAD, seed=seed) for seed in range(3)]
    expected = step(*new, plain(values), plain(keys), torch.tensor(40))
    with pytest.warns(KVQWarning, match="reads keys from a cache that is quantized as values are"):
        output, *swapped = run(*new, values, keys, torch.tensor(40))
    torch.testing.assert_close(output, expected[0], rtol=0, atol=0)
    assert [cache.page_layout.role for cache in swapped] == ["value", "key"]


@pytest.mark.filterwarnings("ignore:.*read their caches dense")
@torch.no_grad()
def test_a_first_call_that_makes_the_cache_returns_it_quantized() -> None:
    def by_return(query, key, value):
        key, value = key + 1, value + 1
        return capped_by_erf(query, key, value), key, value

    def by_joint_return(query, key, value):
        key, value = key + 1, value + 1
        return flexible(query, key, value), key, value

    def by_write(query, key, value):
        keys, values = torch.zeros(2, 2, SLOTS, HEAD), torch.zeros(2, 2, SLOTS, HEAD)
        slots = torch.arange(key.shape[2])
        keys.index_copy_(2, slots, key + 1)
        values.index_copy_(2, slots, value + 1)
        return capped_by_erf(query, keys, values), keys, values

    for step in (by_return, by_joint_return, by_write):
        new = [draw(2, 2, 40, HEAD, seed=seed) for seed in range(3)]
        output, *caches = torch.compile(step, backend="kvq", options=OPTIONS)(*new)
        expected = step(*new)
        torch.testing.assert_close(output, expected[0], rtol=0, atol=0)
        for cache, exact in zip(caches, expected[1:], strict=True):
            assert isinstance(cache, QuantizedKV) and cache.held() == 40
            assert torch.equal(cache.dequantize()[:, :, 40:], exact[:, :, 40:])


@torch.no_grad()
def test_reports_tell_what_is_read_dense_and_what_a_read_takes() -> None:
    step = grown(capped_by_erf)
    new = [draw(2, 2, 40, HEAD, seed=seed) for seed in range(3)]
    with pytest.warns(KVQWarning, match="slower than over 16 bit: the scores pass through erf"):
        run = torch.compile(step, backend="kvq", options=OPTIONS)
        _, *caches = run(*new, draw(2, 2, 40, HEAD), draw(2, 2, 40, HEAD), torch.tensor(40))
    report = kvq_compile.report(caches)
    assert report.dense_layers == 1
    assert report.dense_read == 2 * 4 * 2 * 2 * 80 * HEAD  # keys and values, 4 bytes an element
    assert f"{DENSE}: the scores pass through erf" in " ".join(str(report).split())
    explained = kvq_compile.explain(step, *new, *none(), torch.tensor(0), options=OPTIONS)
    assert f"{DENSE}: the scores pass through erf" in " ".join(str(explained).split())


# --- what is no cache, and what cannot be stored so ------------------------------------------------


def images_joined(x, image, weight):
    joined = torch.cat([image, x], 2)
    return torch.nn.functional.conv2d(joined, weight).softmax(-1) @ joined.mT, joined


def scores_without_a_softmax(query, key, keys):
    keys = torch.cat([keys, key], 2)
    return query @ keys.mT, keys


def returned_and_projected(x, weight):
    hidden = x + 1
    return (hidden @ weight).softmax(-1), hidden


def state_of_a_recurrence(query, key, value, state):
    state = state + key.mT @ value
    return weights(query @ state) @ state, state


def products_returned(query, key):
    shares = weights(query @ key.mT)
    return shares @ key, shares


NO_CACHES = {
    "feature maps": (images_joined, [(2, 3, 8, 8), (2, 3, 8, 8), (3, 3, 1, 1)]),
    "scores without a softmax": (scores_without_a_softmax, [(1, 2, 3, 32)] * 2 + [(1, 2, 40, 32)]),
    "hidden states": (returned_and_projected, [(1, 2, 3, 32), (32, 32)]),
    "a recurrent state": (state_of_a_recurrence, [(1, 2, 3, 32)] * 3 + [(1, 2, 32, 32)]),
    "weights": (products_returned, [(1, 2, 3, 32)] * 2),
}


@pytest.mark.filterwarnings("ignore::kvq_compile.KVQWarning")
@pytest.mark.parametrize("name", list(NO_CACHES))
@torch.no_grad()
def test_what_is_no_cache_stays_as_it_is(name: str) -> None:
    step, shapes = NO_CACHES[name]
    arguments = [draw(*shape) for shape in shapes]
    outputs = torch.compile(step, backend="kvq", options=OPTIONS)(*arguments)
    torch.testing.assert_close(outputs, step(*arguments), rtol=0, atol=0)
    assert [type(x) for x in (*outputs, *arguments)] == [Tensor] * (len(outputs) + len(arguments))


@pytest.mark.filterwarnings("ignore:.*read their caches dense")
@torch.no_grad()
def test_a_buffer_that_holds_something_behind_its_tokens_stays_in_16_bit_and_is_told() -> None:
    caches = [draw(2, 2, SLOTS, HEAD, seed=seed) for seed in (1, 2)]
    new = [draw(2, 2, 3, HEAD, seed=seed) for seed in range(3)]
    exact = [cache.clone() for cache in caches]
    run = torch.compile(written(capped_by_erf), backend="kvq", options=OPTIONS)
    with pytest.warns(KVQWarning, match="holds something behind its tokens"):
        results = run(*new, *caches, torch.tensor(4))
    assert [type(cache) for cache in caches] == [Tensor, Tensor]
    expected = written(capped_by_erf)(*new, *exact, torch.tensor(4))
    torch.testing.assert_close(results, expected, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.*read their caches dense")
@torch.no_grad()
def test_a_write_over_tokens_that_may_still_be_read_makes_the_cache_plain() -> None:
    caches = empty()
    run = torch.compile(written(capped_by_erf), backend="kvq", options=OPTIONS)
    with pytest.warns(KVQWarning, match="overwritten"):
        for first in (0, 40, 10):
            new = [draw(2, 2, 40 if not first else 1, HEAD, seed=seed) for seed in range(3)]
            exact = [plain(cache) for cache in caches]
            output, *_ = run(*new, *caches, torch.tensor(first))
            expected = written(capped_by_erf)(*new, *exact, torch.tensor(first))
            torch.testing.assert_close(output, expected[0], rtol=0, atol=0)
    assert [type(cache) for cache in caches] == [Tensor, Tensor]


@pytest.mark.filterwarnings("ignore::kvq_compile.KVQWarning")
@pytest.mark.parametrize("dtype", [torch.float64])
@torch.no_grad()
def test_a_dtype_that_is_not_supported_stays_as_it_is(dtype: torch.dtype) -> None:
    arguments = [draw(2, 2, count, HEAD).to(dtype) for count in (3, 3, 3, 40, 40)]
    step = grown(capped_by_erf)
    _, *caches = torch.compile(step, backend="kvq", options=OPTIONS)(*arguments, torch.tensor(0))
    assert [type(cache) for cache in caches] == [Tensor, Tensor]


@pytest.mark.filterwarnings("ignore::kvq_compile.KVQWarning")
def test_nothing_is_stored_quantized_where_gradients_are_recorded() -> None:
    arguments = [draw(2, 2, count, HEAD).requires_grad_() for count in (3, 3, 3, 40, 40)]
    step = grown(capped_by_erf)
    _, *caches = torch.compile(step, backend="kvq", options=OPTIONS)(*arguments, torch.tensor(0))
    assert not any(isinstance(cache, QuantizedKV) for cache in caches)


@pytest.mark.filterwarnings("ignore::kvq_compile.KVQWarning")
@torch.no_grad()
def test_a_layer_left_out_by_option_is_not_stored_quantized() -> None:
    arguments = [draw(2, 2, count, HEAD) for count in (3, 3, 3, 40, 40)]
    options = OPTIONS | {"layers": {0: None}}
    run = torch.compile(grown(capped_by_erf), backend="kvq", options=options)
    _, *caches = run(*arguments, torch.tensor(0))
    assert [type(cache) for cache in caches] == [Tensor, Tensor]
