"""Fitted tables keep the storage format's promises, and fits are the minima they claim to be."""

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile.calibration.fit import (
    Fitted,
    fit_codebook,
    fit_uniform,
    quantize_dequantize,
    weighted_error,
)
from kvq_compile.calibration.kmeans import assign, weighted_kmeans
from kvq_compile.kernels import reference
from kvq_compile.kernels.layout import Layout, Regions
from kvq_compile.kernels.packed import Calibrated
from kvq_compile.kernels.schemes import Uniform
from kvq_compile.kernels.tables import Tables


def samples(seed: int, tokens: int = 120, heads: int = 2, dim: int = 16) -> tuple[Tensor, Tensor]:
    """Return correlated, shifted channels of unlike spread, and heavy-tailed weights."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(heads, dim, dim, generator=generator)
    x = torch.einsum("thd,hde->the", torch.randn(tokens, heads, dim, generator=generator), mix)
    x = x + 5 * torch.randn(heads, dim, generator=generator)
    weight = torch.randn(tokens, heads, dim, generator=generator).square()
    return x, weight * torch.randn(tokens, 1, 1, generator=generator).exp() * 1e-12


def uniform(x: Tensor, **options: object) -> Fitted:
    return fit_uniform(x, **({"group_size": 8, "paired": False} | options))  # type: ignore[arg-type]


def error_of_uniform(x: Tensor, levels: int) -> float:
    restored = quantize_dequantize(x, uniform(x), levels=levels, group_size=8, fp8=False)
    return weighted_error(x, restored)


# Tables


@given(st.integers(0, 2**16), st.booleans(), st.booleans())
def test_order_is_a_permutation(seed: int, paired: bool, change: bool) -> None:
    x, weight = samples(seed)
    dim = x.shape[2]
    book = fit_codebook(x, weight, couple=4, bits=2, paired=paired, correlate=change, iterations=1)
    for fitted in (uniform(x, paired=paired, reorder=change), book):
        assert torch.equal(fitted.order.sort(-1).values, torch.arange(dim).expand(2, dim))


@given(st.integers(0, 2**16), st.booleans())
def test_a_paired_order_keeps_pairs(seed: int, change: bool) -> None:
    x, weight = samples(seed)
    book = fit_codebook(x, weight, couple=4, bits=2, paired=True, correlate=change, iterations=1)
    for fitted in (uniform(x, paired=True, reorder=change), book):
        first, second = fitted.order.chunk(2, -1)
        assert torch.equal(second, first + x.shape[2] // 2)


def test_channels_that_go_together_are_coupled() -> None:
    x, _ = samples(5, tokens=500)
    x[..., 9] = 2 * x[..., 0] + 1
    fitted = fit_codebook(x, None, couple=2, bits=2, paired=False, iterations=1)
    assert fitted.order[:, :2].tolist() == [[0, 9], [0, 9]]


@given(st.integers(0, 2**16), st.sampled_from([0.0, 0.25, 0.5]))
def test_scales_are_positive_and_equal_within_a_pair(seed: int, sensitivity: float) -> None:
    x, weight = samples(seed)
    book = fit_codebook(
        x, weight, couple=4, bits=2, paired=True, sensitivity=sensitivity, iterations=1
    )
    for fitted in (uniform(x, paired=True), book):
        first, second = fitted.scale.chunk(2, -1)
        assert torch.equal(first, second)
        assert bool((fitted.scale > 0).all())


def test_a_sensitive_channel_is_stored_more_exactly() -> None:
    x, _ = samples(0, tokens=1000)
    weight = torch.ones_like(x)
    weight[..., 3] = 100
    errors = []
    for sensitivity in (0.0, 0.5):
        fitted = fit_codebook(
            x, weight, couple=4, bits=4, paired=False, sensitivity=sensitivity, correlate=False
        )
        errors.append(float((quantize_dequantize(x, fitted) - x)[..., 3].square().mean()))
    assert errors[1] < errors[0]


@pytest.mark.parametrize("equalize", [0.0, 0.5, 1.0])
def test_a_channel_is_coded_in_a_power_of_its_spread(equalize: float) -> None:
    x, _ = samples(6, tokens=2000)
    coded = ((x - x.mean(0)) / uniform(x, equalize=equalize).scale).std(0)
    ratio = coded / x.std(0).pow(1 - equalize)
    assert float((ratio / ratio.mean(-1, keepdim=True) - 1).abs().max()) < 1e-3


@given(st.integers(0, 2**16), st.floats(0, 1), st.booleans(), st.sampled_from([1e-20, 1.0, 1e4]))
@example(0, 0.0, True, 1e-20)  # as they are, channels of e-20 and of 5 have one scale
def test_coded_numbers_fill_the_range_of_fp8(
    seed: int, equalize: float, paired: bool, narrow: float
) -> None:
    x, _ = samples(seed)
    x[..., 3] *= narrow
    fitted = uniform(x, equalize=equalize, paired=paired)
    largest = ((x - fitted.mean) / fitted.scale).abs().amax((0, 2))
    torch.testing.assert_close(largest, torch.full_like(largest, 128.0), rtol=1e-4, atol=0)


def test_more_levels_are_never_worse_on_the_samples() -> None:
    x, _ = samples(2, tokens=500)
    errors = [error_of_uniform(x, levels) for levels in (2, 3, 7, 15, 255)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-4


@given(
    st.integers(0, 2**16), st.sampled_from([2, 3, 15]), st.booleans(), st.sampled_from([0.0, 0.1])
)
def test_what_calibration_tries_is_what_a_cache_would_hold(
    seed: int, levels: int, fp8: bool, margin: float
) -> None:
    """Bit by bit where means and scales do not round: one quantizer serves both."""
    x, _ = samples(seed, tokens=32)
    heads, dim = x.shape[1:]
    fitted = Fitted(
        torch.arange(dim).repeat(heads, 1), torch.zeros(heads, dim), torch.ones(heads, dim),
        torch.full((heads, dim), margin),
    )  # fmt: skip
    tables = Tables.build(
        order=fitted.order, mean=fitted.mean, scale=fitted.scale, margin=fitted.margin
    )
    scheme = Uniform(
        {2: 1.5, 3: 2, 15: 4}[levels], group_size=8, params="fp8" if fp8 else "fp16",
        tables=tables.digest,
    )  # fmt: skip
    layout = Layout("value", dim, Regions(0, 0, 32), scheme)
    pages = x.transpose(0, 1)[None, :, None]
    about = layout, Calibrated(tables.words)
    held = reference.dequantize_pages(*reference.quantize_pages(pages, *about), *about)
    tried = quantize_dequantize(x, fitted, levels=levels, group_size=8, fp8=fp8)
    assert torch.equal(tried, held[0, :, 0].transpose(0, 1))


# Codebooks


def test_more_bits_are_never_worse_on_the_samples() -> None:
    x, weight = samples(3, tokens=500)
    errors = []
    for bits in range(1, 8):
        fitted = fit_codebook(
            x, weight, couple=4, bits=bits, paired=False, sensitivity=0.0, correlate=False
        )
        point_weight = weight.unflatten(-1, (-1, 4)).sum(-1).repeat_interleave(4, -1)
        errors.append(weighted_error(x, quantize_dequantize(x, fitted), point_weight))
    assert errors == sorted(errors, reverse=True)


@given(st.integers(0, 2**16), st.integers(1, 16))
def test_each_centroid_is_the_weighted_mean_of_its_members(seed: int, clusters: int) -> None:
    x, weight = samples(seed)
    points, weight = x.flatten(1).T[..., None].contiguous(), weight.flatten(1).T.contiguous()
    centroids = weighted_kmeans(points, weight, clusters=clusters, seed=seed, iterations=1000)
    nearest, _ = assign(points, centroids)
    member = torch.nn.functional.one_hot(nearest, clusters).double() * weight[..., None].double()
    means = (member * points.double()).sum(1) / member.sum(1)
    torch.testing.assert_close(centroids[..., 0].double(), means, rtol=1e-4, atol=1e-4)


@given(st.integers(0, 2**16), st.sampled_from([0.0, 0.5, 1.0]))
def test_equal_weights_are_plain_kmeans(seed: int, temper: float) -> None:
    x, _ = samples(seed)
    equal = torch.full_like(x, 1e-12)
    fits = [
        fit_codebook(x, w, couple=4, bits=3, paired=False, seed=seed, temper=temper)
        for w in (None, equal)
    ]
    assert fits[0].codebook is not None and fits[1].codebook is not None
    torch.testing.assert_close(fits[0].codebook, fits[1].codebook, rtol=1e-2, atol=1e-2)


@given(st.integers(0, 2**16), st.integers(1, 64))
def test_no_centroid_is_dead_when_there_are_enough_points(seed: int, clusters: int) -> None:
    x, weight = samples(seed)
    points = x.flatten(1).unflatten(-1, (-1, 2)).transpose(0, 1).contiguous()
    weight = weight.flatten(1)[:, ::2].T.contiguous()
    centroids = weighted_kmeans(points, weight, clusters=clusters, seed=seed, iterations=200)
    for nearest in assign(points, centroids)[0]:
        assert len(nearest.unique()) == clusters


# Both


@given(st.integers(0, 2**16))
def test_the_same_seed_gives_the_same_tables(seed: int) -> None:
    x, weight = samples(seed)
    plain = [uniform(x, paired=True, reorder=True) for _ in range(2)]
    books = [fit_codebook(x, weight, couple=4, bits=4, paired=True, seed=seed) for _ in range(2)]
    for first, second in (plain, books):
        for name in ("order", "mean", "scale", "margin"):
            assert torch.equal(getattr(first, name), getattr(second, name))
    assert books[0].codebook is not None and books[1].codebook is not None
    assert torch.equal(books[0].codebook, books[1].codebook)


@given(
    st.sampled_from([0.0, 1.0, -3.0, 1e-30, 1e4]), st.integers(1, 5), st.sampled_from([0.0, 0.5])
)
@example(0.0, 1, 0.5)  # nothing but zeros in a single token
def test_constant_samples_are_kept(value: float, tokens: int, sensitivity: float) -> None:
    x = torch.full((tokens, 2, 16), value)
    fits = [
        uniform(x, paired=True, reorder=True),
        fit_codebook(
            x, torch.zeros_like(x), couple=4, bits=3, paired=True, sensitivity=sensitivity
        ),
    ]
    for fitted in fits:
        restored = quantize_dequantize(x, fitted, levels=3, group_size=8)
        torch.testing.assert_close(restored, x, rtol=1e-3, atol=1e-6)


def test_chunks_do_not_change_what_is_stored(monkeypatch: pytest.MonkeyPatch) -> None:
    x, weight = samples(4)
    fitted = fit_codebook(x, weight, couple=4, bits=4, paired=False)
    whole = quantize_dequantize(x, fitted)
    monkeypatch.setattr("kvq_compile.calibration.fit._TOKENS", 7)
    monkeypatch.setattr("kvq_compile.calibration.kmeans._MAX_DISTANCES", 500)
    torch.testing.assert_close(quantize_dequantize(x, fitted), whole, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"group_size": 5}, "group_size must divide the head dimension 16, got 5"),
        ({"equalize": 2}, "equalize must be between 0 and 1, got 2"),
        ({"x": torch.ones(3, 2)}, "samples must be [tokens, heads, head_dim], got [3, 2]"),
    ],
)
def test_unfit_arguments_are_refused(options: dict[str, object], message: str) -> None:
    arguments = {"x": samples(0)[0]} | options
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared below, brackets and all
        uniform(**arguments)  # type: ignore[arg-type]
    assert message in str(caught.value)


def test_weights_of_another_shape_are_refused() -> None:
    with pytest.raises(ValueError, match="weight must be shaped like the samples"):
        fit_codebook(samples(0)[0], torch.ones(1), couple=4, bits=2, paired=False)
