"""Attend to packed pages of one code width, in Triton: the loop of a program that reads a split of them.

Keys and values may be of different schemes, uniform and codebook, and keys channelwise: a page is loaded as it lies,
brought into registers by its scheme and multiplied as fp16, whose 11 bits hold codes and dequantized elements better
than bf16 does.

Where a key's parameters are the same for all its channels they are folded into its score, ``scale * (q . code) +
zero * sum(q)``, in fp32; elsewhere codes are dequantized in registers. The parameters of a value are folded into
its weight in the same way. With a few groups of channels to a value there is a copy of each query for each group:
columns that the matrix instruction would pad with, whose weights carry the parameters of their group, so that
folding costs nothing (``copies``). The accumulator of a copy is right in its group's channels.

Channel tables of keys are in the query already and those of values wait for the end (`query`, `join`), so that only
rotary keys need care here. A key of slot ``first + n`` is rotated by the angle of ``n``, the same for all pages and
held in registers, and the query is inverse-rotated by the angle of ``first``, page by page. A page is taken in two
halves, because that halves the angles to hold. Rotary keys are read as two tiles, the first and the second channel
of each rotation pair: in registers that have the same place, rotating them moves no data.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from kvq_compile.kernels.triton import channelwise, uniform
from kvq_compile.kernels.triton.channelwise_mean import start_mean
from kvq_compile.kernels.triton.constants import section_start
from kvq_compile.kernels.triton.primitives import (
    HIDDEN,
    WEIGHT_BIAS,
    adds_mean,
    bend_scores,
    bends,
    hide_scores,
    pair_fields,
    softmax_update,
)
from kvq_compile.kernels.triton.schemes import read_key_halves, read_keys, read_values
from kvq_compile.kernels.triton.transforms import cosine_and_sine, load_table, rotate_back
from kvq_compile.kernels.triton.trits import hold_places


class Queries(NamedTuple):
    """The queries of a program, one to a column of its tile.

    Attributes:
        pointer, rows: Where they lie: elements from the pointer to each.
        exists: Which columns stand for a query.
        group: Group of a value's channels that a copy of a query is for.
        mask: What they may attend to, a `MaskRows`.
        scale: Factor on scores, in units of log 2.
        bias: What the mean of packed keys adds to their scores, in units of log 2, where scores are bent.
        of_values: Pointer to what values are multiplied by, if they take part in scores, and rows from there.
    """

    pointer: Any
    rows: Any
    exists: Any
    group: Any
    mask: Any
    scale: Any
    bias: Any
    of_values: Any


class KeyPages(NamedTuple):
    """The packed keys of one KV head, all its pages.

    Attributes:
        codes, params: Of the first page.
        calibration: Tables and codebook of the head, and the position of slot 0.
        angles: Cosine and sine by which rotary keys of a block are rotated, ``[2, block, D / 2]``.
        fields: The `FieldQueries` of a tile, where channels differ in bits.
    """

    codes: Any
    params: Any
    calibration: Any
    angles: Any
    fields: Any


class ValuePages(NamedTuple):
    """The packed values of one KV head, all its pages, and the codebook of the head."""

    codes: Any
    params: Any
    book: Any


# --- rotation -------------------------------------------------------------------------------------


@triton.jit
def _rotate_keys(a, b, cosine, sine, FAST: tl.constexpr):
    """Return pairs ``a, b`` rotated by the angle."""
    if (
        FAST and a.dtype == tl.float16
    ):  # written out, for the compiler does not pair 16-bit operations
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
def _coded_mean(tables, channel, exists, KEY: tl.constexpr, DTYPE: tl.constexpr):
    """Return mean / scale of key channels: what their elements are coded relative to, in coded units."""
    mean = load_table(tables, channel, exists, "mean", KEY)
    where = tables + section_start("scale", KEY) + channel
    scale = tl.load(where, mask=exists, other=0x3F800000)  # 1.0
    return (mean / scale.to(tl.float32, bitcast=True)).to(DTYPE)


@triton.jit
def _rotary_scores(
    codes, params, book, q, mean, angle, KEY: tl.constexpr, FIRST: tl.constexpr,
    ROWS: tl.constexpr, LAUNCH: tl.constexpr,
):  # fmt: skip
    """Return the scores ``[ROWS, queries]`` of the tokens of a page from ``FIRST`` on."""
    FAST: tl.constexpr = LAUNCH.fast
    a, b = read_key_halves(codes, params, book, KEY, FIRST, ROWS, LAUNCH)
    a, b = _add(a, mean[0][None, :], FAST), _add(b, mean[1][None, :], FAST)
    a, b = _rotate_keys(a, b, angle[0], angle[1], FAST)
    k = tl.reshape(tl.permute(tl.join(a, b), (0, 2, 1)), (ROWS, KEY.columns))
    q_a, q_b = q
    q_ab = tl.permute(tl.join(q_a.to(LAUNCH.dtype), q_b.to(LAUNCH.dtype)), (2, 0, 1))
    q_ab = tl.reshape(q_ab, (KEY.columns, q_a.shape[1]))
    return tl.dot(k, q_ab, input_precision=LAUNCH.precision)


# --- the loop -------------------------------------------------------------------------------------


@triton.jit
def _load_query(queries, FIRST: tl.constexpr, channel, channel_ok):
    """Return queries ``[channels from FIRST on, queries]``, scaled, fp32."""
    ok = channel_ok[:, None] & queries.exists[None, :]
    where = queries.pointer + FIRST + queries.rows[None, :] + channel[:, None]
    return tl.load(where, mask=ok, other=0).to(tl.float32) * queries.scale


@triton.jit
def _load_value_query(queries, VALUE: tl.constexpr):
    """Return what values are multiplied by in scores, ``[channels, queries]``, scaled, fp32."""
    channel = tl.arange(0, VALUE.channels)
    ok = (channel < VALUE.head_dim)[:, None] & queries.exists[None, :]
    where = queries.of_values[0] + queries.of_values[1][None, :] + channel[:, None]
    return tl.load(where, mask=ok, other=0).to(tl.float32) * queries.scale


@triton.jit
def _group_vector(params, group, VALUE: tl.constexpr, COPIES: tl.constexpr):
    """Return ``scale, zero`` (fp32) of a page's values, a row each; a column for each copy."""
    token = tl.arange(0, VALUE.page_size)
    scale, zero = uniform.load_token_params(params, token, VALUE)
    scale, zero = scale.to(tl.float32)[:, None], zero.to(tl.float32)[:, None]
    for copy in tl.static_range(1, COPIES):
        scale_g, zero_g = uniform.load_token_params(params + copy * VALUE.page_size, token, VALUE)
        here = (group == copy)[None, :]
        scale = tl.where(here, scale_g.to(tl.float32)[:, None], scale)
        zero = tl.where(here, zero_g.to(tl.float32)[:, None], zero)
    return scale, zero


