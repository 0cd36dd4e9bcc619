"""A cache that is made for more sequences than a call has is served: the rows that the call takes, and no others."""

import copy
import io
import warnings
from collections.abc import Callable, Sequence
from fractions import Fraction
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from kvq_compile import KVQWarning
from kvq_compile.history import watching
from kvq_compile.kernels.cache.arranged import ArrangedKV
from kvq_compile.kernels.cache.rows import caches_of_rows
from kvq_compile.kernels.cache.some_rows import lend_rows
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.kernels.cpu import backend as cpu
from kvq_compile.kernels.packed import UNCALIBRATED, Packed
from kvq_compile.kernels.score import Score
from kvq_compile.kernels.triton import backend as triton
from kvq_compile.options import make_config
from kvq_compile.testing.small_cache import assert_same_bytes
from native import CONVERSIONS, DEVICE, OVERFLOWS, examples
from recorded_steps import Recorder
from thorough import THOROUGH

pytestmark = pytest.mark.usefixtures("fresh_dynamo")

OPTIONS = {"inner": "eager", "method": "int8", "sinks": 2, "window": 8, "page_size": 32}
ROWS, H, S, D = 4, 2, 128, 16
WIDTH = H * D


class Llama(nn.Module):
    """One layer of Meta's Llama: buffers ``[rows, S, H, D]`` of which a call takes the first rows."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.keys, self.values = torch.zeros(ROWS, S, H, D), torch.zeros(ROWS, S, H, D)

    def forward(self, x: Tensor, start: int) -> Tensor:
        bsz, count, _ = x.shape
        end = start + count
        xq, xk, xv = self.project(x).view(bsz, count, 3, H, D).unbind(2)
        self.keys, self.values = self.keys.to(xq), self.values.to(xq)
        self.keys[:bsz, start:end] = xk
        self.values[:bsz, start:end] = xv
        keys, values = self.keys[:bsz, :end], self.values[:bsz, :end]
        scores = xq.transpose(1, 2) @ keys.transpose(1, 2).transpose(2, 3) / D**0.5
        hidden = torch.full((count, count), float("-inf")).triu(1)
        mask = torch.hstack([torch.zeros(count, start), hidden])
        weights = (scores + mask).softmax(-1)
        return (weights @ values.transpose(1, 2)).transpose(1, 2).reshape(bsz, count, WIDTH)


class LitGPT(nn.Module):
    """One layer of lit-gpt: buffers ``[rows, H, S, D]``, written through a view of their first rows."""

    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(WIDTH, 3 * WIDTH, bias=False)
        self.register_buffer("keys", torch.zeros(ROWS, H, S, D), persistent=False)
        self.register_buffer("values", torch.zeros(ROWS, H, S, D), persistent=False)

    def forward(self, x: Tensor, at: Tensor) -> Tensor:
        B, T, _ = x.shape
        q, k, v = (t.view(B, T, H, D).transpose(1, 2) for t in self.project(x).split(WIDTH, -1))
        keys, values = self.written(self.keys, at, k), self.written(self.values, at, v)
        mask = torch.arange(S) <= at[:, None]
        return F.scaled_dot_product_attention(q, keys, values, mask).transpose(1, 2).flatten(2)

    def written(self, cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
        return cache[: new.shape[0]].index_copy_(2, at, new)


class Narrowed(LitGPT):
    """The same by ``narrow``."""

    def written(self, cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
        cache.narrow(0, 0, new.shape[0]).index_copy_(2, at, new)
        return cache.narrow(0, 0, new.shape[0])


class Assigned(LitGPT):
    """The same by assignment, and another view of the rows for attention."""

    def written(self, cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
        cache[: new.shape[0], :, at] = new
        return cache[: new.shape[0]]


class InTheMiddle(LitGPT):
    """Rows from the second on."""

    def written(self, cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
        cache[1 : 1 + new.shape[0], :, at] = new
        return cache[1 : 1 + new.shape[0]]


class Pair:
    """A model, compiled, and beside it a plain one.

    Attributes:
        model: The compiled one, whose caches become quantized.
        plain: The other one.
        told: Warnings of calls.
    """

    def __init__(self, kind: type[nn.Module], **options: Any) -> None:
        torch.manual_seed(0)
        self.model = kind()
        self.plain: Any = copy.deepcopy(self.model)
        self.compiled = torch.compile(self.model, backend="kvq", options=OPTIONS | options)
        self.told: list[str] = []

    def call(self, batch: int, count: int, start: int, atol: float = 0.03) -> None:
        """Run a call on both; the outputs are as close as codes of 8 bits make them."""
        x = torch.randn(batch, count, WIDTH)
        at = torch.arange(start, start + count) if isinstance(self.model, LitGPT) else start
        with torch.no_grad(), warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always", KVQWarning)
            output, expected = self.compiled(x, at), self.plain(x, at)
        self.told += [str(warning.message) for warning in told]
        torch.testing.assert_close(output, expected, atol=atol, rtol=0)

    def generate(self, batch: int, counts: Sequence[int] = (60, 1, 1, 5)) -> None:
        start = 0
        for count in counts:
            self.call(batch, count, start)
            start += count

    @property
    def caches(self) -> list[Any]:
        return [self.model.keys, self.model.values]

    def held(self) -> list[list[int]]:
        """Return how many tokens each row holds, of keys and of values."""
        caches = [x.caches[0] if isinstance(x, ArrangedKV) else x for x in self.caches]
        return [cache.held_by_row() for cache in caches]

    def assert_reads_as_plain(self) -> None:
        """Assert that eager reads see the plain tokens, where rows hold no others."""
        for cache, name in zip(self.caches, ("keys", "values"), strict=True):
            expected = getattr(self.plain, name)
            torch.testing.assert_close(cache.dequantize(), expected, atol=0.03, rtol=0)
            torch.testing.assert_close(cache + 0, expected, atol=0.03, rtol=0)


@pytest.mark.parametrize("kind", [Llama, LitGPT, Narrowed, Assigned])
def test_calls_of_any_batch_take_the_first_rows(kind: type[nn.Module]) -> None:
    pair = Pair(kind, strict=True)
    with watching() as graphs:
        pair.generate(2)
        assert pair.held() == [[67, 67, 0, 0]] * 2
        pair.assert_reads_as_plain()
        pair.generate(4)
        assert pair.held() == [[67] * 4] * 2
        pair.generate(1, (70, 1))
    assert pair.held() == [[71, 67, 67, 67]] * 2
    pair.assert_reads_as_plain()
    assert all(isinstance(x, (QuantizedKV, ArrangedKV)) for x in pair.caches)
    assert {site.outcome for graph in graphs for site in graph.sites} == {"rewritten"}
    assert {state.outcome for graph in graphs for state in graph.states} == {"quantized"}
    assert pair.told == []


@pytest.mark.parametrize("kind", [LitGPT, *[Llama] * THOROUGH])
def test_inductor_takes_the_first_rows(kind: type[nn.Module]) -> None:
    pair = Pair(kind, strict=True, inner="inductor")
    pair.generate(2, (60, 1, 1))
    pair.generate(4, (60, 1, 1))
    assert pair.held() == [[62] * 4] * 2
    pair.assert_reads_as_plain()


def test_rows_in_the_middle_are_taken() -> None:
    pair = Pair(InTheMiddle, strict=True)
    pair.generate(2)
    assert pair.held() == [[0, 67, 67, 0]] * 2
    pair.generate(3, (70, 1))
    assert pair.held() == [[0, 71, 71, 71]] * 2
    pair.assert_reads_as_plain()


def test_rows_that_a_call_does_not_take_keep_their_bytes() -> None:
    """Pages fill while the others go on, in steps and in chunks."""
    pair = Pair(LitGPT, strict=True)
    pair.generate(4)
    before = [cache.clone_packed() for cache in pair.caches]
    pair.generate(2, (50, 1, 1, 40, 1))
    for cache, old in zip(pair.caches, before, strict=True):
        rows = zip(caches_of_rows(cache), caches_of_rows(old), strict=True)
        for row, other in list(rows)[2:]:
            assert_same_bytes(row, other)


def test_what_other_rows_hold_before_is_packed_with_them() -> None:
    pair = Pair(LitGPT, strict=True)
    filled = torch.randn(H, 50, D)
    for model in (pair.model, pair.plain):
        model.keys[3, :, :50], model.values[2, :, :40] = filled, filled[:, :40]
    pair.generate(2)
    assert pair.held() == [[67, 67, 0, 50], [67, 67, 40, 0]]
    pair.assert_reads_as_plain()


@examples(Fraction(1, 2))
@given(data=st.data())
def test_each_row_goes_on_from_where_it_is_whatever_batch_a_call_has(data: st.DataObject) -> None:
    torch._dynamo.reset()
    pair = Pair(data.draw(st.sampled_from([Llama, LitGPT])), strict=True)
    ends = [0] * ROWS
    with torch._dynamo.config.patch(recompile_limit=64):
        for _ in range(5):
            batch = data.draw(st.integers(1, ROWS))
            start = data.draw(st.sampled_from([0, min(ends[:batch])]))
            count = data.draw(st.sampled_from([2, 33]) if start == 0 else st.sampled_from([1, 3]))
            pair.call(batch, count, start)
            ends[:batch] = [start + count] * batch
            assert pair.held() == [ends] * 2
    assert pair.told == []


BACKENDS = [cpu, triton] if DEVICE == "cpu" else [triton]


@CONVERSIONS
@OVERFLOWS
@pytest.mark.usefixtures("wide_tiles")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [range(2), range(1, 3)])
def test_kernels_write_and_read_rows_where_they_lie(backend: ModuleType, rows: range) -> None:
    """Rows that are lent give the bytes and the attention of a cache of their own; the others keep theirs."""
    torch.manual_seed(0)
    sides = [make_config(OPTIONS).spec.layout(role, 64) for role in ("key", "value")]
    new = torch.randn(2, ROWS, H, 80, 64, device=DEVICE)
    owners, whole, alone, before = [], [], [], []
    for layout, x in zip(sides, new, strict=True):
        cache = QuantizedKV.from_dense(x, layout, kind="static", length=[20, 37, 41, 5])
        owners.append(cache)
        before.append(cache.clone_packed())
        alone.append(cache[torch.tensor(rows, device=DEVICE)])
        whole.append(lend_rows(cache, rows))
    caches = [Packed(*cache.parts) for cache in whole]  # type: ignore[union-attr]
    own = [Packed(*cache.parts) for cache in alone]  # type: ignore[attr-defined]
    at = torch.tensor([[20], [37]], device=DEVICE) + torch.arange(40, device=DEVICE)
    if rows.start == 1:
        at += 4
    for layout, cache, other, x in zip(sides, caches, own, new, strict=True):
        for part in (cache, other):
            backend.append_(part, UNCALIBRATED, x[:2, :, :40], at - 10, None, layout)
        torch.testing.assert_close(list(cache), list(other), rtol=0, atol=0)
    query, asked = torch.randn(2, H, 1, 64, device=DEVICE), at[:, -1:] - 9
    mask = (torch.arange(80, device=DEVICE) <= asked[:, :, None])[:, None]
    about = UNCALIBRATED, UNCALIBRATED, mask, asked, None, Score(0.125), *sides
    tokens = new[0, :2, :, :1], new[1, :2, :, :1]
    seen, expected = (backend.attend(query, *tokens, *pair, *about) for pair in (caches, own))
    torch.testing.assert_close(seen, expected, rtol=0, atol=0)
    for cache, old in zip(owners, before, strict=True):
        for row in sorted({*range(ROWS)} - {*rows}):
            assert_same_bytes(caches_of_rows(cache)[row], caches_of_rows(old)[row])


def test_steps_on_rows_are_replayed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows that are lent stand where they stood, so that a recording holds."""
    recorder = Recorder.on_cpu(monkeypatch)
    pair = Pair(LitGPT, strict=True, mode="reduce-overhead")
    pair.generate(2, (60, *[1] * 6))
    assert recorder.replays > 2
    pair.generate(3, (60, *[1] * 6))
    assert pair.held() == [[66, 66, 66, 0]] * 2
    pair.assert_reads_as_plain()


