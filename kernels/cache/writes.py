"""Writes into a cache outside graphs: what can be written, and tokens in the middle of a static cache.

Those behind tokens that are overwritten stay, as in an ordinary tensor. Whether a model goes on from there (a rollback)
or edits what it has seen cannot be told from a write, and need not be: the next call's mask hides what lies behind a
rollback. Pages that hold written tokens are quantized again, together with their other tokens as these are read; all
other pages keep their bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvq_compile.kernels import ops
from kvq_compile.kernels.cache import ring
from kvq_compile.kernels.cache.rows import count_by_row_
from kvq_compile.kernels.layout import exact_row_index

if TYPE_CHECKING:
    from kvq_compile.kernels.cache.tensor import QuantizedKV


GROWS_BY_CAT = (
    "a grown QuantizedKV takes new tokens by torch.cat, and is overwritten up to its end only"
)


def check_writable(cache: QuantizedKV) -> None:
    """Make sure that a write is not lost and changes no other cache; a slice lets its owner know of it.

    Raises:
        NotImplementedError: It is, or it does.
    """
    if cache._part_of is not None:
        _let_owner_know(cache)
    elif cache._is_slice_copy:
        raise NotImplementedError(
            "a QuantizedKV sliced along its batch is a copy, in which a write would be lost; "
            "write to the whole cache, or clone() the slice first"
        )
    if cache.kind == "grown" and cache._lineage.others(cache):
        raise NotImplementedError(
            "a grown QuantizedKV that shares its memory with other views cannot be overwritten; "
            "clone() it first"
        )


def _let_owner_know(part: QuantizedKV) -> None:
    """Note that a slice is written: each row of its owner has a length of its own, which the host does not know."""
    owner = count_by_row_(part)._part_of.owner  # type: ignore[union-attr]
    assert owner is not None
    owner._lineage.counted = owner._lineage.counter = None
    torch.autograd.graph.increment_version(owner)


def check_in_sight(cache: QuantizedKV, count: int) -> None:
    """Make sure that slots of a static cache, not all of which are written, are the same slots of its memory.

    Raises:
        NotImplementedError: They are not.
    """
    slots = cache.shape[2]
    if cache.kind == "ring" and count < slots and ring.count(cache) > slots:
        raise NotImplementedError(
            f"a ring that shows its last tokens takes new ones behind them, or all of them, got {cache!r}; roll a "
            "copy, write into that and copy_ it back"
        )


def check_slots(
    cache: QuantizedKV, position: Tensor | None, start: int | None, count: int
) -> int | None:
    """Return the first slot of a write that a cache can take; ``None`` while a CUDA graph is captured.

    Raises:
        ValueError: The slots do not follow one another, or lie behind the end.
        NotImplementedError: A dynamic cache is overwritten elsewhere than at its end.
    """
    slots = cache.shape[2]
    is_captured = cache.is_cuda and torch.cuda.is_current_stream_capturing()
    if position is not None and is_captured:
        torch._assert_async(position[-1] < slots)  # without synchronising with the device
        return None
    if position is not None:
        places = position.tolist()
        if places != list(range(places[0], places[0] + count)):
            raise ValueError(
                f"positions must follow one another, got {places} for {cache!r}; write them in order, "
                "or write to cache.dequantize(), which is a copy"
            )
        start = int(places[0])
    end = (start or 0) + count
    if end > slots:
        raise ValueError(f"position must be below the {slots} slots of the cache, got {end - 1}")
    if cache.kind == "grown" and end < slots:
        raise NotImplementedError(GROWS_BY_CAT)
    return None if is_captured and cache.kind != "grown" else start or 0


def overwrite_(cache: QuantizedKV, x: Tensor, start: int, held: int) -> None:
    """Write ``x`` ``[B, H, T, D]`` at the slots from ``start`` on of a static cache that holds more than those."""
    layout, end = cache.page_layout, start + x.shape[2]
    packed = int(cache.cursor[1])
    if end <= layout.sinks or start >= layout.sinks + packed * layout.page_size:
        cache.exact[:, :, exact_row_index(start, end, layout, cache.device)] = x
        return
    about = cache.parts, cache.calibrated
    behind = ops.dequantize(*about, held, layout)[:, :, end:]
    untouched = -(
        -max(0, end - layout.sinks) // layout.page_size
    )  # the first page without a written token
    kept = [part[:, :, untouched:packed].clone() for part in cache.paged()[:2]]
    ops.append_(*about, torch.cat([x, behind], 2), None, start, layout)
    last = min(packed, int(cache.cursor[1]))
    for part, old in zip(cache.paged()[:2], kept, strict=True):
        part[:, :, untouched:last] = old[:, :, : max(0, last - untouched)]
