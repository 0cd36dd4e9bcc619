"""The form in which tokens are coded, in Triton: the Hadamard transform, rotary angles, calibrated channel tables.

Rotation and tables mirror the specification operation by operation: fp32, one rounding an operation, in that order.
Bits are equal where a kernel is compiled without contraction of products and sums (``enable_fp_fusion=False``).
"""

import math

import triton
import triton.language as tl

from kvq_compile.kernels.triton.constants import section_start

QUARTER = tl.constexpr(1 << 30)  # of a turn
RADIANS = tl.constexpr(2.0 * math.pi / 2.0**32)


@triton.constexpr_function
def _digits(size):
    return size.bit_length() - 1


@triton.constexpr_function
def _inverse_root(size):
    return size**-0.5


@triton.jit
def hadamard(x, LENGTH: tl.constexpr):
    """Apply the Hadamard transform of size ``LENGTH`` to the rows of ``x`` ``[rows, padded LENGTH]``, fp32.

    Each step replaces the lowest digit of the index by sum and difference and makes it the highest one, so as many
    steps as there are digits leave the order as it was.
    """
    BLOCK: tl.constexpr = LENGTH & -LENGTH
    ROWS: tl.constexpr = x.shape[0] * x.shape[1] // BLOCK
    y = tl.reshape(x, (ROWS, BLOCK))
    for _ in tl.static_range(_digits(BLOCK)):
        a, b = tl.split(tl.reshape(y, (ROWS, BLOCK // 2, 2)))
        y = tl.reshape(tl.permute(tl.join(a + b, a - b), (0, 2, 1)), (ROWS, BLOCK))
    return tl.reshape(y, (x.shape[0], x.shape[1])) * _inverse_root(BLOCK)


@triton.jit
def cosine_and_sine(phase):
    """Return cosine and sine of angles in units of 2 ** -32 turns (int32, which wraps as they do)."""
    quarters = (phase + QUARTER // 2) >> 30  # of which the lowest two bits count
    t = (phase - (quarters << 30)).to(tl.float32) * RADIANS
    square = t * t
    s = 2.7557314e-6 * square + -1.9841270e-4
    s = s * square + 8.3333333e-3
    s = s * square + -1.6666667e-1
    s = s * square * t + t
    c = 2.4801587e-5 * square + -1.3888889e-3
    c = c * square + 4.1666667e-2
    c = c * square + -0.5
    c = c * square + 1.0
    odd, half = (quarters & 1) != 0, (quarters & 2) != 0
    sine, cosine = tl.where(odd, c, s), tl.where(odd, s, c)
    # a product keeps the sign of zero, which a difference from zero would not
    return cosine * tl.where(half ^ odd, -1.0, 1.0), sine * tl.where(half, -1.0, 1.0)


@triton.jit
def rotate_back(a, b, cosine, sine):
    """Return pairs ``[pairs, columns]`` rotated by the inverse of angles ``[pairs]``."""
    c, s = cosine[:, None], sine[:, None]
    return a * c + b * s, b * c - a * s


# --- calibrated tables ----------------------------------------------------------------------------


@triton.jit
def load_table(tables, channel, exists, NAME: tl.constexpr, CONSTANTS: tl.constexpr):
    """Load a section of a head's tables for coded channels."""
    word = tl.load(tables + section_start(NAME, CONSTANTS) + channel, mask=exists, other=0)
    if NAME == "order" or NAME == "frequency":
        return word
    else:
        return word.to(tl.float32, bitcast=True)


@triton.jit
def normalize(x, tables, channel, exists, CONSTANTS: tl.constexpr):
    """Return elements of the model as coded elements: less the mean, in units of the scale."""
    mean = load_table(tables, channel, exists, "mean", CONSTANTS)
    return (x - mean) * load_table(tables, channel, exists, "inverse", CONSTANTS)


@triton.jit
def denormalize(y, tables, channel, exists, CONSTANTS: tl.constexpr):
    """Undo `normalize`."""
    scale = load_table(tables, channel, exists, "scale", CONSTANTS)
    return y * scale + load_table(tables, channel, exists, "mean", CONSTANTS)


@triton.jit
def rotary_angle(slot, half, exists, calibration, CONSTANTS: tl.constexpr):
    """Return cosine and sine by which rotation pairs ``half`` of tokens in ``slot`` are rotated."""
    frequency = load_table(calibration.tables, half, exists, "frequency", CONSTANTS)
    return cosine_and_sine((slot + calibration.shift) * frequency)


@triton.jit
def other_of_pair(channel, CONSTANTS: tl.constexpr):
    """Return the other channels of the rotation pairs that coded channels are in."""
    HALF: tl.constexpr = CONSTANTS.head_dim // 2
    return tl.where(channel < HALF, channel + HALF, channel - HALF)


@triton.jit
def slot_angle(slot, channel, exists, tables, CONSTANTS: tl.constexpr):
    """Return cosine and sine by which coded channels are rotated in a slot, slots standing for positions."""
    pair = channel % (CONSTANTS.head_dim // 2)
    return cosine_and_sine(slot * load_table(tables, pair, exists, "frequency", CONSTANTS))


@triton.jit
def rotated_mean(tail, slot, channel, exists, tables, CONSTANTS: tl.constexpr):
    """Return the mean of keys in coded channels of a head with the tail ``tail`` of exact rows, rotated to slots."""
    mean = tail + (CONSTANTS.query_rows + 1) * CONSTANTS.head_dim
    own = tl.load(mean + channel, mask=exists, other=0.0).to(tl.float32)
    other = mean + other_of_pair(channel, CONSTANTS)
    other = tl.load(other, mask=exists, other=0.0).to(tl.float32)
    other = tl.where(channel < CONSTANTS.head_dim // 2, -other, other)
    cosine, sine = slot_angle(slot, channel, exists, tables, CONSTANTS)
    return own * cosine + other * sine
