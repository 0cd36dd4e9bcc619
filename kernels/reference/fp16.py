"""Rounding to fp16 in a given direction."""

from __future__ import annotations

import torch
from torch import Tensor

FP16_MAX = 65504.0


def round_down_fp16(x: Tensor) -> Tensor:
    """Return the largest fp16 number that is not above ``x`` (fp32, within the range of fp16)."""
    half = x.half()
    bits = half.view(torch.int16)
    below = torch.where(half > 0, bits - 1, bits + 1).view(torch.float16)
    return torch.where(half.float() > x, below, half)


def round_up_fp16(x: Tensor) -> Tensor:
    """Return the smallest fp16 number that is not below ``x`` (fp32, not negative)."""
    half = x.half()
    above = (half.view(torch.int16) + 1).view(torch.float16)
    return torch.where(half.float() < x, above, half)
