"""A quantized cache behaves as the tensor it stands for, through every stage of its life."""

import copy
import gc
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
from torch.multiprocessing.reductions import StorageWeakRef

from kvq_compile.convert import become
from kvq_compile.kernels import reference
from kvq_compile.kernels.cache import QuantizedKV
from kvq_compile.kernels.ops import PARTS
from kvq_compile.kernels.read_only import ReadOnlyTokens
from kvq_compile.kernels.spec import CacheSpec, PageLayout, TensorSpec
from kvq_compile.testing import kv_tensors, lengths, page_layouts

LAYOUT = CacheSpec(TensorSpec(2), TensorSpec(2), sinks=2, window=5, page_size=32).layout("key", 64)
B, H, D = 2, 2, LAYOUT.head_dim
aten = torch.ops.aten


def tokens(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(B, H, count, D, generator=torch.Generator().manual_seed(seed)).to(dtype)


def grown(count: int, seed: int = 0, layout: PageLayout = LAYOUT) -> QuantizedKV:
    return QuantizedKV.from_dense(tokens(count, seed), layout)


def static(slots: int, held: int, seed: int = 0) -> QuantizedKV:
    return QuantizedKV.from_dense(tokens(slots, seed), LAYOUT, kind="static", length=held)


def used(cache: QuantizedKV) -> list[Tensor]:
    """Return the bytes that count: packed pages, exact rows that hold a token, cursor."""
    length, pages = cache.cursor.tolist()
    layout = cache.page_layout
    first = layout.sinks + pages * layout.page_size
    rows = reference.exact_row_index(first, max(first, length), layout, cache.device)
    rows = torch.cat([torch.arange(min(length, layout.sinks)), rows])
    return [
        cache.codes[:, :, :pages],
        cache.params[:, :, :pages],
        cache.exact[:, :, rows],
        cache.cursor,
    ]


def assert_same_bytes(one: QuantizedKV, other: QuantizedKV) -> None:
    assert one.shape == other.shape
    for name, mine, theirs in zip(PARTS, used(one), used(other), strict=True):
        assert torch.equal(mine, theirs), name


def assert_is_quantized(cache: Any, expected: Tensor) -> None:
    assert type(cache) is QuantizedKV
    assert torch.equal(cache.dequantize(), expected)


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
        pages.append(cache.codes[:, :, : int(cache.cursor[1])].clone())
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
    if how != "copy":
        assert not {p.data_ptr() for p in cache.parts} & {p.data_ptr() for p in other.parts}


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


# Writing


@pytest.mark.parametrize("start", [0, 1, 30, 90])
@pytest.mark.parametrize("count", [0, 1, 8])
def test_every_way_of_writing_tokens_writes_the_same(start: int, count: int) -> None:
    x, position = tokens(count, 1), torch.arange(start, start + count)
    writes: list[Callable[[Any], Any]] = [
        lambda cache: cache.index_copy_(2, position, x),
        lambda cache: cache.index_copy_(-2, position, x),
        lambda cache: cache.__setitem__((slice(None), slice(None), position), x),
        lambda cache: cache.__setitem__((..., position, slice(None)), x),
        lambda cache: cache.__setitem__((..., slice(start, start + count), slice(None)), x),
        lambda cache: aten.index_put_(cache, (None, None, position), x) if count else None,
    ]
    expected = static(100, 90)
    torch.ops.kvq.append_(*expected.parts, x, None, start, LAYOUT.token)
    for write in writes:
        cache = static(100, 90)
        write(cache)
        if count:
            assert_same_bytes(cache, expected)
            assert torch.equal(
                cache.dequantize()[:, :, start + count :], torch.zeros(B, H, 100 - start - count, D)
            )
        else:
            assert_same_bytes(cache, static(100, 90))


def test_a_write_broadcasts_as_an_assignment_does() -> None:
    cache = static(100, 20)
    cache[:, :, 20:24] = 2.5
    cache[:, :, -76] = tokens(1, 1)[:, :, 0]
    cache[:, :, 25:27] = torch.ones(D)
    read = cache.dequantize()
    assert (read[:, :, 20:24] == 2.5).all()
    assert torch.equal(read[:, :, 24], tokens(1, 1)[:, :, 0])
    assert (read[:, :, 25:27] == 1).all()
    assert cache.held() == 27


def test_a_rewinding_write_forgets_what_lies_behind_it() -> None:
    cache, x = static(100, 60), tokens(100)
    cache[:, :, 57:58] = tokens(1, 1)
    assert cache.held() == 58
    read = cache.dequantize()
    assert torch.equal(read[:, :, 57:58], tokens(1, 1))
    assert not read[:, :, 58:].any()
    cache[:, :, 57:100] = x[:, :, 57:]
    assert_same_bytes(cache, static(100, 100))


@pytest.mark.parametrize(
    "write",
    [
        lambda cache, x: cache.index_copy_(2, torch.arange(95, 105), x),
        lambda cache, x: aten.index_put_(cache, (None, None, torch.arange(95, 105)), x),
        lambda cache, x: cache.__setitem__((slice(None), slice(None), torch.arange(95, 105)), x),
        lambda cache, x: cache.__setitem__((slice(None), slice(None), slice(95, 105)), x),
        lambda cache, x: cache.copy_(torch.cat([x] * 11, 2)),
    ],
)
def test_more_tokens_than_a_static_cache_has_slots_are_refused_and_nothing_changes(
    write: Callable[[Any, Tensor], Any],
) -> None:
    """Regression: the room of the last page was written to, slots or not."""
    cache, before = static(100, 95), static(100, 95)
    with pytest.raises(
        (ValueError, RuntimeError), match=r"slots of the cache|must match|expanded size"
    ):
        write(cache, tokens(10, 1))
    assert_same_bytes(cache, before)


@pytest.mark.parametrize("position", [[3, 5], [5, 4], [3, 3]])
def test_positions_that_do_not_follow_one_another_are_refused(position: list[int]) -> None:
    cache, before = static(100, 90), static(100, 90)
    with pytest.raises(ValueError, match="must follow one another"):
        cache[:, :, torch.tensor(position)] = tokens(2)
    assert_same_bytes(cache, before)


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x.add_(1),
        lambda x: x.fill_(0),
        lambda x: x.index_copy_(3, torch.arange(D), x.dequantize()),
        lambda x: aten.index_put_(x, (None, None, torch.tensor([0])), torch.ones(1), True),
        lambda x: x.masked_fill_(torch.ones(1, dtype=torch.bool), 0),
        lambda x: x.scatter_(2, torch.zeros(1, 1, 1, 1, dtype=torch.int64), 1.0),
        lambda x: torch.add(x.dequantize(), 1, out=x),
        lambda x: torch._foreach_zero_([x]),
        lambda x: x.transpose_(1, 2),
        lambda x: x.__setitem__((0, slice(None)), 1.0),
        lambda x: x.__setitem__((slice(None), 1), 1.0),
        lambda x: x.__setitem__((slice(None), slice(None), slice(None), slice(3)), 1.0),
        lambda x: x.__setitem__((slice(None), slice(None), slice(0, 9, 2)), 1.0),
        lambda x: x.__setitem__(x.dequantize() > 0, 0.0),
    ],
)
@pytest.mark.parametrize("make", [lambda: grown(90), lambda: static(100, 90)])
def test_a_write_that_cannot_be_quantized_is_an_error(
    write: Callable[[Any], Any], make: Callable[[], QuantizedKV]
) -> None:
    """Regression: ``out=`` and list arguments wrote into a dequantized copy."""
    cache, before = make(), make()
    with pytest.raises(NotImplementedError):
        write(cache)
    assert_same_bytes(cache, before)


