"""Outside graphs a slice along the batch of a static cache shares its memory, for writes and for reads."""

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile.kernels.cache.arranged import ArrangedKV
from kvq_compile.kernels.cache.arrangement import Arrangement
from kvq_compile.kernels.cache.become import thaw, thaw_arranged
from kvq_compile.kernels.cache.read_only import ReadOnlyTokens
from kvq_compile.kernels.cache.rows import caches_of_rows, count_by_row_
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.kernels.layout import Layout
from kvq_compile.options import make_config
from kvq_compile.testing.small_cache import LAYOUT, D, H, assert_same_bytes
from test_some_rows import Assigned, LitGPT, Llama, Narrowed, Pair

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

ROWS, SLOTS, HELD = 4, 100, 60
AT = torch.arange(HELD, HELD + 3)


def tokens(count: int, rows: int = ROWS) -> Tensor:
    generator = torch.Generator().manual_seed(count)
    return torch.randn(rows, H, count, D, generator=generator)


def static(layout: Layout = LAYOUT) -> QuantizedKV:
    """Return a cache of four rows, with one length for all."""
    return QuantizedKV.from_dense(tokens(SLOTS), layout, kind="static", length=HELD)


def assert_same_rows(one: QuantizedKV, other: QuantizedKV) -> None:
    rows = zip(
        caches_of_rows(count_by_row_(one)), caches_of_rows(count_by_row_(other)), strict=True
    )
    for mine, theirs in rows:
        assert_same_bytes(mine, theirs)


