"""Rounding to and reading from fp16, e4m3 and e5m3, in Triton, and pairs of scale and zero point as one word.

Each function that rounds or sums mirrors one of the specification, operation by operation.
"""

import triton
import triton.language as tl

FP16_MAX = tl.constexpr(65504.0)
FP32_MAX = tl.constexpr(3.4028234663852886e38)
E4M3_MAX = tl.constexpr(448.0)
E4M3_LEAST_NORMAL = tl.constexpr(2.0**-6)
E4M3_STEPS = tl.constexpr(2.0**9)  # subnormals per unit
E5M3_LARGEST = tl.constexpr(0xF7)
E5M3_MAX = tl.constexpr(61440.0)
MIDDLE = tl.constexpr(128)  # the byte of a range about zero
MIDDLE_STEPS = tl.constexpr(127.0)  # to either side


@triton.jit
def bounded(x):
    """Return ``x`` (fp32) with NaN as zero, within the range of fp16."""
    return tl.where(x == x, tl.minimum(tl.maximum(x, -FP16_MAX), FP16_MAX), 0.0)


@triton.constexpr_function
def _steps(size):
    return size.bit_length() - 1


@triton.jit
def sum_pairs(x):
    """Return `formats.sum_pairs` of the rows of ``x``, whose length is a power of two."""
    ROWS: tl.constexpr = x.shape[0]
    y = x
    for step in tl.static_range(_steps(x.shape[1])):
        a, b = tl.split(tl.reshape(y, (ROWS, x.shape[1] >> (step + 1), 2)))
        y = a + b
    return tl.reshape(y, (ROWS,))


@triton.jit
def round_down_fp16(x):
    half = x.to(tl.float16)
    bits = half.to(tl.int16, bitcast=True)
    below = tl.where(half > 0, bits - 1, bits + 1).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.where(half.to(tl.float32) > x, below, half)


@triton.jit
def round_up_fp16(x):
    half = x.to(tl.float16)
    above = (half.to(tl.int16, bitcast=True) + 1).to(tl.int16).to(tl.float16, bitcast=True)
    return tl.where(half.to(tl.float32) < x, above, half)


@triton.jit
def round_e4m3(x):
    """Round ``x`` (fp32, finite) to the nearest e4m3 value, as an integer 0 .. 255."""
    magnitude = tl.minimum(tl.abs(x), E4M3_MAX)
    subnormal = tl.floor(magnitude * E4M3_STEPS + 0.5).to(tl.int32)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + (1 << 19)) >> 20) - (120 << 3)  # exponent bias 127 becomes 7
    byte = tl.where(magnitude < E4M3_LEAST_NORMAL, subnormal, normal)
    return byte + tl.where(x < 0, 128, 0)


@triton.jit
def e4m3_value(byte):
    """Convert an e4m3 byte, an integer, to fp32."""
    half = ((byte & 0x80) << 8) | ((byte & 0x7F) << 7)  # the same fields, read with fp16's bias
    return half.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256


@triton.jit
def round_e5m3(x):
    """Round ``x`` (fp32, not negative) to the nearest e5m3 value, as an integer 0 .. 247."""
    half = tl.minimum(x, E5M3_MAX).to(tl.float16).to(tl.int16, bitcast=True).to(tl.int32)
    return tl.minimum((half + (1 << 6)) >> 7, E5M3_LARGEST)


@triton.jit
def e5m3_half(byte):
    """Convert an e5m3 byte, an integer, to fp16."""
    return (byte.to(tl.uint16) << 7).to(tl.float16, bitcast=True)


@triton.jit
def e5m3_value(byte):
    """Convert an e5m3 byte, an integer, to fp32."""
    return e5m3_half(byte).to(tl.float32)


# --- pairs of scale and zero point ----------------------------------------------------------------


@triton.jit
def split_params(word):
    """Return ``scale, zero`` (fp16) of parameters loaded as 32-bit words."""
    bits = word.to(tl.uint32, bitcast=True)
    scale = (bits & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True)
    return scale, (bits >> 16).to(tl.uint16).to(tl.float16, bitcast=True)


@triton.jit
def join_params(scale, zero):
    """Undo `split_params`."""
    low = scale.to(tl.uint16, bitcast=True).to(tl.uint32)
    return (low | (zero.to(tl.uint16, bitcast=True).to(tl.uint32) << 16)).to(tl.int32, bitcast=True)


@triton.jit
def split_small_params(word):
    """Return ``scale, zero`` (fp16) of e4m3 parameters loaded as 16-bit words.

    An e4m3 value has the fields of an fp16 value; the difference of the exponent biases is corrected.
    """
    bits = word.to(tl.uint16, bitcast=True)
    scale = ((bits & 0x80) << 8) | ((bits & 0x7F) << 7)
    zero = (bits & 0x8000) | ((bits & 0x7F00) >> 1)
    scale = scale.to(tl.uint16).to(tl.float16, bitcast=True)
    return scale * 256.0, zero.to(tl.uint16).to(tl.float16, bitcast=True) * 256.0


@triton.jit
def split_middle_params(word, LEVELS: tl.constexpr):
    """Return ``scale, zero`` (fp32) of e5m3 parameters, for groups about zero, loaded as 16-bit words."""
    bits = word.to(tl.int32)
    scale = e5m3_value(bits & 0xFF)
    place = ((bits >> 8) & 0xFF).to(tl.float32) - MIDDLE
    return scale, scale * (LEVELS * 0.5) * (place * (1.0 / MIDDLE_STEPS) - 1.0)
