"""Importance scores, in Triton, for keys in mixed-precision pages.

The weight of a key depends on the scores of all keys, so keys are read twice, in splits, by one kernel launched twice.
The first launch stores the log-sum-exp of the scores of each split and query. The second joins those, computes the
scores again and writes the largest weight of each slot. The scores of all keys are never stored.

Keys lie on the long side of the matrix instruction and queries on its short side: column ``back * shared_by + head`` is
the query of a head that reads the KV head, ``back`` tokens before the call's last. Where they are many, they are taken
in tiles, one behind the other.

Whether the call completes a page is read on the device, and programs leave at once if it does not. So both launches can
stand in a captured graph and run at every step; where the host knows the slots it leaves them out.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import Calibrated, Packed, page_room
from kvq_compile.kernels.score import Bend, Score, bend_
from kvq_compile.kernels.triton import launch
from kvq_compile.kernels.triton.arguments import (
    MaskKind,
    Strided,
    at_head,
    at_page,
    bundle_cache,
    bundle_mask,
    bundle_tensor,
    tail_of,
)
from kvq_compile.kernels.triton.constants import ReadConstants
from kvq_compile.kernels.triton.mixed import in_tile_order, load_page, load_planes, page_scores
from kvq_compile.kernels.triton.primitives import (
    HIDDEN,
    MaskRows,
    bend_scores,
    load_mask,
    softmax_update,
)
from kvq_compile.kernels.triton.residual import View, exact_place, load_keys, plan_write
from kvq_compile.kernels.triton.transforms import hadamard

MAX_QUERIES = 64  # at once; a quarter of them in fp32 or with large tiles
MAX_SPLITS = 64
PROGRAMS_PER_SM = 2


@dataclass(frozen=True, eq=False)
class WeighConstants(launch.Operands):
    """What `weigh_kernel` is compiled for besides the layout.

    Attributes:
        shared_by: Query heads to a KV head.
        queries: How many of the last queries count.
        causal: Whether the call's queries see no slot behind their own.
        tiles, block_q, block_n: Tiles of queries, queries of a tile, exact tokens at once.
        mask_kind, mask_shared: See `arguments.bundle_mask`.
    """

    shared_by: int
    queries: int
    causal: bool
    tiles: int
    block_q: int
    block_n: int
    mask_kind: MaskKind
    mask_shared: bool


class Shape(NamedTuple):
    """KV heads, query tokens, new tokens, and slots of the result."""

    heads: Any
    tokens: Any
    new: Any
    slots: Any


# --- queries --------------------------------------------------------------------------------------


class Tile(NamedTuple):
    """A tile of queries of one KV head.

    Attributes:
        number: Index of the tile.
        sight: Slot at which the sight of each query ends.
        mask: Its `MaskRows`.
        result: Weights of the head's slots.
    """

    number: Any
    sight: Any
    mask: Any
    result: Any


@triton.jit
def _load_queries(
    query, tail, column, kv_len, view, tokens, KEY: tl.constexpr, LAUNCH: tl.constexpr
):  # fmt: skip
    """Return queries ``[queries, channels]`` of a KV head, fp32, and the slot at which the sight of each ends.

    ``query`` begins at the first query head of the KV head; ``kv_len`` tokens are held.
    """
    HEAD_DIM: tl.constexpr = KEY.head_dim
    channel = tl.arange(0, KEY.channels)[None, :]
    end = view.start + view.new
    head, back = column % LAUNCH.shared_by, column // LAUNCH.shared_by
    slot = end - 1 - back
    mine = back < tokens
    where = head.to(tl.int64) * query.head + (tokens - 1 - back).to(tl.int64) * query.token
    exists = ((back < LAUNCH.queries)[:, None]) & (channel < HEAD_DIM)
    x = tl.load(query.pointer + where[:, None] + channel, mask=exists & mine[:, None], other=0.0)
    x = x.to(tl.float32)
    if KEY.queries > 0:
        earlier = (slot < view.start) & (slot >= tl.maximum(kv_len - KEY.queries, 0)) & (mine == 0)
        row = tl.maximum(slot, 0) % KEY.queries * LAUNCH.shared_by + head
        where = tail + row[:, None] * HEAD_DIM + channel
        x += tl.load(where, mask=exists & earlier[:, None], other=0.0).to(tl.float32)
    sight = slot + 1
    if not LAUNCH.causal:
        sight = tl.where(mine, end, sight)
    known = tl.sum((x != 0).to(tl.int32), 1) > 0
    return x, tl.where(known, sight, 0)


@triton.jit
def _as_coded(q, KEY: tl.constexpr):
    """Return queries ``[queries, channels]`` in the basis of packed keys and in the order of their tiles."""
    y = q
    if KEY.transform == "hadamard":
        y = hadamard(y, KEY.head_dim)
    return in_tile_order(y, KEY)


# --- scores ---------------------------------------------------------------------------------------


@triton.jit
def _hidden(scores, slot, exists, tile, LAUNCH: tl.constexpr):
    """Return scores ``[keys, queries]`` with what queries do not see hidden."""
    seen = exists[:, None] & (slot[:, None] < tile.sight[None, :])
    if LAUNCH.mask_kind > 0:
        shown = load_mask(tile.mask, slot, LAUNCH.mask_kind, LAUNCH.mask_shared)
        scores += shown[:, None] if LAUNCH.mask_shared else shown
        seen &= (slot < tile.mask.width)[:, None]
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _join(partial, column, splits, SPLITS: tl.constexpr, QUERIES: tl.constexpr):
    """Return the log-sum-exp of all splits, and a value that masks all scores of a query without visible keys."""
    split = tl.arange(0, SPLITS)
    where = partial + split[:, None] * QUERIES + column[None, :]
    points = tl.load(where, mask=(split < splits)[:, None], other=float("-inf"))
    point = tl.maximum(tl.max(points, 0), HIDDEN)
    total = tl.sum(tl.exp2(points - point[None, :]), 0)
    return point + tl.log2(tl.where(total == 0, 1.0, total))


@triton.jit
def _take(scores, slot, exists, tile, point, total, JOINS: tl.constexpr):
    """Take scores ``[keys, queries]`` into the maximum ``point`` and the ``total`` of each query; or, with the
    log-sum-exp as ``point``, write the largest weights, of this and of earlier tiles.
    """
    if JOINS:
        largest = tl.max(tl.exp2(scores - point[None, :]), 1)
        where = tile.result + slot
        earlier = tl.load(where, mask=exists & (tile.number > 0), other=0.0)
        tl.store(where, tl.maximum(largest, earlier), mask=exists)
    else:
        weights, decay, point = softmax_update(scores, point, 0.0)
        total = total * decay + tl.sum(weights, 0)
    return point, total


@triton.jit
def _take_pages(
    q, cache, tile, scale, first, last, start, point, total, KEY: tl.constexpr,
    LAUNCH: tl.constexpr, JOINS: tl.constexpr,
):  # fmt: skip
    """Take the keys of packed pages ``first .. last - 1``."""
    q = (tl.trans(_as_coded(q, KEY)) * scale).to(LAUNCH.dtype)
    q_sum = tl.sum(q.to(tl.float32), 0)
    for page in range(first, last):
        at = tl.cast(page, tl.int64)
        fields, header = load_page(cache.codes, cache.params, page, page >= 0, KEY)
        rank = fields[KEY.rank_field].to(tl.int32)
        planes = load_planes(cache.codes + at * KEY.page_words, rank, header, KEY)
        metadata = cache.params + at * KEY.page_params
        scores = page_scores(q, q_sum, planes, fields, header, metadata, KEY, LAUNCH)
        scores = bend_scores(scores, LAUNCH)
        slot = KEY.sinks + page * KEY.page_size + tl.arange(0, KEY.page_size)
        exists = slot < start
        scores = _hidden(scores, slot, exists, tile, LAUNCH)
        point, total = _take(scores, slot, exists, tile, point, total, JOINS)
    return point, total


@triton.jit
def _take_exact(
    q, exact, key, stride, tile, scale, first, last, view, point, total, KEY: tl.constexpr,
    LAUNCH: tl.constexpr, JOINS: tl.constexpr,
):  # fmt: skip
    """Take the keys ``first .. last - 1`` in the order sinks, ring, new."""
    q = tl.trans(q).to(LAUNCH.exact_dtype)
    packed_end = KEY.sinks + view.pages * KEY.page_size
    for block in range(first, last, LAUNCH.block_n):
        index = block + tl.arange(0, LAUNCH.block_n)
        place = exact_place(index, packed_end, view.start, view.kv_len, view.visible, KEY)
        slot, _row, _fresh, old, now = place
        k = load_keys(exact, key, stride, place, KEY.head_dim, LAUNCH.exact_dtype)
        scores = tl.dot(k, q, input_precision=LAUNCH.precision) * scale
        scores = bend_scores(scores, LAUNCH)
        scores = _hidden(scores, slot, old | now, tile, LAUNCH)
        point, total = _take(scores, slot, old | now, tile, point, total, JOINS)
    return point, total


# --- kernel ---------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["start", "mask_width", "capacity"])
def weigh_kernel(
    query, key, cache, mask, mask_width, position, start, partial, result, scale, capacity,
    shape, KEY: tl.constexpr, LAUNCH: tl.constexpr, JOINS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Weigh a split of the keys of a KV head, if the call completes a page: ``JOINS`` tells the second launch.

    Grid: (B * Hkv, splits).

    Longer than other functions: it places a program among heads, pages and exact tokens, all for one loop over tiles.
    """
    SINKS: tl.constexpr = KEY.sinks
    PAGE: tl.constexpr = KEY.page_size
    SHARED_BY: tl.constexpr = LAUNCH.shared_by
    BLOCK_Q: tl.constexpr = LAUNCH.block_q
    BLOCK_N: tl.constexpr = LAUNCH.block_n
    QUERIES: tl.constexpr = LAUNCH.tiles * BLOCK_Q
    head, split, splits = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(1)
    write = plan_write(cache.cursor, position, start, 0, shape.new, capacity, KEY)
    start = write.start
    if write.ok & (write.pages > write.kept):
        batch, kv_head = head // shape.heads, head % shape.heads
        asked = Strided(
            at_head(query, batch, kv_head * SHARED_BY), query.batch, query.head, query.token
        )
        own = at_head(key, batch, kv_head)
        pages_of_head = at_page(cache, head, 0, capacity, KEY)
        exact, tail = pages_of_head.exact, tail_of(pages_of_head, KEY)
        partial += head * splits * QUERIES
        result += head * shape.slots
        kv_len, pages, end = tl.load(cache.cursor), tl.load(cache.cursor + 1), start + shape.new
        view = View(start, shape.new, start, end, pages)
        seen = tl.minimum(pages, tl.cdiv(tl.maximum(start - SINKS, 0), PAGE))
        size = tl.cdiv(seen, splits)
        first, last = split * size, tl.minimum(split * size + size, seen)
        total_exact = SINKS + KEY.ring + shape.new
        size = tl.cdiv(tl.cdiv(total_exact, BLOCK_N), splits) * BLOCK_N
        first_exact, last_exact = split * size, tl.minimum(split * size + size, total_exact)
        for number in range(LAUNCH.tiles):
            column = number * BLOCK_Q + tl.arange(0, BLOCK_Q)
            q, sight = _load_queries(asked, tail, column, kv_len, view, shape.tokens, KEY, LAUNCH)
            mask_pointer, mask_rows = mask.pointer, column.to(tl.int64)
            if LAUNCH.mask_kind > 0:  # an earlier query goes by the first row
                mask_pointer += batch * mask.batch
                token = tl.maximum(shape.tokens - 1 - column // SHARED_BY, 0).to(tl.int64)
                mask_rows = kv_head * SHARED_BY * mask.head + column % SHARED_BY * mask.head
                mask_rows += token * mask.token
            rows = MaskRows(mask_pointer, mask_rows, sight > 0, mask.slot, mask_width)
            tile = Tile(number, sight, rows, result)
            if JOINS:
                point = _join(partial, column, splits, SPLITS, QUERIES)
            else:
                point = tl.full([BLOCK_Q], float("-inf"), tl.float32)
            total = tl.zeros([BLOCK_Q], tl.float32)
            point, total = _take_pages(
                q, pages_of_head, tile, scale, first, last, start, point, total, KEY, LAUNCH, JOINS
            )
            point, total = _take_exact(
                q, exact, own, key.token, tile, scale, first_exact, last_exact, view, point, total,
                KEY, LAUNCH, JOINS,
            )  # fmt: skip
            if JOINS:
                tl.debug_barrier()  # the next tile reads what this one has written
            else:
                point += tl.log2(tl.where(total == 0, 1.0, total))
                tl.store(partial + split * QUERIES + column, point)


# --- on the host ----------------------------------------------------------------------------------


@lru_cache(maxsize=1024)
def _settings(
    layout: Layout, shared_by: int, queries: int, causal: bool, dtype: torch.dtype,
    platform: launch.Platform, mask_kind: MaskKind, mask_shared: bool, bend: Bend,
) -> tuple[WeighConstants, dict[str, int]]:  # fmt: skip
    """Return the constants of `weigh_kernel` and its launch options."""
    large = layout.page_size * triton.next_power_of_2(layout.head_dim) > 128 * 128
    single = dtype == torch.float32
    most = MAX_QUERIES // 4 if single or large else MAX_QUERIES
    columns = triton.next_power_of_2(queries * shared_by)
    block_q = max(16 if platform == "hip" else 8, min(most, columns))
    constants = WeighConstants(
        **launch.operands(dtype, platform, large, bend), shared_by=shared_by, queries=queries,
        causal=causal, tiles=triton.cdiv(queries * shared_by, block_q), block_q=block_q,
        block_n=launch.BLOCK_EXACT // 2 if single else launch.BLOCK_EXACT, mask_kind=mask_kind,
        mask_shared=mask_shared,
    )  # fmt: skip
    return constants, {"num_warps": 8 if block_q > 16 or large or single else 4, "num_stages": 1}


def _weigh_prompt(
    query: Tensor, key: Tensor, mask: Tensor | None, slots: int, score: Score, causal: bool,
    queries: int, layout: Layout,
) -> Tensor:  # fmt: skip
    """Weigh a call's own keys where there are none before them: a few rows times the keys, in plain torch."""
    (B, H), end = key.shape[:2], key.shape[2]
    result = query.new_zeros(B, H, slots, dtype=torch.float32)
    if layout.pages_at(end) == 0:
        return result
    rows = query[:, :, -queries:].unflatten(1, (H, -1)).float()  # [B, H, G, count, D]
    count = rows.shape[3]
    scores = bend_(rows.flatten(2, 3) @ key.float().mT * score.scale, score.bend)
    scores = scores.view(B, -1, count, end)
    slot = torch.arange(end, dtype=torch.int64, device=key.device)
    last = slot[end - count :, None] if causal else slot[end - 1 :, None]
    seen = (slot <= last) & rows.any(-1).view(B, -1, count, 1)
    if mask is not None:
        if mask.dim() > 1 and mask.shape[-2] > 1:
            mask = mask[..., mask.shape[-2] - count :, :]
        mask = mask[..., :end]
        scores, seen = scores[..., : mask.shape[-1]], seen[..., : mask.shape[-1]]
        if mask.dtype == torch.bool:
            seen = seen & mask
        else:
            scores = scores + mask
    scores = scores.masked_fill(~seen, float("-inf"))
    weights = (scores - scores.amax(-1, keepdim=True).clamp_min(-1e38)).exp()
    total = weights.sum(-1, keepdim=True)
    weights = weights / torch.where(total == 0, 1.0, total)
    result[:, :, : weights.shape[-1]] = weights.unflatten(1, (H, -1)).amax((2, 3))
    return result


def importance(
    query: Tensor, key: Tensor, keys: Packed | None, calibrated: Calibrated, mask: Tensor | None,
    position: Tensor | None, start: int | None, slots: int, score: Score, causal: bool,
    queries: int, layout: Layout,
) -> Tensor:  # fmt: skip
    """Return the importance score of each slot: its largest attention weight over the last queries.

    Args:
        query: Queries of the last of the call's tokens, ``[B, Hq, T, D]``.
        key: The call's own keys, ``[B, Hkv, tokens, D]``.
        keys: The cache of the keys before the call, contiguous; ``None`` where there is none.
        calibrated: Calibration constants of packed keys.
        mask: ``None``, boolean or additive, broadcasting to ``[B, Hq, T, M]``.
        position: Slots of the call's tokens on the device, consecutive; or ``None``.
        start: The first of them; or ``None``.
        slots: Slots of the result, ``start + tokens`` or more.
        score: What is done to products of queries and keys.
        causal: Whether the call's queries are masked causally.
        queries: How many of the last queries count.
        layout: Layout of the cached keys.

    Returns:
        ``[B, Hkv, slots]``, fp32; undefined behind the call's last slot, and all of it if the call completes no page.

    Raises:
        NotImplementedError: The layout has tables.
    """
    if keys is None:
        return _weigh_prompt(query, key, mask, slots, score, causal, queries, layout)
    if calibrated.tables is not None:
        raise NotImplementedError(
            "tables must be None where tokens differ in bits (mixed): no GPU kernel weighs such keys"
        )
    (B, H, new, _D), capacity = key.shape, page_room(keys, layout)
    result = query.new_empty(B, H, slots, dtype=torch.float32)
    filled = None if start is None else layout.pages_at(start + new)
    if start is not None and filled == layout.pages_at(start):
        return result
    mask_bundle, width, kind, mask_shared = bundle_mask(mask, query.shape)
    constants, options = _settings(
        layout, query.shape[1] // H, queries, causal, query.dtype, launch.platform_of(query),
        kind, mask_shared, score.bend,
    )  # fmt: skip
    work = max(capacity, triton.cdiv(layout.token_rows + new, launch.BLOCK_EXACT))
    resident = PROGRAMS_PER_SM * launch.sm_count(query.device)
    splits = min(MAX_SPLITS, work, max(1, resident // (B * H)))
    size = constants.tiles * constants.block_q
    partial = query.new_empty(B * H, splits, size, dtype=torch.float32)
    bundles = bundle_tensor(query), bundle_tensor(key), bundle_cache(keys, layout), mask_bundle
    shape = Shape(H, query.shape[2], new, slots)
    for joins in (False, True):
        weigh_kernel[(B * H, splits)](
            *bundles, width, position, start or 0, partial, result, score.scale * launch.LOG2_E, capacity, shape,
            KEY=ReadConstants.of(layout), LAUNCH=constants, JOINS=joins,
            SPLITS=triton.next_power_of_2(splits), **options,
        )  # fmt: skip
    return result
