"""The residual window in Triton: tokens that are not packed, written and attended to.

They are the sinks and the ring of recent tokens, which the cache holds exactly, and the new tokens of a call, which it
does not hold yet. Attention multiplies them in the model's own dtype. Where the layout holds the last queries, their
rows lie behind those of tokens. Rows of tokens are overwritten only when the pages that leave them have been quantized.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kvq_compile.kernels.triton.arguments import at_head, first_slot
from kvq_compile.kernels.triton.constants import pad_channels
from kvq_compile.kernels.triton.primitives import (
    WEIGHT_BIAS,
    bend_scores,
    hide_scores,
    softmax_update,
)

MAX_PAGES = 1 << 20  # the lower 20 bits of cursor[1]; the other 11 count programs
ARRIVAL = tl.constexpr(MAX_PAGES)


class Plan(NamedTuple):
    """Plan of a write.

    Attributes:
        start: Slot of the first new token.
        held: Tokens before the write.
        kept, pages: Pages that stay as they are, and pages afterwards.
        cut: Whether the page behind those kept is cut open.
        ok: Whether the write leaves no gap and fits; else nothing is written.
        repeats: Whether a program that finds the cursor moved already does the same: no page is filled or cut open,
            and no token is forgotten behind the new ones.
    """

    start: Any
    held: Any
    kept: Any
    pages: Any
    cut: Any
    ok: Any
    repeats: Any


# --- writing --------------------------------------------------------------------------------------


@triton.jit
def plan_write(cursor, position, start, batch, tokens, capacity, CONSTANTS: tl.constexpr):
    """Return the `Plan` of a write of ``tokens`` tokens of a sequence, at the `first_slot` of it."""
    SINKS: tl.constexpr = CONSTANTS.sinks
    PAGE: tl.constexpr = CONSTANTS.page_size
    kv_len = tl.load(cursor)
    packed = tl.load(cursor + 1) % ARRIVAL
    start = first_slot(position, start, batch, CONSTANTS)
    whole = tl.maximum(start - SINKS, 0) // PAGE
    kept = tl.where(start < kv_len, tl.minimum(packed, whole), packed)
    filled = tl.maximum(start + tokens - SINKS - CONSTANTS.window, 0) // PAGE
    pages = tl.maximum(kept, filled)
    ok = (start >= 0) & (start <= kv_len) & (pages <= capacity)
    # The cursor then is start + tokens with as many pages, of which again all are kept, for none lies behind start.
    repeats = (pages == packed) & (kept == packed) & (kv_len <= start + tokens)
    return Plan(start, kv_len, kept, pages, kept < packed, ok, repeats)


@triton.jit
def write_rows(
    exact, new, stride, first, plan, tokens, CONSTANTS: tl.constexpr, ROWS: tl.constexpr
):
    """Write those of ``ROWS`` new tokens that stay exact: sinks, and tokens behind the packed pages.

    Of more new tokens than sinks and ring have rows, only the first and the last can stay.
    """
    SINKS: tl.constexpr = CONSTANTS.sinks
    HEAD_DIM: tl.constexpr = CONSTANTS.head_dim
    channel = tl.arange(0, triton.next_power_of_2(HEAD_DIM))[None, :]
    token = first + tl.arange(0, ROWS)[:, None]
    token += tl.where(token < SINKS, 0, tl.maximum(tokens - SINKS - CONSTANTS.ring, 0))
    slot = plan.start + token
    row = tl.where(slot < SINKS, slot, SINKS + tl.maximum(slot - SINKS, 0) % CONSTANTS.ring)
    last = SINKS + plan.pages * CONSTANTS.page_size
    stays = (token < tokens) & ((slot < SINKS) | (slot >= last)) & (channel < HEAD_DIM)
    x = tl.load(new + token.to(tl.int64) * stride + channel, mask=stays, other=0.0)
    tl.store(exact + row * HEAD_DIM + channel, x.to(exact.dtype.element_ty), mask=stays)


@triton.jit
def write_queries(query, tail, plan, tokens, known, batch, kv_head, CONSTANTS: tl.constexpr):
    """Write the queries of the last ``known`` new tokens to their rows, and zeros for queries no longer known.

    Mirrors the specification, for the KV head (int64) whose tail of exact rows is ``tail``.
    Nothing is done unless the layout holds queries.
    """
    if CONSTANTS.queries > 0:
        SHARED_BY: tl.constexpr = CONSTANTS.shared_by
        QUERIES: tl.constexpr = CONSTANTS.queries
        HEAD_DIM: tl.constexpr = CONSTANTS.head_dim
        ROWS: tl.constexpr = triton.next_power_of_2(QUERIES * SHARED_BY)
        channel = tl.arange(0, triton.next_power_of_2(HEAD_DIM))[None, :]
        row = tl.arange(0, ROWS)[:, None]
        end = plan.start + tokens
        slot = end - 1 - (end - 1 - row // SHARED_BY + QUERIES) % QUERIES  # the last in this row
        lost = (slot >= plan.start) | (slot + QUERIES < plan.held)
        exists = (row < QUERIES * SHARED_BY) & (channel < HEAD_DIM)
        query_head = kv_head * SHARED_BY + row % SHARED_BY
        token = (slot - end + known).to(tl.int64)
        where = at_head(query, batch, query_head) + token * query.token
        asked = tl.load(where + channel, mask=exists & (token >= 0), other=0.0)
        where = tail + row * HEAD_DIM + channel
        tl.store(where, asked.to(tail.dtype.element_ty), mask=exists & lost)


# --- attention ------------------------------------------------------------------------------------


@triton.jit
def exact_place(index, packed_end, start, kv_len, visible, CONSTANTS: tl.constexpr):
    """Return slots, rows of ``exact`` and indices among the new tokens of the tokens ``index`` in the order sinks,
    ring, new; and which of them the cache holds, and which are new.
    """
    SINKS: tl.constexpr = CONSTANTS.sinks
    fresh = index - (SINKS + CONSTANTS.ring)
    slot = tl.where(index < SINKS, index, packed_end - SINKS + index)
    old = (fresh < 0) & (slot < kv_len)
    now = (fresh >= 0) & (fresh < visible - start)
    row = tl.where(index < SINKS, index, SINKS + tl.maximum(slot - SINKS, 0) % CONSTANTS.ring)
    slot = tl.where(fresh >= 0, start + fresh, slot)
    return slot, row, fresh.to(tl.int64), old, now


@triton.jit
def load_keys(exact, new, stride, place, DIM: tl.constexpr, DTYPE: tl.constexpr):
    """Return the keys ``[tokens, DIM padded]`` of tokens from `exact_place`; zeros for what is neither."""
    _slot, row, fresh, old, now = place
    dim = tl.arange(0, pad_channels(DIM))
    ok = (dim < DIM)[None, :]
    k = tl.load(exact + row[:, None] * DIM + dim[None, :], mask=old[:, None] & ok, other=0.0)
    where = new + fresh[:, None] * stride + dim[None, :]
    k_new = tl.load(where, mask=now[:, None] & ok, other=0.0)
    return tl.where(now[:, None], k_new.to(DTYPE), k.to(DTYPE))


@triton.jit
def _load_values(exact, new, stride, place, DIM: tl.constexpr, DTYPE: tl.constexpr):
    """Return the values ``[DIM padded, tokens]`` of tokens from `exact_place`; zeros for what is neither."""
    _slot, row, fresh, old, now = place
    dim = tl.arange(0, pad_channels(DIM))
    ok = (dim < DIM)[:, None]
    v = tl.load(exact + row[None, :] * DIM + dim[:, None], mask=old[None, :] & ok, other=0.0)
    where = new + fresh[None, :] * stride + dim[:, None]
    v_new = tl.load(where, mask=now[None, :] & ok, other=0.0)
    return tl.where(now[None, :], v_new.to(DTYPE), v.to(DTYPE))


class Exact(NamedTuple):
    """The exact tokens of one KV head, keys or values: rows that the cache holds, new tokens and how far apart
    they lie.
    """

    rows: Any
    new: Any
    stride: Any


class View(NamedTuple):
    """The part of a cache that is visible to a call.

    Attributes:
        start, new: Slot of the first new token, and how many there are.
        kv_len: Slots before it hold tokens of the cache that are seen.
        visible: Slots before it are seen, new ones included.
        pages: Packed pages.
    """

    start: Any
    new: Any
    kv_len: Any
    visible: Any
    pages: Any


@triton.jit
def attend_exact(
    queries, keys, values, view, split, splits, KEY: tl.constexpr, VALUE: tl.constexpr,
    LAUNCH: tl.constexpr,
):  # fmt: skip
    """Attend to one split of the tokens in the order sinks, ring, new; return accumulator, sum and maximum."""
    BLOCK: tl.constexpr = LAUNCH.block_n
    BLOCK_Q: tl.constexpr = LAUNCH.block_q
    BLOCK_V: tl.constexpr = VALUE.channels
    k_dim = tl.arange(0, KEY.channels)
    q_ok = (k_dim < KEY.head_dim)[:, None] & queries.exists[None, :]
    q = tl.load(queries.pointer + queries.rows[None, :] + k_dim[:, None], mask=q_ok, other=0.0)
    q = q.to(LAUNCH.exact_dtype)
    if LAUNCH.of_values:
        v_dim = tl.arange(0, BLOCK_V)
        q_ok = (v_dim < VALUE.head_dim)[:, None] & queries.exists[None, :]
        where = queries.of_values[0] + queries.of_values[1][None, :] + v_dim[:, None]
        q_values = tl.load(where, mask=q_ok, other=0.0).to(LAUNCH.exact_dtype)
    packed_end = KEY.sinks + view.pages * KEY.page_size
    total = KEY.sinks + KEY.ring + view.new
    size = tl.cdiv(tl.cdiv(total, BLOCK), splits) * BLOCK
    last = tl.minimum(split * size + size, total)
    running_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_Q], tl.float32)
    accumulator = tl.zeros([BLOCK_V, BLOCK_Q], tl.float32)
    # Not pipelined: its buffers would cost the programs that read pages their room.
    for block in tl.range(split * size, last, BLOCK, num_stages=1):
        index = block + tl.arange(0, BLOCK)
        place = exact_place(index, packed_end, view.start, view.kv_len, view.visible, KEY)
        slot, _row, _fresh, old, now = place
        k = load_keys(keys.rows, keys.new, keys.stride, place, KEY.head_dim, LAUNCH.exact_dtype)
        v = _load_values(
            values.rows, values.new, values.stride, place, VALUE.head_dim, LAUNCH.exact_dtype
        )
        scores = tl.dot(k, q, input_precision=LAUNCH.precision)
        if LAUNCH.of_values:
            scores = tl.dot(tl.trans(v), q_values, scores, input_precision=LAUNCH.precision)
        scores *= queries.scale
        scores = bend_scores(scores, LAUNCH)
        scores = hide_scores(
            scores, slot, old | now, queries.mask, LAUNCH.mask_kind, LAUNCH.mask_shared
        )
        weights, decay, running_max = softmax_update(scores, running_max, WEIGHT_BIAS)
        running_sum = running_sum * decay + tl.sum(weights, 0)
        accumulator = tl.dot(
            v, weights.to(LAUNCH.exact_dtype), accumulator * decay[None, :],
            input_precision=LAUNCH.precision,
        )  # fmt: skip
    return accumulator, running_sum, running_max
