"""Quantize on write: put new tokens into a cache and pack the pages that fill up, in Triton.

Mirrors `reference.append_`, in its order: a page that truncation cut open goes back to the ring,
full pages are quantized from ring and new tokens, then the new tokens that stay exact overwrite
ring rows, and the cursor moves last. One program owns a page of one KV head, so nothing is written
twice.

A page is read twice, in the shape in which its groups lie and then in the shape in which its units
lie. That keeps tiles small for any head dimension and grouping, and the second reading hits a
cache. Where tokens are coded as something other than what they are, that form of the page goes to
fp32 scratch first, and both read it there. A codebook has no parameters; its first reading finds
the entries, which lie in scratch behind the page. Pages whose tokens differ in bits go through scratch
too; what is done with them there is in `quantize_mixed`.

Up to a page of new tokens (decoding) take one launch. Programs then agree on who moves the cursor
by counting arrivals in the upper bits of the page count, which every program reads through a mask
and the last one clears: no memory besides the cursor, no order between programs. More tokens take
three launches.

Where tokens go (`exact_rows`) follows from lengths on the device, and the host never waits for them. It checks
what it knows: the room for pages, when `start` is an integer. What it cannot know is guarded: a
write that would leave a gap or does not fit is left out as a whole, cursor included, so that
attention at the next position finds tokens missing and gives NaN.

Inside the kernel three tuples travel together. A ``source`` is ``x, exact, stride, first, start``:
new tokens from slot ``start`` on, rows of the ring before, and the first slot of the page. A
``page`` is ``codes, params, scratch``, and a ``frame`` ``tables, codebook, shift``, each of one KV
head.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import UNCALIBRATED, Calibrated
from kvq_compile.kernels.triton.encode import (
    DIGITS,
    Constants,
    below,
    bounded,
    coded_value,
    cosine_and_sine,
    encode,
    from_units,
    group_params,
    load_share,
    load_table,
    nearest_centroid,
    params_index,
    section_start,
    to_units,
)
from kvq_compile.kernels.triton.exact_rows import (
    ARRIVAL,
    MAX_PAGES,
    cursor_kernel,
    plan,
    rows_kernel,
    write_queries,
    write_rows,
)
from kvq_compile.kernels.triton.primitives import hadamard
from kvq_compile.kernels.triton.quantize_mixed import mixed_value, quantize_mixed_page

MAX_ARRIVALS = (1 << 11) - 1  # in the upper bits of cursor[1]
TILE = 4096  # elements a program holds at once: 32 fp32 registers of each of 128 threads


@triton.jit
def _read_tokens(source, token, channel, exists, LAYOUT: tl.constexpr):
    """Return channels of the page's tokens ``first + token`` from ring or new tokens, fp32."""
    x, exact, stride, first, start = source
    slot = first + token
    waiting = slot < start
    row = LAYOUT.sinks + (slot - LAYOUT.sinks) % LAYOUT.ring
    where = row * LAYOUT.head_dim + channel
    held = tl.load(exact + where, mask=exists & waiting, other=0.0)
    new = (slot - start).to(tl.int64) * stride
    fresh = tl.load(x + new + channel, mask=exists & (slot >= start), other=0.0)
    return tl.where(waiting, held.to(tl.float32), fresh.to(tl.float32))


@triton.jit
def _turns(slot, half, exists, frame, LAYOUT: tl.constexpr):
    """Return cosine and sine of rotation pairs ``half`` of tokens in ``slot``."""
    tables, _codebook, shift = frame
    return cosine_and_sine((slot + shift) * load_table(tables, half, exists, "frequency", LAYOUT))


