"""Static caches that keep the last tokens are stored packed, and are read as if they were rolled."""

import copy
import io
import warnings

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvq_compile import KVQWarning, QuantizedKV, backend, report
from kvq_compile.history import watching
from kvq_compile.kernels.packed import UNCALIBRATED, Packed, room_of
from kvq_compile.kernels.schemes import Uniform
from kvq_compile.kernels.score import Score
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.kernels.triton import attend
from kvq_compile.testing import assert_matches_dequantized, channelwise_layouts, page_layouts
from native import CONVERSIONS, DEVICE
from refused_steps import tokens

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

EIGHT = Uniform(bits=8, group_size=16)
SPEC = CacheSpec(key=EIGHT, value=EIGHT, sinks=2, window=4, page_size=32)
LAYOUT = SPEC.layout("key", 16)
OPTIONS = {"method": "int8", "group_size": 16, "sinks": 2, "window": 4, "page_size": 32}
SLOTS = 70


# The cache ----------------------------------------------------------------------------------------------------------


def rolled(cache: torch.Tensor, held: int, new: torch.Tensor) -> torch.Tensor:
    """Return what a static layer of transformers copies into its buffer, which shows ``held`` tokens."""
    slots = cache.shape[2]
    return torch.cat([cache[:, :, :held], new], 2)[:, :, -slots:]


def write(cache: torch.Tensor, held: int, new: torch.Tensor) -> None:
    """Write new tokens as a static layer of transformers does."""
    if held + new.shape[2] <= cache.shape[2]:
        cache[:, :, held : held + new.shape[2]] = new
    else:
        cache.copy_(rolled(cache, held, new))


def fill(length: int, layout=LAYOUT, chunk: int = 1, seed: int = 0) -> QuantizedKV:
    """Return a ring that was decoded in chunks."""
    x = tokens(length, seed=seed)
    cache = QuantizedKV.from_dense(torch.zeros(2, 2, SLOTS, 16), layout, kind="static", length=0)
    held = 0
    for new in x.split(chunk, 2):
        write(cache, min(held, SLOTS), new)
        held += new.shape[2]
    return cache


@settings(max_examples=30)
@given(
    layout=page_layouts() | channelwise_layouts(head_dims=(64, 80)),
    slots=st.integers(1, 150),
    chunks=st.lists(st.sampled_from((1, 1, 7, 40, 90)), min_size=2, max_size=12),
)
def test_a_ring_shows_the_last_tokens_of_a_cache_that_keeps_all(layout, slots, chunks) -> None:
    """Whatever pages were dropped in the meantime, and bit by bit, as long as a call leaves tokens to be kept."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 2, sum(chunks), layout.head_dim, generator=generator)
    empty = torch.zeros(2, 2, slots, layout.head_dim)
    cache = QuantizedKV.from_dense(empty, layout, kind="static", length=0)
    whole, held = QuantizedKV.from_dense(x[:, :, :0], layout), 0
    for new in x.split(chunks, 2):
        write(cache, held, new)
        if new.shape[2] >= slots:  # nothing else is kept: the memory begins anew
            whole, new = whole[:, :, :0], new[:, :, -slots:]
        whole = torch.cat([whole, new], 2)
        held = min(held + new.shape[2], slots)
        assert cache.held() == held
        got, expected = cache.dequantize(), whole.dequantize()[:, :, -held:]
        assert torch.equal(got[:, :, :held], expected)
        assert not got[:, :, held:].any()
        assert room_of(cache.parts, layout) <= 2 * slots + slots // 8 + 4 * layout.token_rows


def test_the_memory_of_a_ring_does_not_grow() -> None:
    sizes = [fill(length).nbytes for length in (100, 200, 800)]
    assert len(set(sizes)) == 1
    assert sizes[0] < QuantizedKV.from_dense(tokens(200), LAYOUT).nbytes


def test_reset_empties_a_ring() -> None:
    cache = fill(200)
    cache.zero_()
    assert cache.held() == 0
    assert not cache.dequantize().any()
    new = tokens(5)
    write(cache, 0, new)
    assert torch.equal(cache.dequantize()[:, :, :5], new)


@pytest.mark.parametrize(
    "copied",
    [
        lambda cache: cache.clone(),
        copy.deepcopy,
        lambda cache: torch.cat([cache[:1], cache[1:]]),
        lambda cache: cache.index_select(0, torch.tensor([0, 1])),
        lambda cache: saved(cache),
    ],
)
def test_a_copy_of_a_ring_goes_its_own_way(copied) -> None:
    cache, new = fill(200), tokens(40, seed=7)
    held = cache.dequantize()
    other = copied(cache)
    assert isinstance(other, QuantizedKV)
    assert torch.equal(other.dequantize(), held)
    write(other, SLOTS, new)
    assert torch.equal(cache.dequantize(), held)
    write(cache, SLOTS, new)
    assert torch.equal(other.dequantize(), cache.dequantize())


def saved(cache: QuantizedKV) -> QuantizedKV:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file)


def test_a_file_of_a_ring_whose_memory_is_too_small_is_refused() -> None:
    function, arguments = fill(200).__reduce_ex__(2)
    version, layout, kind, length, parts, *rest = arguments
    parts[3] = parts[3] + torch.tensor([320, 0], dtype=torch.int32)
    with pytest.raises(ValueError, match="cursor must count"):
        function(version, layout, kind, length, parts, *rest)


def test_tokens_that_a_ring_holds_are_not_quantized_again() -> None:
    """A copy that begins with the ring's own tokens leaves their codes as they are."""
    cache = fill(SLOTS)
    codes = cache.paged().codes[:, :, :2].clone()
    for step in range(20):
        write(cache, SLOTS, tokens(1, seed=step))
        assert torch.equal(cache.paged().codes[:, :, :2], codes)


