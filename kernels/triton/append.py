"""Quantize on write: put new tokens into a cache and pack the pages that fill up, in Triton.

The order is that of the specification: a truncated page is dequantized into the ring, full pages are quantized from
ring and new tokens, the new tokens that stay exact overwrite ring rows, and the cursor is written last. One program
owns a page of one KV head, so nothing is written twice.

A page is read twice, first in tiles of groups, then in tiles of packed words. That keeps tiles small for any head
dimension and grouping, and the second read hits the cache. If tokens are transformed before quantization, the
transformed page is written to fp32 scratch memory first and read from there.

Up to a page of new tokens (decoding) take one launch, for keys and values together. Where no page fills, a program
does the same whether or not the cursor has moved, and the first one moves it. Else programs agree on who does by
counting arrivals in the upper bits of the page count, which every program reads through a mask and the last one
clears: no memory besides the cursor, no order between programs. More tokens take three launches a cache, or four where
a cache finds something of itself from its first pages, which all of them then need.

Where tokens go follows from lengths on the device (`residual.plan_write`), and the host never waits for them. It
checks what it knows: the room for pages, when ``start`` is an integer. What it cannot know is guarded: a write that
would leave a gap or does not fit is left out as a whole, cursor included, so that attention at the next position
finds tokens missing and gives NaN. Of ``position`` only the first element is read, where rows have lengths of their own
(`rows`) the first of each: every program then works with the cursor of its row.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import Calibrated, Packed, check_room, page_room
from kvq_compile.kernels.triton import channelwise_write, mixed_write
from kvq_compile.kernels.triton.arguments import (
    HeadWeights,
    at_head,
    at_page,
    bundle_cache,
    bundle_calibration,
    bundle_importance,
    bundle_tensor,
    calibrated_head,
    cursor_of,
    first_positions,
    tail_of,
)
from kvq_compile.kernels.triton.coded_form import Source, ring_row, write_coded_form
from kvq_compile.kernels.triton.constants import WriteConstants
from kvq_compile.kernels.triton.dequantize import store_tokens
from kvq_compile.kernels.triton.pack import pack
from kvq_compile.kernels.triton.residual import (
    ARRIVAL,
    MAX_PAGES,
    plan_write,
    write_queries,
    write_rows,
)
from kvq_compile.kernels.triton.schemes import write_params

MAX_ARRIVALS = (1 << 11) - 1  # in the upper bits of cursor[1]
TILE = 4096  # elements a program holds at once: 32 fp32 registers of each of 128 threads


class Side(NamedTuple):
    """What is written into one cache: its `CacheBundle` and `Calibration`; new tokens and queries (`Strided`), and how
    many of the last new tokens have a known query; scratch memory; `Weights` of tokens.
    """

    cache: Any
    calibration: Any
    new: Any
    query: Any
    known: Any
    scratch: Any
    importance: Any


class Shape(NamedTuple):
    """KV heads, and new tokens."""

    heads: Any
    tokens: Any


# --- pages ----------------------------------------------------------------------------------------


@triton.jit
def _reopen(source, page, calibration, CONSTANTS: tl.constexpr, ROWS: tl.constexpr):
    """Put the tokens before ``start`` of a page back into the ring, as they were read."""
    HEAD_DIM: tl.constexpr = CONSTANTS.head_dim
    for block in range(0, tl.minimum(source.start - source.first, CONSTANTS.page_size), ROWS):
        token = block + tl.arange(0, ROWS)[:, None]
        slot = source.first + token
        row = source.exact + ring_row(slot, CONSTANTS) * HEAD_DIM
        real = (token < CONSTANTS.page_size) & (slot < source.start)
        store_tokens(row, page, calibration, slot, token, real, CONSTANTS)
    tl.debug_barrier()


@triton.jit
def _quantize_page(
    source, page, scratch, calibration, weights, CONSTANTS: tl.constexpr, TILE: tl.constexpr
):
    """Quantize and pack a page."""
    if CONSTANTS.in_coded_form:
        write_coded_form(source, scratch, calibration, CONSTANTS, TILE)
        tl.debug_barrier()
    if CONSTANTS.scheme == "mixed":
        mixed_write.quantize_page(page, scratch, weights, source.first, CONSTANTS, TILE)
    elif CONSTANTS.scheme == "channelwise":
        channelwise_write.quantize_page(source, page, scratch, CONSTANTS, TILE)
    else:
        write_params(source, page, scratch, calibration, CONSTANTS, TILE)
        tl.debug_barrier()
        pack(source, page, scratch, CONSTANTS, TILE)


@triton.jit
def _find_state(
    side, source, scratch, calibration, write, tokens, batch, kv_head, CONSTANTS: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Write queries of a head and then, if a page fills, what the cache finds of itself, which depends on them."""
    write_queries(side.query, source.tail, write, tokens, side.known, batch, kv_head, CONSTANTS)
    tl.debug_barrier()
    if write.pages > write.kept:
        last = CONSTANTS.sinks + (write.pages - 1) * CONSTANTS.page_size
        channelwise_write.find_state(source, last, scratch, calibration.tables, CONSTANTS, TILE)


