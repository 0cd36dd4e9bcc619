"""Pages of tokens that are coded with different numbers of bits (QAQ), in plain torch: the specification.

A token of a head is a group. Its numbers lie about a *zero point*, within a *half-range* to either side; of ``B``
bits a code says in which of ``2 ** B`` equal segments of that span a number lies, and stands for the
middle of it (a mid-rise quantizer). Such codes are embedded: the upper bits of a code are the code of
fewer bits. A page therefore keeps *planes* of one bit, the most significant first. Plane ``j`` has a row of
``D`` bits for each token of more than ``j`` bits; sorted by their bits, descending, these tokens are the
first of the page, so that the *rank* of a token in that order is its row in every plane that it has::

    codes   header | plane 0: n_0 rows | plane 1: n_1 <= n_0 rows | ... | unused rows

The rows of all planes share a fixed number of rows, the *budget*. Which tokens get how many bits is decided
once, when the page is quantized (`allocate`): as many as keep the error of each, weighted with its
importance, below one bound for all, and the bound is the smallest that fits the budget. A sum over
tokens weighted by attention then has the least error; that is the rule of QAQ.

**Where the bits lie.** With ``B`` sequences, ``H`` KV heads, ``P`` pages of ``N`` tokens, ``D`` channels::

    codes   int16   [B, H, P, 1, units]       HEADER units, then rows of D / 16 units
    params  uint8   [B, H, P, fields, N, 1]   one row of bytes for each field of the metadata

Unit ``j`` of the header is ``n_j``; bit ``f`` of unit ``u`` of a row belongs to channel ``16 u + f``. The
fields of a token's record are zero point, half-range (one byte each, e4m3; or the low and the high byte of an fp16
number), rank, and for each outlier its channel and the low and the high byte of its value in fp16.
A token has as many bits as there are planes with ``n_j > rank``.

Records lie in the order of slots and rows are found by rank, for keys as for values, because the bits of the
two differ: were metadata sorted too, one of them had to be permuted for every score on reading.

Everything is fp32 with one rounding an operation, in the order written, so that devices agree bit by bit.

Source: Dong et al., QAQ: Quality Adaptive Quantization for LLM KV Cache, arXiv 2403.04643, section 4.1.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import Calibrated
from kvq_compile.kernels.reference.formats import (
    FP16_MAX,
    e4m3_value,
    round_e4m3,
    round_up_fp16,
)
from kvq_compile.kernels.schemes import FLOOR, HEADER, MAX_BITS, OUTLIER_FIELDS, WORD_BITS
from kvq_compile.kernels.values import check

Level = Literal["head", "layer", "token"]
SHARED: dict[Level, tuple[int, ...]] = {  # dimensions of [L, B, H, P, N] that share span and bits
    "head": (),
    "layer": (-3,),
    "token": (0, -3),
}


# Bits of a token


def allocate(
    span: Tensor, importance: Tensor | None, layout: Layout, bound: float | Tensor = 0.0
) -> Tensor:
    """Return the bits of each token, so that ``span * importance / 2 ** bits`` is at most one bound.

    The bound is the larger of ``bound`` and the smallest with which the page fits its budget; tokens that
    would need more than ``max_bits`` for it get ``max_bits``. Bits are compared as ``span * importance``
    times powers of two, which is exact, in place of logarithms, which are not.

    Args:
        span: Largest minus smallest number of each token, ``[..., N]``, fp32, not negative.
        importance: Weight of each token's error, ``[..., N]``; ``None``: all weigh the same.
        layout: Least and most bits, and the budget.
        bound: Width of a segment times importance that is good enough, ``2 sqrt(3) sigma``: see
            `key_bound` and `value_bound`; one for all pages or one each, ``[...]``, fp32. 0: as much quality
            as the budget buys.

    Returns:
        ``[..., N]``, int32; in sum over a page at most ``layout.code_rows``.

    Source: QAQ, section 4.1, ``B = ceil(log2(range / (2 sqrt(3) sigma)))``.
    """
    need = _needs(span, importance, layout)
    free = layout.code_rows - layout.mixed.min_bits * layout.page_size
    ordered = need.flatten(-2).sort(-1, descending=True).values
    least = ordered[..., free] if free < ordered.shape[-1] else torch.zeros_like(ordered[..., 0])
    least = torch.maximum(least, torch.as_tensor(bound, dtype=torch.float32, device=span.device))
    return (layout.mixed.min_bits + (need > least[..., None, None]).sum(-1)).int()


def needed_bits(span: Tensor, importance: Tensor | None, layout: Layout, bound: float) -> Tensor:
    """Return the bits that meet a bound, of `allocate` with a budget that is never short."""
    return (layout.mixed.min_bits + (_needs(span, importance, layout) > bound).sum(-1)).int()


def _needs(span: Tensor, importance: Tensor | None, layout: Layout) -> Tensor:
    """Return what must exceed the bound for a token to get one bit more, ``[..., N, max_bits - min_bits]``."""
    weighted = span
    if importance is not None:
        importance = torch.nan_to_num(importance.float(), nan=0.0)
        weighted = span * (soften(importance) if layout.mixed.soften else importance)
    steps = layout.mixed.min_bits, layout.mixed.max_bits
    step = torch.arange(*steps, dtype=torch.int64, device=span.device)
    return weighted[..., None] * torch.exp2(-step.float())


def soften(importance: Tensor) -> Tensor:
    """Return weights in which little importance counts no less than that of most tokens of the page.

    What the last queries looked at is one sample of what later ones will look at: a token that they passed
    over may well be the one that is needed. ``sqrt(A + FLOOR * mean(A))`` lets a token that stands out have
    a bit or two more and takes no more than that from any other. A page without importance is uniform.

    Args:
        importance: ``[..., N]``, fp32, not negative.
    """
    mean = sum_pairs(importance) / importance.shape[-1]
    floor = torch.where(mean > 0, mean * FLOOR, 1.0)
    return (importance + floor[..., None]).sqrt()


def importance(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return the largest weight that recent queries paid to each token.

    Args:
        query: The last queries, ``[B, Hq, n, D]``.
        key: Keys as attention sees them, ``[B, Hkv, S, D]``.
        mask: Boolean (True: attend) or additive, broadcasting to ``[B, Hq, n, S]``.
        scale: Factor on the scores.

    Returns:
        ``[B, Hkv, S]``, fp32: the maximum over the queries and over the query heads of a KV head.

    Source: QAQ, section 4.2 (attention window); the maximum over heads extends it to grouped queries.
    """
    query, key = query.float(), key.float()
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * scale
    return importance_of(scores, mask, key.shape[1])


