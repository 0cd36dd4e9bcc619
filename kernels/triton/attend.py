"""Fused dequantize and attend, in Triton: one kernel for one query token and for many.

Keys lie on the long side of the matrix instruction and queries on its short side: a column is one query token of
one of the query heads that share a KV head, so a packed page is read and unpacked once for all of them. One program
attends a tile of queries to a split of the packed pages, or to a split of the exact tokens (sinks, ring and the
call's new tokens), and leaves a partial result with its log-sum-exp; a second kernel joins the partials. Exact
tokens get programs of their own because they weigh as many bytes as ten times as many packed ones: behind a split
of the pages they would be a long tail.

What a program does with exact tokens is in `residual`; with packed pages in `pages`, or `mixed` where tokens differ
in bits. Calibration constants are applied where that is cheapest, before and after the loops (`query`,
`join`); what the keys' mean adds to all packed scores of a query is added to a split's log-sum-exp.

Exact tokens are multiplied in the model's own dtype. All sums are fp32. Models in fp32, and the interpreter, use fp32
throughout, except that fp32 tiles of packed tokens of more than 128 x 128 elements would not fit an SM and stay fp16.

Which pages there are is read from the cursors on the device; the grid follows from capacity, window and batch
alone, so a captured graph serves all lengths and nothing waits for the device. If a cache holds fewer tokens than
the query's position asks for, the result is NaN.

Source: splitting over keys and joining by log-sum-exp is Flash-Decoding (Dao et al. 2023).
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import Calibrated, Packed, page_room
from kvq_compile.kernels.score import Score
from kvq_compile.kernels.triton import launch
from kvq_compile.kernels.triton.arguments import (
    at_head,
    at_page,
    bundle_cache,
    bundle_calibration,
    bundle_mask,
    bundle_tensor,
    calibrated_head,
    cursor_of,
    exact_rows,
    first_positions,
    first_slot,
)
from kvq_compile.kernels.triton.channelwise import tile_of
from kvq_compile.kernels.triton.channelwise_query import expand_query
from kvq_compile.kernels.triton.join import join, store_split
from kvq_compile.kernels.triton.mixed import attend_mixed_pages
from kvq_compile.kernels.triton.pages import KeyPages, Queries, ValuePages, attend_pages
from kvq_compile.kernels.triton.primitives import MaskRows, adds_mean, bends, tile_columns
from kvq_compile.kernels.triton.query import code_query
from kvq_compile.kernels.triton.residual import Exact, View, attend_exact

LATE_PAGES = tl.constexpr(4)  # that a program reads while one of exact tokens runs


class Side(NamedTuple):
    """Keys or values of a call: the new ones (`Strided`), the cache (`CacheBundle`), its `Calibration`."""

    new: Any
    packed: Any
    calibration: Any


class Shape(NamedTuple):
    """KV heads, query tokens, new tokens, and splits of the exact tokens."""

    heads: Any
    tokens: Any
    new: Any
    exact_splits: Any


@triton.jit
def _attend_packed(
    queries, coded, row, keys, values, view, head, rooms, shape, split, splits, late,
    KEY: tl.constexpr, VALUE: tl.constexpr, LAUNCH: tl.constexpr,
):  # fmt: skip
    """Attend to one split of a head's packed pages, of which the last ``late`` ones start late; return accumulator, sum
    and maximum.
    """
    seen = tl.minimum(view.pages, tl.cdiv(tl.maximum(view.kv_len - KEY.sinks, 0), KEY.page_size))
    # The last splits of all heads start late, behind programs of exact tokens, and take fewer pages.
    fewer = tl.minimum(LATE_PAGES, seen // (2 * splits))
    size = tl.cdiv(seen + fewer * late, splits)
    lo = split * size - fewer * tl.maximum(split - (splits - late), 0)
    hi = lo + size - tl.where(split < splits - late, 0, fewer)
    lo, hi = tl.minimum(lo, seen), tl.minimum(hi, seen)
    key_pages = at_page(keys.packed, head.to(tl.int64), 0, rooms[0], KEY)
    value_pages = at_page(values.packed, head.to(tl.int64), 0, rooms[1], VALUE)
    batch, kv_head = (head // shape.heads).to(tl.int64), (head % shape.heads).to(tl.int64)
    key_calibration = calibrated_head(keys.calibration, batch, kv_head, KEY)
    value_calibration = calibrated_head(values.calibration, batch, kv_head, VALUE)
    angles, fields = coded.angles, coded.fields
    if KEY.rotary:
        angles += kv_head * (KEY.block * KEY.head_dim)
    if KEY.scheme == "channelwise":
        fields = tile_of(
            fields, head.to(tl.int64), shape.heads, tl.num_programs(1), rooms[0], KEY, LAUNCH
        )
    key_pages = KeyPages(key_pages.codes, key_pages.params, key_calibration, angles, fields)
    value_pages = ValuePages(value_pages.codes, value_pages.params, value_calibration.book)
    if KEY.scheme == "mixed":
        accumulator, running_sum, running_max = attend_mixed_pages(
            queries, key_pages, value_pages, lo, hi, view.kv_len, KEY, VALUE, LAUNCH
        )
    else:
        accumulator, running_sum, running_max = attend_pages(
            queries, key_pages, value_pages, lo, hi, view.kv_len, KEY, VALUE, LAUNCH
        )
    # The same for all packed tokens, so it waits till here.
    if adds_mean(KEY) and not bends(LAUNCH):
        running_max += tl.load(coded.bias + row, mask=queries.exists, other=0.0) * queries.scale
    return accumulator, running_sum, running_max


@triton.jit
def _value_rows(query, batch, head, token, LAUNCH: tl.constexpr):
    """Return the pointer of what values are multiplied by and where the rows of a tile lie from there, if they are."""
    if LAUNCH.of_values:
        return query.pointer, batch * query.batch + head * query.head + token * query.token
    else:
        return 0, 0


@triton.jit(do_not_specialize=["start", "mask_width", "key_room", "value_room", "late"])
def attend_kernel(
    query, value_query, coded, coded_values, keys, values, mask, mask_width, position, start,
    partial, lse, scale, key_room, value_room, shape, late,
    KEY: tl.constexpr, VALUE: tl.constexpr, LAUNCH: tl.constexpr,
):  # fmt: skip
    """Attend a tile of queries to one split of the tokens.

    Grid: (B * Hkv, query tiles, splits of the exact tokens, then splits of the pages).

    Longer than other functions: both kinds of splits need what it computes of its queries, which a function could not
    return, for Triton returns no ``None``.
    """
    SHARED_BY: tl.constexpr = LAUNCH.shared_by
    COPIES: tl.constexpr = LAUNCH.copies
    head, split, splits = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    batch, kv_head = (head // shape.heads).to(tl.int64), (head % shape.heads).to(tl.int64)
    column, q_head, token, group, exists = tile_columns(
        tl.program_id(1), kv_head, shape.tokens, LAUNCH
    )
    mask_pointer = mask.pointer
    if LAUNCH.mask_shared:
        mask_pointer += batch * mask.batch
        mask_rows = column
    else:
        mask_rows = batch * mask.batch + q_head * mask.head + token * mask.token
    seen = MaskRows(mask_pointer, mask_rows, exists, mask.slot, mask_width)

    # What there is to see: slots before `visible`, tokens before `kv_len`, whole `pages`.
    key_cursor = cursor_of(keys.packed, batch, KEY)
    value_cursor = cursor_of(values.packed, batch, VALUE)
    start = first_slot(position, start, batch, KEY)
    visible = start + shape.new
    if LAUNCH.mask_kind > 0:
        visible = tl.minimum(visible, mask_width)
    kv_len = tl.minimum(start, visible)
    pages = tl.minimum(tl.load(key_cursor + 1), tl.load(value_cursor + 1))
    view = View(start, shape.new, kv_len, visible, pages)
    row = head.to(tl.int64) * (SHARED_BY * shape.tokens) + column
    dim = tl.arange(0, VALUE.channels)
    stored = (dim < VALUE.head_dim)[:, None] & exists[None, :]
    if split < shape.exact_splits:
        rows = batch * query.batch + q_head * query.head + token * query.token
        of_values = _value_rows(value_query, batch, q_head, token, LAUNCH)
        queries = Queries(query.pointer, rows, exists, group, seen, scale, 0, of_values)
        key_rows = exact_rows(keys.packed, head.to(tl.int64))
        value_rows = exact_rows(values.packed, head.to(tl.int64))
        least = tl.minimum(tl.load(key_cursor), tl.load(value_cursor))
        held = View(start, shape.new, tl.minimum(kv_len, least), visible, pages)
        accumulator, running_sum, running_max = attend_exact(
            queries, Exact(key_rows, at_head(keys.new, batch, kv_head), keys.new.token),
            Exact(value_rows, at_head(values.new, batch, kv_head), values.new.token), held, split,
            shape.exact_splits, KEY, VALUE, LAUNCH,
        )  # fmt: skip
        stored &= (group == 0)[None, :] | (COPIES == 1)
    else:
        coded_rows = batch * coded.query.batch + q_head * coded.query.head
        coded_rows += token * coded.query.token
        bias = 0
        if adds_mean(KEY) and bends(LAUNCH):
            bias = tl.load(coded.bias + row, mask=exists, other=0.0) * scale
        coded_queries = Queries(
            coded.query.pointer, coded_rows, exists, group, seen, scale, bias,
            _value_rows(coded_values, batch, q_head, token, LAUNCH),
        )  # fmt: skip
        accumulator, running_sum, running_max = _attend_packed(
            coded_queries, coded, row, keys, values, view, head, (key_room, value_room), shape,
            split - shape.exact_splits, splits - shape.exact_splits, late, KEY, VALUE, LAUNCH,
        )  # fmt: skip
        if COPIES > 1:
            stored &= (dim // VALUE.group_size)[:, None] == group[None, :]

    # A cache that holds too few tokens shows as NaN in the first split.
    least = tl.minimum(tl.load(key_cursor), tl.load(value_cursor))
    missing = (start > least) & (split == 0)
    store_split(
        partial, lse, row * splits + split, accumulator, running_sum, running_max,
        tl.where(missing, float("nan"), 0.0), stored, exists & ((group == 0) | (COPIES == 1)),
        VALUE.head_dim,
    )  # fmt: skip


def _attend_new(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Attend to the new tokens alone: there is no history."""
    if mask is None:
        return F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True)
    visible = min(mask.shape[-1], key.shape[2])
    shared = query.shape[1] // key.shape[1]
    # No fused kernel takes both masks and groups.
    key = key[:, :, :visible].repeat_interleave(shared, 1)
    value = value[:, :, :visible].repeat_interleave(shared, 1)
    mask = mask[..., :visible]
    bias = mask if mask.dtype == torch.bool else mask.to(query.dtype)
    out = F.scaled_dot_product_attention(query, key, value, bias, scale=scale)
    seen = mask if mask.dtype == torch.bool else mask > -1e38
    return out.masked_fill(~seen.any(-1, keepdim=True), 0.0)


