"""The mixed-precision scheme in Triton: reading packed pages, and attention's loop over them.

A token's row of a bit plane is found by its rank, so that a tile of codes comes out in the order of slots for keys and
for values alike, and neither scores nor weights are permuted. Planes that a token does not have are not loaded. Since
codes are embedded a plane weighs the same in all tokens: the codes of a tile are put together without looking at the
bits of a token, which enter once, as part of what a token adds to all of its channels::

    x = half_range * 2 ** (1 - BITS) * code + (zero + half_range * (2 ** -bits - 1))

Both terms belong to the token and are folded into the score of a key and the weight of a value, in fp32. With outliers
they are not: elements are then dequantized in registers, and outliers replaced.

The rows of a token depend on the header and the ranks of its page, which are read one page ahead.

On NVIDIA hardware planes are merged in registers, by selections under a mask: first pairs of planes to fields of two
bits, those of even and those of odd fields apart, then pairs of these to fields of four bits, and so on
(`merge_planes`); from there on it goes as in `primitives`. A tile has its channels in the order of fields, place
``f * WORDS_PAD + w`` for channel ``16 w + f``.
"""

import triton
import triton.language as tl

from kvq_compile.kernels.mixed_scheme import HEADER as HEADER_WORDS
from kvq_compile.kernels.mixed_scheme import MAX_BITS as MOST_BITS
from kvq_compile.kernels.triton.formats import e4m3_value
from kvq_compile.kernels.triton.primitives import (
    HIDDEN,
    WEIGHT_BIAS,
    bend_scores,
    flat_tile,
    hide_scores,
    join_8,
    softmax_update,
)

HEADER = tl.constexpr(HEADER_WORDS)
MAX_BITS = tl.constexpr(MOST_BITS)
LEAST_FACTOR = tl.constexpr(2.0**-32)  # below any that is not zero, and a power of two


# --- elements, load by load -----------------------------------------------------------------------


@triton.jit
def power_of_2(exponent):
    """Return ``2 ** exponent`` (fp32) of small integers."""
    return ((127 + exponent) << 23).to(tl.float32, bitcast=True)


@triton.jit
def stored_value(stored, CONSTANTS: tl.constexpr):
    """Convert a stored zero point or half-range to fp32."""
    if CONSTANTS.params == "fp8":
        x = e4m3_value(stored)
    else:
        x = stored.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return x


@triton.jit
def _load_bytes(where, exists, SIZE: tl.constexpr, CONSTANTS: tl.constexpr):
    """Return integers of ``SIZE`` bytes in neighbouring fields of metadata, the low byte first."""
    stored = tl.load(where, mask=exists, other=0).to(tl.int32)
    if SIZE == 2:
        high = tl.load(where + CONSTANTS.page_size, mask=exists, other=0).to(tl.int32)
        stored |= high << 8
    return stored


@triton.jit
def stored_half_range(metadata, token, CONSTANTS: tl.constexpr):
    """Return the half-range of tokens of a page."""
    SIZE: tl.constexpr = CONSTANTS.param_bytes
    where = metadata + SIZE * CONSTANTS.page_size + token
    stored = _load_bytes(where, token < CONSTANTS.page_size, SIZE, CONSTANTS)
    return stored_value(stored, CONSTANTS)