def importance_of(scores: Tensor, mask: Tensor | None, kv_heads: int) -> Tensor:
    """Return `importance`, ``[B, kv_heads, S]``, of scores ``[B, Hq, n, S]``."""
    if mask is not None:
        hides = mask.dtype == torch.bool
        scores = scores.masked_fill(~mask, -math.inf) if hides else scores + mask
    weights = (scores - scores.amax(-1, keepdim=True).clamp_min(-1e38)).exp()
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total == 0, 1.0, total)
    return weights.unflatten(1, (kv_heads, -1)).amax((2, 3))


# Pages


def quantize_pages(
    x: Tensor,
    importance: Tensor | None,
    layout: Layout,
    bound: float | Tensor = 0.0,
    level: Level = "head",
) -> tuple[Tensor, Tensor]:
    """Quantize whole pages.

    Elements that are not finite take no part in zero point and half-range; an infinity is stored as the nearer end
    of its token's span and a NaN as zero would be.

    Args:
        x: Pages of numbers as they are coded, ``[..., N, D]``; at level ``"layer"`` ``[..., H, P, N, D]``, at
            level ``"token"`` ``[L, B, H, P, N, D]``.
        importance: Weight of each token's error, ``[..., N]``.
        layout: Where the bits go.
        bound: See `allocate`.
        level: Who shares span and bits: the channels of a ``"head"``, the heads of a ``"layer"``, or the
            layers and heads of a ``"token"``; fitting and outliers are each head's own.

    Returns:
        Codes ``[..., 1, units]`` (int16) and metadata ``[..., fields, N, 1]`` (uint8).

    Raises:
        ValueError: ``x`` has not the dimensions of its level.
    """
    least = {"head": 2, "layer": 4, "token": 6}[level]
    if x.dim() < least:
        raise ValueError(
            f"x must have {least} dimensions or more at level {level!r}, got {x.dim()}"
        )
    finite = x.isfinite()
    x = torch.nan_to_num(x.float(), nan=0.0).clamp(-FP16_MAX, FP16_MAX)
    channels, kept = find_outliers(x, finite, layout)
    lo = x.masked_fill(~kept, math.inf).amin(-1)
    hi = x.masked_fill(~kept, -math.inf).amax(-1)
    if SHARED[level]:
        dims = SHARED[level]
        lo, hi = (
            lo.amin(dims, keepdim=True).expand_as(lo),
            hi.amax(dims, keepdim=True).expand_as(hi),
        )
        if importance is not None:
            importance = importance.amax(dims, keepdim=True).expand_as(importance)
    lo, hi = (torch.where(edge.isfinite(), edge, 0.0) for edge in (lo, hi))
    bits = allocate(hi - lo, importance, layout, bound)
    stored_zero = store(lo * 0.5 + hi * 0.5, layout)
    zero_point = stored_value(stored_zero)
    half_range = torch.maximum(hi - zero_point, zero_point - lo)
    stored_half_range = store(half_range.clamp_max(FP16_MAX), layout, up=True)
    half_range = stored_value(stored_half_range)[..., None]
    width = torch.where(half_range > 0, 2.0 * half_range, 1.0)
    offset = x - zero_point[..., None]
    codes = ((offset / width + 0.5) * 2.0**MAX_BITS).floor()
    codes = (codes.clamp(0, 2**MAX_BITS - 1) * (half_range > 0)).int()
    if layout.mixed.fit:
        stored_half_range = fit_half_range(offset * kept, codes, bits, stored_half_range, layout)
    exact = x.gather(-1, channels).half()
    pieces = [as_bytes(stored_zero), as_bytes(stored_half_range), rank(bits)[..., None]]
    for i in range(layout.mixed.outliers):
        pieces += [channels[..., i : i + 1], as_bytes(exact[..., i])]
    metadata = torch.cat([piece.to(torch.uint8) for piece in pieces], -1).mT[..., None].contiguous()
    return pack(codes, bits, layout), metadata


