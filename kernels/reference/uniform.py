"""Uniform quantization.

A group whose smallest and largest finite elements are ``lo`` and ``hi`` (shrunk about their midpoint by ``clip``)
stores

    zero  = lo rounded down to fp16
    scale = (hi - zero) / levels rounded up to fp16, at most the largest fp16 value
    code  = floor((x - zero) / scale + 1/2), clamped to 0 .. levels

Codes are computed with the rounded parameters. ``code * scale + zero`` thus covers ``[lo, hi]`` despite the rounding to
fp16, with an error of at most half a step. A constant group whose value fp16 can represent has scale 0 and is exact. In
fp8 (e4m3) both parameters are rounded to nearest, because rounding away from the group would widen it too much.

In e5m3 a group's range always includes 0. The scale is rounded to nearest; of the zero point the byte says where the
middle of the range lies between its ends, ``zero = scale * levels / 2 * ((byte - 128) / 127 - 1)``. So both are right
for elements of any size, which those of e4m3 are not. All
arithmetic is fp32 with one rounding per operation, in this order, so that codes are bit-identical across devices.

**Elements that are not finite** do not count for ``lo`` and ``hi``, so they never widen the step of other elements. An
infinity is stored as the nearer end of its group's range, a NaN as the code nearest to zero. The call that writes such
a token attends to it exactly, so the fault shows in that call's output.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvq_compile.kernels.channelwise_scheme import CLIPS
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import Calibrated
from kvq_compile.kernels.reference.formats import (
    FP16_MAX,
    e4m3_value,
    e5m3_value,
    pack,
    round_down_fp16,
    round_e4m3,
    round_e5m3,
    round_up_fp16,
    sum_pairs,
    unpack,
)
from kvq_compile.kernels.schemes import Params
from kvq_compile.kernels.values import check

MIDDLE, MIDDLE_STEPS = 128, 127.0  # the byte of a range about zero, and steps to either side


def to_groups(x: Tensor, layout: Layout) -> Tensor:
    """View pages ``[..., N, D]`` with the elements of a group along the last dimension.

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
        margin: Fraction of a group's range to clip at each end, broadcasting to ``[...]``.

    Returns:
        Codes like ``x`` (int32) and parameters ``[..., 2]``, scale and zero point (fp16, or uint8).
    """
    return _quantize_between(x, *_ends(x), levels, params, margin)


def quantize_searched(x: Tensor, levels: int, params: Params) -> tuple[Tensor, Tensor]:
    """Quantize groups as `quantize_groups` does, each with the clip of `CLIPS` that leaves the least squared error.

    The error is that of the elements within the range of fp16; of equal ones the first clip is taken.
    """
    finite, ends = x.isfinite(), _ends(x)
    codes, stored = _quantize_between(x, *ends, levels, params, 0.0)
    least = torch.full_like(ends[0], math.inf)
    for clip in CLIPS:
        trial, pair = _quantize_between(x, *ends, levels, params, (1.0 - clip) / 2.0)
        off = group_values(trial, pair, levels, params) - x.clamp(-FP16_MAX, FP16_MAX)
        off = torch.where(finite, off, 0.0)
        error = sum_pairs(off * off)
        better = error < least
        codes = torch.where(better[..., None], trial, codes)
        stored = torch.where(better[..., None], pair, stored)
        least = torch.minimum(error, least)
    return codes, stored


def _ends(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and the largest finite element of groups, within the range of fp16; 0 where there is none."""
    finite = x.isfinite()
    bounded = x.clamp(-FP16_MAX, FP16_MAX)
    any_finite = finite.any(-1)
    lo = torch.where(any_finite, bounded.masked_fill(~finite, math.inf).amin(-1), 0.0)
    hi = torch.where(any_finite, bounded.masked_fill(~finite, -math.inf).amax(-1), 0.0)
    return lo, hi


def _quantize_between(
    x: Tensor, lo: Tensor, hi: Tensor, levels: int, params: Params, margin: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Return codes and parameters of groups from ``lo`` to ``hi``, cut at each end by ``margin``."""
    bounded = x.clamp(-FP16_MAX, FP16_MAX)
    if isinstance(margin, Tensor) or margin:
        cut = (hi - lo) * margin
        lo, hi = lo + cut, hi - cut
    if params == "e5m3":
        lo, hi = lo.clamp_max(0.0), hi.clamp_min(0.0)
        stored_scale = round_e5m3((hi - lo) / levels)
        reach = e5m3_value(stored_scale) * (levels * 0.5)
        middle = (lo + hi) * 0.5 / torch.where(reach > 0, reach, 1.0)
        stored_zero = ((middle * MIDDLE_STEPS + 0.5).floor() + MIDDLE).clamp(1, 255).to(torch.uint8)
    elif params == "fp8":
        stored_zero = round_e4m3(lo)
        stored_scale = round_e4m3(((hi - e4m3_value(stored_zero)) / levels).clamp_min(0.0))
    else:
        stored_zero = round_down_fp16(lo)
        stored_scale = round_up_fp16(((hi - stored_zero.float()) / levels).clamp_max(FP16_MAX))
    stored = torch.stack([stored_scale, stored_zero], -1)
    scale, zero = scale_and_zero(stored, levels, params)
    codes = (
        (torch.nan_to_num(bounded, nan=0.0) - zero) / torch.where(scale > 0, scale, 1.0) + 0.5
    ).floor()
    return (codes.clamp(0, levels) * (scale > 0)).int(), stored


def group_values(codes: Tensor, stored: Tensor, levels: int, params: Params) -> Tensor:
    """Dequantize codes ``[..., group_size]`` with stored parameters ``[..., 2]`` to fp32."""
    scale, zero = scale_and_zero(stored, levels, params)
    return codes.float() * scale + zero


def scale_and_zero(stored: Tensor, levels: int, params: Params) -> tuple[Tensor, Tensor]:
    """Return scale and zero point (fp32) ``[..., 1]`` of stored parameters ``[..., 2]``."""
    scale, zero = stored[..., None, :].unbind(-1)
    if params == "e5m3":
        scale = e5m3_value(scale)
        place = (zero.float() - MIDDLE) * (1.0 / MIDDLE_STEPS) - 1.0
        return scale, scale * (levels * 0.5) * place
    if params == "fp8":
        return e4m3_value(scale), e4m3_value(zero)
    return scale.float(), zero.float()


# Pages


def quantize_codes(coded: Tensor, layout: Layout, calibrated: Calibrated) -> tuple[Tensor, Tensor]:
    """Return codes and parameters of pages: see `pages.CodeCoder`."""
    groups = to_groups(coded, layout)
    if layout.search:
        codes, params = quantize_searched(groups, layout.levels, layout.params)
        return from_groups(codes, layout), params
    margin: Tensor | float = (1.0 - layout.clip) / 2.0
    if calibrated.tables is not None:
        margin = calibrated.margin(layout)
    codes, params = quantize_groups(groups, layout.levels, layout.params, margin)
    return from_groups(codes, layout), params


def coded_values(codes: Tensor, params: Tensor, layout: Layout, calibrated: Calibrated) -> Tensor:
    """Dequantize codes: see `pages.CodeCoder`."""
    del calibrated
    groups = group_values(to_groups(codes, layout), params, layout.levels, layout.params)
    return from_groups(groups, layout)


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
    """Check the parameters of pages from a file; every code is valid.

    Raises:
        ValueError: A parameter is not finite.
    """
    del codes
    scale, zero = scale_and_zero(params, layout.levels, layout.params)
    finite = bool(scale.isfinite().all() and zero.isfinite().all())
    check(finite, "scales and zero points must be finite")
