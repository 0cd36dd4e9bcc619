"""Attend to packed pages, in Triton: the loop of a program that reads a share of them.

A page is loaded as it lies, brought into registers (`dequantize`) and multiplied as fp16, whose 11 bits
hold codes and dequantized values better than bf16 does. Where a key's parameters are the same for all
its channels they are folded into its score, ``scale * (q . code) + zero * sum(q)``, in fp32; elsewhere
numbers are dequantized in registers. The parameters of a value are folded into its weight in the same
way. With a few groups of channels to a value there is a copy of each query column for each group:
columns that the matrix instruction would pad with, whose weights carry the parameters of their group, so
that folding costs nothing (``SPREAD``). The accumulator of a copy is right in its group's channels.

Channel tables of keys are in the query already and those of values wait for the end (`attention`), so
that only rotary keys need care here. A key of slot ``first + n`` is rotated by the angle of ``n``, the
same for all pages and held in registers, and the query against the angle of ``first``, step by step. A
page is taken in two halves, because that halves the angles to hold.

Weights are kept ``2 ** 12`` times too large until the end, so that the fp16 weights of a long flat
softmax do not underflow.
"""

import triton
import triton.language as tl
from kvq_compile.kernels.triton.dequantize import (
    Coding,
    dequantize_keys,
    dequantize_values,
    half_channels,
    key_channels,
    load_params,
    read_key_halves,
    read_keys,
    read_values,
)
from kvq_compile.kernels.triton.primitives import HIDDEN, cosine_and_sine, load_mask, softmax_update

WEIGHT_BIAS = tl.constexpr(12.0)
MAX_SPREAD_COLUMNS = 8  # the narrow side of the matrix instruction


def spread(value: Coding, columns: int) -> int:
    """Return how many copies of ``columns`` query columns there are, one for each group of a value."""
    groups = value.dim // value.group
    if value.codebook or value.channel or groups * columns > MAX_SPREAD_COLUMNS:
        return 1
    return groups


# --- rotation -------------------------------------------------------------------------------------


@triton.jit
def _rotate_keys(a, b, cosine, sine, FAST: tl.constexpr):
    """Return pairs ``a, b`` rotated by the angle."""
    if (
        FAST and a.dtype == tl.float16
    ):  # written out, for the compiler does not pair numbers of 16 bits
        x, y = tl.inline_asm_elementwise(
            """{ .reg .b32 s, t, n; neg.f16x2 n, $5;
            mul.rn.f16x2 s, $2, $4; fma.rn.f16x2 $0, $3, n, s;
            mul.rn.f16x2 t, $3, $4; fma.rn.f16x2 $1, $2, $5, t; }""",
            "=&r,=&r,r,r,r,r",
            args=[a, b, cosine, sine],
            dtype=(tl.float16, tl.float16),
            is_pure=True,
            pack=2,
        )
    else:
        x, y = a * cosine - b * sine, b * cosine + a * sine
    return x, y


