"""The last queries, held with the keys: a token decoded alone is weighed by them as a chunk is by its own."""

from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile.kernels import ops, reference
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.kernels.cpu import append
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import UNCALIBRATED
from kvq_compile.kernels.reference import mixed
from kvq_compile.kernels.reference.importance import recent_importance
from kvq_compile.kernels.reference.queries import recall
from kvq_compile.kernels.score import Score
from kvq_compile.kernels.spec import QUERIES
from kvq_compile.options import make_spec
from kvq_compile.testing import changed
from native import CONVERSIONS, OVERFLOWS, examples
from qaq_model import SMALL, make_model, run
from written_caches import Caches

transformers = pytest.importorskip("transformers")

pytestmark = [CONVERSIONS, OVERFLOWS]
SHARED = 2
FILLS = 2 + 5 + 32  # tokens that complete the first page
Parts = tuple[Tensor, Tensor, Tensor, Tensor]


def layout_of(role: Any = "key", **options: Any) -> Layout:
    return make_spec("qaq", **{**SMALL, **options}).layout(role, 32, SHARED)


def tokens(count: int, seed: int = 0, heads: int = 2) -> Tensor:
    return torch.randn(2, heads, count, 32, generator=torch.Generator().manual_seed(seed))


def written(x: Tensor, query: Tensor | None, cuts: list[int], layout: Layout) -> Parts:
    """Return the cache of tokens that came in pieces, each with its queries."""
    parts = ops.quantize(x[:, :, :0], x.shape[2], False, layout, [])
    for first, last in pairwise(cuts):
        asked = None if query is None else query[:, :, first:last]
        ops.append_(parts, [], x[:, :, first:last], None, first, layout, query=asked)
    return parts


def held_queries(parts: Parts, layout: Layout) -> tuple[Tensor, int]:
    """Return the queries of the last tokens, ``[B, Hq, count, D]``, and the slot of the first."""
    held = int(parts[3][0])
    rows, first = recall(parts[2], held, 0, held, layout)
    return rows.transpose(2, 3).flatten(1, 2), first


def weighed(
    query: Tensor, x: Tensor, parts: Parts, layout: Layout, mask: Tensor | None = None,
    queries: int = QUERIES,
) -> Tensor:  # fmt: skip
    """Return the importance in a call with these queries of the last of the tokens ``x``."""
    end = x.shape[2]
    start = end - query.shape[2]
    about = start, end, 0.2, True, queries, layout, UNCALIBRATED
    return recent_importance(query, x[:, :, start:], parts, mask, *about)


# What is held


@given(st.integers(1, 90), st.lists(st.integers(0, 90), max_size=6))
def test_the_last_queries_are_held_in_whatever_pieces_tokens_come(
    count: int, cuts: list[int]
) -> None:
    layout = layout_of()
    x, query = tokens(count), tokens(count, 1, 2 * SHARED)
    parts = written(x, query, sorted({0, count, *(min(cut, count) for cut in cuts)}), layout)
    found, first = held_queries(parts, layout)
    assert first == max(0, count - QUERIES)
    assert torch.equal(found, query[:, :, first:])


def test_a_long_prompt_leaves_its_last_queries_though_it_is_appended_in_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(append, "SCRATCH_ELEMENTS", 1)
    layout, x, query = layout_of(), tokens(66), tokens(66, 1, 2 * SHARED)
    for asked in (
        query,
        query[:, :, 60:],
    ):  # of all tokens; or of the last, as a model may compute them
        parts = ops.quantize(x[:, :, :0], 66, False, layout, [])
        ops.append_(parts, [], x, None, 0, layout, query=asked)
        assert torch.equal(held_queries(parts, layout)[0], query[:, :, 61:])


@given(st.integers(1, 60), st.integers(0, 60), st.integers(0, 9), st.booleans())
def test_forgotten_tokens_leave_the_queries_before_them_or_none(
    count: int, kept: int, new: int, told: bool
) -> None:
    """A row that a forgotten token took is zero, not that token's: the twin that keeps it would be wrong."""
    kept = min(kept, count)
    layout, x, query = layout_of(), tokens(count), tokens(count, 1, 2 * SHARED)
    parts = written(x, query, [0, count], layout)
    more = tokens(new, 3, 2 * SHARED) if told else None
    reference.append_(*parts, tokens(new, 2), kept, layout, query=more)
    found, first = held_queries(parts, layout)
    for slot in range(first, kept + new):
        known = slot < kept and slot + QUERIES >= count
        expected = query[:, :, slot] if known else torch.zeros(2, 2 * SHARED, 32)
        if slot >= kept and more is not None:
            expected = more[:, :, slot - kept]
        assert torch.equal(found[:, :, slot - first], expected)


