"""The five functions of the CPU backend, as `ops` calls them."""

from __future__ import annotations

from torch import Tensor

from kvq_compile.kernels.cpu import append as writing
from kvq_compile.kernels.cpu import attend as attention
from kvq_compile.kernels.cpu import importance as weighing
from kvq_compile.kernels.cpu.library import is_available as is_available
from kvq_compile.kernels.cpu.packed import PackedTensor
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import Calibrated, Packed
from kvq_compile.kernels.rows import append_rows_, attend_rows, check_positions, dequantize_rows
from kvq_compile.kernels.score import Score

SCHEMES = frozenset(("uniform", "codebook", "mixed", "channelwise"))


def first_slot(position: Tensor | None, start: int | None) -> int:
    """Return the slot of the first new token.

    Raises:
        ValueError: The positions do not follow one another.
    """
    if position is None:
        assert start is not None
        return start
    slots = position.tolist()
    if slots != list(range(slots[0], slots[0] + len(slots))):
        raise ValueError(f"cache positions must follow one another, got {slots}")
    return int(slots[0])


def append_(
    cache: Packed,
    calibrated: Calibrated,
    x: Tensor,
    position: Tensor | None,
    start: int | None,
    layout: Layout,
    importance: Tensor | None = None,
    query: Tensor | None = None,
) -> None:
    """Write new tokens and quantize full pages: see `append.append_`."""
    if cache.by_row:
        about = layout, importance, query
        append_rows_(append_, cache, calibrated, x, position, start, *about)
        return
    check_positions(position, cache.cursor)
    first = first_slot(position, start)
    writing.append_(cache, calibrated, x, first, layout, importance, query)


def append_both_(
    keys: Packed,
    values: Packed,
    key_calibrated: Calibrated,
    value_calibrated: Calibrated,
    key: Tensor,
    value: Tensor,
    position: Tensor | None,
    start: int | None,
    key_layout: Layout,
    value_layout: Layout,
    importance: Tensor | None = None,
    query: Tensor | None = None,
) -> None:
    """Write new keys and values, one after the other; ``query`` is for the keys."""
    if not (keys.by_row or values.by_row):
        position, start = None, first_slot(position, start)
    append_(keys, key_calibrated, key, position, start, key_layout, importance, query)
    append_(values, value_calibrated, value, position, start, value_layout, importance)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    keys: Packed,
    values: Packed,
    key_calibrated: Calibrated,
    value_calibrated: Calibrated,
    mask: Tensor | None,
    position: Tensor | None,
    start: int | None,
    score: Score,
    key_layout: Layout,
    value_layout: Layout,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attend to a cache and to the new tokens: see `attend.attend`."""
    if keys.by_row or values.by_row:
        return attend_rows(
            *(attend, query, key, value, keys, values, key_calibrated, value_calibrated, mask),
            *(position, start, score, key_layout, value_layout, sink_logits),
        )
    check_positions(position, keys.cursor)
    return attention.attend(
        *(query, key, value),
        PackedTensor(keys, key_layout, key_calibrated),
        PackedTensor(values, value_layout, value_calibrated),
        mask=mask,
        start=first_slot(position, start),
        score=score,
        sink_logits=sink_logits,
    )


def importance(
    query: Tensor,
    key: Tensor,
    keys: Packed | None,
    calibrated: Calibrated,
    mask: Tensor | None,
    position: Tensor | None,
    start: int | None,
    slots: int,
    score: Score,
    causal: bool,
    queries: int,
    layout: Layout,
) -> Tensor:
    """Return importance scores: see `importance.recent_importance`."""
    packed = None if keys is None else PackedTensor(keys, layout, calibrated)
    first = first_slot(position, start)
    return weighing.recent_importance(
        query, key, packed, mask, first, slots, score, causal, queries, layout
    )


def dequantize(cache: Packed, calibrated: Calibrated, length: int, layout: Layout) -> Tensor:
    """Read slots: see `append.read`."""
    if cache.by_row:
        return dequantize_rows(dequantize, cache, calibrated, length, layout)
    return writing.read(cache, calibrated, length, layout)
