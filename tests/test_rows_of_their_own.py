"""Sequences that are written at positions of their own (continuous batching) are packed, each up to its own end."""

import io
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import kvq_compile
from kvq_compile import KVQWarning
from kvq_compile.kernels.cache.rows import caches_of_rows
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.options import make_config
from kvq_compile.testing import assert_matches_dequantized, assert_within_bound
from kvq_compile.testing.small_cache import assert_same_bytes
from native import examples

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

OPTIONS = {"inner": "eager", "method": "int8", "sinks": 2, "window": 8, "page_size": 32}
B, H, D, S = 3, 2, 32, 128


def by_index(cache: Tensor, new: Tensor, at: Tensor) -> None:
    cache[torch.arange(B)[:, None], :, at] = new.transpose(1, 2)


def by_scatter(cache: Tensor, new: Tensor, at: Tensor) -> None:
    cache.scatter_(2, at[:, None, :, None].expand(B, H, -1, D), new)


def by_index_put(cache: Tensor, new: Tensor, at: Tensor) -> None:
    rows, heads = torch.arange(B)[:, None, None], torch.arange(H)[None, :, None]
    cache.index_put_((rows, heads, at[:, None]), new)


def by_flat_index(cache: Tensor, new: Tensor, at: Tensor) -> None:
    rows = torch.arange(B)[:, None, None] * H + torch.arange(H)[None, :, None]
    cache.view(B * H * S, D).index_copy_(0, (rows * S + at[:, None]).flatten(), new.reshape(-1, D))


def row_by_row(cache: Tensor, new: Tensor, at: Tensor) -> None:
    for row in range(B):
        cache[row].index_copy_(1, at[row], new[row])


def assigned_row_by_row(cache: Tensor, new: Tensor, at: Tensor) -> None:
    for row in range(B):
        cache[row, :, at[row]] = new[row]


def by_one_hot(cache: Tensor, new: Tensor, at: Tensor) -> None:
    cache.copy_(torch.where((torch.arange(S) == at)[:, None, :, None], new, cache))


def by_vector(cache: Tensor, new: Tensor, at: Tensor) -> None:
    cache[torch.arange(B), :, at[:, 0]] = new[:, :, 0]


WRITES = [by_index, by_scatter, by_index_put, by_flat_index, row_by_row, assigned_row_by_row]
OF_ONE = [by_one_hot, by_vector]  # of one token a row


def added(cache: Tensor, new: Tensor, at: Tensor) -> None:
    cache.scatter_add_(2, at[:, None, :, None].expand(B, H, -1, D), new)


def tokens(count: int, rows: int = B) -> list[Tensor]:
    return [torch.randn(rows, H, count, D) for _ in range(3)]


