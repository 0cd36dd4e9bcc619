"""What packed tokens are coded relative to, in plain torch: rotation, channel tables, codebook, fp8 numbers.

Part of the specification (`reference`): kernels are held to these functions bit by bit, which is why an
angle is an integer (`Tables`), sine and cosine are the polynomials below, and every sum has its order.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import Calibrated
from kvq_compile.kernels.transform import hadamard as hadamard
from kvq_compile.kernels.transform import rotate as rotate

FP16_MAX = 65504.0
E4M3_MAX = 448.0
E4M3_LEAST_NORMAL = 2.0**-6
E4M3_STEP = 2.0**-9  # between subnormal numbers
QUARTER = 1 << 30  # of a turn
RADIANS = 2.0 * math.pi / 2.0**32
# Taylor's coefficients: on an eighth of a turn the next terms are below half a unit of fp32.
SINE = (2.7557314e-6, -1.9841270e-4, 8.3333333e-3, -1.6666667e-1)
COSINE = (2.4801587e-5, -1.3888889e-3, 4.1666667e-2, -0.5)
CENTROID_NUMBERS = 1 << 22  # distances held at once


def turns(calibrated: Calibrated, layout: Layout, first: int, pages: int) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the tokens of ``pages`` pages from slot ``first`` on.

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
    """Return cosine and sine (fp32) of angles in units of 2 ** -32 turns (int64, any size)."""
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


def to_coded(x: Tensor, layout: Layout, frame: Calibrated, first: int) -> Tensor:
    """Return pages ``[B, H, P, N, D]`` (fp32) of tokens from slot ``first`` on, as they are coded."""
    if frame.tables is None:
        return rotate(x, layout)
    x = _gather(x, frame.section("order", layout))
    if layout.rotary:
        cosine, sine = turns(frame, layout, first, x.shape[-3])
        a, b = x.chunk(2, -1)
        x = torch.cat([a * cosine + b * sine, b * cosine - a * sine], -1)
    y = (x - _spread(frame.section("mean", layout))) * _spread(frame.section("inverse", layout))
    return rotate(y, layout)


def from_coded(y: Tensor, layout: Layout, frame: Calibrated, first: int) -> Tensor:
    """Undo `to_coded`."""
    y = rotate(y, layout)
    if frame.tables is None:
        return y
    x = y * _spread(frame.section("scale", layout)) + _spread(frame.section("mean", layout))
    if layout.rotary:
        cosine, sine = turns(frame, layout, first, x.shape[-3])
        a, b = x.chunk(2, -1)
        x = torch.cat([a * cosine - b * sine, b * cosine + a * sine], -1)
    return _gather(x, frame.section("order", layout).argsort(-1))


def _gather(x: Tensor, order: Tensor) -> Tensor:
    """Pick channels ``order`` ``[H, D]`` of ``x`` ``[B, H, P, N, D]``."""
    return x.gather(-1, _spread(order.long()).expand(x.shape))


def _spread(table: Tensor) -> Tensor:
    """View ``[H, D]`` so that it broadcasts to ``[B, H, P, N, D]``."""
    return table[None, :, None, None, :]


def nearest_centroid(y: Tensor, codebook: Tensor) -> Tensor:
    """Return the index of the centroid nearest to each group of channels, the first among equals.

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
    for piece in rows.split(max(1, CENTROID_NUMBERS // (rows.shape[0] * groups * entries)), 1):
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


def round_e4m3(x: Tensor) -> Tensor:
    """Return the byte of the e4m3 number nearest to ``x`` (fp32, finite); saturates, halves go outwards."""
    magnitude = x.abs().clamp_max(E4M3_MAX)
    subnormal = (magnitude / E4M3_STEP + 0.5).floor().int()
    bits = magnitude.view(torch.int32)
    normal = ((bits + (1 << 19)) >> 20) - (120 << 3)  # exponent bias 127 becomes 7
    byte = torch.where(magnitude < E4M3_LEAST_NORMAL, subnormal, normal)
    return (byte + torch.where(x < 0, 128, 0)).to(torch.uint8)


def e4m3_value(byte: Tensor) -> Tensor:
    """Return the numbers (fp32) that e4m3 bytes stand for."""
    word = byte.int()
    half = ((word & 0x80) << 8) | ((word & 0x7F) << 7)  # the same fields, read with fp16's bias
    return (
        torch.where(half >= 1 << 15, half - (1 << 16), half)
        .to(torch.int16)
        .view(torch.float16)
        .float()
        * 256
    )
