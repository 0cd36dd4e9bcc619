"""The specification as a backend: the five functions in plain torch, for any device.

It runs where the backend of a device cannot, as on a machine without a C++ compiler, and for schemes that the backend
does not implement. It is slow: each call of `attend` dequantizes the whole cache.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_compile.kernels import reference
from kvq_compile.kernels.layout import HIDES, Layout
from kvq_compile.kernels.packed import Calibrated, Packed
from kvq_compile.kernels.reference.importance import recent_importance
from kvq_compile.kernels.rows import append_rows_, attend_rows, check_positions, dequantize_rows
from kvq_compile.kernels.schemes import SCHEMES as KINDS
from kvq_compile.kernels.score import Score

SCHEMES = frozenset(kind.name for kind in KINDS)


def is_available() -> bool:
    """Say whether the backend can run: everywhere."""
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
    """Write new tokens and quantize full pages: see `cache.append_`."""
    if cache.by_row:
        about = layout, importance, query
        append_rows_(append_, cache, calibrated, x, position, start, *about)
        return
    check_positions(position, cache.cursor)
    first = _first_slot(position, start)
    reference.append_(*cache.paged(layout), x, first, layout, calibrated, importance, query)


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
        position, start = None, _first_slot(position, start)
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
    """Attend in fp32 to the tokens before ``start`` of a cache and to the new ones.

    Raises:
        ValueError: The cache does not hold ``start`` tokens, or the mask shows a slot never written.
    """
    if keys.by_row or values.by_row:
        return attend_rows(
            *(attend, query, key, value, keys, values, key_calibrated, value_calibrated, mask),
            *(position, start, score, key_layout, value_layout, sink_logits),
        )
    check_positions(position, keys.cursor)
    first = _first_slot(position, start)
    held, end = int(keys.cursor[0]), first + key.shape[2]
    if first > held:
        raise ValueError(f"position must start at or before the {held} tokens held, got {first}")
    pair = []
    for cache, new, layout, relative in (
        (keys, key, key_layout, key_calibrated),
        (values, value, value_layout, value_calibrated),
    ):
        in_fp32 = cache.paged(layout)._replace(exact=cache.exact.float())
        pair.append(torch.cat([reference.read(*in_fp32, first, layout, relative), new.float()], 2))
    if mask is not None:
        beyond = mask[..., end:]
        shown = beyond if beyond.dtype == torch.bool else beyond > HIDES
        if bool(shown.any()):
            raise ValueError(f"mask must hide the slots that hold no token, from {end} on")
        visible = min(end, mask.shape[-1])
        mask, pair = mask[..., :visible], [tokens[:, :, :visible] for tokens in pair]
        mask = mask if mask.dtype == torch.bool else mask.float()
    if score.of_values:
        pair[0] = torch.cat(pair, 3)
    logits = None if sink_logits is None else sink_logits.float()
    output = reference.softmax_attention(query.float(), pair[0], pair[1], mask, score, logits)
    return output.to(query.dtype)


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
    about = _first_slot(position, start), slots, score, causal, queries, layout, calibrated
    parts = None if keys is None else keys.paged(layout)
    return recent_importance(query, key, parts, mask, *about)


def dequantize(cache: Packed, calibrated: Calibrated, length: int, layout: Layout) -> Tensor:
    """Read slots: see `cache.read`."""
    if cache.by_row:
        return dequantize_rows(dequantize, cache, calibrated, length, layout)
    return reference.read(*cache.paged(layout), length, layout, calibrated)


def _first_slot(position: Tensor | None, start: int | None) -> int:
    """Return the slot of the first new token.

    Raises:
        ValueError: The positions are not consecutive.
    """
    if position is None:
        assert start is not None
        return start
    slots: list[int] = position.tolist()
    if slots != list(range(slots[0], slots[0] + len(slots))):
        raise ValueError(f"cache positions must follow one another, got {slots}")
    return slots[0]
