"""Rounding to the formats of parameters, and packing codes into words."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.words import (
    THIRD_FIELDS,
    THIRDS,
    TRITS,
    WORD_BITS,
    plane_words,
    trit_planes,
)

FP16_MAX = 65504.0
E4M3_MAX = 448.0
E5M3_LARGEST = 0xF7  # 61440: larger exponents are those of infinity and NaN
E5M3_MAX = 61440.0
E4M3_LEAST_NORMAL = 2.0**-6
E4M3_STEP = 2.0**-9  # distance between subnormals


def round_down_fp16(x: Tensor) -> Tensor:
    """Round ``x`` (fp32, within the range of fp16) down to fp16."""
    half = x.half()
    bits = half.view(torch.int16)
    below = torch.where(half > 0, bits - 1, bits + 1).view(torch.float16)
    return torch.where(half.float() > x, below, half)


def round_up_fp16(x: Tensor) -> Tensor:
    """Round ``x`` (fp32, not negative) up to fp16."""
    half = x.half()
    above = (half.view(torch.int16) + 1).view(torch.float16)
    return torch.where(half.float() < x, above, half)


def round_e4m3(x: Tensor) -> Tensor:
    """Round ``x`` (fp32, finite) to the nearest e4m3 value, as a byte; saturates, ties go away from zero."""
    magnitude = x.abs().clamp_max(E4M3_MAX)
    subnormal = (magnitude / E4M3_STEP + 0.5).floor().int()
    bits = magnitude.view(torch.int32)
    normal = ((bits + (1 << 19)) >> 20) - (120 << 3)  # exponent bias 127 becomes 7
    byte = torch.where(magnitude < E4M3_LEAST_NORMAL, subnormal, normal)
    return (byte + torch.where(x < 0, 128, 0)).to(torch.uint8)


def e4m3_value(byte: Tensor) -> Tensor:
    """Convert e4m3 bytes to fp32."""
    word = byte.int()
    half = ((word & 0x80) << 8) | ((word & 0x7F) << 7)  # the same fields, read with fp16's bias
    return (
        torch.where(half >= 1 << 15, half - (1 << 16), half)
        .to(torch.int16)
        .view(torch.float16)
        .float()
        * 256
    )


def round_e5m3(x: Tensor) -> Tensor:
    """Round ``x`` (fp32, not negative) to the nearest fp16 value with three bits of mantissa, as a byte; saturates."""
    bits = x.clamp_max(E5M3_MAX).half().view(torch.int16).int()
    return ((bits + (1 << 6)) >> 7).clamp_max(E5M3_LARGEST).to(torch.uint8)


def e5m3_value(byte: Tensor) -> Tensor:
    """Convert e5m3 bytes to fp32."""
    return (byte.int() << 7).to(torch.int16).view(torch.float16).float()


def sum_pairs(x: Tensor) -> Tensor:
    """Sum the last dimension by adding neighbours repeatedly: an order that every device can reproduce."""
    missing = (1 << (x.shape[-1] - 1).bit_length()) - x.shape[-1]
    x = F.pad(x, (0, missing))
    while x.shape[-1] > 1:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        x = a + b
    return x[..., 0]


def split_bytes(words: Tensor, count: int) -> Tensor:
    """Return the low ``count`` bytes of integers ``[...]``, the lowest first, ``[..., count]``."""
    shifts = torch.arange(0, 8 * count, 8, device=words.device, dtype=torch.int32)
    return ((words[..., None] >> shifts) & 0xFF).to(torch.uint8)


def join_bytes(fields: Tensor) -> Tensor:
    """Undo `split_bytes`: return integers, int32."""
    shifts = torch.arange(0, 8 * fields.shape[-1], 8, device=fields.device, dtype=torch.int32)
    return (fields.int() << shifts).sum(-1, dtype=torch.int32)


def as_bytes(stored: Tensor) -> Tensor:
    """View parameters ``[...]``, fp16 or e4m3 bytes, as bytes ``[..., 1 or 2]``, the low one first."""
    if stored.dtype == torch.uint8:
        return stored[..., None]
    return split_bytes(stored.view(torch.int16).int(), 2)


def from_bytes(fields: Tensor) -> Tensor:
    """Undo `as_bytes`."""
    if fields.shape[-1] == 1:
        return fields[..., 0]
    return _to_int16(join_bytes(fields)).view(torch.float16)


def pack(codes: Tensor, layout: Layout) -> Tensor:
    """Pack codes ``[..., N, D / couple]`` into words ``[..., rows, row_words]`` (int16), as `Layout` describes."""
    rows = codes if layout.role == "key" else codes.transpose(-2, -1)
    if layout.packing == "trits":
        return _pack_trits(rows, layout)
    return _pack_thirds(rows, layout) if layout.planes == (THIRDS,) else _pack_planes(rows, layout)


def unpack(units: Tensor, layout: Layout) -> Tensor:
    """Undo `pack`: words ``[..., rows, row_words]`` to codes ``[..., N, D / couple]`` (int32)."""
    if layout.packing == "trits":
        rows = _unpack_trits(units, layout)
    else:
        unpack_rows = _unpack_thirds if layout.planes == (THIRDS,) else _unpack_planes
        rows = unpack_rows(units, layout)
    return rows if layout.role == "key" else rows.transpose(-2, -1)


def _to_int16(words: Tensor) -> Tensor:
    return torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16)


def _pack_planes(rows: Tensor, layout: Layout) -> Tensor:
    planes, shift = [], 0
    for width in layout.planes:
        plane = (rows >> shift) & ((1 << width) - 1)
        room = plane_words(layout.row_places, width) * (WORD_BITS // width)
        plane = F.pad(plane, (0, room - layout.row_length))
        fields = plane.unflatten(-1, (WORD_BITS // width, -1))
        shifts = torch.arange(0, WORD_BITS, width, device=rows.device, dtype=torch.int64)[:, None]
        planes.append((fields << shifts).sum(-2))
        shift += width
    return _to_int16(torch.cat(planes, -1))


def _unpack_planes(units: Tensor, layout: Layout) -> Tensor:
    codes, first, shift = torch.zeros((), dtype=torch.int32, device=units.device), 0, 0
    for width in layout.planes:
        count = plane_words(layout.row_places, width)
        words = units[..., None, first : first + count].int()
        shifts = torch.arange(0, WORD_BITS, width, device=units.device, dtype=torch.int32)[:, None]
        plane = ((words >> shifts) & ((1 << width) - 1)).flatten(-2)[..., : layout.row_length]
        codes = codes + (plane << shift)
        first, shift = first + count, shift + width
    return codes


def _pack_thirds(rows: Tensor, layout: Layout) -> Tensor:
    rows = F.pad(rows, (0, layout.row_places - layout.row_length))
    fields = rows.unflatten(-1, (WORD_BITS, -1))
    whole = fields[..., :-1, :].unflatten(-2, (THIRDS, THIRD_FIELDS))
    shifts = THIRDS * torch.arange(THIRD_FIELDS, device=rows.device, dtype=torch.int64)[:, None]
    third = torch.arange(THIRDS, device=rows.device, dtype=torch.int64)[:, None]
    last = (fields[..., -1:, :] >> third & 1) << WORD_BITS - 1
    return _to_int16(((whole << shifts).sum(-2) + last).flatten(-2))


def _unpack_thirds(units: Tensor, layout: Layout) -> Tensor:
    words = units.int().unflatten(-1, (THIRDS, -1))
    shifts = THIRDS * torch.arange(THIRD_FIELDS, device=units.device, dtype=torch.int32)[:, None]
    third = torch.arange(THIRDS, device=units.device, dtype=torch.int32)[:, None]
    whole = ((words[..., None, :] >> shifts) & 7).flatten(-3, -2)
    last = ((words >> WORD_BITS - 1 & 1) << third).sum(-2, keepdim=True, dtype=torch.int32)
    return torch.cat([whole, last], -2).flatten(-2)[..., : layout.row_length]


def _pack_trits(rows: Tensor, layout: Layout) -> Tensor:
    rows = F.pad(rows, (0, 2 * TRITS * layout.row_words - layout.row_length))
    weights = 3 ** torch.arange(TRITS, device=rows.device, dtype=torch.int64)[:, None]
    planes = []
    for first, width in trit_planes(layout.row_words):
        codes = rows[..., 2 * TRITS * first : 2 * TRITS * (first + width)]
        packed = (codes.unflatten(-1, (TRITS, -1)) * weights).sum(-2)
        low, high = packed.unflatten(-1, (-1, 2)).unbind(-1)
        planes.append((low + (high << 8)).flatten(-2))
    return _to_int16(torch.cat(planes, -1)).unflatten(-1, (layout.rows, layout.row_words))


def _unpack_trits(units: Tensor, layout: Layout) -> Tensor:
    page = units.flatten(-2).int() & 0xFFFF
    weights = 3 ** torch.arange(TRITS, device=units.device, dtype=torch.int32)[:, None]
    planes = []
    for first, width in trit_planes(layout.row_words):
        words = page[..., layout.rows * first : layout.rows * (first + width)]
        words = words.unflatten(-1, (layout.rows, width))
        packed = torch.stack([words & 0xFF, words >> 8], -1).flatten(-2)
        planes.append((packed[..., None, :] // weights % 3).flatten(-2))
    return torch.cat(planes, -1)[..., : layout.row_length]
