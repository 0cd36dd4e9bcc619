"""Where new tokens go, and the rows of what stays exact, in Triton: part of the write kernel of `quantize_kv`.

What stays exact are sinks, recent tokens and, where the layout holds them, the last queries (`queries`). Rows of
tokens are overwritten only when the pages that leave them have been quantized.
"""

import triton
import triton.language as tl

MAX_PAGES = 1 << 20  # the lower 20 bits of cursor[1]; the other 11 count programs
ARRIVAL = tl.constexpr(MAX_PAGES)


@triton.jit
def plan(
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
def write_rows(
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


@triton.jit
def write_queries(
    query, exact, cursor, start, tokens, known, head, heads, stride_b, stride_h, stride_t,
    LAYOUT: tl.constexpr,
):  # fmt: skip
    """Write the queries of the last ``known`` new tokens to their rows, and zeros for what is known no more.

    Mirrors `queries.remember_`, for the KV head that ``exact`` belongs to, before the cursor moves. Nothing is done
    unless the layout holds queries.
    """
    if LAYOUT.queries > 0:
        SHARED_BY: tl.constexpr = LAYOUT.shared_by
        QUERIES: tl.constexpr = LAYOUT.queries
        ROWS: tl.constexpr = triton.next_power_of_2(QUERIES * SHARED_BY)
        channel = tl.arange(0, triton.next_power_of_2(LAYOUT.head_dim))[None, :]
        row = tl.arange(0, ROWS)[:, None]
        end = start + tokens
        slot = end - 1 - (end - 1 - row // SHARED_BY + QUERIES) % QUERIES  # the last in this row
        lost = (slot >= start) | (slot + QUERIES < tl.load(cursor))
        exists = (row < QUERIES * SHARED_BY) & (channel < LAYOUT.head_dim)
        query_head = (head % heads * SHARED_BY + row % SHARED_BY).to(tl.int64)
        token = (slot - end + known).to(tl.int64)
        where = head // heads * stride_b + query_head * stride_h + token * stride_t
        asked = tl.load(query + where + channel, mask=exists & (token >= 0), other=0.0)
        where = exact + (LAYOUT.token_rows + row) * LAYOUT.head_dim + channel
        tl.store(where, asked.to(exact.dtype.element_ty), mask=exists & lost)


@triton.jit(do_not_specialize=["start"])
def rows_kernel(
    exact, cursor, x, query, position, start, tokens, capacity, known, heads, stride_b, stride_h,
    stride_t, q_b, q_h, q_t, HAS_POSITION: tl.constexpr, LAYOUT: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Write the new tokens that stay exact, and queries, after `append_kernel` has read the rows they replace.

    Grid: (B * Hkv, blocks of ``ROWS`` among the tokens that can stay).
    """
    SINKS: tl.constexpr = LAYOUT.sinks
    PAGE: tl.constexpr = LAYOUT.page_size
    head = tl.program_id(0)
    start, _old, _cut, new, ok = plan(
        cursor, position, start, tokens, capacity, HAS_POSITION, SINKS, LAYOUT.window, PAGE
    )
    if ok:
        x += (head // heads).to(tl.int64) * stride_b + (head % heads).to(tl.int64) * stride_h
        exact += head.to(tl.int64) * (LAYOUT.exact_rows * LAYOUT.head_dim)
        write_rows(
            exact, x, stride_t, tl.program_id(1) * ROWS, start, tokens, SINKS + new * PAGE,
            LAYOUT.head_dim, SINKS, LAYOUT.ring, ROWS,
        )  # fmt: skip
        if tl.program_id(1) == 0:
            write_queries(
                query, exact, cursor, start, tokens, known, head.to(tl.int64), heads, q_b, q_h, q_t,
                LAYOUT,
            )  # fmt: skip


@triton.jit(do_not_specialize=["start"])
def cursor_kernel(
    cursor, position, start, tokens, capacity, HAS_POSITION: tl.constexpr, SINKS: tl.constexpr,
    WINDOW: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Move the cursor behind the new tokens.

    Grid: (1,).
    """
    start, _old, _cut, new, ok = plan(
        cursor, position, start, tokens, capacity, HAS_POSITION, SINKS, WINDOW, PAGE
    )
    tl.debug_barrier()
    if ok:
        tl.store(cursor, start + tokens)
        tl.store(cursor + 1, new)
