"""The four functions of the CPU, as `ops` calls them."""

from __future__ import annotations

from torch import Tensor

from kvq_compile.kernels.cpu import attend as blocked
from kvq_compile.kernels.cpu import native
from kvq_compile.kernels.layout import Layout, Score
from kvq_compile.kernels.packed import Calibrated, Packed
from kvq_compile.kernels.reference import cache as reference
from kvq_compile.kernels.reference.importance import recent_importance


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
    """Write new tokens behind those held: see `attend.append_`."""
    first = blocked.first_slot(position, start)
    blocked.append_(*cache, x, first, layout, calibrated, importance, query)


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
) -> Tensor:
    """Attend to a cache and to the new tokens: see `attend.attend`."""
    first = blocked.first_slot(position, start)
    return blocked.attend(
        *(query, key, value, keys, values, mask, first, score.scale),
        *(key_layout, value_layout, key_calibrated, value_calibrated),
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
    """Weigh tokens by the attention that they get: see `importance.recent_importance`."""
    first = blocked.first_slot(position, start)
    about = first, slots, score.scale, causal, queries, layout, calibrated
    return recent_importance(query, key, keys, mask, *about, native.unpack)


def dequantize(cache: Packed, calibrated: Calibrated, length: int, layout: Layout) -> Tensor:
    """Read slots: see `cache.read`."""
    return reference.read(*cache, length, layout, calibrated)
