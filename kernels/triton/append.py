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
from kvq_compile.kernels.triton.constants import WriteConstants, first_word, in_thirds, plane_words
from kvq_compile.kernels.triton.dequantize import store_tokens
from kvq_compile.kernels.triton.packing import DIGITS, IN_THIRD, THIRD
from kvq_compile.kernels.triton.residual import (
    ARRIVAL,
    MAX_PAGES,
    plan_write,
    write_queries,
    write_rows,
)
from kvq_compile.kernels.triton.schemes import page_codes, write_params

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
def _row_codes(source, page, scratch, row, index, exists, CONSTANTS: tl.constexpr):
    """Return the codes (int32) of a page's packed rows: tokens of keys, channels of values."""
    if CONSTANTS.role == "key":
        code = page_codes(source, page, scratch, row, index, exists, CONSTANTS)
    else:
        code = page_codes(source, page, scratch, index, row, exists, CONSTANTS)
    return code


@triton.jit
def _pack_plane(
    source, page, scratch, CONSTANTS: tl.constexpr, TILE: tl.constexpr, WIDTH: tl.constexpr
):
    """Write the plane of ``WIDTH`` bits of a page, in tiles in which the fields of a word lie along one axis."""
    SHIFT: tl.constexpr = CONSTANTS.bits & -(2 * WIDTH)  # bits of the planes before it
    LENGTH: tl.constexpr = CONSTANTS.row_length
    FIRST: tl.constexpr = first_word(CONSTANTS, WIDTH)
    WORDS: tl.constexpr = plane_words(CONSTANTS, WIDTH)
    WORDS_PAD: tl.constexpr = triton.next_power_of_2(WORDS)
    ROWS: tl.constexpr = CONSTANTS.page_words // CONSTANTS.row_words
    BLOCK: tl.constexpr = min(
        triton.next_power_of_2(ROWS), max(1, TILE // triton.next_power_of_2(LENGTH))
    )
    field = tl.arange(0, 16 // WIDTH)[None, :, None]
    word = tl.arange(0, WORDS_PAD)[None, None, :]
    for block in range(0, ROWS, BLOCK):
        row = block + tl.arange(0, BLOCK)[:, None, None]
        index = field * WORDS + word
        exists = (row < ROWS) & (word < WORDS) & (field >= 0)
        if WORDS * 16 > LENGTH * WIDTH:  # of what does not exist the code is 0
            exists &= index < LENGTH
        code = _row_codes(source, page, scratch, row, index, exists, CONSTANTS)
        packed = tl.sum(((code >> SHIFT) & ((1 << WIDTH) - 1)) << (field * WIDTH), 1)
        row = block + tl.arange(0, BLOCK)[:, None]
        word_2d = tl.arange(0, WORDS_PAD)[None, :]
        where = page.codes + row * CONSTANTS.row_words + FIRST + word_2d
        tl.store(where, packed.to(tl.uint16), mask=(row < ROWS) & (word_2d < WORDS))


@triton.jit
def _pack_thirds(source, page, scratch, CONSTANTS: tl.constexpr, TILE: tl.constexpr):
    """Write the three thirds of a page's rows, one after the other: five fields of a word, then a bit of the last."""
    WORDS: tl.constexpr = CONSTANTS.row_places // 16
    WORDS_PAD: tl.constexpr = triton.next_power_of_2(WORDS)
    ROWS: tl.constexpr = CONSTANTS.page_words // CONSTANTS.row_words
    BLOCK: tl.constexpr = min(triton.next_power_of_2(ROWS), max(1, TILE // (8 * WORDS_PAD)))
    field = tl.arange(0, 8)[None, :, None]
    word = tl.arange(0, WORDS_PAD)[None, None, :]
    for block in range(0, ROWS, BLOCK):
        row = block + tl.arange(0, BLOCK)[:, None, None]
        row_2d = block + tl.arange(0, BLOCK)[:, None]
        word_2d = tl.arange(0, WORDS_PAD)[None, :]
        where = page.codes + row_2d * CONSTANTS.row_words + word_2d
        for third in range(THIRD):
            index = tl.where(field < IN_THIRD, field + third * IN_THIRD, 15) * WORDS + word
            exists = (row < ROWS) & (word < WORDS) & (field <= IN_THIRD)
            exists &= index < CONSTANTS.row_length
            code = _row_codes(source, page, scratch, row, index, exists, CONSTANTS)
            part = tl.where(field < IN_THIRD, code << field * 3, (code >> third & 1) << 15)
            packed = tl.sum(tl.where(exists, part, 0), 1).to(tl.uint16)
            tl.store(where + third * WORDS, packed, mask=(row_2d < ROWS) & (word_2d < WORDS))


@triton.jit
def _pack_trits(source, page, scratch, CONSTANTS: tl.constexpr, TILE: tl.constexpr):
    """Write the trits of a page, whose rows of bytes end in zeros where a word is not full."""
    BYTES: tl.constexpr = CONSTANTS.row_bytes
    WORDS: tl.constexpr = CONSTANTS.row_words
    WORDS_PAD: tl.constexpr = triton.next_power_of_2(WORDS)
    ROWS: tl.constexpr = CONSTANTS.page_words // WORDS
    BLOCK: tl.constexpr = min(triton.next_power_of_2(ROWS), max(1, TILE // (2 * WORDS_PAD)))
    byte = tl.arange(0, 2 * WORDS_PAD)[None, :]
    word = tl.arange(0, WORDS_PAD)[None, :]
    for block in range(0, ROWS, BLOCK):
        row = block + tl.arange(0, BLOCK)[:, None]
        packed, weight = tl.zeros((BLOCK, 2 * WORDS_PAD), tl.int32), 1
        for digit in range(DIGITS):
            index = digit * BYTES + byte
            exists = (row < ROWS) & (byte < BYTES) & (index < CONSTANTS.row_length)
            code = _row_codes(source, page, scratch, row, index, exists, CONSTANTS)
            packed += code * weight  # of what does not exist the code is 0
            weight *= 3
        low, high = tl.split(tl.reshape(packed, (BLOCK, WORDS_PAD, 2)))
        where = page.codes + row * WORDS + word
        exists = (row < ROWS) & (word < WORDS)
        tl.store(where, (low | (high << 8)).to(tl.uint16), mask=exists)


@triton.jit
def _pack(source, page, scratch, CONSTANTS: tl.constexpr, TILE: tl.constexpr):
    """Write the codes of a page: uniform ones at once, others plane by plane."""
    if CONSTANTS.packing == "trits":
        _pack_trits(source, page, scratch, CONSTANTS, TILE)
    elif in_thirds(CONSTANTS):
        _pack_thirds(source, page, scratch, CONSTANTS, TILE)
    else:
        if CONSTANTS.bits & 8:
            _pack_plane(source, page, scratch, CONSTANTS, TILE, 8)
        if CONSTANTS.bits & 4:
            _pack_plane(source, page, scratch, CONSTANTS, TILE, 4)
        if CONSTANTS.bits & 2:
            _pack_plane(source, page, scratch, CONSTANTS, TILE, 2)
        if CONSTANTS.bits & 1:
            _pack_plane(source, page, scratch, CONSTANTS, TILE, 1)


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
        _pack(source, page, scratch, CONSTANTS, TILE)


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
def _move_cursor(cursor, write, tokens, heads, CONSTANTS: tl.constexpr):
    """Move the cursor of a write that all programs of a cache take part in, or of its row, each once it is done."""
    BY_ROW: tl.constexpr = CONSTANTS.by_row
    if write.repeats:
        if (tl.program_id(0) % heads if BY_ROW else tl.program_id(0)) == 0:
            tl.store(cursor, write.start + tokens)
    else:
        tl.debug_barrier()
        word = tl.atomic_add(cursor + 1, ARRIVAL, sem="acq_rel")
        if word // ARRIVAL == (heads if BY_ROW else tl.num_programs(0)) - 1:
            tl.store(cursor + 1, write.pages)
            tl.store(cursor, write.start + tokens)


@triton.jit
def _append(
    side, position, start, capacity, shape, CONSTANTS: tl.constexpr, ROWS: tl.constexpr,
    TILE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Do for one cache what a program of `append_kernel` does."""
    head, number = tl.program_id(0), tl.program_id(1)
    batch, kv_head = (head // shape.heads).to(tl.int64), (head % shape.heads).to(tl.int64)
    cache, importance = side.cache, side.importance
    cursor = cursor_of(cache, batch, CONSTANTS)
    write = plan_write(cursor, position, start, batch, shape.tokens, capacity, CONSTANTS)
    new = at_head(side.new, batch, kv_head)
    index = write.kept + number
    page = at_page(cache, head.to(tl.int64), index, capacity, CONSTANTS)
    exact = page.exact
    size: tl.constexpr = CONSTANTS.scratch_size
    scratch = side.scratch + (head.to(tl.int64) * tl.num_programs(1) + number) * size
    tables = calibrated_head(side.calibration, batch, kv_head, CONSTANTS)
    first = CONSTANTS.sinks + index * CONSTANTS.page_size
    source = Source(new, side.new.token, exact, tail_of(page, CONSTANTS), first, write.start)
    if write.ok & write.cut & (number == 0):
        _reopen(source, page, tables, CONSTANTS, ROWS)
    if WHOLE and CONSTANTS.bit_rows > 0 and write.ok:
        _find_state(
            side, source, scratch, tables, write, shape.tokens, batch, kv_head, CONSTANTS, TILE
        )
    if write.ok & (index < write.pages):
        offset = batch * importance.batch + kv_head * importance.head
        weights = HeadWeights(importance.pointer, offset, importance.slots)
        _quantize_page(source, page, scratch, tables, weights, CONSTANTS, TILE)
        tl.debug_barrier()
    if WHOLE and write.ok:
        for row in range(0, shape.tokens, ROWS):
            write_rows(exact, new, side.new.token, row, write, shape.tokens, CONSTANTS, ROWS)
        if CONSTANTS.bit_rows == 0:
            write_queries(
                side.query, source.tail, write, shape.tokens, side.known, batch, kv_head, CONSTANTS
            )
        _move_cursor(cursor, write, shape.tokens, shape.heads, CONSTANTS)


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
