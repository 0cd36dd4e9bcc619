"""Transform queries for products with packed keys, in Triton, before attention.

Order, scale and Hadamard transform of the packed keys are applied to the query, in fp32. The keys' mean adds the same
constant to all packed scores of a query, which is returned separately.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from kvq_compile.kernels.triton.arguments import Calibration, Strided, bundle_tensor
from kvq_compile.kernels.triton.constants import ReadConstants, section_start
from kvq_compile.kernels.triton.transforms import cosine_and_sine, hadamard, load_table

TOKENS = 16  # whose angles a program tabulates


class CodedQuery(NamedTuple):
    """Queries transformed for products with packed keys.

    Attributes:
        query: Transformed queries.
        bias: What the keys' mean adds to the scores of each query, ``[B * Hq * T]``; ``None`` without tables.
        angles: Cosine and sine by which rotary keys of a block are rotated, ``[Hkv, 2, block, D / 2]``; or ``None``.
        fields: The `FieldQueries` of keys whose channels differ in bits; or ``None``.
    """

    query: Any
    bias: Any
    angles: Any
    fields: Any = None


class Shape(NamedTuple):
    """Query rows, query heads, KV heads, and tokens of a call."""

    rows: Any
    heads: Any
    kv_heads: Any
    tokens: Any


@triton.jit
def _code_query(query, tables, out, bias, row, shape, KEY: tl.constexpr):
    """Write a transformed query row, and the constant that the keys' mean adds to its scores."""
    DIM: tl.constexpr = KEY.head_dim
    dim = tl.arange(0, triton.next_power_of_2(DIM))
    ok = dim < DIM
    batch, head = row // shape.tokens // shape.heads, row // shape.tokens % shape.heads
    x = query.pointer + batch * query.batch + head * query.head + row % shape.tokens * query.token
    channel = dim
    if KEY.has_tables:
        channel = load_table(tables, dim, ok, "order", KEY)
    y = tl.load(x + channel, mask=ok, other=0.0).to(tl.float32)
    if KEY.has_tables:
        if not KEY.rotary:
            tl.store(bias + row, tl.sum(y * load_table(tables, dim, ok, "mean", KEY), 0))
        y = y * load_table(tables, dim, ok, "scale", KEY)
    y = y[None, :]
    if KEY.transform == "hadamard":
        y = hadamard(y, DIM)
    tl.store(out + row * DIM + dim[None, :], y, mask=ok[None, :])


@triton.jit
def code_query_kernel(
    query, calibration, out, shape, KEY: tl.constexpr, TOKENS: tl.constexpr
):  # fmt: skip
    """Transform one query row; or tabulate cosine and sine of ``TOKENS`` tokens of a block.

    Grid: (B * Hq * T, then for rotary keys Hkv * block / TOKENS).
    """
    row = tl.program_id(0).to(tl.int64)
    tables = calibration.tables
    if row < shape.rows:
        if KEY.has_tables:
            kv_head = row // shape.tokens % shape.heads // (shape.heads // shape.kv_heads)
            tables += kv_head * calibration.words
        _code_query(query, tables, out.query.pointer, out.bias, row, shape, KEY)
    elif KEY.rotary:
        HALF: tl.constexpr = KEY.head_dim // 2
        BLOCKS: tl.constexpr = KEY.block // TOKENS
        head, block = (row - shape.rows) // BLOCKS, (row - shape.rows) % BLOCKS
        pair = tl.arange(0, triton.next_power_of_2(HALF))
        where = tables + head * calibration.words + section_start("frequency", KEY) + pair
        frequency = tl.load(where, mask=pair < HALF, other=0)
        token = block.to(tl.int32) * TOKENS + tl.arange(0, TOKENS)
        cosine, sine = cosine_and_sine(token[:, None] * frequency[None, :])
        where = out.angles + head * (KEY.block * KEY.head_dim)
        where += token[:, None] * HALF + pair[None, :]
        ok = (pair < HALF)[None, :]
        tl.store(where, cosine.to(out.angles.dtype.element_ty), mask=ok)
        tl.store(where + KEY.block * HALF, sine.to(out.angles.dtype.element_ty), mask=ok)


def code_query(
    query: Tensor, bundled: Strided, kv_heads: int, calibration: Calibration, key: ReadConstants,
    single: bool,
) -> CodedQuery:  # fmt: skip
    """Return queries ``[B, Hq, T, D]`` transformed for products with packed keys.

    Args:
        query, bundled: The queries.
        kv_heads: KV heads.
        calibration: Tables of the keys.
        key: Constants of the keys.
        single: Whether packed tokens are multiplied in fp32.
    """
    if not key.has_tables and key.transform == "none":
        return CodedQuery(bundled, None, None)
    B, Hq, T, D = query.shape
    rows, bias, angles, programs = B * Hq * T, None, None, 0
    if key.has_tables:
        bias = query.new_empty(rows, dtype=torch.float32)
    if key.rotary:
        dtype = torch.float32 if single else torch.float16
        angles = query.new_empty(kv_heads, 2, key.block, D // 2, dtype=dtype)
        programs = kv_heads * key.block // TOKENS
    coded = bundle_tensor(query.new_empty(B, Hq, T, D, dtype=torch.float32))
    out = CodedQuery(coded, bias, angles)
    code_query_kernel[(rows + programs,)](
        bundled, calibration, out, Shape(rows, Hq, kv_heads, T), KEY=key, TOKENS=TOKENS
    )
    return out