class ThroughASlice(LitGPT):
    """Rows that are assigned to."""

    def written(self, cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
        rows = cache[: new.shape[0]]
        rows[:, :, at] = new
        return rows


@pytest.mark.parametrize("kind", [LitGPT, Narrowed, Assigned, ThroughASlice, Llama])
def test_generation_goes_on_past_the_limit_of_graphs(kind: type[Any]) -> None:
    """Regression: the step ran uncompiled from there, and its write was refused."""
    pair = Pair(kind)
    with torch._dynamo.config.patch(recompile_limit=2):
        pair.generate(2)
        assert "compiled 2 times" in "".join(pair.told)
        for batch, count in ((3, 70), (1, 40), (4, 10)):
            pair.generate(batch, (count, 1, 1, 5))
        pair.assert_reads_as_plain()
    pair.generate(4, (60, 1))  # in compiled code again
    assert all(isinstance(x, (QuantizedKV, ArrangedKV)) for x in pair.caches)


@torch.no_grad()
def test_uncompiled_and_compiled_steps_alternate() -> None:
    pair = Pair(ThroughASlice)
    compiled = pair.compiled
    pair.call(4, 20, 0)
    pair.compiled = pair.model
    pair.generate(3, (30, 1, 1))
    pair.compiled = compiled
    pair.call(3, 1, 32)
    pair.compiled = pair.model
    pair.call(2, 1, 33)
    pair.compiled = compiled
    pair.call(2, 1, 34)
    assert pair.held() == [[35, 35, 33, 20]] * 2
    pair.assert_reads_as_plain()


WRITES: dict[str, Callable[[Any, Tensor], Any]] = {
    "index_copy_": lambda x, new: x[1:3].index_copy_(2, AT, new),
    "of narrowed rows": lambda x, new: x.narrow(0, 1, 2).index_copy_(2, AT, new),
    "of a chunk's slice": lambda x, new: x[1:].split(2)[0].index_copy_(2, AT, new),
    "of detached rows": lambda x, new: x.detach()[1:3].detach().index_copy_(2, AT, new),
    "assigned": lambda x, new: x[1:3].__setitem__((slice(None), slice(None), AT), new),
    "assigned by slice": lambda x, new: x[1:3].__setitem__((..., slice(60, 63), slice(None)), new),
    "row by row": lambda x, new: [x[1:].__setitem__((b, slice(None), AT), new[b]) for b in (0, 1)],
}


@pytest.mark.parametrize("how", sorted(WRITES))
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_the_owner_holds_what_is_written_into_a_slice(how: str, mode: Callable[[], Any]) -> None:
    cache, expected, new = static(), static(), tokens(3, 2)
    version = cache._version
    expected[1:3, :, AT] = new
    with mode():
        WRITES[how](cache, new)
    assert cache._version > version
    assert cache.held_by_row() == [60, 63, 63, 60]
    assert_same_rows(cache, expected)


def test_rows_are_filled_and_emptied_through_slices() -> None:
    cache, other = static(), static()
    cache[:1].copy_(tokens(SLOTS, 1))
    cache[3:].zero_()
    assert cache.held_by_row() == [SLOTS, HELD, HELD, 0]
    assert_same_bytes(caches_of_rows(cache)[1], caches_of_rows(count_by_row_(other))[1])
    cache[2:].copy_(other[:2])
    assert_same_bytes(caches_of_rows(cache)[3], caches_of_rows(other)[1])


@given(data=st.data())
def test_slices_read_what_the_owner_holds_whoever_writes(data: st.DataObject) -> None:
    cache, plain = static(), static().dequantize()
    held, ends = [(cache, plain)], [HELD] * ROWS
    for _ in range(6):
        one, dense = data.draw(st.sampled_from(held))
        first = data.draw(st.integers(0, one.shape[0] - 1))
        last = data.draw(st.integers(first + 1, one.shape[0]))
        held.append((one[first:last], dense[first:last]))  # type: ignore[arg-type]
        one, dense = data.draw(st.sampled_from(held))
        offset = dense.storage_offset() // plain.stride(0)
        mine = range(offset, offset + dense.shape[0])
        start = min(ends[row] for row in mine)
        new = tokens(1, dense.shape[0])
        if start < SLOTS:
            one[:, :, start : start + 1] = new
            dense[:, :, start : start + 1] = new
            for row in mine:
                ends[row] = max(ends[row], start + 1)
        assert cache.held_by_row() == ends if cache.by_row else len({*ends}) == 1
        for view, expected in held:
            whole = cache.dequantize()
            offset = expected.storage_offset() // plain.stride(0)
            assert torch.equal(view.dequantize(), whole[offset : offset + expected.shape[0]])
    for row, end in enumerate(ends):  # the newest tokens are exact
        newest = slice(end - 3, end)
        assert torch.equal(cache.dequantize()[row, :, newest], plain[row, :, newest])


def test_a_slice_follows_an_owner_that_counts_its_rows_or_passes_its_memory_on() -> None:
    cache = static()
    part = cache[1:3]
    count_by_row_(cache)[1:2, :, AT] = 1.0
    assert part.held_by_row() == [63, 60]  # type: ignore[attr-defined]
    cache = static()
    part = cache[1:3]
    heir = cache.pass_on(HELD)
    heir[:, :, AT] = 2.0
    assert torch.equal(part + 0, static().dequantize()[1:3])
    part.index_copy_(2, AT, tokens(3, 2))
    assert cache.held_by_row() == [60, 63, 63, 60]
    assert heir.held_by_row() == [63] * ROWS
    assert (heir.dequantize()[:, :, AT] == 2).all()


def test_a_slice_does_not_give_its_owners_memory_away() -> None:
    cache = static()
    heir = cache[1:3].pass_on(HELD)  # type: ignore[attr-defined]
    heir.zero_()
    assert_same_rows(cache, static())


def test_a_slice_of_a_cache_that_is_plain_again_is_refused() -> None:
    cache = static()
    part, view = cache[:2], cache[:2].detach()
    thaw(cache, "a reason")
    for x in (part, view):
        with pytest.raises(RuntimeError, match="slice that tensor anew"):
            x + 0
        with pytest.raises(RuntimeError, match="slice that tensor anew"):
            x.index_copy_(2, AT, tokens(3, 2))
    assert type(cache[:2]) is Tensor
    arranged = ArrangedKV([static()], Arrangement("BSHD"))
    part = arranged[:2]
    thaw_arranged(arranged, "a reason")
    with pytest.raises(RuntimeError, match="slice that tensor anew"):
        part + 0


def test_a_slice_that_is_thawed_itself_is_only_read() -> None:
    cache = static()
    part = cache[:2]
    thaw(part, "a reason")  # type: ignore[arg-type]
    assert type(part) is ReadOnlyTokens
    assert torch.equal(part + 0, cache.dequantize()[:2])
    with pytest.raises(NotImplementedError, match="and be lost"):
        part.index_copy_(2, AT, tokens(3, 2))


def test_copies_of_a_slice_are_their_own() -> None:
    cache = static()
    part = cache[1:3]
    file = io.BytesIO()
    torch.save(part, file)
    assert file.tell() < 0.75 * sum(part.nbytes for part in cache.parts) + 4096
    file.seek(0)
    made = [torch.load(file, weights_only=True), copy.deepcopy(part), part.clone(), part[[0, 1]]]
    for x in made:
        assert torch.equal(x.dequantize(), cache.dequantize()[1:3])
        x[:, :, AT] = 1.0
    assert_same_rows(cache, static())
    copy.copy(part)[:, :, AT] = 1.0  # which is of the same memory, as that of any tensor
    assert cache.held_by_row() == [60, 63, 63, 60]


def test_a_slice_keeps_the_memory_that_it_shows() -> None:
    part = static()[1:3]
    part[:, :, AT] = 1.0
    assert torch.equal(part[:, :, : AT[0]] + 0, static().dequantize()[1:3, :, : AT[0]])


@pytest.mark.parametrize("axes", ["BSHD", "BHSD", "SBHD"])
def test_slices_of_other_layouts_write_through(axes: str) -> None:
    cache = ArrangedKV([static()], Arrangement(axes))
    batch, slots = axes.index("B"), axes.index("S")
    x = cache.arrangement.join([tokens(3, 2)])
    cache.narrow(batch, 1, 2).index_copy_(slots, AT, x)
    assert cache.caches[0].held_by_row() == [60, 63, 63, 60]
    assert torch.equal(cache.caches[0].dequantize()[1:3, :, AT], tokens(3, 2))


ATTENTIVE = make_config({"method": "qaq", "sinks": 2, "window": 8, "page_size": 32}).spec


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x[::2].index_copy_(2, AT, tokens(3, 2)),
        lambda x: x[:2].transpose(1, 2).index_copy_(1, AT, tokens(3, 2).transpose(1, 2)),
        lambda x: x[:2, :, ::2].zero_(),
        lambda x: x[:2, :1].index_copy_(2, AT, tokens(3, 2)[:, :1]),
        lambda x: x[:2].add_(1),
        lambda x: x.__setitem__(([0, 1], slice(None), AT), 1.0),
        lambda x: x[1].index_copy_(1, AT, tokens(3, 1)[0]),
        lambda x: x[:1].expand(2, -1, -1, -1).index_copy_(2, AT, tokens(3, 2)),
        lambda x: x[:1].expand(2, -1, -1, -1)[:1].index_copy_(2, AT, tokens(3, 1)),
        lambda x: x[:2].index_fill_(2, AT, 1.0),
    ],
)
def test_what_cannot_go_through_raises(write: Callable[[Any], Any]) -> None:
    """Negative twins: steps, index tensors, other axes, operators that read what they change."""
    cache = static()
    with pytest.raises(NotImplementedError):
        write(cache)
    assert_same_rows(cache, static())


def test_rows_that_an_index_chooses_are_a_copy() -> None:
    """Negative twin: as of any tensor."""
    cache = static()
    cache[torch.tensor([0, 1])].index_copy_(2, AT, tokens(3, 2))
    assert_same_rows(cache, static())


def test_a_method_that_cannot_count_rows_refuses_by_name() -> None:
    """Negative twin: the slice stays a copy."""
    cache = static(ATTENTIVE.layout("key", D))
    before = cache.dequantize()
    with pytest.raises(NotImplementedError, match="sliced along its batch is a copy"):
        cache[:2].index_copy_(2, AT, tokens(3, 2))
    assert torch.equal(cache.dequantize(), before)


@torch.no_grad()
def test_compiled_code_reads_a_slice_anew_in_each_call() -> None:
    cache = static()
    part: Any = cache[1:3]
    read = torch.compile(lambda x: (x * 2).sum(-1), backend="kvq", fullgraph=True)
    for start in (60, 61):
        torch.testing.assert_close(read(part), (cache.dequantize()[1:3] * 2).sum(-1))
        part[:, :, start : start + 1] = tokens(1, 2)
    torch.testing.assert_close(read(part), (cache.dequantize()[1:3] * 2).sum(-1))
