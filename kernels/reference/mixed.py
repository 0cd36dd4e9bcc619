"""Mixed-precision pages, in which every token has its own number of bits (QAQ), in plain torch: the specification.

The elements of one token and head form a group with a *zero point*, the middle of their range, and a *half-range*. A
code of ``B`` bits is the index of one of ``2 ** B`` equal segments of that range and dequantizes to the middle of the
segment (a mid-rise quantizer). Such codes are embedded: the upper bits of a code are the code of fewer bits. A page
therefore stores *bit planes*, the most significant first. Plane ``j`` has a row of ``D`` bits for each token with more
than ``j`` bits. Sorted by bits, descending, these tokens come first in the page, so the *rank* of a token in that
order is its row in every plane that it has::

    codes   header | plane 0: n_0 rows | plane 1: n_1 <= n_0 rows | ... | unused rows

All planes together have a fixed number of rows, the *budget*. The bits of each token are chosen once, when the page is
quantized (`allocate`): enough to keep its error, weighted by its importance score, below one bound for the whole page.
The bound is the smallest that fits the budget. This rule of QAQ minimises the error of a sum over tokens weighted
by attention.

**Storage.** With ``B`` sequences, ``H`` KV heads, ``P`` pages of ``N`` tokens, ``D`` channels::

    codes   int16   [B, H, P, 1, row_words]   HEADER words, then rows of D / 16 words, rounded up
    params  uint8   [B, H, P, fields, N, 1]   metadata: one row of bytes per field

Word ``j`` of the header is ``n_j``; bit ``f`` of word ``w`` of a row belongs to channel ``16 w + f``. The metadata of a
token are its zero point and half-range (one e4m3 byte each, or the low and the high byte in fp16), its rank, and for
each outlier the channel (two bytes, the low one first, where there are more than 256) and the low and the high byte of
the value in fp16. A token has as many bits as there are planes with ``n_j > rank``.

Metadata lie in the order of slots and rows are found by rank, for keys and values alike. If metadata were sorted too,
attention would have to permute scores or weights, since the orders of keys and values differ.

All arithmetic is fp32 with one rounding per operation, in the order written, so that devices agree bit by bit.

Source: Dong et al., QAQ: Quality Adaptive Quantization for LLM KV Cache, arXiv 2403.04643, section 4.1.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.mixed_scheme import FLOOR, HEADER, MAX_BITS
from kvq_compile.kernels.packed import Calibrated
from kvq_compile.kernels.reference.formats import (
    FP16_MAX,
    as_bytes,
    e4m3_value,
    from_bytes,
    join_bytes,
    round_e4m3,
    round_up_fp16,
    split_bytes,
    sum_pairs,
)
from kvq_compile.kernels.values import check
from kvq_compile.kernels.words import WORD_BITS

Level = Literal["head", "layer", "token"]
SHARED: dict[Level, tuple[int, ...]] = {  # dimensions of [L, B, H, P, N] with common range and bits
    "head": (),
    "layer": (-3,),
    "token": (0, -3),
}


# Bits of a token


def allocate(
    span: Tensor, importance: Tensor | None, layout: Layout, bound: float | Tensor = 0.0
) -> Tensor:
    """Return the bits of each token such that ``span * importance / 2 ** bits`` is at most one bound per page.

    The bound is the larger of ``bound`` and the smallest that fits the budget of the page; tokens that need more than
    ``max_bits`` get ``max_bits``. The comparison multiplies by powers of two, which is exact, and takes no logarithms.

    Args:
        span: Largest minus smallest element of each token, ``[..., N]``, fp32, not negative.
        importance: Importance score of each token, ``[..., N]``; ``None``: all are equal.
        layout: Gives least and most bits, and the budget.
        bound: Tolerated width of a segment times importance, ``2 sqrt(3) sigma`` (`key_bound`, `value_bound`); one
            for all pages or one each, ``[...]``, fp32. 0: the budget alone decides.

    Returns:
        ``[..., N]``, int32; their sum over a page is at most ``layout.code_rows``.

    Source: QAQ, section 4.1, ``B = ceil(log2(range / (2 sqrt(3) sigma)))``.
    """
    need = _needs(span, importance, layout)
    free = layout.code_rows - layout.mixed.min_bits * layout.page_size
    ordered = need.flatten(-2).sort(-1, descending=True).values
    least = ordered[..., free] if free < ordered.shape[-1] else torch.zeros_like(ordered[..., 0])
    least = torch.maximum(least, torch.as_tensor(bound, dtype=torch.float32, device=span.device))
    return (layout.mixed.min_bits + (need > least[..., None, None]).sum(-1)).int()


def needed_bits(span: Tensor, importance: Tensor | None, layout: Layout, bound: float) -> Tensor:
    """Return the bits that meet a bound: `allocate` without a budget."""
    return (layout.mixed.min_bits + (_needs(span, importance, layout) > bound).sum(-1)).int()


def _needs(span: Tensor, importance: Tensor | None, layout: Layout) -> Tensor:
    """Return the weighted error at each number of bits from ``min_bits`` on, ``[..., N, max_bits - min_bits]``.

    A token gets one bit more for each that is above the bound.
    """
    weighted = span
    if importance is not None:
        importance = torch.nan_to_num(importance.float(), nan=0.0)
        weighted = span * (soften(importance) if layout.mixed.soften else importance)
    steps = layout.mixed.min_bits, layout.mixed.max_bits
    step = torch.arange(*steps, dtype=torch.int64, device=span.device)
    return weighted[..., None] * torch.exp2(-step.float())


def soften(importance: Tensor) -> Tensor:
    """Return softened importance scores, ``sqrt(A + FLOOR * mean(A))``.

    The last queries are only one sample of the attention of later ones: a token that they ignored may be needed later.
    Softening gives a token that stands out one or two more bits, and takes no more than that from any other. Scores
    that are all zero give equal weights.

    Args:
        importance: ``[..., N]``, fp32, not negative.
    """
    mean = sum_pairs(importance) / importance.shape[-1]
    floor = torch.where(mean > 0, mean * FLOOR, 1.0)
    return (importance + floor[..., None]).sqrt()


def importance(query: Tensor, key: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return importance scores: the largest attention weight of each token over recent queries.

    Args:
        query: The last queries, ``[B, Hq, n, D]``.
        key: Keys as attention sees them, ``[B, Hkv, S, D]``.
        mask: Boolean (True: attend) or additive, broadcasting to ``[B, Hq, n, S]``.
        scale: Factor on the products of queries and keys.

    Returns:
        ``[B, Hkv, S]``, fp32: the maximum over the queries and over the query heads of a KV head.

    Source: QAQ, section 4.2 (attention window); the maximum over heads extends it to grouped queries.
    """
    query, key = query.float(), key.float()
    scores = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).mT * scale
    return importance_of(scores, mask, key.shape[1])


