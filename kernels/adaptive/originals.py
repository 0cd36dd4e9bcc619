"""Exact copies of packed tokens in host memory, from which tokens regain bits when attention returns to them.

The copies are pages ``[N, D]`` in the model's dtype, flat as those of codes (`packed`), pinned if the cache is on a
GPU. When a call completes pages, bits are allocated again with the current importance scores. A page in which a token
gains a bit is quantized again from its copy, within its budget, so that other tokens may lose bits. Pages in which no
token gains a bit are left alone, and nothing of their copies is moved.

**Cost.** A call that completes pages synchronises with the device twice: to copy the pages to the host, and to learn
which pages gain. Other calls do not synchronise. The code is plain torch for every device.

If a page is truncated and fills again, its copy has the dequantized values of the tokens that stayed.

Source: QAQ (arXiv 2403.04643), section 4.2, steps 2 and 5 of its decoding loop.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from kvq_compile.kernels import reference
from kvq_compile.kernels.adaptive.requantize import pages_before_and_after, weighed_span
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import Size, flat_size, page_shapes, room_for
from kvq_compile.kernels.reference import mixed
from kvq_compile.kernels.transform import rotate

PAGES = 64  # moved to the device at once


def new_originals(like: Tensor, slots: Size, layout: Layout) -> Tensor:
    """Allocate the originals of a cache that grows, for ``slots`` tokens like ``like`` ``[B, H, *, D]``."""
    pages, _ = room_for(slots, layout)
    shape = (*like.shape[:2], flat_size(pages, page_shapes(layout)[2]))
    return held_by_host(like.new_zeros(shape, device="cpu"), like.device)


def held_by_host(originals: Tensor, device: torch.device) -> Tensor:
    """Return originals in pinned memory if their cache is on a GPU."""
    if device.type != "cuda" or isinstance(originals, FakeTensor):
        return originals
    return originals.pin_memory()


def keep_(
    originals: Tensor, exact: Tensor, cursor: Tensor, x: Tensor, start: int, layout: Layout
) -> None:
    """Copy the tokens of pages that new tokens ``x`` complete to the host, before ``x`` is appended.

    Args:
        originals: Destination, written in place.
        exact, cursor: Parts of the cache before the call.
        x: New tokens, ``[B, H, T, D]``.
        start: Slot of the first new token.
        layout: The cache's layout.
    """
    if layout.pages_at(start + x.shape[2]) == layout.pages_at(start):
        return
    old, new = pages_before_and_after(cursor, start, x.shape[2], layout)
    if new > old:
        leaving = reference.leaving_pages(exact, x, start, old, new, layout)
        originals[:, :, old:new] = leaving.to(device=originals.device, dtype=originals.dtype)


def renew_(
    codes: Tensor,
    params: Tensor,
    cursor: Tensor,
    originals: Tensor,
    start: int,
    tokens: int,
    layout: Layout,
    importance: Tensor | None,
) -> None:
    """Requantize pages in which a token gains a bit, if the call completes others; runs before it appends.

    Args:
        codes, params, cursor: Parts of the cache before the call, changed in place.
        originals: Exact copies of its packed tokens.
        start: Slot of the call's first token.
        tokens: Tokens of the call.
        layout: The cache's layout.
        importance: Importance score of each slot, ``[B, H, >= start + tokens]``; ``None``: nothing is done.
    """
    if importance is None or layout.pages_at(start + tokens) == layout.pages_at(start):
        return
    old, new = pages_before_and_after(cursor, start, tokens, layout)
    if new == old or old == 0:
        return
    bound = layout.bound_at(layout.sinks + new * layout.page_size)
    span, weight = weighed_span(params[:, :, :old], layout, importance)
    assert weight is not None  # originals are kept where bits depend on attention
    wanted = mixed.allocate(span, weight, layout, bound)
    gains = wanted > mixed.held_bits(codes[:, :, :old], params[:, :, :old], layout)
    for where in gains.any(-1).nonzero().split(PAGES):
        at = tuple(where.unbind(-1))
        page = originals[tuple(where.cpu().unbind(-1))].to(codes.device)
        coded = rotate(page.float(), layout)
        codes[at], params[at] = mixed.quantize_pages(coded, weight[at], layout, bound)