@triton.jit
def _reopen(source, page, frame, LAYOUT: tl.constexpr, BLOCK: tl.constexpr):
    """Put the tokens before ``start`` of a page back into the ring, as they were read."""
    HEAD_DIM: tl.constexpr = LAYOUT.head_dim
    _x, exact, _stride, first, start = source
    codes, params, _scratch = page
    tables, codebook, _shift = frame
    # of rotary keys, one of the two channels of a pair
    CHANNELS: tl.constexpr = HEAD_DIM // 2 if LAYOUT.rotary else HEAD_DIM
    channel = tl.arange(0, triton.next_power_of_2(CHANNELS))[None, :]
    for block in range(0, tl.minimum(start - first, LAYOUT.page_size), BLOCK):
        token = block + tl.arange(0, BLOCK)[:, None]
        inside = channel < CHANNELS
        exists = (token < LAYOUT.page_size) & (first + token < start) & inside
        if LAYOUT.coder == "mixed":
            y = mixed_value(codes, params, token, channel, exists, LAYOUT)
        else:
            y = coded_value(codes, params, codebook, token, channel, exists, LAYOUT)
        if LAYOUT.transform == "hadamard":
            y = hadamard(y, HEAD_DIM)
        order = channel
        if LAYOUT.has_tables:
            y = from_units(y, tables, channel, inside, LAYOUT)
            order = load_table(tables, channel, inside, "order", LAYOUT)
        row = exact + (LAYOUT.sinks + (first + token - LAYOUT.sinks) % LAYOUT.ring) * HEAD_DIM
        if LAYOUT.rotary:
            other = channel + CHANNELS
            z = coded_value(codes, params, codebook, token, other, exists, LAYOUT)
            z = from_units(z, tables, other, inside, LAYOUT)
            cosine, sine = _turns(first + token, channel, inside, frame, LAYOUT)
            y, z = y * cosine - z * sine, z * cosine + y * sine
            other = load_table(tables, other, inside, "order", LAYOUT)
            tl.store(row + other, z.to(exact.dtype.element_ty), mask=exists)
        tl.store(row + order, y.to(exact.dtype.element_ty), mask=exists)
    tl.debug_barrier()


