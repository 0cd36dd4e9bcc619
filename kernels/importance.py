"""Which tokens recent queries paid attention to: what mixed pages distribute their bits by.

It is asked only when a page is about to be quantized, once in ``page_size`` tokens, so it is written in plain
torch for every device. Packed keys are read block by block; what is held at once are a few rows of scores.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_compile.kernels import mixed, reference
from kvq_compile.kernels.frame import Frame
from kvq_compile.kernels.spec import PageLayout

Parts = tuple[Tensor, Tensor, Tensor, Tensor]
PAGES = 64  # packed pages read at once


def recent_importance(
    query: Tensor,
    key: Tensor,
    parts: Parts | None,
    mask: Tensor | None,
    start: int,
    slots: int,
    scale: float,
    causal: bool,
    queries: int,
    layout: PageLayout,
    frame: Frame | None,
) -> Tensor:
    """Return the largest weight that the last queries of a call paid to each slot.

    Args:
        query: ``[B, Hq, T, D]``.
        key: The call's own keys, ``[B, Hkv, slots - start, D]``.
        parts: The cache of the keys before ``start``; ``None`` where there is none.
        mask: Boolean (True: attend) or additive, broadcasting to ``[B, Hq, T, >= slots]``, or ``None``.
        start: Slot of the first of the call's keys.
        slots: Slots after the call.
        scale: Factor on the scores.
        causal: Whether query ``T - 1 - i`` sees no slot behind ``slots - 1 - i``.
        queries: How many of the last queries count.
        layout: Layout of the cached keys.
        frame: What they are coded relative to, where the layout has tables.

    Returns:
        ``[B, Hkv, slots]``, fp32; zeros if the call completes no page.
    """
    result = query.new_zeros(*key.shape[:2], slots, dtype=torch.float32)
    if layout.pages_at(slots) == layout.pages_at(start):
        return result
    count = min(queries, query.shape[2])
    rows = (
        query[:, :, query.shape[2] - count :].float().unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    )
    pieces = [] if parts is None else _cached_scores(rows, parts, start, layout, frame)
    scores = torch.cat([*pieces, rows @ key.float().mT], -1) * scale
    scores = scores.unflatten(2, (-1, count)).flatten(1, 2)  # [B, Hq, count, slots]
    if mask is not None:
        mask = mask[..., :slots] if mask.dim() < 2 else mask[..., -count:, :slots]
    elif causal:
        mask = torch.ones(count, slots, dtype=torch.bool, device=query.device).tril(slots - count)
    return mixed.importance_of(scores, mask, key.shape[1])


def _cached_scores(
    rows: Tensor, parts: Parts, start: int, layout: PageLayout, frame: Frame | None
) -> list[Tensor]:
    """Return products of query rows with the cached keys, ``[B, Hkv, rows, n]`` each, ``start`` in all."""
    codes, params, exact, _ = parts
    pages = layout.pages_at(start)
    recent = layout.sinks + pages * layout.page_size
    pieces = [rows @ exact[:, :, : min(start, layout.sinks)].float().mT]
    for first in range(0, pages, PAGES):
        block = slice(first, min(first + PAGES, pages))
        keys = reference.dequantize_packed(
            codes[:, :, block], params[:, :, block], layout, frame, first
        )
        pieces.append(rows @ keys.mT)
    held = reference.exact_row_index(recent, max(recent, start), layout, exact.device)
    return [*pieces, rows @ exact[:, :, held].float().mT]
