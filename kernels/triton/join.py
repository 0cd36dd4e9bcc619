"""Join the results of attention's splits by their log-sum-exp, in Triton.

Also of two parts of the tokens, as `many_queries` attends to.

The inverse transform, the channel order and the mean of packed values are applied here, once per query.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvq_compile.kernels.many_queries import Part
from kvq_compile.kernels.triton.arguments import Calibration, Strided
from kvq_compile.kernels.triton.constants import ReadConstants
from kvq_compile.kernels.triton.primitives import HIDDEN, LOG2_E, WEIGHT_BIAS
from kvq_compile.kernels.triton.transforms import hadamard, load_table

JOINED = tl.constexpr(1 << 13)  # elements at once: more do not fit the registers


@triton.jit
def store_split(
    partial, lse, where, accumulator, running_sum, running_max, bias, stored, first_copy,
    DIM: tl.constexpr,
):  # fmt: skip
    """Store the result of a split, and its log-sum-exp plus ``bias`` once for all copies of a query."""
    dim = tl.arange(0, accumulator.shape[0])
    total = tl.where(running_sum == 0, 1.0, running_sum)
    result = accumulator / total[None, :]
    tl.store(partial + where[None, :] * DIM + dim[:, None], result, mask=stored)
    point = tl.where(running_sum == 0, float("-inf"), running_max - WEIGHT_BIAS + tl.log2(total))
    tl.store(lse + where, point + bias, mask=first_copy)


@triton.jit
def _sum_splits(
    partial, points, first, end, exact_splits, point, channel, inside,
    DIM: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Return the results of some splits of a query, weighed and added, those of exact tokens apart, and the weights."""
    exact, packed = tl.zeros(channel.shape, tl.float32), tl.zeros(channel.shape, tl.float32)
    exact_weight, packed_weight = tl.zeros((1,), tl.float32), tl.zeros((1,), tl.float32)
    for block in range(first, end, AT_ONCE):
        split = block + tl.arange(0, AT_ONCE)
        is_exact = split < exact_splits
        weight = tl.load(points + split, mask=split < end, other=float("-inf"))
        weight = tl.exp2(weight - point)
        ok = (weight != 0)[:, None] & inside[None, :]
        where = split[:, None] * DIM + channel[None, :]
        part = tl.load(partial + where, mask=ok, other=0.0) * weight[:, None]
        exact += tl.sum(tl.where(is_exact[:, None], part, 0.0), 0)
        packed += tl.sum(tl.where(is_exact[:, None], 0.0, part), 0)
        exact_weight += tl.sum(tl.where(is_exact, weight, 0.0), 0)
        packed_weight += tl.sum(tl.where(is_exact, 0.0, weight), 0)
    return exact, packed, exact_weight, packed_weight