@triton.jit
def _write_exact(
    side, page, write, tokens, batch, kv_head, CONSTANTS: tl.constexpr, ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
):  # fmt: skip
    """Write the new tokens of a head that stay exact and, with ``QUERIES``, queries."""
    new, stride = at_head(side.new, batch, kv_head), side.new.token
    for row in range(0, tokens, ROWS):
        write_rows(page.exact, new, stride, row, write, tokens, CONSTANTS, ROWS)
    if QUERIES:
        tail = tail_of(page, CONSTANTS)
        write_queries(side.query, tail, write, tokens, side.known, batch, kv_head, CONSTANTS)


@triton.jit
def _fill(
    side, write, capacity, shape, CONSTANTS: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr,
    WHOLE: tl.constexpr,
):  # fmt: skip
    """Pack the page of a program; with ``WHOLE``, write exact rows too, and the cursor if no other program is left."""
    head, number = tl.program_id(0), tl.program_id(1)
    batch, kv_head = (head // shape.heads).to(tl.int64), (head % shape.heads).to(tl.int64)
    importance, cursor = side.importance, cursor_of(side.cache, batch, CONSTANTS)
    index = write.kept + number
    page = at_page(side.cache, head.to(tl.int64), index, capacity, CONSTANTS)
    size: tl.constexpr = CONSTANTS.scratch_size
    scratch = side.scratch + (head.to(tl.int64) * tl.num_programs(1) + number) * size
    tables = calibrated_head(side.calibration, batch, kv_head, CONSTANTS)
    first = CONSTANTS.sinks + index * CONSTANTS.page_size
    new, tail = at_head(side.new, batch, kv_head), tail_of(page, CONSTANTS)
    source = Source(new, side.new.token, page.exact, tail, first, write.start)
    if write.cut & (number == 0):
        _reopen(source, page, tables, CONSTANTS, ROWS)
    FINDS: tl.constexpr = CONSTANTS.bit_rows > 0
    if WHOLE and FINDS:
        _find_state(
            side, source, scratch, tables, write, shape.tokens, batch, kv_head, CONSTANTS, TILE
        )
    if index < write.pages:
        offset = batch * importance.batch + kv_head * importance.head
        weights = HeadWeights(importance.pointer, offset, importance.slots)
        _quantize_page(source, page, scratch, tables, weights, CONSTANTS, TILE)
        tl.debug_barrier()
    if WHOLE:
        _write_exact(
            side, page, write, shape.tokens, batch, kv_head, CONSTANTS, ROWS, QUERIES=not FINDS
        )
        tl.debug_barrier()
        word = tl.atomic_add(cursor + 1, ARRIVAL, sem="acq_rel")
        if word // ARRIVAL == (shape.heads if CONSTANTS.by_row else tl.num_programs(0)) - 1:
            tl.store(cursor + 1, write.pages)
            tl.store(cursor, write.start + shape.tokens)


@triton.jit
def _append(
    side, position, start, capacity, shape, CONSTANTS: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Do for one cache what a program of `append_kernel` does."""
    head = tl.program_id(0)
    batch, kv_head = (head // shape.heads).to(tl.int64), (head % shape.heads).to(tl.int64)
    cursor = cursor_of(side.cache, batch, CONSTANTS)
    write = plan_write(cursor, position, start, batch, shape.tokens, capacity, CONSTANTS)
    if write.ok:
        if WHOLE and write.repeats:
            page = at_page(side.cache, head.to(tl.int64), 0, capacity, CONSTANTS)
            _write_exact(
                side, page, write, shape.tokens, batch, kv_head, CONSTANTS, ROWS, QUERIES=True
            )
            if (kv_head if CONSTANTS.by_row else head) == 0:
                tl.store(cursor, write.start + shape.tokens)
        else:
            _fill(side, write, capacity, shape, CONSTANTS, ROWS, TILE, WHOLE)


# --- kernels --------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["start", "capacity", "other_capacity"])
def append_kernel(
    side, other, position, start, capacity, other_capacity, shape, CONSTANTS: tl.constexpr,
    OTHER: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Pack one full page; with ``WHOLE``, which has one page at most, write exact rows and cursor too.

    Grid: (B * Hkv, pages that the new tokens can fill, caches: one, or two where there is an ``OTHER``).
    """
    if OTHER is None or tl.program_id(2) == 0:
        _append(side, position, start, capacity, shape, CONSTANTS, ROWS, TILE, WHOLE)
    else:
        _append(other, position, start, other_capacity, shape, OTHER, ROWS, TILE, WHOLE)


@triton.jit(do_not_specialize=["start", "capacity"])
def state_kernel(
    side, position, start, capacity, shape, pages, CONSTANTS: tl.constexpr, TILE: tl.constexpr
):
    """Write queries and what a cache finds of itself, before `append_kernel` packs up to ``pages`` pages.

    Grid: (B * Hkv,).
    """
    head = tl.program_id(0).to(tl.int64)
    batch, kv_head = head // shape.heads, head % shape.heads
    cache, new = side.cache, side.new
    cursor = cursor_of(cache, batch, CONSTANTS)
    write = plan_write(cursor, position, start, batch, shape.tokens, capacity, CONSTANTS)
    page = at_page(cache, head, 0, capacity, CONSTANTS)
    first = CONSTANTS.sinks + write.kept * CONSTANTS.page_size
    source = Source(
        at_head(new, batch, kv_head), new.token, page.exact, tail_of(page, CONSTANTS), first,
        write.start,
    )  # fmt: skip
    scratch = side.scratch + head * pages * CONSTANTS.scratch_size
    if write.ok:
        tables = calibrated_head(side.calibration, batch, kv_head, CONSTANTS)
        _find_state(
            side, source, scratch, tables, write, shape.tokens, batch, kv_head, CONSTANTS, TILE
        )


@triton.jit(do_not_specialize=["start", "capacity"])
def rows_kernel(
    side, position, start, capacity, shape, CONSTANTS: tl.constexpr, ROWS: tl.constexpr
):
    """Write the new tokens that stay exact, and queries, after `append_kernel` has read the rows they replace.

    Grid: (B * Hkv, blocks of ``ROWS`` among the tokens that can stay).
    """
    head, block = tl.program_id(0), tl.program_id(1)
    batch, kv_head = (head // shape.heads).to(tl.int64), (head % shape.heads).to(tl.int64)
    cache = side.cache
    cursor = cursor_of(cache, batch, CONSTANTS)
    write = plan_write(cursor, position, start, batch, shape.tokens, capacity, CONSTANTS)
    if write.ok:
        new = at_head(side.new, batch, kv_head)
        page = at_page(cache, head.to(tl.int64), 0, capacity, CONSTANTS)
        write_rows(
            page.exact, new, side.new.token, block * ROWS, write, shape.tokens, CONSTANTS, ROWS
        )
        if (block == 0) & (CONSTANTS.bit_rows == 0):
            tail = tail_of(page, CONSTANTS)
            write_queries(
                side.query, tail, write, shape.tokens, side.known, batch, kv_head, CONSTANTS
            )


@triton.jit(do_not_specialize=["start", "capacity"])
def cursor_kernel(cache, position, start, capacity, tokens, CONSTANTS: tl.constexpr):
    """Move the cursor behind the new tokens.

    Grid: (1,), or, where rows have lengths of their own, (B,).
    """
    cursor = cursor_of(cache, tl.program_id(0), CONSTANTS)
    write = plan_write(cursor, position, start, tl.program_id(0), tokens, capacity, CONSTANTS)
    tl.debug_barrier()
    if write.ok:
        tl.store(cursor, write.start + tokens)
        tl.store(cursor + 1, write.pages)


# --- on the host ----------------------------------------------------------------------------------


def append_(
    cache: Packed, calibrated: Calibrated, x: Tensor, position: Tensor | None,
    start: int | None, layout: Layout, importance: Tensor | None = None,
    query: Tensor | None = None,
) -> None:  # fmt: skip
    """Write new tokens at ``start`` or ``position[0]`` and quantize the pages that they complete, in place.

    Args:
        cache: Codes, parameters, exact rows and cursor, as the layout describes them, contiguous.
        calibrated: Calibration constants.
        x: New tokens, ``[B, H, T, D]``.
        position: Their slots on the device, consecutive, ``[T]`` or ``[B, T]``; or ``None``.
        start: The first slot, or a bound of it where there is ``position``; or ``None``.
        layout: The cache's layout.
        importance: Importance score of each slot, ``[B, H, >= slots held then]``, by which mixed layouts distribute
            bits; ``None``: all are equal.
        query: Queries of the last of the new tokens, ``[B, Hq, T, D]``, for layouts that hold them.

    Raises:
        NotImplementedError: The layout is mixed and has tables.
        ValueError: ``start`` is given and the new tokens do not fit.
    """
    _write((_prepare(cache, calibrated, x, start, layout, importance, query),), position, start)


def append_both_(
    keys: Packed, values: Packed, key_calibrated: Calibrated, value_calibrated: Calibrated,
    key: Tensor, value: Tensor, position: Tensor | None, start: int | None, key_layout: Layout,
    value_layout: Layout, importance: Tensor | None = None, query: Tensor | None = None,
) -> None:  # fmt: skip
    """Write new keys and values as `append_` does, in one launch where they are few; ``query`` is for the keys."""
    writes = (
        _prepare(keys, key_calibrated, key, start, key_layout, importance, query),
        _prepare(values, value_calibrated, value, start, value_layout, importance, None),
    )
    counts_rows = [write.constants.by_row for write in writes]
    alike = writes[0].shape == writes[1].shape and counts_rows[0] is counts_rows[1]
    if all(write.whole for write in writes) and alike:
        _write(writes, position, start)
    else:
        for write in writes:
            _write((write,), position, start)


class Write(NamedTuple):
    """What is launched to write into one cache.

    Attributes:
        side, constants, shape: What kernels take.
        capacity: Pages that the cache has room for.
        heads: KV heads of all sequences.
        pages: Pages that the new tokens can fill.
        rows: New tokens that a program copies at once.
        token_rows: Exact rows of tokens.
        whole: Whether one launch does all.
    """

    side: Side
    constants: WriteConstants
    shape: Shape
    capacity: int
    heads: int
    pages: int
    rows: int
    token_rows: int
    whole: bool


def _prepare(
    cache: Packed, calibrated: Calibrated, x: Tensor, start: int | None, layout: Layout,
    importance: Tensor | None, query: Tensor | None,
) -> Write:  # fmt: skip
    """Return what is to be launched for `append_`, which says what it is given; check it."""
    B, H, tokens, head_dim = x.shape
    constants = WriteConstants.of(layout, cache[3].dim() == 2)
    mixed = constants.scheme == "mixed"
    if mixed and constants.has_tables:
        raise NotImplementedError(
            "tables must be None where tokens differ in bits (mixed): no GPU kernel writes both"
        )
    capacity = page_room(cache, layout)
    # Slots on the device may be any: a cache that grows takes the first of them as a number.
    check_room(cache, layout.token_rows if start is None else start + tokens, layout)
    new = bundle_tensor(x)
    pages = triton.cdiv(tokens, layout.page_size)
    known = 0 if query is None else min(query.shape[2], tokens)
    # Of no queries, none is read.
    queries = new if query is None else bundle_tensor(query[:, :, query.shape[2] - known :])
    rows = min(triton.next_power_of_2(tokens), max(1, TILE // triton.next_power_of_2(head_dim)))
    size = constants.scratch_size
    scratch = x.new_empty(B * H * pages, size, dtype=torch.float32) if size else x
    weights = bundle_importance(importance if mixed and layout.attentive else None)
    side = Side(
        bundle_cache(cache, layout), bundle_calibration(calibrated), new, queries, known, scratch,
        weights,
    )  # fmt: skip
    programs = H if constants.by_row else B * H  # that move a cursor
    whole = pages == 1 and programs <= MAX_ARRIVALS and capacity < MAX_PAGES
    return Write(
        side, constants, Shape(H, tokens), capacity, B * H, pages, rows, layout.token_rows, whole
    )


def _write(writes: tuple[Write, ...], position: Tensor | None, start: int | None) -> None:
    """Launch what writes into one cache, or into two caches of which one launch does all."""
    write, other = writes[0], writes[-1] if len(writes) > 1 else None
    side, constants, shape = write[:3]
    if shape.tokens == 0:
        return
    cursor = side.cache.cursor
    slot = first_positions(position, cursor), start or 0, write.capacity
    if constants.bit_rows and not write.whole:
        state_kernel[(write.heads,)](
            side, *slot, shape, write.pages, CONSTANTS=constants, TILE=TILE, enable_fp_fusion=False
        )
    append_kernel[(write.heads, write.pages, len(writes))](
        side, None if other is None else other.side, *slot, other.capacity if other else 0, shape,
        CONSTANTS=constants, OTHER=None if other is None else other.constants,
        ROWS=min(each.rows for each in writes), TILE=TILE, WHOLE=write.whole, enable_fp_fusion=False,
    )  # fmt: skip
    if not write.whole:
        blocks = triton.cdiv(min(shape.tokens, write.token_rows), write.rows)
        rows_kernel[(write.heads, blocks)](side, *slot, shape, CONSTANTS=constants, ROWS=write.rows)
        moved = cursor.numel() // 2
        cursor_kernel[(moved,)](side.cache, *slot, shape.tokens, CONSTANTS=constants)
