"""SKVQ's quantizer as its authors' code has it, to compare with: clusters that span the heads of a layer.

No fused kernel can read such a cache. A group has as many channels as k-means happened to put into it, from
any heads, so that a head's part of a token is no run of whole words with parameters of its own: to score one
head a kernel would gather single codes all over the token and read the parameters of nearly every group, and
heads could not be worked on apart. And what the authors fold into the weights, the permutation, would mix the
heads that attention keeps apart. The compiled path therefore clusters within a head, in equal groups
(`clusters`); here is what that gives up.

Source: github.com/cat538/SKVQ, calibration.py (features, k-means) and KV_process.py (steps); arXiv 2405.06219.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvq_compile.calibration.kmeans import assign, weighted_kmeans
from kvq_compile.kernels.reference.formats import FP16_MAX, e4m3_value, round_e4m3

STARTS = 10  # runs of k-means, of which the best is kept
LEAST_STEP = 1e-5
DIGITS = {2: 1.6}  # bits of a code of three levels, five to a byte


@dataclass(frozen=True)
class CrossHead:
    """Clusters of the channels of all heads.

    Attributes:
        labels: Cluster of each channel, ``[H * D]`` int64, heads one behind another.
        clusters: How many there are, ``H * D / group_size``; k-means may leave some empty.
    """

    labels: Tensor
    clusters: int

    def bits(self, levels: int, fp8: bool) -> float:
        """Return bits per element, with two parameters for each group of a token; three levels count 1.6."""
        used = len(self.labels.unique())
        return DIGITS.get(levels, levels.bit_length()) + 2 * (8 if fp8 else 16) * used / len(
            self.labels
        )


def cluster_across_heads(x: Tensor, group_size: int) -> CrossHead:
    """Cluster all channels of a layer by their least and largest element.

    Args:
        x: Samples, ``[tokens, H, D]`` fp32; keys without their rotation.
        group_size: Channels of a cluster on average; divides ``H * D``.

    Raises:
        ValueError: ``group_size`` does not divide the channels.
    """
    channels = x.flatten(1)
    N = channels.shape[1]
    if N % group_size:
        raise ValueError(f"group_size must divide the {N} channels of a layer, got {group_size}")
    points = torch.stack([channels.amin(0), channels.amax(0)], -1)[None]
    weight = torch.ones_like(points[..., 0])
    best, least = torch.zeros(N, dtype=torch.int64, device=x.device), torch.inf
    for seed in range(STARTS):
        centroids = weighted_kmeans(
            points, weight, clusters=N // group_size, seed=seed, iterations=300
        )
        labels, distance = assign(points, centroids)
        if float(distance.sum()) < least:
            best, least = labels[0], float(distance.sum())
    return CrossHead(best, N // group_size)


def quantize_dequantize_across_heads(
    x: Tensor, groups: CrossHead, *, levels: int, clip: float, fp8: bool, round_first: bool = False
) -> Tensor:
    """Return what the authors' codes of samples stand for, ``[tokens, H, D]`` fp32.

    Args:
        x: Samples, ``[tokens, H, D]`` fp32.
        groups: Of `cluster_across_heads`.
        levels: Largest code: ``2**bits - 1``, or 2 for "1.5 bit".
        clip: What both ends of a group are multiplied by, in (0, 1]: about zero, wherever the group lies. The
            authors take 0.92, and 0.96 for perplexity.
        fp8: Steps and zero points are kept in e4m3, otherwise in fp16.
        round_first: Whether codes are made with the parameters as they are kept; the authors make them with
            the exact ones, and round those afterwards.
    """
    channels = x.flatten(1)
    restored = torch.empty_like(channels)
    for cluster in groups.labels.unique().tolist():
        members = groups.labels == cluster
        group = channels[:, members]
        zero = group.amin(1, keepdim=True) * clip
        step = ((group.amax(1, keepdim=True) * clip - zero) / levels).clamp_min(LEAST_STEP)
        kept_step, kept_zero = _kept(step, fp8), _kept(zero, fp8)
        if round_first:
            # A step that rounds to nothing leaves the zero point.
            step, zero = torch.where(kept_step > 0, kept_step, 1.0), kept_zero
        codes = ((group - zero) / step).clamp(0, levels).round()
        restored[:, members] = codes * kept_step + kept_zero
    return restored.view(x.shape)


def _kept(x: Tensor, fp8: bool) -> Tensor:
    """Return parameters as they are kept, rounded to the nearest number of e4m3 or of fp16, saturated."""
    if fp8:
        return e4m3_value(round_e4m3(x))
    return x.clamp(-FP16_MAX, FP16_MAX).half().float()
