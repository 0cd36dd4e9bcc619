"""Of a layer with a sliding window the last tokens are kept: packed, and attended to as if there were no others."""

import copy
import io
import warnings
from dataclasses import replace

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvq_compile import KVQWarning, QuantizedKV, explain, report
from kvq_compile.history import watching
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import UNCALIBRATED, Packed
from kvq_compile.kernels.schemes import Uniform
from kvq_compile.kernels.score import Score
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.kernels.triton import attend
from kvq_compile.testing import (
    assert_matches_dequantized,
    assert_within_bound,
    changed,
    channelwise_layouts,
    mixed_layout,
    page_layouts,
)
from native import CONVERSIONS, DEVICE
from refused_steps import tokens
from thorough import few

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

EIGHT = Uniform(bits=8, group_size=16)
SPEC = CacheSpec(key=EIGHT, value=EIGHT, sinks=2, window=4, page_size=32)
OPTIONS = {"method": "int8", "group_size": 16, "sinks": 2, "window": 4, "page_size": 32}


def assert_one_step_apart(got: torch.Tensor, expected: torch.Tensor) -> None:
    """A token is read as it was, or as its code: a step of 8 bits is 1/255 of a range below 8."""
    torch.testing.assert_close(got, expected, rtol=0, atol=8 / 255)


# The cache ----------------------------------------------------------------------------------------------------------


def mixed_layouts() -> st.SearchStrategy[Layout]:
    """Draw layouts of pages whose tokens differ in bits, and which hold queries."""
    regions = {"sinks": 3, "window": 9}
    return st.sampled_from((2.5, 4.0)).map(
        lambda bits: changed(mixed_layout(bits, 32, 64), queries=5, shared_by=2, **regions)
    )


@settings(max_examples=30)
@given(
    layout=page_layouts() | channelwise_layouts(head_dims=(64, 80)) | mixed_layouts(),
    chunks=st.lists(st.sampled_from((1, 1, 7, 40, 90)), min_size=2, max_size=12),
    data=st.data(),
)
def test_a_trimmed_cache_shows_the_last_tokens_of_one_that_keeps_all(layout, chunks, data) -> None:
    """Whatever pages were dropped from its memory in the meantime, and bit by bit."""
    window = data.draw(st.integers(1, 150))
    x = torch.randn(2, 2, sum(chunks), layout.head_dim, generator=torch.Generator().manual_seed(0))
    whole = trimmed = QuantizedKV.from_dense(x[:, :, : chunks[0]], layout)
    whole, trimmed = whole.clone(), trimmed[:, :, -window:]
    for new in x.split(chunks, 2)[1:]:
        whole = torch.cat([whole, new], 2)
        trimmed = torch.cat([trimmed, new], 2)
        expected = whole.dequantize()[:, :, -trimmed.shape[2] :]
        assert torch.equal(trimmed.dequantize(), expected)
        trimmed = trimmed[:, :, -window:]
        assert torch.equal(trimmed.dequantize(), whole.dequantize()[:, :, -window:])
        assert (
            trimmed.end <= window + sum(chunks[-1:]) + 90 + 2 * layout.page_size + layout.token_rows
        )


def slide(length: int, window: int = 70, spec: CacheSpec = SPEC) -> QuantizedKV:
    """Return a trimmed cache that was decoded token by token."""
    x = tokens(length)
    cache = QuantizedKV.from_dense(x[:, :, :9], spec.layout("key", 16))[:, :, -window:]
    for new in x[:, :, 9:].split(1, 2):
        cache = torch.cat([cache, new], 2)[:, :, -window:]
    return cache


def test_the_memory_of_a_sliding_window_does_not_grow() -> None:
    sizes = [slide(length).nbytes for length in (200, 400, 800)]
    assert len(set(sizes)) == 1
    assert sizes[0] < QuantizedKV.from_dense(tokens(200), SPEC.layout("key", 16)).nbytes


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
def test_a_copy_of_a_trimmed_cache_goes_its_own_way(copied) -> None:
    cache, new = slide(200), tokens(40, seed=7)
    held = cache.dequantize()
    other = copied(cache)
    assert isinstance(other, QuantizedKV)
    assert torch.equal(other.dequantize(), held)
    longer = torch.cat([other, new], 2)[:, :, -70:]
    assert torch.equal(cache.dequantize(), held)
    assert torch.equal(longer.dequantize(), torch.cat([cache, new], 2)[:, :, -70:].dequantize())


def saved(cache: QuantizedKV) -> QuantizedKV:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file)


