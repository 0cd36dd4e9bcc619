"""What kernels take: tensors with their strides, in bundles that a kernel hands on as they are.

Triton specialises each integer in a bundle as it would an argument of its own. What must not be specialised, for it
differs at every step or as a cache grows (``start``, ``mask_width``, ``capacity``), therefore stays outside of bundles.
"""

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import Calibrated
from kvq_compile.kernels.rows import check_positions
from kvq_compile.kernels.triton.constants import section_start


class Strided(NamedTuple):
    """A tensor ``[B, heads, T, D]`` whose channels lie side by side, and its strides in elements."""

    pointer: Any
    batch: Any
    head: Any
    token: Any


class CacheBundle(NamedTuple):
    """A packed cache, or what belongs to one KV head or one page: codes in 16-bit words; parameters, a word for each
    pair of scale and zero point or bytes of metadata; exact rows, and how many of their elements belong to a head;
    the cursor.
    """

    codes: Any
    params: Any
    exact: Any
    exact_head: Any
    cursor: Any


class Calibration(NamedTuple):
    """Calibrated tables of all KV heads or of one, as int32 and, for codebooks, as fp16; the position of slot 0 of
    all sequences or of one; int32 words to a head. ``None`` where the layout has none.
    """

    tables: Any
    book: Any
    shift: Any
    words: Any


class Mask(NamedTuple):
    """An attention mask over query rows and slots, and its strides in elements."""

    pointer: Any
    batch: Any
    head: Any
    token: Any
    slot: Any


class Weights(NamedTuple):
    """Importance ``[B, H, slots]`` of tokens, and its strides; ``None`` as pointer where all weigh the same."""

    pointer: Any
    batch: Any
    head: Any
    slots: Any


class HeadWeights(NamedTuple):
    """`Weights` of one head, ``offset`` elements behind the pointer."""

    pointer: Any
    offset: Any
    slots: Any


MaskKind = Literal[0, 1, 2]  # none, boolean, additive
NO_CALIBRATION = Calibration(None, None, None, 0)
NO_WEIGHTS = Weights(None, 0, 0, 0)


# --- on the host ----------------------------------------------------------------------------------


def bundle_tensor(x: Tensor) -> Strided:
    """Bundle a tensor ``[B, heads, T, D]``; it is copied unless its channels lie side by side."""
    x = x if x.stride(3) == 1 else x.contiguous()
    return Strided(x, *x.stride()[:3])


def bundle_cache(cache: Sequence[Tensor], layout: Layout) -> CacheBundle:
    """Bundle the parts of a cache, which are contiguous."""
    codes, params, exact, cursor = cache[:4]
    rows = exact.shape[2] * exact.shape[3]
    if layout.param_elements == 2:
        pair = torch.uint16 if params.dtype == torch.uint8 else torch.int32
        # Strides of a tensor without elements need not allow a view.
        params = params.view(pair) if params.numel() else params.new_empty(0, dtype=pair)
    return CacheBundle(codes.view(torch.uint16), params, exact, rows, cursor)


def first_positions(position: Tensor | None, cursor: Tensor) -> Tensor | None:
    """Return the slots that kernels read: the first of all new tokens, or of those of each row, ``[B]``.

    Raises:
        ValueError: Rows have positions of their own, and no lengths of their own.
    """
    if position is None or cursor.dim() == 1:
        check_positions(position, cursor)
        return position
    rows = cursor.shape[0]
    first = position[:, 0] if position.dim() == 2 else position[:1].expand(rows)
    return first.contiguous()


def bundle_calibration(calibrated: Calibrated) -> Calibration:
    """Bundle what a cache is coded relative to."""
    if calibrated.tables is None:
        return NO_CALIBRATION
    tables, shift = calibrated.tables.contiguous(), calibrated.shift
    if shift is not None:
        shift = shift.contiguous()
    return Calibration(tables, tables.view(torch.float16), shift, tables.shape[1])


def bundle_importance(importance: Tensor | None) -> Weights:
    """Bundle importance, as fp32 whose slots lie side by side."""
    if importance is None:
        return NO_WEIGHTS
    importance = importance.float()
    if importance.shape[2] == 1:
        # Triton makes a constant of a stride of 1, which no bundle may hold.
        importance = torch.nn.functional.pad(importance, (0, 1))
    if importance.stride(2) != 1:
        importance = importance.contiguous()
    batch, head, _ = importance.stride()
    return Weights(importance, batch, head, importance.shape[2])


def bundle_mask(mask: Tensor | None, shape: torch.Size) -> tuple[Mask, int, MaskKind, bool]:
    """Bundle a mask that broadcasts to ``[B, Hq, T, width]``, for queries of a shape.

    Returns:
        The mask, its width, its kind, and whether all query rows of a sequence share one row of it.
    """
    if mask is None:
        return Mask(None, 0, 0, 0, 0), 0, 0, False
    B, Hq, T, _D = shape
    mask = mask.expand(B, Hq, T, mask.shape[-1])
    shared = mask.stride(1) == 0 and (T == 1 or mask.stride(2) == 0)
    boolean = mask.dtype == torch.bool
    pointer = mask.view(torch.uint8) if boolean else mask
    return Mask(pointer, *mask.stride()), mask.shape[-1], 1 if boolean else 2, shared


# --- in kernels -----------------------------------------------------------------------------------


@triton.jit
def at_head(tensor, batch, head):
    """Return a pointer to one head of a `Strided` tensor; ``batch`` and ``head`` are int64."""
    return tensor.pointer + batch * tensor.batch + head * tensor.head


@triton.jit
def cursor_of(packed, batch, CONSTANTS: tl.constexpr):
    """Return a pointer to the cursor of a sequence."""
    if CONSTANTS.by_row:
        return packed.cursor + batch * 2
    else:
        return packed.cursor


@triton.jit
def first_slot(position, start, batch, CONSTANTS: tl.constexpr):
    """Return the slot of a sequence's first new token: ``start``, or what is on the device if there is ``position``."""
    if position is not None:
        if CONSTANTS.by_row:
            position += batch
        start = tl.load(position).to(tl.int32)
    return start


@triton.jit
def at_page(packed, head, number, capacity, CONSTANTS: tl.constexpr):
    """Return a page of a head (int64) of all heads: codes and parameters from there on, and the head's exact rows."""
    page = head * capacity + number
    return CacheBundle(
        packed.codes + page * CONSTANTS.page_words,
        packed.params + page * CONSTANTS.page_params,
        exact_rows(packed, head),
        packed.exact_head,
        packed.cursor,
    )


@triton.jit
def exact_rows(packed, head):
    """Return a pointer to the exact rows of one head (int64) of all."""
    return packed.exact + head * packed.exact_head


@triton.jit
def tail_of(page, CONSTANTS: tl.constexpr):
    """Return a pointer to the tail of the exact rows of the head that a page of `at_page` belongs to."""
    return page.exact + page.exact_head - CONSTANTS.tail_rows * CONSTANTS.head_dim


@triton.jit
def calibrated_head(calibration, batch, head, CONSTANTS: tl.constexpr):
    """Return what belongs to a sequence and a KV head (int64), as far as the layout has it."""
    tables, book, shift = 0, 0, 0
    if CONSTANTS.has_tables:
        tables = calibration.tables + head * calibration.words
    if CONSTANTS.scheme == "codebook":
        first = head * calibration.words + section_start("codebook", CONSTANTS)
        book = calibration.book + first * 2
    if CONSTANTS.rotary:
        shift = tl.load(calibration.shift + batch)
    return Calibration(tables, book, shift, calibration.words)
