"""Attend to packed pages whose tokens differ in bits, in Triton: the loop of a program that reads a share.

Mirrors `mixed.dequantize_pages`, and is to `attention` what `attend_pages` is for pages of one width. A token's
row of a plane is found by its rank, so that a tile of codes comes out in the order of slots for keys and for
values alike, and neither scores nor weights are permuted. Planes that a token does not have are not loaded.
Since codes are embedded a plane weighs the same in all tokens: the codes of a tile are put together without
looking at the bits of a token, which enter once, as part of what a token adds to all of its channels::

    x = reach * 2 ** (1 - BITS) * code + (centre + reach * (2 ** -bits - 1))

Both terms belong to the token and are folded into the score of a key and the weight of a value, in fp32.
With outliers they are not: numbers are then dequantized in registers, and outliers replaced.

Where rows are, only header and ranks of their page tell. Those are read a page ahead.

On NVIDIA hardware planes are merged in registers, by selections under a mask: first pairs of planes to fields of
two bits, those of even and those of odd fields apart, then pairs of these to fields of four bits, and so on
(`merge_planes`); from there on it goes as in `primitives`. A tile has its channels in the order of fields, place
``f * UNITS_PAD + u`` for channel ``16 u + f``.
"""

import triton
import triton.language as tl
from kvq_compile.kernels.schemes import HEADER as HEADER_UNITS
from kvq_compile.kernels.schemes import MAX_BITS
from kvq_compile.kernels.schemes import OUTLIER_FIELDS as FIELDS
from kvq_compile.kernels.triton.primitives import HIDDEN, join_8, load_mask, softmax_update

HEADER = tl.constexpr(HEADER_UNITS)
OUTLIER_FIELDS = tl.constexpr(FIELDS)
WEIGHT_BIAS = tl.constexpr(12.0)
LEAST_FACTOR = tl.constexpr(2.0**-32)  # below any that is not zero, and a power of two


# --- codes ----------------------------------------------------------------------------------------


def merge_planes(bits: int) -> str:
    """Return PTX that turns units of ``bits`` planes, ``$16`` and up, into their 16 fields, fp16 pairs.

    ``words[c]`` holds bit ``c`` of the codes, from the lowest. A step with slots of ``size`` bits merges
    ``low`` and ``high`` into slots twice as wide, in which there is room for every other field.
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


MERGE = tl.constexpr(tuple(merge_planes(bits) for bits in range(1, MAX_BITS + 1)))


@triton.constexpr_function
def _constraints(bits):
    return ",".join(["=&r"] * 16 + ["r"] * bits)


@triton.jit
def load_planes(codes, rank, header, C: tl.constexpr):
    """Return the units ``[page, units]`` of each plane, 0 where a token does not have it."""
    BITS: tl.constexpr = C.bits
    UNITS: tl.constexpr = C.dim // 16
    UNITS_PAD: tl.constexpr = triton.next_power_of_2(UNITS)
    unit = tl.arange(0, UNITS_PAD)
    planes = ()
    first = 0
    for plane in tl.static_range(BITS):
        tokens = header[plane].to(tl.int32)
        row = codes + HEADER + (first + rank) * UNITS
        exists = (rank < tokens)[:, None]
        if UNITS_PAD > UNITS:
            exists &= (unit < UNITS)[None, :]
        planes += (tl.load(row[:, None] + unit[None, :], mask=exists, other=0),)  # type: ignore[assignment]
        first += tokens
    return planes


@triton.jit
def unpack_planes(
    planes, KEYS: tl.constexpr, C: tl.constexpr, FAST: tl.constexpr, DTYPE: tl.constexpr
):
    """Return the codes ``[page, columns]`` of units from `load_planes`, with zeros for bits not kept."""
    BITS: tl.constexpr = C.bits
    PAGE: tl.constexpr = C.page
    COLUMNS: tl.constexpr = C.columns
    # A head of 16 channels has one unit a token. With pack=2 the instructions below then led to wrong scores on an
    # H100 (Triton 3.6) where the key has outliers; so such heads take the plain way.
    if FAST and COLUMNS > 16:
        a, b, c, d, e, f, g, h, i, j, k, m, n, o, p, q = tl.inline_asm_elementwise(
            MERGE[C.bits - 1],
            _constraints(C.bits),
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
            codes += ((word >> field) & 1) << (C.bits - 1 - plane)
    if KEYS and COLUMNS > 16:  # as `tile_channels` says
        codes = tl.reshape(codes, (PAGE, 8, 2, COLUMNS // 32, 2))
        codes = tl.permute(codes, (0, 1, 3, 2, 4))
    return tl.reshape(codes, (PAGE, COLUMNS)).to(DTYPE)


# --- records --------------------------------------------------------------------------------------


@triton.jit
def load_page(codes, records, page, exists, C: tl.constexpr):
    """Return centre, reach and rank of a page's tokens, as bytes, and the units of its header."""
    BITS: tl.constexpr = C.bits
    at = tl.cast(page, tl.int64)
    where = records + at * C.page_params + tl.arange(0, C.page)
    fields = ()
    for field in tl.static_range(C.rank_field + 1):
        fields += (tl.load(where + field * C.page, mask=exists, other=0),)  # type: ignore[assignment]
    header = ()
    for plane in tl.static_range(BITS):
        tokens = tl.load(codes + at * C.page_units + plane, mask=exists, other=0)
        header += (tokens,)  # type: ignore[assignment]
    return fields, header


