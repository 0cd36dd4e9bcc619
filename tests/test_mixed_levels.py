"""Levels of QAQ: who shares span and bits, the channels of a head, the heads of a layer, the layers of a token."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.reference import mixed
from kvq_compile.testing import mixed_layout

N = 32  # tokens of a page
LAYOUTS = st.builds(
    mixed_layout, st.integers(2 * N, 4 * N).map(lambda rows: rows / N), st.just(N), st.just(32),
    min_bits=st.integers(0, 2), max_bits=st.integers(4, 8), params=st.sampled_from(["fp8", "fp16"]),
    fit=st.booleans(), soften=st.booleans(),
)  # fmt: skip


def test_heads_of_a_layer_share_span_and_bits_at_layer_level() -> None:
    layout = mixed_layout(2.0, N, 32, fit=False)
    x = torch.randn(1, 3, 2, N, 32) * torch.tensor([1.0, 2.0, 3.0]).view(1, 3, 1, 1, 1)
    codes, records = mixed.quantize_pages(x, torch.rand(1, 3, 2, N), layout, level="layer")
    assert (records == records[:, :1]).all()
    assert (codes[..., :8] == codes[:, :1, ..., :8]).all()
    assert not (codes == codes[:, :1]).all()


def pages_of_layers(seed: int, layers: int, heads: int) -> tuple[Tensor, Tensor]:
    """Return pages ``[L, 2, H, 2, N, D]`` of layers and heads of different range, and importance."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(layers, 2, heads, 2, N, 32, generator=generator)
    x *= 0.1 + 3 * torch.rand(layers, 1, heads, 1, N, 1, generator=generator)
    return x, torch.rand(layers, 2, heads, 2, N, generator=generator) ** 4


@given(st.data(), LAYOUTS, st.integers(0, 2**16))
def test_levels_are_the_same_where_there_is_nothing_to_share(
    data: st.DataObject, layout: Layout, seed: int
) -> None:
    finer, coarser = data.draw(st.sampled_from([("head", "layer"), ("layer", "token")]))
    layers, heads = (2, 1) if coarser == "layer" else (1, 3)
    x, importance = pages_of_layers(seed, layers, heads)
    weights = data.draw(st.sampled_from([None, importance]))
    bound = data.draw(st.sampled_from([0.0, 0.05]))
    one = mixed.quantize_pages(x, weights, layout, bound, finer)
    other = mixed.quantize_pages(x, weights, layout, bound, coarser)
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a, b)


@given(LAYOUTS, st.integers(0, 2**16))
def test_a_level_shares_bits_and_what_its_tokens_need_most(layout: Layout, seed: int) -> None:
    """Span and importance of a shared token are those of all channels, heads and layers that share it."""
    x, importance = pages_of_layers(seed, 2, 3)
    for level, dims in (("layer", (2,)), ("token", (0, 2))):
        codes, records = mixed.quantize_pages(x, importance, layout, 0.01, level)
        bits = mixed.unpack(codes, records, layout)[1]
        span = x.amax((*dims, -1), keepdim=True) - x.amin((*dims, -1), keepdim=True)
        weight = importance.amax(dims, keepdim=True)
        expected = mixed.allocate(span[..., 0], weight, layout, 0.01)
        assert torch.equal(bits, expected.expand_as(bits))
        assert (records[..., layout.mixed.rank_field, :, 0] == mixed.rank(bits)).all()


def test_levels_name_the_dimensions_that_they_need() -> None:
    with pytest.raises(
        ValueError, match="x must have 6 dimensions or more at level 'token', got 5"
    ):
        mixed.quantize_pages(
            torch.randn(1, 2, 1, N, 32), None, mixed_layout(2.0, N, 32), level="token"
        )
