"""Values in trits, unpacked in registers: planes of four words, a word to a lane, and what remains of a row.

The digits of a byte ``v`` are taken balanced, from -1 to 1: less 121, a byte is the sum of balanced digits times powers
of 3, and what remains of it behind any digit is less than half of that power. So rounding ``v / 3 ** f`` to the nearest
whole number ``q_f`` leaves the digits from ``f`` on, and ``q_f - 3 q_(f + 1)`` is digit ``f``.

On NVIDIA hardware both bytes of a word are one pair of fp16 numbers: bits as they lie read as ``v * 2 ** -24``, a
subnormal number, and products in that range are rounded to whole multiples of it. So a digit of two bytes takes a
product and a fused multiply-add, and comes times ``2 ** -24``, as codes do that are read in place (`primitives`).

A tile has groups of eight columns: a digit of the eight bytes of a plane. A lane has two neighbouring columns of each,
so that no data moves where tiles are *paired* as in `primitives`.
"""

import struct

import triton
import triton.language as tl

from kvq_compile.kernels.triton.packing import DIGITS, PLANE, trit, trit_place
from kvq_compile.kernels.triton.primitives import flat_tile
from kvq_compile.kernels.words import TRITS

MIDDLE = (3**TRITS - 1) // 2


def _pair(number: float) -> str:
    """Return a number twice, as a pair of fp16 numbers."""
    half = int.from_bytes(struct.pack("<e", number), "little")
    return f"0x{half << 16 | half:08x}"


# Both bytes of a word, chosen by `prmt`, as a pair of balanced numbers times 2 ** -24.
BYTES = f"prmt.b32 v, %s, 0, %s; mov.b32 c, {_pair(-MIDDLE * 2.0**-24)}; add.rn.f16x2 v, v, c;"
LOW_HALF, HIGH_HALF = tl.constexpr(0x4140), tl.constexpr(0x4342)
# From a digit d times 2 ** -24 to the code d + 1, in two steps, for 2 ** 24 is more than fp16 has.
TO_CODE = (
    f"mov.b32 c, {_pair(2.0**15)}; mul.rn.f16x2 d, d, c; "
    f"mov.b32 c, {_pair(2.0**9)}; mov.b32 k, {_pair(1.0)}; fma.rn.f16x2 d, d, c, k;"
)
REGISTERS = ".reg .b32 c, d, k, n, v, q, r; "


def _all_digits(in_place: bool) -> tl.constexpr:
    """Return the instructions that take all digits of both bytes of a word."""
    text = f"cvt.u32.u16 q, ${2 * TRITS}; " + BYTES % ("q", "0x4140") + " mov.b32 q, v;"
    for digit in range(TRITS):
        if digit + 1 < TRITS:
            text += f" mov.b32 c, {_pair(3.0 ** -(digit + 1))}; mul.rn.f16x2 r, v, c;"
            text += f" mov.b32 c, {_pair(-3.0)}; fma.rn.f16x2 d, r, c, q; mov.b32 q, r;"
        else:
            text += " mov.b32 d, q;"
        text += (
            "" if in_place else " " + TO_CODE
        ) + f" mov.b32 {{${2 * digit}, ${2 * digit + 1}}}, d;"
    return tl.constexpr(f"{{ {REGISTERS}{text} }}")


def _one_digit(in_place: bool) -> tl.constexpr:
    """Return the instructions that take one digit of both bytes of half a word of 32 bits, as `hold_places` says."""
    text = BYTES % ("$2", "$3") + " prmt.b32 k, $4, 0, 0x1010; prmt.b32 n, $4, 0, 0x3232;"
    text += f" mul.rn.f16x2 q, v, k; mul.rn.f16x2 r, v, n; mov.b32 c, {_pair(-3.0)}; fma.rn.f16x2 d, r, c, q;"
    text += ("" if in_place else " " + TO_CODE) + " mov.b32 {$0, $1}, d;"
    return tl.constexpr(f"{{ {REGISTERS}{text} }}")