@pytest.mark.parametrize(
    "write",
    [
        lambda x: x[:, :, 3:5].copy_(torch.zeros(1)),
        lambda x: x[:, :, 3:5].__setitem__(..., 0.0),
        lambda x: x.narrow(2, 4, 4).zero_(),
        lambda x: x.narrow(2, 0, 4).zero_(),
        lambda x: x[:, :, :4].zero_(),
        lambda x: x[0].mul_(2),
        lambda x: x[0:1].zero_(),
        lambda x: x[1:].copy_(torch.zeros(1)),
        lambda x: x.transpose(1, 2)[:, 3].fill_(1),
        lambda x: x.unbind(0)[0].add_(1),
        lambda x: torch.add(torch.ones(H, x.shape[2], D), 1, out=x[1]),
        lambda x: x.select(2, 3).data.zero_(),
        lambda x: x[0, 0, 3:5].view(-1).index_fill_(0, torch.tensor([0]), 1.0),
        lambda x: torch.nn.init.zeros_(x[1]),
        lambda x: torch.relu_(x[1]),
    ],
)
@pytest.mark.parametrize("make", [lambda: grown(90), lambda: static(100, 90)])
def test_a_write_into_a_view_is_an_error(
    write: Callable[[Any], Any], make: Callable[[], QuantizedKV]
) -> None:
    """Regression: it went into a dequantized copy and was lost without a word."""
    cache, before = make(), make()
    with pytest.raises(NotImplementedError, match=r"clone\(\)"):
        write(cache)
    assert_same_bytes(cache, before)


