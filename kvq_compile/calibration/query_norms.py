"""Measure the squared norm that few queries of a model exceed: what QAQ's error targets of keys depend on.

A rotary embedding keeps norms, so queries are taken as attention sees them.

Source: QAQ (arXiv 2403.04643), section 4.1, which takes the upper 10 % quantile of squared query norms.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from kvq_compile.calibration.capture import Activations, Batch, capture

QUANTILE = 0.9


def measure_query_norms(
    model: nn.Module,
    texts: Sequence[Batch],
    tokens: int,
    seed: int,
    skipped: int,
    advance: Callable[[str, int, int], None],
) -> list[tuple[float, ...]]:
    """Return for each layer the quantile of each KV head, the largest of its query heads.

    Args:
        model: Any decoder that the backend can compile.
        texts: Token ids or keyword arguments of the model.
        tokens: Queries of a head to measure, taken evenly from all sequences.
        seed: Of the choice of these queries.
        skipped: First tokens of a sequence that do not count.
        advance: Called with a stage, how much of it is done and how much there is to do.
    """
    share = -(-tokens // len(texts))
    norms: list[list[Tensor]] = []
    kv_heads: list[int] = []
    for number, found in enumerate(capture(model, texts, gradients=False)):
        advance("reading sequences", number, len(texts))
        norms = norms or [[] for _ in found]
        kv_heads = [seen.key.shape[1] for seen in found]
        for layer, seen in zip(norms, found, strict=True):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            layer.append(_squared_norms(seen, share, skipped, generator))
    advance("reading sequences", len(texts), len(texts))
    return [_quantiles(torch.cat(layer), H) for layer, H in zip(norms, kv_heads, strict=True)]


def _squared_norms(
    seen: Activations, share: int, skipped: int, generator: torch.Generator
) -> Tensor:
    """Return squared norms of ``share`` queries of a batch, ``[n, Hq]``, padding left out.

    The bound on keys divides them by ``D``, the square of the usual scale; another scale is made up for here.
    """
    B, _, T, D = seen.query.shape
    slot = torch.arange(T, dtype=torch.int64, device="cpu")
    usable = (slot >= 0).expand(B, T) if seen.mask is None else seen.mask.cpu().bool()
    places = (usable & (slot >= skipped)).flatten().nonzero()[:, 0]
    order = torch.randperm(len(places), generator=generator, dtype=torch.int64, device="cpu")
    picked = places[order[:share]]
    rows = seen.query.transpose(1, 2).flatten(0, 1)[picked.to(seen.query.device)]
    return rows.float().square().sum(-1).cpu() * (D * seen.scale**2)


def _quantiles(norms: Tensor, kv_heads: int) -> tuple[float, ...]:
    """Return the quantile of each KV head of squared norms ``[n, Hq]``."""
    if not len(norms):
        raise ValueError("batches must hold sequences longer than the sinks, got none that is")
    place = max(0, math.ceil(QUANTILE * len(norms)) - 1)
    of_heads = norms.sort(0).values[place].view(kv_heads, -1)
    return tuple(of_heads.amax(-1).tolist())