def test_queries_stay_with_their_sequence_and_survive_copies(tmp_path: Any) -> None:
    layout, x, query = layout_of(), tokens(50), tokens(50, 1, 2 * SHARED)
    cache = QuantizedKV(written(x, query, [0, 50], layout), [], layout, "grown", 50)
    torch.save(cache, tmp_path / "cache")
    expected = query[:, :, 45:]
    for same in (cache.clone(), cache[:], torch.load(tmp_path / "cache")):
        assert torch.equal(held_queries(same.parts, layout)[0], expected)
    turned = cache.index_select(0, torch.tensor([1, 0]))
    assert torch.equal(held_queries(turned.parts, layout)[0], expected.flip(0))
    assert torch.equal(turned.dequantize(), cache.dequantize().flip(0))
    longer = torch.cat([cache, tokens(1, 2)], 2)
    found, _ = held_queries(longer.parts, layout)
    assert torch.equal(found[:, :, :4], expected[:, :, 1:])
    assert not found[:, :, 4].any()  # written outside an attention


@pytest.mark.parametrize("options", [{}, {"bits": 4, "value_target": 0.1}])
def test_only_keys_hold_queries_and_their_bytes_are_counted(options: dict[str, Any]) -> None:
    key, value = layout_of(**options), layout_of("value", **options)
    assert (key.queries, key.shared_by, value.queries) == (QUERIES, SHARED, 0)
    text, names = key.__fx_repr__()
    assert eval(text, dict(names)) == key
    plain = changed(key, queries=0, shared_by=0)
    held, less = (QuantizedKV.from_dense(tokens(40), at).part_bytes() for at in (key, plain))
    assert held["exact"] - less["exact"] == 4 * 2 * 2 * QUERIES * SHARED * 32
    even = make_spec("int4").layout("key", 32, SHARED)
    assert even.queries == even.shared_by == 0


# What they are for


@given(st.integers(0, 3), st.integers(1, QUERIES), st.integers(1, QUERIES), st.integers(0, 99))
def test_decoded_tokens_weigh_as_a_chunk_of_them_would(
    pages: int, chunk: int, queries: int, seed: int
) -> None:
    """And hence get the same bits; pages complete with the last of them."""
    layout = layout_of()
    end = FILLS + 32 * pages
    x, query = tokens(end, seed), tokens(end, seed + 1, 2 * SHARED) * 3
    before = end - chunk
    whole = written(x[:, :, :before], query, [0, before], layout)
    single = written(x[:, :, : end - 1], query, [0, before, *range(before + 1, end)], layout)
    expected = weighed(query[:, :, before:], x, whole, layout, queries=queries)
    found = weighed(query[:, :, end - 1 :], x, single, layout, queries=queries)
    assert expected.amax() > 0
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-7)


def test_without_the_held_queries_the_weights_are_others() -> None:
    layout, x, query = layout_of(), tokens(FILLS), tokens(FILLS, 1, 2 * SHARED) * 3
    parts = written(x[:, :, :-1], query, [0, FILLS - 1], layout)
    alone = written(x[:, :, :-1], None, [0, FILLS - 1], layout)
    found, expected = (weighed(query[:, :, -1:], x, p, layout) for p in (parts, alone))
    assert (found - expected).abs().amax() > 0.1
    only = weighed(query[:, :, -1:], x, parts, layout, queries=1)
    torch.testing.assert_close(only, expected)


