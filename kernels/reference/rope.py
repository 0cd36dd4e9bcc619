"""Rotary embedding of keys. Angles are integers: exact at any position and equal on every device.

Backends must match these functions bit by bit, hence the polynomials for sine and cosine.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import Calibrated

QUARTER = 1 << 30  # of a full rotation
RADIANS = 2.0 * math.pi / 2.0**32
# Taylor coefficients: up to an eighth of a full rotation the next terms are below half an fp32 ulp.
SINE = (2.7557314e-6, -1.9841270e-4, 8.3333333e-3, -1.6666667e-1)
COSINE = (2.4801587e-5, -1.3888889e-3, 4.1666667e-2, -0.5)


def cos_sin_table(
    calibrated: Calibrated, layout: Layout, first: int, pages: int
) -> tuple[Tensor, Tensor]:
    """Return the cos/sin table of the tokens of ``pages`` pages from slot ``first`` on.

    Returns:
        Two tensors ``[B, H, pages, N, D / 2]`` (fp32).
    """
    assert calibrated.tables is not None and calibrated.shift is not None
    last = first + pages * layout.page_size
    slots = torch.arange(first, last, dtype=torch.int64, device=calibrated.tables.device)
    position = slots.view(1, 1, pages, layout.page_size, 1) + calibrated.shift.view(-1, 1, 1, 1, 1)
    frequency = calibrated.section("frequency", layout)[None, :, None, None, :]
    return cosine_and_sine(position * frequency.long())


def cosine_and_sine(phase: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosine and sine (fp32) of angles (int64, any size) in units of 2 ** -32 of a full rotation."""
    quarters = (phase + QUARTER // 2) >> 30
    t = (phase - (quarters << 30)).float() * RADIANS
    square = t * t
    s, c = torch.full_like(t, SINE[0]), torch.full_like(t, COSINE[0])
    for a, b in zip(SINE[1:], COSINE[1:], strict=True):
        s, c = s * square + a, c * square + b
    s, c = s * square * t + t, c * square + 1.0
    odd, half = (quarters & 1).bool(), (quarters & 2).bool()
    sine, cosine = torch.where(odd, c, s), torch.where(odd, s, c)
    return torch.where(half ^ odd, -cosine, cosine), torch.where(half, -sine, sine)


def rotate_pairs(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Rotate the pairs at ``c`` and ``c + D / 2`` of ``x`` ``[..., D]`` by angles ``[..., D / 2]``."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1)


def inverse_rotate_pairs(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Invert `rotate_pairs`, up to rounding."""
    a, b = x.chunk(2, -1)
    return torch.cat([a * cosine + b * sine, b * cosine - a * sine], -1)