def attend(
    query: Tensor, key: Tensor, value: Tensor, keys: Packed, values: Packed,
    key_calibrated: Calibrated, value_calibrated: Calibrated, mask: Tensor | None,
    position: Tensor | None, start: int | None, score: Score, key_layout: Layout,
    value_layout: Layout, sink_logits: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Attend to the tokens before ``start`` or ``position[0]`` of a cache and to the new ones behind them.

    Args:
        query: ``[B, Hq, T, D]``; ``[B, Hq, T, D + Dv]`` where values take part in scores.
        key, value: Exact new tokens, ``[B, Hkv, Tn, D]`` and ``[B, Hkv, Tn, Dv]``.
        keys, values: The cache before the new tokens are written, contiguous.
        key_calibrated, value_calibrated: Calibration constants of keys and values.
        mask: ``None``, boolean (True: attend) or additive, broadcasting to ``[B, Hq, T, M]`` with one column
            per slot; slots beyond its ``M`` columns, and slots without a token, are masked.
        position: Slots of the new tokens on the device, consecutive, ``[Tn]`` or ``[B, Tn]``; or ``None``.
        start: The first of them; or ``None``.
        score: Modification of products of queries and keys.
        key_layout, value_layout: Layouts of the two parts.
        sink_logits: Logits that broadcast to ``[B, Hq, T, 1]``, of what has weight and no value; or ``None``.

    Returns:
        ``[B, Hq, T, Dv]`` in the dtype of ``query``; NaN if the cache holds fewer tokens than ``start``.

    Raises:
        NotImplementedError: No kernel reads keys and values of these layouts.
    """
    if start == 0 and query.is_cuda and score.is_plain:
        return _attend_new(query, key, value, mask, score.scale)
    B, Hq, T, _ = query.shape
    H, new, D, Dv = *key.shape[1:], value.shape[3]
    value_query = None
    if score.of_values:
        query, value_query = query.split([D, Dv], 3)
    rooms = page_room(keys, key_layout), page_room(values, value_layout)
    mask_bundle, width, kind, mask_shared = bundle_mask(mask, query.shape)
    KEY, VALUE, LAUNCH, options = launch.attend_settings(
        key_layout, value_layout, Hq // H, T, query.dtype, launch.platform_of(query), kind,
        mask_shared, score.bend, score.of_values, (keys[3].dim() == 2, values[3].dim() == 2),
    )  # fmt: skip
    tiles = triton.cdiv(Hq // H * T, LAUNCH.block_q)
    resident = launch.programs_per_sm(KEY, VALUE, LAUNCH.block_q, options) * launch.sm_count(
        query.device
    )
    exact, paged = launch.count_splits(B * H * tiles, rooms[0], KEY.token_rows + new, resident)
    late = launch.count_late(B * H * tiles, exact, paged, resident)
    queries, key_tables = bundle_tensor(query), bundle_calibration(key_calibrated)
    value_tables = bundle_calibration(value_calibrated)
    if KEY.scheme == "channelwise":
        coded = expand_query(
            queries,
            keys,
            rooms[0],
            key_layout,
            key_tables,
            tiles,
            T,
            score.scale * launch.LOG2_E,
            KEY,
            LAUNCH,
        )
    else:
        coded = code_query(query, queries, H, key_tables, KEY, LAUNCH.dtype == tl.float32)
    of_values, coded_values = None, None
    if value_query is not None:
        of_values = bundle_tensor(value_query)
        coded_values = code_query(value_query, of_values, H, value_tables, VALUE, False).query
    partial = query.new_empty(B * Hq * T, exact + paged, Dv, dtype=torch.float32)
    lse = query.new_empty(B * Hq * T, exact + paged, dtype=torch.float32)
    attend_kernel[(B * H, tiles, exact + paged)](
        queries, of_values, coded, coded_values, Side(bundle_tensor(key), bundle_cache(keys, key_layout), key_tables),
        Side(bundle_tensor(value), bundle_cache(values, value_layout), value_tables), mask_bundle,
        width, first_positions(position, keys[3]), start or 0, partial, lse, score.scale * launch.LOG2_E, *rooms,
        Shape(H, T, new, exact), late, KEY=KEY, VALUE=VALUE, LAUNCH=LAUNCH, **options,
    )  # fmt: skip
    return join(partial, lse, query, value_tables, VALUE, exact, H, sink_logits)
