"""Transform coding of keys: each channel of a head has its own number of bits.

Keys have a few channels that carry most of the energy and most of what queries look at. A channel of weight ``w`` and
variance ``s`` coded in ``b`` bits changes scores by about ``w s g[b]`` (squared), ``g`` being what a good quantizer of
``b`` bits leaves of a variance of 1. Widths are those that make the sum over the channels of a head least for their
total: bit after bit goes where it takes most away, `allocate`.

**Widths are found once**, when the first page of a cache fills, and hold for all of its pages. They are a row of
``exact``, behind those of tokens and queries, of small integers, which every dtype has; zeros: not found yet. Weights
are mean squares of the last queries known then (`queries`), of both channels that the rotary embedding mixes; all are
equal where no query is known. Variances are those of the first and of the last page that the call fills.

**Calibrated weights** ``w`` are in tables: a channel is coded in units of its ``scale``, in proportion to
``1 / sqrt(w)``, so that all weigh alike. Such a cache holds no queries.

**The mean** is taken off where tables say which channels a rotary embedding turns, and how fast. Turned back by the
angles of their slots, keys have a mean that makes much of the variance of channels that turn within a page. It is
found with the widths, turned to the slot of a token, and taken off before it is coded: ``y = x - R(slot) mean``. That
costs attention a product of the query and the turned mean, and nothing for each code. The slower half of the pairs has
mean 0: they hardly turn within a page, whose centers hold their mean. Wrong angles cost quality, never correctness,
since the same is added again.

**A page** has a step and a center for each channel::

    x = (code - levels / 2) * step + center        levels = 2 ** bits - 1

The center is the middle of the channel's range, or its mean where it has no bits. The step is the best of eight, which
span from 1 to 0.4 of the range, by the squared error that it leaves. The parameters of a channel are three bytes: the
step in e5m3, low and high byte of the center in fp16.

**Codes** are digits of base 4: digit ``j`` of a code is its bits ``2 j`` and ``2 j + 1``. The highest bit of a channel
of odd width is left over. A token is a row of fields of two bits, half as many as it has bits: first what is left over,
channel by channel, two to a field, the first in its lower bit; there is an even number, since widths have an even sum.
Then digits, channel by channel, the lowest first. The fields of a token are cut into blocks of 64; what is
left is the last block. A block of ``W`` words a token lies behind the one before, ``[N, W]``, and field ``f W + w`` of
a token's block is field ``f`` of its word ``w``: a block is packed as keys of two bits are.

All arithmetic is fp32 with one rounding per operation, in the order written, so that devices agree bit by bit.

Source: reverse water-filling, T. Berger, Rate Distortion Theory (1971), 4.5; ``g`` from J. Max, Quantizing for minimum
distortion (1960), table I, and its limit beyond.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kvq_compile.kernels.channelwise_scheme import (
    BLOCK_WORDS,
    CLIPS,
    FIELDS,
    GAINS,
    MAX_WIDTH,
    PRIOR,
    Pairs,
)
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import Calibrated
from kvq_compile.kernels.reference.formats import (
    E5M3_LARGEST,
    FP16_MAX,
    as_bytes,
    e5m3_value,
    from_bytes,
    round_e5m3,
    sum_pairs,
)
from kvq_compile.kernels.reference.rope import (
    cosine_and_sine,
    inverse_rotate_pairs,
    rotate_pairs,
)
from kvq_compile.kernels.values import check
from kvq_compile.kernels.words import WORD_BITS

# Widths


def find_state(
    pages: Tensor,
    queries: Tensor,
    old: int,
    layout: Layout,
    calibrated: Calibrated,
    dtype: torch.dtype,
) -> Tensor:
    """Return the state ``[B, H, rows, D]`` of a cache that has none yet: widths, and the mean where it is taken off.

    Args:
        pages: The pages that a call fills, ``[B, H, P, N, D]``, fp32.
        queries: Queries held, ``[B, H, n, D]``; zeros: unknown.
        old: Index of the first of the pages.
        layout: The cache's layout.
        calibrated: Its constants.
        dtype: What the state is held in, so that what is read is what was used.
    """
    ends = torch.stack([pages[:, :, 0], pages[:, :, -1]], 2)
    if not layout.channelwise.takes_mean:
        ends = bounded(ends)
        worth = variances(ends) * weights(queries, layout.channelwise.pairs)
        return allocate(worth, layout.bit_rows)[:, :, None].to(dtype)
    order = calibrated.section("order", layout).long()
    ends = ends.gather(-1, order[None, :, None, None].expand(ends.shape))
    base, inverse = (
        calibrated.section(name, layout)[None, :, None, None] for name in ("mean", "inverse")
    )
    ends = bounded((ends - base) * inverse)
    queries = queries.gather(-1, order[None, :, None].expand(queries.shape))
    angles = torch.cat(
        [rotation(old + page, 1, layout, calibrated) for page in (0, pages.shape[2] - 1)], 2
    )
    mean = mean_of(inverse_rotate_pairs(ends, *angles.unbind(-1))).to(dtype)
    mean.unflatten(-1, (2, -1))[..., layout.mean_pairs :] = 0.0
    rest = ends - rotate_pairs(mean.float()[:, :, None, None], *angles.unbind(-1))
    worth = variances(rest) * weights(queries, "halves")
    return torch.stack([allocate(worth, layout.bit_rows).to(dtype), mean], 2)


def variances(ends: Tensor) -> Tensor:
    """Return twice the mean variance ``[B, H, D]`` of each channel in two pages ``[B, H, 2, N, D]``."""
    x, share = ends.mT, 1.0 / ends.shape[-2]
    mean = sum_pairs(x) * share
    offset = x - mean[..., None]
    first, last = (sum_pairs(offset * offset) * share).unbind(2)
    return first + last


def mean_of(ends: Tensor) -> Tensor:
    """Return the mean ``[B, H, D]`` of two pages ``[B, H, 2, N, D]``, within the range of fp16."""
    first, last = (sum_pairs(ends.mT) * (0.5 / ends.shape[-2])).unbind(2)
    return bounded(first + last)


def rotation(page: int, pages: int, layout: Layout, calibrated: Calibrated) -> Tensor:
    """Return cosine and sine ``[1, H, pages, N, D / 2, 2]`` of the slots of pages.

    Slots stand for positions: what a position is ahead of its slot is in the mean.
    """
    frequency = calibrated.section("frequency", layout).long()[None, :, None, None, :]
    first = layout.sinks + page * layout.page_size
    slots = torch.arange(
        first, first + pages * layout.page_size, dtype=torch.int64, device=frequency.device
    )
    slots = slots.view(1, 1, pages, layout.page_size, 1)
    return torch.stack(cosine_and_sine(slots * frequency), -1)


def rotated_mean(page: int, pages: int, layout: Layout, calibrated: Calibrated) -> Tensor:
    """Return the mean ``[B, H, pages, N, D]`` of keys, rotated to the slots of pages."""
    mean = calibrated.state_of(layout)[:, :, 1, None, None]
    return rotate_pairs(mean, *rotation(page, pages, layout, calibrated).unbind(-1))


def weights(queries: Tensor, pairs: Pairs) -> Tensor:
    """Return the weight ``[..., D]`` of each channel from queries ``[..., n, D]``, zeros where unknown."""
    shape = *queries.shape[:-2], queries.shape[-1]
    total = torch.zeros(shape, dtype=torch.float32, device=queries.device)
    known = torch.zeros(shape[:-1], dtype=torch.float32, device=queries.device)
    for query in bounded(queries.float()).unbind(-2):
        total = total + query * query
        known = known + (query != 0).any(-1).float()
    if pairs == "halves":
        total = total + total.roll(total.shape[-1] // 2, -1)
    elif pairs == "neighbours":
        total = total + total.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    mean = sum_pairs(total) * (1.0 / total.shape[-1])
    prior = mean * (PRIOR / known.clamp_min(1.0))
    return torch.where((mean > 0)[..., None], total + prior[..., None], 1.0)


def allocate(value: Tensor, rows: int) -> Tensor:
    """Distribute ``rows`` bits over channels ``[..., D]`` of this variance times weight; return widths (fp32).

    A bit of a channel is worth ``value * GAINS[bit]``. The ``rows`` bits of most worth are given; of equal ones the
    lower bit first, then the channel that comes first.
    """
    gains = torch.tensor(GAINS, dtype=torch.float32, device=value.device)
    worth = (value[..., None, :] * gains[:, None]).flatten(-2)
    given = worth.sort(stable=True, dim=-1, descending=True).indices[..., :rows]
    return torch.zeros_like(worth).scatter_(-1, given, 1.0).unflatten(-1, (MAX_WIDTH, -1)).sum(-2)


def bounded(x: Tensor) -> Tensor:
    """Return ``x`` within the range of fp16, 0 for what is no number."""
    return torch.nan_to_num(x.clamp(-FP16_MAX, FP16_MAX), nan=0.0)


# Channels of a page


def quantize_channels(x: Tensor, widths: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Quantize channels.

    Args:
        x: Tokens of a channel along the last dimension, ``[..., N]``, fp32.
        widths: Bits of each channel, ``[...]``, fp32.

    Returns:
        Codes like ``x`` (int32), step as a byte and center in fp16, ``[...]``.
    """
    finite, x = x.isfinite(), x.clamp(-FP16_MAX, FP16_MAX)
    some = finite.any(-1)
    low = torch.where(some, x.masked_fill(~finite, math.inf).amin(-1), 0.0)
    high = torch.where(some, x.masked_fill(~finite, -math.inf).amax(-1), 0.0)
    x = torch.nan_to_num(x, nan=0.0)
    half_levels = (torch.exp2(widths) - 1.0) * 0.5
    coded = widths > 0
    mean = sum_pairs(x) * (1.0 / x.shape[-1])
    center = torch.where(coded, (low + high) * 0.5, mean).half()
    half_range = (high - low) * 0.5
    codes, step, least = None, None, torch.zeros((), dtype=torch.float32, device=x.device)
    for clip in CLIPS:
        per_level = half_range * clip / torch.where(coded, half_levels, 1.0)
        trial = torch.where(coded, round_e5m3(per_level), 0).to(torch.uint8)
        chosen = nearest_codes(x, trial, center, half_levels)
        difference = torch.where(finite, channel_values(chosen, trial, center, widths) - x, 0.0)
        error = sum_pairs(difference * difference)
        if codes is None or step is None:
            codes, step, least = chosen, trial, error
            continue
        better = error < least
        codes = torch.where(better[..., None], chosen, codes)
        step, least = torch.where(better, trial, step), torch.minimum(error, least)
    assert codes is not None and step is not None
    return codes, step, center


