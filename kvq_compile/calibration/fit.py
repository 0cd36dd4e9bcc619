"""Fit the tables of calibrated quantizers to samples of keys or values.

A fitted cache codes ``y = ((x - mean) / scale)[order]``, head by head, either in uniform steps between the
(clipped) least and largest element of a group of channels of one token (SKVQ), or as the nearest entry of a
codebook for a few coupled channels (CQ). The functions here know nothing of models: they take samples
``[tokens, H, D]`` and how much each element matters, and return tables.

**What is minimised.** To second order a change ``e`` of the stored elements costs ``e' F e / 2``, with the
Fisher information ``F`` estimated by squared gradients of the loss, which weigh the samples of codebooks. The
weights have heavy tails: in the reference models a hundredth of the tokens carries most of the squared gradient.
Fitted to those alone a table overfits, so the weights may be tempered by a power. Uniform steps need no weights:
their margins are searched by attention's own output (`margins`).

Sources: SKVQ (arXiv 2405.06219): grouped channels, clipping, eight-bit parameters; CQ (arXiv 2405.03917):
coupled channels, Fisher-weighted centroids.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvq_compile.calibration.clusters import order_by_range
from kvq_compile.calibration.coupling import order_by_need
from kvq_compile.calibration.kmeans import weighted_kmeans
from kvq_compile.kernels.reference.codebook import centroids, nearest_centroid
from kvq_compile.kernels.reference.uniform import group_values, quantize_groups
from kvq_compile.kernels.scheme_checks import Params

# Coded numbers reach this magnitude, so that e4m3 (2^-9 to 448) expresses both steps and zero points.
_LARGEST = 128.0
# Power of a channel's spread by which it is divided.
EQUALIZE = 0.5
# Tokens that are quantized at a time.
_TOKENS = 4096


@dataclass(frozen=True)
class Fitted:
    """Tables of one layer's keys or values.

    Attributes:
        order: Channel stored at each place, ``[H, D]`` int64, a permutation of each head's channels.
        mean: Subtracted before coding, ``[H, D]`` fp32, by original channel.
        scale: Divided by before coding, ``[H, D]`` fp32, positive, by original channel.
        margin: Part of a group's range that is cut off at each end, ``[H, D]`` fp32 in [0, .5), by stored
            channel and equal within a group.
        codebook: Centroids of stored channels, ``[H, D/c, 2**b, c]`` fp16, or None for uniform steps.
    """

    order: Tensor
    mean: Tensor
    scale: Tensor
    margin: Tensor
    codebook: Tensor | None = None


def fit_uniform(
    x: Tensor,
    *,
    group_size: int,
    paired: bool,
    margin: float = 0.0,
    equalize: float = EQUALIZE,
    reorder: bool = False,
) -> Fitted:
    """Fit mean, scale and order of uniform steps.

    Args:
        x: Samples, ``[tokens, H, D]`` fp32; keys without their rotation.
        group_size: Coded channels that share a step and a zero point; divides ``D``.
        paired: Channels ``c`` and ``c + D/2`` are rotated together: they share a scale and stay a pair.
        margin: Part of a group's range to cut off at each end, in [0, .5); `search_margins` finds better ones.
        equalize: Channels are divided by their spread to this power: 0 is the paper's, 1 gives all channels of
            a group the same relative error, 1/2 did best on the reference model.
        reorder: Whether to gather channels of like range in a group (`order_by_range`).

    Raises:
        ValueError: The shape of the samples, ``group_size`` or ``equalize`` does not fit.

    Source: SKVQ, section 3; means and spreads that are taken off are ours.
    """
    _check(x, None, paired)
    if x.shape[2] % group_size:
        raise ValueError(
            f"group_size must divide the head dimension {x.shape[2]}, got {group_size}"
        )
    if not 0 <= equalize <= 1:
        raise ValueError(f"equalize must be between 0 and 1, got {equalize}")
    mean = x.mean(0)
    spread = _pooled(x.std(0, correction=0), paired)
    spread = spread.clamp_min(1e-4 * float(spread.mean())).clamp_min(1e-30)
    scale = _to_range(x - mean, spread.pow(equalize))
    order = _identity(x)
    if reorder:
        low, high = ((end - mean) / scale for end in (x.amin(0), x.amax(0)))
        order = order_by_range(low, high, group_size, paired)
    return Fitted(order, mean, scale, torch.full_like(mean, margin))


def fit_codebook(
    x: Tensor,
    weight: Tensor | None = None,
    *,
    couple: int,
    bits: int,
    paired: bool,
    seed: int = 0,
    iterations: int = 20,
    temper: float = 1.0,
    sensitivity: float = 0.5,
    correlate: bool = True,
    balance: bool = False,
) -> Fitted:
    """Fit a codebook to each group of ``couple`` channels.

    A sample weighs as much as its channels together, to the power ``temper``. The error that remains is
    that of the nearest centroid in plain distance, as when tokens are quantized.

    Args:
        x: Samples, ``[tokens, H, D]`` fp32; keys without their rotation.
        weight: Nonnegative importance of each element, like ``x``, or None for equal ones.
        couple: Channels that share an index; divides ``D``.
        bits: Of an index.
        paired: Channels ``c`` and ``c + D/2`` are rotated together and share a scale.
        seed: Of the first centroids.
        iterations: Upper bound of Lloyd's steps.
        temper: Power of the weights; 1 is the paper's, 0 plain k-means.
        sensitivity: Power of a channel's mean weight by which distances along it grow; 0 is the paper's.
        correlate: Whether to couple channels that go together instead of neighbours, the paper's choice.
        balance: Whether to couple wide channels with narrow ones instead, so that every index has equally much to
            say (`order_by_need`).

    Source: CQ, section 3.2; ``temper``, ``sensitivity``, ``correlate`` and ``balance`` are ours.
    """
    _check(x, weight, paired)
    _, heads, dim = x.shape
    if dim % couple:
        raise ValueError(f"couple must divide the head dimension {dim}, got {couple}")
    weight = _normalised(x, weight)
    mean, scale = x.mean(0), x.new_ones(heads, dim)
    if sensitivity:
        scale = _importance_scale(weight, sensitivity, paired)
    order = _identity(x)
    if balance:
        order = order_by_need((x / scale).var(0, correction=0), couple, bits, paired)
    elif correlate:
        order = _order_by_correlation(x, couple, paired)
    points = _coupled(_arranged((x - mean) / scale, order), couple)
    importance = _coupled(_arranged(weight * scale.square(), order), couple).mean(-1).pow(temper)
    books = [
        weighted_kmeans(p, w, clusters=2**bits, seed=seed + i, iterations=iterations)
        for i, (p, w) in enumerate(zip(points.split(16), importance.split(16), strict=True))
    ]
    codebook = torch.cat(books).clamp(-65504, 65504).half()
    codebook = codebook.view(heads, dim // couple, 2**bits, couple)
    return Fitted(order, mean, scale, torch.zeros_like(mean), codebook)


def quantize_dequantize(
    x: Tensor, fitted: Fitted, *, levels: int = 0, group_size: int = 0, fp8: bool = True
) -> Tensor:
    """Return what a cache with these tables stands for, ``[tokens, H, D]`` fp32.

    ``levels``, ``group_size`` and ``fp8`` as in `fit_uniform`; a codebook needs none of them.
    """
    parts = []
    for chunk in x.split(_TOKENS):
        y = _arranged((chunk - fitted.mean) / fitted.scale, fitted.order)
        if fitted.codebook is None:
            coded = _uniform(y, fitted.margin[:, ::group_size], levels, group_size, fp8)
        else:
            coded = _looked_up(y, fitted.codebook.float())
        restored = torch.empty_like(y).scatter_(-1, fitted.order.expand_as(y), coded)
        parts.append(restored * fitted.scale + fitted.mean)
    return torch.cat(parts)


def weighted_error(x: Tensor, restored: Tensor, weight: Tensor | None = None) -> float:
    """Return the weighted squared error over the weighted variance of the samples."""
    weight = _normalised(x, weight)
    error = (weight * (restored - x).square()).sum(dtype=torch.float64)
    energy = (weight * (x - x.mean(0)).square()).sum(dtype=torch.float64)
    return float(error / energy.clamp_min(torch.finfo(torch.float64).tiny))


# Pieces


def _check(x: Tensor, weight: Tensor | None, paired: bool) -> None:
    if x.dim() != 3 or not x.shape[0]:
        raise ValueError(f"samples must be [tokens, heads, head_dim], got {list(x.shape)}")
    if weight is not None and weight.shape != x.shape:
        raise ValueError(
            f"weight must be shaped like the samples {list(x.shape)}, got {list(weight.shape)}"
        )
    if paired and x.shape[2] % 2:
        raise ValueError(f"head_dim must be even for rotation pairs, got {x.shape[2]}")


def _normalised(x: Tensor, weight: Tensor | None) -> Tensor:
    """Return weights with mean 1: squared gradients underflow when multiplied by squared errors."""
    if weight is None:
        return torch.ones_like(x)
    mean = weight.mean(dtype=torch.float64)
    return (weight / mean).float() if mean > 0 else torch.ones_like(x)


def _identity(x: Tensor) -> Tensor:
    return torch.arange(x.shape[2], device=x.device, dtype=torch.int64).repeat(x.shape[1], 1)


def _pooled(channels: Tensor, paired: bool) -> Tensor:
    """Average over the two channels of each pair, ``[H, D]``."""
    if not paired:
        return channels
    first, second = channels.chunk(2, -1)
    return ((first + second) / 2).repeat(1, 2)


def _importance_scale(weight: Tensor, sensitivity: float, paired: bool) -> Tensor:
    """Return scales, 1 on average, that are small for channels that matter."""
    importance = _pooled(weight.mean(0), paired)
    # A channel that nothing depends on still gets a finite scale.
    importance = importance.clamp_min(1e-4 * float(importance.mean())).clamp_min(1e-30)
    scale = importance.pow(-sensitivity)
    return scale / scale.mean(-1, keepdim=True)


def _to_range(centred: Tensor, scale: Tensor) -> Tensor:
    """Multiply the scales of each head so that its numbers reach the range that suits e4m3."""
    largest = (centred.abs().amax(0) / scale).amax(-1, keepdim=True)
    return scale * torch.where(largest > 0, largest / _LARGEST, 1.0)


def _order_by_correlation(x: Tensor, couple: int, paired: bool) -> Tensor:
    """Put channels next to each other that go together, ``couple`` at a time, greedily.

    Of pairs, the first channels and the second ones are coupled alike.
    """
    orders = []
    for samples in x[:: max(1, x.shape[0] // _TOKENS)].unbind(1):
        centred = samples - samples.mean(0)
        unit = centred / centred.norm(dim=0).clamp_min(1e-30)
        together = (unit.T @ unit).abs()
        half = together.shape[0] // 2
        if paired:
            together = torch.maximum(together[:half, :half], together[half:, half:])
        order = torch.tensor(_grouped(together.cpu(), couple), device=x.device, dtype=torch.int64)
        orders.append(torch.cat([order, order + half]) if paired else order)
    return torch.stack(orders)


def _grouped(together: Tensor, size: int) -> list[int]:
    left, order = list(range(together.shape[0])), []
    while left:
        group = [left.pop(0)]
        while left and len(group) < size:
            ties = together[group][:, left].sum(0)
            group.append(left.pop(int(ties.argmax())))
        order += group
    return order


def _arranged(y: Tensor, order: Tensor) -> Tensor:
    return y.gather(-1, order.expand_as(y))


def _uniform(y: Tensor, margin: Tensor, levels: int, group_size: int, fp8: bool) -> Tensor:
    """Quantize elements ``[tokens, H, D]`` with margins ``[H, D/g]`` and return what the codes stand for."""
    groups = y.unflatten(-1, (-1, group_size))
    params: Params = "fp8" if fp8 else "fp16"
    codes, stored = quantize_groups(groups, levels, params, margin)
    return group_values(codes, stored, levels, params).flatten(-2)


def _coupled(x: Tensor, couple: int) -> Tensor:
    """Turn ``[tokens, H, D]`` into ``[H * D/c, tokens, c]``."""
    return x.reshape(x.shape[0], -1, couple).transpose(0, 1).contiguous()


def _looked_up(y: Tensor, codebook: Tensor) -> Tensor:
    """Return the nearest entries of a codebook ``[H, D/c, 2**b, c]`` for numbers ``[tokens, H, D]``."""
    pages = y.transpose(0, 1)[None, :, None]  # [B, H, P, N, D] of the reference
    return centroids(nearest_centroid(pages, codebook), codebook)[0, :, 0].transpose(0, 1)