def dequantize_pages(codes: Tensor, metadata: Tensor, layout: Layout) -> Tensor:
    """Return the numbers ``[..., N, D]`` (fp32) of `quantize_pages`, tokens at their slots."""
    levels, bits = unpack(codes, metadata, layout)
    size = layout.mixed.param_bytes
    fields = metadata[..., 0].mT  # [..., N, fields]
    zero_point = stored_value(from_bytes(fields[..., :size]))[..., None]
    half_range = stored_value(from_bytes(fields[..., size : 2 * size]))[..., None]
    x = place(levels, bits) * half_range + zero_point
    for i in range(layout.mixed.outliers):
        first = layout.mixed.rank_field + 1 + OUTLIER_FIELDS * i
        value = from_bytes(fields[..., first + 1 : first + OUTLIER_FIELDS]).float()
        x = x.scatter(-1, fields[..., first : first + 1].long(), value[..., None])
    return x


def place(levels: Tensor, bits: Tensor) -> Tensor:
    """Return the middle of the segments that codes name, from -1 to 1 of the half-range; exact in fp32.

    Args:
        levels: 8-bit codes of which all but the upper ``bits`` are zero, ``[..., N, D]``.
        bits: ``[..., N]``.
    """
    return levels.float() * 2.0 ** (1 - MAX_BITS) + (torch.exp2(-bits.float()) - 1.0)[..., None]


