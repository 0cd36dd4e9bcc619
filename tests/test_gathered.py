"""Rows of a dynamic cache that are gathered later are those that were gathered at once, whatever happens meanwhile."""

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile import QuantizedKV, backend
from kvq_compile.kernels.cache.gathered import WAITS, Gathered

METHODS: dict[str, dict[str, Any]] = {
    "int2": {"window": 4, "page_size": 32},
    "tc": {},
    "qaq": {"keep_exact": "cpu"},
}
B, H, D = 3, 2, 32


def cache_of(method: str, tokens: int) -> QuantizedKV:
    layout = backend.make_config({"method": method, **METHODS[method]}).spec.layout("value", D)
    x = torch.randn(B, H, tokens, D, generator=torch.Generator().manual_seed(tokens))
    return QuantizedKV.from_dense(x, layout)


def at_once(cache: QuantizedKV, rows: Tensor) -> QuantizedKV:
    return cache._map_batch(lambda part: part.index_select(0, rows.to(part.device)))


@dataclass
class Twins:
    """Caches gathered later, and the same ones gathered at once."""

    later: list[QuantizedKV] = field(default_factory=list)
    at_once: list[QuantizedKV] = field(default_factory=list)

    def take(self, action: str, of: int, rows: list[int], tokens: int) -> None:
        of %= len(self.later)
        later, once = self.later[of], self.at_once[of]
        index = torch.tensor(rows)
        if action in ("gather", "replace"):
            made, twin = later.index_select(0, index), at_once(once, index)
            index.zero_()  # whoever does so later on does not change the rows
        elif action == "index":
            made, twin = later[index], at_once(once, index)
        elif action == "append":
            x = torch.randn(B, H, tokens, D, generator=torch.Generator().manual_seed(of))
            made, twin = torch.cat([later, x], 2), torch.cat([once, x], 2)
        elif action == "crop":
            left = max(1, later.shape[2] - tokens)
            made, twin = later[:, :, :left], once[:, :, :left]
        elif action == "copy":
            made, twin = later.clone(), once.clone()
        else:
            assert torch.equal(later.dequantize(), once.dequantize())
            return
        if action == "replace":
            self.later[of], self.at_once[of] = made, twin
        else:
            self.later.append(made)
            self.at_once.append(twin)

    def drop(self, of: int) -> None:
        if len(self.later) > 1:
            del self.later[of % len(self.later)], self.at_once[of % len(self.at_once)]


ACTIONS = ("gather", "replace", "index", "append", "crop", "copy", "read", "drop")


@settings(deadline=None)
@given(
    method=st.sampled_from(list(METHODS)),
    tokens=st.integers(1, 300),
    actions=st.lists(
        st.tuples(
            st.sampled_from(ACTIONS),
            st.integers(0, 5),
            st.lists(st.integers(0, B - 1), min_size=B, max_size=B),
            st.integers(1, 40),
        ),
        max_size=12,
    ),
)
@example("int2", 70, [("gather", 0, [2, 2, 0], 1), ("append", 0, [0] * 3, 1)])  # what rows are of
@example("int2", 70, [("gather", 0, [2, 2, 0], 1), ("gather", 0, [1, 0, 0], 1)])  # twice
@example("int2", 70, [("replace", 0, [2, 2, 0], 1), ("replace", 0, [1, 0, 2], 1)])  # in a row
@example(
    "int2", 70, [("crop", 0, [0] * 3, 30), ("gather", 1, [1, 1, 0], 1), ("drop", 0, [0] * 3, 1)]
)
@example(  # a view that has gone to memory of its own is none of the cache any more
    "int2",
    24,
    [("append", 0, [0] * 3, 1), ("append", 0, [0] * 3, 17), ("gather", 1, [0] * 3, 1)],
)
def test_caches_gathered_later_are_those_gathered_at_once(
    method: str, tokens: int, actions: list[Any]
) -> None:
    """Caches that live on keep their rows, and so do those whose source is gone."""
    twins = Twins([cache_of(method, tokens)], [cache_of(method, tokens)])
    for action, of, rows, count in actions:
        if action == "drop":
            twins.drop(of)
        else:
            twins.take(action, of, rows, count)
    for later, once in zip(twins.later, twins.at_once, strict=True):
        assert torch.equal(later.dequantize(), once.dequantize())
        more = torch.ones(B, H, 40, D)
        longer = (torch.cat([cache, more], 2).dequantize() for cache in (later, once))
        assert torch.equal(*longer)


def test_rows_take_the_place_of_a_cache_that_is_gone() -> None:
    cache = cache_of("int2", 80)
    before, where = cache._lineage.memory, [part.data_ptr() for part in cache.parts]
    cache = cache.index_select(0, torch.tensor([1, 1, 0]))
    assert cache._lineage.memory is None
    assert [part.data_ptr() for part in cache.parts] == where
    assert cache._lineage.memory == before