@pytest.mark.parametrize("kind", [Llama, LitGPT])
def test_users_empty_copy_and_write_rows_in_between(kind: type[nn.Module]) -> None:
    pair = Pair(kind, strict=True)
    pair.generate(2)
    for model in (pair.model, pair.plain):
        model.keys.zero_()
        model.values.zero_()
    assert pair.held() == [[0] * 4] * 2
    pair.generate(3, (40, 1))
    copied = copy.deepcopy(pair.caches[0])
    assert pair.held() == [[41, 41, 41, 0]] * 2
    new = torch.randn(1, 50, H, D) if kind is Llama else torch.randn(1, H, 50, D)
    index = (
        (slice(1, 2), slice(0, 50)) if kind is Llama else (slice(1, 2), slice(None), slice(0, 50))
    )
    for model in (pair.model, pair.plain):
        model.keys[index], model.values[index] = new, new
    assert pair.held() == [[41, 50, 41, 0]] * 2
    pair.call(1, 1, 41)
    pair.assert_reads_as_plain()
    held = copied.caches[0] if isinstance(copied, ArrangedKV) else copied
    assert held.held_by_row() == [41, 41, 41, 0]
    file = io.BytesIO()
    torch.save(pair.caches, file)
    file.seek(0)
    for loaded, cache in zip(torch.load(file, weights_only=True), pair.caches, strict=True):
        assert torch.equal(loaded.dequantize(), cache.dequantize())