def fit_half_range(
    offset: Tensor, codes: Tensor, bits: Tensor, stored_half_range: Tensor, layout: Layout
) -> Tensor:
    """Return the half-range, stored, with which the product of a token and what is read is that with itself.

    Middles of segments lie nearer to the zero point than the numbers they stand for, on average, the more so the
    fewer the bits, so that a key scores too low with the query that it matches. With ``x`` the offsets from
    the zero point and ``p`` their places the new half-range is ``x . x / x . p``, at most twice the old one.

    Args:
        offset: Distance from the zero point, 0 for outliers and numbers that are not finite, ``[..., N, D]``.
        codes: 8-bit codes, ``[..., N, D]``.
        bits: Bits of each token, ``[..., N]``.
        stored_half_range: What tokens of no bits or no extent keep, ``[..., N]``.
        layout: Format of the half-range.

    Source: RaBitQ (Gao and Long, arXiv 2405.12497, section 3.2) corrects the products of its codes so.
    """
    shift = (MAX_BITS - bits)[..., None]
    middle = place((codes >> shift) << shift, bits)
    power, product = sum_pairs(offset * offset), sum_pairs(offset * middle)
    ok = (bits > 0) & (product > 0)
    half_range = torch.where(ok, power / torch.where(ok, product, 1.0), 0.0).clamp_max(FP16_MAX)
    return torch.where(ok, store(half_range, layout), stored_half_range)


def sum_pairs(x: Tensor) -> Tensor:
    """Sum the last dimension by adding neighbours until one number is left: an order that any device can keep."""
    missing = (1 << (x.shape[-1] - 1).bit_length()) - x.shape[-1]
    x = torch.nn.functional.pad(x, (0, missing))
    while x.shape[-1] > 1:
        a, b = x.unflatten(-1, (-1, 2)).unbind(-1)
        x = a + b
    return x[..., 0]


def requantize_down_(codes: Tensor, metadata: Tensor, bits: Tensor, layout: Layout) -> None:
    """Take planes from tokens that have more than ``bits`` ``[..., N]``, in place.

    The rows move up and those left over become zero. Zero point and half-range stay as they are, so that codes are
    what quantizing with fewer bits gives.
    """
    levels, held = unpack(codes, metadata, layout)
    bits = torch.minimum(held, bits.int())
    metadata[..., layout.mixed.rank_field, :, 0] = rank(bits).to(torch.uint8)
    codes.copy_(pack(levels, bits, layout))


