"""The specification: quantize, pack, append, read and attend in plain torch.

Every kernel is held to this file, packed bits exactly and attention at the low-precision error of the
same computation. Nothing here is fast, and no kernel imports it.

**The quantizer.** A group with smallest and largest finite element ``lo`` and ``hi`` (shrunk about their
midpoint by ``clip``) stores

    zero  = lo rounded down to fp16
    scale = (hi - zero) / levels rounded up to fp16, at most the largest fp16 number
    code  = floor((x - zero) / scale + 1/2), clamped to 0 .. levels

so that ``code * scale + zero`` covers ``[lo, hi]`` whatever fp16 did to the parameters, and is off by at
most half a step inside it. A constant group that fp16 can represent has scale 0 and is exact. The
parameters are rounded first and the codes computed with the rounded ones. In fp8 (e4m3) both are rounded to
the nearest number, since a step of that format is too wide to round away from the group. All arithmetic is
fp32 with one rounding an operation, in this order, which is what makes codes equal bit by bit across devices.
A codebook stores the index of the nearest centroid. `frame` has what calibration puts before either.

**Elements that are not finite** take no part in ``lo`` and ``hi``, so they never widen another element's
step; an infinity is stored as the nearer end of its group's range and a NaN as the code nearest to zero.
The call that wrote such a token attends to it exactly, so its damage shows there.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from kvq_compile.kernels.layout import Layout, exact_row_index
from kvq_compile.kernels.packed import UNCALIBRATED, Calibrated
from kvq_compile.kernels.reference import mixed
from kvq_compile.kernels.reference.fp16 import (
    FP16_MAX,
)
from kvq_compile.kernels.reference.fp16 import (
    round_down_fp16 as round_down_fp16,
)
from kvq_compile.kernels.reference.fp16 import (
    round_up_fp16 as round_up_fp16,
)
from kvq_compile.kernels.reference.frame import (
    centroids,
    e4m3_value,
    from_coded,
    nearest_centroid,
    round_e4m3,
    to_coded,
)
from kvq_compile.kernels.reference.frame import (
    hadamard as hadamard,
)
from kvq_compile.kernels.reference.frame import (
    rotate as rotate,
)
from kvq_compile.kernels.reference.queries import remember_
from kvq_compile.kernels.schemes import TRITS, UNIT_BITS


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


def quantize_pages(
    x: Tensor, layout: Layout, frame: Calibrated = UNCALIBRATED, first: int = 0
) -> tuple[Tensor, Tensor]:
    """Quantize whole pages.

    Args:
        x: Pages of tokens, ``[..., N, D]``, any float dtype; ``[B, H, P, N, D]`` where there is a frame.
        layout: Where the groups lie and how wide a code is.
        frame: What the tokens are coded relative to, where the layout has tables.
        first: Slot of the first token.

    Returns:
        Codes ``[..., N, D / couple]`` (int32) and parameters ``[..., groups, members, 2]`` (fp16, or uint8).
    """
    x = to_coded(x.float(), layout, frame, first)
    if layout.coder == "codebook":
        assert frame.tables is not None
        no_params = x.new_zeros(*x.shape[:-2], *layout.params_shape, 2, dtype=torch.float16)
        return nearest_centroid(x, frame.codebook(layout)), no_params
    x = to_groups(x, layout)
    finite = x.isfinite()
    bounded = x.clamp(-FP16_MAX, FP16_MAX)
    any_finite = finite.any(-1)
    lo = torch.where(any_finite, bounded.masked_fill(~finite, math.inf).amin(-1), 0.0)
    hi = torch.where(any_finite, bounded.masked_fill(~finite, -math.inf).amax(-1), 0.0)
    if frame.tables is not None:
        margin = (hi - lo) * frame.margin(layout)
        lo, hi = lo + margin, hi - margin
    elif layout.clip < 1.0:
        margin = (hi - lo) * ((1.0 - layout.clip) / 2.0)
        lo, hi = lo + margin, hi - margin
    if layout.params == "fp8":
        stored_zero = round_e4m3(lo)
        stored_scale = round_e4m3(((hi - e4m3_value(stored_zero)) / layout.levels).clamp_min(0.0))
        zero, scale = e4m3_value(stored_zero), e4m3_value(stored_scale)
    else:
        stored_zero = round_down_fp16(lo)
        stored_scale = round_up_fp16(
            ((hi - stored_zero.float()) / layout.levels).clamp_max(FP16_MAX)
        )
        zero, scale = stored_zero.float(), stored_scale.float()
    step = torch.where(scale > 0, scale, 1.0)[..., None]
    codes = ((torch.nan_to_num(bounded, nan=0.0) - zero[..., None]) / step + 0.5).floor()
    codes = codes.clamp(0, layout.levels) * (scale > 0)[..., None]
    return from_groups(codes.int(), layout), torch.stack([stored_scale, stored_zero], -1)


def dequantize_pages(
    codes: Tensor, params: Tensor, layout: Layout, frame: Calibrated = UNCALIBRATED, first: int = 0
) -> Tensor:
    """Return the pages ``[..., N, D]`` (fp32) that codes and parameters of `quantize_pages` stand for."""
    return from_coded(coded_values(codes, params, layout, frame), layout, frame, first)


def coded_values(
    codes: Tensor, params: Tensor, layout: Layout, frame: Calibrated = UNCALIBRATED
) -> Tensor:
    """Return the numbers ``[..., N, D]`` (fp32) that codes stand for, in the basis in which they were coded."""
    if layout.coder == "codebook":
        assert frame.tables is not None
        return centroids(codes, frame.codebook(layout))
    scale, zero = param_values(params, layout).unbind(-1)
    grouped = to_groups(codes, layout).float() * scale[..., None] + zero[..., None]
    return from_groups(grouped, layout)


def param_values(params: Tensor, layout: Layout) -> Tensor:
    """Return stored parameters as fp32."""
    return e4m3_value(params) if layout.params == "fp8" else params.float()


def pack(codes: Tensor, layout: Layout) -> Tensor:
    """Pack codes ``[..., N, D / couple]`` into units ``[..., rows, units]`` (int16), as `Layout` says."""
    rows = codes if layout.role == "key" else codes.transpose(-2, -1)
    if layout.packing == "trits":
        return _pack_trits(rows, layout)
    planes, shift = [], 0
    for width in layout.planes:
        plane = (rows >> shift) & ((1 << width) - 1)
        fields = plane.unflatten(-1, (UNIT_BITS // width, -1))
        shifts = torch.arange(0, UNIT_BITS, width, device=codes.device, dtype=torch.int64)[:, None]
        planes.append((fields << shifts).sum(-2))
        shift += width
    return _to_int16(torch.cat(planes, -1))


def unpack(units: Tensor, layout: Layout) -> Tensor:
    """Undo `pack`: units ``[..., rows, units]`` to codes ``[..., N, D / couple]`` (int32)."""
    if layout.packing == "trits":
        codes = _unpack_trits(units, layout)
        return codes if layout.role == "key" else codes.transpose(-2, -1)
    codes, first, shift = torch.zeros((), dtype=torch.int32, device=units.device), 0, 0
    for width in layout.planes:
        count = layout.row_length * width // UNIT_BITS
        words = units[..., None, first : first + count].int()
        shifts = torch.arange(0, UNIT_BITS, width, device=units.device, dtype=torch.int32)[:, None]
        codes = codes + ((((words >> shifts) & ((1 << width) - 1)) << shift).flatten(-2))
        first, shift = first + count, shift + width
    return codes if layout.role == "key" else codes.transpose(-2, -1)


def _to_int16(words: Tensor) -> Tensor:
    return torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16)


def _pack_trits(rows: Tensor, layout: Layout) -> Tensor:
    padding = (0, TRITS * layout.row_bytes - layout.row_length)
    digits = F.pad(rows, padding).unflatten(-1, (TRITS, -1))
    weights = 3 ** torch.arange(TRITS, device=rows.device, dtype=torch.int64)[:, None]
    packed = F.pad((digits * weights).sum(-2), (0, 2 * layout.units - layout.row_bytes))
    low, high = packed.unflatten(-1, (-1, 2)).unbind(-1)
    return _to_int16(low + (high << 8))


def _unpack_trits(units: Tensor, layout: Layout) -> Tensor:
    words = units.int() & 0xFFFF
    packed = torch.stack([words & 0xFF, words >> 8], -1).flatten(-2)[..., None, : layout.row_bytes]
    weights = 3 ** torch.arange(TRITS, device=units.device, dtype=torch.int32)[:, None]
    return (packed // weights % 3).flatten(-2)[..., : layout.row_length]


def quantize_packed(
    x: Tensor,
    layout: Layout,
    frame: Calibrated = UNCALIBRATED,
    first: int = 0,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Quantize whole pages ``[B, H, P, N, D]`` and pack them: the parts ``codes`` and ``params``.

    ``importance``, ``[B, H, P, N]``, tells mixed layouts where bits matter.
    """
    if layout.coder == "mixed":
        coded = to_coded(x.float(), layout, frame, first)
        return mixed.quantize_pages(
            coded,
            importance if layout.attentive else None,
            layout,
            page_bounds(layout, first, x.shape[-3], x.device),
        )
    codes, params = quantize_pages(x, layout, frame, first)
    return pack(codes, layout), params


