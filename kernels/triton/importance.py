"""Which tokens recent queries paid attention to, in Triton, where keys lie in pages whose tokens differ in bits.

Mirrors `importance.recent_importance`. How much weight a query gives to a key is known when its scores with all keys
are, so keys are read twice, in shares, by one kernel that is launched twice: first it leaves of each share and query
the log-sum-exp of the scores; then it joins those, computes the scores again and writes of each slot the largest
weight. Scores of all keys are never held.

Keys lie on the long side of the matrix instruction and queries on its short side: column ``back * SHARED_BY + head``
is the query of a head that reads the KV head, ``back`` tokens before the call's last. Where they are many, they are
taken in tiles, one behind the other.

Whether the call completes a page is read on the device, and programs leave at once if it does not. So both launches
can stand in a captured graph and run at every step; where the host knows the slots it leaves them out.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.triton import attend as attention
from kvq_compile.kernels.triton.attend_exact import exact_place, load_keys
from kvq_compile.kernels.triton.attend_mixed import load_page, load_planes, page_scores
from kvq_compile.kernels.triton.dequantize import Coding
from kvq_compile.kernels.triton.encode import Constants
from kvq_compile.kernels.triton.exact_rows import plan
from kvq_compile.kernels.triton.primitives import HIDDEN, hadamard, load_mask, softmax_update

Parts = tuple[Tensor, Tensor, Tensor, Tensor]
MAX_COLUMNS = 64  # queries at once; of fp32 numbers or large tiles a quarter fits beside the keys
MAX_SPLITS = 64
PROGRAMS_PER_PROCESSOR = 2
BLOCK_EXACT = 64  # exact tokens at once


@triton.jit
def _load_queries(
    query, exact, column, held, start, end, tokens, stride_h, stride_t, LAYOUT: tl.constexpr,
    SHARED_BY: tl.constexpr, QUERIES: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """Return queries ``[columns, channels]`` of a KV head, fp32, and the slot at which the sight of each ends."""
    BLOCK_D: tl.constexpr = triton.next_power_of_2(LAYOUT.head_dim)
    channel = tl.arange(0, BLOCK_D)[None, :]
    head, back = column % SHARED_BY, column // SHARED_BY
    slot = end - 1 - back
    mine = back < tokens
    where = head.to(tl.int64) * stride_h + (tokens - 1 - back).to(tl.int64) * stride_t
    exists = ((back < QUERIES)[:, None]) & (channel < LAYOUT.head_dim)
    x = tl.load(query + where[:, None] + channel, mask=exists & mine[:, None], other=0.0)
    x = x.to(tl.float32)
    if LAYOUT.queries > 0:
        earlier = (slot < start) & (slot >= tl.maximum(held - LAYOUT.queries, 0)) & (mine == 0)
        row = LAYOUT.token_rows + tl.maximum(slot, 0) % LAYOUT.queries * SHARED_BY + head
        where = exact + row[:, None] * LAYOUT.head_dim + channel
        x += tl.load(where, mask=exists & earlier[:, None], other=0.0).to(tl.float32)
    sight = slot + 1
    if not CAUSAL:
        sight = tl.where(mine, end, sight)
    known = tl.sum((x != 0).to(tl.int32), 1) > 0
    return x, tl.where(known, sight, 0)


@triton.jit
def _as_coded(q, KEY: tl.constexpr):
    """Return queries ``[columns, channels]`` in the basis of packed keys and in the order of `tile_channels`."""
    UNITS_PAD: tl.constexpr = KEY.columns // 16
    y = q
    if KEY.hadamard:
        y = hadamard(y, KEY.dim)
    if UNITS_PAD > 1:
        y = tl.reshape(y, (q.shape[0], UNITS_PAD // 2, 2, 8, 2))
        y = tl.reshape(tl.permute(y, (0, 3, 1, 4, 2)), (q.shape[0], KEY.columns))
    return y


@triton.jit
def _hidden(
    scores, slot, exists, sight, mask, mask_rows, stride_m, mask_width, MASK_KIND: tl.constexpr,
    MASK_SHARED: tl.constexpr,
):  # fmt: skip
    """Return scores ``[keys, columns]`` with what queries do not see hidden."""
    seen = exists[:, None] & (slot[:, None] < sight[None, :])
    if MASK_KIND > 0:
        scores += load_mask(
            mask, mask_rows, sight > 0, slot, stride_m, mask_width, MASK_KIND, MASK_SHARED
        )
        seen &= (slot < mask_width)[:, None]
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _join(partial, column, splits, SPLITS: tl.constexpr, COLUMNS: tl.constexpr):
    """Return the log-sum-exp of all shares, and a number that hides all scores where there is nothing to see."""
    split = tl.arange(0, SPLITS)
    where = partial + split[:, None] * COLUMNS + column[None, :]
    shares = tl.load(where, mask=(split < splits)[:, None], other=float("-inf"))
    point = tl.maximum(tl.max(shares, 0), HIDDEN)
    total = tl.sum(tl.exp2(shares - point[None, :]), 0)
    return point + tl.log2(tl.where(total == 0, 1.0, total))


@triton.jit
def _take(scores, slot, exists, tile, result, point, total, JOINS: tl.constexpr):
    """Take scores ``[keys, columns]`` into the maximum ``point`` and the ``total`` of each column; or, with the
    log-sum-exp as ``point``, write the largest weights, of this and of earlier tiles.
    """
    if JOINS:
        largest = tl.max(tl.exp2(scores - point[None, :]), 1)
        earlier = tl.load(result + slot, mask=exists & (tile > 0), other=0.0)
        tl.store(result + slot, tl.maximum(largest, earlier), mask=exists)
    else:
        weights, decay, point = softmax_update(scores, point, 0.0)
        total = total * decay + tl.sum(weights, 0)
    return point, total


@triton.jit(do_not_specialize=["start", "mask_width"])
def weigh_kernel(
    query, key, codes, records, exact, cursor, mask, position, partial, result, scale, start, heads,
    tokens, new, capacity, slots, mask_width, q_b, q_h, q_t, k_b, k_h, k_t, m_b, m_h, m_t, m_s,
    HAS_POSITION: tl.constexpr, KEY: tl.constexpr, LAYOUT: tl.constexpr, SHARED_BY: tl.constexpr,
    QUERIES: tl.constexpr, CAUSAL: tl.constexpr, JOINS: tl.constexpr, SPLITS: tl.constexpr,
    TILES: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, MASK_KIND: tl.constexpr,
    MASK_SHARED: tl.constexpr, FAST: tl.constexpr, DTYPE: tl.constexpr, EXACT_DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Weigh a share of the keys of a KV head, if the call completes a page: ``JOINS`` tells the second launch.

    Grid: (B * Hkv, shares).
    """
    SINKS: tl.constexpr = LAYOUT.sinks
    PAGE: tl.constexpr = LAYOUT.page_size
    COLUMNS: tl.constexpr = TILES * BLOCK_Q
    head, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    start, old, _cut, after, ok = plan(
        cursor, position, start, new, capacity, HAS_POSITION, SINKS, LAYOUT.window, PAGE
    )
    if ok & (after > old):
        batch, kv_head = head // heads, head % heads
        query += batch * q_b + kv_head * SHARED_BY * q_h
        key += batch * k_b + kv_head * k_h
        if MASK_KIND > 0:
            mask += batch * m_b
        codes += head * capacity * KEY.page_units
        records += head * capacity * KEY.page_params
        exact += head * (LAYOUT.exact_rows * LAYOUT.head_dim)
        partial += head * splits * COLUMNS
        result += head * slots
        held, pages, end = tl.load(cursor), tl.load(cursor + 1), start + new
        packed_end = SINKS + pages * PAGE
        seen = tl.minimum(pages, tl.cdiv(tl.maximum(start - SINKS, 0), PAGE))
        share = tl.cdiv(seen, splits)
        first, last = split * share, tl.minimum(split * share + share, seen)
        total_exact = SINKS + LAYOUT.ring + new
        share = tl.cdiv(tl.cdiv(total_exact, BLOCK_N), splits) * BLOCK_N
        first_exact, last_exact = split * share, tl.minimum(split * share + share, total_exact)
        for tile in range(TILES):
            column = tile * BLOCK_Q + tl.arange(0, BLOCK_Q)
            q, sight = _load_queries(
                query, exact, column, held, start, end, tokens, q_h, q_t, LAYOUT, SHARED_BY,
                QUERIES, CAUSAL,
            )  # fmt: skip
            mask_rows = column.to(tl.int64)
            if MASK_KIND > 0:  # an earlier query goes by the first row
                token = tl.maximum(tokens - 1 - column // SHARED_BY, 0).to(tl.int64)
                mask_rows = kv_head * SHARED_BY * m_h + column % SHARED_BY * m_h + token * m_t
            if JOINS:
                point = _join(partial, column, splits, SPLITS, COLUMNS)
            else:
                point = tl.full([BLOCK_Q], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_Q], tl.float32)
            coded = (tl.trans(_as_coded(q, KEY)) * scale).to(DTYPE)
            coded_sum = tl.sum(coded.to(tl.float32), 0)
            for page in range(first, last):
                at = tl.cast(page, tl.int64)
                fields, header = load_page(codes, records, page, page >= 0, KEY)
                rank = fields[KEY.rank_field].to(tl.int32)
                planes = load_planes(codes + at * KEY.page_units, rank, header, KEY)
                scores = page_scores(
                    coded, coded_sum, planes, fields, header, records + at * KEY.page_params, KEY,
                    FAST, DTYPE, PRECISION,
                )  # fmt: skip
                slot = SINKS + page * PAGE + tl.arange(0, PAGE)
                exists = slot < start
                scores = _hidden(
                    scores, slot, exists, sight, mask, mask_rows, m_s, mask_width, MASK_KIND,
                    MASK_SHARED,
                )  # fmt: skip
                point, total = _take(scores, slot, exists, tile, result, point, total, JOINS)
            plain = tl.trans(q).to(EXACT_DTYPE)
            for block in range(first_exact, last_exact, BLOCK_N):
                slot, row, fresh, was, now = exact_place(
                    block + tl.arange(0, BLOCK_N), packed_end, start, start, end, SINKS, LAYOUT.ring
                )
                k = load_keys(exact, key, row, fresh, was, now, k_t, LAYOUT.head_dim, EXACT_DTYPE)
                scores = tl.dot(k, plain, input_precision=PRECISION) * scale
                scores = _hidden(
                    scores, slot, was | now, sight, mask, mask_rows, m_s, mask_width, MASK_KIND,
                    MASK_SHARED,
                )  # fmt: skip
                point, total = _take(scores, slot, was | now, tile, result, point, total, JOINS)
            if JOINS:
                tl.debug_barrier()  # the next tile reads what this one has written
            else:
                point += tl.log2(tl.where(total == 0, 1.0, total))
                tl.store(partial + split * COLUMNS + column, point)