def test_a_copy_of_anything_else_overwrites_a_ring() -> None:
    cache, other = fill(200), tokens(SLOTS, seed=9)
    cache.copy_(other)
    whole = QuantizedKV.from_dense(other, LAYOUT)
    assert torch.equal(cache.dequantize(), whole.dequantize())


def test_a_slot_of_a_ring_that_has_wrapped_cannot_be_overwritten() -> None:
    """What lies behind it would move to other slots."""
    cache = fill(200)
    held = cache.dequantize()
    with pytest.raises(NotImplementedError, match="roll a copy"):
        cache[:, :, 5:6] = tokens(1)
    with pytest.raises(NotImplementedError, match="roll a copy"):
        cache.index_copy_(2, torch.tensor([5]), tokens(1))
    assert torch.equal(cache.dequantize(), held)


def test_reports_count_the_exact_tokens_of_a_ring() -> None:
    cache = fill(200)
    count, pages = cache.cursor.tolist()
    (line,) = report([cache]).tensors
    assert (line.held, line.kept_exact) == (SLOTS, count - 2 - 32 * pages)


@CONVERSIONS
@pytest.mark.parametrize("new", [1, 5])
def test_gpu_kernels_attend_to_a_ring_behind_a_position_on_the_device(new) -> None:
    """The mask has a column for each slot of the memory, those out of sight and those still empty included."""
    device = torch.device(DEVICE)
    layouts = LAYOUT, SPEC.layout("value", 16)
    keys, values = (fill(190, layout, seed=s).to(device) for s, layout in enumerate(layouts))
    query, key, value = (tokens(new, seed=s).to(device) for s in range(3))
    held = keys.cursor[:1].long()
    slots = torch.arange(room_of(keys.parts, LAYOUT), device=device)
    mask = ((slots >= held - SLOTS + 1) & (slots < held + new))[None]
    parts = Packed(*keys.parts), Packed(*values.parts), UNCALIBRATED, UNCALIBRATED
    output = attend.attend(query, key, value, *parts, mask, held, None, Score(0.25), *layouts)
    seen = torch.arange(SLOTS + new, device=device)[None] > 0  # of those that show
    assert_matches_dequantized(output, query, key, value, (keys, values), mask=seen, scale=0.25)


# The graph ----------------------------------------------------------------------------------------------------------


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


@settings(max_examples=8, phases=set(Phase) - {Phase.shrink, Phase.explain})
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


# What is no ring -----------------------------------------------------------------------------------------------------


def roll_right(cache, key):
    rolled = cache.roll(1, dims=2)
    rolled[:, :, :1] = key
    return rolled


def write_last_but_one(cache, key):
    rolled = cache.roll(-1, dims=2)
    rolled[:, :, -2:-1] = key
    return rolled


def skip_one(cache, key):
    return torch.cat([cache[:, :, 2:], key, key], 2)


def keep_the_first(cache, key):
    return torch.cat([cache[:, :, :1], cache[:, :, 2:], key], 2)


def scale(cache, key):
    return torch.cat([cache[:, :, 1:] * 0.99, key], 2)


def swap_heads(cache, key):
    return torch.cat([cache[:, :, 1:].flip(1), key], 2)


def make_other(rolled):
    def step(query, key, value, keys, values, mask):
        keys.copy_(rolled(keys, key))
        values.copy_(rolled(values, value))
        return sdpa(query, keys, values, attn_mask=mask)

    return step


OTHERS = [roll_right, write_last_but_one, skip_one, keep_the_first, scale, swap_heads]


def full_caches() -> list[torch.Tensor]:
    return [tokens(SLOTS, seed=3), tokens(SLOTS, seed=4)]


