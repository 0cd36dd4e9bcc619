"""What comes before and behind the shares of attention, in Triton: the query prepared, partial results joined.

`prepare_kernel` brings the query, in fp32, to the order, the scale and the basis in which keys are coded; the
keys' mean adds the same to all packed scores of a query, so it is kept apart. `join_kernel` brings the packed
values' sum back, and adds their mean, once for each query.
"""

import torch
from torch import Tensor

import triton
import triton.language as tl
from kvq_compile.kernels.packed import Calibrated
from kvq_compile.kernels.triton.dequantize import Coding
from kvq_compile.kernels.triton.primitives import HIDDEN, cosine_and_sine, hadamard

TOKENS = 16  # whose angles a program prepares


@triton.jit
def _prepare_query(
    x, tables, out, query_bias, row, heads, kv_heads, tokens, words, x_b, x_h, x_t,
    KEY: tl.constexpr,
):  # fmt: skip
    """Write a query row as it meets coded keys, and what their mean adds to its scores."""
    DIM: tl.constexpr = KEY.dim
    dim = tl.arange(0, triton.next_power_of_2(DIM))
    ok = dim < DIM
    x += row // tokens // heads * x_b + row // tokens % heads * x_h + row % tokens * x_t
    channel = dim
    if KEY.tables:
        tables += row // tokens % heads // (heads // kv_heads) * words
        channel = tl.load(tables + dim, mask=ok, other=0)
    y = tl.load(x + channel, mask=ok, other=0.0).to(tl.float32)
    if KEY.tables:
        if not KEY.rotary:
            mean = tl.load(tables + KEY.means + dim, mask=ok, other=0)
            tl.store(query_bias + row, tl.sum(y * mean.to(tl.float32, bitcast=True), 0))
        unit = tl.load(tables + KEY.scales + dim, mask=ok, other=0)
        y = y * unit.to(tl.float32, bitcast=True)
    y = y[None, :]
    if KEY.hadamard:
        y = hadamard(y, DIM)
    tl.store(out + row * DIM + dim[None, :], y, mask=ok[None, :])


