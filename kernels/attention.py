"""Fused dequantize and attend, in Triton: one kernel for one query token and for many.

Mirrors `blocked.attend`. Keys lie on the long side of the matrix instruction and queries on its
short side: a column is one query token of one of the query heads that share a KV head, so a packed
page is read and unpacked once for all of them. One program attends a tile of columns to a share of
the packed pages, or to a share of the exact tokens (sinks, ring and the call's new tokens), and
leaves a partial result with its log-sum-exp; a second kernel joins the partials. Exact tokens get
programs of their own because they weigh as many bytes as ten times as many packed ones: behind a
share of the pages they would be a long tail.

A page is loaded as it lies, unpacked to exact small integers in registers (`primitives`) and
multiplied as fp16, whose 11 bits hold codes and dequantized values better than bf16 does. Where a
key's parameters are the same for all its channels they are folded into its score, ``scale * (q .
code) + zero * sum(q)``, in fp32; elsewhere numbers are dequantized in registers. Weights are kept
``2 ** 12`` times too large until the end, so that the fp16 weights of a long flat softmax do not
underflow. Exact tokens are multiplied in the model's own dtype. All sums are fp32. Models in fp32,
and the interpreter, use fp32 throughout, except that fp32 tiles of packed tokens of more than 128 x
128 numbers would not fit a processor and stay fp16.

Which pages there are is read from the cursors on the device; the grid follows from capacity, window
and batch alone, so a captured graph serves all lengths and nothing waits for the device. If a cache
holds fewer tokens than the query's position asks for, the result is NaN.

Source: splitting over keys and joining by log-sum-exp is Flash-Decoding (Dao et al. 2023).
"""

import math
from functools import lru_cache
from typing import Literal

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from kvq_compile.kernels.frame import Frame
from kvq_compile.kernels.primitives import (
    HIDDEN,
    dequantize_keys,
    dequantize_values,
    hadamard,
    load_mask,
    load_rows,
    row_index,
    softmax_update,
    split_params,
    unpack_rows,
)
from kvq_compile.kernels.spec import PageLayout

Parts = tuple[Tensor, Tensor, Tensor, Tensor]

BLOCK_EXACT = 64  # exact tokens at once; a window of 128 keeps five programs of this size busy
MAX_COLUMNS = 32  # more queries than that spill
MAX_SPLITS = 64
PROGRAMS_PER_PROCESSOR = 3  # measured best on an H100
WEIGHT_BIAS = tl.constexpr(12.0)
LOG2_E = 1.4426950408889634


