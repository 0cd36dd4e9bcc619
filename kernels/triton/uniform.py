"""The uniform scheme in Triton: a group of elements shares a scale and a zero point.

Writing mirrors the specification bit by bit. It goes in tiles in which a group lies along one axis, so tiles stay small
for any head dimension and grouping.

Reading for attention brings a page into registers as it lies, keys ``[page_size, columns]`` and values ``[channels,
page_size]``, as codes that still lack scale and zero point: where these can be folded into scores and weights, `pages`
does so, elsewhere codes are dequantized in registers. Codes in bit fields are unpacked there (`primitives`), and so are
values in trits (`trits`); keys in trits take a load for each element, which is slow and always right.
"""

import triton
import triton.language as tl

from kvq_compile.kernels.channelwise_scheme import CLIPS as ALL_CLIPS
from kvq_compile.kernels.triton.coded_form import load_coded
from kvq_compile.kernels.triton.formats import (
    FP16_MAX,
    MIDDLE,
    MIDDLE_STEPS,
    bounded,
    e4m3_value,
    e5m3_value,
    join_params,
    round_down_fp16,
    round_e4m3,
    round_e5m3,
    round_up_fp16,
    split_middle_params,
    split_params,
    split_small_params,
    sum_pairs,
)
from kvq_compile.kernels.triton.packing import load_codes, load_words
from kvq_compile.kernels.triton.primitives import (
    load_rows,
    paired,
    place_of,
    row_fields,
    row_index,
    unpack_halves,
    unpack_rows,
    words_pad,
)
from kvq_compile.kernels.triton.transforms import load_table
from kvq_compile.kernels.triton.trits import unpack_trits

CLIPS, TRIALS = tl.constexpr(ALL_CLIPS), tl.constexpr(len(ALL_CLIPS))

# --- elements to codes ----------------------------------------------------------------------------


