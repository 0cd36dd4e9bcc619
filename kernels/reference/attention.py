"""Attention over exact tokens, in plain torch."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvq_compile.kernels.layout import Score


def apply_score(products: Tensor, score: Score | float) -> Tensor:
    """Return attention scores, before the mask, from products of queries and keys; a float is a scale."""
    return products * (score.scale if isinstance(score, Score) else score)


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, score: Score | float
) -> Tensor:
    """Attend in the dtype of the arguments: ``[B, Hq, T, D]`` against ``[B, Hkv, S, D]``.

    Query head ``h`` reads KV head ``h // (Hq / Hkv)``. ``mask`` is boolean (True: attend) or additive,
    and broadcasts to ``[B, Hq, T, S]``. A query whose keys are all masked gives zeros.
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
    weights = (scores - scores.amax(-1, keepdim=True).clamp_min(least)).exp()
    total = weights.sum(-1, keepdim=True)
    return (weights @ value) / torch.where(total == 0, 1, total)
