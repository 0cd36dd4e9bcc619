"""Dequantize packed pages to tokens, in Triton, bit by bit as in the specification.

Attention of few tokens has its own, faster code in low precision (`pages`, `mixed`). This is for other readers of a
cache, for attention of many tokens (`many_queries`) and for truncated pages.
"""

import triton
import triton.language as tl
from torch import Tensor

from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import Calibrated, Packed, page_room
from kvq_compile.kernels.triton.arguments import (
    at_page,
    bundle_cache,
    bundle_calibration,
    calibrated_head,
    cursor_of,
    exact_rows,
    tail_of,
)
from kvq_compile.kernels.triton.coded_form import ring_row
from kvq_compile.kernels.triton.constants import ReadConstants
from kvq_compile.kernels.triton.schemes import load_elements
from kvq_compile.kernels.triton.transforms import (
    denormalize,
    hadamard,
    load_table,
    rotary_angle,
    rotated_mean,
)

TILE = 4096  # elements a program holds at once


@triton.jit
def store_tokens(rows, page, calibration, slot, token, real, CONSTANTS: tl.constexpr):
    """Store tokens of a page as the model has them.

    ``rows`` points to where they go, ``slot`` and ``token`` say where they are in the cache and in the page, ``real``
    which of them there are: all ``[tokens, 1]``.
    """
    HEAD_DIM: tl.constexpr = CONSTANTS.head_dim
    tables, book = calibration.tables, calibration.book
    # of rotary keys, one of the two channels of a pair
    CHANNELS: tl.constexpr = HEAD_DIM // 2 if CONSTANTS.rotary else HEAD_DIM
    channel = tl.arange(0, triton.next_power_of_2(CHANNELS))[None, :]
    inside = channel < CHANNELS
    exists = real & inside
    y = load_elements(page, book, token, channel, exists, CONSTANTS)
    if CONSTANTS.transform == "hadamard":
        y = hadamard(y, HEAD_DIM)
    if CONSTANTS.takes_mean:
        y = y + rotated_mean(tail_of(page, CONSTANTS), slot, channel, inside, tables, CONSTANTS)
    order = channel
    if CONSTANTS.has_tables:
        y = denormalize(y, tables, channel, inside, CONSTANTS)
        order = load_table(tables, channel, inside, "order", CONSTANTS)
    if CONSTANTS.rotary:
        other = channel + CHANNELS
        z = load_elements(page, book, token, other, exists, CONSTANTS)
        z = denormalize(z, tables, other, inside, CONSTANTS)
        cosine, sine = rotary_angle(slot, channel, inside, calibration, CONSTANTS)
        y, z = y * cosine - z * sine, z * cosine + y * sine
        other = load_table(tables, other, inside, "order", CONSTANTS)
        tl.store(rows + other, z.to(rows.dtype.element_ty), mask=exists)
    tl.store(rows + order, y.to(rows.dtype.element_ty), mask=exists)


@triton.jit(do_not_specialize=["first", "skipped", "blocks", "capacity", "last"])
def dequantize_kernel(
    cache, calibration, out, first, skipped, blocks, heads, capacity, last, CONSTANTS: tl.constexpr,
    ROWS: tl.constexpr,
):  # fmt: skip
    """Read a block of slots, which lie in one page's place or are sinks; zeros for slots that hold no token.

    Grid: (B * Hkv * ``blocks``,): of sinks, then page_size / ROWS of each page that slots before ``last`` can have,
    without the ``skipped`` blocks of slots before ``first``.
    """
    HEAD_DIM: tl.constexpr = CONSTANTS.head_dim
    SINKS: tl.constexpr = CONSTANTS.sinks
    PAGE: tl.constexpr = CONSTANTS.page_size
    SINK_BLOCKS: tl.constexpr = triton.cdiv(SINKS, ROWS)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    block = tl.program_id(0) % blocks + skipped
    number = (block - SINK_BLOCKS) // (PAGE // ROWS)
    token = (block - SINK_BLOCKS) % (PAGE // ROWS) * ROWS + tl.arange(0, ROWS)[:, None]
    slot = SINKS + number * PAGE + token
    wanted = slot < last
    if block < SINK_BLOCKS:
        slot = block * ROWS + tl.arange(0, ROWS)[:, None]
        wanted = (slot < last) & (slot < SINKS)
    cursor = cursor_of(cache, head // heads, CONSTANTS)
    kv_len = tl.load(cursor)
    row = out + (head * (last - first) + slot - first) * HEAD_DIM
    if (block >= SINK_BLOCKS) & (number < tl.minimum(tl.load(cursor + 1), capacity)):
        page = at_page(cache, head, number, capacity, CONSTANTS)
        tables = calibrated_head(calibration, head // heads, head % heads, CONSTANTS)
        held = wanted & (slot < kv_len)
        store_tokens(row, page, tables, slot, token, held, CONSTANTS)
        wanted = wanted & (slot >= kv_len)
    channel = tl.arange(0, triton.next_power_of_2(HEAD_DIM))[None, :]
    exists = wanted & (channel < HEAD_DIM)
    exact = tl.where(slot < SINKS, slot, ring_row(tl.maximum(slot, SINKS), CONSTANTS))
    exact = exact_rows(cache, head) + exact * HEAD_DIM + channel
    x = tl.load(exact, mask=exists & (slot < kv_len), other=0.0)
    tl.store(row + channel, x.to(out.dtype.element_ty), mask=exists)


def dequantize(cache: Packed, calibrated: Calibrated, length: int, layout: Layout) -> Tensor:
    """Return slots ``0 .. length - 1`` as ``[B, H, length, D]`` in the dtype of exact rows, zeros without a token.

    Args:
        cache: Codes, parameters, exact rows and cursor, as the layout describes them.
        calibrated: Calibration constants.
        length: Slots to read.
        layout: The cache's layout.
    """
    out = cache[2].new_empty(*cache[2].shape[:2], length, layout.head_dim)
    read_slots(cache, calibrated, layout, 0, length, out)
    return out


def read_slots(
    cache: Packed, calibrated: Calibrated, layout: Layout, first: int, last: int, out: Tensor
) -> None:
    """Read slots ``first .. last - 1`` into ``out``, contiguous ``[B, H, last - first, D]``, as `dequantize` does.

    ``first`` is 0 or where a page begins: ``layout.sinks`` and whole pages.
    """
    if last == first:
        return
    constants = ReadConstants.of(layout, cache[3].dim() == 2)
    (B, H), capacity = cache[2].shape[:2], page_room(cache, layout)
    page = constants.page_size
    rows = min(page, max(1, TILE // triton.next_power_of_2(layout.head_dim)))
    sinks, pages = triton.cdiv(layout.sinks, rows), triton.cdiv(max(0, last - layout.sinks), page)
    skipped = 0 if first == 0 else sinks + (first - layout.sinks) // page * (page // rows)
    blocks = sinks + pages * (page // rows) - skipped
    dequantize_kernel[(B * H * blocks,)](
        bundle_cache([part.contiguous() for part in cache], layout), bundle_calibration(calibrated), out,
        first, skipped, blocks, H, capacity, last, CONSTANTS=constants, ROWS=rows, enable_fp_fusion=False,
    )  # fmt: skip
