"""Attention over exact tokens, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvq_compile.kernels.score import Score


def apply_score(products: Tensor, score: Score | float) -> Tensor:
    """Return attention scores, before the mask, from products of queries and keys; a float is a scale."""
    if not isinstance(score, Score):
        return products * score
    scores = products * score.scale
    if score.cap:
        scores = score.cap * torch.tanh(scores / score.cap)
    return scores.clamp(score.lowest, score.highest)


def softmax_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    score: Score | float,
    sink_logits: Tensor | None = None,
) -> Tensor:
    """Attend in the dtype of the arguments: ``[B, Hq, T, D]`` against ``[B, Hkv, S, D]``.

    Query head ``h`` reads KV head ``h // (Hq / Hkv)``. ``mask`` is boolean (True: attend) or additive,
    and broadcasts to ``[B, Hq, T, S]``. A query whose keys are all masked gives zeros. ``sink_logits`` broadcast to
    ``[B, Hq, T, 1]``: of what has weight and no value.
    """
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scores = apply_score(query @ key.transpose(-2, -1), score)
    if mask is not None:
        bias = (
            torch.zeros_like(scores).masked_fill(~mask, -math.inf)
            if mask.dtype == torch.bool
            else mask
        )
        scores = scores + bias
    least = max(-1e38, torch.finfo(scores.dtype).min)
    point = scores.amax(-1, keepdim=True).clamp_min(least)
    if sink_logits is not None:
        point = torch.maximum(point, sink_logits.to(scores.dtype))
    weights = (scores - point).exp()
    total = weights.sum(-1, keepdim=True)
    if sink_logits is not None:
        total = total + (sink_logits - point).exp()
    return (weights @ value) / torch.where(total == 0, 1, total)
