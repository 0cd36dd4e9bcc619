"""Take bits from tokens that attention has moved away from, in Triton.

Mirrors `requantize.requantize_older_`, bit by bit. One program owns a page of a KV head and leaves at once where
no token loses a bit. Rows move in place, without scratch: planes go in ascending order, of each the whole plane
is held in registers before a row of it is written, and no plane begins behind where it began before, so that
nothing is overwritten that is still to be read.

Runs before the call's own tokens are appended, when the cursor still tells which pages there were.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.triton.encode import Constants
from kvq_compile.kernels.triton.exact_rows import plan
from kvq_compile.kernels.triton.quantize_mixed import (
    HEADER,
    MAX_BITS,
    bound_at,
    needed_bits,
    rank,
    stored_reach,
    weigh,
    write_header,
    write_zero_rows,
)


@triton.jit
def _held(codes, order):
    """Return the bits of tokens of rank ``order`` and the first row of each plane."""
    bits = tl.zeros_like(order)
    first_rows = ()
    used = tl.sum(bits, 0)
    for plane in tl.static_range(MAX_BITS):
        tokens = tl.load(codes + plane).to(tl.int32)
        bits += (order < tokens).to(tl.int32)
        first_rows += (used,)  # a tuple that grows
        used += tokens
    return bits, first_rows


@triton.jit
def _requantize_page(codes, records, importance, slots, first, end, LAYOUT: tl.constexpr):
    """Drop planes of the page that begins at slot ``first``, of a cache whose pages end before ``end``."""
    PAGE: tl.constexpr = LAYOUT.page_size
    UNITS: tl.constexpr = LAYOUT.row_units
    PLANES: tl.constexpr = LAYOUT.max_bits
    token = tl.arange(0, PAGE)
    unit = tl.arange(0, triton.next_power_of_2(UNITS))[None, :]
    order = tl.load(records + LAYOUT.rank_field * PAGE + token).to(tl.int32)
    held, old_rows = _held(codes, order)
    weighted = weigh(stored_reach(records, token, LAYOUT) * 2.0, importance, slots, first, LAYOUT)
    bits = tl.minimum(held, needed_bits(weighted, bound_at(end, LAYOUT), LAYOUT))
    if tl.sum((bits < held).to(tl.int32), 0) > 0:
        tl.debug_barrier()  # the old header has been read
        new_order = rank(bits, LAYOUT)
        tl.store(records + LAYOUT.rank_field * PAGE + token, new_order.to(tl.uint8))
        new_rows, used = write_header(codes, bits)
        for plane in tl.static_range(PLANES):
            kept = (bits > plane)[:, None] & (unit < UNITS)
            old = codes + HEADER + (old_rows[plane] + order)[:, None] * UNITS + unit
            words = tl.load(old, mask=kept, other=0)
            tl.debug_barrier()
            new = codes + HEADER + (new_rows[plane] + new_order)[:, None] * UNITS + unit
            tl.store(new, words, mask=kept)
        tl.debug_barrier()
        write_zero_rows(codes, used, LAYOUT)


@triton.jit(do_not_specialize=["start"])
def requantize_kernel(
    codes, parameters, cursor, importance, position, start, tokens, capacity, heads, slots,
    weights_b, weights_h, HAS_POSITION: tl.constexpr, LAYOUT: tl.constexpr,
):  # fmt: skip
    """Drop planes of one page that the call keeps, if the call completes others.

    Grid: (B * Hkv, pages that the call can keep).
    """
    SINKS: tl.constexpr = LAYOUT.sinks
    PAGE: tl.constexpr = LAYOUT.page_size
    head, page = tl.program_id(0), tl.program_id(1)
    _start, old, _cut, new, ok = plan(
        cursor, position, start, tokens, capacity, HAS_POSITION, SINKS, LAYOUT.window, PAGE
    )
    if ok & (new > old) & (page < old):
        slot = head.to(tl.int64) * capacity + page
        if importance is not None:
            importance += (head // heads).to(tl.int64) * weights_b
            importance += (head % heads).to(tl.int64) * weights_h
        _requantize_page(
            codes + slot * LAYOUT.page_words, parameters + slot * LAYOUT.page_params, importance,
            slots, SINKS + page * PAGE, SINKS + new * PAGE, LAYOUT,
        )  # fmt: skip


def requantize_older_(
    codes: Tensor,
    params: Tensor,
    cursor: Tensor,
    position: Tensor | None,
    start: int | None,
    tokens: int,
    layout: Layout,
    importance: Tensor | None = None,
) -> None:
    """Drop planes of the pages that a call keeps, if it completes others, in place and before it appends.

    Args:
        codes, params, cursor: Parts of the cache before the call, contiguous.
        position: Slots of the call's tokens on the device; or ``None``.
        start: Slot of the first of them; or ``None``.
        tokens: How many there are.
        layout: The cache's layout; nothing is done unless it says ``requantize``.
        importance: Weight of each token's error by slot, ``[B, H, >= slots held then]``. Nothing is done where
            the layout distributes bits by attention and there is none.
    """
    B, H, capacity = codes.shape[:3]
    if not layout.requantize or tokens == 0 or (layout.attentive and importance is None):
        return
    pages = capacity
    if start is not None:
        if layout.pages_at(start + tokens) == layout.pages_at(start):
            return
        pages = min(capacity, max(0, start - layout.sinks) // layout.page_size)
    if pages == 0:
        return
    slots, weights_b, weights_h = 0, 0, 0
    if not layout.attentive:
        importance = None
    elif importance is not None:
        importance = importance.float().contiguous()
        slots, (weights_b, weights_h) = importance.shape[2], importance.stride()[:2]
    requantize_kernel[(B * H, pages)](
        codes.view(torch.uint16), params, cursor, importance,
        position, start or 0, tokens, capacity, H, slots, weights_b, weights_h,
        HAS_POSITION=position is not None, LAYOUT=Constants.of(layout), enable_fp_fusion=False,
    )  # fmt: skip
