"""The rotation of the head dimension that a scheme may ask for: the same matrix for every backend."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from kvq_compile.kernels.layout import Layout


@lru_cache(maxsize=32)
def hadamard(size: int, device: torch.device) -> Tensor:
    """Return the orthonormal, symmetric Hadamard matrix ``[size, size]``, fp32.

    Where ``size`` is no power of two the matrix is block diagonal, with blocks of the largest power of
    two that divides it.
    """
    block = size & -size
    matrix = torch.ones(1, 1, device=device, dtype=torch.float32)
    while matrix.shape[0] < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.block_diag(*[matrix / math.sqrt(block)] * (size // block))


def rotate(x: Tensor, layout: Layout) -> Tensor:
    """Apply the layout's transform, which is its own inverse, to the last dimension of ``x`` (fp32)."""
    return x @ hadamard(layout.head_dim, x.device) if layout.transform == "hadamard" else x