def importance_of(scores: Tensor, mask: Tensor | None, kv_heads: int) -> Tensor:
    """Return `importance`, ``[B, kv_heads, S]``, from attention scores ``[B, Hq, n, S]``."""
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

    Elements that are not finite do not count for zero point and half-range; an infinity is stored as the nearer end of
    its token's range, a NaN like a zero.

    Args:
        x: Elements transformed for quantization, ``[..., N, D]``; at level ``"layer"`` ``[..., H, P, N, D]``, at
            level ``"token"`` ``[L, B, H, P, N, D]``.
        importance: Importance score of each token, ``[..., N]``.
        layout: Layout of the packed pages.
        bound: See `allocate`.
        level: Elements with common range and bits: the channels of a ``"head"``, all heads of a ``"layer"``, or all
            layers and heads of a ``"token"``. Fitting and outliers are always per head.

    Returns:
        Codes ``[..., 1, row_words]`` (int16) and metadata ``[..., fields, N, 1]`` (uint8).

    Raises:
        ValueError: ``x`` has too few dimensions for the level.
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
        pieces += [
            split_bytes(channels[..., i], layout.outlier_fields - 2),
            as_bytes(exact[..., i]),
        ]
    metadata = torch.cat([piece.to(torch.uint8) for piece in pieces], -1).mT[..., None].contiguous()
    return pack(codes, bits, layout), metadata


def dequantize_pages(codes: Tensor, metadata: Tensor, layout: Layout) -> Tensor:
    """Dequantize pages of `quantize_pages` to elements ``[..., N, D]`` (fp32), tokens in the order of slots."""
    levels, bits = unpack(codes, metadata, layout)
    size = layout.mixed.param_bytes
    fields = metadata[..., 0].mT  # [..., N, fields]
    zero_point = stored_value(from_bytes(fields[..., :size]))[..., None]
    half_range = stored_value(from_bytes(fields[..., size : 2 * size]))[..., None]
    x = place(levels, bits) * half_range + zero_point
    for i in range(layout.mixed.outliers):
        first = layout.mixed.rank_field + 1 + layout.outlier_fields * i
        channel, value = fields[..., first : first + layout.outlier_fields].split(
            (layout.outlier_fields - 2, 2), -1
        )
        x = x.scatter(
            -1, join_bytes(channel)[..., None].long(), from_bytes(value).float()[..., None]
        )
    return x


