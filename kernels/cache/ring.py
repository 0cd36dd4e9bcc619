"""Static caches that keep the last tokens, as static layers with a sliding window do.

A ring of S slots shows the last S tokens of its memory, which has room for some more: slot ``j`` of the ring is slot
``hidden + j`` of the memory, where ``hidden = max(0, cursor[0] - S)`` is known on the device. New tokens are appended
to the memory, at its cursor, and a page is quantized once, when its last token leaves the exact window. When the memory
has no room left, whole pages out of sight are dropped and the others move down, as in a dynamic cache (`trim`). So a
ring takes the memory of S tokens, an eighth more for room, and two pages, and stays where it is in memory. One that
took a chunk of more tokens than that, and fewer than S, has room for S more from then on.

How many tokens the memory holds is counted on the host as long as only rings are written; after another write the
cursor is read once.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvq_compile.kernels import ops
from kvq_compile.kernels.cache.trim import drop_pages_, out_of_sight
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import (
    MIN_PAGES,
    Size,
    page_capacity,
    page_room,
    room_of,
    widened,
    writable,
)

if TYPE_CHECKING:
    from kvq_compile.kernels.cache.tensor import QuantizedKV


def slots_for(slots: int, tokens: Size, layout: Layout) -> int:
    """Return the slots of memory for a ring of ``slots`` slots that takes ``tokens`` tokens at a time, or fewer.

    Once pages out of sight are dropped, fewer than a page of tokens, and the sinks, lie before the ring. A ring that is
    shorter than the exact region keeps that. There are two sizes of room, so that compiled graphs meet no others.
    """
    exact = layout.window + layout.page_size
    left = layout.sinks + layout.page_size + max(slots, exact)
    spare = slots // 8 + 1
    return left + (spare if tokens <= spare else slots)


def capacity_for(slots: int, tokens: Size, layout: Layout) -> int:
    """Return the pages of memory that a ring needs: see `slots_for`."""
    return max(MIN_PAGES, int(page_capacity(slots_for(slots, tokens, layout), layout)))


def takes(cache: QuantizedKV, tokens: Size) -> bool:
    """Return whether a cache has the memory of a ring that takes ``tokens`` tokens at a time; may guard on that."""
    layout = cache.page_layout
    needed = capacity_for(cache.shape[2], tokens, layout)
    return cache.kind == "ring" and page_room(cache.parts, layout) >= needed


def hidden(cursor: Tensor, slots: int) -> Tensor:
    """Return how many slots of the memory lie before a ring of ``slots``: an integer on the device, ``[]``."""
    return (cursor[0].long() - slots).clamp_min(0)


def last_slots(tokens: Tensor, cursor: Tensor, slots: int) -> Tensor:
    """Return what a ring of ``slots`` shows of all ``tokens`` ``[B, H, room, D]`` of its memory."""
    index = hidden(cursor, slots) + torch.arange(slots, dtype=torch.int64, device=cursor.device)
    return tokens.index_select(2, index)


def count(cache: QuantizedKV) -> int:
    """Return how many tokens the memory of a static cache holds; waits for the device if that is not known."""
    held = cache._lineage.counted
    if held is None:
        held = cache._lineage.counted = int(cache.cursor[0])
    assert isinstance(held, int)  # rows have no lengths of their own
    return held


def claim_ring(cache: QuantizedKV, tokens: int) -> None:
    """Make a static cache a ring, with room for ``tokens`` more behind its last; drops pages only if it must."""
    held, layout = count(cache), cache.page_layout
    if not takes(cache, tokens):
        _widen(cache, capacity_for(cache.shape[2], tokens, layout))
    if held + tokens <= room_of(cache.parts, layout):
        return
    pages = out_of_sight(held - cache.shape[2], int(cache.cursor[1]), layout)
    drop_pages_(cache.parts, cache.calibrated, pages, layout)
    cache._lineage.counted = held - pages * layout.page_size


def append(cache: QuantizedKV, new: Tensor) -> None:
    """Write ``new`` ``[B, H, T, D]``, at most as many tokens as there are slots, behind the last of a static cache."""
    if new.shape[2] == 0:
        return
    claim_ring(cache, new.shape[2])
    held = count(cache)
    ops.append_(cache.parts, cache.calibrated, new, None, held, cache.page_layout)
    cache._lineage.counted = held + new.shape[2]


def _widen(cache: QuantizedKV, pages: int) -> None:
    with writable():
        wider = {name: widened(getattr(cache, name), pages) for name in ("codes", "params")}
    for view in (cache, *cache._lineage.others(cache)):
        view.kind = "ring"
        for name, part in wider.items():
            setattr(view, name, part)
    cache._lineage.moved()


def shift_of(held: Tensor, given: Tensor, count: int) -> int | None:
    """Return by how many tokens ``given`` is ahead of what a ring shows, ``held`` ``[B, H, S, D]``, if it is that.

    The ring's first ``count`` slots hold tokens. All but so many come first in ``given`` again; what follows is new.
    """
    if count == 0 or held.dtype != given.dtype or held.shape != given.shape:
        return None
    alike = (held[0, 0, :count] == given[0, 0, 0]).all(-1).nonzero().flatten().tolist()
    for shift in alike:
        if torch.equal(held[:, :, shift:count], given[:, :, : count - shift]):
            return int(shift)
    return None
