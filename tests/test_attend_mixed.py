"""Attending to pages of mixed bits is attending to what they stand for."""

import math

import pytest
import torch

from kvq_compile.kernels import mixed, reference
from kvq_compile.kernels.mixed import MixedLayout

pytestmark = pytest.mark.filterwarnings(  # of numpy, from Triton's interpreter
    "ignore:Conversion of an array with ndim:DeprecationWarning"
)
attend_mixed = pytest.importorskip("kvq_compile.kernels.attend_mixed")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CASES = {
    "two bits": (MixedLayout(2.0, 32, 32), MixedLayout(1.5, 32, 32)),
    "head_dim not a power of two": (MixedLayout(2.5, 32, 80), MixedLayout(2.0, 32, 80)),
    "fp16 parameters": (
        MixedLayout(3.0, 32, 32, 1, 4, params="fp16"),
        MixedLayout(1.0, 32, 16, 0, 3, params="fp16"),
    ),
    "eight bits": (MixedLayout(6.0, 32, 32, 2, 8), MixedLayout(8.0, 32, 32, 0, 8)),
}


@pytest.mark.parametrize("name", CASES)
def test_attending_to_pages_is_attending_to_what_they_stand_for(name: str) -> None:
    layouts = CASES[name]
    pages, sinks, held = 3, 5, 5 + 2 * 32 + 7
    generator = torch.Generator().manual_seed(0)
    packed, tokens = [], []
    for layout in layouts:
        x = torch.randn(2, 2, pages, 32, layout.head_dim, generator=generator)
        weight = torch.rand(2, 2, pages, 32, generator=generator) ** 6
        parts = mixed.quantize_pages(x, weight, layout)
        packed.append(tuple(part.to(DEVICE) for part in parts))
        tokens.append(mixed.dequantize_pages(*parts, layout).flatten(2, 3)[:, :, : held - sinks])
    query = torch.randn(2, 2, 3, layouts[0].head_dim, generator=generator)
    output, lse = attend_mixed.attend_pages(query.to(DEVICE), *packed, 0.25, held, sinks, *layouts)
    expected = reference.softmax_attention(query, *tokens, None, 0.25)
    torch.testing.assert_close(output.cpu(), expected, rtol=1e-4, atol=1e-4)
    scores = query @ tokens[0].mT * (0.25 * math.log2(math.e))
    expected = torch.logsumexp(scores * math.log(2), -1) / math.log(2) + 12.0
    torch.testing.assert_close(lse.cpu(), expected, rtol=1e-4, atol=1e-3)
