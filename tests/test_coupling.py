"""Channels that share an index have equally much to say, and no exchange would serve them better."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile.calibration.coupling import least_error, order_by_need
from kvq_compile.calibration.fit import fit_codebook, quantize_dequantize, weighted_error


def variances(seed: int, dim: int = 16) -> Tensor:
    """Return variances of channels as unlike as those of keys."""
    generator = torch.Generator().manual_seed(seed)
    return (2 * torch.randn(2, dim, generator=generator)).exp()


def error_of(variance: Tensor, order: Tensor, couple: int, bits: int) -> Tensor:
    """Return the error of all indices of each head."""
    return least_error(variance.double().gather(1, order).unflatten(1, (-1, couple)), bits).sum(-1)


@given(st.integers(0, 2**16), st.sampled_from([1, 2, 4, 8]), st.booleans())
def test_an_order_is_a_permutation_that_keeps_pairs(seed: int, couple: int, paired: bool) -> None:
    order = order_by_need(variances(seed), couple, 8, paired)
    assert torch.equal(order.sort(-1).values, torch.arange(16).expand(2, 16))
    first, second = order.chunk(2, -1)
    assert torch.equal(second, first + 8) or not paired


@given(st.integers(0, 2**16), st.sampled_from([2, 4, 8]), st.sampled_from([4, 8]))
def test_no_exchange_of_two_channels_lowers_the_error(seed: int, couple: int, bits: int) -> None:
    x = variances(seed)
    order = order_by_need(x, couple, bits, False)
    least = error_of(x, order, couple, bits)
    for u in range(16):
        for v in range(u):
            other = order.clone()
            other[:, u], other[:, v] = order[:, v], order[:, u]
            assert bool((error_of(x, other, couple, bits) >= least * (1 - 1e-5)).all())


@given(st.integers(0, 2**16), st.integers(1, 12))
def test_the_least_error_is_that_of_the_best_shares(seed: int, bits: int) -> None:
    """Every share of the bits leaves ``sum v / 4 ** share`` or more."""
    x = variances(seed, dim=4).double()
    shares = torch.rand(200, 1, 4, generator=torch.Generator().manual_seed(seed)).double()
    shares = bits * shares / shares.sum(-1, keepdim=True)
    given_away = (x * torch.exp2(-2 * shares)).sum(-1)
    assert bool((least_error(x, bits) <= given_away * (1 + 1e-9)).all())


def test_channels_without_variance_are_ordered_too() -> None:
    order = order_by_need(torch.zeros(1, 8), 4, 8, False)
    assert torch.equal(order.sort(-1).values, torch.arange(8).expand(1, 8))


def test_a_balanced_codebook_serves_channels_of_unlike_variance_better() -> None:
    """Wide channels that are neighbours must share an index; coupled with narrow ones each has an index."""
    generator = torch.Generator().manual_seed(0)
    spread = torch.tensor([8.0] * 4 + [0.5] * 12)
    x = torch.randn(2000, 1, 16, generator=generator) * spread
    kept = {
        balance: weighted_error(
            x,
            quantize_dequantize(
                x,
                fit_codebook(x, couple=4, bits=6, paired=False, correlate=False, balance=balance),
            ),
        )
        for balance in (False, True)
    }
    assert kept[True] < 0.25 * kept[False]
