"""Of caches that are alike Dynamo looks at one; that one is not like the others any more is noticed all the same."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvq_compile import QuantizedKV, make_spec
from kvq_compile.bench.caches import ROLES, Shape, random_spec
from kvq_compile.history import watching
from kvq_compile.kernels.cache.form import are_alike, form_of
from kvq_compile.lowering import guards

pytestmark = [
    pytest.mark.usefixtures("fresh_dynamo"),
    pytest.mark.filterwarnings("ignore::kvq_compile.errors.KVQWarning"),
]

CPU = torch.device("cpu")
LAYERS, HELD = 5, 60
OPTIONS: dict[str, Any] = {
    "method": "int8", "sinks": 1, "window": 4, "page_size": 32, "inner": "eager"
}  # fmt: skip
# A last bit that layers sum in another order may move a code of 8 bits by one, and tokens are averages of many.
CLOSE = {"rtol": 0, "atol": 0.01}
Caches = list[tuple[Tensor, Tensor]]


def layout(role: str, bits: int = 8) -> Any:
    return make_spec(f"int{bits}", sinks=1, window=4, page_size=32).layout(role, 32)


def cache(role: str, number: int, tokens: int = HELD, **about: Any) -> QuantizedKV:
    generator = torch.Generator().manual_seed(number)
    x = torch.randn(1, 2, tokens, 32, generator=generator)
    return QuantizedKV.from_dense(x, about.pop("layout", layout(role)), **about)


def layers(**about: Any) -> Caches:
    return [
        (cache("key", 2 * layer, **about), cache("value", 2 * layer + 1, **about))
        for layer in range(LAYERS)
    ]


def grown(x: Tensor, caches: Caches) -> tuple[Tensor, Caches]:
    held: Caches = []
    for keys, values in caches:
        held.append((torch.cat([keys, x], 2), torch.cat([values, x.cos()], 2)))
        x = sdpa(x, *held[-1])
    return x, held


def written(x: Tensor, caches: Caches) -> tuple[Tensor, Caches]:
    for keys, values in caches:
        keys[:, :, HELD : HELD + 1] = x
        values[:, :, HELD : HELD + 1] = x.cos()
        x = sdpa(x, keys, values, (torch.arange(keys.shape[2]) <= HELD)[None, None, None])
    return x, caches


def token(number: int) -> Tensor:
    return torch.randn(1, 2, 1, 32, generator=torch.Generator().manual_seed(1000 + number))


def replaced(caches: Caches, layer: int, place: int, by: Tensor) -> Caches:
    pair = list(caches[layer])
    pair[place] = by
    return [*caches[:layer], (pair[0], pair[1]), *caches[layer + 1 :]]


def roomy(caches: Caches) -> Caches:
    """One layer has room for more: its tensors have other sizes."""
    for x in caches[2]:
        x.claim(500)  # type: ignore[attr-defined]
    return caches


def cropped(caches: Caches) -> Caches:
    return [*caches[:3], (caches[3][0][:, :, :40], caches[3][1][:, :, :40]), *caches[4:]]


def trimmed(caches: Caches) -> Caches:
    return [*caches[:3], (caches[3][0][:, :, 5:], caches[3][1][:, :, 5:]), *caches[4:]]


def of_other_bits(caches: Caches) -> Caches:
    return replaced(caches, 1, 0, cache("key", 0, layout=layout("key", bits=4)))


def ordinary(caches: Caches) -> Caches:
    return replaced(caches, 4, 1, caches[4][1].dequantize())  # type: ignore[attr-defined]


def twice(caches: Caches) -> Caches:
    """Two layers share one cache."""
    return [*caches[:4], caches[3]]


def of_two(caches: Caches) -> Caches:
    """All of them hold two sequences."""
    both = torch.tensor([0, 0])
    return [(keys.index_select(0, both), values.index_select(0, both)) for keys, values in caches]


@pytest.mark.parametrize("change", [roomy, cropped, trimmed, ordinary, of_two])
def test_a_layer_that_is_not_like_the_others_any_more_is_noticed(
    change: Callable[[Caches], Caches],
) -> None:
    compiled = torch.compile(grown, backend="kvq", options=OPTIONS)
    with torch.no_grad(), watching() as graphs:
        compiled(token(0), layers())
        for number in range(3):
            mine, theirs = change(layers()), change(layers())
            x = token(number).repeat(theirs[0][0].shape[0], 1, 1, 1)
            found, expected = compiled(x, mine), grown(x, theirs)
            torch.testing.assert_close(found[0], expected[0], **CLOSE)
    assert len(graphs) == 2, "for the layers as they were, and as they are now"


def test_a_layer_of_other_bits_is_refused() -> None:
    compiled = torch.compile(grown, backend="kvq", options=OPTIONS)
    with torch.no_grad():
        compiled(token(0), layers())
        with pytest.raises(Exception, match="must be quantized as this model is compiled"):
            compiled(token(0), of_other_bits(layers()))


def test_one_cache_in_two_layers_is_noticed() -> None:
    """What was captured for two memories is not run on one: it would write the second token over the first."""
    compiled = torch.compile(grown, backend="kvq", options=OPTIONS)
    with torch.no_grad(), watching() as graphs:
        compiled(token(0), layers())
        found, expected = compiled(token(1), twice(layers())), grown(token(1), twice(layers()))
        torch.testing.assert_close(found[0], expected[0], **CLOSE)
    assert len(graphs) == 2


def test_caches_that_change_alike_share_a_graph() -> None:
    """Lengths, and room for them, are the same numbers for all layers."""
    compiled = torch.compile(grown, backend="kvq", options=OPTIONS)
    with torch.no_grad(), watching() as graphs:
        compiled(token(0), layers())
        for tokens in (61, 90, 200):
            mine, theirs = layers(tokens=tokens), layers(tokens=tokens)
            for number in range(40):
                found, mine = compiled(token(number), mine)
                expected, theirs = grown(token(number), theirs)
                torch.testing.assert_close(found, expected, **CLOSE)
    assert len(graphs) == 1


@pytest.mark.parametrize("function", [grown, written])
def test_dynamo_looks_at_one_cache_of_those_that_are_alike(
    function: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The keys and the values of all layers are alike: two caches are looked at whole."""
    kind, counts = "grown" if function is grown else "static", []
    share = guards.share_guards
    monkeypatch.setattr(
        "kvq_compile.backend.share_guards", lambda *args: counts.append(share(*args))
    )
    slots = {} if kind == "grown" else {"kind": "static", "length": HELD, "tokens": 100}
    with torch.no_grad():
        torch.compile(function, backend="kvq", options=OPTIONS)(token(0), layers(**slots))
    assert counts == [2 * LAYERS - 2]