def test_an_error_in_a_call_leaves_lengths_that_the_next_one_reads_anew() -> None:
    pair = Pair(LitGPT, strict=True)
    pair.generate(2)
    with pytest.raises(RuntimeError), torch.no_grad():
        pair.compiled(torch.randn(2, 1, WIDTH + 1), torch.tensor([67]))
    pair.call(2, 1, 67)
    assert pair.held() == [[68, 68, 0, 0]] * 2


def test_a_write_that_rows_cannot_take_makes_the_whole_tensor_plain_again() -> None:
    pair = Pair(LitGPT)
    pair.generate(2)
    pair.generate(1, (80,))
    pair.call(4, 1, 70)  # behind empty positions of the last rows
    assert "behind empty cache positions" in "".join(pair.told)
    assert all(type(x) is Tensor for x in pair.caches)
    pair.call(2, 1, 71)
    for cache, name in zip(pair.caches, ("keys", "values"), strict=True):
        torch.testing.assert_close(cache, getattr(pair.plain, name), atol=0.03, rtol=0)


@pytest.mark.parametrize("kind", [Llama, LitGPT])
def test_rows_that_cannot_take_a_write_become_plain_with_all_others(kind: type[nn.Module]) -> None:
    pair = Pair(kind)
    pair.generate(3)
    pair.call(2, 1, 80)
    assert "behind empty cache positions" in "".join(pair.told)
    assert all(type(x) is Tensor for x in pair.caches)
    for cache, name in zip(pair.caches, ("keys", "values"), strict=True):
        torch.testing.assert_close(cache, getattr(pair.plain, name), atol=0.03, rtol=0)
    pair.call(3, 1, 81)