@triton.jit
def _number(fields, FIRST: tl.constexpr, FP8: tl.constexpr):
    """Return numbers (fp32) of e4m3 bytes, or of the bytes of fp16 numbers."""
    if FP8:  # the same fields, read with the exponent bias of fp16
        byte = fields[FIRST].to(tl.int32)
        half = (((byte & 0x80) << 8) | ((byte & 0x7F) << 7)).to(tl.uint16)
        x = half.to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        half = fields[2 * FIRST].to(tl.uint16) | (fields[2 * FIRST + 1].to(tl.uint16) << 8)
        x = half.to(tl.float16, bitcast=True).to(tl.float32)
    return x


@triton.jit
def token_terms(fields, header, C: tl.constexpr):
    """Return the factor of a token's codes and what it adds to all channels, fp32."""
    BITS: tl.constexpr = C.bits
    rank = fields[C.rank_field].to(tl.int32)
    bits = tl.zeros(rank.shape, tl.int32)
    for plane in tl.static_range(BITS):
        bits += (rank < header[plane].to(tl.int32)).to(tl.int32)
    centre, reach = _number(fields, 0, C.fp8), _number(fields, 1, C.fp8)
    middle = ((127 - bits) << 23).to(tl.float32, bitcast=True)  # 2 ** -bits
    return reach * (2.0 ** (1 - C.bits)), centre + reach * (middle - 1.0)


@triton.jit
def tile_channels(KEYS: tl.constexpr, C: tl.constexpr):
    """Return the channel that each place of a tile stands for.

    The lowest digit of the field of a key comes behind that of its unit: that is where the matrix
    instruction wants the numbers that a lane has side by side.
    """
    UNITS_PAD: tl.constexpr = C.columns // 16
    place = tl.arange(0, C.columns)
    unit, field = place % UNITS_PAD, place // UNITS_PAD
    if KEYS and UNITS_PAD > 1:
        unit = place // 4 % (UNITS_PAD // 2) * 2 + place % 2
        field = place // (2 * UNITS_PAD) * 2 + place // 2 % 2
    return unit * 16 + field


@triton.jit
def _place_outliers(x, records, factor, offset, KEYS: tl.constexpr, C: tl.constexpr):
    """Return codes ``x`` ``[page, columns]`` dequantized, with the outliers in their places."""
    OUTLIERS: tl.constexpr = C.outliers
    channel = tile_channels(KEYS, C)[None, :]
    where = records + tl.arange(0, C.page)
    x = x * factor.to(x.dtype)[:, None] + offset.to(x.dtype)[:, None]
    for outlier in tl.static_range(OUTLIERS):
        at = C.rank_field + 1 + OUTLIER_FIELDS * outlier
        here = tl.load(where + at * C.page).to(tl.int32)
        low = tl.load(where + (at + 1) * C.page).to(tl.uint16)
        high = tl.load(where + (at + 2) * C.page).to(tl.uint16)
        value = (low | (high << 8)).to(tl.float16, bitcast=True).to(x.dtype)
        x = tl.where(channel == here[:, None], value[:, None], x)
    return x