def find_outliers(x: Tensor, finite: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return the channels of the outliers, ``[..., outliers]``, and which numbers are neither, ``[..., D]``.

    The largest, the smallest, the second largest and so on, the first channel among equals. Where too few
    numbers are finite others stand in.
    """
    kept, taken, channels = finite.clone(), torch.zeros_like(finite), []
    for i in range(layout.mixed.outliers):
        sign = -1.0 if i % 2 else 1.0
        rest = (x * sign).masked_fill(~kept, -2 * FP16_MAX).masked_fill(taken, -math.inf)
        channel = (rest == rest.amax(-1, keepdim=True)).int().argmax(-1, keepdim=True)
        kept, taken = kept.scatter(-1, channel, False), taken.scatter(-1, channel, True)
        channels.append(channel)
    if not channels:
        return torch.zeros(*x.shape[:-1], 0, dtype=torch.int64, device=x.device), kept
    return torch.cat(channels, -1), kept


# Rows


def rank(bits: Tensor) -> Tensor:
    """Return the place of each token when a page is sorted by ``bits`` ``[..., N]``, descending and stable."""
    return bits.argsort(dim=-1, descending=True, stable=True).argsort(-1)


def first_rows(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the tokens in each plane and the row at which the plane begins, ``[..., MAX_BITS]``."""
    plane = torch.arange(MAX_BITS, device=bits.device, dtype=torch.int64)
    tokens = (bits[..., None] > plane).sum(-2)
    return tokens, tokens.cumsum(-1) - tokens


def pack(levels: Tensor, bits: Tensor, layout: Layout) -> Tensor:
    """Pack 8-bit codes ``[..., N, D]`` of which the upper ``bits`` ``[..., N]`` are kept: ``[..., 1, units]``."""
    tokens, first = first_rows(bits)
    place = torch.arange(WORD_BITS, device=bits.device, dtype=torch.int32)
    rows = levels.new_zeros(*bits.shape[:-1], layout.code_rows + 1, layout.plane_row_words)
    order = rank(bits)
    for plane in range(layout.mixed.max_bits):
        fields = (levels >> (MAX_BITS - 1 - plane)) & 1
        words = (fields.unflatten(-1, (-1, WORD_BITS)) << place).sum(-1, dtype=torch.int32)
        row = torch.where(bits > plane, first[..., plane, None] + order, layout.code_rows)
        rows = rows.scatter(-2, row[..., None].expand_as(words), words)
    words = torch.cat([tokens.int(), rows[..., :-1, :].flatten(-2)], -1)
    return torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16)[..., None, :]