ALL_IN_PLACE, ALL_AS_FP16 = _all_digits(True), _all_digits(False)
ONE_IN_PLACE, ONE_AS_FP16 = _one_digit(True), _one_digit(False)


@triton.jit
def _digits(words, BALANCED: tl.constexpr, FAST: tl.constexpr):
    """Return the digits of both bytes of words ``[rows, 4]``: ``[rows, 4, 2]`` each."""
    if FAST:
        PROGRAM: tl.constexpr = ALL_IN_PLACE if BALANCED else ALL_AS_FP16
        a, b, c, d, e, f, g, h, i, j = tl.inline_asm_elementwise(
            PROGRAM,
            "=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,h",
            args=[words],
            dtype=(tl.float16,) * 10,
            is_pure=True,
            pack=1,
        )
        return tl.join(a, b), tl.join(c, d), tl.join(e, f), tl.join(g, h), tl.join(i, j)
    else:
        word = words.to(tl.int32)
        both = tl.join(word & 0xFF, (word >> 8) & 0xFF)
        found = ()
        for digit in tl.static_range(DIGITS):
            code = trit(both, both * 0 + digit)
            found += (code - 1 if BALANCED else code,)  # type: ignore[assignment]
        return found


@triton.jit
def _digit(pair, place, BALANCED: tl.constexpr, FAST: tl.constexpr):
    """Return a digit of both bytes of half a word of 32 bits ``[rows, 4]``, as `hold_places` says: ``[rows, 4, 2]``."""
    half, digit = place
    if FAST:
        PROGRAM: tl.constexpr = ONE_IN_PLACE if BALANCED else ONE_AS_FP16
        low, high = tl.inline_asm_elementwise(
            PROGRAM,
            "=&h,=&h,r,r,r",
            args=[pair, half, digit],
            dtype=(tl.float16,) * 2,
            is_pure=True,
            pack=1,
        )
        return tl.join(low, high)
    else:
        word = pair >> half
        code = trit(tl.join(word & 0xFF, (word >> 8) & 0xFF), digit[:, :, None])
        return code - 1 if BALANCED else code


@triton.jit
def _rest_place(row, group, VALUE: tl.constexpr):
    """Return of a group of eight columns that has no plane of its own the words and the digit of each lane."""
    column = 8 * group + 2 * tl.arange(0, 4)[None, :]
    word, _, digit = trit_place(row[:, None], column, VALUE)
    if VALUE.row_words & 3 == 1:  # the same word for all lanes
        word = (VALUE.page_words - VALUE.head_dim + row)[:, None]
    return word, digit


