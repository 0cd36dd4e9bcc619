"""Slices along the batch of a static cache, ``cache[:2]``, outside graphs: caches that share its memory.

Their parts are some rows of the owner's parts. Where these are replaced (rows are counted from now on, or another
cache takes the memory over), a slice drops its own, and takes those of its owner anew when it is used next. So it
reads what the owner holds, and what is written into it is written into the owner (`writes.check_writable`). Where the
owner has become an ordinary tensor, whoever uses the slice is told.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING, NamedTuple

from torch import Tensor

from kvq_compile.kernels.packed import part_names, writable

if TYPE_CHECKING:
    from kvq_compile.kernels.cache.tensor import QuantizedKV
    from kvq_compile.kernels.cache.views import Lineage


class PartOf(NamedTuple):
    """What a slice is a part of.

    Attributes:
        owner: The cache; ``None`` where it has become an ordinary tensor since.
        rows: Its sequences that the slice shows.
    """

    owner: QuantizedKV | None
    rows: range


def slice_rows(cache: QuantizedKV, rows: range) -> QuantizedKV:
    """Return some rows of a static cache that can count each, or of a slice of one: they share its memory."""
    known, owner = cache._part_of, cache
    if known is not None:
        owner, rows = _owner(known), known.rows[rows.start : rows.stop]
    about = owner.page_layout, owner.kind, owner.shape[2]
    part = type(cache)(_parts(owner, rows), owner.calibrated, *about)
    part._is_slice_copy, part._part_of = True, PartOf(owner, rows)
    part._lineage.share()  # others write the memory too
    _register(owner, part)
    return part


def take_parts_(part: QuantizedKV) -> None:
    """Let a slice that has dropped its parts take those of its owner.

    Raises:
        RuntimeError: The owner has become an ordinary tensor.
    """
    assert part._part_of is not None
    owner = _owner(part._part_of)
    parts = _parts(owner, part._part_of.rows)
    for name, mine in zip(part_names(part.page_layout), parts, strict=True):
        setattr(part, name, mine)
    _register(owner, part)


def drop_parts(lineage: Lineage, is_gone: bool = False) -> None:
    """Let slices of a memory drop their parts, and forget their owner if it ``is_gone``."""
    for other in list(lineage.slices or ()):
        for part in other.others(None):
            assert part._part_of is not None
            for name in part_names(part.page_layout):
                if name in part.__dict__:
                    delattr(part, name)
            if is_gone:
                part._part_of = part._part_of._replace(owner=None)
    lineage.slices = None


def _parts(owner: QuantizedKV, rows: range) -> list[Tensor]:
    """Return rows of each part, which autograd does not know as views; all rows have one cursor, or each its own."""
    parts = owner.parts
    with writable():
        return [
            part
            if part is parts[3] and not owner.by_row
            else part.new_empty(0).set_(part[rows.start : rows.stop])  # type: ignore[call-overload]
            for part in parts
        ]


def _owner(known: PartOf) -> QuantizedKV:
    if known.owner is None:
        raise RuntimeError(
            f"rows {known.rows.start}:{known.rows.stop} must be of a cache that is quantized still, got those of one "
            "that has become an ordinary tensor; slice that tensor anew"
        )
    return known.owner


def _register(owner: QuantizedKV, part: QuantizedKV) -> None:
    lineage = owner._lineage
    if lineage.slices is None:
        lineage.slices = weakref.WeakSet()
    lineage.slices.add(part._lineage)
