"""What quantized keys or values change in the output of one attention, on queries that it has seen."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kvq_compile.kernels.score import UNBENT, Bend, bend_


@dataclass(frozen=True)
class Text:
    """What one attention saw of one sequence, fp32, as attention reads it.

    Attributes:
        query: Some of the queries, ``[Hq, n, D]``.
        place: Their positions in the sequence, ``[n]``.
        key, value: All keys and values, ``[H, T, D]``.
        scale: Factor on the scores.
        bend: What happens to scores after that.
    """

    query: Tensor
    place: Tensor
    key: Tensor
    value: Tensor
    scale: float
    bend: Bend = UNBENT


def attend(text: Text, key: Tensor, value: Tensor, sinks: int, window: int) -> Tensor:
    """Attend causally; tokens farther back than the window, sinks apart, are ``key`` and ``value``'s.

    Returns:
        Outputs of the sequence's queries, ``[Hq, n, D]``.
    """
    slot = torch.arange(text.key.shape[1], device=key.device, dtype=torch.int64)
    distance = text.place[:, None] - slot
    far = (distance >= window) & (slot >= sinks)
    outputs = []
    for queries, exact_key, exact_value, old_key, old_value in zip(
        text.query.chunk(len(key)), text.key, text.value, key, value, strict=True
    ):
        scores = queries @ exact_key.T
        if key is not text.key:
            scores = torch.where(far, queries @ old_key.T, scores)
        scores = bend_(scores.mul_(text.scale), text.bend).masked_fill_(distance < 0, -torch.inf)
        weights = scores.softmax(-1)
        output = weights @ exact_value
        if value is not text.value:
            output += (weights * far) @ (old_value - exact_value)
        outputs.append(output)
    return torch.cat(outputs)


def exact(text: Text) -> Tensor:
    """Return the outputs of the sequence's queries with nothing quantized, ``[Hq, n, D]``."""
    return attend(text, text.key, text.value, 0, 1)