@triton.jit
def join_kernel(
    partial, lse, out, calibration, sinks, splits, exact_splits, kv_heads, queries, tokens,
    VALUE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Join the results of the splits of one query, those of pages from the basis and the order in which values are
    coded; the ``queries`` of a KV head lie together, the ``tokens`` of a query head beside one another.

    Grid: (B * Hq * T,).
    """
    DIM: tl.constexpr = VALUE.head_dim
    BLOCK_V: tl.constexpr = triton.next_power_of_2(DIM)
    AT_ONCE: tl.constexpr = min(SPLITS, JOINED // BLOCK_V)
    query = tl.program_id(0).to(tl.int64)
    dim, every = tl.arange(0, BLOCK_V), tl.arange(0, SPLITS)
    channel, inside, tables = dim, dim < DIM, calibration.tables
    if VALUE.has_tables:
        tables += query // queries % kv_heads * calibration.words
        channel = load_table(tables, dim, inside, "order", VALUE)
    points = lse + query * splits
    point = tl.max(tl.load(points + every, mask=every < splits, other=float("-inf")), 0)
    point = tl.maximum(point, HIDDEN)
    if sinks is not None:
        row, heads = query // tokens, kv_heads * (queries // tokens)
        at = row // heads * sinks.batch + row % heads * sinks.head + query % tokens * sinks.token
        sink = tl.load(sinks.pointer + at).to(tl.float32) * LOG2_E
        point = tl.where(sink > point, sink, point)
    partial += query * splits * DIM
    # Exact rows are read in another order: one access for both would read all rows that way.
    if VALUE.has_tables:
        exact, _none, exact_weight, _no_weight = _sum_splits(
            partial, points, 0, exact_splits, exact_splits, point, channel, inside, DIM, AT_ONCE
        )
        _none, packed, _no_weight, packed_weight = _sum_splits(
            partial, points, exact_splits, splits, exact_splits, point, dim, inside, DIM, AT_ONCE
        )
    else:
        exact, packed, exact_weight, packed_weight = _sum_splits(
            partial, points, 0, splits, exact_splits, point, dim, inside, DIM, AT_ONCE
        )
    if VALUE.transform == "hadamard":
        packed = tl.reshape(hadamard(tl.reshape(packed, (1, BLOCK_V)), DIM), (BLOCK_V,))
    if VALUE.has_tables:
        packed = packed * load_table(tables, dim, inside, "scale", VALUE)
        packed += load_table(tables, dim, inside, "mean", VALUE) * packed_weight
    total, weight = packed + exact, packed_weight + exact_weight
    if sinks is not None:
        weight += tl.exp2(sink - point)
    total = total / tl.where(weight == 0, 1.0, weight)
    tl.store(out + query * DIM + channel, total.to(out.dtype.element_ty), mask=inside)


def join(
    partial: Tensor, lse: Tensor, query: Tensor, calibration: Calibration, value: ReadConstants,
    exact_splits: int, kv_heads: int, sink_logits: Tensor | None,
) -> Tensor:  # fmt: skip
    """Return ``[B, Hq, T, Dv]`` in the dtype of ``query``.

    Args:
        partial: Results of the splits, those of exact tokens first, ``[B * Hq * T, splits, Dv]``.
        lse: Their log-sum-exp to the base of 2, ``[B * Hq * T, splits]``.
        query: ``[B, Hq, T, D]``.
        calibration: Tables of the values.
        value: Constants of the values.
        exact_splits: Splits of exact tokens.
        kv_heads: KV heads.
        sink_logits: Logits that broadcast to ``[B, Hq, T, 1]``, of what has weight and no value; or ``None``.
    """
    B, Hq, T, _D = query.shape
    splits = partial.shape[1]
    sinks = None
    if sink_logits is not None:
        sinks = Strided(sink_logits, *sink_logits.expand(B, Hq, T, 1).stride()[:3])
    out = query.new_empty(B, Hq, T, partial.shape[2])
    join_kernel[(B * Hq * T,)](
        partial, lse, out, calibration, sinks, splits, exact_splits, kv_heads, Hq // kv_heads * T, T,
        VALUE=value, SPLITS=triton.next_power_of_2(splits),
    )  # fmt: skip
    return out


# --- two parts -------------------------------------------------------------------------------------

JOINED_ROWS = 32


class Heads(NamedTuple):
    """A `Part`'s output and its strides in elements."""

    pointer: Any
    batch: Any
    kv_head: Any
    shared: Any
    token: Any


class Rows(NamedTuple):
    """Rows of all queries, KV heads, query heads to one of them, and tokens."""

    count: Any
    kv_heads: Any
    shared_by: Any
    tokens: Any


@triton.jit
def _load_part(part, row, rows, channel, exists):
    token, head = row % rows.tokens, row // rows.tokens
    shared, head = head % rows.shared_by, head // rows.shared_by
    batch, kv_head = head // rows.kv_heads, head % rows.kv_heads
    where = batch * part.batch + kv_head * part.kv_head + shared * part.shared + token * part.token
    return tl.load(part.pointer + where[:, None] + channel, mask=exists, other=0.0).to(tl.float32)


@triton.jit
def join_two_kernel(
    one, one_lse, other, other_lse, out, out_lse, rows, DIM: tl.constexpr, ROWS: tl.constexpr
):
    """Join two results of ``ROWS`` queries by their log-sum-exp.

    Grid: (rows / ROWS,).
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    channel = tl.arange(0, triton.next_power_of_2(DIM))[None, :]
    real = row < rows.count
    exists = real[:, None] & (channel < DIM)
    a, b = tl.load(one_lse + row, mask=real, other=0.0), tl.load(other_lse + row, mask=real, other=0.0)  # fmt: skip
    point = tl.maximum(a, b)
    a, b = tl.exp(a - point), tl.exp(b - point)
    total = a + b
    x = _load_part(one, row, rows, channel, exists) * (a / total)[:, None]
    x += _load_part(other, row, rows, channel, exists) * (b / total)[:, None]
    tl.store(out + row[:, None] * DIM + channel, x, mask=exists)
    tl.store(out_lse + row, point + tl.log(total), mask=real)


def join_parts(one: Part, other: Part) -> Part:
    """Return attention to the tokens of both parts, in fp32."""
    B, H, shared, T, D = one.output.shape
    count = B * H * shared * T
    out = one.output.new_empty(B, H, shared, T, D, dtype=torch.float32)
    lse = one.lse.new_empty(count, dtype=torch.float32)
    given = [
        (Heads(part.output, *part.output.stride()[:4]), part.lse.reshape(count))
        for part in (one, other)
    ]
    join_two_kernel[(triton.cdiv(count, JOINED_ROWS),)](
        *given[0], *given[1], out, lse, Rows(count, H, shared, T), DIM=D, ROWS=JOINED_ROWS
    )
    return Part(out, lse)