def recent_importance(
    query: Tensor,
    key: Tensor,
    parts: Parts,
    mask: Tensor | None,
    position: Tensor | None,
    start: int | None,
    slots: int,
    scale: float,
    causal: bool,
    queries: int,
    layout: Layout,
) -> Tensor:
    """Return the largest weight that the last queries paid to each slot.

    Args:
        query: ``[B, Hq, T, D]``, those of the last of the call's tokens.
        key: The call's own keys, ``[B, Hkv, tokens, D]``.
        parts: The cache of the keys before the call, contiguous.
        mask: See `importance.recent_importance`.
        position: Slots of the call's tokens on the device, one behind the other; or ``None``.
        start: The first of them; or ``None``.
        slots: Slots of the result, ``start + tokens`` or more.
        scale: Factor on the scores.
        causal: Whether the call's queries see no slot behind their own.
        queries: How many of the last queries count.
        layout: Layout of the cached keys.

    Returns:
        ``[B, Hkv, slots]``, fp32; undefined behind the call's last slot, and all of it if the call completes no page.

    Raises:
        NotImplementedError: The layout has tables.
    """
    if layout.has_tables:
        raise NotImplementedError(
            "tables must be None where tokens differ in bits (mixed): no GPU kernel weighs such keys"
        )
    (B, H, new, D), capacity = key.shape, parts[0].shape[2]
    result = query.new_empty(B, H, slots, dtype=torch.float32)
    if start is not None and layout.pages_at(start + new) == layout.pages_at(start):
        return result
    query, key = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key))
    platform, shared_by = attention.platform_of(query), query.shape[1] // H
    large = layout.page_size * triton.next_power_of_2(D) > 128 * 128
    single = query.dtype == torch.float32
    most = MAX_COLUMNS // 4 if single or large else MAX_COLUMNS
    columns = triton.next_power_of_2(queries * shared_by)
    block_q = max(16 if platform == "hip" else 8, min(most, columns))
    tiles = triton.cdiv(queries * shared_by, block_q)
    operands = attention.operand_constants(query.dtype, platform, large)
    work = max(capacity, triton.cdiv(layout.token_rows + new, BLOCK_EXACT))
    resident = PROGRAMS_PER_PROCESSOR * attention.processors(query.device)
    splits = min(MAX_SPLITS, work, max(1, resident // (B * H)))
    partial = query.new_empty(B * H, splits, tiles * block_q, dtype=torch.float32)
    mask, kind, mask_shared = attention.read_mask(mask, query.shape)
    for joins in (False, True):
        weigh_kernel[(B * H, splits)](
            query, key, parts[0].view(torch.uint16), *parts[1:], mask, position, partial, result,
            scale * attention.LOG2_E, start or 0, H, query.shape[2], new, capacity, slots,
            0 if mask is None else mask.shape[-1], *query.stride()[:3], *key.stride()[:3],
            *((0, 0, 0, 0) if mask is None else mask.stride()),
            HAS_POSITION=position is not None, KEY=Coding.of(layout), LAYOUT=Constants.of(layout),
            SHARED_BY=shared_by, QUERIES=queries, CAUSAL=causal, JOINS=joins,
            SPLITS=triton.next_power_of_2(splits), TILES=tiles, BLOCK_Q=block_q,
            BLOCK_N=BLOCK_EXACT // 2 if single else BLOCK_EXACT, MASK_KIND=kind,
            MASK_SHARED=mask_shared, **operands,
            num_warps=8 if block_q > 16 or large or single else 4, num_stages=1,
        )  # fmt: skip
    return result
