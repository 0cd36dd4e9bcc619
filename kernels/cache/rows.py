"""Static caches whose rows have lengths of their own, outside graphs.

A cache counts its tokens once for all rows until one is written at positions of its own; from then on it counts each
(`kernels.rows`), and a row is a cache of one sequence, whose parts are views.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kvq_compile.kernels import ops
from kvq_compile.kernels.cache.slices import drop_parts
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import Calibrated, Packed, writable
from kvq_compile.kernels.rows import calibrated_row, rows_of

if TYPE_CHECKING:
    from kvq_compile.kernels.cache.tensor import QuantizedKV

OF_ATTENTION = "bits depend on the attention that tokens get, which is not weighed for rows of different lengths"
OF_POSITIONS = "keys are quantized before RoPE, at positions that rows of different lengths have each for themselves"


def why_not_by_row(layout: Layout) -> str | None:
    """Return why caches of a layout cannot count each row; ``None`` if they can."""
    if layout.attentive or layout.adaptive is not None:
        return OF_ATTENTION
    return OF_POSITIONS if layout.rotary else None


def count_by_row_(cache: QuantizedKV) -> QuantizedKV:
    """Let each row of a static cache count its tokens, from now on; return the cache.

    Raises:
        ValueError: It is no static cache, or one that cannot.
    """
    if cache.by_row:
        return cache
    if cache._part_of is not None and cache._part_of.owner is not None:
        count_by_row_(cache._part_of.owner)  # which leaves none to its slices but its own
        return cache
    reason = why_not_by_row(cache.page_layout)
    if cache.kind != "static" or reason is not None:
        raise ValueError(
            f"rows must be of a static cache that can count each, got {cache!r}: {reason}"
        )
    with writable():
        cursor = cache.cursor.repeat(cache.shape[0], 1)
    for view in (cache, *cache._lineage.others(cache)):
        view.cursor = cursor
    drop_parts(cache._lineage)
    lineage = cache._lineage
    lineage.counter = None
    if isinstance(lineage.counted, int):
        lineage.counted = (lineage.counted,) * cache.shape[0]
    return cache


def caches_of_rows(cache: QuantizedKV) -> list[QuantizedKV]:
    """Return each row of a static cache as a cache ``[1, H, S, D]`` that shares its memory."""
    constants = Calibrated(cache.tables, cache.shift)
    about = cache.page_layout, "static", cache.shape[2]
    rows = []
    for b, parts in enumerate(rows_of(Packed(*cache.parts[:4]))):
        of_row = [x for x in calibrated_row(constants, b)[:2] if x is not None]
        rows.append(type(cache)(parts, of_row, *about))  # type: ignore[arg-type]
    return rows


def fill_rows_(
    cache: QuantizedKV, x: Tensor, lengths: Sequence[int], query: Tensor | None = None
) -> QuantizedKV:
    """Write the first ``lengths[b]`` tokens of each row of ``x`` ``[B, H, S, D]`` into an empty cache; return it."""
    for b, row in enumerate(caches_of_rows(cache)):
        asked = None if query is None else query[b : b + 1]
        about = None, 0, cache.page_layout, None, asked
        ops.append_(row.parts, row.calibrated, x[b : b + 1, :, : lengths[b]], *about)
    return cache


def rows_written(index: Any, rows: int) -> tuple[range, tuple[Any, ...]] | None:
    """Return which of all rows an assignment takes, and its index within each; ``None`` where it takes them all."""
    index = index if isinstance(index, tuple) else (index,)
    first = index[0] if index else None
    if isinstance(first, int) and not isinstance(first, bool):
        row = range(rows)[first]
        chosen, inside = range(row, row + 1), index[1:]
        if Ellipsis in [part for part in inside if not isinstance(part, Tensor)]:
            return None
    elif isinstance(first, slice) and range(rows)[first] != range(rows):
        chosen, inside = range(rows)[first], index[1:]
    else:
        return None
    return chosen, (slice(None), *inside)