def place(levels: Tensor, bits: Tensor) -> Tensor:
    """Return the middle of the segment of each code in units of the half-range, -1 to 1; exact in fp32.

    Args:
        levels: 8-bit codes whose bits below the upper ``bits`` are zero, ``[..., N, D]``.
        bits: ``[..., N]``.
    """
    return levels.float() * 2.0 ** (1 - MAX_BITS) + (torch.exp2(-bits.float()) - 1.0)[..., None]


def fit_half_range(
    offset: Tensor, codes: Tensor, bits: Tensor, stored_half_range: Tensor, layout: Layout
) -> Tensor:
    """Return the stored half-range with which the product of a token and its dequantized form is ``x . x``.

    On average the middle of a segment lies nearer to the zero point than its elements do, and more so with fewer bits.
    A key would thus score too low with the query that it matches. With offsets ``x`` from the zero point, and ``p``
    their dequantized form in units of the half-range, the new half-range is ``x . x / x . p``: at most twice the old.

    Args:
        offset: Elements minus zero point, 0 for outliers and elements that are not finite, ``[..., N, D]``.
        codes: 8-bit codes, ``[..., N, D]``.
        bits: Bits of each token, ``[..., N]``.
        stored_half_range: Kept for tokens without bits or without range, ``[..., N]``.
        layout: Gives the format of the half-range.

    Source: RaBitQ (Gao and Long, arXiv 2405.12497, section 3.2) corrects the products of its codes in this way.
    """
    shift = (MAX_BITS - bits)[..., None]
    middle = place((codes >> shift) << shift, bits)
    power, product = sum_pairs(offset * offset), sum_pairs(offset * middle)
    ok = (bits > 0) & (product > 0)
    half_range = torch.where(ok, power / torch.where(ok, product, 1.0), 0.0).clamp_max(FP16_MAX)
    return torch.where(ok, store(half_range, layout), stored_half_range)


def requantize_down_(codes: Tensor, metadata: Tensor, bits: Tensor, layout: Layout) -> None:
    """Drop the lower bit planes of tokens with more than ``bits`` ``[..., N]``, in place.

    Rows move up, and freed rows become zero. Zero point and half-range stay, so that the codes are those of a quantizer
    with fewer bits.
    """
    levels, held = unpack(codes, metadata, layout)
    bits = torch.minimum(held, bits.int())
    metadata[..., layout.mixed.rank_field, :, 0] = rank(bits).to(torch.uint8)
    codes.copy_(pack(levels, bits, layout))