def test_a_file_whose_first_token_lies_behind_its_tokens_is_refused() -> None:
    function, arguments = slide(200).__reduce_ex__(2)
    with pytest.raises(ValueError, match="cursor must hold"):
        function(*arguments[:-1], arguments[-1] + 1)
    with pytest.raises(ValueError, match="first must be 0 or more"):
        function(*arguments[:-1], -1)


def test_rejected_tokens_of_a_trimmed_cache_leave_the_others() -> None:
    """What assisted decoding does: the window is cut from what was kept beyond it."""
    cache = slide(200, window=80)
    held = cache.dequantize()
    cache = cache[:, :, -70 - 6 : -6]
    assert isinstance(cache, QuantizedKV)
    assert torch.equal(cache.dequantize(), held[:, :, -76:-6])
    new = tokens(5, seed=8)
    longer = torch.cat([cache, new], 2)
    # The page that was cut open is read as before: its codes are those that were there.
    assert torch.equal(longer.dequantize(), torch.cat([held[:, :, -76:-6], new], 2))


def test_two_views_of_one_memory_do_not_see_each_other() -> None:
    cache = slide(200)
    held, one, two = cache.dequantize(), tokens(40, seed=1), tokens(40, seed=2)
    first, second = torch.cat([cache, one], 2), torch.cat([cache, two], 2)
    assert_one_step_apart(first[:, :, -40:].dequantize(), one)
    assert_one_step_apart(second[:, :, -40:].dequantize(), two)
    assert_one_step_apart(cache.dequantize(), held)


@CONVERSIONS
@pytest.mark.parametrize("new", [1, 5])
def test_gpu_kernels_attend_to_a_memory_of_which_pages_were_dropped(new) -> None:
    device = torch.device(DEVICE)
    layouts = SPEC.layout("key", 16), SPEC.layout("value", 16)
    caches = []
    for seed, layout in enumerate(layouts):
        cache = QuantizedKV.from_dense(tokens(9, seed=seed).to(device), layout)[:, :, -70:]
        for step in range(190):
            cache = torch.cat([cache, tokens(1, seed=seed + step).to(device)], 2)[:, :, -70:]
        caches.append(cache)
    keys, values = caches
    assert keys.end < 199
    query, key, value = (tokens(new, seed=s).to(device) for s in range(3))
    mask = (torch.arange(keys.end + new, device=device) >= keys.first)[None]
    parts = Packed(*keys.parts), Packed(*values.parts), UNCALIBRATED, UNCALIBRATED
    about = mask, None, keys.end, Score(0.25), *layouts
    output = attend.attend(query, key, value, *parts, *about)
    assert_matches_dequantized(output, query, key, value, (keys, values), scale=0.25)


def test_reports_count_the_exact_tokens_in_sight() -> None:
    cache = slide(200)
    packed = cache._lineage.pages * 32 + 2 - max(cache.first, 2)
    (line,) = report([cache]).tensors
    assert (line.held, line.kept_exact) == (70, 70 - packed)


# The graph ----------------------------------------------------------------------------------------------------------


def by_slice(grown, window):
    return grown[:, :, -window:]


def by_start(grown, window):
    return grown[:, :, max(0, grown.shape[2] - window) :]


def by_narrow(grown, window):
    kept = min(grown.shape[2], window)
    return grown.narrow(2, grown.shape[2] - kept, kept)


def by_copy(grown, window):
    return grown[..., -window:, :].contiguous()


def make_step(window: int, kept=by_slice, mask_kind: str = "none", read_kept: bool = False):
    """Return a step of a decoder with a sliding window; each query sees ``window`` tokens, its own included."""

    def step(query, key, value, keys, values, mask=None):
        keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        last = kept(keys, window), kept(values, window)
        read = last if read_kept else (keys, values)
        return sdpa(query, *read, attn_mask=mask), *last

    return step


def window_mask(window: int, held: int, new: int, padding: tuple[int, ...], position: int):
    """Return which of ``held + new`` tokens each query sees: those in its window that are no padding."""
    end = position + new
    slots = torch.arange(end - held - new, end)
    asked = torch.arange(position, end)[:, None]
    seen = (slots <= asked) & (slots > asked - window)
    padded = torch.tensor(padding)[:, None, None, None]
    return (seen & (slots >= padded)) | (slots == asked)