def page_bounds(layout: Layout, first: int, pages: int, device: torch.device) -> Tensor:
    """Return the bounds ``[pages]`` on the weighted error of mixed pages from slot ``first`` on."""
    ends = (first + (page + 1) * layout.page_size for page in range(pages))
    return torch.tensor([layout.bound_at(end) for end in ends], dtype=torch.float32, device=device)


def unpacked_values(
    codes: Tensor, params: Tensor, layout: Layout, frame: Calibrated = UNCALIBRATED
) -> Tensor:
    """Return packed pages as numbers ``[..., N, D]`` (fp32) in the basis in which they were coded."""
    if layout.coder == "mixed":
        return mixed.dequantize_pages(codes, params, layout)
    return coded_values(unpack(codes, layout), params, layout, frame)


def dequantize_packed(
    codes: Tensor, params: Tensor, layout: Layout, frame: Calibrated = UNCALIBRATED, page: int = 0
) -> Tensor:
    """Return packed pages ``[B, H, P, ...]``, from number ``page`` on, as tokens ``[B, H, P * N, D]`` (fp32)."""
    first = layout.sinks + page * layout.page_size
    coded = unpacked_values(codes, params, layout, frame)
    return from_coded(coded, layout, frame, first).flatten(-3, -2)


def read(
    codes: Tensor,
    params: Tensor,
    exact: Tensor,
    cursor: Tensor,
    length: int,
    layout: Layout,
    frame: Calibrated = UNCALIBRATED,
) -> Tensor:
    """Return slots ``0 .. length - 1`` as ``[B, H, length, D]`` in the dtype of ``exact``.

    Slots that hold no token are zero.
    """
    size, length = length, min(length, int(cursor[0]))
    pages = int(cursor[1])
    first_recent = layout.sinks + pages * layout.page_size
    sinks = exact[:, :, : min(length, layout.sinks)]
    packed = dequantize_packed(codes[:, :, :pages], params[:, :, :pages], layout, frame)
    packed = packed[:, :, : max(0, length - layout.sinks)].to(exact.dtype)
    recent = exact[
        :, :, exact_row_index(first_recent, max(first_recent, length), layout, exact.device)
    ]
    empty = exact.new_zeros(*exact.shape[:2], size - length, exact.shape[3])
    return torch.cat([sinks, packed, recent, empty], 2)


