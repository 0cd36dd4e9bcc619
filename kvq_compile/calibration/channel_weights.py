"""Weigh the channels of keys by what an error in them does to the loss: for transform coding.

Errors of packed keys are independent and without a mean, so that the loss, to second order, grows by the sum over all
keys and channels of half the squared gradient times the variance of the error. A channel of a head thus weighs as much
as the mean square of its gradient. What counts is the gradient by way of queries that see a key *packed*: the window
reads it as it is, and most of a key's whole gradient comes from there.

A cache without a calibration takes the mean square of its last queries instead, which knows nothing of what is
attended to.

Source: the diagonal of Fisher's information, as CQ (arXiv 2405.03917) has it; the part beyond the window is ours.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_compile.calibration.capture import Activations
from kvq_compile.kernels.score import UNBENT, Bend, bend_
from kvq_compile.kernels.tables import Tables
from kvq_compile.lowering.find.key_rotation import rotation_tables
from kvq_compile.lowering.find.rotation import Rotation

ELEMENTS = 1 << 25  # of the scores at hand
LARGEST = 32.0  # scale; channels of less weight get next to no bits anyway, and fp16 keeps what queries have in others


def far_gradients(seen: Activations, sinks: int, window: int) -> Tensor:
    """Return the gradient of the loss with respect to keys as queries beyond the window see them, ``[B, H, T, D]``.

    Args:
        seen: What an attention saw, with the gradient of its output.
        sinks: First tokens, which stay exact: their gradients are zero.
        window: Last tokens before a query, which stay exact.

    Raises:
        ValueError: The loss does not depend on the output.
    """
    if seen.output_gradient is None:
        raise ValueError(
            "logits must depend on the output of each attention, got one that has no gradient"
        )
    B, H, T, _ = seen.key.shape
    shared = seen.query.shape[1] // H
    query, gradient = (
        x.float().unflatten(1, (H, shared)) for x in (seen.query, seen.output_gradient)
    )
    key, value = (x.float()[:, :, None] for x in (seen.key, seen.value))
    slot = torch.arange(T, dtype=torch.int64, device=key.device)
    hidden = torch.zeros(B, 1, 1, 1, T, dtype=torch.bool, device=key.device)
    if seen.mask is not None:
        hidden = ~seen.mask.to(key.device)[:, None, None, None, :]
    total = torch.zeros_like(seen.key, dtype=torch.float32)
    for rows in slot.split(max(1, ELEMENTS // (B * H * shared * T))):
        distance = rows[:, None] - slot
        scores = bend_((query[..., rows, :] @ key.mT).mul_(seen.scale), seen.bend)
        slope = _slope(scores, seen.bend)
        weights = scores.masked_fill_((distance < 0) | hidden, -torch.inf).softmax(-1)
        weights = torch.nan_to_num(weights)  # of padding, which sees nothing
        change = gradient[..., rows, :] @ value.mT
        change = weights * (change - (weights * change).sum(-1, keepdim=True))
        change = change if slope is None else change * slope
        change *= (distance >= window) & (slot >= sinks)
        total += (change.mT @ query[..., rows, :]).sum(2).mul_(seen.scale)
    return total


def _slope(scores: Tensor, bend: Bend) -> Tensor | None:
    """Return the slope of bent scores by scaled products; ``None`` where it is 1."""
    if bend == UNBENT:
        return None
    slope = ((scores > bend.lowest) & (scores < bend.highest)).to(scores.dtype)
    return slope if bend.cap == 0 else slope * (1 - (scores / bend.cap).square())


def weighted_tables(weight: Tensor, rotation: Rotation | None) -> Tables:
    """Return tables whose scales make channels weigh alike.

    Args:
        weight: Weight of the model's channels, ``[H, D]``; of the channels of a rotation pair the mean counts, and
            a head all of whose weights are zero weighs channels alike.
        rotation: How keys are rotated, or ``None``.

    Raises:
        ValueError: Channels are odd in number.
    """
    H, D = weight.shape
    if D % 2:
        raise ValueError(f"head_dim must be even for weights of channels, got {D}")
    order = torch.arange(D, dtype=torch.int64, device="cpu")
    if rotation is not None:
        order = torch.tensor(rotation.order, dtype=torch.int64, device="cpu")
    first, second = weight.double().cpu()[:, order].chunk(2, 1)
    pair = (first + second) / 2
    largest = pair.amax(1, keepdim=True)
    scale = torch.where(largest > 0, largest / pair.clamp_min(torch.finfo(pair.dtype).tiny), 1.0)
    scale = scale.sqrt().clamp_max(LARGEST).float().repeat(1, 2)
    of_channel = torch.empty_like(scale).scatter_(1, order.expand(H, D), scale)
    return rotation_tables(H, D, rotation, of_channel)
