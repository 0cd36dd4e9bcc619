"""Fused dequantize and attend, in Triton: one kernel for one query token and for many.

Mirrors `blocked.attend`. Keys lie on the long side of the matrix instruction and queries on its
short side: a column is one query token of one of the query heads that share a KV head, so a packed
page is read and unpacked once for all of them. One program attends a tile of columns to a share of
the packed pages, or to a share of the exact tokens (sinks, ring and the call's new tokens), and
leaves a partial result with its log-sum-exp; a second kernel joins the partials. Exact tokens get
programs of their own because they weigh as many bytes as ten times as many packed ones: behind a
share of the pages they would be a long tail.

What a program does with exact tokens is in `attend_exact`; with packed pages in `attend_pages`, or `attend_mixed`
where tokens differ in bits. Calibrated keys and values are dealt with where it costs least, before and behind
all that (`attend_ends`); what the keys' mean adds to all packed scores of a query is added to a share's
log-sum-exp.

Exact tokens are multiplied in the model's own dtype. All sums are fp32. Models in fp32, and the
interpreter, use fp32 throughout, except that fp32 tiles of packed tokens of more than 128 x 128 numbers
would not fit a processor and stay fp16.

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
from torch import Tensor

import triton
import triton.language as tl
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.packed import UNCALIBRATED, Calibrated
from kvq_compile.kernels.triton.attend_ends import join, prepare
from kvq_compile.kernels.triton.attend_exact import attend_exact
from kvq_compile.kernels.triton.attend_mixed import attend_mixed_pages
from kvq_compile.kernels.triton.attend_pages import WEIGHT_BIAS, attend_pages, spread
from kvq_compile.kernels.triton.dequantize import Coding

Parts = tuple[Tensor, Tensor, Tensor, Tensor]
Platform = Literal["cuda", "hip", "interpreter"]

BLOCK_EXACT = 64  # exact tokens at once; a window of 128 keeps five programs of this size busy
MAX_COLUMNS = 32  # more queries than that spill
MAX_SPLITS = 64
PROGRAMS_PER_PROCESSOR: int | None = None  # in place of what `programs_per_processor` says
MIXED_REGISTERS = 168  # of a thread, so that three programs share a processor; there are no spills
LOG2_E = 1.4426950408889634


@triton.jit
def _attend_packed(
    query, rows, query_bias, row, column_ok, value_group, scale, head, batch, kv_head, key_codes,
    key_params, key_tables, key_book, turns, shift, value_codes, value_params, value_book, capacity,
    split, splits, pages, held, mask, mask_rows, stride_m, mask_width, key_words, value_words,
    KEY: tl.constexpr, VALUE: tl.constexpr, SPREAD: tl.constexpr, SINKS: tl.constexpr,
    BLOCK_Q: tl.constexpr, STAGES: tl.constexpr, MASK_KIND: tl.constexpr,
    MASK_SHARED: tl.constexpr, FAST: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to share ``split`` of a head's packed pages; return accumulator, sum and maximum."""
    seen = tl.minimum(pages, tl.cdiv(tl.maximum(held - SINKS, 0), KEY.page))
    share = tl.cdiv(seen, splits)
    lo = split * share
    hi = tl.minimum(lo + share, seen)
    page = head.to(tl.int64) * capacity
    key_codes += page * KEY.page_units
    key_params += page * KEY.page_params
    value_codes += page * VALUE.page_units
    value_params += page * VALUE.page_params
    if KEY.mixed:
        accumulator, running_sum, running_max = attend_mixed_pages(
            query, rows, column_ok, scale, key_codes, key_params, value_codes, value_params, lo, hi,
            held, mask, mask_rows, stride_m, mask_width, KEY, VALUE, SINKS, BLOCK_Q, STAGES,
            MASK_KIND, MASK_SHARED, FAST, DTYPE, PRECISION,
        )  # fmt: skip
    else:
        first = 0
        if KEY.rotary:
            first = tl.load(shift + batch)
            turns += kv_head * (KEY.block * KEY.dim)
        if KEY.tables:
            key_tables += kv_head * key_words
        if KEY.codebook:
            key_book += kv_head * (2 * key_words) + KEY.book
        if VALUE.codebook:
            value_book += kv_head * (2 * value_words) + VALUE.book
        accumulator, running_sum, running_max = attend_pages(
            query, rows, column_ok, value_group, scale, key_codes, key_params, key_tables, key_book,
            turns, first, value_codes, value_params, value_book, lo, hi, held, mask, mask_rows,
            stride_m, mask_width, KEY, VALUE, SPREAD, SINKS, BLOCK_Q, STAGES, MASK_KIND,
            MASK_SHARED, FAST, DTYPE, PRECISION,
        )  # fmt: skip
    if KEY.tables and not KEY.rotary:  # the same for all packed tokens, so it waits till here
        running_max += tl.load(query_bias + row, mask=column_ok, other=0.0) * scale
    return accumulator, running_sum, running_max


