"""Some rows of a static cache that is made for more sequences, as a cache of its own that shares its memory.

A row is a cache of one sequence, whose parts are views (`rows`), and so are several that follow one another. Whoever is
lent such rows of a cache writes tokens into them as into any; `settle_rows` lets the whole cache know.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import is_

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kvq_compile.kernels.cache.arranged import ArrangedKV
from kvq_compile.kernels.cache.become import (
    become_arranged,
    become_whole,
    keep_plain,
    lend,
    stays_plain,
    thaw,
    thaw_arranged,
)
from kvq_compile.kernels.cache.rows import count_by_row_
from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.kernels.packed import writable

Whole = Tensor | QuantizedKV | ArrangedKV


def lend_rows(owner: Whole, rows: range) -> Whole:
    """Return rows of a tensor ``[B, ...]`` or of a static cache, which counts its rows from now on."""
    if isinstance(owner, ArrangedKV):
        return owner.map(lambda cache: _lent(cache, rows))
    if isinstance(owner, QuantizedKV):
        return _lent(owner, rows)
    return lend(owner, [owner[rows.start : rows.stop]])[0]


def like_rows(owner: Whole, rows: range) -> Whole:
    """Return what `lend_rows` would, to compile for; a cache does not count its rows for that."""
    if isinstance(owner, ArrangedKV):
        return owner.map(lambda cache: _rows_of(cache, rows))
    return _rows_of(owner, rows) if isinstance(owner, QuantizedKV) else lend_rows(owner, rows)


def counts_rows(x: object) -> bool:
    """Return whether lending rows of ``x`` leaves its parts as they are: each row is counted, or nothing is packed."""
    packed = isinstance(x, (QuantizedKV, ArrangedKV))
    return not packed or all(cache.by_row for cache in _caches_of(x))  # type: ignore[arg-type]


def settle_rows(owner: Whole, lent: Whole, rows: range) -> None:
    """Let a tensor be what those of its rows have become that were lent.

    Where they are packed now, so is the tensor: its other rows hold tokens up to the last that is not zero.
    """
    packed = QuantizedKV, ArrangedKV
    if isinstance(owner, packed) and isinstance(lent, packed):
        for cache, part in zip(_caches_of(owner), _caches_of(lent), strict=True):
            _count(cache, part, rows)
        return
    with torch.inference_mode(False), torch.no_grad():
        if isinstance(owner, packed):
            _thaw(owner, lent, rows)
        elif isinstance(lent, QuantizedKV):
            become_whole(owner, _among(owner, lent, rows))
        elif isinstance(lent, ArrangedKV):
            of_others = zip(lent.caches, lent.arrangement.split(owner), strict=True)
            caches = [_among(x, cache, rows) for cache, x in of_others]
            become_arranged(owner, ArrangedKV(caches, lent.arrangement))
        else:
            reason = stays_plain(lent)
            if reason is not None:
                keep_plain(owner, reason)


def _rows_of(cache: QuantizedKV, rows: range) -> QuantizedKV:
    """Return rows of a cache, each of which has a length of its own."""
    chosen = slice(rows.start, rows.stop)
    with writable():
        cursor = cache.cursor if cache.by_row else cache.cursor.repeat(cache.shape[0], 1)
        parts = [part[chosen] for part in (cache.codes, cache.params, cache.exact, cursor)]
    return QuantizedKV(parts, cache.calibrated, cache.page_layout, cache.kind, cache.shape[2])


def _lent(owner: QuantizedKV, rows: range) -> QuantizedKV:
    """Return rows of a cache, the same object each time, which know how many tokens they hold if the cache does.

    The cache itself does not know it until they are settled.
    """
    if isinstance(owner.cursor, FakeTensor):
        return _rows_of(owner, rows)
    lineage = owner._lineage
    known = lineage.lent.get(rows)
    if known is None or not _are_same(known[0], owner.parts) or type(known[1]) is not QuantizedKV:
        parts = count_by_row_(owner).parts
        known = lineage.lent[rows] = parts, _rows_of(owner, rows)
    lent = known[1]
    mine = lent._lineage
    if lineage.shared:
        mine.share()
        return lent
    before = lineage.counted
    if not isinstance(before, tuple):
        before = tuple(owner.held_by_row())
    lineage.before, lineage.counted, lineage.counter = before, None, None
    held = before[rows.start : rows.stop]
    mine.counted = held[0] if held.count(held[0]) == len(held) else held
    return lent


def _are_same(parts: Sequence[Tensor], others: Sequence[Tensor]) -> bool:
    return len(parts) == len(others) and all(map(is_, parts, others))


def _caches_of(x: QuantizedKV | ArrangedKV) -> Sequence[QuantizedKV]:
    return x.caches if isinstance(x, ArrangedKV) else (x,)


def _thaw(owner: QuantizedKV | ArrangedKV, lent: Tensor, rows: range) -> None:
    """Make an ordinary tensor of a cache some of whose rows have become one."""
    reason = stays_plain(lent) or ""
    if isinstance(owner, ArrangedKV):
        thaw_arranged(owner, reason)
    else:
        thaw(owner, reason)
    owner[rows.start : rows.stop] = lent


def _count(owner: QuantizedKV, lent: QuantizedKV, rows: range) -> None:
    """Note how many tokens each row holds, where the host knows it of the rows that were lent."""
    lineage, counted = owner._lineage, lent._lineage.counted
    if isinstance(counted, int):
        counted = (counted,) * len(rows)
    if counted is not None and not lineage.shared:
        before = lineage.before
        lineage.counted = (*before[: rows.start], *counted, *before[rows.stop :])


def _among(owner: Tensor, lent: QuantizedKV, rows: range) -> QuantizedKV:
    """Return the cache of all rows of a tensor ``[B, H, S, D]``, some of which are packed already."""
    others = [_packed_as(lent, x) for x in (owner[: rows.start], owner[rows.stop :])]
    before, behind = others
    whole = torch.cat([x for x in (before, lent, behind) if x is not None], 0)
    assert isinstance(whole, QuantizedKV)
    return count_by_row_(whole)


def _packed_as(like: QuantizedKV, x: Tensor) -> QuantizedKV | None:
    """Return rows packed as others are, each up to its last token that is not zero; ``None`` of no rows."""
    if x.shape[0] == 0:
        return None
    place = torch.arange(1, x.shape[2] + 1, dtype=torch.int64, device=x.device)
    lengths: list[int] = ((x != 0).any(3).any(1) * place).amax(1).tolist()
    about = {"kind": like.kind, "length": lengths, "tables": like.tables}
    return QuantizedKV.from_dense(x, like.page_layout, **about)  # type: ignore[arg-type]
