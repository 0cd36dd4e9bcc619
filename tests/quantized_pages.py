"""Pages of tokens and their layouts, for tests of the specification."""

import math

import torch
from hypothesis import strategies as st
from torch import Tensor

from kvq_compile.kernels import reference
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.schemes import Uniform
from kvq_compile.kernels.spec import CacheSpec
from kvq_compile.testing import kv_tensors, page_layouts

WHOLE_WIDTHS = (1, 2, 3, 4, 8)


def token_layout(bits: int, group_size: int | None = None, **rest: object) -> Layout:
    """Return keys of 64 channels in pages of 32 tokens, grouped inside a token."""
    spec = Uniform(bits, "token", group_size, **rest)
    return CacheSpec(spec, spec, 0, 0, 32).layout("key", 64)


def page_of(row: list[float]) -> Tensor:
    """Return a page of 32 tokens of 64 channels; the first token begins with ``row``, then repeats it."""
    page = torch.zeros(32, 64)
    page[0] = torch.tensor(row).repeat(math.ceil(64 / len(row)))[:64]
    return page


def stored(x: Tensor, layout: Layout) -> Tensor:
    """Return what pages are read as once they have been quantized."""
    return reference.dequantize_pages(*reference.quantize_pages(x, layout), layout)


@st.composite
def pages(draw: st.DrawFn, transform: bool = False, finite: bool = True) -> tuple[Tensor, Layout]:
    layout = draw(page_layouts(transform))
    shape = (draw(st.integers(1, 2)), layout.page_size, layout.head_dim)
    return draw(kv_tensors(shape, finite=finite)), layout
