"""Search how much of each group's range to cut off, by what that changes in attention's output.

Squared error of the elements is no guide: it shrinks outliers to gain finer steps, and the shrinkage of a key
adds up over all tokens that are attended to where rounding averages out. So a margin is judged by the attention
itself: the queries of calibration sequences attend to keys, or values, that were quantized with it.

Groups of values change channels of the output of their own, so that one pass over the margins finds the best
of every group. Groups of keys meet in the scores: from the best common margin of a head on, one group after
another takes the margin that changes its head's output least. Neither is ever worse than no margin at all, on
the sequences of the search.

Source: SKVQ (arXiv 2405.06219), section 3.2: clipping by the error of attention's output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from kvq_compile.calibration.attention_change import Text, attend, exact
from kvq_compile.calibration.fit import Fitted, quantize_dequantize
from kvq_compile.calibration.rotate import rotate, unrotate
from kvq_compile.kernels.schemes import Role
from kvq_compile.lowering.find.rotation import Rotation

# Margins that are tried: none to a fifth of the range at each end.
MARGINS = tuple(i / 100 for i in range(0, 21, 2))


def search_margins(
    fitted: Fitted,
    texts: Sequence[Text],
    role: Role,
    rotation: Rotation | None,
    *,
    levels: int,
    group_size: int,
    fp8: bool,
    sinks: int,
    window: int,
) -> Fitted:
    """Return uniform tables with the margins that change attention's output least.

    Args:
        fitted: Tables of `fit_uniform`, whose margins are not read.
        texts: What the attention saw, with queries farther than the window from the first tokens.
        role: Whether ``fitted`` is of its keys or of its values.
        rotation: How keys were rotated that are quantized without it.
        levels: Largest code, as in `quantize_dequantize`, as are ``group_size`` and ``fp8``.
        group_size: Coded channels that share a margin.
        fp8: Parameters are rounded to e4m3.
        sinks: First tokens, which stay exact.
        window: Last tokens before a query, which stay exact.
    """
    H, D = fitted.order.shape
    outputs = [exact(text) for text in texts]
    samples = [_unrotated(text, role, rotation) for text in texts]

    def change(margin: Tensor) -> Tensor:
        """Return the squared change of the output by stored channel, ``[H, D]``, for margins ``[H, D/g]``."""
        tables = replace(fitted, margin=margin.repeat_interleave(group_size, -1))
        total = torch.zeros(H, D, dtype=torch.float64, device=margin.device)
        for text, output, x in zip(texts, outputs, samples, strict=True):
            coded = quantize_dequantize(x, tables, levels=levels, group_size=group_size, fp8=fp8)
            stored = _rotated(coded, rotation)
            pair = (stored, text.value) if role == "key" else (text.key, stored)
            error = (attend(text, *pair, sinks, window) - output).square()
            total += error.view(H, -1, D).sum(1, dtype=torch.float64).gather(1, fitted.order)
        return total

    groups = D // group_size
    if role == "value":
        margin = _least(lambda m: change(m).view(H, groups, -1).sum(-1), fitted, groups, [None])
    else:
        one_by_one = range(groups) if groups > 1 else ()
        margin = _least(
            lambda m: change(m).sum(-1, keepdim=True), fitted, groups, [None, *one_by_one]
        )
    return replace(fitted, margin=margin.repeat_interleave(group_size, -1))


def _least(
    cost: Callable[[Tensor], Tensor], fitted: Fitted, groups: int, turns: Sequence[int | None]
) -> Tensor:
    """Return margins ``[H, groups]`` of least cost, found by trying all for one group after another.

    Args:
        cost: Of margins ``[H, groups]``, ``[H, groups]`` where groups stand alone, or ``[H, 1]``.
        fitted: For its heads and its device.
        groups: Of a head.
        turns: The group that is tried, or None for all together.
    """
    margin = fitted.mean.new_zeros(fitted.mean.shape[0], groups)
    least = cost(margin)
    for group in turns:
        start = margin
        for tried in MARGINS:
            trial = start.clone()
            trial[:, slice(None) if group is None else group] = tried
            found = cost(trial)
            margin = torch.where(found < least, trial, margin)
            least = torch.minimum(found, least)
    return margin


def _unrotated(text: Text, role: Role, rotation: Rotation | None) -> Tensor:
    """Return a sequence's keys or values as they are quantized, ``[T, H, D]``."""
    x = (text.key if role == "key" else text.value).transpose(0, 1)
    if rotation is None:
        return x
    return unrotate(x, torch.arange(len(x), dtype=torch.int64, device="cpu"), rotation)


def _rotated(x: Tensor, rotation: Rotation | None) -> Tensor:
    """Undo `_unrotated`, ``[H, T, D]``."""
    if rotation is not None:
        x = rotate(x, torch.arange(len(x), dtype=torch.int64, device="cpu"), rotation)
    return x.transpose(0, 1)
