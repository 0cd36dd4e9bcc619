"""Hadamard rotation of the head dimension before quantization; all backends use the same matrix."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from kvq_compile.kernels.layout import Layout


@lru_cache(maxsize=32)
def hadamard(size: int, device: torch.device) -> Tensor:
    """Return the orthonormal, symmetric Hadamard matrix ``[size, size]``, fp32.

    If ``size`` is not a power of two, the matrix is block diagonal; a block has the largest power of two that
    divides ``size``.
    """
    block = size & -size
    matrix = torch.ones(1, 1, device=device, dtype=torch.float32)
    while matrix.shape[0] < block:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return torch.block_diag(*[matrix / math.sqrt(block)] * (size // block))


def rotate(x: Tensor, layout: Layout) -> Tensor:
    """Apply the layout's transform to the last dimension of ``x`` (fp32); the transform is its own inverse."""
    return x @ hadamard(layout.head_dim, x.device) if layout.transform == "hadamard" else x
