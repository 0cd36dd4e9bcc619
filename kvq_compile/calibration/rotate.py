"""Apply the inverse rotation to captured keys, and the rotation to keys before RoPE."""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_compile.kernels.reference.rope import cosine_and_sine, inverse_rotate_pairs, rotate_pairs
from kvq_compile.lowering.find.rotation import Rotation


def unrotate(x: Tensor, position: Tensor, rotation: Rotation) -> Tensor:
    """Return keys ``[..., n, H, D]`` as they were before their rotation, pairs at ``c`` and ``c + D / 2``.

    Args:
        x: Rotated keys, or their gradients.
        position: Position of each, ``[n]``.
        rotation: How they were rotated.
    """
    turns = _turns(position, rotation, x.device)
    return inverse_rotate_pairs(x[..., list(rotation.order)], *turns)


def rotate(x: Tensor, position: Tensor, rotation: Rotation) -> Tensor:
    """Undo `unrotate`."""
    turned = rotate_pairs(x, *_turns(position, rotation, x.device))
    return turned[..., torch.tensor(rotation.order, device=x.device, dtype=torch.int64).argsort()]


def _turns(position: Tensor, rotation: Rotation, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return cosine and sine ``[n, 1, D / 2]``."""
    frequency = torch.tensor(rotation.frequencies, dtype=torch.int64, device=device)
    return cosine_and_sine(position.to(device)[:, None, None] * frequency)
