"""Dynamic caches that forget their first tokens, as layers with a sliding window keep them.

A trimmed cache shows the slots of its memory from ``first`` on. The memory itself is one of any dynamic cache: slots
are appended, pages are packed when they have left the exact window. What lies before ``first`` is out of sight:
attention masks it, reading cuts it off. When the memory has no room left, whole pages out of sight are dropped and the
others move down, so that its slots count from a later token (`drop_pages_`). A window of W tokens so
takes the memory of W tokens, an eighth more for room, and a page.

``first`` is a size that changes with every token. Compiled graphs take it as the size of a tensor without elements,
as PyTorch's nested tensors hand over their lengths.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import MIN_SIZE, Calibrated, Size, paged, writable
from kvq_compile.kernels.reference.rope import cosine_and_sine, rotate_pairs

TRIM = "trim"  # the inner tensor whose first size tells how many slots are out of sight


def new_trim(first: Size, like: Tensor) -> Tensor:
    """Return the tensor without elements that stands for ``first`` slots out of sight: ``[first + 2, 0]``, int32.

    One dtype, whatever it is made beside: Dynamo compiles anew for another.
    """
    with writable():
        return like.new_empty(first + MIN_SIZE, 0, dtype=torch.int32)


def first_of(trim: Tensor | None) -> Size:
    """Return how many slots are out of sight."""
    return 0 if trim is None else trim.shape[0] - MIN_SIZE


def droppable(first: int, pages: int, layout: Layout) -> int:
    """Return how many of ``pages`` packed pages are out of sight behind ``first`` slots.

    None where keys are coded without their mean, which turns with the slot: they are coded relative to it.
    """
    return 0 if layout.takes_mean else out_of_sight(first, pages, layout)


def out_of_sight(first: int, pages: int, layout: Layout) -> int:
    """Return how many of ``pages`` packed pages lie whole behind ``first`` slots and the sinks."""
    return max(0, min(pages, (first - layout.sinks) // layout.page_size))


def drop_pages_(
    parts: Sequence[Tensor], calibrated: Sequence[Tensor], pages: int, layout: Layout
) -> None:
    """Drop the first ``pages`` packed pages of a cache in place: its slots count from a later token.

    Slots below ``sinks`` are out of sight and stay. Each other slot becomes ``pages * page_size`` less, and moves to
    the page, the row of the ring or the row of queries that this slot has. The mean of keys that are coded without it
    is turned by as many slots, and rounded to the dtype of the cache anew.
    """
    slots = pages * layout.page_size
    codes, params, exact, cursor, *originals = paged(parts, layout)
    for part in (codes, params, *originals):
        part[:, :, : part.shape[2] - pages] = part[:, :, pages:].clone()
    ring = exact[:, :, layout.sinks : layout.token_rows]
    ring.copy_(ring.roll(-slots, 2))
    if layout.queries:
        queries = layout.queries_of(exact)
        queries.copy_(queries.roll(-slots * layout.shared_by, 2))
    cursor.sub_(torch.tensor([slots, pages], dtype=cursor.dtype, device=cursor.device))
    if layout.rotary:
        calibrated[-1].add_(slots)
    if layout.takes_mean:
        mean = layout.state_of(exact)[:, :, 1]
        frequency = Calibrated.of(calibrated, layout).section("frequency", layout).long()
        mean.copy_(rotate_pairs(mean.float(), *cosine_and_sine(slots * frequency)))
