"""A quantized cache behaves as the tensor it stands for, through every stage of its life."""

import copy
import io
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, invariant, rule
from torch import Tensor

from kvq_compile.kernels.cache.read_only import ReadOnlyTokens
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.testing import kv_tensors, lengths, page_layouts
from kvq_compile.testing.small_cache import (
    LAYOUT,
    B,
    D,
    H,
    assert_is_quantized,
    assert_same_bytes,
    grown,
    static,
    tokens,
)

# Growing


@given(st.data())
def test_bytes_do_not_depend_on_the_pieces_in_which_tokens_come(data: st.DataObject) -> None:
    layout = data.draw(page_layouts(transform=False))
    dtype = data.draw(st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
    count = data.draw(lengths(layout))
    x = data.draw(kv_tensors((1, 2, count, layout.head_dim), dtype))
    splits = sorted(data.draw(st.lists(st.integers(0, count), max_size=4)))
    pieces = [x[:, :, a:b] for a, b in zip([0, *splits], [*splits, count], strict=True)]
    cache = QuantizedKV.from_dense(pieces[0], layout)
    buffer = QuantizedKV.from_dense(x, layout, kind="static", length=0)
    written = 0
    for piece in pieces:
        buffer[:, :, written : written + piece.shape[2]] = piece
        written += piece.shape[2]
    for piece in pieces[1:]:
        cache = torch.cat([cache, piece], 2)
    at_once = QuantizedKV.from_dense(x, layout)
    assert_same_bytes(cache, at_once)
    assert_same_bytes(buffer, QuantizedKV.from_dense(x, layout, kind="static"))
    assert torch.equal(buffer.dequantize(), at_once.dequantize())


def test_codes_of_a_full_page_never_change() -> None:
    cache, pages = grown(0), []
    for step in range(0, 150, 3):
        cache = torch.cat([cache, tokens(3, step)], 2)
        pages.append(cache.paged().codes[:, :, : int(cache.cursor[1])].clone())
    assert pages[-1].shape[2] == 4
    for page in pages:
        assert torch.equal(page, pages[-1][:, :, : page.shape[2]])


def test_a_token_changes_once_from_exact_to_quantized() -> None:
    x = tokens(150)
    cache = QuantizedKV.from_dense(x[:, :, :40], LAYOUT)
    views, before = [cache], [cache.dequantize()]
    for step in range(40, 150, 10):
        views.append(torch.cat([views[-1], x[:, :, step : step + 10]], 2))
        for view, old in zip(views[:-1], before, strict=True):
            new = view.dequantize()
            changed = (new != old).flatten(3).any(-1).any(0).any(0)
            assert torch.equal(old[:, :, changed], x[:, :, : len(changed)][:, :, changed])
            old.copy_(new)
        before.append(views[-1].dequantize())


def test_appending_to_the_newest_view_takes_no_new_memory() -> None:
    cache = grown(40)
    longer = torch.cat([cache, tokens(1, 1)], 2)
    assert all(mine is theirs for mine, theirs in zip(cache.parts, longer.parts, strict=True))


def test_appending_to_an_older_view_copies_and_changes_no_other() -> None:
    cache = grown(100)
    longer = torch.cat([cache, tokens(70, 1)], 2)
    values = longer.dequantize()
    branch = torch.cat([cache, tokens(50, 2)], 2)
    assert torch.equal(longer.dequantize(), values)
    assert torch.equal(branch.dequantize()[:, :, -5:], tokens(50, 2)[:, :, -5:])
    assert branch.codes.data_ptr() != longer.codes.data_ptr()


@given(st.integers(1, 200), st.integers(0, 5), st.integers(1, 70))
def test_undoing_up_to_a_window_and_redoing_leaves_the_same_bytes(
    count: int, undone: int, more: int
) -> None:
    x = tokens(count + more)
    once = QuantizedKV.from_dense(x, LAYOUT)
    cache = QuantizedKV.from_dense(x[:, :, :count], LAYOUT)
    kept = max(0, count - undone)
    cache = torch.cat([cache[:, :, :kept], tokens(undone, 9)], 2)[:, :, :kept]
    cache = torch.cat([cache, x[:, :, kept:]], 2)
    assert_same_bytes(cache, once)


def numbered(count: int, first: int) -> Tensor:
    """Return tokens that are one number each, which quantizing token by token keeps exactly."""
    number = torch.arange(first, first + count).remainder(1000).float()
    return number[:, None].expand(B, H, count, D) + 1000 * torch.arange(B)[:, None, None, None]


class Views(RuleBasedStateMachine):
    """Whatever is done to views of grown caches, each stays the tensor it stands for."""

    views = Bundle("views")

    def __init__(self) -> None:
        super().__init__()
        self.alive: list[tuple[weakref.ref[QuantizedKV], Tensor]] = []
        self.next = 1

    def keep(self, cache: Any, expected: Tensor) -> tuple[QuantizedKV, Tensor]:
        assert type(cache) is QuantizedKV
        self.alive.append((weakref.ref(cache), expected))
        return cache, expected

    def new(self, count: int, batch: int) -> Tensor:
        self.next += count
        return numbered(count, self.next)[:1].expand(batch, H, count, D)

    @rule(target=views, count=st.integers(0, 120))
    def start(self, count: int) -> Any:
        x = self.new(count, B).contiguous()
        return self.keep(QuantizedKV.from_dense(x, LAYOUT), x)

    @rule(target=views, view=views, count=st.sampled_from([0, 1, 1, 1, 2, 33, 70]))
    def append(self, view: Any, count: int) -> Any:
        x = self.new(count, view[0].shape[0])
        return self.keep(torch.cat([view[0], x], 2), torch.cat([view[1], x], 2))

    @rule(target=views, view=views, data=st.data())
    def crop(self, view: Any, data: st.DataObject) -> Any:
        cut = data.draw(st.integers(1, view[0].shape[2])) if view[0].shape[2] else 0
        end = view[0].shape[2] - cut
        return self.keep(view[0][..., :end, :], view[1][..., :end, :])

    @rule(target=views, view=views, data=st.data())
    def gather(self, view: Any, data: st.DataObject) -> Any:
        rows = st.integers(0, view[0].shape[0] - 1)
        index = torch.tensor(data.draw(st.lists(rows, min_size=1, max_size=3)))
        if data.draw(st.booleans()):
            return self.keep(view[0][index, ...], view[1][index, ...])
        return self.keep(view[0].index_select(0, index), view[1].index_select(0, index))

    @rule(
        target=views,
        view=views,
        how=st.sampled_from(["clone", "copy", "deepcopy", "pickle", "save"]),
    )
    def copy(self, view: Any, how: str) -> Any:
        return self.keep(COPIES[how](view[0]), view[1].clone())

    @rule(target=views, view=views)
    def join(self, view: Any) -> Any:
        if view[0].shape[0] > 8:
            return view
        return self.keep(torch.cat([view[0], view[0].clone()], 0), torch.cat([view[1], view[1]], 0))

    @rule(view=consumes(views))
    def drop(self, view: Any) -> None:
        del view

    @invariant()
    def every_view_is_what_it_stands_for(self) -> None:
        self.alive = [(ref, expected) for ref, expected in self.alive if ref() is not None]
        for ref, expected in self.alive:
            cache = ref()
            assert cache is not None
            assert torch.equal(cache.dequantize(), expected)


def saved_and_loaded(cache: Any) -> Any:
    file = io.BytesIO()
    torch.save(cache, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


COPIES: dict[str, Callable[[Any], Any]] = {
    "clone": torch.clone,
    "copy": copy.copy,
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
    "save": saved_and_loaded,
}

TestViews = Views.TestCase
TestViews.settings = settings(stateful_step_count=15)


# Copies


@pytest.mark.parametrize("how", sorted(COPIES))
@pytest.mark.parametrize("make", [lambda: grown(90), lambda: static(100, 90)])
def test_a_copy_has_the_bytes_and_kind_of_its_original(
    how: str, make: Callable[[], QuantizedKV]
) -> None:
    cache = make()
    other = COPIES[how](cache)
    assert type(other) is QuantizedKV
    assert (other.kind, other.page_layout) == (cache.kind, cache.page_layout)
    assert_same_bytes(cache, other)
    shared = {p.data_ptr() for p in cache.parts} & {p.data_ptr() for p in other.parts}
    assert bool(shared) == (how == "copy")


def test_views_pickled_together_do_not_share_memory_afterwards() -> None:
    """Regression: loaded views shared their parts, did not know of each other and overwrote each other."""
    short = grown(60)
    long = torch.cat([short, tokens(60, 1)], 2)
    short, long = pickle.loads(pickle.dumps((short, long)))
    values = long.dequantize()
    torch.cat([short, tokens(60, 2)], 2)
    assert torch.equal(long.dequantize(), values)


def test_a_shallow_copy_knows_of_the_views_of_its_memory() -> None:
    """Regression: ``copy.copy`` gave a second owner of the same memory."""
    cache = grown(60)
    other = copy.copy(cache)
    longer = torch.cat([cache, tokens(60, 1)], 2)
    values = longer.dequantize()
    torch.cat([other, tokens(60, 2)], 2)
    assert torch.equal(longer.dequantize(), values)


def test_a_state_dict_is_loaded_into_a_quantized_buffer() -> None:
    module, other = torch.nn.Module(), torch.nn.Module()
    module.register_buffer("cache", static(100, 90))
    other.register_buffer("cache", static(100, 20, seed=1))
    other.load_state_dict(copy.deepcopy(module.state_dict()))
    assert_same_bytes(other.cache, module.cache)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_changing_the_dtype_keeps_the_codes(dtype: torch.dtype) -> None:
    cache = grown(90)
    other = cache.to(dtype)
    assert (type(other), other.dtype, other.exact.dtype) == (QuantizedKV, dtype, dtype)
    assert torch.equal(other.codes, cache.codes)
    assert torch.equal(other.dequantize(), cache.dequantize().to(dtype))
    assert other.to(dtype) is other


def test_numbers_that_are_not_floating_are_dequantized() -> None:
    """Regression: the exact rows became integers inside a cache that went on calling itself quantized."""
    cache = grown(90)
    assert type(cache.int()) is Tensor
    assert torch.equal(cache.int(), cache.dequantize().int())


def test_moving_to_the_device_it_is_on_moves_nothing() -> None:
    cache = grown(90)
    assert cache.to("cpu") is cache
    assert_same_bytes(cache.to("cpu", copy=True), cache)


# Along the batch


@pytest.mark.parametrize("make", [lambda: grown(90), lambda: static(100, 90)])
@pytest.mark.parametrize(
    "act",
    [
        lambda x: x.index_select(0, torch.tensor([1, 1, 0])),
        lambda x: x[torch.tensor([1, 0])],
        lambda x: x[[1, 1, 0], ...],
        lambda x: x[torch.tensor([False, True])],
        lambda x: x[1:],
        lambda x: x.repeat_interleave(3, dim=0),
        lambda x: x.repeat_interleave(3, 0),
        lambda x: x.repeat_interleave(torch.tensor([2, 1]), dim=-4),
        lambda x: x.detach(),
        lambda x: x[:],
        lambda x: x[:, :, :],
        lambda x: torch.cat([x, x.clone()]),
    ],
)
def test_what_is_done_along_the_batch_stays_quantized(
    act: Callable[[Any], Any], make: Callable[[], QuantizedKV]
) -> None:
    """Regression: ``repeat_interleave``, which beam search calls, dequantized the cache."""
    cache = make()
    assert_is_quantized(act(cache), act(cache.dequantize()))


@pytest.mark.parametrize("end", [-200, -90, -60, -1, 0, 30, 90, 1000])
def test_truncating_takes_any_end_that_a_tensor_takes(end: int) -> None:
    """Regression: an end further back than the cache is long gave a cache of negative length."""
    cache = grown(90)
    assert_is_quantized(cache[:, :, :end], cache.dequantize()[:, :, :end])


# Reading


READS: list[Callable[[Tensor], Any]] = [
    lambda x: x + 1,
    lambda x: x * x,
    lambda x: x.float() @ x.transpose(2, 3),
    lambda x: x[0, 1, 3:7],
    lambda x: x[:, :, 5:9],
    lambda x: x[:, :, ::2],
    lambda x: x[:, :, torch.tensor([3, 1])],
    lambda x: x[:, :, None].expand(B, H, 2, x.shape[2], D).reshape(B, 2 * H, -1, D),
    lambda x: x.repeat_interleave(2, dim=1),
    lambda x: x.repeat_interleave(2),
    lambda x: x.permute(0, 2, 1, 3).contiguous(),
    lambda x: x.narrow(2, 4, 9).sum(-1),
    lambda x: torch.stack([x, x]),
    lambda x: torch.cat([x, x], 3),
    lambda x: torch.cat([torch.ones(B, H, 1, D), x], 2),
    lambda x: x.amax(),
    lambda x: x.unbind(0)[1],
    lambda x: torch.zeros(B, H, x.shape[2], D).copy_(x),
    lambda x: torch.zeros(B, H, x.shape[2], D).index_copy_(2, torch.arange(x.shape[2]), x),
    lambda x: torch.nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True),
    lambda x: torch.isnan(x).any(),
    lambda x: x[1].tolist(),
]


@pytest.mark.parametrize("read", READS)
@pytest.mark.parametrize("make", [lambda: grown(90), lambda: static(100, 90)])
def test_everything_else_equals_the_operation_on_the_dequantized_tokens(
    read: Callable[[Tensor], Any], make: Callable[[], QuantizedKV]
) -> None:
    cache = make()
    got, expected = read(cache), read(cache.dequantize())
    if isinstance(expected, Tensor):
        assert type(got) in (Tensor, ReadOnlyTokens)
        torch.testing.assert_close(got.clone(), expected)
    else:
        assert got == expected