def nearest_codes(x: Tensor, step: Tensor, center: Tensor, half_levels: Tensor) -> Tensor:
    """Return the nearest codes (int32) of channels ``[..., N]``."""
    size = e5m3_value(step)
    lowest = center.float() - size * half_levels
    place = (x - lowest[..., None]) / torch.where(size > 0, size, 1.0)[..., None]
    most = torch.where(size > 0, 2.0 * half_levels, 0.0)[..., None]
    return torch.minimum((place + 0.5).floor().clamp_min(0.0), most).int()


def channel_values(codes: Tensor, step: Tensor, center: Tensor, widths: Tensor) -> Tensor:
    """Dequantize codes ``[..., N]`` of channels ``[...]`` to fp32."""
    size = e5m3_value(step)
    lowest = center.float() - size * ((torch.exp2(widths) - 1.0) * 0.5)
    return codes.float() * size[..., None] + lowest[..., None]


# Parameters


def to_params(step: Tensor, center: Tensor) -> Tensor:
    """Return the part ``params`` ``[..., 3, D, 1]`` of steps and centers ``[..., D]``."""
    fields = torch.cat([step[..., None], as_bytes(center)], -1)
    return fields.transpose(-2, -1)[..., None]


def from_params(params: Tensor) -> tuple[Tensor, Tensor]:
    """Undo `to_params`."""
    fields = params[..., 0].transpose(-2, -1)
    return fields[..., 0], from_bytes(fields[..., 1:])