@settings(max_examples=few(5), phases=set(Phase) - {Phase.shrink, Phase.explain})
@given(
    window=st.integers(39, 110),
    prompt=st.integers(1, 180),
    more=st.lists(st.sampled_from((1, 1, 1, 5, 33)), min_size=3, max_size=8),
    kept=st.sampled_from((by_slice, by_start, by_narrow, by_copy)),
    padding=st.sampled_from(((0, 0), (3, 0), (0, 60))),
    additive=st.booleans(),
)
def test_a_decoder_with_a_sliding_window_attends_to_its_own_cache(
    window, prompt, more, kept, padding, additive
) -> None:
    """The output is that over the dequantized cache, and within the bound of that over the exact tokens."""
    torch._dynamo.reset()
    compiled = torch.compile(
        make_step(window, kept), backend="kvq", options=OPTIONS | {"inner": "eager"}
    )
    query, key, value = (tokens(prompt + sum(more), seed=s) for s in range(3))
    keys, values = key[:, :, :0], value[:, :, :0]
    position = 0
    with torch.no_grad(), watching() as graphs:
        for new in (prompt, *more):
            now = slice(position, position + new)
            held = keys.shape[2]
            mask = window_mask(window, held, new, padding, position)
            bias = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
            before = None if type(keys) is torch.Tensor else (keys.clone(), values.clone())
            output, keys, values = compiled(
                *(x[:, :, now] for x in (query, key, value)),
                keys,
                values,
                bias if additive else mask,
            )
            about = query[:, :, now], key[:, :, now], value[:, :, now]
            assert_matches_dequantized(output, *about, before, mask=mask)
            position += new
            seen = slice(position - new - held, position)
            exact = query[:, :, now], key[:, :, seen], value[:, :, seen]
            # Of the tokens held every one may be packed: the bound of a cache without exact ones is the largest.
            bare = replace(SPEC, sinks=0, window=0)
            assert_within_bound(output, *exact, bare, held=held // 32 * 32, mask=mask)
            assert keys.shape[2] == values.shape[2] == min(window, position)
    assert all(isinstance(x, QuantizedKV) for x in (keys, values))
    assert all(site.outcome == "rewritten" for graph in graphs for site in graph.sites)


@pytest.mark.long(but=["tc-eager", "int4-eager", "qaq-eager", "kivi-eager", "int4-inductor"])
@pytest.mark.parametrize("inner", ["eager", "inductor"])
@pytest.mark.parametrize("method", ["tc", "kivi", "qaq", "int4"])
def test_every_method_serves_a_sliding_window(method, inner) -> None:
    options = {"method": method, "sinks": 2, "window": 4, "page_size": 32, "inner": inner}
    compiled = torch.compile(make_step(60), backend="kvq", options=options)
    keys, values = (tokens(100, seed=s)[:, :, :0] for s in (3, 4))
    with torch.no_grad(), watching() as graphs:
        for number, new in enumerate((100, *(1,) * 40)):
            query, key, value = (tokens(new, seed=s + number) for s in range(3))
            mask = window_mask(60, keys.shape[2], new, (0, 0), 1000)
            before = None if type(keys) is torch.Tensor else (keys.clone(), values.clone())
            output, keys, values = compiled(query, key, value, keys, values, mask)
            assert_matches_dequantized(output, query, key, value, before, mask=mask)
    assert all(isinstance(x, QuantizedKV) and x.shape[2] == 60 for x in (keys, values))
    assert all(site.outcome == "rewritten" for graph in graphs for site in graph.sites)
    assert keys.end <= 60 + 3 * 32


def test_without_a_mask_tokens_out_of_sight_are_hidden() -> None:
    """A model that reads no more than it keeps needs no mask."""
    step = make_step(50, read_kept=True)
    compiled = torch.compile(step, backend="kvq", options=OPTIONS | {"inner": "eager"})
    keys, values = tokens(70, seed=3), tokens(70, seed=4)
    plain = keys, values
    with torch.no_grad(), watching() as graphs:
        for number in range(60):
            query, key, value = (tokens(1, seed=s + number) for s in range(3))
            output, keys, values = compiled(query, key, value, keys, values)
            expected, *plain = step(query, key, value, *plain)
            torch.testing.assert_close(output, expected, rtol=0, atol=0.02)
    assert all(isinstance(x, QuantizedKV) for x in (keys, values))
    assert all(site.outcome == "rewritten" for graph in graphs for site in graph.sites)


def test_a_graph_that_reorders_beams_keeps_the_window_packed() -> None:
    def step(query, key, value, keys, values, rows, mask):
        keys = torch.cat([keys.index_select(0, rows), key], 2)
        values = torch.cat([values.index_select(0, rows), value], 2)
        return sdpa(query, keys, values, attn_mask=mask), keys[:, :, -60:], values[:, :, -60:]

    compiled = torch.compile(step, backend="kvq", options=OPTIONS | {"inner": "eager"})
    with torch.no_grad():
        keys, values = (
            QuantizedKV.from_dense(tokens(100, seed=s), SPEC.layout(role, 16))[:, :, -60:]
            for s, role in ((3, "key"), (4, "value"))
        )
        for number in range(50):
            query, key, value = (tokens(1, seed=s + number) for s in range(3))
            rows = torch.tensor([[0, 1], [1, 0], [1, 1]][number % 3])
            mask = window_mask(60, keys.shape[2], 1, (0, 0), 1000)
            before = keys.index_select(0, rows), values.index_select(0, rows)
            output, keys, values = compiled(query, key, value, keys, values, rows, mask)
            assert_matches_dequantized(output, query, key, value, before, mask=mask)
            assert isinstance(keys, QuantizedKV)
            assert_one_step_apart(keys[:, :, :-1].dequantize(), before[0].dequantize()[:, :, 1:])


def test_an_attention_that_is_refused_reads_the_window_dense_and_keeps_it_packed() -> None:
    def step(query, key, value, keys, values):
        keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        weights = torch.softmax((query @ keys.mT).erf(), -1)
        return weights @ values, keys[:, :, -60:], values[:, :, -60:]

    compiled = torch.compile(step, backend="kvq", options=OPTIONS | {"inner": "eager"})
    keys, values = (
        QuantizedKV.from_dense(tokens(100, seed=s), SPEC.layout(role, 16))[:, :, -60:]
        for s, role in ((3, "key"), (4, "value"))
    )
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", KVQWarning)
        for number in range(50):
            query, key, value = (tokens(1, seed=s + number) for s in range(3))
            expected = step(query, key, value, keys.dequantize(), values.dequantize())
            output, keys, values = compiled(query, key, value, keys, values)
            assert isinstance(keys, QuantizedKV)
            torch.testing.assert_close(output, expected[0], rtol=1e-4, atol=1e-5)
            assert_one_step_apart(keys.dequantize(), expected[1])


def test_a_window_no_longer_than_the_exact_region_is_told_and_stays() -> None:
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("error", KVQWarning)
        arguments = [*(tokens(40, seed=s) for s in range(3)), *(tokens(9, seed=s) for s in (3, 4))]
        told = explain(make_step(36), *arguments, options=OPTIONS | {"strict": True})
    assert "its sliding window is no longer than the exact region, 36 of 36 tokens" in " ".join(
        str(told).split()
    )
    assert all(type(x) is torch.Tensor for x in told.result[1:])


def first_tokens(grown, window):
    return grown[:, :, :window]


def with_gaps(grown, window):
    return grown[:, :, -2 * window :: 2]


def without_the_last(grown, window):
    return grown[:, :, -window:-1]


@pytest.mark.parametrize("kept", [with_gaps, without_the_last, first_tokens])
def test_what_is_no_window_of_the_last_tokens_is_refused_by_name(kept) -> None:
    step = make_step(60, kept)
    arguments = [*(tokens(2, seed=s) for s in range(3)), tokens(100, seed=3), tokens(100, seed=4)]
    with torch.no_grad(), watching() as graphs, pytest.warns(KVQWarning, match="not understood as"):
        outputs = torch.compile(step, backend="kvq", options=OPTIONS | {"inner": "eager"})(
            *arguments
        )
    torch.testing.assert_close(outputs, step(*arguments))
    assert all(site.outcome == "left alone" for graph in graphs for site in graph.sites)


def test_windows_of_two_lengths_are_read_dense_for_that_reason() -> None:
    def step(query, key, value, keys, values):
        keys, values = torch.cat([keys, key], 2), torch.cat([values, value], 2)
        return sdpa(query, keys, values), keys[:, :, -60:], values[:, :, -50:]

    arguments = [*(tokens(2, seed=s) for s in range(3)), tokens(100, seed=3), tokens(100, seed=4)]
    expected = step(*arguments)
    with torch.no_grad(), pytest.warns(KVQWarning, match="windows of different lengths"):
        outputs = torch.compile(step, backend="kvq", options=OPTIONS | {"inner": "eager"})(
            *arguments
        )
    torch.testing.assert_close(outputs[0], expected[0])
    assert_one_step_apart(outputs[1].dequantize(), expected[1])
    assert_one_step_apart(outputs[2].dequantize(), expected[2])