def test_sizes_of_caches_that_are_alike_are_read_from_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keys and values have a length each. Dynamo reads a size by a call in Python, and read one a cache."""
    read: list[int] = []
    size = torch._dynamo.utils.call_size
    monkeypatch.setattr(
        "torch._dynamo.utils.call_size", lambda *args: read.append(args[1]) or size(*args)
    )
    compiled = torch.compile(grown, backend="kvq", options=OPTIONS)
    with torch.no_grad():
        _, caches = compiled(token(0), layers())
        read.clear()
        compiled(token(1), caches)
    assert len(read) <= 2


def with_tables() -> Caches:
    """Caches of the default method, whose keys share one tensor of tables."""
    spec = random_spec("tc", Shape(1, HELD, heads=2, kv_heads=2, head_size=32))
    tables = {role: spec.tables(role) for role in ROLES}
    held = {role: None if each is None else each.on(CPU) for role, each in tables.items()}
    made = [
        [cache(role, number, layout=spec.layout(role, 32), tables=held[role]) for role in ROLES]
        for number in range(LAYERS)
    ]
    return [(keys, values) for keys, values in made]


def test_layers_that_share_their_tables_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    counts: list[int] = []
    share = guards.share_guards
    monkeypatch.setattr(
        "kvq_compile.backend.share_guards", lambda *args: counts.append(share(*args))
    )
    compiled = torch.compile(grown, backend="kvq", options={"method": "tc", "inner": "eager"})
    with torch.no_grad(), watching() as graphs:
        for _ in range(2):
            compiled(token(0), with_tables())
        assert counts == [2 * LAYERS - 2]
        others, expected = with_tables(), with_tables()
        keys: Any = others[2][0]
        keys.tables = keys.tables.clone()  # of its own now: another input, whatever it holds
        assert not are_alike([keys, others[1][0]])
        found = compiled(token(1), others)[0]
        torch.testing.assert_close(found, grown(token(1), expected)[0], **CLOSE)
    assert len(graphs) == 2


def test_a_static_cache_of_another_size_is_noticed() -> None:
    def caches(slots: int) -> Caches:
        made = layers(kind="static", length=HELD, tokens=100)
        about = {"kind": "static", "length": HELD, "tokens": slots}
        return [*made[:-1], (cache("key", 3, **about), cache("value", 4, **about))]

    compiled = torch.compile(written, backend="kvq", options=OPTIONS)
    with torch.no_grad():
        for slots in (100, 120, 100):
            found = compiled(token(1), caches(slots))[0]
            torch.testing.assert_close(found, written(token(1), caches(slots))[0], **CLOSE)


@pytest.mark.parametrize("name", ["codes", "params", "exact", "cursor"])
def test_a_tensor_put_in_place_of_a_part_is_looked_at(name: str) -> None:
    first, second = cache("key", 0), cache("key", 1)
    assert form_of(first) is form_of(second)
    part = getattr(second, name)
    assert are_alike((first, second))
    setattr(second, name, torch.cat([part, part], -1))
    assert not are_alike((first, second))
    setattr(second, name, part.clone())
    assert are_alike((first, second))


def test_a_part_that_is_deleted_is_looked_at() -> None:
    """Of a cache whose memory another one took over: it has a copy, made when it is used again."""
    first, second = (cache("key", number, kind="static") for number in range(2))
    assert are_alike((first, second))
    second.pass_on(HELD)
    assert form_of(second) is form_of(first)
    assert are_alike((first, second))


def test_gradients_are_looked_at_where_they_are_recorded() -> None:
    """Dynamo guards what a tensor requires together with the mode."""
    first, second = cache("key", 0), cache("key", 1).requires_grad_()
    assert not are_alike((first, second))
    with torch.no_grad():
        assert are_alike((first, second))


@pytest.mark.parametrize("change", ["dtype", "gradient", "kind", "length"])
def test_caches_that_differ_are_not_alike(change: str) -> None:
    first, second = cache("key", 0), cache("key", 1)
    assert are_alike((first, second))
    other = {
        "dtype": lambda: second.double(),
        "gradient": lambda: second.clone().requires_grad_(),
        "kind": lambda: cache("key", 1, kind="static"),
        "length": lambda: second[:, :, :50],
    }[change]()
    assert not are_alike((first, other))


def test_views_of_one_memory_are_one_cache() -> None:
    keys = cache("key", 0)
    assert not are_alike((keys, keys.detach()))
    assert not are_alike((keys,), (keys,))


def test_caches_of_an_iterator_are_looked_at_by_its_names() -> None:
    """Regression: Dynamo names what is in an iterator by a function, which the check of our own did not know."""

    def taken(x: Tensor, given: Iterator[tuple[Tensor, Tensor]]) -> tuple[Tensor, Caches]:
        return grown(x, [next(given) for _ in range(LAYERS)])

    with torch.no_grad():
        compiled = torch.compile(taken, backend="kvq", options=OPTIONS)
        found, _ = compiled(token(0), iter(tuple(layers())))
        torch.testing.assert_close(found, grown(token(0), layers())[0], **CLOSE)


class Prompted(nn.Module):
    """A decoder of prompts, whose caches are buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(32, 32).requires_grad_(False)
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, 2, 100, 32))

    def forward(self, x: Tensor) -> Tensor:
        query = self.project(x)
        self.keys[:, :, : x.shape[2]] = x
        self.values[:, :, : x.shape[2]] = x.cos()
        keys, values = self.keys[:, :, : x.shape[2]], self.values[:, :, : x.shape[2]]
        return sdpa(query, keys, values, is_causal=True)

    def largest(self, x: Tensor) -> Tensor:
        return x * self.keys.abs().amax()


