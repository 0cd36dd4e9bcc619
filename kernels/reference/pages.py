"""Whole pages by the scheme of their layout: quantize and pack them, unpack and dequantize them."""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import UNCALIBRATED, Calibrated
from kvq_compile.kernels.reference import mixed
from kvq_compile.kernels.reference.codebook import centroids, nearest_centroid
from kvq_compile.kernels.reference.formats import pack, unpack
from kvq_compile.kernels.reference.tables import from_coded, to_coded
from kvq_compile.kernels.reference.uniform import (
    from_groups,
    group_values,
    quantize_groups,
    to_groups,
)
from kvq_compile.kernels.schemes import Codebook, Mixed


def quantize_pages(
    x: Tensor, layout: Layout, calibrated: Calibrated = UNCALIBRATED, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Quantize whole pages, uniformly or by a codebook.

    Args:
        x: Pages of tokens, ``[..., N, D]``, any float dtype; ``[B, H, P, N, D]`` where there are tables.
        layout: Where the groups lie and how wide a code is.
        calibrated: What the tokens are coded relative to, where the layout has tables.
        first: Slot of the first token.

    Returns:
        Codes ``[..., N, D / couple]`` (int32) and parameters ``[..., groups, members, 2]`` (fp16, or uint8).
    """
    x = to_coded(x.float(), layout, calibrated, first)
    if isinstance(layout.scheme, Codebook):
        no_params = x.new_zeros(*x.shape[:-2], *layout.params_shape, 2, dtype=torch.float16)
        return nearest_centroid(x, calibrated.codebook(layout)), no_params
    margin: Tensor | float = (1.0 - layout.clip) / 2.0
    if calibrated.tables is not None:
        margin = calibrated.margin(layout)
    codes, params = quantize_groups(to_groups(x, layout), layout.levels, layout.params, margin)
    return from_groups(codes, layout), params


def dequantize_pages(
    codes: Tensor,
    params: Tensor,
    layout: Layout,
    calibrated: Calibrated = UNCALIBRATED,
    first: int = 0,
) -> Tensor:
    """Return the pages ``[..., N, D]`` (fp32) that codes and parameters of `quantize_pages` stand for."""
    return from_coded(coded_values(codes, params, layout, calibrated), layout, calibrated, first)


def coded_values(
    codes: Tensor, params: Tensor, layout: Layout, calibrated: Calibrated = UNCALIBRATED
) -> Tensor:
    """Return the elements ``[..., N, D]`` (fp32) that codes stand for, in the basis in which they were coded."""
    if isinstance(layout.scheme, Codebook):
        return centroids(codes, calibrated.codebook(layout))
    return from_groups(group_values(to_groups(codes, layout), params), layout)


def quantize_packed(
    x: Tensor,
    layout: Layout,
    calibrated: Calibrated = UNCALIBRATED,
    first: int = 0,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize whole pages ``[B, H, P, N, D]`` and pack them: the parts ``codes`` and ``params``.

    ``importance``, ``[B, H, P, N]``, tells mixed layouts where bits matter.
    """
    if isinstance(layout.scheme, Mixed):
        coded = to_coded(x.float(), layout, calibrated, first)
        return mixed.quantize_pages(
            coded,
            importance if layout.attentive else None,
            layout,
            page_bounds(layout, first, x.shape[-3], x.device),
        )
    codes, params = quantize_pages(x, layout, calibrated, first)
    return pack(codes, layout), params


def page_bounds(layout: Layout, first: int, pages: int, device: torch.device) -> Tensor:
    """Return the bounds ``[pages]`` on the weighted error of mixed pages from slot ``first`` on."""
    ends = (first + (page + 1) * layout.page_size for page in range(pages))
    return torch.tensor([layout.bound_at(end) for end in ends], dtype=torch.float32, device=device)


def unpacked_values(
    codes: Tensor, params: Tensor, layout: Layout, calibrated: Calibrated = UNCALIBRATED
) -> Tensor:
    """Return packed pages as numbers ``[..., N, D]`` (fp32) in the basis in which they were coded."""
    if isinstance(layout.scheme, Mixed):
        return mixed.dequantize_pages(codes, params, layout)
    return coded_values(unpack(codes, layout), params, layout, calibrated)


def dequantize_packed(
    codes: Tensor,
    params: Tensor,
    layout: Layout,
    calibrated: Calibrated = UNCALIBRATED,
    page: int = 0,
) -> Tensor:
    """Return packed pages ``[B, H, P, ...]``, from number ``page`` on, as tokens ``[B, H, P * N, D]`` (fp32)."""
    first = layout.sinks + page * layout.page_size
    coded = unpacked_values(codes, params, layout, calibrated)
    return from_coded(coded, layout, calibrated, first).flatten(-3, -2)