@triton.jit
def _add(x, y, FAST: tl.constexpr):
    """Return ``x + y``, tile and row."""
    if FAST and x.dtype == tl.float16:
        return tl.inline_asm_elementwise(
            "add.rn.f16x2 $0, $1, $2;",
            "=r,r,r",
            args=[x, y],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    return x + y


@triton.jit
def _turn_query(a, b, cosine, sine):
    """Return query pairs turned back by the angle, which turns the keys they meet forwards."""
    c, s = cosine[:, None], sine[:, None]
    return a * c + b * s, b * c - a * s


@triton.jit
def _load_offset(tables, channel, exists, KEY: tl.constexpr, DTYPE: tl.constexpr):
    """Return mean / scale of key channels: what their numbers are coded relative to, in coded units."""
    mean = tl.load(tables + KEY.means + channel, mask=exists, other=0).to(tl.float32, bitcast=True)
    scale = tl.load(tables + KEY.scales + channel, mask=exists, other=0x3F800000)
    return (mean / scale.to(tl.float32, bitcast=True)).to(DTYPE)


@triton.jit
def _rotary_scores(
    codes, params, book, q_a, q_b, offset_a, offset_b, cosine, sine, KEY: tl.constexpr,
    FIRST: tl.constexpr, ROWS: tl.constexpr, FAST: tl.constexpr, DTYPE: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the scores ``[ROWS, columns]`` of the tokens of a page from ``FIRST`` on."""
    a, b = read_key_halves(codes, params, book, KEY, FIRST, ROWS, FAST, DTYPE)
    a, b = _add(a, offset_a[None, :], FAST), _add(b, offset_b[None, :], FAST)
    a, b = _rotate_keys(a, b, cosine, sine, FAST)
    k = tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (ROWS, KEY.columns))
    q = tl.permute(tl.join(q_a.to(DTYPE), q_b.to(DTYPE)), (2, 0, 1))
    return tl.dot(k, tl.reshape(q, (KEY.columns, q_a.shape[1])), input_precision=PRECISION)


# --- the loop -------------------------------------------------------------------------------------


@triton.jit
def _load_query(query, rows, column_ok, scale, channel, channel_ok):
    ok = channel_ok[:, None] & column_ok[None, :]
    q = tl.load(query + rows[None, :] + channel[:, None], mask=ok, other=0)
    return q.to(tl.float32) * scale


@triton.jit
def _group_vector(params, value_group, C: tl.constexpr, SPREAD: tl.constexpr):
    """Return ``scale, zero`` (fp32) of a page's values, a row each; a column for each copy."""
    token = tl.arange(0, C.page)
    scale, zero = load_params(params + token, None, C.fp8)
    scale, zero = scale.to(tl.float32)[:, None], zero.to(tl.float32)[:, None]
    for group in tl.static_range(1, SPREAD):
        scale_g, zero_g = load_params(params + group * C.page + token, None, C.fp8)
        here = (value_group == group)[None, :]
        scale = tl.where(here, scale_g.to(tl.float32)[:, None], scale)
        zero = tl.where(here, zero_g.to(tl.float32)[:, None], zero)
    return scale, zero


@triton.jit
def _start_rotation(
    query, rows, column_ok, scale, tables, turns, first, KEY: tl.constexpr, DTYPE: tl.constexpr
):  # fmt: skip
    """Return pairs of the query turned against the angle of slot ``first``, offsets of key channels, the
    angles of a block's tokens and that of a block.
    """
    HALF: tl.constexpr = KEY.dim // 2
    channel, channel_ok = half_channels(KEY)
    q_a = _load_query(query, rows, column_ok, scale, channel, channel_ok)
    q_b = _load_query(query + HALF, rows, column_ok, scale, channel, channel_ok)
    offset_a = _load_offset(tables, channel, channel_ok, KEY, DTYPE)
    offset_b = _load_offset(tables, HALF + channel, channel_ok, KEY, DTYPE)
    frequency = tl.load(tables + KEY.frequencies + channel, mask=channel_ok, other=0)
    cosine, sine = cosine_and_sine(first * frequency)
    q_a, q_b = _turn_query(q_a, q_b, cosine, sine)
    step_cosine, step_sine = cosine_and_sine(KEY.block * frequency)
    where = turns + tl.arange(0, KEY.block)[:, None] * HALF + channel[None, :]
    cosine = tl.load(where, mask=channel_ok[None, :], other=0).to(DTYPE)
    sine = tl.load(where + KEY.block * HALF, mask=channel_ok[None, :], other=0).to(DTYPE)
    return q_a, q_b, offset_a, offset_b, cosine, sine, step_cosine, step_sine


@triton.jit
def _rotary_page_scores(
    codes, params, book, q_a, q_b, offset_a, offset_b, cosine, sine, step_cosine, step_sine,
    KEY: tl.constexpr, FAST: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the scores of a page, and the query turned to the next."""
    BLOCK: tl.constexpr = KEY.block
    scores = _rotary_scores(
        codes, params, book, q_a, q_b, offset_a, offset_b, cosine, sine, KEY, 0, BLOCK, FAST, DTYPE,
        PRECISION,
    )  # fmt: skip
    q_a, q_b = _turn_query(q_a, q_b, step_cosine, step_sine)
    if KEY.page > BLOCK:
        second = _rotary_scores(
            codes, params, book, q_a, q_b, offset_a, offset_b, cosine, sine, KEY, BLOCK, BLOCK,
            FAST, DTYPE, PRECISION,
        )  # fmt: skip
        q_a, q_b = _turn_query(q_a, q_b, step_cosine, step_sine)
        scores = tl.permute(tl.join(scores, second), (2, 0, 1))
        scores = tl.reshape(scores, (KEY.page, q_a.shape[1]))
    return scores, q_a, q_b


@triton.jit
def _page_scores(
    k, params, q, q_sum, channel, channel_ok, KEY: tl.constexpr, FAST: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the scores of a page whose keys ``k`` have been read."""
    if not (KEY.channel or KEY.codebook) and KEY.group == KEY.dim:
        k_scale, k_zero = load_params(params + tl.arange(0, KEY.page), None, KEY.fp8)
        scores = tl.dot(k, q, input_precision=PRECISION)
        scores = scores * k_scale.to(tl.float32)[:, None]
        scores += k_zero.to(tl.float32)[:, None] * q_sum[None, :]
    else:
        if not KEY.codebook:
            k = dequantize_keys(params, k, channel, channel_ok, KEY, 0, 0, FAST)
        scores = tl.dot(k, q, input_precision=PRECISION)
    return scores


@triton.jit
def _folded_update(
    scores, running_max, params, value_group, VALUE: tl.constexpr, SPREAD: tl.constexpr
):  # fmt: skip
    """Return `softmax_update` of weights that carry the values' scales, the plain weights, and these times
    the zero points.

    The scale joins the score, so that scaled weights are bounded; codes at scale 0 are 0.
    """
    v_scale, v_zero = _group_vector(params, value_group, VALUE, SPREAD)
    v_scale = tl.log2(tl.maximum(v_scale, 2.0**-24))
    scaled, decay, running_max = softmax_update(scores + v_scale, running_max, WEIGHT_BIAS)
    weights = tl.exp2(scores - (tl.maximum(running_max, HIDDEN) - WEIGHT_BIAS)[None, :])
    return scaled, decay, running_max, weights, weights * v_zero


@triton.jit
def attend_pages(
    query, rows, column_ok, value_group, scale, key_codes, key_params, key_tables, key_book,
    turns, shift, value_codes, value_params, value_book, lo, hi, held, mask, mask_rows, stride_m,
    mask_width, KEY: tl.constexpr, VALUE: tl.constexpr, SPREAD: tl.constexpr, SINKS: tl.constexpr,
    BLOCK_Q: tl.constexpr, STAGES: tl.constexpr, MASK_KIND: tl.constexpr,
    MASK_SHARED: tl.constexpr, FAST: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to the packed pages ``lo .. hi - 1``; return accumulator, sum and maximum."""
    PAGE: tl.constexpr = KEY.page
    FOLD: tl.constexpr = not (VALUE.channel or VALUE.codebook) and VALUE.group * SPREAD == VALUE.dim
    DEFER: tl.constexpr = BLOCK_Q <= 16  # sum over keys once, at the end: no exchange between warps
    if KEY.rotary:
        q_a, q_b, offset_a, offset_b, cosine, sine, step_cosine, step_sine = _start_rotation(
            query, rows, column_ok, scale, key_tables, turns, SINKS + lo * PAGE + shift, KEY, DTYPE
        )
    else:
        channel, channel_ok = key_channels(KEY)
        q = _load_query(query, rows, column_ok, scale, channel, channel_ok).to(DTYPE)
        q_sum = tl.sum(q.to(tl.float32), 0)
    running_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    running_sum = tl.zeros([PAGE if DEFER else 1, BLOCK_Q], tl.float32)
    running_zero = tl.zeros([PAGE if DEFER else 1, BLOCK_Q], tl.float32)
    accumulator = tl.zeros([triton.next_power_of_2(VALUE.dim), BLOCK_Q], tl.float32)
    for page in tl.range(lo, hi, num_stages=STAGES):
        at = tl.cast(page, tl.int64)
        k_codes = key_codes + at * KEY.page_units
        k_params = key_params + at * KEY.page_params
        v_codes = value_codes + at * VALUE.page_units
        v_params = value_params + at * VALUE.page_params
        if KEY.rotary:
            scores, q_a, q_b = _rotary_page_scores(
                k_codes, k_params, key_book, q_a, q_b, offset_a, offset_b, cosine, sine,
                step_cosine, step_sine, KEY, FAST, DTYPE, PRECISION,
            )  # fmt: skip
            v = read_values(v_codes, value_book, VALUE, FAST, DTYPE)
        else:
            k = read_keys(k_codes, key_book, KEY, FAST, DTYPE)
            v = read_values(v_codes, value_book, VALUE, FAST, DTYPE)
            scores = _page_scores(k, k_params, q, q_sum, channel, channel_ok, KEY, FAST, PRECISION)
        slot = SINKS + page * PAGE + tl.arange(0, PAGE)
        if MASK_KIND > 0:
            scores += load_mask(
                mask, mask_rows, column_ok, slot, stride_m, mask_width, MASK_KIND, MASK_SHARED
            )
        scores = tl.where((slot < held)[:, None], scores, float("-inf"))
        if FOLD:
            scaled, decay, running_max, weights, offset = _folded_update(
                scores, running_max, v_params, value_group, VALUE, SPREAD
            )
        else:
            scaled, decay, running_max = softmax_update(scores, running_max, WEIGHT_BIAS)
            weights, offset = scaled, scaled
            if not VALUE.codebook:
                v = dequantize_values(v_params, v, VALUE, FAST)
        if not DEFER:
            weights, offset = tl.sum(weights, 0)[None, :], tl.sum(offset, 0)[None, :]
        running_sum = running_sum * decay[None, :] + weights
        if FOLD:
            running_zero = running_zero * decay[None, :] + offset
        accumulator = tl.dot(
            v, scaled.to(DTYPE), accumulator * decay[None, :], input_precision=PRECISION
        )
    if FOLD:
        accumulator += tl.sum(running_zero, 0)[None, :]
    return accumulator, tl.sum(running_sum, 0), running_max