@pytest.mark.filterwarnings("ignore::kvq_compile.KVQWarning")
@pytest.mark.parametrize("packed_before", [False, True])
@pytest.mark.parametrize("rolled", OTHERS)
def test_what_does_not_keep_the_last_tokens_in_order_is_no_ring(rolled, packed_before) -> None:
    """It runs as captured, in 16 bit, and a cache that is packed already becomes an ordinary tensor."""
    step = make_other(rolled)
    compiled = torch.compile(step, backend="kvq", options=OPTIONS | {"inner": "eager"})
    caches = full_caches()
    if packed_before:
        layouts = LAYOUT, SPEC.layout("value", 16)
        caches = [
            QuantizedKV.from_dense(x, layout, kind="ring")
            for x, layout in zip(caches, layouts, strict=True)
        ]
    plain = [x.dequantize() if packed_before else x.clone() for x in caches]
    with torch.no_grad(), watching() as graphs:
        for number in range(3):
            query, key, value = (tokens(1, seed=s + number) for s in range(3))
            mask = torch.ones(1, SLOTS, dtype=torch.bool)
            expected = step(query, key, value, *plain, mask)
            torch.testing.assert_close(compiled(query, key, value, *caches, mask), expected)
    assert all(type(x) is torch.Tensor for x in caches)
    assert all(torch.equal(x, y) for x, y in zip(caches, plain, strict=True))
    assert {site.outcome for graph in graphs for site in graph.sites} == {"left alone"}


def by_slices(cache, key):
    return torch.cat([cache, key], 2)[:, :, -SLOTS:]


def by_narrow(cache, key):
    new = key.shape[2]
    return torch.cat([cache.narrow(2, new, SLOTS - new), key], 2)


def by_index(cache, key):
    moved = cache.index_select(2, torch.arange(1, SLOTS + 1).clamp(max=SLOTS - 1))
    return torch.where(torch.arange(SLOTS)[:, None] == SLOTS - 1, key, moved)


def with_other_tokens(cache, key):
    return torch.cat([cache[:, :, 1:], 2 * key.flip(0)], 2)


def by_pad(cache, key):
    rolled = torch.nn.functional.pad(cache[:, :, 1:], (0, 0, 0, 1))
    rolled[:, :, -1:] += key
    return rolled


@pytest.mark.parametrize("rolled", [by_slices, by_narrow, by_index, by_pad, with_other_tokens])
def test_a_ring_is_known_by_what_is_computed_not_by_its_spelling(rolled) -> None:
    step = make_other(rolled)
    compiled = torch.compile(step, backend="kvq", options=OPTIONS | {"inner": "eager"})
    caches = full_caches()
    with torch.no_grad(), watching() as graphs:
        for number in range(100):
            query, key, value = (tokens(1, seed=s + number) for s in range(3))
            plain = [x.dequantize() if isinstance(x, QuantizedKV) else x.clone() for x in caches]
            mask = torch.ones(1, SLOTS, dtype=torch.bool)
            expected = step(query, key, value, *plain, mask)
            output = compiled(query, key, value, *caches, mask)
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert all(x.kind == "ring" for x in caches)
    assert {site.outcome for graph in graphs for site in graph.sites} == {"rewritten"}


def test_without_a_mask_all_of_a_ring_is_seen_and_nothing_else() -> None:
    def step(query, key, value, keys, values):
        keys.copy_(by_slices(keys, key))
        values.copy_(by_slices(values, value))
        return sdpa(query, keys, values)

    compiled = torch.compile(step, backend="kvq", options=OPTIONS | {"inner": "eager"})
    caches = full_caches()
    with torch.no_grad():
        for number in range(100):
            query, key, value = (tokens(1, seed=s + number) for s in range(3))
            plain = [x.dequantize() if isinstance(x, QuantizedKV) else x.clone() for x in caches]
            expected = step(query, key, value, *plain)
            output = compiled(query, key, value, *caches)
            torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    assert all(x.kind == "ring" for x in caches)


@pytest.mark.parametrize(("held", "told"), [(40, "before it is full"), (0, "before it is full")])
def test_a_buffer_that_is_rolled_before_it_is_full_becomes_an_ordinary_tensor(held, told) -> None:
    """Its empty slots would have to move, too."""
    step = make_other(by_slices)
    layouts = LAYOUT, SPEC.layout("value", 16)
    caches = [
        QuantizedKV.from_dense(x, layout, kind="static", length=held)
        for x, layout in zip(full_caches(), layouts, strict=True)
    ]
    plain = [x.dequantize() for x in caches]
    compiled = torch.compile(step, backend="kvq", options=OPTIONS | {"inner": "eager"})
    query, key, value = (tokens(1, seed=s) for s in range(3))
    mask = torch.ones(1, SLOTS, dtype=torch.bool)
    with torch.no_grad(), pytest.warns(KVQWarning, match=told):
        output = compiled(query, key, value, *caches, mask)
    torch.testing.assert_close(output, step(query, key, value, *plain, mask))
    assert all(type(x) is torch.Tensor for x in caches)
    assert all(torch.equal(x, y) for x, y in zip(caches, plain, strict=True))