@triton.jit
def _store_share(
    partial, lse, where, accumulator, running_sum, running_max, bias, stored, first_copy,
    VALUE_DIM: tl.constexpr,
):  # fmt: skip
    """Store the result of a share, and its log-sum-exp plus ``bias`` once for all copies of a column."""
    dim = tl.arange(0, accumulator.shape[0])
    total = tl.where(running_sum == 0, 1.0, running_sum)
    tl.store(
        partial + where[None, :] * VALUE_DIM + dim[:, None], accumulator / total[None, :],
        mask=stored,
    )  # fmt: skip
    point = tl.where(running_sum == 0, float("-inf"), running_max - WEIGHT_BIAS + tl.log2(total))
    tl.store(lse + where, point + bias, mask=first_copy)


@triton.jit(do_not_specialize=["start", "mask_width"])
def attend_kernel(
    query, packed_query, query_bias, key, value, key_codes, key_params, key_exact, key_cursor,
    key_tables, key_book, turns, shift, value_codes, value_params, value_exact, value_cursor,
    value_book, mask, position, partial, lse, scale, start, heads, tokens, new, capacity,
    exact_splits, mask_width, key_words, value_words, q_b, q_h, q_t, p_b, p_h, p_t, k_b, k_h, k_t,
    v_b, v_h, v_t, m_b, m_h, m_t, m_s, e_h, HAS_POSITION: tl.constexpr, SHARED_BY: tl.constexpr,
    KEY: tl.constexpr, VALUE: tl.constexpr, SPREAD: tl.constexpr, SINKS: tl.constexpr,
    WINDOW: tl.constexpr, BLOCK_Q: tl.constexpr, BLOCK_N: tl.constexpr, STAGES: tl.constexpr,
    MASK_KIND: tl.constexpr, MASK_SHARED: tl.constexpr, FAST: tl.constexpr, DTYPE: tl.constexpr,
    EXACT_DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend a tile of columns to one share of the tokens.

    Grid: (B * Hkv, column tiles, shares of the exact tokens, then shares of the pages).
    """
    RING: tl.constexpr = WINDOW + KEY.page
    head, split, splits = tl.program_id(0), tl.program_id(2), tl.num_programs(2)
    batch, kv_head = (head // heads).to(tl.int64), (head % heads).to(tl.int64)
    column = tl.program_id(1) * BLOCK_Q + tl.arange(0, BLOCK_Q)
    value_group = column // (SHARED_BY * tokens)
    column_ok = value_group < SPREAD
    if SPREAD > 1:
        column = column % (SHARED_BY * tokens)
    q_head, token = kv_head * SHARED_BY + column // tokens, (column % tokens).to(tl.int64)
    if MASK_SHARED:
        mask += batch * m_b
        mask_rows = column
    else:
        mask_rows = batch * m_b + q_head * m_h + token * m_t

    # What there is to see: slots before `visible`, tokens before `held`, whole `pages`.
    if HAS_POSITION:
        start = tl.load(position).to(tl.int32)
    visible = start + new
    if MASK_KIND > 0:
        visible = tl.minimum(visible, mask_width)
    held = tl.minimum(start, visible)
    pages = tl.minimum(tl.load(key_cursor + 1), tl.load(value_cursor + 1))
    row = head.to(tl.int64) * (SHARED_BY * tokens) + column
    dim = tl.arange(0, triton.next_power_of_2(VALUE.dim))
    stored = (dim < VALUE.dim)[:, None] & column_ok[None, :]
    if split < exact_splits:
        accumulator, running_sum, running_max = attend_exact(
            query, batch * q_b + q_head * q_h + token * q_t, column_ok, scale,
            key + batch * k_b + kv_head * k_h, value + batch * v_b + kv_head * v_h,
            key_exact + head.to(tl.int64) * e_h,
            value_exact + head.to(tl.int64) * ((SINKS + RING) * VALUE.dim), split, exact_splits,
            SINKS + pages * KEY.page, start, held, new, visible, k_t, v_t, mask, mask_rows, m_s,
            mask_width, KEY.dim, VALUE.dim, SINKS, RING, BLOCK_N, BLOCK_Q, MASK_KIND, MASK_SHARED,
            EXACT_DTYPE, PRECISION,
        )  # fmt: skip
        stored &= (value_group == 0)[None, :] | (SPREAD == 1)
    else:
        accumulator, running_sum, running_max = _attend_packed(
            packed_query, batch * p_b + q_head * p_h + token * p_t, query_bias, row, column_ok,
            value_group, scale, head, batch, kv_head, key_codes, key_params, key_tables, key_book,
            turns, shift, value_codes, value_params, value_book, capacity, split - exact_splits,
            splits - exact_splits, pages, held, mask, mask_rows, m_s, mask_width, key_words,
            value_words, KEY, VALUE, SPREAD, SINKS, BLOCK_Q, STAGES, MASK_KIND, MASK_SHARED, FAST,
            DTYPE, PRECISION,
        )  # fmt: skip
        if SPREAD > 1:
            stored &= (dim // VALUE.group)[:, None] == value_group[None, :]

    # A cache that holds too few tokens shows as NaN in the first share.
    missing = (start > tl.minimum(tl.load(key_cursor), tl.load(value_cursor))) & (split == 0)
    _store_share(
        partial, lse, row * splits + split, accumulator, running_sum, running_max,
        tl.where(missing, float("nan"), 0.0), stored,
        column_ok & ((value_group == 0) | (SPREAD == 1)), VALUE.dim,
    )  # fmt: skip


@lru_cache
def processors(device: torch.device) -> int:
    """Return how many processors a GPU has; 1 for what interprets kernels."""
    if device.type != "cuda":
        return 1
    return torch.cuda.get_device_properties(device).multi_processor_count


def platform_of(query: Tensor) -> Platform:
    """Return what kernels over these tensors are compiled for."""
    if not query.is_cuda:
        return "interpreter"
    return "hip" if torch.version.hip else "cuda"


def programs_per_processor(key: Coding, value: Coding) -> int:
    """Return how many programs at a time are best for a processor.

    Measured on an H100 at one sequence of 128k tokens, at 2, 3, 4 and 6 programs; the second numbers are
    for blocks of 32 exact tokens in place of 64::

        2-bit codes              75 / 75    61 / 68    76 / 58    76 / 57  us
        2-bit rotary keys       110 / 111  132 / 138  125 / 125  125 / 125
        8 channels in 8 bits    227        309        258        255
    """
    return 2 if key.rotary or key.codebook or value.codebook else 3


def _count_splits(programs: int, pages: int, exact_tokens: int, resident: int) -> tuple[int, int]:
    """Return into how many shares exact tokens and pages are split, ``programs`` each being needed.

    Pages are split no more than it takes to keep the ``resident`` programs evenly busy.
    """
    waves = [
        programs * splits / resident for splits in range(1, max(1, min(pages, MAX_SPLITS)) + 1)
    ]
    busy = [wave / math.ceil(wave) for wave in waves]
    page_splits = 1 + next(i for i, share in enumerate(busy) if share >= 0.97 * max(busy))
    return min(
        triton.cdiv(exact_tokens, BLOCK_EXACT), max(1, 2 * resident // programs)
    ), page_splits


def operand_constants(dtype: torch.dtype, platform: Platform, large: bool) -> dict[str, object]:
    """Return how keys of ``dtype`` are unpacked and multiplied, from ``large`` tiles of packed tokens or small ones."""
    interpreted = platform == "interpreter"
    full = dtype == torch.float32 or interpreted
    exact = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16}.get(dtype, tl.float32)
    return {
        "FAST": platform == "cuda",
        "DTYPE": tl.float32 if full and (interpreted or not large) else tl.float16,
        "EXACT_DTYPE": tl.float32 if full else exact,
        "PRECISION": "tf32x3" if platform == "cuda" else "ieee",
    }


def launch_constants(
    key_layout: Layout, value_layout: Layout, shared: int, tokens: int,
    dtype: torch.dtype, platform: Platform,
) -> tuple[dict[str, object], dict[str, int]]:  # fmt: skip
    """Return constants of `attend_kernel` that layouts and shape fix, and its launch options."""
    D, Dv, page = key_layout.head_dim, value_layout.head_dim, key_layout.page_size
    key, value = Coding.of(key_layout), Coding.of(value_layout)
    if (key.mixed or value.mixed) and (key.tables or value.tables):
        raise NotImplementedError(
            "tables must be None where tokens differ in bits (mixed): no GPU kernel reads both"
        )
    if key.mixed != value.mixed:
        raise NotImplementedError("keys and values must both be mixed, or neither, on a GPU")
    copies = spread(value, shared * tokens)
    columns = triton.next_power_of_2(shared * tokens * copies)
    block_q = min(MAX_COLUMNS, max(16 if platform == "hip" else 8, columns))
    full = dtype == torch.float32 or platform == "interpreter"
    even = D & (D - 1) == 0 and Dv & (Dv - 1) == 0
    large = page * triton.next_power_of_2(max(D, Dv)) > 128 * 128
    # Loads of single codes are many, and what they return would be kept in shared memory.
    loads = not (key.mixed or (key.fields and value.fields))
    one_stage = full or page * max(D, Dv) > 256 * 128 or (large and not even)  # shared memory
    stages = 1 if one_stage or loads else 2
    constants = {
        "SHARED_BY": shared, "KEY": key, "VALUE": value, "SPREAD": copies,
        "SINKS": key_layout.sinks, "WINDOW": key_layout.window, "BLOCK_Q": block_q,
        "BLOCK_N": BLOCK_EXACT // 2 if full else BLOCK_EXACT, "STAGES": stages,
        **operand_constants(dtype, platform, large),
    }  # fmt: skip
    options = {"num_warps": 8 if full or block_q > 16 or large else 4, "num_stages": stages}
    few = max(key.bits, value.bits) <= 4 and not (key.outliers or value.outliers)
    few &= even and page >= 64
    if key.mixed and few and platform == "cuda" and block_q == 8 and not (full or large):
        options["maxnreg"] = MIXED_REGISTERS
    return constants, options


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


def _pairs(params: Tensor) -> Tensor:
    """View parameters as one word for each pair of scale and zero; records of mixed pages stay bytes."""
    if params.shape[-1] == 1:
        return params
    return params.view(torch.uint16 if params.dtype == torch.uint8 else torch.int32)


def _halves(tables: Tensor | None) -> Tensor | None:
    return None if tables is None else tables.view(torch.float16)


def read_mask(
    mask: Tensor | None, shape: torch.Size
) -> tuple[Tensor | None, Literal[0, 1, 2], bool]:
    """Return a mask with all four dimensions of scores, its kind, and whether columns of a tile share its rows.

    Kinds are none, boolean and additive.
    """
    if mask is None:
        return None, 0, False
    B, Hq, T, _D = shape
    mask = mask.expand(B, Hq, T, mask.shape[-1])
    shared = mask.stride(1) == 0 and (T == 1 or mask.stride(2) == 0)
    return (mask.view(torch.uint8), 1, shared) if mask.dtype == torch.bool else (mask, 2, shared)


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
    key_layout: Layout,
    value_layout: Layout,
    key_frame: Calibrated = UNCALIBRATED,
    value_frame: Calibrated = UNCALIBRATED,
) -> Tensor:
    """Attend to the tokens before ``start`` or ``position[0]`` of a cache and to the new ones
    behind them.

    Args:
        query: ``[B, Hq, T, D]``.
        key, value: Exact new tokens, ``[B, Hkv, Tn, D]`` and ``[B, Hkv, Tn, Dv]``.
        key_parts, value_parts: The cache before the new tokens are written, contiguous.
        mask: ``None``, boolean (True: attend) or additive, broadcasting to ``[B, Hq, T, M]`` with one column
            a slot; slots beyond its ``M`` columns, and slots that hold no token, are not attended to.
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
    B, Hq, T, _D = query.shape
    Hkv, new, Dv = key.shape[1], key.shape[2], value.shape[3]
    shared, capacity = Hq // Hkv, key_parts[0].shape[2]
    constants, options = launch_constants(
        key_layout, value_layout, shared, T, query.dtype, platform_of(query)
    )
    coding = Coding.of(key_layout), Coding.of(value_layout)
    tiles = triton.cdiv(shared * T, constants["BLOCK_Q"])
    resident = PROGRAMS_PER_PROCESSOR or programs_per_processor(*coding)
    exact, packed = _count_splits(
        B * Hkv * tiles, capacity, key_layout.token_rows + new, resident * processors(query.device)
    )
    splits = exact + packed
    mask, kind, mask_shared = read_mask(mask, query.shape)
    if mask is not None:
        options.pop("maxnreg", None)  # it would spill
    single = constants["DTYPE"] == tl.float32
    packed_query, query_bias, turns = prepare(query, Hkv, key_frame, coding[0], single)
    partial = query.new_empty(B * Hq * T, splits, Dv, dtype=torch.float32)
    lse = query.new_empty(B * Hq * T, splits, dtype=torch.float32)
    key_tables, value_tables = (frame.tables for frame in (key_frame, value_frame))
    key_words, value_words = (0 if t is None else t.shape[1] for t in (key_tables, value_tables))
    attend_kernel[(B * Hkv, tiles, splits)](
        query, packed_query, query_bias, key, value, key_parts[0].view(torch.uint16),
        _pairs(key_parts[1]), *key_parts[2:], key_tables, _halves(key_tables), turns,
        key_frame.shift, value_parts[0].view(torch.uint16),
        _pairs(value_parts[1]), *value_parts[2:], _halves(value_tables), mask, position, partial,
        lse, scale * LOG2_E, start or 0, Hkv, T, new, capacity, exact,
        0 if mask is None else mask.shape[-1], key_words, value_words, *query.stride()[:3],
        *packed_query.stride()[:3], *key.stride()[:3], *value.stride()[:3],
        *((0, 0, 0, 0) if mask is None else mask.stride()), key_parts[2].stride(1),
        HAS_POSITION=position is not None, MASK_KIND=kind, MASK_SHARED=mask_shared, **constants,
        **options,
    )  # fmt: skip
    return join(partial, lse, query, value_frame, coding[1], exact, Hkv)
