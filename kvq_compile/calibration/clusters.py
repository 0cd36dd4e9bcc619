"""Put channels of like range into equal groups: the channel reorder of SKVQ, as a fused kernel can read it.

The authors' code clusters all channels of a layer by k-means on their least and largest element, into groups
of any size that span heads (`cross_head`). Here a head keeps its channels and every group has its size, so
k-means gives only where to start: its clusters are filled up to that size. From the best of several starts
on, the two channels whose exchange lowers the squared distance from the groups' means most change places, until
no exchange lowers it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvq_compile.calibration.kmeans import weighted_kmeans

STARTS = 10  # runs of k-means, as many as the authors'
_LEAST_GAIN = 1e-9  # of all squared distances; less is rounding


def order_by_range(low: Tensor, high: Tensor, group_size: int, paired: bool) -> Tensor:
    """Return an order of each head's channels whose runs of ``group_size`` hold channels of like range.

    The order is the model's own where there is no choice: where a head is one group, and for pairs also where
    half a head is. Pairs are sorted into runs of which a group is made up: where ``group_size`` does not divide
    half a head, into shorter ones.

    Args:
        low: Least element of each stored channel, ``[H, D]``.
        high: Largest one, ``[H, D]``.
        group_size: Channels of a group; divides ``D``.
        paired: Channels ``c`` and ``c + D/2`` stay a pair, at places that are ``D/2`` apart.

    Returns:
        Channel at each place, ``[H, D]`` int64.

    Source: SKVQ (arXiv 2405.06219), section 3.1, for the features.
    """
    features = torch.stack([low, high], -1)
    if not paired:
        return balanced_order(features, group_size)
    half = low.shape[1] // 2
    pairs = torch.cat(features.split(half, 1), -1)
    first = balanced_order(pairs, math.gcd(group_size, half))
    return torch.cat([first, first + half], -1)


def balanced_order(features: Tensor, size: int) -> Tensor:
    """Return an order of points whose runs of ``size`` are clusters, ``[H, N]`` int64.

    Each run lists its points as they come. A function of the features alone; never worse than the order they
    are given in, nor than that by the sum or the difference of the first two features.

    Args:
        features: Points of each head, ``[H, N, F]``.
        size: Points of a cluster; divides ``N``.
    """
    H, N, _ = features.shape
    if size == N:
        return torch.arange(N, device=features.device, dtype=torch.int64).repeat(H, 1)
    points = features.double()
    starts = [*_sorted_labels(points, size), *_kmeans_labels(points, size)]
    cost = torch.stack([scatter(points, labels, N // size) for labels in starts])
    best = torch.stack(starts)[
        cost.argmin(0), torch.arange(H, device=features.device, dtype=torch.int64)
    ]
    return _exchanged(points, best, size).argsort(dim=-1, stable=True)


def scatter(points: Tensor, labels: Tensor, clusters: int) -> Tensor:
    """Return the summed squared distance of points ``[H, N, F]`` from the means of equal clusters, ``[H]``."""
    size = points.shape[1] // clusters
    return points.square().sum((1, 2)) - _sums(points, labels, clusters).square().sum((1, 2)) / size


def _sums(points: Tensor, labels: Tensor, clusters: int) -> Tensor:
    member = torch.nn.functional.one_hot(labels, clusters).to(points.dtype)
    return member.transpose(1, 2) @ points


def _sorted_labels(points: Tensor, size: int) -> list[Tensor]:
    """Return clusters ``[H, N]`` of points as they come and of those sorted by middle and by range."""
    run = torch.arange(points.shape[1], device=points.device, dtype=torch.int64) // size
    keys = (run.expand(points.shape[:2]), points[..., :2].sum(-1), points[..., 1] - points[..., 0])
    return [run[key.argsort(dim=-1, stable=True).argsort(dim=-1)] for key in keys]


def _kmeans_labels(points: Tensor, size: int) -> list[Tensor]:
    """Return clusters ``[H, N]`` near those of k-means, filled up to their size."""
    clusters = points.shape[1] // size
    floats = points.float()
    weight = torch.ones_like(floats[..., 0])
    found = []
    for seed in range(STARTS):
        centroids = weighted_kmeans(floats, weight, clusters=clusters, seed=seed)
        found.append(_filled(torch.cdist(points, centroids.double()), size))
    return found


def _filled(distance: Tensor, size: int) -> Tensor:
    """Give points to the nearest cluster that has room, those first that gain most by it.

    Args:
        distance: From each cluster's centre, ``[H, N, clusters]``.
        size: Room of a cluster.

    Returns:
        Cluster of each point, ``[H, N]``.
    """
    H, N, clusters = distance.shape
    heads = torch.arange(H, device=distance.device, dtype=torch.int64)
    labels = distance.new_zeros(H, N, dtype=torch.int64)
    room = torch.full((H, clusters), size, device=distance.device, dtype=torch.int64)
    nearest = distance.topk(2, largest=False).values
    for point in (nearest[..., 0] - nearest[..., 1]).argsort(dim=-1, stable=True).unbind(1):
        open_to_it = distance[heads, point].masked_fill(room == 0, torch.inf)
        label = open_to_it.argmin(-1)
        labels[heads, point] = label
        room[heads, label] -= 1
    return labels


def _exchanged(points: Tensor, labels: Tensor, size: int) -> Tensor:
    """Exchange points between clusters while that lowers their scatter.

    With ``S`` the sum of a cluster, an exchange of ``u`` and ``v`` lowers the scatter by ``2 / size`` times
    ``(S_u - S_v) (v - u) + |v - u|^2``.

    Args:
        points: ``[H, N, F]`` fp64.
        labels: ``[H, N]``, ``size`` points of each.
        size: Points of a cluster.
    """
    labels = labels.clone()
    H, N, _ = points.shape
    heads = torch.arange(H, device=points.device, dtype=torch.int64)
    apart = torch.cdist(points, points).square()
    least = _LEAST_GAIN * points.square().sum((1, 2))
    while True:
        sums = _sums(points, labels, N // size)
        own = sums.gather(1, labels[..., None].expand_as(points))
        product = own @ points.transpose(1, 2)
        kept = product.diagonal(dim1=1, dim2=2)
        gain = product + product.transpose(1, 2) - kept[:, :, None] - kept[:, None] + apart
        gain = gain.masked_fill(labels[:, :, None] == labels[:, None], 0.0)
        most, place = gain.flatten(1).max(1)
        moving = most > least
        if not moving.any():
            return labels
        u, v = (place // N)[moving], (place % N)[moving]
        head = heads[moving]
        labels[head, u], labels[head, v] = labels[head, v], labels[head, u]