@triton.jit
def _attend_pages(
    query, rows, column_ok, scale, key_codes, key_params, value_codes, value_params, lo, hi, held,
    mask, mask_rows, stride_m, mask_width, KEY_DIM: tl.constexpr, KEY_BITS: tl.constexpr,
    KEY_CHANNEL: tl.constexpr, KEY_GROUP: tl.constexpr, VALUE_DIM: tl.constexpr,
    VALUE_BITS: tl.constexpr, VALUE_CHANNEL: tl.constexpr, VALUE_GROUP: tl.constexpr,
    SINKS: tl.constexpr, PAGE: tl.constexpr, BLOCK_Q: tl.constexpr, MASK_KIND: tl.constexpr,
    MASK_SHARED: tl.constexpr, FAST: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to the packed pages ``lo .. hi - 1``; return accumulator, sum and maximum."""
    FIELDS: tl.constexpr = 8 if KEY_BITS == 3 else 16 // KEY_BITS
    COLUMNS: tl.constexpr = FIELDS * triton.next_power_of_2(KEY_DIM // FIELDS)
    BLOCK_V: tl.constexpr = triton.next_power_of_2(VALUE_DIM)
    FOLD_KEY: tl.constexpr = (not KEY_CHANNEL) and KEY_GROUP == KEY_DIM
    FOLD_VALUE: tl.constexpr = (not VALUE_CHANNEL) and VALUE_GROUP == VALUE_DIM
    DEFER: tl.constexpr = BLOCK_Q <= 16  # sum over keys once, at the end: no exchange between warps
    token = tl.arange(0, PAGE)
    channel, channel_ok = row_index(tl.arange(0, COLUMNS), KEY_DIM, KEY_BITS)
    value_row = tl.arange(0, BLOCK_V)
    q = tl.load(
        query + rows[None, :] + channel[:, None],
        mask=channel_ok[:, None] & column_ok[None, :],
        other=0,
    )
    q = (q.to(tl.float32) * scale).to(DTYPE)
    q_sum = tl.sum(q.to(tl.float32), 0)
    running_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    running_sum = tl.zeros([PAGE if DEFER else 1, BLOCK_Q], tl.float32)
    running_zero = tl.zeros([PAGE if DEFER else 1, BLOCK_Q], tl.float32)
    accumulator = tl.zeros([BLOCK_V, BLOCK_Q], tl.float32)
    for page in range(lo, hi):
        at = tl.cast(page, tl.int64)
        k_params = key_params + at * (PAGE * KEY_DIM // KEY_GROUP)
        v_params = value_params + at * (PAGE * VALUE_DIM // VALUE_GROUP)
        low, high = load_rows(
            key_codes + at * (PAGE * KEY_DIM * KEY_BITS // 16), token, KEY_DIM, PAGE, KEY_BITS
        )
        k = unpack_rows(low, high, KEY_BITS, FAST, DTYPE)
        low, high = load_rows(
            value_codes + at * (PAGE * VALUE_DIM * VALUE_BITS // 16),
            value_row,
            PAGE,
            VALUE_DIM,
            VALUE_BITS,
        )
        v = unpack_rows(low, high, VALUE_BITS, FAST, DTYPE)
        if FOLD_KEY:
            k_scale, k_zero = split_params(tl.load(k_params + token))
            scores = tl.dot(k, q, input_precision=PRECISION)
            scores = scores * k_scale.to(tl.float32)[:, None]
            scores += k_zero.to(tl.float32)[:, None] * q_sum[None, :]
        else:
            k = dequantize_keys(
                k_params, k, channel, channel_ok, KEY_DIM, KEY_CHANNEL, KEY_GROUP, PAGE, FAST
            )
            scores = tl.dot(k, q, input_precision=PRECISION)
        slot = SINKS + page * PAGE + token
        if MASK_KIND > 0:
            scores += load_mask(
                mask, mask_rows, column_ok, slot, stride_m, mask_width, MASK_KIND, MASK_SHARED
            )
        scores = tl.where((slot < held)[:, None], scores, float("-inf"))
        if FOLD_VALUE:
            # The scale joins the score, so that scaled weights are bounded; codes at scale 0 are 0.
            v_scale, v_zero = split_params(tl.load(v_params + token))
            v_scale = tl.log2(tl.maximum(v_scale.to(tl.float32), 2.0**-24))
            scaled, decay, running_max = softmax_update(
                scores + v_scale[:, None], running_max, WEIGHT_BIAS
            )
            weights = tl.exp2(scores - (tl.maximum(running_max, HIDDEN) - WEIGHT_BIAS)[None, :])
            offset = weights * v_zero.to(tl.float32)[:, None]
        else:
            scaled, decay, running_max = softmax_update(scores, running_max, WEIGHT_BIAS)
            weights, offset = scaled, scaled
            v = dequantize_values(v_params, v, VALUE_DIM, VALUE_CHANNEL, VALUE_GROUP, PAGE, FAST)
        if not DEFER:
            weights, offset = tl.sum(weights, 0)[None, :], tl.sum(offset, 0)[None, :]
        running_sum = running_sum * decay[None, :] + weights
        if FOLD_VALUE:
            running_zero = running_zero * decay[None, :] + offset
        accumulator = tl.dot(
            v, scaled.to(DTYPE), accumulator * decay[None, :], input_precision=PRECISION
        )
    if FOLD_VALUE:
        accumulator += tl.sum(running_zero, 0)[None, :]
    return accumulator, tl.sum(running_sum, 0), running_max


@triton.jit
def _attend_exact(
    query, rows, column_ok, scale, key, value, key_exact, value_exact, first, last, packed_end,
    start, held, new_visible, stride_kt, stride_vt, mask, mask_rows, stride_m, mask_width,
    KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr, SINKS: tl.constexpr, RING: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_Q: tl.constexpr, MASK_KIND: tl.constexpr,
    MASK_SHARED: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to the exact tokens ``first .. last - 1`` in the order sinks, ring, new."""
    BLOCK_K: tl.constexpr = triton.next_power_of_2(KEY_DIM)
    BLOCK_V: tl.constexpr = triton.next_power_of_2(VALUE_DIM)
    k_dim = tl.arange(0, BLOCK_K)
    v_dim = tl.arange(0, BLOCK_V)
    q_ok = (k_dim < KEY_DIM)[:, None] & column_ok[None, :]
    q = tl.load(query + rows[None, :] + k_dim[:, None], mask=q_ok, other=0.0).to(DTYPE)
    running_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    running_sum = tl.zeros([BLOCK_Q], tl.float32)
    accumulator = tl.zeros([BLOCK_V, BLOCK_Q], tl.float32)
    # Not pipelined: its buffers would cost the programs that read pages their room.
    for block in tl.range(first, last, BLOCK, num_stages=1):
        index = block + tl.arange(0, BLOCK)
        fresh = index - (SINKS + RING)
        slot = tl.where(index < SINKS, index, packed_end - SINKS + index)
        old = (fresh < 0) & (slot < held)
        new = (fresh >= 0) & (fresh < new_visible)
        row = tl.where(index < SINKS, index, SINKS + tl.maximum(slot - SINKS, 0) % RING)
        slot = tl.where(fresh >= 0, start + fresh, slot)
        fresh = fresh.to(tl.int64)
        k_ok = (k_dim < KEY_DIM)[None, :]
        k = tl.load(
            key_exact + row[:, None] * KEY_DIM + k_dim[None, :], mask=old[:, None] & k_ok, other=0.0
        )
        k_new = tl.load(
            key + fresh[:, None] * stride_kt + k_dim[None, :], mask=new[:, None] & k_ok, other=0.0
        )
        v_ok = (v_dim < VALUE_DIM)[:, None]
        v = tl.load(
            value_exact + row[None, :] * VALUE_DIM + v_dim[:, None],
            mask=old[None, :] & v_ok,
            other=0.0,
        )
        v_new = tl.load(
            value + fresh[None, :] * stride_vt + v_dim[:, None], mask=new[None, :] & v_ok, other=0.0
        )
        k = tl.where(new[:, None], k_new.to(DTYPE), k.to(DTYPE))
        v = tl.where(new[None, :], v_new.to(DTYPE), v.to(DTYPE))
        scores = tl.dot(k, q, input_precision=PRECISION) * scale
        if MASK_KIND > 0:
            scores += load_mask(
                mask, mask_rows, column_ok, slot, stride_m, mask_width, MASK_KIND, MASK_SHARED
            )
        scores = tl.where((old | new)[:, None], scores, float("-inf"))
        weights, decay, running_max = softmax_update(scores, running_max, WEIGHT_BIAS)
        running_sum = running_sum * decay + tl.sum(weights, 0)
        accumulator = tl.dot(
            v, weights.to(DTYPE), accumulator * decay[None, :], input_precision=PRECISION
        )
    return accumulator, running_sum, running_max


@triton.jit(do_not_specialize=["start", "mask_width"])
def attend_kernel(
    query, packed_query, key, value, key_codes, key_params, key_exact, key_cursor, value_codes,
    value_params, value_exact, value_cursor, mask, position, partial, lse, scale, start, heads,
    tokens, new, capacity, exact_splits, mask_width, q_b, q_h, q_t, p_b, p_h, p_t, k_b, k_h, k_t,
    v_b, v_h, v_t, m_b, m_h, m_t, m_s, HAS_POSITION: tl.constexpr, SHARED_BY: tl.constexpr,
    KEY_DIM: tl.constexpr, KEY_BITS: tl.constexpr, KEY_CHANNEL: tl.constexpr,
    KEY_GROUP: tl.constexpr, VALUE_DIM: tl.constexpr, VALUE_BITS: tl.constexpr,
    VALUE_CHANNEL: tl.constexpr, VALUE_GROUP: tl.constexpr, SINKS: tl.constexpr,
    WINDOW: tl.constexpr, PAGE: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr,
    MASK_KIND: tl.constexpr, MASK_SHARED: tl.constexpr, FAST: tl.constexpr, DTYPE: tl.constexpr,
    EXACT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend a tile of columns to one share of the tokens.

    Grid: (B * Hkv, column tiles, shares of the exact tokens, then shares of the pages).
    """
    RING: tl.constexpr = WINDOW + PAGE
    head, split, splits = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    batch, kv_head = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    column = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    column_ok = column < SHARED_BY * tokens
    q_head, token = kv_head * SHARED_BY + column // tokens, (column % tokens).to(tl.int64)
    if MASK_SHARED:
        mask += batch * m_b
        mask_rows = column
    else:
        mask_rows = batch * m_b + q_head * m_h + token * m_t

    # What there is to see: slots before `visible`, tokens before `held`, pages up to `packed_end`.
    if HAS_POSITION:
        start = tl.load(position).to(tl.int32)
    visible = start + new
    if MASK_KIND > 0:
        visible = tl.minimum(visible, mask_width)
    held = tl.minimum(start, visible)
    pages = tl.minimum(tl.load(key_cursor + 1), tl.load(value_cursor + 1))
    packed_end = SINKS + pages * PAGE
    if split < exact_splits:
        total = SINKS + RING + new
        share = tl.cdiv(tl.cdiv(total, BLOCK_N), exact_splits) * BLOCK_N
        row = head.to(tl.int64) * (SINKS + RING)
        accumulator, running_sum, running_max = _attend_exact(
            query, batch * q_b + q_head * q_h + token * q_t, column_ok, scale,
            key + batch * k_b + kv_head * k_h, value + batch * v_b + kv_head * v_h,
            key_exact + row * KEY_DIM, value_exact + row * VALUE_DIM, split * share,
            tl.minimum(split * share + share, total), packed_end, start, held, visible - start,
            k_t, v_t, mask, mask_rows, m_s, mask_width, KEY_DIM, VALUE_DIM, SINKS, RING, BLOCK_N,
            BLOCK_Q, MASK_KIND, MASK_SHARED, EXACT_DTYPE, PRECISION,
        )  # fmt: skip
    else:
        seen = tl.minimum(pages, tl.cdiv(tl.maximum(held - SINKS, 0), PAGE))
        share = tl.cdiv(seen, splits - exact_splits)
        lo = (split - exact_splits) * share
        page = head.to(tl.int64) * capacity
        accumulator, running_sum, running_max = _attend_pages(
            packed_query, batch * p_b + q_head * p_h + token * p_t, column_ok, scale,
            key_codes + page * (PAGE * KEY_DIM * KEY_BITS // 16),
            key_params + page * (PAGE * KEY_DIM // KEY_GROUP),
            value_codes + page * (PAGE * VALUE_DIM * VALUE_BITS // 16),
            value_params + page * (PAGE * VALUE_DIM // VALUE_GROUP), lo,
            tl.minimum(lo + share, seen), held, mask, mask_rows, m_s, mask_width, KEY_DIM,
            KEY_BITS, KEY_CHANNEL, KEY_GROUP, VALUE_DIM, VALUE_BITS, VALUE_CHANNEL, VALUE_GROUP,
            SINKS, PAGE, BLOCK_Q, MASK_KIND, MASK_SHARED, FAST, DTYPE, PRECISION,
        )  # fmt: skip

    # A cache that holds too few tokens shows as NaN in the first share.
    missing = (start > tl.minimum(tl.load(key_cursor), tl.load(value_cursor))) & (split == 0)
    bias = tl.where(missing, float("nan"), 0.0)
    total = tl.where(running_sum == 0, 1.0, running_sum)
    where = (head.to(tl.int64) * (SHARED_BY * tokens) + column) * splits + split
    dim = tl.arange(0, triton.next_power_of_2(VALUE_DIM))
    tl.store(
        partial + where[None, :] * VALUE_DIM + dim[:, None], accumulator / total[None, :],
        mask=(dim < VALUE_DIM)[:, None] & column_ok[None, :],
    )  # fmt: skip
    point = tl.where(running_sum == 0, float("-inf"), running_max - WEIGHT_BIAS + tl.log2(total))
    tl.store(lse + where, point + bias, mask=column_ok)


@triton.jit
def join_kernel(
    partial, lse, out, splits, exact_splits, VALUE_DIM: tl.constexpr, SPLITS: tl.constexpr,
    ROTATE: tl.constexpr,
):  # fmt: skip
    """Join the partial results of one column; with ``ROTATE`` those of pages are in a rotated
    basis.

    Grid: (B * Hq * T,).
    """
    BLOCK_V: tl.constexpr = triton.next_power_of_2(VALUE_DIM)
    column = tl.program_id(0).to(tl.int64)
    split, dim = tl.arange(0, SPLITS), tl.arange(0, BLOCK_V)
    weight = tl.load(lse + column * splits + split, mask=split < splits, other=float("-inf"))
    weight = tl.exp2(weight - tl.maximum(tl.max(weight, 0), HIDDEN))
    ok = (weight != 0)[:, None] & (dim < VALUE_DIM)[None, :]
    part = tl.load(
        partial + (column * splits + split)[:, None] * VALUE_DIM + dim[None, :], mask=ok, other=0.0
    )
    part *= weight[:, None]
    if ROTATE:
        packed = tl.sum(tl.where((split >= exact_splits)[:, None], part, 0.0), 0)
        exact = tl.sum(tl.where((split < exact_splits)[:, None], part, 0.0), 0)
        total = (
            tl.reshape(hadamard(tl.reshape(packed, (1, BLOCK_V)), VALUE_DIM), (BLOCK_V,)) + exact
        )
    else:
        total = tl.sum(part, 0)
    weight = tl.sum(weight, 0)
    total = total / tl.where(weight == 0, 1.0, weight)
    tl.store(out + column * VALUE_DIM + dim, total.to(out.dtype.element_ty), mask=dim < VALUE_DIM)


@triton.jit
def rotate_kernel(x, out, heads, tokens, x_b, x_h, x_t, HEAD_DIM: tl.constexpr):
    """Rotate one query row.

    Grid: (B * Hq * T,).
    """
    BLOCK_D: tl.constexpr = triton.next_power_of_2(HEAD_DIM)
    row = tl.program_id(0).to(tl.int64)
    x += row // tokens // heads * x_b + row // tokens % heads * x_h + row % tokens * x_t
    dim = tl.arange(0, BLOCK_D)[None, :]
    y = tl.load(x + dim, mask=dim < HEAD_DIM, other=0.0).to(tl.float32)
    tl.store(out + row * HEAD_DIM + dim, hadamard(y, HEAD_DIM), mask=dim < HEAD_DIM)


@lru_cache
def _processors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def _count_splits(
    programs: int, pages: int, exact_tokens: int, device: torch.device
) -> tuple[int, int]:
    """Return into how many shares exact tokens and pages are split, ``programs`` each being needed.

    Pages are split no more than it takes to keep the processors evenly busy.
    """
    resident = PROGRAMS_PER_PROCESSOR * _processors(device)
    waves = [
        programs * splits / resident for splits in range(1, max(1, min(pages, MAX_SPLITS)) + 1)
    ]
    busy = [wave / math.ceil(wave) for wave in waves]
    page_splits = 1 + next(i for i, share in enumerate(busy) if share >= 0.97 * max(busy))
    return min(
        triton.cdiv(exact_tokens, BLOCK_EXACT), max(1, 2 * resident // programs)
    ), page_splits


def launch_constants(
    key_layout: PageLayout, value_layout: PageLayout, shared: int, tokens: int,
    dtype: torch.dtype, platform: Literal["cuda", "hip", "interpreter"],
) -> tuple[dict[str, object], dict[str, int]]:  # fmt: skip
    """Return constants of `attend_kernel` that layouts and shape fix, and its launch options."""
    D, Dv, page = key_layout.head_dim, value_layout.head_dim, key_layout.page_size
    columns = triton.next_power_of_2(shared * tokens)
    block_q = min(MAX_COLUMNS, max(16 if platform == "hip" else 8, columns))
    full = dtype == torch.float32 or platform == "interpreter"
    even = D & (D - 1) == 0 and Dv & (Dv - 1) == 0
    large = page * triton.next_power_of_2(max(D, Dv)) > 128 * 128
    exact = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(dtype, tl.float32)
    constants = {
        "SHARED_BY": shared, "KEY_DIM": D, "KEY_BITS": key_layout.bits,
        "KEY_CHANNEL": key_layout.grouping == "channel", "KEY_GROUP": key_layout.group_size,
        "VALUE_DIM": Dv, "VALUE_BITS": value_layout.bits,
        "VALUE_CHANNEL": value_layout.grouping == "channel",
        "VALUE_GROUP": value_layout.group_size, "SINKS": key_layout.sinks,
        "WINDOW": key_layout.window, "PAGE": page, "BLOCK_Q": block_q,
        "BLOCK_N": BLOCK_EXACT // 2 if full else BLOCK_EXACT, "FAST": platform == "cuda",
        "DTYPE": tl.float32 if full and (platform == "interpreter" or not large) else tl.float16,
        "EXACT_DTYPE": tl.float32 if full else exact,
        "PRECISION": "tf32x3" if platform == "cuda" else "ieee",
    }  # fmt: skip
    one_stage = full or page * max(D, Dv) > 256 * 128 or (large and not even)  # shared memory
    return constants, {
        "num_warps": 8 if full or block_q > 16 or large else 4,
        "num_stages": 1 if one_stage else 2
    }  # fmt: skip


def _attend_new(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float
) -> Tensor:
    """Attend to the new tokens alone: there is no history."""
    if mask is None:
        return F.scaled_dot_product_attention(query, key, value, scale=scale, enable_gqa=True)
    visible = min(mask.shape[-1], key.shape[2])
    shared = query.shape[1] // key.shape[1]
    key = key[:, :, :visible].repeat_interleave(
        shared, 1
    )  # no fused kernel takes both masks and groups
    value = value[:, :, :visible].repeat_interleave(shared, 1)
    mask = mask[..., :visible]
    bias = mask if mask.dtype == torch.bool else mask.to(query.dtype)
    out = F.scaled_dot_product_attention(query, key, value, bias, scale=scale)
    seen = mask if mask.dtype == torch.bool else mask > -1e38
    return out.masked_fill(~seen.any(-1, keepdim=True), 0.0)


def attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_parts: Parts,
    value_parts: Parts,
    mask: Tensor | None,
    position: Tensor | None,
    start: int | None,
    scale: float,
    key_layout: PageLayout,
    value_layout: PageLayout,
    key_frame: Frame | None = None,
    value_frame: Frame | None = None,
) -> Tensor:
    """Attend to the tokens before ``start`` or ``position[0]`` of a cache and to the new ones
    behind them.

    Args:
        query: ``[B, Hq, T, D]``.
        key, value: Exact new tokens, ``[B, Hkv, Tn, D]`` and ``[B, Hkv, Tn, Dv]``.
        key_parts, value_parts: The cache before the new tokens are written, contiguous.
        mask: ``None``, boolean (True: attend) or additive, broadcasting to ``[B, Hq, T, M]`` with
            one column
            a slot; slots beyond its ``M`` columns, and slots that hold no token, are not attended
            to.
        position: Slots of the new tokens on the device, one behind the other; or ``None``.
        start: The first of them; or ``None``.
        scale: Factor on the scores.
        key_layout, value_layout: Layouts of the two parts.
        key_frame, value_frame: What their packed tokens are coded relative to, where there are tables.

    Returns:
        ``[B, Hq, T, Dv]`` in the dtype of ``query``; NaN if the cache holds fewer tokens than
        ``start``.
    """
    if start == 0 and query.is_cuda:
        return _attend_new(query, key, value, mask, scale)
    query, key, value = (t if t.stride(3) == 1 else t.contiguous() for t in (query, key, value))
    B, Hq, T, D = query.shape
    Hkv, new, Dv = key.shape[1], key.shape[2], value.shape[3]
    shared, capacity = Hq // Hkv, key_parts[0].shape[2]
    platform: Literal["cuda", "hip", "interpreter"] = "interpreter"
    if query.is_cuda:
        platform = "hip" if torch.version.hip else "cuda"
    constants, options = launch_constants(
        key_layout, value_layout, shared, T, query.dtype, platform
    )
    tiles = triton.cdiv(shared * T, constants["BLOCK_Q"])
    exact, packed = _count_splits(
        B * Hkv * tiles, capacity, key_layout.exact_rows + new, query.device
    )
    splits = exact + packed

    kind, width = 0, 0
    strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        width = mask.shape[-1]
        mask = mask.expand(B, Hq, T, width)
        kind, mask = (1, mask.view(torch.uint8)) if mask.dtype == torch.bool else (2, mask)
        strides = mask.stride()
    rotated = query
    if key_layout.transform == "hadamard":
        rotated = query.new_empty(B, Hq, T, D, dtype=torch.float32)
        rotate_kernel[(B * Hq * T,)](query, rotated, Hq, T, *query.stride()[:3], HEAD_DIM=D)
    partial = query.new_empty(B * Hq * T, splits, Dv, dtype=torch.float32)
    lse = query.new_empty(B * Hq * T, splits, dtype=torch.float32)
    attend_kernel[(B * Hkv, tiles, splits)](
        query, rotated, key, value, key_parts[0].view(torch.uint16),
        key_parts[1].view(torch.int32), *key_parts[2:], value_parts[0].view(torch.uint16),
        value_parts[1].view(torch.int32), *value_parts[2:], mask, position, partial, lse,
        scale * LOG2_E, start or 0, Hkv, T, new, capacity, exact, width, *query.stride()[:3],
        *rotated.stride()[:3], *key.stride()[:3], *value.stride()[:3], *strides,
        HAS_POSITION=position is not None, MASK_KIND=kind,
        MASK_SHARED=kind > 0 and strides[1] == 0 and (T == 1 or strides[2] == 0), **constants,
        **options,
    )  # fmt: skip
    out = query.new_empty(B, Hq, T, Dv)
    join_kernel[(B * Hq * T,)](
        partial, lse, out, splits, exact, VALUE_DIM=Dv, SPLITS=triton.next_power_of_2(splits),
        ROTATE=value_layout.transform == "hadamard",
    )  # fmt: skip
    return out
