"""The authors' form of SKVQ: what its groups are and what its codes stand for."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile.calibration.cross_head import (
    CrossHead,
    cluster_across_heads,
    quantize_dequantize_across_heads,
)


def samples(seed: int, heads: int = 2, dim: int = 16) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    spread = torch.randn(heads, dim, generator=generator).exp()
    return spread * torch.randn(60, heads, dim, generator=generator)


def test_channels_of_like_range_are_grouped_whatever_their_head() -> None:
    x = samples(0)
    wide = torch.zeros(2, 16, dtype=torch.bool)
    wide[0, :5] = wide[1, 3:] = True  # 18 of 32: no equal groups
    x = torch.where(wide, 100.0, 1.0) * x / x.std(0)
    labels = cluster_across_heads(x, 16).labels.view(2, 16)
    assert len(labels[wide].unique()) == len(labels[~wide].unique()) == 1
    assert int(labels[wide][0]) != int(labels[~wide][0])


@given(st.integers(0, 2**16), st.sampled_from([2, 3, 7, 15]))
def test_exact_parameters_and_no_clip_leave_half_a_step(seed: int, levels: int) -> None:
    x = samples(seed)
    groups = cluster_across_heads(x, 8)
    restored = quantize_dequantize_across_heads(x, groups, levels=levels, clip=1.0, fp8=False)
    for cluster in groups.labels.unique():
        group = x.flatten(1)[:, groups.labels == cluster]
        error = (restored.flatten(1)[:, groups.labels == cluster] - group).abs()
        step = (group.amax(1) - group.amin(1)) / levels
        kept = 2e-3 * group.abs().amax(1) + 1e-4  # fp16 of both parameters, and the least step
        assert bool((error.amax(1) <= step / 2 + kept).all())


def test_a_clip_is_about_zero() -> None:
    x = torch.tensor([[10.0, 8.0, 12.0, 14.0]]).view(1, 1, 4)
    groups = CrossHead(torch.zeros(4, dtype=torch.int64), 1)
    restored = quantize_dequantize_across_heads(x, groups, levels=3, clip=0.75, fp8=False)
    assert restored.flatten().tolist() == [10.5, 7.5, 10.5, 10.5]  # 6 to 10.5


def test_codes_of_rounded_parameters_are_nearer() -> None:
    x = samples(3) + 4.0
    groups = cluster_across_heads(x, 8)
    first, after = (
        float(
            (
                quantize_dequantize_across_heads(
                    x, groups, levels=15, clip=1.0, fp8=True, round_first=flag
                )
                - x
            )
            .square()
            .mean()
        )
        for flag in (True, False)
    )
    assert first < after


@pytest.mark.parametrize(
    ("levels", "fp8", "bits"), [(3, True, 2 + 2), (3, False, 2 + 4), (2, True, 1.6 + 2)]
)
def test_bits_count_codes_and_two_parameters_a_group(levels: int, fp8: bool, bits: float) -> None:
    groups = CrossHead(torch.arange(32) % 4, 4)
    assert groups.bits(levels, fp8) == bits


def test_a_group_size_that_does_not_divide_the_channels_is_refused() -> None:
    with pytest.raises(
        ValueError, match="group_size must divide the 32 channels of a layer, got 5"
    ):
        cluster_across_heads(samples(0), 5)
