"""The uniform quantizer.

A group with smallest and largest finite element ``lo`` and ``hi`` (shrunk about their
midpoint by ``clip``) stores

    zero  = lo rounded down to fp16
    scale = (hi - zero) / levels rounded up to fp16, at most the largest fp16 number
    code  = floor((x - zero) / scale + 1/2), clamped to 0 .. levels

so that ``code * scale + zero`` covers ``[lo, hi]`` whatever fp16 did to the parameters, and is off by at
most half a step inside it. A constant group that fp16 can represent has scale 0 and is exact. The
parameters are rounded first and the codes computed with the rounded ones. In fp8 (e4m3) both are rounded to
the nearest number, since a step of that format is too wide to round away from the group. All arithmetic is
fp32 with one rounding an operation, in this order, which is what makes codes equal bit by bit across devices.

**Elements that are not finite** take no part in ``lo`` and ``hi``, so they never widen another element's
step; an infinity is stored as the nearer end of its group's range and a NaN as the code nearest to zero.
The call that wrote such a token attends to it exactly, so its damage shows there.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import Calibrated
from kvq_compile.kernels.reference.formats import (
    FP16_MAX,
    e4m3_value,
    pack,
    round_down_fp16,
    round_e4m3,
    round_up_fp16,
    unpack,
)
from kvq_compile.kernels.schemes import Params
from kvq_compile.kernels.values import check


def to_groups(x: Tensor, layout: Layout) -> Tensor:
    """View pages ``[..., N, D]`` so that the elements of a group lie along the last dimension.

    Returns ``[..., groups, members, group_size]`` in the order of the parameters.
    """
    if layout.grouping == "token":
        return x.unflatten(-1, (-1, layout.group_size)).transpose(-3, -2)
    return x.unflatten(-2, (-1, layout.group_size)).transpose(-2, -1)


def from_groups(grouped: Tensor, layout: Layout) -> Tensor:
    """Undo `to_groups`."""
    if layout.grouping == "token":
        return grouped.transpose(-3, -2).flatten(-2)
    return grouped.transpose(-2, -1).flatten(-3, -2)


def quantize_groups(
    x: Tensor, levels: int, params: Params, margin: Tensor | float = 0.0
) -> tuple[Tensor, Tensor]:
    """Quantize groups.

    Args:
        x: Elements of a group along the last dimension, ``[..., group_size]``, fp32.
        levels: The largest code.
        params: Format of the parameters.
        margin: Share of a group's range to cut off at each end, broadcasting to ``[...]``.

    Returns:
        Codes like ``x`` (int32) and parameters ``[..., 2]``, scale and zero point (fp16, or uint8).
    """
    finite = x.isfinite()
    bounded = x.clamp(-FP16_MAX, FP16_MAX)
    any_finite = finite.any(-1)
    lo = torch.where(any_finite, bounded.masked_fill(~finite, math.inf).amin(-1), 0.0)
    hi = torch.where(any_finite, bounded.masked_fill(~finite, -math.inf).amax(-1), 0.0)
    if isinstance(margin, Tensor) or margin:
        cut = (hi - lo) * margin
        lo, hi = lo + cut, hi - cut
    if params == "fp8":
        stored_zero = round_e4m3(lo)
        stored_scale = round_e4m3(((hi - e4m3_value(stored_zero)) / levels).clamp_min(0.0))
    else:
        stored_zero = round_down_fp16(lo)
        stored_scale = round_up_fp16(((hi - stored_zero.float()) / levels).clamp_max(FP16_MAX))
    stored = torch.stack([stored_scale, stored_zero], -1)
    scale, zero = param_values(stored)[..., None, :].unbind(-1)
    codes = (
        (torch.nan_to_num(bounded, nan=0.0) - zero) / torch.where(scale > 0, scale, 1.0) + 0.5
    ).floor()
    return (codes.clamp(0, levels) * (scale > 0)).int(), stored


def group_values(codes: Tensor, params: Tensor) -> Tensor:
    """Return the elements (fp32) that codes ``[..., group_size]`` and parameters ``[..., 2]`` stand for."""
    scale, zero = param_values(params)[..., None, :].unbind(-1)
    return codes.float() * scale + zero


def param_values(params: Tensor) -> Tensor:
    """Return stored parameters as fp32."""
    return e4m3_value(params) if params.dtype == torch.uint8 else params.float()


# Pages


def quantize_codes(coded: Tensor, layout: Layout, calibrated: Calibrated) -> tuple[Tensor, Tensor]:
    """Return codes and parameters of pages: see `pages.CodeCoder`."""
    margin: Tensor | float = (1.0 - layout.clip) / 2.0
    if calibrated.tables is not None:
        margin = calibrated.margin(layout)
    groups = to_groups(coded, layout)
    codes, params = quantize_groups(groups, layout.levels, layout.params, margin)
    return from_groups(codes, layout), params


def coded_values(codes: Tensor, params: Tensor, layout: Layout, calibrated: Calibrated) -> Tensor:
    """Return what codes stand for: see `pages.CodeCoder`."""
    del calibrated
    return from_groups(group_values(to_groups(codes, layout), params), layout)


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
    """Return what packed pages stand for: see `pages.Coder`."""
    return coded_values(unpack(codes, layout), params, layout, calibrated)


def check_pages(codes: Tensor, params: Tensor, layout: Layout) -> None:
    """Check pages that come from a file: any code is one that quantizing can write.

    Raises:
        ValueError: A parameter is not finite.
    """
    del codes, layout
    check(bool(param_values(params).isfinite().all()), "scales and zero points must be finite")
