"""Quantize on write: put new tokens into a cache and pack the pages that fill up, in Triton.

Mirrors `reference.append_`, in its order: a page that truncation cut open goes back to the ring,
full pages are quantized from ring and new tokens, then the new tokens that stay exact overwrite
ring rows, and the cursor moves last. One program owns a page of one KV head, so nothing is written
twice.

A page is read twice, in the shape in which its groups lie and then in the shape in which its units
lie. That keeps tiles small for any head dimension and grouping, and the second reading hits a
cache. Rotated pages go through fp32 scratch between the two.

Up to a page of new tokens (decoding) take one launch. Programs then agree on who moves the cursor
by counting arrivals in the upper bits of the page count, which every program reads through a mask
and the last one clears: no memory besides the cursor, no order between programs. More tokens take
three launches.

Where tokens go follows from lengths on the device, and the host never waits for them. It checks
what it knows: the room for pages, when `start` is an integer. What it cannot know is guarded: a
write that would leave a gap or does not fit is left out as a whole, cursor included, so that
attention at the next position finds tokens missing and gives NaN.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvq_compile.kernels.primitives import hadamard, join_params, split_params
from kvq_compile.kernels.frame import Frame
from kvq_compile.kernels.spec import PageLayout

MAX_PAGES = 1 << 20  # the lower 20 bits of cursor[1]; the other 11 count programs
MAX_ARRIVALS = (1 << 11) - 1
ARRIVAL = tl.constexpr(MAX_PAGES)
TILE = 4096  # elements a program holds at once: 32 fp32 registers of each of 128 threads
FP16_MAX = tl.constexpr(65504.0)


@triton.jit
def _plan(
    cursor, position, start, tokens, capacity, HAS_POSITION: tl.constexpr, SINKS: tl.constexpr,
    WINDOW: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Return ``start``, pages kept, whether the page behind them is cut open, pages after,
    validity."""
    held = tl.load(cursor)
    pages = tl.load(cursor + 1) % ARRIVAL
    if HAS_POSITION:
        start = tl.load(position).to(tl.int32)
    whole = tl.maximum(start - SINKS, 0) // PAGE
    old = tl.where(start < held, tl.minimum(pages, whole), pages)
    new = tl.maximum(old, tl.maximum(start + tokens - SINKS - WINDOW, 0) // PAGE)
    return start, old, old < pages, new, (start >= 0) & (start <= held) & (new <= capacity)


@triton.jit
def _group_params(x, exists, AXIS: tl.constexpr, LEVELS: tl.constexpr, MARGIN: tl.constexpr):
    """Return the parameters, as words, of groups that lie along ``AXIS`` of ``x`` (fp32)."""
    finite = exists & (tl.abs(x) < float("inf"))
    bounded = tl.minimum(tl.maximum(x, -FP16_MAX), FP16_MAX)
    lo = tl.min(tl.where(finite, bounded, float("inf")), AXIS)
    hi = tl.max(tl.where(finite, bounded, float("-inf")), AXIS)
    hi = tl.where(lo == float("inf"), 0.0, hi)
    lo = tl.where(lo == float("inf"), 0.0, lo)
    if MARGIN > 0:
        margin = (hi - lo) * MARGIN
        lo, hi = lo + margin, hi - margin
    zero = lo.to(tl.float16)  # rounded down
    bits = zero.to(tl.int16, bitcast=True)
    below = tl.where(zero > 0, bits - 1, bits + 1).to(tl.int16).to(tl.float16, bitcast=True)
    zero = tl.where(zero.to(tl.float32) > lo, below, zero)
    step = hi - zero.to(tl.float32)
    step = tl.minimum(tl.div_rn(step, tl.full(step.shape, LEVELS, tl.float32)), FP16_MAX)
    scale = step.to(tl.float16)  # rounded up
    above = (scale.to(tl.int16, bitcast=True) + 1).to(tl.int16).to(tl.float16, bitcast=True)
    scale = tl.where(scale.to(tl.float32) < step, above, scale)
    return join_params(scale, zero)


@triton.jit
def _encode(x, word, LEVELS: tl.constexpr):
    """Return the codes (int32) of ``x`` (fp32) in groups with parameters ``word``."""
    scale, zero = split_params(word)
    scale, zero = scale.to(tl.float32), zero.to(tl.float32)
    x = tl.where(x == x, tl.minimum(tl.maximum(x, -FP16_MAX), FP16_MAX), 0.0)
    codes = tl.floor(tl.div_rn(x - zero, tl.where(scale > 0, scale, 1.0)) + 0.5)
    return tl.where(scale > 0, tl.minimum(tl.maximum(codes, 0.0), LEVELS), 0.0).to(tl.int32)


@triton.jit
def _read_tokens(
    x, exact, stride, first, start, token, channel, exists, HEAD_DIM: tl.constexpr,
    SINKS: tl.constexpr, RING: tl.constexpr,
):  # fmt: skip
    """Return channels of the page's tokens ``first + token`` from ring or new tokens, fp32."""
    slot = first + token
    waiting = slot < start
    row = SINKS + (slot - SINKS) % RING
    held = tl.load(exact + row * HEAD_DIM + channel, mask=exists & waiting, other=0.0)
    new = (slot - start).to(tl.int64) * stride
    fresh = tl.load(x + new + channel, mask=exists & (slot >= start), other=0.0)
    return tl.where(waiting, held.to(tl.float32), fresh.to(tl.float32))


@triton.jit
def _params_index(
    token,
    channel,
    HEAD_DIM: tl.constexpr,
    PAGE: tl.constexpr,
    CHANNEL: tl.constexpr,
    GROUP: tl.constexpr,
):
    if CHANNEL:
        index = (token // GROUP) * HEAD_DIM + channel
    else:
        index = (channel // GROUP) * PAGE + token
    return index


@triton.jit
def _reopen(
    codes, params, exact, first, start, HEAD_DIM: tl.constexpr, BITS: tl.constexpr,
    KEY: tl.constexpr, CHANNEL: tl.constexpr, GROUP: tl.constexpr, ROTATE: tl.constexpr,
    SINKS: tl.constexpr, RING: tl.constexpr, PAGE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Put the tokens before ``start`` of a page back into the ring, as they were read."""
    BLOCK_D: tl.constexpr = triton.next_power_of_2(HEAD_DIM)
    LENGTH: tl.constexpr = HEAD_DIM if KEY else PAGE
    WIDTH: tl.constexpr = 2 if BITS == 3 else BITS
    UNITS: tl.constexpr = LENGTH * WIDTH // 16
    channel = tl.arange(0, BLOCK_D)[None, :]
    for block in range(0, tl.minimum(start - first, PAGE), BLOCK):
        token = block + tl.arange(0, BLOCK)[:, None]
        exists = (token < PAGE) & (first + token < start) & (channel < HEAD_DIM)
        row = token if KEY else channel
        index = channel if KEY else token
        where = row * (LENGTH * BITS // 16) + index % UNITS
        code = tl.load(codes + where, mask=exists, other=0).to(tl.int32) >> (index // UNITS * WIDTH)
        code = code & ((1 << WIDTH) - 1)
        if BITS == 3:
            where = row * (LENGTH * BITS // 16) + UNITS + index % (UNITS // 2)
            high = tl.load(codes + where, mask=exists, other=0).to(tl.int32) >> (
                index // (UNITS // 2)
            )
            code += (high & 1) << 2
        where = _params_index(token, channel, HEAD_DIM, PAGE, CHANNEL, GROUP)
        scale, zero = split_params(tl.load(params + where, mask=exists, other=0))
        x = code.to(tl.float32) * scale.to(tl.float32) + zero.to(tl.float32)
        if ROTATE:
            x = hadamard(x, HEAD_DIM)
        row = SINKS + (first + token - SINKS) % RING
        tl.store(exact + row * HEAD_DIM + channel, x.to(exact.dtype.element_ty), mask=exists)
    tl.debug_barrier()


@triton.jit
def _rotate_page(
    x, exact, scratch, stride, first, start, HEAD_DIM: tl.constexpr, SINKS: tl.constexpr,
    RING: tl.constexpr, PAGE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Write the page's tokens, rotated, to fp32 scratch."""
    BLOCK_D: tl.constexpr = triton.next_power_of_2(HEAD_DIM)
    ROWS: tl.constexpr = min(PAGE, max(1, TILE // BLOCK_D))
    channel = tl.arange(0, BLOCK_D)[None, :]
    for block in range(0, PAGE, ROWS):
        token = block + tl.arange(0, ROWS)[:, None]
        exists = (token < PAGE) & (channel < HEAD_DIM)
        y = _read_tokens(
            x, exact, stride, first, start, token, channel, exists, HEAD_DIM, SINKS, RING
        )
        tl.store(scratch + token * HEAD_DIM + channel, hadamard(y, HEAD_DIM), mask=exists)


@triton.jit
def _pack_plane(
    codes, params, exact, x, scratch, stride, first, start, HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr, KEY: tl.constexpr, CHANNEL: tl.constexpr, GROUP: tl.constexpr,
    ROTATE: tl.constexpr, SINKS: tl.constexpr, RING: tl.constexpr, PAGE: tl.constexpr,
    TILE: tl.constexpr, PLANE: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Write one bit plane of a page, in tiles in which the fields of a unit lie along one axis."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    LENGTH: tl.constexpr = HEAD_DIM if KEY else PAGE
    ALL_ROWS: tl.constexpr = PAGE if KEY else HEAD_DIM
    UNITS: tl.constexpr = LENGTH * WIDTH // 16
    UNITS_PAD: tl.constexpr = triton.next_power_of_2(UNITS)
    BLOCK: tl.constexpr = min(
        triton.next_power_of_2(ALL_ROWS), max(1, TILE // triton.next_power_of_2(LENGTH))
    )
    field = tl.arange(0, 16 // WIDTH)[None, :, None]
    unit = tl.arange(0, UNITS_PAD)[None, None, :]
    for block in range(0, ALL_ROWS, BLOCK):
        row = block + tl.arange(0, BLOCK)[:, None, None]
        exists = (row < ALL_ROWS) & (unit < UNITS) & (field >= 0)
        index = field * UNITS + unit
        token = row if KEY else index
        channel = index if KEY else row
        if ROTATE:
            y = tl.load(scratch + token * HEAD_DIM + channel, mask=exists, other=0.0)
        else:
            y = _read_tokens(
                x, exact, stride, first, start, token, channel, exists, HEAD_DIM, SINKS, RING
            )
        where = _params_index(token, channel, HEAD_DIM, PAGE, CHANNEL, GROUP)
        code = _encode(y, tl.load(params + where, mask=exists, other=0), LEVELS)
        words = tl.sum(((code >> (2 * PLANE)) & ((1 << WIDTH) - 1)) << (field * WIDTH), 1)
        row = block + tl.arange(0, BLOCK)[:, None]
        unit_2d = tl.arange(0, UNITS_PAD)[None, :]
        where = row * (LENGTH * BITS // 16) + PLANE * (LENGTH // 8) + unit_2d
        tl.store(codes + where, words.to(tl.uint16), mask=(row < ALL_ROWS) & (unit_2d < UNITS))


@triton.jit
def _quantize_page(
    codes, params, exact, x, scratch, stride, first, start, HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr, KEY: tl.constexpr, CHANNEL: tl.constexpr, GROUP: tl.constexpr,
    MARGIN: tl.constexpr, ROTATE: tl.constexpr, SINKS: tl.constexpr, RING: tl.constexpr,
    PAGE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Quantize and pack the page of tokens from ``first`` on."""
    LEVELS: tl.constexpr = (1 << BITS) - 1
    if ROTATE:
        _rotate_page(x, exact, scratch, stride, first, start, HEAD_DIM, SINKS, RING, PAGE, TILE)
        tl.debug_barrier()

    # Parameters: tiles in which a group lies along one axis.
    if CHANNEL:
        CHANNELS: tl.constexpr = min(triton.next_power_of_2(HEAD_DIM), max(1, TILE // GROUP))
        blocks: tl.constexpr = triton.cdiv(HEAD_DIM, CHANNELS)
        for block in range(0, PAGE // GROUP * blocks):
            token = block // blocks * GROUP + tl.arange(0, GROUP)[:, None]
            channel = block % blocks * CHANNELS + tl.arange(0, CHANNELS)[None, :]
            exists = (token < PAGE) & (channel < HEAD_DIM)
            if ROTATE:
                y = tl.load(scratch + token * HEAD_DIM + channel, mask=exists, other=0.0)
            else:
                y = _read_tokens(
                    x, exact, stride, first, start, token, channel, exists, HEAD_DIM, SINKS, RING
                )
            member = block % blocks * CHANNELS + tl.arange(0, CHANNELS)
            where = block // blocks * HEAD_DIM + member
            tl.store(
                params + where, _group_params(y, exists, 0, LEVELS, MARGIN), mask=member < HEAD_DIM
            )
    else:
        GROUPS: tl.constexpr = triton.next_power_of_2(HEAD_DIM // GROUP)
        GROUP_PAD: tl.constexpr = triton.next_power_of_2(GROUP)
        TOKENS: tl.constexpr = min(PAGE, max(1, TILE // (GROUPS * GROUP_PAD)))
        group = tl.arange(0, GROUPS)[None, :]
        inside = tl.arange(0, GROUP_PAD)[None, None, :]
        for block in range(0, PAGE, TOKENS):
            token = block + tl.arange(0, TOKENS)[:, None]
            channel = group[:, :, None] * GROUP + inside
            exists = (token[:, :, None] < PAGE) & (inside < GROUP) & (channel < HEAD_DIM)
            if ROTATE:
                y = tl.load(
                    scratch + token[:, :, None] * HEAD_DIM + channel, mask=exists, other=0.0
                )
            else:
                y = _read_tokens(
                    x, exact, stride, first, start, token[:, :, None], channel, exists, HEAD_DIM,
                    SINKS, RING,
                )  # fmt: skip
            where = group * PAGE + token
            word = _group_params(y, exists, 2, LEVELS, MARGIN)
            tl.store(params + where, word, mask=(token < PAGE) & (group < HEAD_DIM // GROUP))
    tl.debug_barrier()

    for plane in tl.static_range(2 if BITS == 3 else 1):
        _pack_plane(
            codes, params, exact, x, scratch, stride, first, start, HEAD_DIM, BITS, KEY, CHANNEL,
            GROUP, ROTATE, SINKS, RING, PAGE, TILE, plane, 2 - plane if BITS == 3 else BITS,
        )  # fmt: skip


@triton.jit
def _write_rows(
    exact, x, stride, first_row, start, tokens, last, HEAD_DIM: tl.constexpr, SINKS: tl.constexpr,
    RING: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write those of ``BLOCK`` new tokens that stay exact: sinks, and tokens from ``last`` on.

    Of more new tokens than sinks and ring have rows, only the first and the last can stay.
    """
    BLOCK_D: tl.constexpr = triton.next_power_of_2(HEAD_DIM)
    channel = tl.arange(0, BLOCK_D)[None, :]
    token = first_row + tl.arange(0, BLOCK)[:, None]
    token += tl.where(token < SINKS, 0, tl.maximum(tokens - SINKS - RING, 0))
    slot = start + token
    row = tl.where(slot < SINKS, slot, SINKS + tl.maximum(slot - SINKS, 0) % RING)
    stays = (token < tokens) & ((slot < SINKS) | (slot >= last)) & (channel < HEAD_DIM)
    new = tl.load(x + token.to(tl.int64) * stride + channel, mask=stays, other=0.0)
    tl.store(exact + row * HEAD_DIM + channel, new.to(exact.dtype.element_ty), mask=stays)


@triton.jit(do_not_specialize=["start"])
def append_kernel(
    codes, parameters, exact, cursor, x, scratch, position, start, tokens, capacity, heads,
    stride_b, stride_h, stride_t, HAS_POSITION: tl.constexpr, HEAD_DIM: tl.constexpr,
    BITS: tl.constexpr, KEY: tl.constexpr, CHANNEL: tl.constexpr, GROUP: tl.constexpr,
    MARGIN: tl.constexpr, ROTATE: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr,
    PAGE: tl.constexpr, ROWS: tl.constexpr, TILE: tl.constexpr, WHOLE: tl.constexpr,
):  # fmt: skip
    """Pack one full page; with ``WHOLE``, which has one page at most, write exact rows and cursor
    too.

    Grid: (B * Hkv, pages that ``tokens`` can fill).
    """
    RING: tl.constexpr = WINDOW + PAGE
    head, page = tl.program_id(0), tl.program_id(1)
    start, old, cut, new, ok = _plan(
        cursor, position, start, tokens, capacity, HAS_POSITION, SINKS, WINDOW, PAGE
    )
    x += (head // heads).to(tl.int64) * stride_b + (head % heads).to(tl.int64) * stride_h
    exact += head.to(tl.int64) * ((SINKS + RING) * HEAD_DIM)
    slot = head.to(tl.int64) * capacity + old + page
    codes += slot * (PAGE * HEAD_DIM * BITS // 16)
    parameters += slot * (PAGE * HEAD_DIM // GROUP)
    scratch += (head.to(tl.int64) * tl.num_programs(1) + page) * (PAGE * HEAD_DIM)
    first = SINKS + (old + page) * PAGE
    if ok & cut & (page == 0):
        _reopen(
            codes, parameters, exact, first, start, HEAD_DIM, BITS, KEY, CHANNEL, GROUP, ROTATE,
            SINKS, RING, PAGE, ROWS,
        )  # fmt: skip
    if ok & (old + page < new):
        _quantize_page(
            codes, parameters, exact, x, scratch, stride_t, first, start, HEAD_DIM, BITS, KEY,
            CHANNEL, GROUP, MARGIN, ROTATE, SINKS, RING, PAGE, TILE,
        )  # fmt: skip
        tl.debug_barrier()
    if WHOLE:
        if ok:
            for row in range(0, tokens, ROWS):
                _write_rows(
                    exact,
                    x,
                    stride_t,
                    row,
                    start,
                    tokens,
                    SINKS + new * PAGE,
                    HEAD_DIM,
                    SINKS,
                    RING,
                    ROWS,
                )
        tl.debug_barrier()
        word = tl.atomic_add(cursor + 1, ARRIVAL, sem="acq_rel")
        if word // ARRIVAL == tl.num_programs(0) - 1:
            tl.store(cursor + 1, tl.where(ok, new, word % ARRIVAL))
            if ok:
                tl.store(cursor, start + tokens)


@triton.jit(do_not_specialize=["start"])
def rows_kernel(
    exact, cursor, x, position, start, tokens, capacity, heads, stride_b, stride_h, stride_t,
    HAS_POSITION: tl.constexpr, HEAD_DIM: tl.constexpr, SINKS: tl.constexpr, WINDOW: tl.constexpr,
    PAGE: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write the new tokens that stay exact, after `append_kernel` has read the rows they replace.

    Grid: (B * Hkv, blocks of ``ROWS`` among the tokens that can stay).
    """
    RING: tl.constexpr = WINDOW + PAGE
    head = tl.program_id(0)
    start, _old, _cut, new, ok = _plan(
        cursor, position, start, tokens, capacity, HAS_POSITION, SINKS, WINDOW, PAGE
    )
    if ok:
        x += (head // heads).to(tl.int64) * stride_b + (head % heads).to(tl.int64) * stride_h
        exact += head.to(tl.int64) * ((SINKS + RING) * HEAD_DIM)
        last = SINKS + new * PAGE
        _write_rows(
            exact,
            x,
            stride_t,
            tl.program_id(1) * ROWS,
            start,
            tokens,
            last,
            HEAD_DIM,
            SINKS,
            RING,
            ROWS,
        )


@triton.jit(do_not_specialize=["start"])
def cursor_kernel(
    cursor, position, start, tokens, capacity, HAS_POSITION: tl.constexpr, SINKS: tl.constexpr,
    WINDOW: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Move the cursor behind the new tokens.

    Grid: (1,).
    """
    start, _old, _cut, new, ok = _plan(
        cursor, position, start, tokens, capacity, HAS_POSITION, SINKS, WINDOW, PAGE
    )
    tl.debug_barrier()
    if ok:
        tl.store(cursor, start + tokens)
        tl.store(cursor + 1, new)


def append_(
    codes: Tensor,
    params: Tensor,
    exact: Tensor,
    cursor: Tensor,
    x: Tensor,
    position: Tensor | None,
    start: int | None,
    layout: PageLayout,
    frame: Frame | None = None,
) -> None:
    """Write new tokens at ``start`` or ``position[0]`` and quantize the pages that they complete,
    in place.

    Args:
        codes, params, exact, cursor: The cache, as `PageLayout` describes it, contiguous.
        x: New tokens, ``[B, H, T, D]``.
        position: Their slots on the device, one behind the other; or ``None``.
        start: The first slot; or ``None``.
        layout: The cache's layout.

    Raises:
        ValueError: ``start`` is given and the new tokens do not fit.
    """
    B, H, tokens, head_dim = x.shape
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
    where = (position, start or 0, tokens, capacity)
    regions = {"SINKS": layout.sinks, "WINDOW": layout.window, "PAGE": layout.page_size}
    regions["HAS_POSITION"] = position is not None
    rows = min(triton.next_power_of_2(tokens), max(1, TILE // triton.next_power_of_2(head_dim)))
    rotate = layout.transform == "hadamard"
    scratch = (
        x.new_empty(B, H, pages, layout.page_size, head_dim, dtype=torch.float32) if rotate else x
    )
    append_kernel[(B * H, pages)](
        codes.view(torch.uint16), params.view(torch.int32), exact, cursor, x, scratch, *where, H,
        *x.stride()[:3], HEAD_DIM=head_dim, BITS=layout.bits, KEY=layout.role == "key",
        CHANNEL=layout.grouping == "channel", GROUP=layout.group_size,
        MARGIN=(1.0 - layout.clip) / 2.0, ROTATE=rotate, ROWS=rows, TILE=TILE, WHOLE=whole,
        enable_fp_fusion=False, **regions,
    )  # fmt: skip
    if not whole:
        blocks = triton.cdiv(min(tokens, layout.exact_rows), rows)
        rows_kernel[(B * H, blocks)](
            exact, cursor, x, *where, H, *x.stride()[:3], HEAD_DIM=head_dim, ROWS=rows, **regions
        )
        cursor_kernel[(1,)](cursor, *where, **regions)
