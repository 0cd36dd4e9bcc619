"""A small cache with every region in it, and what makes two caches the same: for tests."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from kvq_compile.kernels.cache.tensor import QuantizedKV
from kvq_compile.kernels.layout import Layout, exact_row_index
from kvq_compile.kernels.packed import PARTS
from kvq_compile.kernels.schemes import Uniform
from kvq_compile.kernels.spec import CacheSpec

LAYOUT = CacheSpec(Uniform(2), Uniform(2), sinks=2, window=5, page_size=32).layout("key", 64)
B, H, D = 2, 2, LAYOUT.head_dim


def tokens(count: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return ``count`` normal tokens ``[B, H, count, D]``."""
    generator = torch.Generator().manual_seed(seed)
    shape = B, H, count, D
    return torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)


def grown(count: int, seed: int = 0, layout: Layout = LAYOUT) -> QuantizedKV:
    """Return a dynamic cache of ``count`` tokens."""
    return QuantizedKV.from_dense(tokens(count, seed), layout)


def static(slots: int, held: int, seed: int = 0) -> QuantizedKV:
    """Return a static cache of ``slots`` slots that holds ``held`` tokens."""
    return QuantizedKV.from_dense(tokens(slots, seed), LAYOUT, kind="static", length=held)


def used(cache: QuantizedKV) -> list[Tensor]:
    """Return the bytes that count: packed pages, exact rows that hold a token, cursor."""
    length, pages = cache.cursor.tolist()
    layout = cache.page_layout
    first = layout.sinks + pages * layout.page_size
    rows = exact_row_index(first, max(first, length), layout, cache.device)
    sinks = exact_row_index(0, min(length, layout.sinks), layout, cache.device)
    rows = torch.cat([sinks, rows])
    return [
        cache.paged().codes[:, :, :pages],
        cache.paged().params[:, :, :pages],
        cache.exact[:, :, rows],
        cache.cursor,
    ]


def assert_same_bytes(one: QuantizedKV, other: QuantizedKV) -> None:
    """Assert that two caches hold the same tokens as the same bytes."""
    assert one.shape == other.shape
    for name, mine, theirs in zip(PARTS, used(one), used(other), strict=True):
        assert torch.equal(mine, theirs), name


def assert_is_quantized(cache: Any, expected: Tensor) -> None:
    """Assert that a cache is packed and reads as ``expected``."""
    assert type(cache) is QuantizedKV
    assert torch.equal(cache.dequantize(), expected)