@triton.jit
def prepare_kernel(
    query, tables, out, query_bias, turns, rows, heads, kv_heads, tokens, words, q_b, q_h, q_t,
    KEY: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """Bring one query row to the basis of the keys; or tabulate cosine and sine of the angles by which
    rotary keys of a block are rotated, ``[Hkv, 2, block, D / 2]``.

    Grid: (B * Hq * T, then for rotary keys Hkv * block / TOKENS).
    """
    row = tl.program_id(0).to(tl.int64)
    if row < rows:
        _prepare_query(
            query, tables, out, query_bias, row, heads, kv_heads, tokens, words, q_b, q_h, q_t, KEY
        )
    elif KEY.rotary:
        HALF: tl.constexpr = KEY.dim // 2
        BLOCKS: tl.constexpr = KEY.block // TOKENS
        head, block = (row - rows) // BLOCKS, (row - rows) % BLOCKS
        pair = tl.arange(0, triton.next_power_of_2(HALF))
        tables += head * words + KEY.frequencies
        frequency = tl.load(tables + pair, mask=pair < HALF, other=0)
        token = block.to(tl.int32) * TOKENS + tl.arange(0, TOKENS)
        cosine, sine = cosine_and_sine(token[:, None] * frequency[None, :])
        where = turns + head * (KEY.block * KEY.dim) + token[:, None] * HALF + pair[None, :]
        ok = (pair < HALF)[None, :]
        tl.store(where, cosine.to(turns.dtype.element_ty), mask=ok)
        tl.store(where + KEY.block * HALF, sine.to(turns.dtype.element_ty), mask=ok)


def prepare(
    query: Tensor, kv_heads: int, frame: Calibrated, coding: Coding, single: bool
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Return the query as it meets packed keys, the means' share of its scores, and angles of keys.

    Args:
        query: ``[B, Hq, T, D]``.
        kv_heads: KV heads.
        frame: What packed keys are coded relative to, where there are tables.
        coding: How keys are coded.
        single: Whether packed tokens are multiplied in fp32.
    """
    if not (coding.tables or coding.hadamard):
        return query, None, None
    B, Hq, T, D = query.shape
    rows, tables, words, bias, turns, programs = B * Hq * T, None, 0, None, None, 0
    if frame.tables is not None:
        tables, words = frame.tables, frame.tables.shape[1]
        bias = query.new_empty(rows, dtype=torch.float32)
    if coding.rotary:
        dtype = torch.float32 if single else torch.float16
        turns = query.new_empty(kv_heads, 2, coding.block, D // 2, dtype=dtype)
        programs = kv_heads * coding.block // TOKENS
    out = query.new_empty(B, Hq, T, D, dtype=torch.float32)
    prepare_kernel[(rows + programs,)](
        query, tables, out, bias, turns, rows, Hq, kv_heads, T, words, *query.stride()[:3],
        KEY=coding, TOKENS=TOKENS,
    )  # fmt: skip
    return out, bias, turns


@triton.jit
def join_kernel(
    partial, lse, out, tables, splits, exact_splits, kv_heads, columns, words,
    VALUE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Join the partial results of one column, those of pages from the basis and the order in which
    values are coded; ``columns`` of a KV head lie together.

    Grid: (B * Hq * T,).
    """
    DIM: tl.constexpr = VALUE.dim
    BLOCK_V: tl.constexpr = triton.next_power_of_2(DIM)
    column = tl.program_id(0).to(tl.int64)
    split, dim = tl.arange(0, SPLITS), tl.arange(0, BLOCK_V)
    is_exact = split < exact_splits
    channel = dim
    if VALUE.tables:
        tables += column // columns % kv_heads * words
        channel = tl.load(tables + dim, mask=dim < DIM, other=0)
    weight = tl.load(lse + column * splits + split, mask=split < splits, other=float("-inf"))
    weight = tl.exp2(weight - tl.maximum(tl.max(weight, 0), HIDDEN))
    ok = (weight != 0)[:, None] & (dim < DIM)[None, :]
    where = tl.where(is_exact[:, None], channel[None, :], dim[None, :])
    part = tl.load(partial + (column * splits + split)[:, None] * DIM + where, mask=ok, other=0.0)
    part *= weight[:, None]
    if VALUE.hadamard or VALUE.tables:
        packed = tl.sum(tl.where(is_exact[:, None], 0.0, part), 0)
        exact = tl.sum(tl.where(is_exact[:, None], part, 0.0), 0)
        if VALUE.hadamard:
            packed = tl.reshape(hadamard(tl.reshape(packed, (1, BLOCK_V)), DIM), (BLOCK_V,))
        if VALUE.tables:
            mean = tl.load(tables + VALUE.means + dim, mask=dim < DIM, other=0)
            unit = tl.load(tables + VALUE.scales + dim, mask=dim < DIM, other=0)
            packed = packed * unit.to(tl.float32, bitcast=True)
            packed += mean.to(tl.float32, bitcast=True) * tl.sum(tl.where(is_exact, 0.0, weight), 0)
        total = packed + exact
    else:
        total = tl.sum(part, 0)
    weight = tl.sum(weight, 0)
    total = total / tl.where(weight == 0, 1.0, weight)
    tl.store(out + column * DIM + channel, total.to(out.dtype.element_ty), mask=dim < DIM)


def join(
    partial: Tensor, lse: Tensor, query: Tensor, frame: Calibrated, coding: Coding, exact: int,
    kv_heads: int,
) -> Tensor:  # fmt: skip
    """Return ``[B, Hq, T, Dv]`` in the dtype of ``query``.

    Args:
        partial: Results of the shares, the first ``exact`` of them of exact tokens, ``[B * Hq * T, shares, Dv]``.
        lse: Their log-sum-exp to the base of 2, ``[B * Hq * T, shares]``.
        query: ``[B, Hq, T, D]``.
        frame: What packed values are coded relative to, where there are tables.
        coding: How values are coded.
        exact: Shares of exact tokens.
        kv_heads: KV heads.
    """
    B, Hq, T, _D = query.shape
    splits = partial.shape[1]
    tables, words = None, 0
    if frame.tables is not None:
        tables, words = frame.tables, frame.tables.shape[1]
    out = query.new_empty(B, Hq, T, partial.shape[2])
    join_kernel[(B * Hq * T,)](
        partial, lse, out, tables, splits, exact, kv_heads, Hq // kv_heads * T, words,
        VALUE=coding, SPLITS=triton.next_power_of_2(splits),
    )  # fmt: skip
    return out
