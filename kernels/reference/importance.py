"""Importance scores: the attention that recent queries pay to each token, by which mixed pages distribute bits.

Scores are needed only when a page is quantized, once in ``page_size`` tokens. The last ``n`` queries are those of the
call; if it has fewer, the key cache supplies those of earlier tokens (`queries`). A query of zeros counts for nothing:
it marks an unknown query. Cached keys are dequantized as a whole.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_compile.kernels.adaptive.requantize import pages_before_and_after
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import Calibrated, Packed
from kvq_compile.kernels.reference import mixed
from kvq_compile.kernels.reference.attention import apply_score
from kvq_compile.kernels.reference.cache import read
from kvq_compile.kernels.reference.queries import recall
from kvq_compile.kernels.score import Score


def recent_importance(
    query: Tensor,
    key: Tensor,
    parts: Packed | None,
    mask: Tensor | None,
    start: int,
    slots: int,
    score: Score | float,
    causal: bool,
    queries: int,
    layout: Layout,
    calibrated: Calibrated,
) -> Tensor:
    """Return the importance score of each slot: its largest attention weight over the last queries.

    Args:
        query: Queries of the last of the call's tokens, ``[B, Hq, T, D]``.
        key: The call's own keys, ``[B, Hkv, tokens, D]``.
        parts: The cache of the keys before the call; ``None`` where there is none.
        mask: Boolean (True: attend) or additive, broadcasting to ``[B, Hq, T, M]`` with one column per slot, or
            ``None``. Slots beyond its ``M`` columns are masked. Queries of earlier calls use its first row.
        start: Slot of the first of the call's keys.
        slots: Slots of the result, ``start + tokens`` or more.
        score: Modification of products of queries and keys; a float is a scale.
        causal: Whether the call's queries are masked causally; queries of earlier calls always are.
        queries: ``n``, how many of the last queries count.
        layout: Layout of the cached keys.
        calibrated: Their calibration constants, if the layout has tables.

    Returns:
        ``[B, Hkv, slots]``, fp32; zeros if the call completes no page.
    """
    (B, H, tokens, _), end = key.shape, start + key.shape[2]
    result = query.new_zeros(B, H, slots, dtype=torch.float32)
    old, new = 0, layout.pages_at(end)
    if parts is not None:
        old, new = pages_before_and_after(parts[3], start, tokens, layout)
    if new == old:
        return result
    rows = query[:, :, -queries:].unflatten(1, (H, -1))  # [B, H, G, count, D]
    count, pieces = rows.shape[3], []
    ends = torch.arange(
        end - count + 1, end + 1, device=query.device, dtype=torch.int64
    )  # of what each row sees
    ends = ends if causal else torch.full_like(ends, end)
    if parts is not None and layout.queries:
        last = min(start, end - count)
        asked, first = recall(parts[2], int(parts[3][0]), end - queries, last, layout)
        rows = torch.cat([asked.transpose(2, 3), rows], 3)
        ends = torch.cat(
            [
                torch.arange(
                    first + 1, max(first, last) + 1, device=ends.device, dtype=torch.int64
                ),
                ends,
            ]
        )
    rows = rows.float()
    if parts is not None:
        codes, params, exact, cursor = parts
        held = read(codes, params, exact.float(), cursor, start, layout, calibrated)
        pieces = [rows.flatten(2, 3) @ held.mT]
    scores = apply_score(torch.cat([*pieces, rows.flatten(2, 3) @ key.float().mT], -1), score)
    scores = scores.view(B, -1, len(ends), end)
    seen = torch.arange(end, device=ends.device, dtype=torch.int64) < ends[:, None]
    seen = seen & rows.any(-1).view(B, -1, len(ends), 1)
    if mask is not None:
        mask = _for_rows(mask, len(ends) - count, count)[..., :end]
        scores, seen = scores[..., : mask.shape[-1]], seen[..., : mask.shape[-1]]
        if mask.dtype == torch.bool:
            seen = seen & mask
        else:
            scores = scores + mask
    result[:, :, : seen.shape[-1]] = mixed.importance_of(scores, seen, H)
    return result


def _for_rows(mask: Tensor, earlier: int, count: int) -> Tensor:
    """Return a mask's rows: its first row for ``earlier`` queries, then the rows of the last ``count`` queries."""
    if mask.dim() < 2 or mask.shape[-2] == 1:
        return mask
    first = mask[..., :1, :].expand(*mask.shape[:-2], earlier, -1)
    return torch.cat([first, mask[..., mask.shape[-2] - count :, :]], -2)
