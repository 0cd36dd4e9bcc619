"""Append to, truncate and dequantize a cache on the CPU.

C++ (pages.cpp) gathers the tokens of full pages from the ring and from the new tokens, applies the calibration
constants, and quantizes and packs them; a Hadamard transform in between is a matrix product. Pages are handled in
blocks, so that a long prompt needs little scratch memory. Tokens that stay exact are copied in runs of rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from kvq_compile.kernels.cpu import native
from kvq_compile.kernels.cpu.packed import PackedTensor
from kvq_compile.kernels.cpu.queries import remember_
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import Calibrated, Packed, check_room
from kvq_compile.kernels.transform import rotate

SCRATCH_ELEMENTS = 1 << 19  # fp32 elements quantized or unpacked at once (2 MiB)


def append_(
    cache: Packed,
    calibrated: Calibrated,
    x: Tensor,
    start: int,
    layout: Layout,
    importance: Tensor | None = None,
    query: Tensor | None = None,
) -> None:
    """Write new tokens at ``start`` and quantize the pages that they complete, in place.

    Args:
        cache: The cache.
        calibrated: Calibration constants.
        x: New tokens, ``[B, H, T, D]``.
        start: Slot of the first new token; the cache is first truncated to ``start`` tokens.
        layout: The cache's layout.
        importance: Importance score of each slot, ``[B, H, >= start + T]``, by which mixed layouts distribute bits;
            ``None``: all are equal.
        query: Queries of the last of the new tokens, for layouts that hold them.

    Raises:
        ValueError: ``start`` would leave a gap, or the new tokens do not fit.
    """
    held, pages = cache.cursor.tolist()
    end = start + x.shape[2]
    if not 0 <= start <= held:
        raise ValueError(f"position must start at or before the {held} tokens held, got {start}")
    check_room(cache, end, layout)
    if start < held:
        truncate_(cache, calibrated, start, layout)
        pages = int(cache.cursor[1])
    remember_(cache.exact, query, start, start, x.shape[2], layout)
    filled = max(pages, layout.pages_at(end))
    if filled > pages:
        packed = PackedTensor(cache, layout, calibrated)
        if layout.scheme.state_rows:
            _find_state(packed, slice(pages, filled), x, start)
        _quantize(packed, slice(pages, filled), x, start, importance)
    _write_rows(cache.exact, x, start, layout.sinks + filled * layout.page_size, layout)
    cache.cursor[0] = end
    if filled > pages:
        cache.cursor[1] = filled


def _find_state(packed: PackedTensor, pages: slice, x: Tensor, start: int) -> None:
    """Write what a cache finds of itself from the first and the last page that a call fills, unless it is there."""
    if bool(packed.layout.state_of(packed.parts.exact)[:, :, 0].any(-1).all()):
        return
    ends = (slice(page, page + 1) for page in (pages.start, pages.stop - 1))
    tokens = torch.cat([native.to_coded(packed, end, x, start) for end in ends], 2)
    native.find_state_(packed, pages, tokens)


def _quantize(
    packed: PackedTensor, pages: slice, x: Tensor, start: int, importance: Tensor | None
) -> None:
    """Quantize pages whose tokens are in the ring or, from slot ``start`` on, in ``x``."""
    layout, weights, bounds = packed.layout, None, None
    if layout.attentive and importance is not None:
        weights = importance.float()
    for block in blocks(packed, pages):
        coded = rotate(native.to_coded(packed, block, x, start), layout)
        if layout.scheme.name == "mixed":
            ends = (
                layout.sinks + (page + 1) * layout.page_size
                for page in range(block.start, block.stop)
            )
            at = [layout.bound_at(end) for end in ends]
            bounds = torch.tensor(at, dtype=torch.float32, device="cpu")
        native.quantize_(packed, block.start, coded, weights, bounds)


def _write_rows(exact: Tensor, x: Tensor, start: int, packed_end: int, layout: Layout) -> None:
    """Copy the new tokens that stay exact: sinks, and those after the packed pages."""
    sinks = max(0, min(layout.sinks - start, x.shape[2]))
    if sinks:
        exact[:, :, start : start + sinks] = x[:, :, :sinks]
    first, end = max(start + sinks, packed_end), start + x.shape[2]
    while first < end:
        row = layout.exact_row(first)
        last = min(end, first + layout.token_rows - row)  # the ring wraps around
        exact[:, :, row : row + last - first] = x[:, :, first - start : last - start]
        first = last


def truncate_(cache: Packed, calibrated: Calibrated, length: int, layout: Layout) -> None:
    """Truncate the cache to ``length`` tokens, in place.

    A page that is cut open goes back to the ring as the values it was read as; it is quantized anew when it fills
    again. Forgetting no more than ``window`` tokens never cuts a page.
    """
    held, packed_pages = cache.cursor.tolist()
    pages = min(packed_pages, max(0, length - layout.sinks) // layout.page_size)
    first = layout.sinks + pages * layout.page_size
    if pages < packed_pages and first < length:
        packed = PackedTensor(cache, layout, calibrated)
        page = _tokens(packed, slice(pages, pages + 1))
        _write_rows(cache.exact, page[:, :, : length - first], first, first, layout)
    remember_(cache.exact, None, held, length, 0, layout)
    cache.cursor[0], cache.cursor[1] = length, pages


def read(cache: Packed, calibrated: Calibrated, length: int, layout: Layout) -> Tensor:
    """Return slots ``0 .. length - 1`` as ``[B, H, length, D]`` in the dtype of the exact part.

    Slots that hold no token are zero.
    """
    exact = cache.exact
    out = exact.new_empty(*exact.shape[:2], length, exact.shape[3])
    read_slots(PackedTensor(cache, layout, calibrated), 0, length, out)
    return out


def read_slots(packed: PackedTensor, first: int, last: int, out: Tensor) -> None:
    """Read slots ``first .. last - 1`` into ``out``, ``[B, H, last - first, D]``, as `read` does.

    ``first`` is 0 or where a page begins: ``layout.sinks`` and whole pages.
    """
    layout, exact = packed.layout, packed.parts.exact
    held = max(first, min(last, packed.held))
    sinks = max(first, min(held, layout.sinks))
    out[:, :, : sinks - first] = exact[:, :, first:sinks]
    skipped = max(0, first - layout.sinks) // layout.page_size
    used = min(packed.pages, -(-max(0, held - layout.sinks) // layout.page_size))
    for block in blocks(packed, slice(skipped, used)):
        begin = layout.sinks + block.start * layout.page_size
        end = min(held, layout.sinks + block.stop * layout.page_size)
        out[:, :, begin - first : end - first] = _tokens(packed, block)[:, :, : end - begin]
    slot = max(first, layout.sinks + packed.pages * layout.page_size)
    while slot < held:
        row = layout.exact_row(slot)
        end = min(held, slot + layout.token_rows - row)
        out[:, :, slot - first : end - first] = exact[:, :, row : row + end - slot]
        slot = end
    out[:, :, held - first :] = 0


def _tokens(packed: PackedTensor, pages: slice) -> Tensor:
    """Dequantize pages to tokens ``[B, H, n, D]`` (fp32)."""
    elements = native.unpack(packed, pages, rotated=False)
    if packed.calibrated.tables is None:
        return rotate(elements, packed.layout).flatten(2, 3)
    elements = rotate(elements.contiguous(), packed.layout)
    native.from_coded_(packed, pages.start, elements)
    return elements.flatten(2, 3)


def blocks(packed: PackedTensor, pages: slice) -> Iterator[slice]:
    """Yield runs of pages that fit the scratch memory as fp32."""
    B, H = packed.parts.codes.shape[:2]
    layout = packed.layout
    step = max(1, SCRATCH_ELEMENTS // (max(1, B * H) * layout.page_size * layout.head_dim))
    for first in range(pages.start, pages.stop, step):
        yield slice(first, min(first + step, pages.stop))