def by_index_of_rows(cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
    rows = torch.arange(new.shape[0])
    cache[rows[:, None], :, at] = new.transpose(1, 2)
    return cache[rows]


def to_other_rows(cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
    cache[: new.shape[0], :, at] = new
    return cache[1 : 1 + new.shape[0]]


def and_to_all(cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
    cache[: new.shape[0], :, at] = new
    cache[:, :, at] *= 1.5
    return cache[: new.shape[0]]


@pytest.mark.parametrize("written", [by_index_of_rows, to_other_rows, and_to_all])
def test_other_rows_in_one_graph_stay_in_16_bit(written: Callable[..., Tensor]) -> None:
    """Negative twins: rows that an index chooses, two ranges of rows, some rows and all."""

    class Other(LitGPT):
        def written(self, cache: Tensor, at: Tensor, new: Tensor) -> Tensor:
            return written(cache, at, new)

    pair = Pair(Other)
    pair.generate(2, (60, 1, 1))
    assert pair.told
    assert all(type(x) is Tensor for x in pair.caches)
    for cache, name in zip(pair.caches, ("keys", "values"), strict=True):
        torch.testing.assert_close(cache, getattr(pair.plain, name), atol=1e-5, rtol=0)


class Updated(nn.Module):
    """A call that returns updated copies of its caches, of as many rows as it has."""

    def forward(self, new: Tensor, keys: Tensor, values: Tensor, at: Tensor) -> tuple[Tensor, ...]:
        held = (x[: new.shape[0]].index_copy(2, at, new) for x in (keys, values))
        keys, values = held
        mask = torch.arange(S) <= at[:, None]
        return F.scaled_dot_product_attention(new, keys, values, mask), keys, values


def test_an_updated_copy_of_some_rows_leaves_the_cache_as_it_was() -> None:
    """Negative twin: what is returned must not be the memory of the rows that were taken."""
    pair = Pair(LitGPT)
    pair.generate(4, (40, 1))
    before = [cache.dequantize() for cache in pair.caches]
    call, at, new = Updated(), torch.arange(41, 44), torch.randn(2, H, 3, D)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore", KVQWarning)
        found = torch.compile(call, backend="kvq", options=OPTIONS)(new, *pair.caches, at)
        expected = call(new, *before, at)
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x + 0, y, atol=0.03, rtol=0)
    for cache, x in zip(pair.caches, before, strict=True):
        assert torch.equal(cache + 0, x)


@pytest.mark.parametrize("kind", [Llama, LitGPT])
def test_methods_that_cannot_count_rows_stay_in_16_bit_by_name(kind: type[nn.Module]) -> None:
    """So does a cache that calls with all rows have quantized."""
    pair = Pair(kind, method="qaq")
    pair.call(4, 60, 0)
    assert pair.told == []
    pair.call(2, 1, 60, atol=0.3)  # of codes of few bits
    assert "bits depend on the attention that tokens get" in "".join(pair.told)
    assert all(type(x) is Tensor for x in pair.caches)