@given(st.integers(0, 6), st.booleans(), st.integers(0, 99))
def test_held_queries_see_what_was_there_and_what_the_mask_shows(
    padding: int, boolean: bool, seed: int
) -> None:
    """Against the definition, with the first slots hidden as by padding, and slots behind the last."""
    layout, x, query = layout_of(), tokens(FILLS, seed), tokens(FILLS, seed + 1, 2 * SHARED)
    mask = torch.ones(FILLS, FILLS + 7, dtype=torch.bool).tril()
    mask[:, :padding] = False
    parts = written(x[:, :, :-2], query, [0, FILLS - 2], layout)
    last = mask[-2:]
    given_mask = last if boolean else torch.zeros(last.shape).masked_fill(~last, -1e30)
    found = weighed(query[:, :, -2:], x, parts, layout, given_mask)
    expected = mixed.importance(query[:, :, -QUERIES:], x, mask[-QUERIES:, :FILLS], 0.2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@given(st.integers(0, 40), st.integers(0, 99))
def test_after_a_rewind_importance_reads_the_keys_that_attention_reads(
    back: int, seed: int
) -> None:
    """Regression: where pages end was told by the length alone, which a rewind within the window makes wrong."""
    layout = layout_of()
    x, count = tokens(140, seed), FILLS + 32 + 20
    parts = written(x[:, :, :count], None, [0, count], layout)
    start = count - back
    new = x[:, :, start : FILLS + 96]
    query = tokens(new.shape[2], seed + 1, 2 * SHARED)
    seen = torch.cat([reference.read(*parts, start, layout), new], 2)
    end = seen.shape[2]
    about = start, end, 0.2, True, QUERIES, layout, UNCALIBRATED
    found = recent_importance(query, new, parts, None, *about)
    mask = torch.ones(end, end, dtype=torch.bool).tril()[-QUERIES:]
    expected = mixed.importance(query[:, :, -QUERIES:], seen, mask, 0.2)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("slot", ["position", "start"])
def test_operators_keep_their_declarations(slot: str) -> None:
    layout, x, query = layout_of(), tokens(FILLS), tokens(FILLS, 1, 2 * SHARED)
    parts = written(x[:, :, :-1], query, [0, FILLS - 1], layout)
    new, asked = x[:, :, -1:].contiguous(), query[:, :, -1:].contiguous()
    where = (torch.tensor([FILLS - 1]), None) if slot == "position" else (None, FILLS - 1)
    about = FILLS + 9, Score(0.2), False, QUERIES, layout
    torch.library.opcheck(ops.importance, (asked, new, parts, [], None, *where, *about))
    torch.library.opcheck(ops.append_, (parts, [], new, *where, layout, None, asked))
    torch.library.opcheck(ops.quantize, (x, FILLS, slot == "start", layout, [], None, query))


# In Triton


@examples(Fraction(1, 3))
@given(st.data())
def test_the_kernel_holds_the_queries_of_the_reference(data: st.DataObject) -> None:
    layout = changed(layout_of(), shared_by=data.draw(st.sampled_from([1, 2, 3])))
    dtype = data.draw(st.sampled_from([torch.float32, torch.float16]))
    caches, held = Caches(layout, dtype), 0
    for seed in range(data.draw(st.integers(1, 4))):
        start = data.draw(st.integers(max(0, held - 9), held))
        new = data.draw(st.sampled_from([1, 1, 2, 6, 40]))
        known = data.draw(st.sampled_from([0, 1, new]))
        query = tokens(known, seed, 2 * layout.shared_by)[:1].to(dtype) if known else None
        x = tokens(new, seed + 9)[:1].to(dtype)
        caches.append(x, start, data.draw(st.booleans()), None, query)
        held = start + new
    caches.assert_equal()


# In a model


def test_a_decoded_page_is_weighed_by_the_queries_before_the_last() -> None:
    """Negative twin: the same steps whose caches hold no queries, as do those that a user has quantized."""
    model = make_model()
    ids = torch.randint(0, 64, (1, 90), generator=torch.Generator().manual_seed(3))
    layers = []
    for holds in (True, False):
        call, cache = run(model), transformers.DynamicCache(config=model.config)
        with torch.no_grad():
            call(ids[:, :66], cache)
            for layer in cache.layers * (not holds):
                held = layer.keys.page_layout
                layout = changed(held, queries=0, shared_by=0)
                parts = list(layer.keys.parts)
                parts[2] = parts[2][:, :, : parts[2].shape[2] - held.tail_rows].contiguous()
                layer.keys = QuantizedKV(parts, [], layout, "grown", 66)
            for slot in range(66, 72):
                call(ids[:, slot : slot + 1], cache)
        layers.append([layer.values for layer in cache.layers])
    for held, without in zip(*layers, strict=True):
        pages = held.paged().codes[:, :, :2], without.paged().codes[:, :, :2]
        assert torch.equal(pages[0][:, :, 0], pages[1][:, :, 0])
        assert not torch.equal(pages[0][:, :, 1], pages[1][:, :, 1])