@pytest.mark.parametrize("held", [30, 50, SLOTS, 90])
def test_a_buffer_that_is_written_behind_other_tokens_than_it_holds_becomes_an_ordinary_tensor(
    held,
) -> None:
    """Of a cache that holds as many, or more and has not wrapped, the tokens behind are dropped."""

    def step(query, key, value, keys, values, mask):
        joined = torch.cat([keys[:, :, :50], key], 2), torch.cat([values[:, :, :50], value], 2)
        keys.copy_(joined[0][:, :, -SLOTS:])
        values.copy_(joined[1][:, :, -SLOTS:])
        return sdpa(query, *joined, attn_mask=mask)

    caches = [fill(held, layout) for layout in (LAYOUT, SPEC.layout("value", 16))]
    plain = [x.dequantize() for x in caches]
    compiled = torch.compile(step, backend="kvq", options=OPTIONS | {"inner": "eager"})
    query, key, value = (tokens(30, seed=s) for s in range(3))
    mask = torch.ones(30, 80, dtype=torch.bool).tril(50)
    with torch.no_grad(), warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        output = compiled(query, key, value, *caches, mask)
    expected = step(query, key, value, *plain, mask)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-5)
    fits = held in (50, SLOTS)
    assert all(isinstance(x, QuantizedKV) is fits for x in caches)
    assert any("another number of tokens" in str(warning.message) for warning in told) is not fits


def test_slots_of_a_ring_that_has_wrapped_are_not_written_quantized() -> None:
    def step(query, key, value, keys, values, position, mask):
        keys.index_copy_(2, position, key)
        values.index_copy_(2, position, value)
        return sdpa(query, keys, values, attn_mask=mask)

    caches = [fill(100, layout) for layout in (LAYOUT, SPEC.layout("value", 16))]
    plain = [x.dequantize() for x in caches]
    compiled = torch.compile(step, backend="kvq", options=OPTIONS | {"inner": "eager"})
    query, key, value = (tokens(1, seed=s) for s in range(3))
    mask = (torch.arange(SLOTS) <= 60)[None]
    about = torch.tensor([60]), mask
    with torch.no_grad(), pytest.warns(KVQWarning, match="keeps the last tokens"):
        output = compiled(query, key, value, *caches, *about)
    torch.testing.assert_close(output, step(query, key, value, *plain, *about))
    assert all(torch.equal(x, y) for x, y in zip(caches, plain, strict=True))


def test_a_ring_that_is_read_elsewhere_too_is_read_dense() -> None:
    def step(query, key, value, keys, values, mask):
        norm = keys.square().sum()
        keys.copy_(by_slices(keys, key))
        values.copy_(by_slices(values, value))
        return sdpa(query, keys, values, attn_mask=mask), norm

    compiled = torch.compile(step, backend="kvq", options=OPTIONS | {"inner": "eager"})
    caches, mask = full_caches(), torch.ones(1, SLOTS, dtype=torch.bool)
    dense = pytest.warns(KVQWarning, match="read their caches dense.*read outside attention")
    with torch.no_grad(), dense:
        for number in range(80):
            query, key, value = (tokens(1, seed=s + number) for s in range(3))
            plain = [x.dequantize() if isinstance(x, QuantizedKV) else x.clone() for x in caches]
            expected = step(query, key, value, *plain, mask)
            for got, wanted in zip(
                compiled(query, key, value, *caches, mask), expected, strict=True
            ):
                torch.testing.assert_close(got, wanted)
    assert all(x.kind == "ring" for x in caches)


@pytest.mark.filterwarnings("ignore::kvq_compile.KVQWarning")
def test_what_was_found_of_one_layer_is_not_taken_for_another_that_differs() -> None:
    def step(query, key, value, one, two, mask):
        for caches, factor in ((one, 1.0), (two, 0.5)):
            for cache, new in zip(caches, (key, value), strict=True):
                cache.copy_(torch.cat([cache[:, :, 1:] * factor, new], 2))
            query = sdpa(query, *caches, attn_mask=mask)
        return query

    compiled = torch.compile(step, backend="kvq", options=OPTIONS | {"inner": "eager"})
    one, two, mask = full_caches(), full_caches(), torch.ones(1, SLOTS, dtype=torch.bool)
    plain = [x.clone() for x in two]
    with torch.no_grad():
        for number in range(3):
            query, key, value = (tokens(1, seed=s + number) for s in range(3))
            step(query, key, value, full_caches(), plain, mask)
            compiled(query, key, value, one, two, mask)
    assert all(x.kind == "ring" for x in one)
    assert all(torch.equal(x, y) for x, y in zip(two, plain, strict=True))