def test_rows_of_a_cache_that_lives_on_have_memory_of_their_own() -> None:
    cache = cache_of("int2", 80)
    before, where = cache._lineage.memory, [part.data_ptr() for part in cache.parts]
    rows = cache.index_select(0, torch.tensor([1, 1, 0]))
    assert not {part.data_ptr() for part in rows.parts} & set(where)
    assert [part.data_ptr() for part in cache.parts] == where
    assert cache._lineage.memory == before != rows._lineage.memory
    assert rows._lineage.memory is not None


@pytest.mark.parametrize("rows", [[0, 1, 2, 0], [1]])
def test_more_rows_or_fewer_are_gathered_at_once(rows: list[int]) -> None:
    cache = cache_of("int2", 80)
    made = cache.index_select(0, torch.tensor(rows))
    assert WAITS not in made.__dict__
    assert torch.equal(made.dequantize(), cache.dequantize()[rows])


def test_memory_of_several_processes_is_not_written() -> None:
    cache = cache_of("int2", 80)
    for part in cache.parts:
        part.share_memory_()
    kept = cache.codes
    before = kept.clone()
    cache = cache.index_select(0, torch.tensor([1, 1, 0]))
    cache.dequantize()
    assert torch.equal(kept, before)


def test_a_row_that_is_none_raises_at_once() -> None:
    cache = cache_of("int2", 80)
    with pytest.raises(IndexError):
        cache.index_select(0, torch.tensor([0, 1, 3]))
    assert WAITS not in cache.__dict__
    assert torch.equal(cache[torch.tensor([-1, 0, 0])].dequantize(), cache.dequantize()[[2, 0, 0]])


def test_a_copy_and_a_file_of_rows_that_wait_hold_them() -> None:
    import copy
    import pickle

    cache = cache_of("tc", 200)
    expected = cache.dequantize()[[2, 0, 0]]
    for copied in (copy.deepcopy, lambda rows: pickle.loads(pickle.dumps(rows))):
        rows = cache.index_select(0, torch.tensor([2, 0, 0]))
        assert torch.equal(copied(rows).dequantize(), expected)
        assert torch.equal(rows.dequantize(), expected)


@pytest.mark.parametrize("lives_on", [False, True])
def test_gathering_that_fails_is_done_again(
    lives_on: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Regression: what was gathered in place by then was gathered once more."""
    cache = cache_of("int2", 200)
    dense, source = cache.dequantize(), cache if lives_on else None
    cache = cache.index_select(0, torch.tensor([2, 0, 0]))
    row, left = Gathered._row, [1]

    def fails(self: Gathered, part: Tensor) -> Tensor:
        left[0] -= 1
        if left[0] < 0:
            raise torch.OutOfMemoryError("no room")
        return row(self, part)

    with monkeypatch.context() as patch:
        patch.setattr(Gathered, "_row", fails)
        with pytest.raises(torch.OutOfMemoryError):
            cache.dequantize()
    assert torch.equal(cache.dequantize(), dense[[2, 0, 0]])
    assert source is None or torch.equal(source.dequantize(), dense)


@pytest.fixture
def switching() -> Iterator[None]:
    """Let threads take turns as often as they can."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def gathers(rows: list[int]) -> Callable[[QuantizedKV, Tensor], bool]:
    return lambda cache, dense: torch.equal(
        cache.index_select(0, torch.tensor(rows)).dequantize(), dense[rows]
    )


def appends(cache: QuantizedKV, dense: Tensor) -> bool:
    longer = torch.cat([cache, torch.ones(B, H, 1, D)], 2).dequantize()
    return torch.equal(longer[:, :, :30], dense[:, :, :30])  # packed by then


def views(cache: QuantizedKV, dense: Tensor) -> bool:
    return torch.equal(cache[:, :, :30].dequantize(), dense[:, :, :30])


@pytest.mark.usefixtures("switching")
def test_threads_gather_and_use_one_cache_at_once() -> None:
    """Regression: two threads had rows of one cache wait, and gathered those of one in place although it lives on."""
    jobs = [gathers([2, 0, 0]), gathers([1, 1, 2]), appends, views]
    together = Barrier(len(jobs))

    def work(job: Callable[[QuantizedKV, Tensor], bool]) -> bool:
        together.wait()
        return job(cache, dense)

    with ThreadPoolExecutor(len(jobs)) as pool:
        for _ in range(100):
            cache = cache_of("int2", 70)
            dense = cache.dequantize()
            assert all(pool.map(work, jobs))
            assert torch.equal(cache.dequantize(), dense)


def test_rows_that_were_settled_before_leave_those_taken_next() -> None:
    """Regression: a thread that came second gave the source its parts, and the next rows were gathered in them."""
    cache = cache_of("int2", 70)
    dense = cache.dequantize()
    first = cache.index_select(0, torch.tensor([2, 0, 0]))
    late = first.__dict__[WAITS]
    second = cache.index_select(0, torch.tensor([1, 1, 2]))
    late.settle()
    assert torch.equal(second.dequantize(), dense[[1, 1, 2]])
    assert torch.equal(first.dequantize(), dense[[2, 0, 0]])
    assert torch.equal(cache.dequantize(), dense)