def prefill(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    at = torch.arange(k.shape[2])
    keys[:, :, at], values[:, :, at] = k, v
    return F.scaled_dot_product_attention(q, keys, values, torch.arange(S) <= at[:, None])


def until_each_row_ends(at: Tensor) -> Tensor:
    return (torch.arange(S) <= at[:, :, None])[:, None]


def until_the_last_row_ends(at: Tensor) -> Tensor:
    return torch.arange(S) <= at.amax(0)[:, None]


def step_of(
    write: Callable[..., None], mask: Callable[[Tensor], Tensor] = until_each_row_ends
) -> Callable[..., Tensor]:
    def step(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, at: Tensor) -> Tensor:
        write(keys, k, at)
        write(values, v, at)
        return F.scaled_dot_product_attention(q, keys, values, mask(at))

    return step


def places(first: list[int], count: int) -> Tensor:
    return torch.tensor(first)[:, None] + torch.arange(count)


class Batch:
    """Sequences in one pair of caches, and beside it in a plain one."""

    def __init__(self, lengths: list[int], options: dict[str, Any], packed: bool = False) -> None:
        self.options, self.spec = options, make_config(options).spec
        self.plain, self.caches = ([torch.zeros(B, H, S, D) for _ in range(2)] for _ in range(2))
        self.told: list[str] = []
        prompt = tokens(max(lengths))
        if max(lengths) == 0:
            return
        prefill(*prompt, *self.plain)
        fill = torch.compile(prefill, backend="kvq", options=options) if packed else prefill
        fill(*prompt, *self.caches)

    def run(self, step: Any, plain: Any, first: list[int], count: int) -> tuple[Tensor, ...]:
        """Run a step on both; return its query, new keys and values, both outputs."""
        new, at = tokens(count), places(first, count)
        expected = plain(*new, *self.plain, at)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", KVQWarning)
            output = step(*new, *self.caches, at)
        self.told += [str(warning.message) for warning in told]
        return *new, output, expected


def compiled(step: Callable[..., Tensor], options: dict[str, Any]) -> Any:
    return torch.compile(step, backend="kvq", options=options)


@pytest.mark.parametrize("was_packed", [False, True])
@pytest.mark.parametrize("write", [*WRITES, *OF_ONE])
@torch.no_grad()
def test_rows_at_positions_of_their_own_are_packed_in_any_spelling(
    write: Callable[..., None], was_packed: bool
) -> None:
    torch.manual_seed(0)
    batch, first = Batch([60, 41, 20], OPTIONS, was_packed), [60, 41, 20]
    plain = step_of(write)
    step = compiled(plain, OPTIONS)
    for _ in range(25):
        *_, output, expected = batch.run(step, plain, first, 1)
        torch.testing.assert_close(output, expected, atol=0.03, rtol=0)  # of codes of 8 bits
        first = [start + 1 for start in first]
    assert batch.told == []
    assert all(type(cache) is QuantizedKV and cache.by_row for cache in batch.caches)
    assert all(cache.held_by_row() == first for cache in batch.caches)


UNIFORM = ["int8", "int4", "int3", "kivi"]  # whose error has a bound that follows from its size


@dataclass
class RowCall:
    """What one row saw of one call: its output, query and mask, its tokens as read and as given, those held before."""

    output: Tensor
    query: Tensor
    mask: Tensor
    read: list[Tensor]
    given: list[Tensor]
    held: int
    spec: CacheSpec


def drawn_calls(data: st.DataObject, method: str) -> Iterator[RowCall]:
    """Yield every row of some calls: rows go on, start again at slot 0 and take chunks, whatever the others do."""
    torch._dynamo.reset()
    sizes = {"sinks": data.draw(st.integers(0, 4)), "window": data.draw(st.integers(0, 20))}
    options = {"inner": "eager", "method": method, "page_size": 32, **sizes}
    options |= {"kivi": {"bits": 4}, "tc": {"bits": 3}}.get(method, {})
    count = data.draw(st.sampled_from([1, 1, 2, 5]))
    write = data.draw(st.sampled_from(WRITES + OF_ONE * (count == 1)))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    first = [data.draw(st.integers(0, 80)) for _ in range(B)]
    batch, plain = Batch([80] * B, options), step_of(write)
    step = compiled(plain, options)
    batch.run(step, plain, first, count)  # whose buffers are quantized behind it
    for _ in range(4):
        first = [data.draw(st.sampled_from([start + count] * 3 + [0])) for start in first]
        before = [cache.dequantize() for cache in batch.caches]
        query, *new, output, _ = batch.run(step, plain, first, count)
        for row, start in enumerate(first):
            mine, end = slice(row, row + 1), start + count
            mask = until_each_row_ends(places(first, count))[mine, ..., :end]
            read = [
                torch.cat([x[mine, :, :start], y[mine]], 2)
                for x, y in zip(before, new, strict=True)
            ]
            given = [x[mine, :, :end] for x in batch.plain]
            about = output[mine], query[mine], mask, read, given
            yield RowCall(*about, start, batch.spec)
    assert batch.told == []


@examples()
@given(method=st.sampled_from([*UNIFORM, "tc"]), data=st.data())
@torch.no_grad()
def test_each_row_attends_to_its_own_tokens_as_they_are_read(
    method: str, data: st.DataObject
) -> None:
    for call in drawn_calls(data, method):
        assert_matches_dequantized(call.output, call.query, *call.read, None, mask=call.mask)


@examples()
@given(method=st.sampled_from(UNIFORM), data=st.data())
@torch.no_grad()
def test_each_row_is_as_close_to_its_own_tokens_as_the_bound_says(
    method: str, data: st.DataObject
) -> None:
    for call in drawn_calls(data, method):
        about = call.output, call.query, *call.given, call.spec
        assert_within_bound(*about, held=call.held, mask=call.mask)


@pytest.mark.parametrize(
    ("was_packed", "reason"),
    [(False, "shows what lies behind the end of a row"), (True, "goes on to read behind")],
)
@torch.no_grad()
def test_a_mask_that_shows_what_lies_behind_the_end_of_a_row_is_refused(
    was_packed: bool, reason: str
) -> None:
    torch.manual_seed(0)
    batch, plain = (
        Batch([40, 40, 40], OPTIONS, was_packed),
        step_of(by_index, until_the_last_row_ends),
    )
    step = compiled(plain, OPTIONS)
    *_, output, expected = batch.run(step, plain, [40, 31, 20], 1)
    torch.testing.assert_close(output, expected, atol=0.03, rtol=0)
    assert reason in "".join(batch.told)
    assert all(type(cache) is Tensor for cache in batch.caches)


@torch.no_grad()
def test_a_row_that_starts_again_holds_the_bytes_of_a_new_cache() -> None:
    torch.manual_seed(0)
    batch, plain = Batch([80, 61, 70], OPTIONS), step_of(by_index)
    step, taken = compiled(plain, OPTIONS), []
    batch.run(step, plain, [80, 61, 70], 1)
    for number in range(44):
        _, key, _, _, _ = batch.run(step, plain, [81 + number, number, 71 + number], 1)
        taken.append(key[1:2])
    layout = batch.caches[0].page_layout
    alone = torch.zeros(1, H, S, D)
    alone[:, :, :44] = torch.cat(taken, 2)
    expected = QuantizedKV.from_dense(alone, layout, kind="static", length=44)
    assert_same_bytes(caches_of_rows(batch.caches[0])[1], expected)
    assert batch.caches[0].held_by_row() == [125, 44, 115]
    assert batch.told == []


@torch.no_grad()
def test_a_row_is_filled_again_outside_compiled_calls_while_others_go_on() -> None:
    torch.manual_seed(0)
    batch, plain = Batch([60, 60, 60], OPTIONS, packed=True), step_of(by_index)
    step, first = compiled(plain, OPTIONS), [60, 60, 60]
    for number in range(6):
        if number == 3:
            for caches in (batch.plain, batch.caches):
                torch.manual_seed(1)
                for cache in caches:
                    cache[1, :, :50] = torch.randn(H, 50, D)
            first[1] = 50
        *_, output, expected = batch.run(step, plain, first, 1)
        torch.testing.assert_close(output, expected, atol=0.03, rtol=0)
        first = [start + 1 for start in first]
    assert batch.told == []
    assert batch.caches[1].held_by_row() == first


@pytest.mark.parametrize(
    ("first", "reason"),
    [
        ([60, 42, 20], "behind empty cache positions"),
        ([60, -1, 20], "counted from its end"),
        ([128, 41, 20], "behind the end of the cache"),
    ],
)
@torch.no_grad()
def test_positions_that_a_row_cannot_take_are_told(first: list[int], reason: str) -> None:
    batch, plain = Batch([59, 40, 19], OPTIONS), step_of(by_index)
    step = compiled(plain, OPTIONS)
    batch.run(step, plain, [59, 40, 19], 1)
    new = tokens(1)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always", KVQWarning)
        with suppress(IndexError, RuntimeError):  # of the plain write
            step(*new, *batch.caches, places(first, 1))
    assert reason in str(told[0].message)
    assert all(type(cache) is Tensor for cache in batch.caches)


@pytest.mark.parametrize("method", ["qaq"])
@torch.no_grad()
def test_methods_that_weigh_attention_stay_in_16_bit_by_name(method: str) -> None:
    options = OPTIONS | {"method": method}
    batch, plain = Batch([40, 40, 40], options), step_of(by_index)
    *_, output, expected = batch.run(compiled(plain, options), plain, [40, 31, 20], 1)
    assert torch.equal(output, expected)
    assert "each row of the cache is written at positions of its own" in "".join(batch.told)
    assert all(type(cache) is Tensor for cache in batch.caches)


@torch.no_grad()
def test_other_writes_get_reasons_of_their_own() -> None:
    batch, plain = Batch([40, 40, 40], OPTIONS), step_of(added)
    batch.run(compiled(plain, OPTIONS), plain, [40, 31, 20], 1)
    assert batch.told
    assert "positions of its own" not in "".join(batch.told)


@torch.no_grad()
def test_rows_are_written_at_one_position_again() -> None:
    torch.manual_seed(0)
    batch, plain = Batch([40, 40, 40], OPTIONS), step_of(by_index)
    batch.run(compiled(plain, OPTIONS), plain, [40, 31, 20], 1)
    new = tokens(50)
    expected = prefill(*new, *batch.plain)
    output = compiled(prefill, OPTIONS | {"strict": True})(*new, *batch.caches)
    torch.testing.assert_close(output, expected, atol=1e-5, rtol=0)
    assert batch.caches[0].held_by_row() == [50, 50, 50]


def of_lengths(lengths: list[int], seed: int = 0) -> QuantizedKV:
    torch.manual_seed(seed)
    layout = make_config(OPTIONS).spec.layout("key", D)
    x = torch.randn(len(lengths), H, S, D)
    return QuantizedKV.from_dense(x, layout, kind="static", length=lengths)


def test_rows_survive_a_file() -> None:
    cache, file = of_lengths([90, 3, 0]), io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    assert loaded.held_by_row() == [90, 3, 0]
    assert torch.equal(loaded.dequantize(), cache.dequantize())


def test_a_file_whose_row_counts_too_many_tokens_is_refused() -> None:
    cache, file = of_lengths([90, 3, 0]), io.BytesIO()
    cache.cursor[1, 0] = S + 1
    torch.save(cache, file)
    file.seek(0)
    with pytest.raises(ValueError, match="cursor must hold"):
        torch.load(file, weights_only=True)


def test_rows_are_taken_and_joined_with_their_lengths() -> None:
    cache = of_lengths([90, 3, 50])
    assert cache[torch.tensor([2, 0])].held_by_row() == [50, 90]
    alike = QuantizedKV.from_dense(
        torch.randn(2, H, S, D), cache.page_layout, kind="static", length=7
    )
    joined = torch.cat([alike, cache], 0)
    assert joined.held_by_row() == [7, 7, 90, 3, 50]
    parts = [alike.dequantize(), cache.dequantize()]
    assert torch.equal(joined.dequantize(), torch.cat(parts))


def test_a_report_counts_the_tokens_of_each_row() -> None:
    cache = of_lengths([90, 3, 50])
    told = kvq_compile.report([cache]).tensors[0]
    assert (told.rows, told.held) == ((90, 3, 50), 90)
    assert told.elements == 143 * H * D


def test_a_slice_of_a_row_is_written_as_a_tensor_is() -> None:
    cache, x = of_lengths([90, 3, 50]), torch.randn(H, 20, D)
    plain = cache.dequantize()
    cache[1, :, 2:22], plain[1, :, 2:22] = x, x
    cache[0:2, :, 0:1], plain[0:2, :, 0:1] = 1.0, 1.0
    torch.testing.assert_close(cache.dequantize(), plain, atol=0.03, rtol=0)
    assert cache.held_by_row() == [90, 22, 50]
    with pytest.raises(ValueError, match="must start at or before"):
        cache[1, :, 40:41] = 1.0


def rolled(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, _at: Tensor) -> Tensor:
    for cache, new in ((keys, k), (values, v)):
        moved = cache.roll(-1, 2)
        moved[:, :, -1:] = new
        cache.copy_(moved)
    return F.scaled_dot_product_attention(q, keys, values)


def written_twice(
    q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor, at: Tensor
) -> Tensor:
    first = step_of(by_index)(q, k, v, keys, values, at)
    return first + step_of(by_index)(q, k + 1, v + 1, keys, values, at + 1)


@pytest.mark.parametrize(
    ("other", "reason"),
    [
        (rolled, "rows have lengths of their own"),
        (written_twice, "each once a call at positions of its own"),
    ],
)
@torch.no_grad()
def test_what_rows_of_different_lengths_cannot_take_is_told(
    other: Callable[..., Tensor], reason: str
) -> None:
    """Regression: a cache that counts its rows and was rolled raised, for it has no length of all."""
    torch.manual_seed(0)
    batch, plain = Batch([40, 40, 40], OPTIONS), step_of(by_index)
    batch.run(compiled(plain, OPTIONS), plain, [40, 40, 40], 1)
    *_, output, expected = batch.run(compiled(other, OPTIONS), other, [41, 41, 41], 1)
    torch.testing.assert_close(output, expected, atol=0.03, rtol=0)
    assert reason in "".join(batch.told)
    assert all(type(cache) is Tensor for cache in batch.caches)


@torch.no_grad()
def test_keys_may_count_their_rows_where_values_do_not() -> None:
    torch.manual_seed(0)
    batch, x = Batch([60, 60, 60], OPTIONS, packed=True), torch.randn(H, 60, D)
    for caches in (batch.plain, batch.caches):
        caches[0][1, :, :60] = x
    new = tokens(4)
    expected = prefill_behind(*new, *batch.plain)
    output = compiled(prefill_behind, OPTIONS | {"strict": True})(*new, *batch.caches)
    torch.testing.assert_close(output, expected, atol=0.03, rtol=0)
    assert [cache.by_row for cache in batch.caches] == [True, False]


def prefill_behind(q: Tensor, k: Tensor, v: Tensor, keys: Tensor, values: Tensor) -> Tensor:
    at = torch.arange(60, 60 + k.shape[2])
    keys[:, :, at], values[:, :, at] = k, v
    return F.scaled_dot_product_attention(q, keys, values, torch.arange(S) <= at[:, None])
