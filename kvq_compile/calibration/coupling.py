"""Which channels share an index into a codebook: those that together have equally much to say.

An index of ``b`` bits says of ``c`` coupled channels what they need together. A good codebook spends its entries where
its channels vary: of channels of unequal variance the wide ones get most of the bits. So each index should have some
wide channels and some narrow ones. Channels that are wide alike, as neighbours of a key often are, would have to share
one index while others have an index that they do not need.

How much error an index leaves is estimated by reverse water-filling: components of variance ``v`` coded in ``b`` bits
together leave ``sum min(v, level)``, where the level is such that ``sum max(0, log2(v / level)) / 2 = b``. From
channels that are dealt out by their variance, to and fro, the two whose exchange lowers the sum over all indices most
change places, until no exchange lowers it.

Source: T. Berger, Rate Distortion Theory (1971), 4.5, for the error of components.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LEAST_GAIN = 1e-6  # of the whole error; less changes nothing that a codebook would show
_LEAST_VARIANCE = 1e-9  # of the largest one: a channel that does not vary has a logarithm too


def order_by_need(variance: Tensor, couple: int, bits: int, paired: bool) -> Tensor:
    """Return an order of each head's channels whose runs of ``couple`` leave the least error together.

    Args:
        variance: Of each channel, in units in which all errors matter alike, ``[H, D]``.
        couple: Channels that share an index; divides ``D``, and ``D / 2`` where channels are paired.
        bits: Of an index.
        paired: Channels ``c`` and ``c + D/2`` stay a pair, at places that are ``D/2`` apart.

    Returns:
        Channel at each place, ``[H, D]`` int64.
    """
    largest = variance.amax(-1, keepdim=True)
    variance = torch.maximum(variance, largest * _LEAST_VARIANCE).double()
    variance = torch.where(variance > 0, variance, 1.0)
    halves = variance.unflatten(-1, (2, -1)) if paired else variance[:, None]
    order = _exchanged(halves, _dealt(halves.sum(1), couple), couple, bits)
    return torch.cat([order, order + order.shape[1]], -1) if paired else order


def least_error(variance: Tensor, bits: float) -> Tensor:
    """Return the error ``[...]`` that components of ``variance`` ``[..., c]`` leave in ``bits`` bits together."""
    wide = variance.sort(-1, descending=True).values
    count = torch.arange(1, wide.shape[-1] + 1, dtype=wide.dtype, device=wide.device)
    level = torch.exp2((wide.log2().cumsum(-1) - 2 * bits) / count)
    rest = wide.sum(-1, keepdim=True) - wide.cumsum(-1)
    coded = (level <= wide * (1 + 1e-9)).sum(-1, keepdim=True).clamp_min(1) - 1
    error: Tensor = (count * level + rest).gather(-1, coded)[..., 0]
    return error


def _dealt(variance: Tensor, couple: int) -> Tensor:
    """Return channels ``[H, N]`` by index, those of each index together, dealt to and fro by their variance."""
    falling = variance.argsort(dim=-1, descending=True, stable=True)
    rows: Tensor = falling.view(len(variance), couple, -1).clone()
    rows[:, 1::2] = rows[:, 1::2].flip(-1)
    return rows.transpose(1, 2).flatten(1)


def _exchanged(halves: Tensor, order: Tensor, couple: int, bits: int) -> Tensor:
    """Exchange channels between indices while that lowers the error of all.

    Args:
        halves: Variance of the channels that go together, ``[H, 1 or 2, N]`` fp64.
        order: Channels by index, ``[H, N]``.
        couple: Channels of an index.
        bits: Of an index.
    """
    order = order.clone()
    place = torch.arange(order.shape[1], device=order.device, dtype=torch.int64)
    own = (place % couple)[:, None] == place[:couple]  # [N, couple]: a place within its index
    other = place[:, None] // couple != place // couple
    while True:
        at = halves.gather(-1, order[:, None].expand_as(halves))
        together = at.unflatten(-1, (-1, couple)).repeat_interleave(
            couple, -2
        )  # [H, halves, N, couple]
        error = least_error(together, bits).sum(1)
        # [H, N, N]: of the index of the first place with the channel of the second in its stead
        instead = torch.where(own[:, None], at[:, :, None, :, None], together[:, :, :, None])
        left = least_error(instead, bits).sum(1)
        gain = (error[:, :, None] - left) * other
        most, pair = (gain + gain.mT).flatten(1).max(1)
        moving = (most > _LEAST_GAIN * error.sum(-1)).nonzero()[:, 0]
        if not len(moving):
            return order
        u, v = (pair // len(place))[moving], (pair % len(place))[moving]
        order[moving, u], order[moving, v] = order[moving, v], order[moving, u]
