"""From packed pages to tiles of numbers in the basis in which they were coded: Triton, for attention.

`Coding` is what a kernel knows of a `Layout` while it is compiled. Uniform codes packed in fields
come out of registers (`primitives`), codes of a codebook one vector load each; anything else, such as
trits, or centroids of three channels, takes a load for each element, which is slow and always right.

Keys of a rotary layout are read as two tiles, the first and the second channel of each rotation pair.
In registers that have the same place, rotating them moves no data.
"""

from dataclasses import dataclass

import triton
import triton.language as tl
from kvq_compile.kernels.layout import Layout
from kvq_compile.kernels.tables import section
from kvq_compile.kernels.triton.primitives import (
    load_rows,
    row_index,
    split_params,
    split_small_params,
    unpack_halves,
    unpack_rows,
)


@dataclass(frozen=True)
class Coding:
    """What a kernel must know of a layout at compile time; layers that differ in the rest share kernels.

    Attributes:
        key: Whether rows of units are tokens; else they are channels.
        dim, page: Channels of a head, tokens of a page.
        bits: Of a code as packed: 2 for three levels.
        trits, codebook, channel, fp8, rotary, hadamard, tables: Which way the layout has it.
        group: Numbers that share parameters.
        couple, entries: Channels that share a code, vectors of a codebook.
        row_length, row_bytes, units: Of a row: its codes, its bytes of trits, its 16-bit units.
        page_units, page_params: Of a page: its units, its pairs of scale and zero.
        fields, gathers: How elements are read: from fields in registers, or a vector for each code.
        columns: Of a tile of keys, padded.
        block: Rotary keys that are rotated at once; all blocks of a page by the same angles.
        means, scales, frequencies: First words of sections of the tables.
        book: First number of the codebook, in numbers of 16 bits.
        mixed: Whether tokens differ in bits: ``bits`` are the most, ``page_units`` and ``page_params`` all
            units and all bytes of records, ``columns`` those of a tile of keys or values.
        rank_field, outliers: Of a record, where its rank is; outliers of a token.
    """

    key: bool
    dim: int
    page: int
    bits: int
    trits: bool
    codebook: bool
    channel: bool
    fp8: bool
    rotary: bool
    hadamard: bool
    tables: bool
    group: int
    couple: int
    entries: int
    row_length: int
    row_bytes: int
    units: int
    page_units: int
    page_params: int
    fields: bool
    gathers: bool
    columns: int
    block: int
    means: int
    scales: int
    frequencies: int
    book: int
    mixed: bool = False
    rank_field: int = 0
    outliers: int = 0

    @staticmethod
    def of(layout: Layout) -> "Coding":
        """Return the coding of a layout."""
        dim, trits, codebook, mixed = (
            layout.head_dim,
            layout.packing == "trits",
            layout.coder == "codebook",
            layout.coder == "mixed",
        )
        bits = layout.mixed.max_bits if mixed else sum(layout.planes)
        fields = not (trits or codebook or mixed)
        per_unit = 16 // (2 if bits == 3 else bits) if fields else 1
        if mixed:
            per_unit = 16  # of a plane
        even = all(n & (n - 1) == 0 for n in (dim, layout.couple))
        groups, members = layout.params_shape
        return Coding(
            key=layout.role == "key",
            dim=dim,
            page=layout.page_size,
            bits=bits,
            trits=trits,
            codebook=codebook,
            channel=layout.grouping == "channel",
            fp8=layout.params == "fp8",
            rotary=layout.rotary,
            hadamard=layout.transform == "hadamard",
            tables=layout.has_tables,
            group=layout.group_size,
            couple=layout.couple,
            entries=layout.levels + 1,
            row_length=layout.row_length,
            row_bytes=layout.row_bytes,
            units=layout.units,
            page_units=layout.rows * layout.units,
            page_params=groups * members,
            fields=fields,
            gathers=codebook and even and layout.code_channels > 1,
            columns=per_unit * triton.next_power_of_2(dim // per_unit),
            block=min(layout.page_size, max(32, layout.page_size // 2)),
            means=section("mean", dim, layout.rotary)[0],
            scales=section("scale", dim, layout.rotary)[0],
            frequencies=section("frequency", dim, layout.rotary)[0],
            book=2 * section("codebook", dim, layout.rotary)[0],
            mixed=mixed,
            rank_field=layout.mixed.rank_field if mixed else 0,
            outliers=layout.mixed.outliers if mixed else 0,
        )


# --- codes ----------------------------------------------------------------------------------------


@triton.jit
def _load(where, exists):
    """Return words, 0 where none ``exists``; all of them do if that is ``None``."""
    return tl.load(where) if exists is None else tl.load(where, mask=exists, other=0)


@triton.jit
def _plane(codes, row, column, exists, C: tl.constexpr, WIDTH: tl.constexpr):
    """Return the bits of codes that lie in the plane of ``WIDTH`` bits, in their place."""
    SHIFT: tl.constexpr = C.bits & -(2 * WIDTH)  # of the planes before it
    UNITS: tl.constexpr = C.row_length * WIDTH // 16
    unit = C.row_length * SHIFT // 16 + column % UNITS
    word = _load(codes + (row * C.units + unit), exists).to(tl.int32)
    return ((word >> (column // UNITS * WIDTH)) & ((1 << WIDTH) - 1)) << SHIFT


@triton.jit
def _trits(codes, row, column, exists, C: tl.constexpr):
    """Return three-level codes: digit ``f`` of a byte is the first one behind the point of ``byte /
    3 ** (f + 1)``."""
    byte, digit = column % C.row_bytes, column // C.row_bytes
    word = tl.load(codes + (row * C.units + byte // 2), mask=exists, other=0).to(tl.int32)
    packed = (word >> (byte % 2 * 8)) & 0xFF
    third = tl.where(digit == 0, 21846, tl.where(digit == 1, 7282, 2428))
    third = tl.where(digit == 3, 810, tl.where(digit == 4, 270, third))  # 2 ** 16 / 3 ** (f + 1)
    return (((packed * third) & 0xFFFF) * 3) >> 16


@triton.jit
def read_codes(codes, row, column, exists, C: tl.constexpr):
    """Return the codes (int32) in places ``column`` of rows, a load for each plane; 0 where none
    ``exists``."""
    if C.trits:
        code = _trits(codes, row, column, exists, C)
    else:
        code = tl.zeros((row + column).shape, tl.int32)
        if C.bits & 8:
            code |= _plane(codes, row, column, exists, C, 8)
        if C.bits & 4:
            code |= _plane(codes, row, column, exists, C, 4)
        if C.bits & 2:
            code |= _plane(codes, row, column, exists, C, 2)
        if C.bits & 1:
            code |= _plane(codes, row, column, exists, C, 1)
    return code


# --- parameters -----------------------------------------------------------------------------------


@triton.jit
def load_params(where, exists, FP8: tl.constexpr):
    """Return ``scale, zero`` (fp16) of groups; ``exists`` may be ``None``."""
    word = _load(where, exists)
    if FP8:
        scale, zero = split_small_params(word)
    else:
        scale, zero = split_params(word)
    return scale, zero


@triton.jit
def scale_codes(codes, scale, zero, FAST: tl.constexpr):
    """Return ``codes * scale + zero`` in the dtype of ``codes``."""
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


@triton.jit
def dequantize_keys(
    params, codes, channel, channel_ok, C: tl.constexpr, FIRST: tl.constexpr, BASE: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Return ``codes * scale + zero`` for codes of tokens from ``FIRST`` on, channels from ``BASE`` on."""
    ROWS: tl.constexpr = codes.shape[0]
    COLUMNS: tl.constexpr = codes.shape[1]
    if C.channel:
        SIZE: tl.constexpr = min(C.group, ROWS)
        group = FIRST // C.group + tl.arange(0, ROWS // SIZE)
        where = params + group[:, None] * C.dim + channel[None, :]
        if C.columns == C.dim:
            scale, zero = load_params(where, None, C.fp8)
        else:
            scale, zero = load_params(where, channel_ok[None, :], C.fp8)
        grouped = tl.reshape(codes, (ROWS // SIZE, SIZE, COLUMNS))
        x = scale_codes(grouped, scale[:, None, :], zero[:, None, :], FAST)
    elif C.columns == C.dim and (C.group & (C.group - 1)) == 0:
        WIDTH: tl.constexpr = min(C.group, COLUMNS)
        token = FIRST + tl.arange(0, ROWS)
        group = BASE // C.group + tl.arange(0, COLUMNS // WIDTH)
        where = params + group[None, :] * C.page + token[:, None]
        scale, zero = load_params(where, None, C.fp8)
        grouped = tl.reshape(codes, (ROWS, COLUMNS // WIDTH, WIDTH))
        x = scale_codes(grouped, scale[:, :, None], zero[:, :, None], FAST)
    else:
        token = FIRST + tl.arange(0, ROWS)
        where = params + (channel // C.group)[None, :] * C.page + token[:, None]
        scale, zero = load_params(where, channel_ok[None, :], C.fp8)
        x = scale_codes(codes, scale, zero, FAST)
    return tl.reshape(x, (ROWS, COLUMNS))


@triton.jit
def dequantize_values(params, codes, C: tl.constexpr, FAST: tl.constexpr):
    """Return ``codes * scale + zero`` for codes ``[channels, page]``."""
    ROWS: tl.constexpr = codes.shape[0]
    channel = tl.arange(0, ROWS)
    token = tl.arange(0, C.page)
    if C.channel:
        group = tl.arange(0, C.page // C.group)
        where = params + group[None, :] * C.dim + channel[:, None]
        scale, zero = load_params(where, (channel < C.dim)[:, None], C.fp8)
        grouped = tl.reshape(codes, (ROWS, C.page // C.group, C.group))
        x = scale_codes(grouped, scale[:, :, None], zero[:, :, None], FAST)
    elif C.dim == ROWS and (C.group & (C.group - 1)) == 0:
        group = tl.arange(0, C.dim // C.group)
        where = params + group[:, None] * C.page + token[None, :]
        scale, zero = load_params(where, None, C.fp8)
        grouped = tl.reshape(codes, (C.dim // C.group, C.group, C.page))
        x = scale_codes(grouped, scale[:, None, :], zero[:, None, :], FAST)
    else:
        where = params + (channel // C.group)[:, None] * C.page + token[None, :]
        scale, zero = load_params(where, (channel < C.dim)[:, None], C.fp8)
        x = scale_codes(codes, scale, zero, FAST)
    return tl.reshape(x, (ROWS, C.page))


# --- codebooks ------------------------------------------------------------------------------------


@triton.jit
def gather_centroids(
    codes, book, token, FIRST: tl.constexpr, GROUPS: tl.constexpr, C: tl.constexpr
):
    """Return centroids ``[tokens, GROUPS * couple]`` of the groups of channels from ``FIRST`` on."""
    group = FIRST + tl.arange(0, GROUPS)
    if C.key:
        code = read_codes(codes, token[:, None], group[None, :], None, C)
    else:
        code = read_codes(codes, group[None, :], token[:, None], None, C)
    first = (group[None, :] * C.entries + code) * C.couple
    rows = tl.load(book + first[:, :, None] + tl.arange(0, C.couple)[None, None, :])
    return tl.reshape(rows, (token.shape[0], GROUPS * C.couple))


@triton.jit
def read_elements(codes, book, token, channel, exists, C: tl.constexpr):
    """Return codes, or elements of centroids, of any packing, each by loads of its own."""
    if C.key:
        code = read_codes(codes, token, channel // C.couple, exists, C)
    else:
        code = read_codes(codes, channel // C.couple, token, exists, C)
    if C.codebook:
        where = (channel // C.couple * C.entries + code) * C.couple + channel % C.couple
        code = tl.load(book + where, mask=exists, other=0)
    return code


# --- tiles ----------------------------------------------------------------------------------------


@triton.jit
def key_channels(C: tl.constexpr):
    """Return the channels that the columns of a tile of keys stand for, and whether they exist."""
    column = tl.arange(0, C.columns)
    if C.fields:
        channel, exists = row_index(column, C.dim, C.bits)
    else:
        channel, exists = column, column < C.dim
    return channel, exists


@triton.jit
def half_channels(C: tl.constexpr):
    """Return the first channels of the pairs of `read_key_halves`, and whether they exist."""
    column = tl.arange(0, C.columns // 2)
    if C.fields:
        channel, exists = row_index(column, C.dim, C.bits)
    else:
        channel, exists = column, column < C.dim // 2
    return channel, exists


@triton.jit
def read_keys(codes, book, C: tl.constexpr, FAST: tl.constexpr, DTYPE: tl.constexpr):
    """Return a page of keys ``[page, columns]``: codes, which lack their parameters, or centroids."""
    token = tl.arange(0, C.page)
    if C.fields:
        low, high = load_rows(codes, token, C.dim, C.page, C.bits)
        k = unpack_rows(low, high, C.bits, FAST, DTYPE)
    elif C.gathers:
        k = gather_centroids(codes, book, token, 0, C.dim // C.couple, C)
    else:
        channel, exists = key_channels(C)
        k = read_elements(codes, book, token[:, None], channel[None, :], exists[None, :], C)
    return k.to(DTYPE)


@triton.jit
def read_key_halves(
    codes, params, book, C: tl.constexpr, FIRST: tl.constexpr, ROWS: tl.constexpr,
    FAST: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Return ``ROWS`` tokens of a page from ``FIRST`` on, dequantized, as two tiles ``[ROWS, columns /
    2]``."""
    HALF: tl.constexpr = C.dim // 2
    token = FIRST + tl.arange(0, ROWS)
    channel, exists = half_channels(C)
    if C.fields:
        row = tl.arange(0, ROWS)
        low, high = load_rows(codes + FIRST * C.units, row, C.dim, ROWS, C.bits)
        a, b = unpack_halves(low, high, C.bits, FAST, DTYPE)
    elif C.gathers:
        a = gather_centroids(codes, book, token, 0, HALF // C.couple, C)
        b = gather_centroids(codes, book, token, HALF // C.couple, HALF // C.couple, C)
    else:
        ok = exists[None, :]
        a = read_elements(codes, book, token[:, None], channel[None, :], ok, C)
        b = read_elements(codes, book, token[:, None], HALF + channel[None, :], ok, C)
    a, b = a.to(DTYPE), b.to(DTYPE)
    if not C.codebook:
        a = dequantize_keys(params, a, channel, exists, C, FIRST, 0, FAST)
        b = dequantize_keys(params, b, HALF + channel, exists, C, FIRST, HALF, FAST)
    return a, b


@triton.jit
def read_values(codes, book, C: tl.constexpr, FAST: tl.constexpr, DTYPE: tl.constexpr):
    """Return a page of values ``[channels, page]``: codes, which lack their parameters, or centroids."""
    channel = tl.arange(0, triton.next_power_of_2(C.dim))
    token = tl.arange(0, C.page)
    if C.fields:
        low, high = load_rows(codes, channel, C.page, C.dim, C.bits)
        v = unpack_rows(low, high, C.bits, FAST, DTYPE)
    elif C.gathers:
        v = tl.trans(gather_centroids(codes, book, token, 0, C.dim // C.couple, C))
    else:
        exists = (channel < C.dim)[:, None]
        v = read_elements(codes, book, token[None, :], channel[:, None], exists, C)
    return v.to(DTYPE)