# Fields


def bit_places(widths: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Return channel and bit ``[..., rows]`` (int64) of each bit of a token, for widths ``[..., D]``."""
    widths = widths.long()
    single = torch.cat([widths % 2, 2 * (widths // 2)], -1)  # what is left over, then digits
    last = single.cumsum(-1)
    number = torch.arange(rows, dtype=torch.int64, device=widths.device)
    number = number.expand(*widths.shape[:-1], rows).contiguous()
    run = torch.searchsorted(last, number, right=True).clamp_max(last.shape[-1] - 1)
    channel, of_digit = run % widths.shape[-1], run // widths.shape[-1]
    bit = number - (last - single).gather(-1, run)
    return channel, torch.where(of_digit > 0, bit, widths.gather(-1, channel) - 1)


def pack_bits(bits: Tensor) -> Tensor:
    """Pack the bits ``[..., N, rows]`` (int32) of tokens into words ``[..., rows / 16, N]`` (int16)."""
    low, high = bits.unflatten(-1, (-1, 2)).unbind(-1)
    blocks = []
    for block in (low + 2 * high).split(BLOCK_WORDS * FIELDS, -1):
        fields = block.unflatten(-1, (FIELDS, -1))
        shifts = torch.arange(0, WORD_BITS, 2, device=bits.device, dtype=torch.int64)[:, None]
        words = (fields << shifts).sum(-2)
        blocks.append(torch.where(words >= 1 << 15, words - (1 << 16), words).flatten(-2))
    packed = torch.cat(blocks, -1).to(torch.int16)
    return packed.unflatten(-1, (bits.shape[-1] // WORD_BITS, bits.shape[-2]))


def unpack_bits(codes: Tensor) -> Tensor:
    """Undo `pack_bits`."""
    words, tokens = codes.shape[-2:]
    blocks = []
    for block in codes.flatten(-2).split(BLOCK_WORDS * tokens, -1):
        fields = block.unflatten(-1, (tokens, -1)).int()[..., None, :]
        shifts = torch.arange(0, WORD_BITS, 2, device=codes.device, dtype=torch.int32)[:, None]
        blocks.append(((fields >> shifts) & 3).flatten(-2))
    fields = torch.cat(blocks, -1)
    assert fields.shape[-1] == words * FIELDS
    return torch.stack([fields & 1, fields >> 1], -1).flatten(-2)


# Pages


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
    channel, bit = bit_places(calibrated.state_of(layout)[:, :, 0, None, None], layout.bit_rows)
    shape = (*codes.shape[:-1], layout.bit_rows)
    bits = (codes.gather(-1, channel.expand(shape)) >> bit) & 1
    return pack_bits(bits), params


def packed_values(codes: Tensor, params: Tensor, layout: Layout, calibrated: Calibrated) -> Tensor:
    """Unpack and dequantize pages: see `pages.Coder`."""
    channel, bit = bit_places(calibrated.state_of(layout)[:, :, 0, None, None], layout.bit_rows)
    bits = unpack_bits(codes)
    code = bits.new_zeros(*bits.shape[:-1], layout.head_dim)
    code.scatter_add_(-1, channel.expand(bits.shape), bits << bit.int())
    return coded_values(code, params, layout, calibrated)


def quantize_codes(coded: Tensor, layout: Layout, calibrated: Calibrated) -> tuple[Tensor, Tensor]:
    """Return codes and parameters of pages: see `pages.CodeCoder`."""
    widths = calibrated.state_of(layout)[:, :, 0, None].expand(*coded.shape[:3], -1)
    codes, step, center = quantize_channels(coded.mT, widths)
    return codes.mT, to_params(step, center)


def coded_values(codes: Tensor, params: Tensor, layout: Layout, calibrated: Calibrated) -> Tensor:
    """Dequantize codes: see `pages.CodeCoder`."""
    step, center = from_params(params)
    widths = calibrated.state_of(layout)[:, :, 0, None].expand(step.shape)
    return channel_values(codes.mT, step, center, widths).mT


def check_pages(codes: Tensor, params: Tensor, layout: Layout) -> None:
    """Check the parameters of pages from a file; every code is valid.

    Raises:
        ValueError: A parameter is not finite.
    """
    del codes, layout
    step, center = from_params(params)
    finite = bool((step <= E5M3_LARGEST).all() and center.isfinite().all())
    check(finite, "steps and centers must be finite")


def check_state(state: Tensor, pages: int, layout: Layout) -> None:
    """Check the state ``[B, H, rows, D]`` of a cache from a file that has ``pages`` pages.

    Raises:
        ValueError: No cache could have found it.
    """
    widths = state[:, :, :1].float()
    whole = bool((widths == widths.round()).all() and ((widths >= 0) & (widths <= MAX_WIDTH)).all())
    totals = widths.sum(-1)
    given = totals == layout.bit_rows
    if pages == 0:
        given |= totals == 0
    check(
        whole and bool(given.all()),
        f"the widths of channels must be 0 to {MAX_WIDTH} and {layout.bit_rows} together",
    )
    check(bool(state[:, :, 1:].isfinite().all()), "the mean of channels must be finite")