@pytest.fixture
def unwritten_dictionaries_are_skipped() -> Iterator[None]:
    """As in PyTorch 2.11: a tensor in a dictionary that was not written is not looked at."""
    with torch._dynamo.config.patch(use_recursive_dict_tags_for_guards=True):
        yield


@pytest.mark.usefixtures("unwritten_dictionaries_are_skipped")
def test_a_graph_of_plain_buffers_is_not_run_on_caches() -> None:
    """Regression: a second prompt ran as captured, on caches that quantized its tokens before it read them."""
    model, prompt = Prompted(), torch.cat([token(number) for number in range(40)], 2)
    compiled = torch.compile(model, backend="kvq", options=OPTIONS)
    with torch.no_grad(), watching() as graphs:
        for x in (prompt, prompt.flip(2)):
            found = compiled(x)
            expected = sdpa(model.project(x), x, x.cos(), is_causal=True)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
    assert type(model.keys) is type(model.values) is QuantizedKV
    assert [site.outcome for graph in graphs for site in graph.sites] == ["rewritten"] * 2


@pytest.mark.usefixtures("unwritten_dictionaries_are_skipped")
def test_dynamo_alone_runs_a_graph_of_plain_buffers_on_caches(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """So the test above is one that fails without a check of our own."""
    monkeypatch.setattr("kvq_compile.backend.see_caches", lambda *args: 0)
    model, prompt = Prompted(), torch.cat([token(number) for number in range(40)], 2)
    compiled = torch.compile(model, backend="kvq", options=OPTIONS)
    with torch.no_grad(), watching() as graphs:
        compiled(prompt)
        x = prompt.flip(2)
        error = compiled(x) - sdpa(model.project(x), x, x.cos(), is_causal=True)
    told = [site.detail for graph in graphs for site in graph.sites]
    assert told[-1] == "the buffer must be a plain tensor, got QuantizedKV"
    assert float(error.abs().max()) > 1e-4


@pytest.mark.usefixtures("unwritten_dictionaries_are_skipped")
def test_a_graph_that_only_reads_a_buffer_sees_that_another_made_it_a_cache() -> None:
    model, prompt = Prompted(), torch.cat([token(number) for number in range(40)], 2)
    compiled = torch.compile(model, backend="kvq", options=OPTIONS)
    largest = torch.compile(model.largest, backend="kvq", options=OPTIONS)
    with torch.no_grad():
        largest(prompt)
        compiled(prompt)
        with watching() as graphs:
            found = largest(prompt)
        torch.testing.assert_close(found, model.largest(prompt))
    assert len(graphs) == 1


def test_weights_are_not_looked_at_for_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name takes Python to read: two buffers and a prompt could be caches, a matrix could not."""
    counts: list[int] = []
    see = guards.see_caches
    monkeypatch.setattr("kvq_compile.backend.see_caches", lambda *args: counts.append(see(*args)))
    with torch.no_grad():
        compiled = torch.compile(Prompted(), backend="kvq", options=OPTIONS)
        compiled(torch.cat([token(number) for number in range(40)], 2))
    assert counts == [3]


def test_guards_stay_where_dynamo_has_no_such_interface(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are slower and as right."""
    monkeypatch.setattr(guards, "TracingContext", SimpleNamespace(try_get=lambda: None))
    compiled = torch.compile(grown, backend="kvq", options=OPTIONS)
    with torch.no_grad():
        for change in (lambda caches: caches, cropped, roomy):
            found = compiled(token(0), change(layers()))[0]
            torch.testing.assert_close(found, grown(token(0), change(layers()))[0], **CLOSE)


class InBuffers(torch.nn.Module):
    """Static caches that a module registers, which holds them in a dict."""

    def __init__(self) -> None:
        super().__init__()
        for name in ("keys", "values"):
            self.register_buffer(name, torch.zeros(1, 2, 64, 32))

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        return written_at(x, position, self.keys, self.values)


class InADict(InBuffers):
    def __init__(self) -> None:
        super().__init__()
        self.held = {"keys": torch.zeros(1, 2, 64, 32), "values": torch.zeros(1, 2, 64, 32)}

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        return written_at(x, position, self.held["keys"], self.held["values"])


def written_at(x: Tensor, position: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    keys.index_copy_(2, position, x)
    values.index_copy_(2, position, x.cos())
    return sdpa(x, keys, values, (torch.arange(64) <= position[:, None])[None, None])


@pytest.mark.parametrize("kind", [InBuffers, InADict])
def test_a_cache_in_a_dict_is_looked_at_once_it_is_quantized(kind: type[InBuffers]) -> None:
    """Regression: Dynamo looks at a tensor in a dict only if that has changed, and gave the quantized cache to the
    graph of the ordinary one.
    """
    model, plain = kind(), kind()
    compiled = torch.compile(model.forward, backend="kvq", dynamic=True, options=OPTIONS)
    first, graphs_by = 0, []
    for tokens in (40, 3, 3, 3):
        x = torch.randn(1, 2, tokens, 32, generator=torch.Generator().manual_seed(first))
        position = torch.arange(first, first + tokens)
        with torch.no_grad(), watching() as graphs:
            found, expected = compiled(x, position), plain(x, position)
        torch.testing.assert_close(found, expected, **CLOSE)
        graphs_by.append([site.detail for graph in graphs for site in graph.sites])
        first += tokens
    converts, reads, *others = graphs_by
    assert "its buffer is quantized in place" in converts[0]
    assert "reads the quantized buffer" in reads[0]
    assert others == [[], []]  # the same dict, and nothing in it has changed