@triton.jit
def _write_coded_form(source, scratch, frame, LAYOUT: tl.constexpr, TILE: tl.constexpr):
    """Write the page's tokens to scratch ``[page_size, head_dim]`` in the form in which they are coded."""
    HEAD_DIM: tl.constexpr = LAYOUT.head_dim
    _x, _exact, _stride, first, _start = source
    tables, _codebook, _shift = frame
    # of rotary keys, one of the two channels of a pair
    CHANNELS: tl.constexpr = HEAD_DIM // 2 if LAYOUT.rotary else HEAD_DIM
    channel = tl.arange(0, triton.next_power_of_2(CHANNELS))[None, :]
    ROWS: tl.constexpr = min(LAYOUT.page_size, max(1, TILE // triton.next_power_of_2(HEAD_DIM)))
    for block in range(0, LAYOUT.page_size, ROWS):
        token = block + tl.arange(0, ROWS)[:, None]
        inside = channel < CHANNELS
        exists = (token < LAYOUT.page_size) & inside
        order = channel
        if LAYOUT.has_tables:
            order = load_table(tables, channel, inside, "order", LAYOUT)
        y = _read_tokens(source, token, order, exists, LAYOUT)
        where = scratch + token * HEAD_DIM + channel
        if LAYOUT.rotary:
            other = load_table(tables, channel + CHANNELS, inside, "order", LAYOUT)
            z = _read_tokens(source, token, other, exists, LAYOUT)
            cosine, sine = _turns(first + token, channel, inside, frame, LAYOUT)
            y, z = y * cosine + z * sine, z * cosine - y * sine
            z = to_units(z, tables, channel + CHANNELS, inside, LAYOUT)
            tl.store(where + CHANNELS, z, mask=exists)
        if LAYOUT.has_tables:
            y = to_units(y, tables, channel, inside, LAYOUT)
        if LAYOUT.transform == "hadamard":
            y = hadamard(y, HEAD_DIM)
        tl.store(where, y, mask=exists)


@triton.jit
def _load_coded(source, scratch, token, channel, exists, LAYOUT: tl.constexpr):
    """Return channels of the page's tokens in the form in which they are coded, fp32."""
    if LAYOUT.in_coded_form:
        return tl.load(scratch + token * LAYOUT.head_dim + channel, mask=exists, other=0.0)
    else:
        return _read_tokens(source, token, channel, exists, LAYOUT)


@triton.jit
def _write_params(source, page, frame, LAYOUT: tl.constexpr, TILE: tl.constexpr):
    """Write the parameters of a page, in tiles in which a group lies along one axis."""
    HEAD_DIM: tl.constexpr = LAYOUT.head_dim
    GROUP: tl.constexpr = LAYOUT.group_size
    PAGE: tl.constexpr = LAYOUT.page_size
    _codes, params, scratch = page
    tables, _codebook, _shift = frame
    if LAYOUT.grouping == "channel":
        CHANNELS: tl.constexpr = min(triton.next_power_of_2(HEAD_DIM), max(1, TILE // GROUP))
        blocks: tl.constexpr = triton.cdiv(HEAD_DIM, CHANNELS)
        for block in range(0, PAGE // GROUP * blocks):
            token = block // blocks * GROUP + tl.arange(0, GROUP)[:, None]
            member = block % blocks * CHANNELS + tl.arange(0, CHANNELS)
            channel = member[None, :]
            exists = (token < PAGE) & (channel < HEAD_DIM)
            y = _load_coded(source, scratch, token, channel, exists, LAYOUT)
            share = load_share(tables, member, member < HEAD_DIM, LAYOUT)
            word = group_params(y, exists, share, 0, LAYOUT)
            where = block // blocks * HEAD_DIM + member
            tl.store(params + where, word, mask=member < HEAD_DIM)
    else:
        GROUPS: tl.constexpr = triton.next_power_of_2(HEAD_DIM // GROUP)
        GROUP_PAD: tl.constexpr = triton.next_power_of_2(GROUP)
        TOKENS: tl.constexpr = min(PAGE, max(1, TILE // (GROUPS * GROUP_PAD)))
        group = tl.arange(0, GROUPS)[None, :]
        inside = tl.arange(0, GROUP_PAD)[None, None, :]
        real = group < HEAD_DIM // GROUP
        share = load_share(tables, group * GROUP, real, LAYOUT)
        for block in range(0, PAGE, TOKENS):
            token = block + tl.arange(0, TOKENS)[:, None]
            channel = group[:, :, None] * GROUP + inside
            exists = (token[:, :, None] < PAGE) & (inside < GROUP) & (channel < HEAD_DIM)
            y = _load_coded(source, scratch, token[:, :, None], channel, exists, LAYOUT)
            word = group_params(y, exists, share, 2, LAYOUT)
            tl.store(params + group * PAGE + token, word, mask=(token < PAGE) & real)


@triton.jit
def _write_entries(scratch, codebook, LAYOUT: tl.constexpr, TILE: tl.constexpr):
    """Find the entries of a page and write them to scratch ``[code_channels, page_size]`` behind it."""
    PAGE: tl.constexpr = LAYOUT.page_size
    ENTRIES: tl.constexpr = LAYOUT.levels + 1
    COUPLE: tl.constexpr = LAYOUT.couple
    BLOCK: tl.constexpr = min(ENTRIES, max(1, TILE // PAGE))
    token = tl.arange(0, PAGE)
    for part in range(LAYOUT.code_channels):
        y = ()
        for channel in tl.static_range(COUPLE):
            where = scratch + token * LAYOUT.head_dim + part * COUPLE + channel
            y += (bounded(tl.load(where)),)  # type: ignore[assignment]  # a tuple that grows
        entries = codebook + part * (ENTRIES * COUPLE)
        found = nearest_centroid(y, entries, LAYOUT, BLOCK)
        where = scratch + PAGE * LAYOUT.head_dim + part * PAGE + token
        tl.store(where, found.to(tl.float32))


@triton.jit
def _page_codes(source, page, token, part, exists, LAYOUT: tl.constexpr):
    """Return the codes (int32) of a page, ``part`` counting those of a token."""
    _codes, params, scratch = page
    if LAYOUT.coder == "codebook":
        where = LAYOUT.page_size * LAYOUT.head_dim + part * LAYOUT.page_size + token
        return tl.load(scratch + where, mask=exists, other=0.0).to(tl.int32)
    else:
        y = _load_coded(source, scratch, token, part, exists, LAYOUT)
        word = tl.load(params + params_index(token, part, LAYOUT), mask=exists, other=0)
        return encode(y, word, LAYOUT)


@triton.jit
def _pack_plane(source, page, LAYOUT: tl.constexpr, TILE: tl.constexpr, PLANE: tl.constexpr):
    """Write one bit plane of a page, in tiles in which the fields of a unit lie along one axis."""
    WIDTH: tl.constexpr = LAYOUT.planes[PLANE]
    SHIFT: tl.constexpr = below(LAYOUT.planes, PLANE)
    FIRST: tl.constexpr = below(LAYOUT.plane_units, PLANE)
    UNITS: tl.constexpr = LAYOUT.plane_units[PLANE]
    UNITS_PAD: tl.constexpr = triton.next_power_of_2(UNITS)
    BLOCK: tl.constexpr = min(
        triton.next_power_of_2(LAYOUT.rows),
        max(1, TILE // triton.next_power_of_2(LAYOUT.row_length)),
    )
    field = tl.arange(0, 16 // WIDTH)[None, :, None]
    unit = tl.arange(0, UNITS_PAD)[None, None, :]
    for block in range(0, LAYOUT.rows, BLOCK):
        row = block + tl.arange(0, BLOCK)[:, None, None]
        exists = (row < LAYOUT.rows) & (unit < UNITS) & (field >= 0)
        index = field * UNITS + unit
        if LAYOUT.role == "key":
            code = _page_codes(source, page, row, index, exists, LAYOUT)
        else:
            code = _page_codes(source, page, index, row, exists, LAYOUT)
        words = tl.sum(((code >> SHIFT) & ((1 << WIDTH) - 1)) << (field * WIDTH), 1)
        row = block + tl.arange(0, BLOCK)[:, None]
        unit_2d = tl.arange(0, UNITS_PAD)[None, :]
        where = page[0] + row * LAYOUT.units + FIRST + unit_2d
        tl.store(where, words.to(tl.uint16), mask=(row < LAYOUT.rows) & (unit_2d < UNITS))


@triton.jit
def _pack_trits(source, page, LAYOUT: tl.constexpr, TILE: tl.constexpr):
    """Write the trits of a page, whose rows of bytes end in zeros where a unit is not full."""
    BYTES: tl.constexpr = LAYOUT.row_bytes
    BYTES_PAD: tl.constexpr = triton.next_power_of_2(2 * LAYOUT.units)
    BLOCK: tl.constexpr = min(triton.next_power_of_2(LAYOUT.rows), max(1, TILE // BYTES_PAD))
    byte = tl.arange(0, BYTES_PAD)[None, :]
    for block in range(0, LAYOUT.rows, BLOCK):
        row = block + tl.arange(0, BLOCK)[:, None]
        packed, weight = tl.zeros((BLOCK, BYTES_PAD), tl.int32), 1
        for digit in range(DIGITS):
            index = digit * BYTES + byte
            exists = (row < LAYOUT.rows) & (byte < BYTES) & (index < LAYOUT.row_length)
            if LAYOUT.role == "key":
                code = _page_codes(source, page, row, index, exists, LAYOUT)
            else:
                code = _page_codes(source, page, index, row, exists, LAYOUT)
            packed += code * weight  # of what does not exist the code is 0
            weight *= 3
        where = page[0] + row * (2 * LAYOUT.units) + byte
        exists = (row < LAYOUT.rows) & (byte < 2 * LAYOUT.units)
        tl.store(where, packed.to(tl.uint8), mask=exists)


@triton.jit
def _quantize_page(source, page, frame, weights, LAYOUT: tl.constexpr, TILE: tl.constexpr):
    """Quantize and pack a page."""
    if LAYOUT.in_coded_form:
        _write_coded_form(source, page[2], frame, LAYOUT, TILE)
        tl.debug_barrier()
    if LAYOUT.coder == "mixed":
        quantize_mixed_page(*page, *weights, source[3], LAYOUT, TILE)
    else:
        _quantize_uniformly(source, page, frame, LAYOUT, TILE)


@triton.jit
def _quantize_uniformly(source, page, frame, LAYOUT: tl.constexpr, TILE: tl.constexpr):
    """Quantize and pack a page whose codes all have the same width."""
    _tables, codebook, _shift = frame
    if LAYOUT.coder == "codebook":
        _write_entries(page[2], codebook, LAYOUT, TILE)
    else:
        _write_params(source, page, frame, LAYOUT, TILE)
    tl.debug_barrier()
    if LAYOUT.packing == "trits":
        _pack_trits(source, page, LAYOUT, TILE)
    else:
        for plane in tl.static_range(len(LAYOUT.planes)):
            _pack_plane(source, page, LAYOUT, TILE, plane)


@triton.jit(do_not_specialize=["start"])
def append_kernel(
    codes, parameters, exact, cursor, x, query, scratch, importance, tables, books, shift, position,
    start, tokens, capacity, known, heads, slots, weights_b, weights_h, table_words, stride_b,
    stride_h, stride_t, q_b, q_h, q_t, HAS_POSITION: tl.constexpr, LAYOUT: tl.constexpr,
    ROWS: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Pack one full page; with ``WHOLE``, which has one page at most, write exact rows and cursor
    too. (Triton's launcher cannot take an argument that is named ``params``.)

    Grid: (B * Hkv, pages that ``tokens`` can fill).
    """
    SINKS: tl.constexpr = LAYOUT.sinks
    PAGE: tl.constexpr = LAYOUT.page_size
    head, number = tl.program_id(0), tl.program_id(1)
    batch, kv_head = head // heads, head % heads
    start, old, cut, new, ok = plan(
        cursor, position, start, tokens, capacity, HAS_POSITION, SINKS, LAYOUT.window, PAGE
    )
    x += batch.to(tl.int64) * stride_b + kv_head.to(tl.int64) * stride_h
    exact += head.to(tl.int64) * (LAYOUT.exact_rows * LAYOUT.head_dim)
    slot = head.to(tl.int64) * capacity + old + number
    codes += slot * LAYOUT.page_words
    parameters += slot * LAYOUT.page_params
    scratch += (head.to(tl.int64) * tl.num_programs(1) + number) * LAYOUT.scratch_numbers
    if LAYOUT.has_tables:
        tables += kv_head.to(tl.int64) * table_words
        books += (kv_head.to(tl.int64) * table_words + section_start("codebook", LAYOUT)) * 2
    moved = tl.load(shift + batch) if LAYOUT.rotary else 0
    if importance is not None:
        importance += batch.to(tl.int64) * weights_b + kv_head.to(tl.int64) * weights_h
    source = (x, exact, stride_t, SINKS + (old + number) * PAGE, start)
    page, frame = (codes, parameters, scratch), (tables, books, moved)
    if ok & cut & (number == 0):
        _reopen(source, page, frame, LAYOUT, ROWS)
    if ok & (old + number < new):
        _quantize_page(source, page, frame, (importance, slots), LAYOUT, TILE)
        tl.debug_barrier()
    if WHOLE:
        if ok:
            for row in range(0, tokens, ROWS):
                write_rows(
                    exact, x, stride_t, row, start, tokens, SINKS + new * PAGE, LAYOUT.head_dim,
                    SINKS, LAYOUT.ring, ROWS,
                )  # fmt: skip
            write_queries(
                query, exact, cursor, start, tokens, known, head.to(tl.int64), heads, q_b, q_h, q_t,
                LAYOUT,
            )  # fmt: skip
        tl.debug_barrier()
        word = tl.atomic_add(cursor + 1, ARRIVAL, sem="acq_rel")
        if word // ARRIVAL == tl.num_programs(0) - 1:
            tl.store(cursor + 1, tl.where(ok, new, word % ARRIVAL))
            if ok:
                tl.store(cursor, start + tokens)


def _frame_arguments(frame: Calibrated, unused: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    if frame.tables is None:
        return unused, unused, unused
    tables = frame.tables.contiguous()
    shift = unused if frame.shift is None else frame.shift.contiguous()
    return tables, tables.view(torch.float16), shift


def _params_word(layout: Layout) -> torch.dtype:
    if layout.coder == "mixed":
        return torch.uint8
    return torch.uint16 if layout.params == "fp8" else torch.int32


def append_(
    codes: Tensor,
    params: Tensor,
    exact: Tensor,
    cursor: Tensor,
    x: Tensor,
    position: Tensor | None,
    start: int | None,
    layout: Layout,
    frame: Calibrated = UNCALIBRATED,
    importance: Tensor | None = None,
    query: Tensor | None = None,
) -> None:
    """Write new tokens at ``start`` or ``position[0]`` and quantize the pages that they complete,
    in place.

    Args:
        codes, params, exact, cursor: The cache, as `Layout` describes it, contiguous.
        x: New tokens, ``[B, H, T, D]``.
        position: Their slots on the device, one behind the other; or ``None``.
        start: The first slot; or ``None``.
        layout: The cache's layout.
        frame: What packed tokens are coded relative to, where the layout has tables.
        importance: Weight of each token's error by slot, ``[B, H, >= slots held then]``, which mixed layouts
            distribute bits by; ``None``: all weigh the same.
        query: Queries of the last of the new tokens, ``[B, Hq, T, D]``, for layouts that hold them.

    Raises:
        NotImplementedError: The layout is mixed and has tables.
        ValueError: ``start`` is given and the new tokens do not fit.
    """
    B, H, tokens, head_dim = x.shape
    if layout.coder == "mixed" and layout.has_tables:
        raise NotImplementedError(
            "tables must be None where tokens differ in bits (mixed): no GPU kernel writes both"
        )
    capacity = codes.shape[2]
    if start is not None and layout.pages_at(start + tokens) > capacity:
        pages = layout.pages_at(start + tokens)
        raise ValueError(f"the cache must have room for {pages} pages, got {capacity}")
    if tokens == 0:
        return
    if x.stride(3) != 1:
        x = x.contiguous()
    pages = triton.cdiv(tokens, layout.page_size)
    whole = pages == 1 and B * H <= MAX_ARRIVALS and capacity < MAX_PAGES
    known = 0 if query is None else min(query.shape[2], tokens)
    query = x if query is None else query[:, :, query.shape[2] - known :]  # of none, none is read
    if query.stride(3) != 1:
        query = query.contiguous()
    where = (position, start or 0, tokens, capacity)
    rows = min(triton.next_power_of_2(tokens), max(1, TILE // triton.next_power_of_2(head_dim)))
    constants = Constants.of(layout)
    numbers = constants.scratch_numbers
    scratch = x.new_empty(B * H * pages, numbers, dtype=torch.float32) if numbers else x
    if layout.coder != "mixed" or not layout.attentive:
        importance = None
    slots, weights_b, weights_h = 0, 0, 0
    if importance is not None:
        importance = importance.float()
        if importance.stride(2) != 1:
            importance = importance.contiguous()
        slots, (weights_b, weights_h) = importance.shape[2], importance.stride()[:2]
    append_kernel[(B * H, pages)](
        codes.view(torch.uint8 if layout.packing == "trits" else torch.uint16),
        params.view(_params_word(layout)), exact, cursor, x, query, scratch, importance,
        *_frame_arguments(frame, cursor), *where, known, H, slots, weights_b, weights_h,
        0 if frame.tables is None else frame.tables.shape[1], *x.stride()[:3], *query.stride()[:3],
        HAS_POSITION=position is not None, LAYOUT=constants, ROWS=rows, TILE=TILE,
        WHOLE=whole, enable_fp_fusion=False,
    )  # fmt: skip
    if not whole:
        has_position = position is not None
        blocks = triton.cdiv(min(tokens, layout.token_rows), rows)
        rows_kernel[(B * H, blocks)](
            exact, cursor, x, query, *where, known, H, *x.stride()[:3], *query.stride()[:3],
            HAS_POSITION=has_position, LAYOUT=constants, ROWS=rows,
        )  # fmt: skip
        cursor_kernel[(1,)](
            cursor, *where, HAS_POSITION=has_position, SINKS=layout.sinks, WINDOW=layout.window,
            PAGE=layout.page_size,
        )  # fmt: skip