@triton.jit
def _hold_place(codes, group, VALUE: tl.constexpr, FAST: tl.constexpr):
    """Return `hold_places` of a group."""
    word, digit = _rest_place(tl.arange(0, 2), group, VALUE)
    half = tl.broadcast_to(16 * (word % 2), (2, 4))
    digit = tl.max(digit, 0)[None, :]
    if FAST:
        power = tl.where(digit == 1, 1 / 3, tl.where(digit == 2, 1 / 9, 1 / 27))
        power = tl.where(digit == 0, 1.0, tl.where(digit == 4, 1 / 81, power))
        low = power.to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        high = (power * (1 / 3)).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
        digit, half = low | (high << 16), tl.where(half == 0, LOW_HALF, HIGH_HALF)
        # Triton lets a word stay in the lane that multiplies its digits if all that it meets was loaded, and little of
        # it outside the loop. So this is loaded: it is what there is in place of nothing.
        nothing = codes.to(tl.pointer_type(tl.int32), bitcast=True)
        half = tl.load(nothing + half, mask=half < 0, other=half)
        digit = tl.load(nothing + digit * 0, mask=digit == 0, other=digit)
    half = tl.broadcast_to(tl.reshape(half, (1, 2, 4)), (VALUE.channels // 2, 2, 4))
    return tl.reshape(half, (VALUE.channels, 4)), tl.broadcast_to(digit, (VALUE.channels, 4))


@triton.jit
def hold_places(codes, VALUE: tl.constexpr, FAST: tl.constexpr):
    """Return for each group of eight columns that has no plane of its own which half of 32 bits and which digit a lane
    takes, with ``FAST`` as `prmt` takes it and as the powers of 1 / 3 that lead to it.
    """
    places = ()
    if VALUE.packing == "trits":
        FIRST: tl.constexpr = VALUE.row_words // PLANE * DIGITS
        for group in tl.static_range(FIRST, VALUE.page_size // 8):
            places += (_hold_place(codes, group, VALUE, FAST),)  # type: ignore[assignment]
    return places


@triton.jit
def _load_rest(codes, row, group, VALUE: tl.constexpr):
    """Load the words of a group of eight columns that has no plane of its own, ``[rows, 4 or 1]``, halves of 32 bits:
    words of 16 bits are not loaded ahead.
    """
    word, _ = _rest_place(row, group, VALUE)
    pairs = codes.to(tl.pointer_type(tl.int32), bitcast=True) + word // 2
    if VALUE.channels == VALUE.head_dim:
        return tl.load(pairs)
    else:
        return tl.load(pairs, mask=(row < VALUE.head_dim)[:, None], other=0)


@triton.jit
def unpack_trits(
    codes, row, places, VALUE: tl.constexpr, PAIRED: tl.constexpr, BALANCED: tl.constexpr,
    FAST: tl.constexpr,
):  # fmt: skip
    """Return the codes ``[channels, page_size]`` of a page of values.

    ``BALANCED``: less 1, and with ``FAST`` times ``2 ** -24``. ``PAIRED``: in paired columns.
    """
    ROWS: tl.constexpr = VALUE.head_dim
    GROUPS: tl.constexpr = VALUE.page_size // 8
    WHOLE: tl.constexpr = VALUE.row_words // PLANE
    word = tl.arange(0, 4)[None, :]
    groups = ()
    for plane in tl.static_range(WHOLE):
        where = codes + plane * PLANE * ROWS + row[:, None] * PLANE + word
        if VALUE.channels == ROWS:
            words = tl.load(where)
        else:
            words = tl.load(where, mask=(row < ROWS)[:, None], other=0)
        digits = _digits(words, BALANCED, FAST)
        for digit in tl.static_range(DIGITS):
            if plane * DIGITS + digit < GROUPS:
                groups += (digits[digit],)  # type: ignore[assignment]  # a tuple that grows
    for group in tl.static_range(WHOLE * DIGITS, GROUPS):
        pair = tl.broadcast_to(_load_rest(codes, row, group, VALUE), (VALUE.channels, 4))
        groups += (_digit(pair, places[group - WHOLE * DIGITS], BALANCED, FAST),)  # type: ignore[assignment]
    return _join_groups(groups, PAIRED)


@triton.jit
def _join_groups(groups, PAIRED: tl.constexpr):
    """Return groups ``[rows, 4, 2]`` of eight columns as one tile."""
    COUNT: tl.constexpr = len(groups)
    ROWS: tl.constexpr = groups[0].shape[0]
    for _level in tl.static_range(3, 9):  # until one is left
        if len(groups) > 1:
            groups = _join_halves(groups)
    if PAIRED:
        tile = tl.reshape(groups[0], (ROWS, 4, 2, COUNT // 2, 2))
        tile = tl.permute(tile, (0, 3, 1, 4, 2))
    else:
        tile = tl.permute(tl.reshape(groups[0], (ROWS, 4, 2, COUNT)), (0, 3, 1, 2))
    return flat_tile(tile, ROWS, 8 * COUNT)


@triton.jit
def _join_halves(groups):
    """Return groups joined along a new last axis, the first half of them with the second."""
    HALF: tl.constexpr = len(groups) // 2
    joined = ()
    for i in tl.static_range(HALF):
        joined += (tl.join(groups[i], groups[i + HALF]),)
    return joined