@triton.jit
def load_elements(page, token, channel, exists, CONSTANTS: tl.constexpr):
    """Return the elements (fp32) that a page stands for in the basis it was coded in, a load for each bit; for
    ``token`` ``[rows, 1]``, ``channel`` ``[1, channels]``.
    """
    PAGE: tl.constexpr = CONSTANTS.page_size
    SIZE: tl.constexpr = CONSTANTS.param_bytes
    BITS: tl.constexpr = CONSTANTS.bits
    OUTLIERS: tl.constexpr = CONSTANTS.outliers
    WIDE: tl.constexpr = CONSTANTS.outlier_fields - 2  # bytes of a channel
    WORDS: tl.constexpr = triton.cdiv(CONSTANTS.head_dim, 16)
    real = token < PAGE
    where = page.params + token
    rank = tl.load(where + CONSTANTS.rank_field * PAGE, mask=real, other=0).to(tl.int32)
    zero = stored_value(_load_bytes(where, real, SIZE, CONSTANTS), CONSTANTS)
    half_range = stored_half_range(page.params, token, CONSTANTS)
    levels = tl.zeros(exists.shape, tl.int32)
    bits = tl.zeros(rank.shape, tl.int32)
    first = 0
    for plane in tl.static_range(BITS):
        tokens = tl.load(page.codes + plane).to(tl.int32)
        has = rank < tokens
        row = page.codes + HEADER + (first + rank) * WORDS
        word = tl.load(row + channel // 16, mask=exists & has, other=0).to(tl.int32)
        levels += ((word >> (channel % 16)) & 1) << (MAX_BITS - 1 - plane)
        bits += has.to(tl.int32)
        first += tokens
    middle = levels.to(tl.float32) * 0.0078125 + (power_of_2(-bits) - 1.0)
    x = middle * half_range + zero
    for outlier in tl.static_range(OUTLIERS):
        at = 2 * SIZE + 1 + CONSTANTS.outlier_fields * outlier
        here = _load_bytes(where + at * PAGE, real, WIDE, CONSTANTS)
        stored = _load_bytes(where + (at + WIDE) * PAGE, real, 2, CONSTANTS)
        stored = stored.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
        x = tl.where(channel == here, stored, x)
    return x


# --- tiles of codes -------------------------------------------------------------------------------


def merge_planes(bits: int) -> str:
    """Return PTX that turns words of ``bits`` planes, ``$16`` and up, into their 16 fields, fp16 pairs.

    ``words[c]`` holds bit ``c`` of the codes, from the lowest. A step with slots of ``size`` bits merges ``low`` and
    ``high`` into slots twice as wide, in which there is room for every other field.
    """
    width = 1 << (bits - 1).bit_length()
    lines, fresh = [], iter(range(1000))
    words = [f"${16 + bits - 1 - c}" if c < bits else "" for c in range(width)]
    classes = {0: words}  # of fields that are equal modulo the fields that a word has room for
    size = 1
    while size < width:
        slot = (1 << size) - 1
        mask = sum(slot << at for at in range(0, 32, 2 * size))
        merged: dict[int, list[str]] = {}
        for residue, parts in classes.items():
            for odd in (0, 1):
                row = merged.setdefault(residue + odd * size, [])
                for low, high in zip(parts[::2], parts[1::2], strict=True):
                    name = f"w{next(fresh)}" if low else ""
                    row.append(name)
                    if low and odd:
                        lines.append(f"shr.b32 {name}, {low}, {size};")
                        low = name
                    if low and high and not odd:
                        lines.append(f"shl.b32 {name}, {high}, {size};")
                        high = name
                    if low and high:
                        lines.append(f"lop3.b32 {name}, {low}, {high}, 0x{mask:08X}, 0xE4;")
                    elif low:
                        lines.append(f"and.b32 {name}, {low}, 0x{mask:08X};")
        classes, size = merged, 2 * size
    for residue, (word,) in classes.items():
        shifted = f"w{next(fresh)}"
        if any(at + bits > 10 for at in range(0, 16, width)):
            lines.append(f"shr.b32 {shifted}, {word}, 8;")
        for at in range(0, 16, width):
            source, place = (word, at) if at + bits <= 10 else (shifted, at - 8)
            mask = ((1 << bits) - 1 << place) * 0x10001
            magic = (25 - place << 10) * 0x10001  # 2 ** (10 - place): its mantissa counts in codes
            lines.append(f"mov.b32 m, 0x{magic:08X}; lop3.b32 x, {source}, 0x{mask:08X}, m, 0xEA;")
            lines.append(f"sub.f16x2 ${at + residue}, x, m;")
    registers = ", ".join(["m", "x", *(f"w{n}" for n in range(next(fresh)))])
    return "{ .reg .b32 " + registers + ";\n" + "\n".join(lines) + " }"


MERGE = tl.constexpr(tuple(merge_planes(bits) for bits in range(1, MOST_BITS + 1)))


@triton.constexpr_function
def _constraints(bits):
    return ",".join(["=&r"] * 16 + ["r"] * bits)


@triton.jit
def load_planes(codes, rank, header, CONSTANTS: tl.constexpr):
    """Return the words ``[page_size, words]`` of each plane, 0 where a token does not have it."""
    BITS: tl.constexpr = CONSTANTS.bits
    WORDS: tl.constexpr = triton.cdiv(CONSTANTS.head_dim, 16)
    WORDS_PAD: tl.constexpr = triton.next_power_of_2(WORDS)
    word = tl.arange(0, WORDS_PAD)
    planes = ()
    first = 0
    for plane in tl.static_range(BITS):
        tokens = header[plane].to(tl.int32)
        row = codes + HEADER + (first + rank) * WORDS
        exists = (rank < tokens)[:, None]
        if WORDS_PAD > WORDS:
            exists &= (word < WORDS)[None, :]
        planes += (tl.load(row[:, None] + word[None, :], mask=exists, other=0),)  # type: ignore[assignment]
        first += tokens
    return planes


@triton.jit
def _unpack_planes(planes, KEYS: tl.constexpr, CONSTANTS: tl.constexpr, LAUNCH: tl.constexpr):
    """Return the codes ``[page_size, columns]`` of words from `load_planes`, with zeros for bits not kept."""
    BITS: tl.constexpr = CONSTANTS.bits
    PAGE: tl.constexpr = CONSTANTS.page_size
    COLUMNS: tl.constexpr = CONSTANTS.columns
    # A head of 16 channels has one word a token. With pack=2 the instructions below then led to wrong scores on an
    # H100 (Triton 3.6) where the key has outliers; so such heads take the plain way.
    if LAUNCH.fast and COLUMNS > 16:
        a, b, c, d, e, f, g, h, i, j, k, m, n, o, p, q = tl.inline_asm_elementwise(
            MERGE[CONSTANTS.bits - 1],
            _constraints(CONSTANTS.bits),
            args=planes,
            dtype=(tl.float16,) * 16,
            is_pure=True,
            pack=2,
        )
        even, odd = join_8(a, c, e, g, i, k, n, p), join_8(b, d, f, h, j, m, o, q)
        codes = tl.permute(tl.join(even, odd), (0, 2, 3, 4, 5, 1))
    else:
        field = tl.arange(0, 16)[None, :, None]
        codes = tl.zeros((PAGE, 16, COLUMNS // 16), tl.int32)
        for plane in tl.static_range(BITS):
            word = planes[plane].to(tl.int32)[:, None, :]
            codes += ((word >> field) & 1) << (CONSTANTS.bits - 1 - plane)
    if KEYS and COLUMNS > 16:  # as `tile_channels` says
        codes = tl.reshape(codes, (PAGE, 8, 2, COLUMNS // 32, 2))
        codes = tl.permute(codes, (0, 1, 3, 2, 4))
    return flat_tile(codes, PAGE, COLUMNS).to(LAUNCH.dtype)


# --- metadata of tokens ---------------------------------------------------------------------------


@triton.jit
def load_page(codes, metadata, page, exists, CONSTANTS: tl.constexpr):
    """Return zero point, half-range and rank of a page's tokens, as bytes, and the words of its header."""
    BITS: tl.constexpr = CONSTANTS.bits
    at = tl.cast(page, tl.int64)
    where = metadata + at * CONSTANTS.page_params + tl.arange(0, CONSTANTS.page_size)
    fields = ()
    for field in tl.static_range(CONSTANTS.rank_field + 1):
        byte = tl.load(where + field * CONSTANTS.page_size, mask=exists, other=0)
        fields += (byte,)  # type: ignore[assignment]  # a tuple that grows
    header = ()
    for plane in tl.static_range(BITS):
        tokens = tl.load(codes + at * CONSTANTS.page_words + plane, mask=exists, other=0)
        header += (tokens,)  # type: ignore[assignment]
    return fields, header


@triton.jit
def _field_value(fields, FIRST: tl.constexpr, CONSTANTS: tl.constexpr):
    """Convert e4m3 bytes, or pairs of bytes of fp16 values, to fp32."""
    if CONSTANTS.params == "fp8":  # the same fields, read with the exponent bias of fp16
        byte = fields[FIRST].to(tl.int32)
        half = (((byte & 0x80) << 8) | ((byte & 0x7F) << 7)).to(tl.uint16)
        x = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        half = fields[2 * FIRST].to(tl.uint16) | (fields[2 * FIRST + 1].to(tl.uint16) << 8)
        x = half.to(tl.float16, bitcast=True).to(tl.float32)
    return x


@triton.jit
def _token_terms(fields, header, CONSTANTS: tl.constexpr):
    """Return the factor of a token's codes and what it adds to all channels, fp32."""
    BITS: tl.constexpr = CONSTANTS.bits
    rank = fields[CONSTANTS.rank_field].to(tl.int32)
    bits = tl.zeros(rank.shape, tl.int32)
    for plane in tl.static_range(BITS):
        bits += (rank < header[plane].to(tl.int32)).to(tl.int32)
    zero, half_range = _field_value(fields, 0, CONSTANTS), _field_value(fields, 1, CONSTANTS)
    middle = ((127 - bits) << 23).to(tl.float32, bitcast=True)  # 2 ** -bits
    return half_range * (2.0 ** (1 - CONSTANTS.bits)), zero + half_range * (middle - 1.0)


@triton.jit
def _tile_channels(KEYS: tl.constexpr, CONSTANTS: tl.constexpr):
    """Return the channel that each place of a tile stands for.

    The lowest digit of the field of a key comes behind that of its word: that is where the matrix instruction wants
    the elements that a lane has side by side.
    """
    WORDS_PAD: tl.constexpr = CONSTANTS.columns // 16
    place = tl.arange(0, CONSTANTS.columns)
    word, field = place % WORDS_PAD, place // WORDS_PAD
    if KEYS and WORDS_PAD > 1:
        word = place // 4 % (WORDS_PAD // 2) * 2 + place % 2
        field = place // (2 * WORDS_PAD) * 2 + place // 2 % 2
    return word * 16 + field


@triton.jit
def in_tile_order(q, CONSTANTS: tl.constexpr):
    """Return queries ``[queries, channels]``, padded, with their channels in the order of a tile of keys."""
    WORDS_PAD: tl.constexpr = CONSTANTS.columns // 16
    y = q
    if WORDS_PAD > 1:
        y = tl.reshape(y, (q.shape[0], WORDS_PAD // 2, 2, 8, 2))
        y = tl.reshape(tl.permute(y, (0, 3, 1, 4, 2)), (q.shape[0], CONSTANTS.columns))
    return y


@triton.jit
def _place_outliers(x, metadata, factor, offset, KEYS: tl.constexpr, CONSTANTS: tl.constexpr):
    """Return codes ``x`` ``[page_size, columns]`` dequantized, with the outliers in their places."""
    PAGE: tl.constexpr = CONSTANTS.page_size
    OUTLIERS: tl.constexpr = CONSTANTS.outliers
    WIDE: tl.constexpr = CONSTANTS.outlier_fields - 2
    channel = _tile_channels(KEYS, CONSTANTS)[None, :]
    where = metadata + tl.arange(0, PAGE)
    x = x * factor.to(x.dtype)[:, None] + offset.to(x.dtype)[:, None]
    for outlier in tl.static_range(OUTLIERS):
        at = CONSTANTS.rank_field + 1 + CONSTANTS.outlier_fields * outlier
        here = tl.load(where + at * PAGE).to(tl.int32)
        if WIDE == 2:
            here |= tl.load(where + (at + 1) * PAGE).to(tl.int32) << 8
        low = tl.load(where + (at + WIDE) * PAGE).to(tl.uint16)
        high = tl.load(where + (at + WIDE + 1) * PAGE).to(tl.uint16)
        value = (low | (high << 8)).to(tl.float16, bitcast=True).to(x.dtype)
        x = tl.where(channel == here[:, None], value[:, None], x)
    return x


# --- attention ------------------------------------------------------------------------------------


@triton.jit
def page_scores(
    q, q_sum, planes, fields, header, metadata, KEY: tl.constexpr, LAUNCH: tl.constexpr
):
    """Return the products ``[page_size, queries]`` of a page's keys with queries.

    ``q`` are the queries ``[columns, queries]`` in the dtype of operands, their channels in the order of a tile of
    keys; ``q_sum`` is its sum over them.
    """
    k = _unpack_planes(planes, True, KEY, LAUNCH)
    factor, offset = _token_terms(fields, header, KEY)
    if KEY.outliers == 0:
        scores = tl.dot(k, q, input_precision=LAUNCH.precision) * factor[:, None]
        scores += offset[:, None] * q_sum[None, :]
    else:
        k = _place_outliers(k, metadata, factor, offset, True, KEY)
        scores = tl.dot(k, q, input_precision=LAUNCH.precision)
    return scores


@triton.jit
def attend_mixed_pages(
    queries, keys, values, lo, hi, kv_len, KEY: tl.constexpr, VALUE: tl.constexpr,
    LAUNCH: tl.constexpr,
):  # fmt: skip
    """Attend to the packed pages ``lo .. hi - 1``; return the accumulator, its rows the channels in their order, the
    sum and the maximum.

    Longer than other functions: it is one loop, and what it carries would be a dozen arguments.
    """
    PAGE: tl.constexpr = KEY.page_size
    BLOCK_Q: tl.constexpr = LAUNCH.block_q
    BLOCK_V: tl.constexpr = VALUE.columns
    DEFER: tl.constexpr = BLOCK_Q <= 16  # sum over keys once, at the end: no exchange between warps
    token = tl.arange(0, PAGE)
    channel = _tile_channels(True, KEY)
    q_ok = (channel < KEY.head_dim)[:, None] & queries.exists[None, :]
    q = tl.load(queries.pointer + queries.rows[None, :] + channel[:, None], mask=q_ok, other=0)
    q = (q.to(tl.float32) * queries.scale).to(LAUNCH.dtype)
    q_sum = tl.sum(q.to(tl.float32), 0)
    running_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    running_sum = tl.zeros([PAGE if DEFER else 1, BLOCK_Q], tl.float32)
    running_offset = tl.zeros([PAGE if DEFER else 1, BLOCK_Q], tl.float32)
    accumulator = tl.zeros([BLOCK_V, BLOCK_Q], tl.float32)
    next_key = load_page(keys.codes, keys.params, lo, lo < hi, KEY)
    next_value = load_page(values.codes, values.params, lo, lo < hi, VALUE)
    for page in tl.range(lo, hi, num_stages=LAUNCH.stages):
        at = tl.cast(page, tl.int64)
        k_fields, k_header = next_key
        v_fields, v_header = next_value
        next_key = load_page(keys.codes, keys.params, page + 1, page + 1 < hi, KEY)
        next_value = load_page(values.codes, values.params, page + 1, page + 1 < hi, VALUE)
        k_rank = k_fields[KEY.rank_field].to(tl.int32)
        v_rank = v_fields[VALUE.rank_field].to(tl.int32)
        k_planes = load_planes(keys.codes + at * KEY.page_words, k_rank, k_header, KEY)
        v_planes = load_planes(values.codes + at * VALUE.page_words, v_rank, v_header, VALUE)
        k_metadata = keys.params + at * KEY.page_params
        scores = page_scores(q, q_sum, k_planes, k_fields, k_header, k_metadata, KEY, LAUNCH)
        scores = bend_scores(scores, LAUNCH)
        slot = KEY.sinks + page * PAGE + token
        scores = hide_scores(
            scores, slot, slot < kv_len, queries.mask, LAUNCH.mask_kind, LAUNCH.mask_shared
        )
        v = _unpack_planes(v_planes, False, VALUE, LAUNCH)
        factor, offset = _token_terms(v_fields, v_header, VALUE)
        if VALUE.outliers == 0:
            # The factor joins the score, so that scaled weights are bounded; codes at factor 0 are 0.
            factor = tl.log2(tl.maximum(factor, LEAST_FACTOR))
            scaled, decay, running_max = softmax_update(
                scores + factor[:, None], running_max, WEIGHT_BIAS
            )
            weights = tl.exp2(scores - (tl.maximum(running_max, HIDDEN) - WEIGHT_BIAS)[None, :])
            added = weights * offset[:, None]
        else:
            v_metadata = values.params + at * VALUE.page_params
            v = _place_outliers(v, v_metadata, factor, offset, False, VALUE)
            scaled, decay, running_max = softmax_update(scores, running_max, WEIGHT_BIAS)
            weights, added = scaled, scaled
        if not DEFER:
            weights, added = tl.sum(weights, 0)[None, :], tl.sum(added, 0)[None, :]
        running_sum = running_sum * decay[None, :] + weights
        if VALUE.outliers == 0:
            running_offset = running_offset * decay[None, :] + added
        accumulator = tl.dot(
            tl.trans(v), scaled.to(LAUNCH.dtype), accumulator * decay[None, :],
            input_precision=LAUNCH.precision,
        )  # fmt: skip
    accumulator += tl.sum(running_offset, 0)[None, :]
    # Places are field and word; channels are word and field.
    accumulator = tl.reshape(accumulator, (16, BLOCK_V // 16, BLOCK_Q))
    accumulator = tl.reshape(tl.permute(accumulator, (1, 0, 2)), (BLOCK_V, BLOCK_Q))
    return accumulator, tl.sum(running_sum, 0), running_max
