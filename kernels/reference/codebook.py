"""Vector quantization: a code is the index of the nearest centroid of a codebook."""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import Calibrated
from kvq_compile.kernels.reference.formats import FP16_MAX, pack, unpack

MAX_DISTANCES = 1 << 22  # in memory at once


def nearest_centroid(y: Tensor, codebook: Tensor) -> Tensor:
    """Return the index of the nearest centroid of each group of channels; ties go to the lowest index.

    Args:
        y: ``[B, H, P, N, D]``, fp32.
        codebook: ``[H, groups, entries, couple]``, fp32.

    Returns:
        ``[B, H, P, N, groups]``, int32.
    """
    groups, entries, couple = codebook.shape[1:]
    y = torch.nan_to_num(y, nan=0.0).clamp(-FP16_MAX, FP16_MAX)
    rows = (
        y.transpose(0, 1).flatten(1, 3).unflatten(-1, (groups, couple))
    )  # [H, tokens, groups, couple]
    index = torch.arange(entries, device=y.device, dtype=torch.int64)
    found = []
    for piece in rows.split(max(1, MAX_DISTANCES // (rows.shape[0] * groups * entries)), 1):
        distance = torch.zeros((), dtype=torch.float32, device=y.device)
        for channel in range(couple):
            difference = piece[..., channel, None] - codebook[:, None, :, :, channel]
            distance = distance + difference * difference
        least = distance == distance.amin(-1, keepdim=True)
        found.append(torch.where(least, index, entries).amin(-1))
    shape = (y.shape[1], y.shape[0], *y.shape[2:4], groups)
    return torch.cat(found, 1).view(shape).transpose(0, 1).int()


def centroids(codes: Tensor, codebook: Tensor) -> Tensor:
    """Return the centroids ``[B, H, P, N, D]`` of indices ``[B, H, P, N, groups]``."""
    couple = codebook.shape[3]
    rows = codes.permute(1, 4, 0, 2, 3).flatten(2).long()  # [H, groups, tokens]
    picked = codebook.gather(2, rows[..., None].expand(-1, -1, -1, couple))
    tokens = codes.permute(1, 4, 0, 2, 3).shape[2:]
    return picked.unflatten(2, tokens).permute(2, 0, 3, 4, 1, 5).flatten(-2)


# Pages


def quantize_codes(coded: Tensor, layout: Layout, calibrated: Calibrated) -> tuple[Tensor, Tensor]:
    """Return codes and empty parameters of pages: see `pages.CodeCoder`."""
    shape = (*coded.shape[:-2], *layout.params_shape, layout.param_elements)
    no_params = coded.new_zeros(shape, dtype=torch.float16)
    return nearest_centroid(coded, calibrated.codebook(layout)), no_params


def coded_values(codes: Tensor, params: Tensor, layout: Layout, calibrated: Calibrated) -> Tensor:
    """Dequantize codes: see `pages.CodeCoder`."""
    del params
    return centroids(codes, calibrated.codebook(layout))


def quantize_coded(
    coded: Tensor,
    layout: Layout,
    calibrated: Calibrated,
    first: int,
    importance: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Quantize and pack pages: see `pages.Coder`."""
    del first, importance
    codes, params = quantize_codes(coded, layout, calibrated)
    return pack(codes, layout), params


def packed_values(codes: Tensor, params: Tensor, layout: Layout, calibrated: Calibrated) -> Tensor:
    """Unpack and dequantize pages: see `pages.Coder`."""
    return coded_values(unpack(codes, layout), params, layout, calibrated)


def check_pages(codes: Tensor, params: Tensor, layout: Layout) -> None:
    """Accept pages from a file: every index has an entry in the codebook."""
    del codes, params, layout