def truncate_(
    codes: Tensor,
    params: Tensor,
    exact: Tensor,
    cursor: Tensor,
    length: int,
    layout: Layout,
    frame: Calibrated = UNCALIBRATED,
) -> None:
    """Forget the tokens from ``length`` on, in place.

    A page that is cut open goes back to the ring as the values it was read as; it is quantized anew when
    it fills again. Forgetting no more than ``window`` tokens never cuts a page.
    """
    pages = min(int(cursor[1]), max(0, length - layout.sinks) // layout.page_size)
    first = layout.sinks + pages * layout.page_size
    if pages < int(cursor[1]) and first < length:
        cut = slice(pages, pages + 1)
        page = dequantize_packed(codes[:, :, cut], params[:, :, cut], layout, frame, pages)
        rows = exact_row_index(first, length, layout, exact.device)
        exact[:, :, rows] = page[:, :, : length - first].to(exact.dtype)
    remember_(exact, None, int(cursor[0]), length, 0, layout)
    cursor[0], cursor[1] = length, pages


def append_(
    codes: Tensor,
    params: Tensor,
    exact: Tensor,
    cursor: Tensor,
    x: Tensor,
    start: int,
    layout: Layout,
    frame: Calibrated = UNCALIBRATED,
    importance: Tensor | None = None,
    query: Tensor | None = None,
) -> None:
    """Write new tokens at ``start`` and quantize the pages that they complete, in place.

    Args:
        codes, params, exact, cursor: The cache, as `Layout` describes it.
        x: New tokens, ``[B, H, T, D]``.
        start: Slot of the first new token; tokens held from there on are forgotten first.
        layout: The cache's layout.
        frame: What packed tokens are coded relative to, where the layout has tables.
        importance: Weight of each token's error by slot, ``[B, H, >= start + T]``, which mixed layouts
            distribute bits by; ``None``: all weigh the same.
        query: Queries of the last of the new tokens, for layouts that hold them: see `queries`.

    Raises:
        ValueError: ``start`` would leave a gap, or the new tokens do not fit.
    """
    held, tokens = int(cursor[0]), x.shape[2]
    if not 0 <= start <= held:
        raise ValueError(f"position must start at or before the {held} tokens held, got {start}")
    old, new = int(cursor[1]), layout.pages_at(start + tokens)
    if new > codes.shape[2]:
        raise ValueError(f"the cache must have room for {new} pages, got {codes.shape[2]}")
    if start < held:
        truncate_(codes, params, exact, cursor, start, layout, frame)
        old = int(cursor[1])
    new = max(old, new)
    first, last = layout.sinks + old * layout.page_size, layout.sinks + new * layout.page_size
    if new > old:
        pages = leaving_pages(exact, x, start, old, new, layout)
        if importance is not None:
            importance = importance[:, :, first:last].unflatten(2, (-1, layout.page_size))
        packed = quantize_packed(pages, layout, frame, first, importance)
        codes[:, :, old:new], params[:, :, old:new] = packed
    sinks = max(0, min(layout.sinks - start, tokens))
    exact[:, :, start : start + sinks] = x[:, :, :sinks].to(exact.dtype)
    kept = max(sinks, min(tokens, last - start))
    exact[:, :, exact_row_index(start + kept, start + tokens, layout, x.device)] = x[
        :, :, kept:
    ].to(exact.dtype)
    remember_(exact, query, start, start, tokens, layout)
    cursor[0], cursor[1] = start + tokens, new


def leaving_pages(
    exact: Tensor, x: Tensor, start: int, old: int, new: int, layout: Layout
) -> Tensor:
    """Return the tokens ``[B, H, new - old, N, D]`` of pages that new tokens ``x`` at ``start`` complete."""
    first, last = layout.sinks + old * layout.page_size, layout.sinks + new * layout.page_size
    rows = exact_row_index(first, max(first, min(start, last)), layout, x.device)
    leaving = torch.cat(
        [exact[:, :, rows], x[:, :, max(0, first - start) : max(0, last - start)]], 2
    )
    return leaving.unflatten(2, (-1, layout.page_size))


def softmax_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Attend in the dtype of the arguments: ``[B, Hq, T, D]`` against ``[B, Hkv, S, D]``.

    Query head ``h`` reads KV head ``h // (Hq / Hkv)``. ``mask`` is boolean (True: attend) or additive,
    and broadcasts to ``[B, Hq, T, S]``. A query that may attend to nothing gives zeros.
    """
    shared = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(shared, 1), value.repeat_interleave(shared, 1)
    scores = query @ key.transpose(-2, -1) * scale
    if mask is not None:
        bias = (
            torch.zeros_like(scores).masked_fill(~mask, -math.inf)
            if mask.dtype == torch.bool
            else mask
        )
        scores = scores + bias
    least = max(-1e38, torch.finfo(scores.dtype).min)
    weights = (scores - scores.amax(-1, keepdim=True).clamp_min(least)).exp()
    total = weights.sum(-1, keepdim=True)
    return (weights @ value) / torch.where(total == 0, 1, total)
