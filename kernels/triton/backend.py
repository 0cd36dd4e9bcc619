"""The four functions of GPUs, as `ops` calls them."""

from __future__ import annotations

from torch import Tensor

from kvq_compile.kernels.layout import Layout, Score
from kvq_compile.kernels.packed import Calibrated, Packed
from kvq_compile.kernels.reference import cache as reference
from kvq_compile.kernels.reference.importance import recent_importance
from kvq_compile.kernels.triton import append as quantize_kv
from kvq_compile.kernels.triton import attend as attention
from kvq_compile.kernels.triton import importance as weighing


def is_available() -> bool:
    """Say whether the backend can run: where there is a GPU there is Triton."""
    return True


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
    """Write new tokens behind those held: see `append.append_`."""
    quantize_kv.append_(*cache, x, position, start, layout, calibrated, importance, query)


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
    return attention.attend(
        *(query, key, value, keys, values, mask, position, start, score.scale),
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
    if keys is None:  # a few rows times the call's own keys, and nothing to wait for
        about = 0, slots, score.scale, causal, queries, layout, calibrated
        return recent_importance(query, key, None, mask, *about)
    return weighing.recent_importance(
        *(query, key, keys, mask, position, start, slots, score.scale, causal, queries, layout),
    )


def dequantize(cache: Packed, calibrated: Calibrated, length: int, layout: Layout) -> Tensor:
    """Read slots: see `cache.read`."""
    return reference.read(*cache, length, layout, calibrated)