def unpack(codes: Tensor, metadata: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Undo `pack`: return codes ``[..., N, D]`` with zeros for the bits not kept, and bits ``[..., N]``, int32."""
    words = codes[..., 0, :].int() & 0xFFFF
    tokens, rows = (
        words[..., :HEADER],
        words[..., HEADER:].unflatten(-1, (-1, layout.plane_row_words)),
    )
    first = tokens.cumsum(-1) - tokens
    order = metadata[..., layout.mixed.rank_field, :, 0].int()
    bits = held_bits(codes, metadata, layout)
    place = torch.arange(WORD_BITS, device=codes.device, dtype=torch.int32)
    levels = torch.zeros((), dtype=torch.int32, device=codes.device)
    for plane in range(layout.mixed.max_bits):
        has = bits > plane
        row = torch.where(has, first[..., plane, None] + order, 0)[..., None].long()
        held = rows.gather(-2, row.expand(*row.shape[:-1], layout.plane_row_words))
        fields = (((held[..., None] >> place) & 1) * has[..., None, None]).flatten(-2)
        levels = levels + (fields << (MAX_BITS - 1 - plane))
    return levels, bits


def held_bits(codes: Tensor, metadata: Tensor, layout: Layout) -> Tensor:
    """Return the bits of each token of packed pages, ``[..., N]``, int32."""
    tokens = codes[..., 0, :HEADER].int() & 0xFFFF
    order = metadata[..., layout.mixed.rank_field, :, 0].int()
    return (tokens[..., None, :] > order[..., None]).sum(-1).int()


# Stored numbers


def store(x: Tensor, layout: Layout, up: bool = False) -> Tensor:
    """Round fp32 numbers to the layout's format: e4m3 as uint8, or fp16, there not downwards if ``up``."""
    if layout.mixed.params == "fp8":
        return round_e4m3(x)
    return round_up_fp16(x) if up else x.half()


def stored_value(stored: Tensor) -> Tensor:
    """Return the numbers (fp32) that `store` has stored."""
    return e4m3_value(stored) if stored.dtype == torch.uint8 else stored.float()


def stored_span(metadata: Tensor, layout: Layout) -> Tensor:
    """Return twice the half-range of each token of packed pages, ``[..., N]`` (fp32)."""
    size = layout.mixed.param_bytes
    return 2.0 * stored_value(from_bytes(metadata[..., size : 2 * size, :, 0].mT))


def as_bytes(stored: Tensor) -> Tensor:
    """View numbers ``[...]`` of `store` as bytes ``[..., 1 or 2]``, the low one first."""
    if stored.dtype == torch.uint8:
        return stored[..., None]
    word = stored.view(torch.int16).int()
    return torch.stack([word & 0xFF, (word >> 8) & 0xFF], -1).to(torch.uint8)


def from_bytes(fields: Tensor) -> Tensor:
    """Undo `as_bytes`."""
    if fields.shape[-1] == 1:
        return fields[..., 0]
    low, high = fields.int().unbind(-1)
    word = low | (high << 8)
    word = torch.where(word >= 1 << 15, word - (1 << 16), word)
    return word.to(torch.int16).view(torch.float16)


def counted_bits(
    bits: float, outliers: float = 0.0, *, group: int | None = None, per_group: int = 32
) -> float:
    """Return the bits a number as the paper counts them, to compare with what it reports; not what is held.

    Args:
        bits: Bits of a code.
        outliers: Fraction of numbers kept in 16 bits; where they are is not counted.
        group: Numbers that share parameters; ``None`` leaves parameters out.
        per_group: Bits of a group's parameters.

    Source: QAQ's code, ``quantizer.py``: ``bits * (1 - outliers) + 16 * outliers``.
    """
    shared = 0.0 if group is None else per_group / group
    return bits * (1.0 - outliers) + 16.0 * outliers + shared


# Pages


def quantize_coded(
    coded: Tensor,
    layout: Layout,
    calibrated: Calibrated,
    first: int,
    importance: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Quantize and pack pages: see `pages.Coder`."""
    del calibrated
    weights = importance if layout.attentive else None
    bounds = page_bounds(layout, first, coded.shape[-3], coded.device)
    return quantize_pages(coded, weights, layout, bounds)


def packed_values(codes: Tensor, params: Tensor, layout: Layout, calibrated: Calibrated) -> Tensor:
    """Return what packed pages stand for: see `pages.Coder`."""
    del calibrated
    return dequantize_pages(codes, params, layout)


def page_bounds(layout: Layout, first: int, pages: int, device: torch.device) -> Tensor:
    """Return the bounds ``[pages]`` on the weighted error of mixed pages from slot ``first`` on."""
    ends = (first + (page + 1) * layout.page_size for page in range(pages))
    return torch.tensor([layout.bound_at(end) for end in ends], dtype=torch.float32, device=device)


def check_pages(codes: Tensor, params: Tensor, layout: Layout) -> None:
    """Check pages that come from a file: their headers, their metadata and the channels of outliers.

    Raises:
        ValueError: Quantizing could not have written them.
    """
    scheme, N = layout.mixed, layout.page_size
    counts = codes[
        ..., 0, :HEADER
    ].int()  # tokens in each plane; more than 2 ** 15 read as negative
    falls = bool((counts[..., 1:] <= counts[..., :-1]).all() and (counts >= 0).all())
    check(
        falls and bool((counts <= N).all()) and not counts[..., scheme.max_bits :].any(),
        f"the planes of a page must hold fewer and fewer of its {N} tokens",
    )
    check(
        bool((counts.sum(-1) <= layout.code_rows).all()),
        f"the planes of a page must take at most {layout.code_rows} rows",
    )
    ranks = params[..., scheme.rank_field, :, 0].int().sort(-1).values
    order = torch.arange(N, dtype=torch.int32, device=codes.device)
    check(bool((ranks == order).all()), f"the ranks of a page must be the numbers 0 to {N - 1}")
    size = scheme.param_bytes
    for first in (0, size):
        values = stored_value(from_bytes(params[..., first : first + size, :, 0].mT))
        check(bool(values.isfinite().all()), "zero points and half-ranges must be finite")
    first = scheme.rank_field + 1
    channels = params[..., first::OUTLIER_FIELDS, :, 0]
    check(
        bool((channels < layout.head_dim).all()),
        f"the channels of outliers must be below {layout.head_dim}",
    )
