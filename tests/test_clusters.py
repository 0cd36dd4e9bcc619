"""Reordered channels form equal groups, no worse than those of any plain order, and planted groups are found."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile.calibration.clusters import balanced_order, order_by_range, scatter


def ranges(seed: int, heads: int = 2, dim: int = 32) -> tuple[Tensor, Tensor]:
    """Return ends of channels of very unlike range."""
    generator = torch.Generator().manual_seed(seed)
    high = torch.randn(heads, dim, generator=generator).exp()
    return -torch.randn(heads, dim, generator=generator).exp(), high


def points(seed: int, count: int = 24, features: int = 3) -> Tensor:
    return torch.randn(2, count, features, generator=torch.Generator().manual_seed(seed)).exp()


def cost(x: Tensor, order: Tensor, size: int) -> Tensor:
    """Return the scatter of runs of ``size`` of points ``[H, N, F]`` in an order ``[H, N]``."""
    runs = x.double().gather(1, order[..., None].expand_as(x)).unflatten(1, (-1, size))
    return (runs - runs.mean(2, keepdim=True)).square().sum((1, 2, 3))


@given(st.integers(0, 2**16), st.sampled_from([1, 2, 4, 8, 16, 32]), st.booleans())
def test_order_is_a_permutation(seed: int, group: int, paired: bool) -> None:
    order = order_by_range(*ranges(seed), group, paired)
    assert torch.equal(order.sort(-1).values, torch.arange(32).expand(2, 32))


@given(st.integers(0, 2**16), st.sampled_from([1, 2, 4, 8, 16, 32]))
def test_a_paired_order_keeps_pairs(seed: int, group: int) -> None:
    first, second = order_by_range(*ranges(seed), group, True).chunk(2, -1)
    assert torch.equal(second, first + 16)


@given(st.integers(0, 2**16), st.sampled_from([2, 3, 4, 6, 8, 12]))
def test_clusters_are_no_worse_than_any_plain_order(seed: int, size: int) -> None:
    x = points(seed)
    plain = [
        torch.arange(24).expand(2, 24),
        (x[..., 1] - x[..., 0]).argsort(-1),
        (x[..., 0] + x[..., 1]).argsort(-1),
    ]
    found = cost(x, balanced_order(x, size), size)
    for order in plain:
        assert bool((found <= cost(x, order, size) * (1 + 1e-6)).all())


@given(st.integers(0, 2**16), st.sampled_from([2, 4, 8]))
def test_no_exchange_of_two_points_lowers_the_cost(seed: int, size: int) -> None:
    x = points(seed, count=16)
    order = balanced_order(x, size)
    least = cost(x, order, size)
    for u in range(16):
        for v in range(u):
            other = order.clone()
            other[:, [u, v]] = order[:, [v, u]]
            assert bool((cost(x, other, size) >= least - 1e-6 * x.square().sum()).all())


@given(st.integers(0, 2**16), st.sampled_from([2, 4, 8]))
def test_planted_clusters_are_found(seed: int, clusters: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    planted = torch.stack(
        [torch.randperm(32, generator=generator) % clusters for _ in range(2)]
    )  # which cluster a point is of
    centres = 10.0 * torch.eye(clusters)[planted]
    x = centres + torch.randn(centres.shape, generator=generator)
    order = balanced_order(x, 32 // clusters)
    runs = planted.gather(1, order).unflatten(1, (clusters, -1))
    assert torch.equal(runs, runs[..., :1].expand_as(runs))


def test_scatter_is_the_squared_distance_from_the_means() -> None:
    x = points(3).double()
    labels = (torch.arange(24) // 6).expand(2, 24)
    expected = cost(x, torch.arange(24).expand(2, 24), 6)
    torch.testing.assert_close(scatter(x, labels, 4), expected)


@pytest.mark.parametrize(("group", "paired"), [(32, False), (32, True), (16, True)])
def test_where_there_is_no_choice_channels_keep_their_order(group: int, paired: bool) -> None:
    order = order_by_range(*ranges(0), group, paired)
    assert torch.equal(order, torch.arange(32).expand(2, 32))


def test_a_group_that_straddles_the_halves_is_made_of_whole_clusters() -> None:
    low, high = ranges(1, dim=48)
    high[:, [*range(0, 24, 3), *range(24, 48, 3)]] += 100.0  # a third of the pairs, eight of 24
    order = order_by_range(low, high, 16, paired=True)
    runs = (high.gather(1, order) > 50).unflatten(1, (-1, 8))
    assert torch.equal(runs, runs[..., :1].expand_as(runs))