@triton.jit
def _start_rotation(queries, keys, first, KEY: tl.constexpr, DTYPE: tl.constexpr):
    """Return pairs of the query rotated back by the angle of slot ``first``, the coded means of key channels, the
    angles of a block's tokens and that of a whole block.
    """
    HALF: tl.constexpr = KEY.head_dim // 2
    tables = keys.calibration.tables
    channel, channel_ok = uniform.tile_channels(KEY.columns // 2, HALF, KEY)
    q_a = _load_query(queries, 0, channel, channel_ok)
    q_b = _load_query(queries, HALF, channel, channel_ok)
    mean_a = _coded_mean(tables, channel, channel_ok, KEY, DTYPE)
    mean_b = _coded_mean(tables, HALF + channel, channel_ok, KEY, DTYPE)
    frequency = load_table(tables, channel, channel_ok, "frequency", KEY)
    cosine, sine = cosine_and_sine((first + keys.calibration.shift) * frequency)
    q = rotate_back(q_a, q_b, cosine, sine)
    step = cosine_and_sine(KEY.block * frequency)
    where = keys.angles + tl.arange(0, KEY.block)[:, None] * HALF + channel[None, :]
    cosine = tl.load(where, mask=channel_ok[None, :], other=0).to(DTYPE)
    sine = tl.load(where + KEY.block * HALF, mask=channel_ok[None, :], other=0).to(DTYPE)
    return q, (mean_a, mean_b), (cosine, sine), step


@triton.jit
def _rotary_page_scores(
    codes, params, book, q_a, q_b, mean, angle, step, KEY: tl.constexpr, LAUNCH: tl.constexpr
):
    """Return the scores of a page, and the query rotated on to the next."""
    BLOCK: tl.constexpr = KEY.block
    scores = _rotary_scores(codes, params, book, (q_a, q_b), mean, angle, KEY, 0, BLOCK, LAUNCH)
    q_a, q_b = rotate_back(q_a, q_b, step[0], step[1])
    if KEY.page_size > BLOCK:
        second = _rotary_scores(
            codes, params, book, (q_a, q_b), mean, angle, KEY, BLOCK, BLOCK, LAUNCH
        )
        q_a, q_b = rotate_back(q_a, q_b, step[0], step[1])
        scores = tl.permute(tl.join(scores, second), (2, 0, 1))
        scores = tl.reshape(scores, (KEY.page_size, q_a.shape[1]))
    return scores, q_a, q_b


@triton.jit
def _page_scores(k, params, q, q_sum, channel, channel_ok, KEY: tl.constexpr, LAUNCH: tl.constexpr):
    """Return the scores of a page whose keys ``k`` have been read."""
    if KEY.scheme == "uniform" and uniform.folds_keys(KEY):
        k_scale, k_zero = uniform.load_token_params(params, tl.arange(0, KEY.page_size), KEY)
        scores = tl.dot(k, q, input_precision=LAUNCH.precision)
        scores = scores * k_scale.to(tl.float32)[:, None]
        scores += k_zero.to(tl.float32)[:, None] * q_sum[None, :]
    else:
        if KEY.scheme == "uniform":
            k = uniform.dequantize_keys(params, k, channel, channel_ok, KEY, 0, 0, LAUNCH.fast)
        scores = tl.dot(k, q, input_precision=LAUNCH.precision)
    return scores


@triton.jit
def bend_packed(scores, queries, KEY: tl.constexpr, LAUNCH: tl.constexpr):
    """Return capped and clamped scores of a page; what the keys' mean adds comes before, and not at the end."""
    if bends(LAUNCH):
        if adds_mean(KEY):
            scores += queries.bias[None, :]
        scores = bend_scores(scores, LAUNCH)
    return scores


@triton.jit
def _folded_update(
    scores, running_max, params, group, VALUE: tl.constexpr, COPIES: tl.constexpr,
    IN_PLACE: tl.constexpr,
):  # fmt: skip
    """Return `softmax_update` of weights that carry the values' scales, the plain weights, and these times the zero
    points.

    The scale joins the score, so that scaled weights are bounded; codes at scale 0 are 0. So does the power of two that
    codes of a token have where they lie.
    """
    v_scale, v_zero = _group_vector(params, group, VALUE, COPIES)
    v_scale = tl.maximum(v_scale, 2.0**-24)
    if uniform.is_balanced(VALUE):
        v_zero += v_scale
    v_scale = tl.log2(v_scale)
    if IN_PLACE and not uniform.is_balanced(VALUE):  # those lie in place 0
        v_scale -= uniform.token_place(VALUE)[:, None]
    scaled, decay, running_max = softmax_update(scores + v_scale, running_max, WEIGHT_BIAS)
    weights = tl.exp2(scores - (tl.maximum(running_max, HIDDEN) - WEIGHT_BIAS)[None, :])
    return scaled, decay, running_max, weights, weights * v_zero


@triton.jit
def attend_pages(
    queries, keys, values, lo, hi, kv_len, KEY: tl.constexpr, VALUE: tl.constexpr,
    LAUNCH: tl.constexpr,
):  # fmt: skip
    """Attend to the packed pages ``lo .. hi - 1``; return accumulator, sum and maximum.

    Longer than other functions: it is one loop, and what it carries would be a dozen arguments.
    """
    PAGE: tl.constexpr = KEY.page_size
    BLOCK_Q: tl.constexpr = LAUNCH.block_q
    BLOCK_V: tl.constexpr = VALUE.channels
    COPIES: tl.constexpr = LAUNCH.copies
    PLAIN: tl.constexpr = VALUE.scheme == "uniform" and VALUE.grouping == "token"
    OF_VALUES: tl.constexpr = LAUNCH.of_values  # values are needed as they are
    FOLD: tl.constexpr = PLAIN and VALUE.group_size * COPIES == VALUE.head_dim and not OF_VALUES
    IN_PLACE: tl.constexpr = FOLD and uniform.lies_in_place(VALUE, LAUNCH)
    DEFER: tl.constexpr = BLOCK_Q <= 16  # sum over keys once, at the end: no exchange between warps
    book = keys.calibration.book
    if KEY.rotary:
        q, mean, angle, step = _start_rotation(
            queries, keys, KEY.sinks + lo * PAGE, KEY, LAUNCH.dtype
        )
        q_a, q_b = q
    elif KEY.scheme == "channelwise":
        held = channelwise.hold_queries(keys.fields, KEY, LAUNCH)
        turning = start_mean(keys, lo, KEY, LAUNCH)
    else:
        channel, channel_ok = uniform.tile_channels(KEY.columns, KEY.head_dim, KEY)
        q = _load_query(queries, 0, channel, channel_ok).to(LAUNCH.dtype)
        q_sum = tl.sum(q.to(tl.float32), 0)
    if OF_VALUES:
        q_values = _load_value_query(queries, VALUE).to(LAUNCH.dtype)
    held_places = hold_places(values.codes, VALUE, LAUNCH.fast)
    running_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    running_sum = tl.zeros([PAGE if DEFER else 1, BLOCK_Q], tl.float32)
    running_zero = tl.zeros([PAGE if DEFER else 1, BLOCK_Q], tl.float32)
    accumulator = tl.zeros([BLOCK_V, BLOCK_Q], tl.float32)
    for page in tl.range(lo, hi, num_stages=LAUNCH.stages):
        at = tl.cast(page, tl.int64)
        k_codes = keys.codes + at * KEY.page_words
        k_params = keys.params + at * KEY.page_params
        v_codes = values.codes + at * VALUE.page_words
        v_params = values.params + at * VALUE.page_params
        if KEY.rotary:
            scores, q_a, q_b = _rotary_page_scores(
                k_codes, k_params, book, q_a, q_b, mean, angle, step, KEY, LAUNCH
            )
            v = read_values(v_codes, held_places, values.book, VALUE, FOLD, LAUNCH)
        elif KEY.scheme == "channelwise":
            scores, turning = channelwise.page_scores(
                page, k_codes, k_params, keys.fields, held, turning, KEY, LAUNCH
            )
            v = read_values(v_codes, held_places, values.book, VALUE, FOLD, LAUNCH)
        else:
            k = read_keys(k_codes, book, channel, channel_ok, KEY, LAUNCH)
            v = read_values(v_codes, held_places, values.book, VALUE, FOLD, LAUNCH)
            scores = _page_scores(k, k_params, q, q_sum, channel, channel_ok, KEY, LAUNCH)
        if OF_VALUES:
            if VALUE.scheme == "uniform":
                v = uniform.dequantize_values(v_params, v, VALUE, LAUNCH)
            scores = tl.dot(tl.trans(v), q_values, scores, input_precision=LAUNCH.precision)
        scores = bend_packed(scores, queries, KEY, LAUNCH)
        slot = KEY.sinks + page * PAGE + tl.arange(0, PAGE)
        scores = hide_scores(
            scores, slot, slot < kv_len, queries.mask, LAUNCH.mask_kind, LAUNCH.mask_shared
        )
        if FOLD:
            scaled, decay, running_max, weights, offset = _folded_update(
                scores, running_max, v_params, queries.group, VALUE, COPIES, IN_PLACE
            )
        else:
            scaled, decay, running_max = softmax_update(scores, running_max, WEIGHT_BIAS)
            weights, offset = scaled, scaled
            if VALUE.scheme == "uniform" and not OF_VALUES:
                v = uniform.dequantize_values(v_params, v, VALUE, LAUNCH)
        if not DEFER:
            weights, offset = tl.sum(weights, 0)[None, :], tl.sum(offset, 0)[None, :]
        running_sum = running_sum * decay[None, :] + weights
        if FOLD:
            running_zero = running_zero * decay[None, :] + offset
        scaled = scaled.to(LAUNCH.dtype)
        if uniform.pairs_values(VALUE, FOLD, LAUNCH):
            scaled = pair_fields(scaled)
        accumulator = tl.dot(
            v, scaled, accumulator * decay[None, :],
            input_precision=LAUNCH.precision,
        )  # fmt: skip
    if IN_PLACE:
        accumulator *= 2.0**24
    if FOLD:
        accumulator += tl.sum(running_zero, 0)[None, :]
    return accumulator, tl.sum(running_sum, 0), running_max
