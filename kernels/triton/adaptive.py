"""Drop bits of packed tokens that their target no longer needs, in Triton: an option of QAQ.

Mirrors the specification bit by bit. One program owns a page of a KV head and leaves at once where no token loses a
bit. Rows move in place, without scratch memory. Planes are handled in ascending order, and a whole plane is loaded into
registers before a row of it is written. Planes only move towards the header, so a row is read before it is overwritten.

Runs before the call's own tokens are appended, when the cursor still tells which pages there were.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import Packed, page_room
from kvq_compile.kernels.triton.arguments import (
    HeadWeights,
    at_page,
    bundle_cache,
    bundle_importance,
)
from kvq_compile.kernels.triton.constants import WriteConstants
from kvq_compile.kernels.triton.mixed import HEADER, MAX_BITS, stored_half_range
from kvq_compile.kernels.triton.mixed_write import (
    bound_at,
    needed_bits,
    rank,
    weigh,
    write_header,
    write_zero_rows,
)
from kvq_compile.kernels.triton.residual import plan_write


class Shape(NamedTuple):
    """KV heads and new tokens."""

    heads: Any
    tokens: Any


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
def _requantize_page(page, weights, first, end, CONSTANTS: tl.constexpr):
    """Drop planes of the page that begins at slot ``first``, of a cache whose pages end before ``end``."""
    PAGE: tl.constexpr = CONSTANTS.page_size
    WORDS: tl.constexpr = triton.cdiv(CONSTANTS.head_dim, 16)
    PLANES: tl.constexpr = CONSTANTS.bits
    token = tl.arange(0, PAGE)
    word = tl.arange(0, triton.next_power_of_2(WORDS))[None, :]
    ranks = page.params + CONSTANTS.rank_field * PAGE + token
    order = tl.load(ranks).to(tl.int32)
    held, old_rows = _held(page.codes, order)
    span = stored_half_range(page.params, token, CONSTANTS) * 2.0
    weighted = weigh(span, weights, first, CONSTANTS)
    bits = tl.minimum(held, needed_bits(weighted, bound_at(end, CONSTANTS), CONSTANTS))
    if tl.sum((bits < held).to(tl.int32), 0) > 0:
        tl.debug_barrier()  # the old header has been read
        new_order = rank(bits, CONSTANTS)
        tl.store(ranks, new_order.to(tl.uint8))
        new_rows, used = write_header(page.codes, bits)
        for plane in tl.static_range(PLANES):
            kept = (bits > plane)[:, None] & (word < WORDS)
            old = page.codes + HEADER + (old_rows[plane] + order)[:, None] * WORDS + word
            words = tl.load(old, mask=kept, other=0)
            tl.debug_barrier()
            new = page.codes + HEADER + (new_rows[plane] + new_order)[:, None] * WORDS + word
            tl.store(new, words, mask=kept)
        tl.debug_barrier()
        write_zero_rows(page.codes, used, CONSTANTS)


@triton.jit(do_not_specialize=["start", "capacity"])
def requantize_kernel(
    cache, importance, position, start, capacity, shape, CONSTANTS: tl.constexpr
):  # fmt: skip
    """Drop planes of one page that the call keeps, if the call completes others.

    Grid: (B * Hkv, pages that the call can keep).
    """
    SINKS: tl.constexpr = CONSTANTS.sinks
    PAGE: tl.constexpr = CONSTANTS.page_size
    head, number = tl.program_id(0), tl.program_id(1)
    write = plan_write(cache.cursor, position, start, 0, shape.tokens, capacity, CONSTANTS)
    if write.ok & (write.pages > write.kept) & (number < write.kept):
        page = at_page(cache, head.to(tl.int64), number, capacity, CONSTANTS)
        batch, kv_head = (head // shape.heads).to(tl.int64), (head % shape.heads).to(tl.int64)
        offset = batch * importance.batch + kv_head * importance.head
        weights = HeadWeights(importance.pointer, offset, importance.slots)
        end = SINKS + write.pages * PAGE
        _requantize_page(page, weights, SINKS + number * PAGE, end, CONSTANTS)


def requantize_older_(
    cache: Packed, position: Tensor | None, start: int | None, tokens: int,
    layout: Layout, importance: Tensor | None = None,
) -> None:  # fmt: skip
    """Drop planes of the pages that a call keeps, if it completes others, in place and before it appends.

    Args:
        cache: Codes, parameters, exact rows and cursor before the call, contiguous.
        position: Slots of the call's tokens on the device; or ``None``.
        start: Slot of the first token; or ``None``.
        tokens: How many there are.
        layout: The cache's layout; nothing is done unless it says ``requantize``.
        importance: Importance score of each slot, ``[B, H, >= slots held then]``. If it is ``None`` and the layout
            distributes bits by attention, nothing is done.
    """
    if not layout.requantize or tokens == 0 or (layout.attentive and importance is None):
        return
    (B, H), capacity = cache[2].shape[:2], page_room(cache, layout)
    pages = capacity
    if start is not None:
        if layout.pages_at(start + tokens) == layout.pages_at(start):
            return
        pages = min(capacity, max(0, start - layout.sinks) // layout.page_size)
    if pages == 0:
        return
    requantize_kernel[(B * H, pages)](
        bundle_cache(cache, layout), bundle_importance(importance if layout.attentive else None), position,
        start or 0, capacity, Shape(H, tokens), CONSTANTS=WriteConstants.of(layout),
        enable_fp_fusion=False,
    )  # fmt: skip