@triton.jit
def page_scores(
    q, q_sum, planes, fields, header, records, C: tl.constexpr, FAST: tl.constexpr,
    DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Return the products ``[page, columns of q]`` of a page's keys with queries.

    ``q`` are the queries in ``DTYPE``, their channels in the order of `tile_channels`; ``q_sum`` is its sum over them.
    """
    k = unpack_planes(planes, True, C, FAST, DTYPE)
    factor, offset = token_terms(fields, header, C)
    if C.outliers == 0:
        scores = tl.dot(k, q, input_precision=PRECISION) * factor[:, None]
        scores += offset[:, None] * q_sum[None, :]
    else:
        k = _place_outliers(k, records, factor, offset, True, C)
        scores = tl.dot(k, q, input_precision=PRECISION)
    return scores


# --- the loop -------------------------------------------------------------------------------------


@triton.jit
def attend_mixed_pages(
    query, rows, column_ok, scale, key_codes, key_records, value_codes, value_records, lo, hi,
    held, mask, mask_rows, stride_m, mask_width, KEY: tl.constexpr, VALUE: tl.constexpr,
    SINKS: tl.constexpr, BLOCK_Q: tl.constexpr, STAGES: tl.constexpr, MASK_KIND: tl.constexpr,
    MASK_SHARED: tl.constexpr, FAST: tl.constexpr, DTYPE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attend to the packed pages ``lo .. hi - 1``.

    Return the accumulator, its rows the channels in their order, the sum and the maximum.
    """
    PAGE: tl.constexpr = KEY.page
    BLOCK_V: tl.constexpr = VALUE.columns
    DEFER: tl.constexpr = BLOCK_Q <= 16  # sum over keys once, at the end: no exchange between warps
    token = tl.arange(0, PAGE)
    channel = tile_channels(True, KEY)
    q_ok = (channel < KEY.dim)[:, None] & column_ok[None, :]
    q = tl.load(query + rows[None, :] + channel[:, None], mask=q_ok, other=0)
    q = (q.to(tl.float32) * scale).to(DTYPE)
    q_sum = tl.sum(q.to(tl.float32), 0)
    running_max = tl.full([BLOCK_Q], float("-inf"), tl.float32)
    running_sum = tl.zeros([PAGE if DEFER else 1, BLOCK_Q], tl.float32)
    running_offset = tl.zeros([PAGE if DEFER else 1, BLOCK_Q], tl.float32)
    accumulator = tl.zeros([BLOCK_V, BLOCK_Q], tl.float32)
    next_key = load_page(key_codes, key_records, lo, lo < hi, KEY)
    next_value = load_page(value_codes, value_records, lo, lo < hi, VALUE)
    for page in tl.range(lo, hi, num_stages=STAGES):
        at = tl.cast(page, tl.int64)
        k_fields, k_header = next_key
        v_fields, v_header = next_value
        next_key = load_page(key_codes, key_records, page + 1, page + 1 < hi, KEY)
        next_value = load_page(value_codes, value_records, page + 1, page + 1 < hi, VALUE)
        k_rank = k_fields[KEY.rank_field].to(tl.int32)
        v_rank = v_fields[VALUE.rank_field].to(tl.int32)
        k_planes = load_planes(key_codes + at * KEY.page_units, k_rank, k_header, KEY)
        v_planes = load_planes(value_codes + at * VALUE.page_units, v_rank, v_header, VALUE)
        scores = page_scores(
            q, q_sum, k_planes, k_fields, k_header, key_records + at * KEY.page_params, KEY, FAST,
            DTYPE, PRECISION,
        )  # fmt: skip
        slot = SINKS + page * PAGE + token
        if MASK_KIND > 0:
            scores += load_mask(
                mask, mask_rows, column_ok, slot, stride_m, mask_width, MASK_KIND, MASK_SHARED
            )
        scores = tl.where((slot < held)[:, None], scores, float("-inf"))
        v = unpack_planes(v_planes, False, VALUE, FAST, DTYPE)
        factor, offset = token_terms(v_fields, v_header, VALUE)
        if VALUE.outliers == 0:
            # The factor joins the score, so that scaled weights are bounded; codes at factor 0 are 0.
            factor = tl.log2(tl.maximum(factor, LEAST_FACTOR))
            scaled, decay, running_max = softmax_update(
                scores + factor[:, None], running_max, WEIGHT_BIAS
            )
            weights = tl.exp2(scores - (tl.maximum(running_max, HIDDEN) - WEIGHT_BIAS)[None, :])
            added = weights * offset[:, None]
        else:
            v = _place_outliers(
                v, value_records + at * VALUE.page_params, factor, offset, False, VALUE
            )
            scaled, decay, running_max = softmax_update(scores, running_max, WEIGHT_BIAS)
            weights, added = scaled, scaled
        if not DEFER:
            weights, added = tl.sum(weights, 0)[None, :], tl.sum(added, 0)[None, :]
        running_sum = running_sum * decay[None, :] + weights
        if VALUE.outliers == 0:
            running_offset = running_offset * decay[None, :] + added
        accumulator = tl.dot(
            tl.trans(v), scaled.to(DTYPE), accumulator * decay[None, :], input_precision=PRECISION
        )
    accumulator += tl.sum(running_offset, 0)[None, :]
    # Places are field and unit; channels are unit and field.
    accumulator = tl.reshape(accumulator, (16, BLOCK_V // 16, BLOCK_Q))
    accumulator = tl.reshape(tl.permute(accumulator, (1, 0, 2)), (BLOCK_V, BLOCK_Q))
    return accumulator, tl.sum(running_sum, 0), running_max
