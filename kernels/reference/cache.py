"""A whole cache: append tokens, truncate, read.

Tests hold every backend to this folder: packed bits must be equal, and the error of attention at most that of the
same computation in low precision. Nothing here is fast, and no backend imports it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kvq_compile.kernels.layout import Layout, exact_row_index
from kvq_compile.kernels.packed import UNCALIBRATED, Calibrated, check_room
from kvq_compile.kernels.reference.channelwise import find_state
from kvq_compile.kernels.reference.pages import dequantize_packed, quantize_packed
from kvq_compile.kernels.reference.queries import remember_


def read(
    codes: Tensor,
    params: Tensor,
    exact: Tensor,
    cursor: Tensor,
    length: int,
    layout: Layout,
    calibrated: Calibrated = UNCALIBRATED,
) -> Tensor:
    """Return slots ``0 .. length - 1`` as ``[B, H, length, D]`` in the dtype of ``exact``.

    Slots that hold no token are zero.
    """
    size, length = length, min(length, int(cursor[0]))
    pages = int(cursor[1])
    first_recent = layout.sinks + pages * layout.page_size
    sinks = exact[:, :, : min(length, layout.sinks)]
    calibrated = with_state(calibrated, exact, layout)
    packed = dequantize_packed(codes[:, :, :pages], params[:, :, :pages], layout, calibrated)
    packed = packed[:, :, : max(0, length - layout.sinks)].to(exact.dtype)
    recent = exact[
        :, :, exact_row_index(first_recent, max(first_recent, length), layout, exact.device)
    ]
    empty = exact.new_zeros(*exact.shape[:2], size - length, exact.shape[3])
    return torch.cat([sinks, packed, recent, empty], 2)


def truncate_(
    codes: Tensor,
    params: Tensor,
    exact: Tensor,
    cursor: Tensor,
    length: int,
    layout: Layout,
    calibrated: Calibrated = UNCALIBRATED,
) -> None:
    """Truncate the cache to ``length`` tokens, in place.

    If the cut lies inside a packed page, the tokens that stay are dequantized into the ring; the page is quantized
    again when it is full. Dropping at most ``window`` tokens never cuts a page.
    """
    pages = min(int(cursor[1]), max(0, length - layout.sinks) // layout.page_size)
    first = layout.sinks + pages * layout.page_size
    if pages < int(cursor[1]) and first < length:
        cut = slice(pages, pages + 1)
        calibrated = with_state(calibrated, exact, layout)
        page = dequantize_packed(codes[:, :, cut], params[:, :, cut], layout, calibrated, pages)
        rows = exact_row_index(first, length, layout, exact.device)
        exact[:, :, rows] = page[:, :, : length - first].to(exact.dtype)
    remember_(exact, None, int(cursor[0]), length, 0, layout)
    cursor[0], cursor[1] = length, pages


def append_(
    codes: Tensor,
    params: Tensor,
    exact: Tensor,
    cursor: Tensor,
    x: Tensor,
    start: int,
    layout: Layout,
    calibrated: Calibrated = UNCALIBRATED,
    importance: Tensor | None = None,
    query: Tensor | None = None,
) -> None:
    """Write new tokens at ``start`` and quantize the pages that they complete, in place.

    Args:
        codes, params, exact, cursor: The cache, as `Layout` describes it.
        x: New tokens, ``[B, H, T, D]``.
        start: Slot of the first new token; the cache is first truncated to ``start`` tokens.
        layout: The cache's layout.
        calibrated: Calibration constants, if the layout has tables.
        importance: Importance score of each slot, ``[B, H, >= start + T]``, by which mixed layouts distribute
            bits; ``None``: all are equal.
        query: Queries of the last of the new tokens, for layouts that hold queries: see `queries`.

    Raises:
        ValueError: ``start`` would leave a gap, or the new tokens do not fit.
    """
    held, tokens = int(cursor[0]), x.shape[2]
    if not 0 <= start <= held:
        raise ValueError(f"position must start at or before the {held} tokens held, got {start}")
    check_room((codes, params, exact, cursor), start + tokens, layout)
    old, new = int(cursor[1]), layout.pages_at(start + tokens)
    if start < held:
        truncate_(codes, params, exact, cursor, start, layout, calibrated)
        old = int(cursor[1])
    remember_(exact, query, start, start, tokens, layout)
    new = max(old, new)
    first, last = layout.sinks + old * layout.page_size, layout.sinks + new * layout.page_size
    if new > old:
        pages = leaving_pages(exact, x, start, old, new, layout)
        find_state_(exact, pages, old, layout, calibrated)
        calibrated = with_state(calibrated, exact, layout)
        if importance is not None:
            importance = importance[:, :, first:last].unflatten(2, (-1, layout.page_size))
        packed = quantize_packed(pages, layout, calibrated, first, importance)
        codes[:, :, old:new], params[:, :, old:new] = packed
    sinks = max(0, min(layout.sinks - start, tokens))
    exact[:, :, start : start + sinks] = x[:, :, :sinks].to(exact.dtype)
    kept = max(sinks, min(tokens, last - start))
    exact[:, :, exact_row_index(start + kept, start + tokens, layout, x.device)] = x[
        :, :, kept:
    ].to(exact.dtype)
    cursor[0], cursor[1] = start + tokens, new


def find_state_(
    exact: Tensor, pages: Tensor, old: int, layout: Layout, calibrated: Calibrated
) -> None:
    """Write what a cache finds of itself when ``pages`` fill, unless it is there, in place.

    Args:
        exact: Part of the cache.
        pages: Tokens of the pages that fill, ``[B, H, P, N, D]``.
        old: Pages before them.
        layout: The cache's layout.
        calibrated: Its constants.
    """
    if not layout.scheme.state_rows:
        return
    queries, held = layout.queries_of(exact), layout.state_of(exact)
    found = find_state(pages.float(), queries, old, layout, calibrated, exact.dtype)
    known = held[:, :, :1].any(-1, keepdim=True)
    held.copy_(torch.where(known, held, found))


def with_state(calibrated: Calibrated, exact: Tensor, layout: Layout) -> Calibrated:
    """Return constants together with what a cache found of itself, where the layout has that."""
    if not layout.scheme.state_rows:
        return calibrated
    return calibrated._replace(state=layout.state_of(exact).float())


def leaving_pages(
    exact: Tensor, x: Tensor, start: int, old: int, new: int, layout: Layout
) -> Tensor:
    """Return the tokens ``[B, H, new - old, N, D]`` of pages that new tokens ``x`` at ``start`` complete."""
    first, last = layout.sinks + old * layout.page_size, layout.sinks + new * layout.page_size
    rows = exact_row_index(first, max(first, min(start, last)), layout, x.device)
    leaving = torch.cat(
        [exact[:, :, rows], x[:, :, max(0, first - start) : max(0, last - start)]], 2
    )
    return leaving.unflatten(2, (-1, layout.page_size))
