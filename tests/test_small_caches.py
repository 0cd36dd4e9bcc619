"""A short cache takes what its tokens take: nothing is held for tokens that may come."""

from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._dynamo.utils import counters

from kvq_compile import QuantizedKV
from kvq_compile.kernels.cache.saved import FORMAT, plain_layout, rebuild
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import (
    MIN_SIZE,
    ROWS_STEP,
    UNCALIBRATED,
    Packed,
    flat,
    paged,
    widened,
    with_room,
)
from kvq_compile.kernels.score import Score
from kvq_compile.options import make_spec
from kvq_compile.testing import assert_matches_dequantized
from kvq_compile.testing.small_cache import LAYOUT, assert_same_bytes, grown, tokens
from kvq_compile.testing.small_decoder import Decoder
from native import DEVICE
from thorough import THOROUGH

SMALL = {"method": "int4", "sinks": 2, "window": 7, "page_size": 32}
METHODS = ("int8", "int4", "int3", "kivi")


def most_bytes(length: int, layout: Layout, element: int) -> int:
    """Return what a head's tensors take at most: an eighth more rows and pages than are used, and the least sizes."""
    rows = min(layout.token_rows, length + length // 8 + ROWS_STEP - 1)
    pages = layout.pages_at(length)
    packed = (pages + pages // 8) * layout.bits_per_element * layout.page_size / 8
    return int((max(rows, ROWS_STEP) * element + packed) * layout.head_dim) + MIN_SIZE * 4


@given(st.sampled_from(METHODS), st.integers(0, 700), st.sampled_from(("key", "value")))
def test_a_cache_holds_an_eighth_more_than_its_tokens_take(
    method: str, count: int, role: str
) -> None:
    layout = make_spec(method).layout(role, 64)
    cache = QuantizedKV.from_dense(torch.zeros(1, 2, count, 64, dtype=torch.bfloat16), layout)
    cursor = cache.cursor.nbytes
    assert cache.nbytes <= 2 * most_bytes(count, layout, 2) + cursor


@pytest.mark.parametrize("method", METHODS)
def test_no_length_takes_much_more_than_16_bit(method: str) -> None:
    """From 64 tokens on, where a step of capacity is an eighth; with the default regions."""
    layout = make_spec(method).layout("key", 128)
    for count in range(64, 2049, 7):
        cache = QuantizedKV.from_dense(torch.zeros(1, 1, count, 128, dtype=torch.bfloat16), layout)
        assert cache.nbytes <= 1.25 * count * 128 * 2


@given(st.lists(st.integers(1, 60), min_size=1, max_size=12), st.integers(0, 99))
def test_a_cache_that_grew_holds_the_bytes_of_one_made_at_once(
    pieces: list[int], seed: int
) -> None:
    x = tokens(sum(pieces), seed)
    cache, start = QuantizedKV.from_dense(x[:, :, :0], LAYOUT), 0
    for piece in pieces:
        cache = torch.cat([cache, x[:, :, start : start + piece]], 2)
        start += piece
    assert_same_bytes(cache, QuantizedKV.from_dense(x, LAYOUT))


@given(st.integers(0, 90), st.integers(0, 40))
def test_tokens_without_room_are_refused_and_nothing_changes(count: int, new: int) -> None:
    cache = grown(count)
    before = [part.clone() for part in cache.parts]
    end, rows = count + new, cache.exact.shape[2]
    room = LAYOUT.pages_at(end) <= cache.paged().codes.shape[2]
    append = torch.ops.kvq.append_.default
    arguments = cache.parts, [], tokens(new), None, count, LAYOUT
    if room and min(end, LAYOUT.token_rows) <= rows:
        append(*arguments)
        assert int(cache.cursor[0]) == end
    else:
        with pytest.raises(ValueError, match="the cache must have room for"):
            append(*arguments)
        assert all(map(torch.equal, cache.parts, before))


@given(st.integers(0, 200))
def test_flat_pages_are_the_pages(count: int) -> None:
    cache = grown(count)
    parts = paged(cache.parts, LAYOUT)
    assert parts[0].shape[2:] == (*parts[0].shape[2:3], LAYOUT.rows, LAYOUT.row_words)
    assert all(map(torch.equal, flat(parts, LAYOUT), cache.parts))


@given(st.integers(0, 200), st.integers(0, 60))
def test_caches_with_more_room_and_with_less_are_joined(count: int, less: int) -> None:
    x, start = tokens(count), max(0, count - less)
    made = QuantizedKV.from_dense(x, LAYOUT)
    grew = torch.cat([QuantizedKV.from_dense(x[:, :, :start], LAYOUT), x[:, :, start:]], 2)
    joined = torch.cat([made, grew], 0)
    assert type(joined) is QuantizedKV
    assert torch.equal(joined.dequantize(), torch.cat([made.dequantize(), made.dequantize()]))


@given(st.integers(0, 160), st.integers(1, 60))
def test_a_file_with_all_rows_and_spare_pages_is_read_and_grows(count: int, more: int) -> None:
    """As caches were that earlier versions saved."""
    x = tokens(count + more)
    static = QuantizedKV.from_dense(x[:, :, :count], LAYOUT, kind="static")
    file = [part.clone() for part in static.parts]
    cache = rebuild(FORMAT, plain_layout(LAYOUT), "grown", count, file, [])
    assert_same_bytes(torch.cat([cache, x[:, :, count:]], 2), QuantizedKV.from_dense(x, LAYOUT))


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("inner", ["eager", "inductor"])
def test_a_generation_from_no_page_to_several_takes_two_graphs(inner: str) -> None:
    """Of the prompt and of all steps: one fewer than without quantization, which compiles the first step apart."""
    before = counters["stats"]["unique_graphs"]
    about = 1, (4, 2), 64, torch.float32, "grown", (3, *[1] * 110), (0, 0), "none"
    for call in Decoder(*about, SMALL, 0).run(inner=inner):
        if call.held:
            assert_matches_dequantized(call.output, call.query, call.key, call.value, call.caches)
    assert counters["stats"]["unique_graphs"] - before == 2


KERNELS = [(module, method) for module in ("cpu", "triton") for method in ("int4", "kivi", "int3")]
if (
    not THOROUGH
):  # Triton's interpreter takes seconds; fields of powers of two are those of kivi, too
    KERNELS.remove(("triton", "int4"))


@pytest.mark.long(but=["triton-int3", "cpu-kivi", "cpu-int4", "cpu-int3"])
@pytest.mark.filterwarnings("ignore:Conversion of an array with ndim:DeprecationWarning")
@pytest.mark.parametrize(("module", "method"), KERNELS)
def test_kernels_read_and_write_few_rows_and_flat_pages_as_all(module: str, method: str) -> None:
    backend = import_module(f"kvq_compile.kernels.{module}.backend")
    device = DEVICE if module == "triton" else torch.device("cpu")
    spec = make_spec(method, sinks=2, window=7, page_size=32)
    layouts = [spec.layout(role, 64) for role in ("key", "value")]
    # A page is packed with the fourth piece. Sixty queries at once take the interpreter seconds more.
    pieces = (3, 20, 1, 17, 1, *[60] * (THOROUGH or module == "cpu"))
    x, length = tokens(sum(pieces)).to(device), 0
    empty = [Packed.growing(x, 0, layout) for layout in layouts]
    for new in pieces:
        fresh = x[:, :, length : length + new]
        pairs, reads = [], []
        for few, layout in zip(empty, layouts, strict=True):
            few = Packed(*with_room(few, length + new, layout))
            whole = Packed(*(part.clone() for part in few.paged(layout)))
            pairs.append(
                (
                    few,
                    whole._replace(exact=widened(whole.exact, layout.exact_rows, layout.tail_rows)),
                )
            )
        for read in zip(*pairs, strict=True):
            about = UNCALIBRATED, UNCALIBRATED, None, None, length, Score(0.125), *layouts
            reads.append(backend.attend(fresh, fresh, fresh, *read, *about))
        assert torch.equal(*reads)
        length += new
        for (few, whole), layout in zip(pairs, layouts, strict=True):
            backend.append_(few, UNCALIBRATED, fresh, None, length - new, layout)
            backend.append_(whole, UNCALIBRATED, fresh, None, length - new, layout)
            held = few.paged(layout)
            rows = few.exact.shape[2]
            whole = whole._replace(exact=whole.exact[:, :, :rows])
            assert all(map(torch.equal, held, whole))
            read = (backend.dequantize(at, UNCALIBRATED, length, layout) for at in (few, held))
            assert torch.equal(*read)
        empty = [few for few, _ in pairs]