def test_what_is_computed_from_a_view_can_be_written_to() -> None:
    view = grown(90)[:, :, 3:5]
    assert type(view) is ReadOnlyTokens
    for made in (view.clone(), view + 1, view.sum(), torch.cat([view, view]), view.float().mul(2)):
        assert type(made) is Tensor
        made.zero_()
    assert type(view[0].transpose(0, 1)) is ReadOnlyTokens


def test_a_view_is_taken_by_compiled_code() -> None:
    view = static(100, 90)[:, :, 3:50]
    compiled = torch.compile(lambda x: (x * 2).sum(-1), backend="kvq", fullgraph=True)
    with torch.no_grad():
        assert torch.equal(compiled(view), (view.clone() * 2).sum(-1))


def test_zeroing_a_static_cache_empties_it() -> None:
    cache = static(100, 90)
    cache.zero_()
    assert cache.held() == 0
    assert not cache.dequantize().any()
    cache[:, :, :90] = tokens(100)[:, :, :90]
    assert_same_bytes(cache, static(100, 90))


def test_zeroing_a_grown_cache_leaves_tokens_that_are_zero() -> None:
    """Regression: it had slots without tokens then, and the next token was refused."""
    cache = grown(90)
    cache.zero_()
    longer = torch.cat([cache, tokens(3)], 2)
    assert_is_quantized(longer, torch.cat([torch.zeros(B, H, 90, D), tokens(3)], 2))


@pytest.mark.parametrize("make", [lambda seed: grown(90, seed), lambda seed: static(100, 90, seed)])
def test_copying_another_cache_copies_its_bytes(make: Callable[[int], QuantizedKV]) -> None:
    cache, other = make(0), make(1)
    cache.copy_(other)
    assert_same_bytes(cache, other)
    assert cache.copy_(cache) is cache


@pytest.mark.parametrize("make", [lambda seed: grown(90, seed), lambda seed: static(100, 90, seed)])
def test_copying_a_tensor_quantizes_it(make: Callable[[int], QuantizedKV]) -> None:
    cache = make(0)
    x = tokens(cache.shape[2], 3)
    cache.copy_(x)
    assert_same_bytes(cache, QuantizedKV.from_dense(x, LAYOUT, kind=cache.kind))


def test_copying_a_cache_of_another_length_is_an_error() -> None:
    """Regression: parts of equal capacity were copied, tokens and lengths no longer agreed."""
    cache = grown(90)
    with pytest.raises(RuntimeError, match="expanded size"):
        cache.copy_(grown(89))
    assert_same_bytes(cache, grown(90))


@pytest.mark.parametrize("shape", [(1, H, 3, D), (B, 1, 3, D), (B, H, 3, D // 2)])
def test_new_tokens_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    """Regression: tokens of one sequence were broadcast over the batch."""
    cache = grown(90)
    with pytest.raises(RuntimeError, match="must match"):
        torch.cat([cache, torch.ones(shape)], 2)


# Taking the place of a 16-bit tensor


def test_a_tensor_that_becomes_quantized_frees_its_storage_and_stays_the_same_object() -> None:
    module = torch.nn.Module()
    module.register_buffer("keys", tokens(100))
    tensor = module.keys
    storage, reference_, identity = (
        StorageWeakRef(tensor.untyped_storage()),
        weakref.ref(tensor),
        id(tensor),
    )
    become(tensor, QuantizedKV.from_dense(tensor, LAYOUT, kind="static", length=90))
    gc.collect()
    assert storage.expired()
    assert reference_() is tensor is module.keys
    assert id(tensor) == identity
    assert_same_bytes(tensor, static(100, 90))
    tensor[:, :, 90:91] = tokens(1, 1)
    assert module.keys.held() == 91


def test_a_tensor_whose_storage_is_shared_is_left_as_it_is() -> None:
    tensor = tokens(100)
    alias = tensor.view_as(tensor)
    for shared in (tensor, alias, torch.nn.Parameter(tokens(100))):
        kind = type(shared)
        with pytest.raises(
            RuntimeError, match=r"must not share its storage|must be a plain tensor"
        ):
            become(shared, static(100, 90))
        assert type(shared) is kind
        assert torch.equal(shared, tokens(100))
    del alias, shared
    become(tensor, static(100, 90))
    assert_same_bytes(tensor, static(100, 90))  # type: ignore[arg-type]