def find_outliers(x: Tensor, finite: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Return the channels of outliers, ``[..., outliers]``, and a mask of finite elements that are none, ``[..., D]``.

    Outliers are the largest element, the smallest, the second largest and so on; ties go to the first channel. If too
    few elements are finite, others fill the list.
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
    """Return the rank of each token of a page sorted by ``bits`` ``[..., N]``, descending and stable."""
    return bits.argsort(dim=-1, descending=True, stable=True).argsort(-1)


def first_rows(bits: Tensor) -> tuple[Tensor, Tensor]:
    """Return the count of tokens and the first row of each bit plane, ``[..., MAX_BITS]``."""
    plane = torch.arange(MAX_BITS, device=bits.device, dtype=torch.int64)
    tokens = (bits[..., None] > plane).sum(-2)
    return tokens, tokens.cumsum(-1) - tokens


def pack(levels: Tensor, bits: Tensor, layout: Layout) -> Tensor:
    """Pack the upper ``bits`` ``[..., N]`` of 8-bit codes ``[..., N, D]`` into words ``[..., 1, row_words]``."""
    tokens, first = first_rows(bits)
    place = torch.arange(WORD_BITS, device=bits.device, dtype=torch.int32)
    rows = levels.new_zeros(*bits.shape[:-1], layout.code_rows + 1, layout.plane_row_words)
    order = rank(bits)
    levels = F.pad(levels, (0, WORD_BITS * layout.plane_row_words - layout.head_dim))
    for plane in range(layout.mixed.max_bits):
        fields = (levels >> (MAX_BITS - 1 - plane)) & 1
        words = (fields.unflatten(-1, (-1, WORD_BITS)) << place).sum(-1, dtype=torch.int32)
        row = torch.where(bits > plane, first[..., plane, None] + order, layout.code_rows)
        rows = rows.scatter(-2, row[..., None].expand_as(words), words)
    words = torch.cat([tokens.int(), rows[..., :-1, :].flatten(-2)], -1)
    return torch.where(words >= 1 << 15, words - (1 << 16), words).to(torch.int16)[..., None, :]


def unpack(codes: Tensor, metadata: Tensor, layout: Layout) -> tuple[Tensor, Tensor]:
    """Undo `pack`: return codes ``[..., N, D]`` zero below the bits kept, and bits ``[..., N]``, int32."""
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
    return levels[..., : layout.head_dim], bits


def held_bits(codes: Tensor, metadata: Tensor, layout: Layout) -> Tensor:
    """Return the bits of each token of packed pages, ``[..., N]``, int32."""
    tokens = codes[..., 0, :HEADER].int() & 0xFFFF
    order = metadata[..., layout.mixed.rank_field, :, 0].int()
    return (tokens[..., None, :] > order[..., None]).sum(-1).int()


# Stored parameters


def store(x: Tensor, layout: Layout, up: bool = False) -> Tensor:
    """Round fp32 to the layout's format: e4m3 as uint8, or fp16, which is rounded up if ``up``."""
    if layout.mixed.params == "fp8":
        return round_e4m3(x)
    return round_up_fp16(x) if up else x.half()


def stored_value(stored: Tensor) -> Tensor:
    """Convert what `store` returned to fp32."""
    return e4m3_value(stored) if stored.dtype == torch.uint8 else stored.float()


def stored_span(metadata: Tensor, layout: Layout) -> Tensor:
    """Return the range of each token of packed pages, twice its half-range, ``[..., N]`` (fp32)."""
    size = layout.mixed.param_bytes
    return 2.0 * stored_value(from_bytes(metadata[..., size : 2 * size, :, 0].mT))


def counted_bits(
    bits: float, outliers: float = 0.0, *, group: int | None = None, per_group: int = 32
) -> float:
    """Return the bits per element as the paper counts them, for comparison with its figures; memory needs more.

    Args:
        bits: Bits of a code.
        outliers: Fraction of elements kept in 16 bits; their indices are not counted.
        group: Elements that share parameters; ``None`` leaves parameters out.
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
    """Unpack and dequantize pages: see `pages.Coder`."""
    del calibrated
    return dequantize_pages(codes, params, layout)


def page_bounds(layout: Layout, first: int, pages: int, device: torch.device) -> Tensor:
    """Return the bounds ``[pages]`` on the weighted error of mixed pages from slot ``first`` on."""
    ends = (first + (page + 1) * layout.page_size for page in range(pages))
    return torch.tensor([layout.bound_at(end) for end in ends], dtype=torch.float32, device=device)


def check_pages(codes: Tensor, params: Tensor, layout: Layout) -> None:
    """Check headers, metadata and outlier channels of pages from a file.

    Raises:
        ValueError: Quantization could not have written them.
    """
    scheme, N = layout.mixed, layout.page_size
    counts = codes[
        ..., 0, :HEADER
    ].int()  # tokens in each plane; more than 2 ** 15 read as negative
    falls = bool((counts[..., 1:] <= counts[..., :-1]).all() and (counts >= 0).all())
    check(
        falls and bool((counts <= N).all()) and not counts[..., scheme.max_bits :].any(),
        f"the planes of a page must have descending counts of its {N} tokens",
    )
    check(
        bool((counts.sum(-1) <= layout.code_rows).all()),
        f"the planes of a page must take at most {layout.code_rows} rows",
    )
    ranks = params[..., scheme.rank_field, :, 0].int().sort(-1).values
    order = torch.arange(N, dtype=torch.int32, device=codes.device)
    check(
        bool((ranks == order).all()), f"the ranks of a page must be a permutation of 0 to {N - 1}"
    )
    size = scheme.param_bytes
    for first in (0, size):
        values = stored_value(from_bytes(params[..., first : first + size, :, 0].mT))
        check(bool(values.isfinite().all()), "zero points and half-ranges must be finite")
    size = layout.outlier_fields
    for first in range(scheme.rank_field + 1, params.shape[-3], size):
        channels = join_bytes(params[..., first : first + size - 2, :, 0].mT)
        check(
            bool((channels < layout.head_dim).all()),
            f"the channels of outliers must be below {layout.head_dim}",
        )
