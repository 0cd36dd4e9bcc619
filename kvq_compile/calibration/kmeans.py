"""Weighted k-means of many small point sets at once: the solver behind coupled codebooks.

Seeding is k-means++ on a sample, refinement is Lloyd's iteration, and a cluster that lost all its points
moves to the point that is served worst. Everything is batched over point sets, chunked over points so that
memory stays bounded, and a function of the seed alone.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Distances held at a time, in numbers: 2^24 are 64 MiB of fp32.
_MAX_DISTANCES = 2**24
# Points that seeding looks at for each cluster; more change the seeds, not their quality.
_SEEDING_POINTS = 16


def weighted_kmeans(
    points: Tensor, weight: Tensor, *, clusters: int, seed: int = 0, iterations: int = 30
) -> Tensor:
    """Return centroids ``[G, clusters, c]`` that minimise ``sum weight * |point - nearest|^2`` locally.

    Stops early when no centroid moves: each is then the weighted mean of the points nearest to it.

    Args:
        points: Sets of points, ``[G, N, c]`` fp32.
        weight: Nonnegative weight of each point, ``[G, N]``. A set of zeros counts as equal weights.
        clusters: Centroids of each set; those beyond the number of distinct points repeat points.
        seed: Of the generator that draws the first centroids.
        iterations: Upper bound of Lloyd's steps.
    """
    generator = torch.Generator().manual_seed(seed)
    total = weight.sum(1, keepdim=True)
    weight = torch.where(total > 0, weight, torch.ones_like(weight))
    weight = weight / weight.mean(1, keepdim=True)  # squared gradients are near 1e-12
    centroids = _seed(points, weight, clusters, generator)
    for _ in range(iterations):
        nearest, distance = assign(points, centroids)
        moved = _means(points, weight, nearest, centroids)
        moved = _revive(points, weight, nearest, distance, moved)
        if torch.equal(moved, centroids):
            break
        centroids = moved
    return centroids


def assign(points: Tensor, centroids: Tensor) -> tuple[Tensor, Tensor]:
    """Return index and squared distance of the nearest centroid of each point, both ``[G, N]``.

    Args:
        points: ``[G, N, c]``.
        centroids: ``[G, k, c]``. The first of equally near ones wins.
    """
    sets, clusters, _ = centroids.shape
    half_norm = centroids.square().sum(-1)[:, None] / 2
    step = max(1, _MAX_DISTANCES // (sets * clusters))
    nearest, distance = [], []
    for chunk in points.split(step, 1):
        score = torch.baddbmm(half_norm, chunk, centroids.transpose(1, 2), alpha=-1)
        least, index = score.min(-1)
        nearest.append(index)
        distance.append((2 * least + chunk.square().sum(-1)).clamp_min(0))
    return torch.cat(nearest, 1), torch.cat(distance, 1)


def _seed(points: Tensor, weight: Tensor, clusters: int, generator: torch.Generator) -> Tensor:
    """Draw centroids by k-means++: each with a chance proportional to weighted distance from the rest.

    Source: Arthur and Vassilvitskii, k-means++, SODA 2007.
    """
    order = torch.randperm(points.shape[1], generator=generator, dtype=torch.int64, device="cpu")
    sample = order.to(points.device)
    sample = sample[: _SEEDING_POINTS * clusters]
    points, weight = points[:, sample], weight[:, sample]
    sets = torch.arange(points.shape[0], device=points.device, dtype=torch.int64)
    distance, chosen = torch.ones_like(weight), []
    for _ in range(clusters):
        mass = (weight * distance).cumsum(1)
        shape = points.shape[0], 1
        draw = torch.rand(shape, generator=generator, dtype=torch.float32, device="cpu")
        draw = draw.to(points.device)
        draw = draw * mass[:, -1:]
        index = torch.searchsorted(mass, draw, right=True).clamp_max(points.shape[1] - 1)[:, 0]
        picked = points[sets, index]
        chosen.append(picked)
        apart = (points - picked[:, None]).square().sum(-1)
        distance = torch.minimum(distance, apart) if len(chosen) > 1 else apart
    return torch.stack(chosen, 1)


def _means(points: Tensor, weight: Tensor, nearest: Tensor, centroids: Tensor) -> Tensor:
    """Return the weighted mean of each cluster; one without weight stays where it is."""
    mass = torch.zeros_like(centroids[..., 0]).scatter_add_(1, nearest, weight)
    index = nearest[..., None].expand_as(points)
    summed = torch.zeros_like(centroids).scatter_add_(1, index, points * weight[..., None])
    return torch.where(mass[..., None] > 0, summed / mass[..., None], centroids)


def _revive(
    points: Tensor, weight: Tensor, nearest: Tensor, distance: Tensor, centroids: Tensor
) -> Tensor:
    """Move each cluster without points to one of the points with the largest weighted error."""
    members = torch.zeros_like(centroids[..., 0]).scatter_add_(1, nearest, torch.ones_like(weight))
    centroids = centroids.clone()
    for group in (members == 0).any(1).nonzero()[:, 0].tolist():
        empty = (members[group] == 0).nonzero()[:, 0]
        error = weight[group] * distance[group]
        worst = error.topk(min(len(empty), len(error))).indices
        worst = worst[error[worst] > 0]
        centroids[group, empty[: len(worst)]] = points[group, worst]
    return centroids