@triton.jit
def params_index(token, channel, CONSTANTS: tl.constexpr):
    """Return which of a page's groups an element is in."""
    if CONSTANTS.grouping == "channel":
        index = (token // CONSTANTS.group_size) * CONSTANTS.head_dim + channel
    else:
        index = (channel // CONSTANTS.group_size) * CONSTANTS.page_size + token
    return index


@triton.jit
def param_values(word, CONSTANTS: tl.constexpr):
    """Return ``scale, zero`` (fp32) of words of parameters, of 32 bits, or 16 where they are bytes."""
    if CONSTANTS.params == "e5m3":
        return split_middle_params(word, CONSTANTS.levels)
    elif CONSTANTS.params == "fp8":
        bits = word.to(tl.int32)
        return e4m3_value(bits & 0xFF), e4m3_value(bits >> 8)
    else:
        scale, zero = split_params(word)
        return scale.to(tl.float32), zero.to(tl.float32)


@triton.jit
def _group_params(x, exists, margin, AXIS: tl.constexpr, CONSTANTS: tl.constexpr):
    """Return the parameters, as words, of groups that lie along ``AXIS`` of ``x`` (fp32).

    ``margin`` is the fraction of a group's range that is cut off at each end, where the layout has tables.
    """
    finite = exists & (tl.abs(x) < float("inf"))
    lo = tl.min(tl.where(finite, bounded(x), float("inf")), AXIS)
    hi = tl.max(tl.where(finite, bounded(x), float("-inf")), AXIS)
    hi = tl.where(lo == float("inf"), 0.0, hi)
    lo = tl.where(lo == float("inf"), 0.0, lo)
    if CONSTANTS.has_tables:
        cut = (hi - lo) * margin
        lo, hi = lo + cut, hi - cut
    elif CONSTANTS.clip < 1.0:
        cut = (hi - lo) * ((1.0 - CONSTANTS.clip) / 2.0)
        lo, hi = lo + cut, hi - cut
    if CONSTANTS.search:
        return _searched_params(x, finite, lo, hi, AXIS, CONSTANTS)
    return _range_params(lo, hi, CONSTANTS)


@triton.jit
def _range_params(lo, hi, CONSTANTS: tl.constexpr):
    """Return the parameters, as words, of groups from ``lo`` to ``hi``."""
    levels = tl.full(lo.shape, CONSTANTS.levels, tl.float32)
    if CONSTANTS.params == "e5m3":
        return _middle_params(tl.minimum(lo, 0.0), tl.maximum(hi, 0.0), CONSTANTS)
    elif CONSTANTS.params == "fp8":
        zero = round_e4m3(lo)
        step = tl.div_rn(hi - e4m3_value(zero), levels)
        return (round_e4m3(tl.maximum(step, 0.0)) | (zero << 8)).to(tl.uint16)
    else:
        zero = round_down_fp16(lo)
        step = tl.div_rn(hi - zero.to(tl.float32), levels)
        return join_params(round_up_fp16(tl.minimum(step, FP16_MAX)), zero)


@triton.jit
def _middle_params(lo, hi, CONSTANTS: tl.constexpr):
    """Return e5m3 parameters, as words, of groups from ``lo`` to ``hi``, which includes 0."""
    stored = round_e5m3(tl.div_rn(hi - lo, tl.full(lo.shape, CONSTANTS.levels, tl.float32)))
    reach = e5m3_value(stored) * (CONSTANTS.levels * 0.5)
    middle = tl.div_rn((lo + hi) * 0.5, tl.where(reach > 0, reach, 1.0))
    place = tl.floor(middle * MIDDLE_STEPS + 0.5) + MIDDLE
    place = tl.minimum(tl.maximum(place, 1.0), 255.0).to(tl.int32)
    return (stored | (place << 8)).to(tl.uint16)


@triton.jit
def _margin(number):
    """Return what one of `CLIPS` cuts off at each end."""
    margin = number * 0.0
    for trial in tl.static_range(TRIALS):
        margin = tl.where(number == trial, (1.0 - CLIPS[trial]) / 2.0, margin)
    return margin


@triton.jit
def _sum_groups(x, AXIS: tl.constexpr):
    """Return `formats.sum_pairs` along ``AXIS``, the first of two or the last of three."""
    if AXIS == 0:
        return sum_pairs(tl.trans(x))
    else:
        rows = tl.reshape(x, (x.shape[0] * x.shape[1], x.shape[2]))
        return tl.reshape(sum_pairs(rows), (x.shape[0], x.shape[1]))


@triton.jit
def _searched_params(x, finite, lo, hi, AXIS: tl.constexpr, CONSTANTS: tl.constexpr):
    """Return the parameters, as words, of groups with the clips that leave the least squared error."""
    word = _range_params(lo, hi, CONSTANTS)
    least = tl.full(lo.shape, float("inf"), tl.float32)
    for number in range(TRIALS):  # not unrolled, as in `channelwise_write`
        cut = (hi - lo) * _margin(number)
        trial = _range_params(lo + cut, hi - cut, CONSTANTS)
        along = tl.expand_dims(trial, AXIS)
        scale, zero = param_values(along, CONSTANTS)
        value = encode(x, along, CONSTANTS).to(tl.float32) * scale + zero
        off = tl.where(finite, value - bounded(x), 0.0)
        error = _sum_groups(off * off, AXIS)
        word = tl.where(error < least, trial, word)
        least = tl.minimum(error, least)
    return word


@triton.jit
def _load_margin(tables, channel, exists, CONSTANTS: tl.constexpr):
    """Load the fraction of their range that groups lose at each end, if the layout has tables."""
    return load_table(tables, channel, exists, "margin", CONSTANTS) if CONSTANTS.has_tables else 0.0


@triton.jit
def write_params(source, params, scratch, tables, CONSTANTS: tl.constexpr, TILE: tl.constexpr):
    """Write the parameters of a page, in tiles in which a group lies along one axis."""
    HEAD_DIM: tl.constexpr = CONSTANTS.head_dim
    GROUP: tl.constexpr = CONSTANTS.group_size
    PAGE: tl.constexpr = CONSTANTS.page_size
    ROOM: tl.constexpr = TILE // 2 if CONSTANTS.search else TILE  # the best so far takes registers
    if CONSTANTS.grouping == "channel":
        CHANNELS: tl.constexpr = min(triton.next_power_of_2(HEAD_DIM), max(1, ROOM // GROUP))
        blocks: tl.constexpr = triton.cdiv(HEAD_DIM, CHANNELS)
        for block in range(0, PAGE // GROUP * blocks):
            token = block // blocks * GROUP + tl.arange(0, GROUP)[:, None]
            member = block % blocks * CHANNELS + tl.arange(0, CHANNELS)
            channel = member[None, :]
            exists = (token < PAGE) & (channel < HEAD_DIM)
            y = load_coded(source, scratch, token, channel, exists, CONSTANTS)
            margin = _load_margin(tables, member, member < HEAD_DIM, CONSTANTS)
            word = _group_params(y, exists, margin, 0, CONSTANTS)
            where = block // blocks * HEAD_DIM + member
            tl.store(params + where, word, mask=member < HEAD_DIM)
    else:
        GROUPS: tl.constexpr = triton.next_power_of_2(HEAD_DIM // GROUP)
        GROUP_PAD: tl.constexpr = triton.next_power_of_2(GROUP)
        TOKENS: tl.constexpr = min(PAGE, max(1, ROOM // (GROUPS * GROUP_PAD)))
        group = tl.arange(0, GROUPS)[None, :]
        inside = tl.arange(0, GROUP_PAD)[None, None, :]
        real = group < HEAD_DIM // GROUP
        margin = _load_margin(tables, group * GROUP, real, CONSTANTS)
        for block in range(0, PAGE, TOKENS):
            token = block + tl.arange(0, TOKENS)[:, None]
            channel = group[:, :, None] * GROUP + inside
            exists = (token[:, :, None] < PAGE) & (inside < GROUP) & (channel < HEAD_DIM)
            y = load_coded(source, scratch, token[:, :, None], channel, exists, CONSTANTS)
            word = _group_params(y, exists, margin, 2, CONSTANTS)
            tl.store(params + group * PAGE + token, word, mask=(token < PAGE) & real)


@triton.jit
def encode(x, word, CONSTANTS: tl.constexpr):
    """Return the codes (int32) of ``x`` (fp32) in groups with parameters ``word``."""
    scale, zero = param_values(word, CONSTANTS)
    codes = tl.floor(tl.div_rn(bounded(x) - zero, tl.where(scale > 0, scale, 1.0)) + 0.5)
    codes = tl.minimum(tl.maximum(codes, 0.0), CONSTANTS.levels)
    return tl.where(scale > 0, codes, 0.0).to(tl.int32)


@triton.jit
def page_codes(source, params, scratch, token, channel, exists, CONSTANTS: tl.constexpr):
    """Return the codes (int32) of a page whose parameters have been written."""
    y = load_coded(source, scratch, token, channel, exists, CONSTANTS)
    where = params + params_index(token, channel, CONSTANTS)
    return encode(y, tl.load(where, mask=exists, other=0), CONSTANTS)


# --- codes to elements ----------------------------------------------------------------------------


@triton.jit
def load_elements(page, token, channel, exists, CONSTANTS: tl.constexpr):
    """Return the elements (fp32) that a page's codes stand for, in the basis they were coded in, load by load."""
    code = load_codes(page.codes, token, channel, exists, CONSTANTS)
    where = page.params + params_index(token, channel, CONSTANTS)
    scale, zero = param_values(tl.load(where, mask=exists, other=0), CONSTANTS)
    return code.to(tl.float32) * scale + zero


@triton.jit
def load_params(where, exists, CONSTANTS: tl.constexpr):
    """Return ``scale, zero`` of groups, in fp16, or fp32 for e5m3, whose zero points fp16 would round; ``exists`` may
    be ``None``.
    """
    return _split_params(load_words(where, exists), CONSTANTS)


@triton.jit
def load_token_params(params, token, CONSTANTS: tl.constexpr):
    """Return `load_params` of the tokens of a page. Words of 16 bits, which are not loaded ahead, are halves of what is
    loaded.
    """
    if CONSTANTS.params == "fp16":
        word = tl.load(params + token)
    else:
        pairs = params.to(tl.pointer_type(tl.int32), bitcast=True) + token // 2
        word = (tl.load(pairs) >> 16 * (token % 2)).to(tl.uint16)
    return _split_params(word, CONSTANTS)


@triton.jit
def _choose_params(params, token, group, AXIS: tl.constexpr, CONSTANTS: tl.constexpr):
    """Return ``scale, zero`` of the elements of a tile of tokens, whose channels lie along ``AXIS`` and belong to
    ``group``.

    They are chosen in registers: loaded for each element and some pages ahead, they would fill shared memory.
    """
    scale, zero = load_token_params(params, token, CONSTANTS)
    scale, zero = tl.expand_dims(scale, AXIS), tl.expand_dims(zero, AXIS)
    for other in tl.static_range(1, CONSTANTS.head_dim // CONSTANTS.group_size):
        s, z = load_token_params(params + other * CONSTANTS.page_size, token, CONSTANTS)
        scale = tl.where(group == other, tl.expand_dims(s, AXIS), scale)
        zero = tl.where(group == other, tl.expand_dims(z, AXIS), zero)
    return scale, zero


@triton.jit
def _split_params(word, CONSTANTS: tl.constexpr):
    """Return ``scale, zero`` of words of parameters."""
    if CONSTANTS.params == "e5m3":
        scale, zero = split_middle_params(word, CONSTANTS.levels)
    elif CONSTANTS.params == "fp8":
        scale, zero = split_small_params(word)
    else:
        scale, zero = split_params(word)
    return scale, zero


@triton.jit
def _scale_codes(codes, scale, zero, FAST: tl.constexpr):
    """Return ``codes * scale + zero`` in the dtype of ``codes``."""
    if codes.dtype == tl.float16 and zero.dtype == tl.float32:  # of e5m3, which may lie beyond fp16
        scale, zero = scale.to(tl.float16), tl.maximum(zero, -FP16_MAX).to(tl.float16)
    if (
        FAST and codes.dtype == tl.float16
    ):  # written out, or pairs of scales are put together anew for every pair of codes
        return tl.inline_asm_elementwise(
            "fma.rn.f16x2 $0, $1, $2, $3;",
            "=r,r,r,r",
            args=[codes, scale, zero],
            dtype=tl.float16,
            is_pure=True,
            pack=2,
        )
    return codes * scale.to(codes.dtype) + zero.to(codes.dtype)


@triton.constexpr_function
def folds_keys(key):
    """Return whether scale and zero point of a token's key are applied to its scores."""
    return key.grouping == "token" and key.group_size == key.head_dim


@triton.constexpr_function
def pairs_keys(key):
    """Return whether tiles of keys are paired: where nothing depends on the order of their columns."""
    free = folds_keys(key) or key.grouping == "channel"
    return key.in_fields and free and not key.rotary and words_pad(key.row_places, key.bits) == 8


@triton.constexpr_function
def pairs_values(value, fold, launch):
    """Return whether tiles of values are paired; ``fold``: their parameters are folded into weights."""
    if value.packing == "trits":  # groups of tokens that columns change places in stay together
        return not launch.of_values and (value.grouping == "token" or value.group_size % 16 == 0)
    return fold and value.in_fields and words_pad(value.page_size, value.bits) == 8


@triton.jit
def tile_channels(COLUMNS: tl.constexpr, LENGTH: tl.constexpr, CONSTANTS: tl.constexpr):
    """Return the channels that the columns of a tile of keys stand for, and which of ``LENGTH`` exist."""
    column = tl.arange(0, COLUMNS)
    if CONSTANTS.in_fields:
        PAIRED: tl.constexpr = pairs_keys(CONSTANTS)
        channel, exists = row_index(column, CONSTANTS.row_places, CONSTANTS.bits, PAIRED)
        if CONSTANTS.row_places > CONSTANTS.head_dim:
            exists &= channel < CONSTANTS.head_dim
    else:
        channel, exists = column, column < LENGTH
    return channel, exists


@triton.jit
def read_keys(codes, channel, exists, KEY: tl.constexpr, LAUNCH: tl.constexpr):
    """Return the codes ``[page_size, columns]`` of a page of keys, as numbers of the dtype of operands."""
    token = tl.arange(0, KEY.page_size)
    if KEY.in_fields:
        words = load_rows(codes, token, KEY.row_places, KEY.page_size, KEY.bits)
        k = unpack_rows(words, KEY.bits, pairs_keys(KEY), LAUNCH.fast, False, LAUNCH.dtype)
    else:
        k = load_codes(codes, token[:, None], channel[None, :], exists[None, :], KEY)
    return k.to(LAUNCH.dtype)


@triton.jit
def read_key_halves(
    codes, channel, exists, KEY: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr,
    LAUNCH: tl.constexpr,
):  # fmt: skip
    """Return the codes of ``ROWS`` keys from ``FIRST`` on as two tiles ``[ROWS, columns / 2]``."""
    if KEY.in_fields:
        row = tl.arange(0, ROWS)
        words = load_rows(codes + FIRST * KEY.row_words, row, KEY.row_places, ROWS, KEY.bits)
        a, b = unpack_halves(words, KEY.bits, LAUNCH.fast, LAUNCH.dtype)
    else:
        token, ok = (FIRST + tl.arange(0, ROWS))[:, None], exists[None, :]
        a = load_codes(codes, token, channel[None, :], ok, KEY)
        b = load_codes(codes, token, KEY.head_dim // 2 + channel[None, :], ok, KEY)
    return a.to(LAUNCH.dtype), b.to(LAUNCH.dtype)


@triton.jit
def dequantize_keys(
    params, codes, channel, exists, KEY: tl.constexpr, FIRST: tl.constexpr, BASE: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Return ``codes * scale + zero`` for codes of tokens from ``FIRST`` on, channels from ``BASE`` on."""
    ROWS: tl.constexpr = codes.shape[0]
    COLUMNS: tl.constexpr = codes.shape[1]
    GROUP: tl.constexpr = KEY.group_size
    if KEY.grouping == "channel":
        SIZE: tl.constexpr = min(GROUP, ROWS)
        group = FIRST // GROUP + tl.arange(0, ROWS // SIZE)
        where = params + group[:, None] * KEY.head_dim + channel[None, :]
        if KEY.columns == KEY.head_dim:
            scale, zero = load_params(where, None, KEY)
        else:
            scale, zero = load_params(where, exists[None, :], KEY)
        grouped = tl.reshape(codes, (ROWS // SIZE, SIZE, COLUMNS))
        x = _scale_codes(grouped, scale[:, None, :], zero[:, None, :], FAST)
    elif KEY.columns == KEY.head_dim and (GROUP & (GROUP - 1)) == 0:
        WIDTH: tl.constexpr = min(GROUP, COLUMNS)
        token = FIRST + tl.arange(0, ROWS)
        group = BASE // GROUP + tl.arange(0, COLUMNS // WIDTH)
        where = params + group[None, :] * KEY.page_size + token[:, None]
        scale, zero = load_params(where, None, KEY)
        grouped = tl.reshape(codes, (ROWS, COLUMNS // WIDTH, WIDTH))
        x = _scale_codes(grouped, scale[:, :, None], zero[:, :, None], FAST)
    else:
        token = FIRST + tl.arange(0, ROWS)
        scale, zero = _choose_params(params, token, (channel // GROUP)[None, :], 1, KEY)
        x = _scale_codes(codes, scale, zero, FAST)
    return tl.reshape(x, (ROWS, COLUMNS))


@triton.constexpr_function
def lies_in_place(value, launch):
    """Return whether codes of values whose parameters are folded into weights are read where they lie in a word: as
    numbers of which weights take a power of two.
    """
    return launch.fast and (value.packing == "trits" or (value.in_fields and value.bits > 1))


@triton.constexpr_function
def is_balanced(value):
    """Return whether codes of values whose parameters are folded into weights are read less 1."""
    return value.packing == "trits"


@triton.jit
def token_place(VALUE: tl.constexpr):
    """Return the exponents ``[page_size]`` by which codes of each token are larger than ``2 ** -24`` where they lie."""
    WORDS: tl.constexpr = VALUE.page_size // row_fields(VALUE.bits)
    return place_of(tl.arange(0, VALUE.page_size) // WORDS, VALUE.bits).to(tl.float32)


@triton.jit
def read_values(codes, held, VALUE: tl.constexpr, FOLD: tl.constexpr, LAUNCH: tl.constexpr):
    """Return the codes ``[channels, page_size]`` of values, as numbers of the dtype of operands.

    ``held``: from `trits.hold_places`.
    ``FOLD``: their parameters are folded into weights, so that codes may be as and where they lie.
    """
    channel = tl.arange(0, VALUE.channels)
    PAIRED: tl.constexpr = pairs_values(VALUE, FOLD, LAUNCH)
    if VALUE.in_fields:
        words = load_rows(codes, channel, VALUE.page_size, VALUE.head_dim, VALUE.bits)
        IN_PLACE: tl.constexpr = FOLD and lies_in_place(VALUE, LAUNCH)
        v = unpack_rows(words, VALUE.bits, PAIRED, LAUNCH.fast, IN_PLACE, LAUNCH.dtype)
    elif VALUE.packing == "trits":
        v = unpack_trits(codes, channel, held, VALUE, PAIRED, FOLD, LAUNCH.fast)
    else:
        token, exists = tl.arange(0, VALUE.page_size), (channel < VALUE.head_dim)[:, None]
        v = load_codes(codes, token[None, :], channel[:, None], exists, VALUE)
    return v.to(LAUNCH.dtype)


@triton.jit
def dequantize_values(params, codes, VALUE: tl.constexpr, LAUNCH: tl.constexpr):
    """Return ``codes * scale + zero`` for codes ``[channels, page_size]``."""
    FAST: tl.constexpr = LAUNCH.fast
    ROWS: tl.constexpr = codes.shape[0]
    PAGE: tl.constexpr = VALUE.page_size
    GROUP: tl.constexpr = VALUE.group_size
    channel = tl.arange(0, ROWS)
    token = tl.arange(0, PAGE)
    if pairs_values(VALUE, False, LAUNCH):
        token = paired(token)
    if VALUE.grouping == "channel":
        group = tl.arange(0, PAGE // GROUP)
        where = params + group[None, :] * VALUE.head_dim + channel[:, None]
        scale, zero = load_params(where, (channel < VALUE.head_dim)[:, None], VALUE)
        grouped = tl.reshape(codes, (ROWS, PAGE // GROUP, GROUP))
        x = _scale_codes(grouped, scale[:, :, None], zero[:, :, None], FAST)
    elif GROUP <= ROWS and (GROUP & (GROUP - 1)) == 0:
        group = tl.arange(0, ROWS // GROUP)
        where = params + group[:, None] * PAGE + token[None, :]
        if VALUE.head_dim == ROWS:
            scale, zero = load_params(where, None, VALUE)
        else:
            scale, zero = load_params(where, (group < VALUE.head_dim // GROUP)[:, None], VALUE)
        grouped = tl.reshape(codes, (ROWS // GROUP, GROUP, PAGE))
        x = _scale_codes(grouped, scale[:, None, :], zero[:, None, :], FAST)
    else:
        scale, zero = _choose_params(params, token, (channel // GROUP)[:, None], 0, VALUE)
        x = _scale_codes(codes, scale, zero, FAST)
    return tl.reshape(x, (ROWS, PAGE))
