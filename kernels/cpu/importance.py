"""Importance scores: the attention of the last queries to each slot, by which mixed pages distribute bits.

Scores are needed only when a page is quantized. The last queries are those of the call; if it has fewer, the key cache
supplies those of earlier tokens. Packed pages are unpacked in blocks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvq_compile.kernels.cpu import native
from kvq_compile.kernels.cpu.append import blocks
from kvq_compile.kernels.cpu.packed import PackedTensor
from kvq_compile.kernels.cpu.queries import recall
from kvq_compile.kernels.layout import Layout, exact_row_index
from kvq_compile.kernels.score import Score, bend_


def recent_importance(
    query: Tensor,
    key: Tensor,
    keys: PackedTensor | None,
    mask: Tensor | None,
    start: int,
    slots: int,
    score: Score,
    causal: bool,
    queries: int,
    layout: Layout,
) -> Tensor:
    """Return the importance score of each slot: its largest attention weight over the last queries.

    Args:
        query: Queries of the last of the call's tokens, ``[B, Hq, T, D]``.
        key: The call's own keys, ``[B, Hkv, tokens, D]``.
        keys: The cache of the keys before the call; ``None`` where there is none.
        mask: Boolean (True: attend) or additive, broadcasting to ``[B, Hq, T, M]`` with one column per slot, or
            ``None``. Slots beyond its ``M`` columns are masked. Queries of earlier calls use its first row.
        start: Slot of the first of the call's keys.
        slots: Slots of the result, ``start + tokens`` or more.
        score: What is done to products of queries and keys.
        causal: Whether the call's queries are masked causally; queries of earlier calls always are.
        queries: How many of the last queries count.
        layout: Layout of the cached keys.

    Returns:
        ``[B, Hkv, slots]``, fp32; zeros if the call completes no page.
    """
    B, H = key.shape[:2]
    end = start + key.shape[2]
    weights = query.new_zeros(B, H, slots, dtype=torch.float32)
    kept = 0
    if keys is not None:
        kept = min(keys.pages, max(0, start - layout.sinks) // layout.page_size)
        kept = keys.pages if start >= keys.held else kept
    if layout.pages_at(end) <= kept:
        return weights
    rows = query[:, :, -queries:].unflatten(1, (H, -1)).float()  # [B, H, G, count, D]
    count = rows.shape[3]
    own_end = torch.arange(end - count + 1, end + 1, dtype=torch.int64, device="cpu")
    ends = own_end if causal else torch.full_like(own_end, end)
    if keys is not None and layout.queries:
        last = min(start, end - count)
        asked, first = recall(keys.parts.exact, keys.held, end - queries, last, layout)
        rows = torch.cat([asked.transpose(2, 3).float(), rows], 3)
        earlier = torch.arange(first + 1, max(first, last) + 1, dtype=torch.int64, device="cpu")
        ends = torch.cat([earlier, ends])
    visible = end if mask is None else min(end, mask.shape[-1])
    products = _scores(rows.flatten(2, 3), key, keys, start)
    scores = bend_(products.mul_(score.scale), score.bend)
    scores = scores.view(B, -1, len(ends), end)[..., :visible]  # [B, Hq, queries, visible]
    seen = torch.arange(visible, dtype=torch.int64, device="cpu") < ends[:, None]
    seen = seen & rows.any(-1).view(B, -1, len(ends), 1)
    if mask is not None:
        mask = _for_rows(mask, len(ends) - count, count)[..., :visible]
        if mask.dtype == torch.bool:
            seen = seen & mask
        else:
            scores = scores + mask
    weights[:, :, :visible] = _largest_weights(scores.masked_fill(~seen, -math.inf), H)
    return weights


def _largest_weights(scores: Tensor, kv_heads: int) -> Tensor:
    """Return the largest softmax weight of each slot, ``[B, kv_heads, S]``, over queries and heads of a KV head."""
    weights = (scores - scores.amax(-1, keepdim=True).clamp_min(-1e38)).exp()
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total == 0, 1.0, total)
    return weights.unflatten(1, (kv_heads, -1)).amax((2, 3))


def _for_rows(mask: Tensor, earlier: int, count: int) -> Tensor:
    """Return a mask's rows: its first row for ``earlier`` queries, then the rows of the last ``count`` queries."""
    if mask.dim() < 2 or mask.shape[-2] == 1:
        return mask
    first = mask[..., :1, :].expand(*mask.shape[:-2], earlier, -1)
    return torch.cat([first, mask[..., mask.shape[-2] - count :, :]], -2)


def _scores(rows: Tensor, key: Tensor, keys: PackedTensor | None, start: int) -> Tensor:
    """Return products of query rows ``[B, H, rows, D]`` with the keys of all slots, ``[B, H, rows, start + T]``."""
    scores = rows.new_empty(*rows.shape[:3], start + key.shape[2])
    scores[..., start:] = rows @ key.float().mT
    if keys is None:
        return scores
    layout, exact = keys.layout, keys.parts.exact
    sinks = min(start, layout.sinks)
    scores[..., :sinks] = rows @ exact[:, :, :sinks].float().mT
    coded, constant = keys.transform_query(rows)
    used = min(keys.pages, -(-max(0, start - layout.sinks) // layout.page_size))
    for block in blocks(keys, slice(0, used)):
        first = layout.sinks + block.start * layout.page_size
        last = min(start, layout.sinks + block.stop * layout.page_size)
        products = coded @ native.unpack(keys, block).flatten(2, 3)[:, :, : last - first].mT
        scores[..., first:last] = products if constant is None else products + constant
    recent = layout.sinks + keys.pages * layout.page_size
    if recent < start:
        places = exact_row_index(recent, start, layout, exact.device)
        scores[..., recent:start] = rows @ exact[:, :, places].float().mT
    return scores
