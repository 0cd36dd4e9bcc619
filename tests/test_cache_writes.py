"""Whatever writes into a quantized cache quantizes, or is refused; nothing is lost in a copy."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from kvq_compile.kernels.cache.read_only import ReadOnlyTokens
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.options import make_spec
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

aten = torch.ops.aten


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
    behind = expected.dequantize()[:, :, start + count : 90]
    if count:
        new = torch.cat([x, behind], 2)
        torch.ops.kvq.append_(expected.parts, [], new, None, start, LAYOUT)
    for write in writes:
        cache = static(100, 90)
        write(cache)
        touched = -(-max(0, start + count - LAYOUT.sinks) // LAYOUT.page_size) * LAYOUT.page_size
        end = LAYOUT.sinks + touched
        assert torch.equal(cache.dequantize()[:, :, :end], expected.dequantize()[:, :, :end])
        assert cache.held() == max(90, start + count if count else 0)


# LAYOUT packs pages of 32 tokens behind two sinks: of 90 tokens 66 are packed, and 24 exact.
@pytest.mark.parametrize(
    ("start", "count", "again"),
    [
        (0, 2, (0, 0)),
        (1, 3, (2, 34)),
        (5, 1, (2, 34)),
        (33, 2, (2, 66)),
        (34, 32, (34, 66)),
        (60, 10, (34, 66)),
        (66, 10, (0, 0)),
        (88, 1, (0, 0)),
    ],
)
def test_a_write_in_the_middle_leaves_what_lies_behind_it(
    start: int, count: int, again: tuple[int, int]
) -> None:
    """Regression: it was taken for a rollback. Pages that it touches are quantized ``again``, no others."""
    cache, x = static(100, 90), tokens(count, 1)
    written = cache.dequantize()
    before = written.clone()
    written[:, :, start : start + count] = x
    cache[:, :, start : start + count] = x
    read, first, last = cache.dequantize(), *again
    anew = QuantizedKV.from_dense(written, LAYOUT, kind="static", length=90).dequantize()
    assert torch.equal(read[:, :, :first], written[:, :, :first])
    assert torch.equal(read[:, :, first:last], anew[:, :, first:last])
    assert torch.equal(
        read[:, :, max(last, start + count) :], before[:, :, max(last, start + count) :]
    )
    exact = slice(max(last, start), max(last, start + count))
    assert torch.equal(read[:, :, exact], written[:, :, exact])
    assert cache.held() == 90
    cache[:, :, 90:100] = tokens(10, 2)
    assert torch.equal(cache.dequantize()[:, :, 98:100], tokens(10, 2)[:, :, 8:])


@pytest.mark.parametrize("method", ["int8", "int2", "tc", "kivi", "qaq"])
def test_a_token_may_be_edited_many_times(method: str) -> None:
    """Tokens on other pages keep what they are read as, whatever the scheme."""
    layout = make_spec(method=method, sinks=2, window=5, page_size=32).layout("key", 64)
    cache = QuantizedKV.from_dense(tokens(140), layout, kind="static", length=130)
    before = cache.dequantize()
    for seed in range(20):
        cache[:, :, 40:41] = tokens(1, seed)
    read = cache.dequantize()
    for other in (slice(0, 34), slice(66, 140)):
        assert torch.equal(read[:, :, other], before[:, :, other])
    assert cache.held() == 130


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


def test_a_write_up_to_the_end_or_beyond_takes_the_place_of_what_was_there() -> None:
    cache, x = static(100, 60), tokens(100)
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
        lambda x: x.index_copy_(3, torch.arange(D), x.dequantize()),
        lambda x: aten.index_put_(x, (None, None, torch.tensor([0])), torch.ones(1), True),
        lambda x: x.masked_fill_(torch.ones(1, dtype=torch.bool), 0),
        lambda x: x.scatter_(2, torch.zeros(1, 1, 1, 1, dtype=torch.int64), 1.0),
        lambda x: torch.add(x.dequantize(), 1, out=x),
        lambda x: torch._foreach_zero_([x]),
        lambda x: x.transpose_(1, 2),
        lambda x: x.__setitem__((0, 1), 1.0),
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
        lambda x: x[0:2:2].zero_(),
        lambda x: x[0:1].transpose(1, 2).zero_(),
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


@pytest.mark.parametrize("write", [lambda x: x[0:1].zero_(), lambda x: x[1:].copy_(torch.zeros(1))])
def test_a_slice_of_the_batch_of_a_dynamic_cache_is_not_written(
    write: Callable[[Any], Any],
) -> None:
    cache = grown(90)
    with pytest.raises(NotImplementedError, match=r"clone\(\)"):
        write(cache)
    assert_same_bytes(cache, grown(90))


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


@pytest.mark.parametrize("zero", [0, 0.0, torch.tensor(0.0)])
def test_filling_a_static_cache_with_zero_empties_it(zero: Any) -> None:
    """Regression: it was refused, as a write of something else than tokens, and ``zero_()`` was not."""
    cache = static(100, 90)
    cache.fill_(zero)
    assert cache.held() == 0
    assert not cache.dequantize().any()


@pytest.mark.parametrize("make", [lambda: grown(90), lambda: static(100, 90)])
def test_filling_a_cache_with_another_number_writes_all_of_its_tokens(make: Any) -> None:
    cache = make()
    cache.fill_(0.5)
    assert cache.held() == cache.shape[2]
    torch.testing.assert_close(cache.dequantize(), torch.full(cache.shape, 0.5), rtol=0, atol=1e-3)


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
