// Conversions between fp32 and the element types of tensors: fp64, bf16, fp16, e4m3 and e5m3.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace {

constexpr float kLargestHalf = 65504.0f, kLargestE4m3 = 448.0f, kLargestE5m3 = 61440.0f;

inline float float_of_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float from_half(uint16_t bits) {
#ifdef __FLT16_MAX__
  _Float16 half;
  std::memcpy(&half, &bits, sizeof half);
  return static_cast<float>(half);
#else
  const uint32_t sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 0x1F, mantissa = bits & 0x3FF;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * std::ldexp(static_cast<float>(mantissa), -24);
  return float_of_bits(sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | mantissa << 13);
#endif
}

// Round to the nearest fp16 value, ties to even; x is not NaN and within the range of fp16.
inline uint16_t to_half(float value) {
#ifdef __FLT16_MAX__
  const _Float16 half = static_cast<_Float16>(value);
  uint16_t bits;
  std::memcpy(&bits, &half, sizeof bits);
  return bits;
#else
  const uint16_t sign = static_cast<uint16_t>(bits_of_float(value) >> 16 & 0x8000u);
  const float size = std::fabs(value);
  if (size < 0x1p-14f) return sign | static_cast<uint16_t>(std::nearbyint(size * 0x1p24f));
  const uint32_t bits = bits_of_float(size) - (112u << 23);
  return sign | static_cast<uint16_t>((bits + 0xFFFu + (bits >> 13 & 1)) >> 13);
#endif
}

// Round to the nearest bf16 value, ties to even; x is finite.
inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = bits_of_float(value);
  return static_cast<uint16_t>((bits + 0x7FFFu + (bits >> 16 & 1)) >> 16);
}

// Round down to fp16; x is within its range.
inline uint16_t to_half_below(float value) {
  const uint16_t half = to_half(value);
  if (!(from_half(half) > value)) return half;
  return static_cast<uint16_t>(half == 0 || half & 0x8000u ? half + 1 : half - 1);
}

// Round up to fp16; x is not negative.
inline uint16_t to_half_above(float value) {
  const uint16_t half = to_half(value);
  return static_cast<uint16_t>(from_half(half) < value ? half + 1 : half);
}

// Convert e4m3 to fp32: its fields are read as fp16, and the exponent bias is corrected.
inline float from_e4m3(uint8_t byte) {
  return 256 * from_half(static_cast<uint16_t>((byte & 0x80) << 8 | (byte & 0x7F) << 7));
}

// Round to the nearest e4m3 value; saturates, ties go away from zero.
inline uint8_t to_e4m3(float value) {
  const float size = std::fabs(value) < kLargestE4m3 ? std::fabs(value) : kLargestE4m3;
  const uint32_t byte = size < 0x1p-6f ? static_cast<uint32_t>(size / 0x1p-9f + 0.5f) : ((bits_of_float(size) + (1u << 19)) >> 20) - (120u << 3);
  return static_cast<uint8_t>(byte + (value < 0 ? 128 : 0));
}

// Convert e5m3 to fp32: fp16 without a sign and with three bits of mantissa.
inline float from_e5m3(uint8_t byte) { return from_half(static_cast<uint16_t>(byte << 7)); }

// Round to the nearest e5m3 value, ties of fp16 values up; x is not negative; saturates.
inline uint8_t to_e5m3(float value) {
  const int byte = (to_half(value < kLargestE5m3 ? value : kLargestE5m3) + (1 << 6)) >> 7;
  return static_cast<uint8_t>(byte < 0xF7 ? byte : 0xF7);
}

enum Dtype : int64_t { kFloat = 0, kBfloat16 = 1, kHalf = 2, kDouble = 3, kInt16 = 4, kUint8 = 5, kInt32 = 6 };

inline int64_t bytes_of(int64_t dtype) {
  return dtype == kDouble ? 8 : dtype == kFloat || dtype == kInt32 ? 4 : dtype == kUint8 ? 1 : 2;
}

// Round a number within the range of fp16 to a floating-point dtype, ties to even.
inline void put_rounded(void* to, int64_t offset, int64_t dtype, float value) {
  if (dtype == kFloat)
    static_cast<float*>(to)[offset] = value;
  else if (dtype == kDouble)
    static_cast<double*>(to)[offset] = value;
  else
    static_cast<uint16_t*>(to)[offset] = dtype == kBfloat16 ? to_bfloat16(value) : to_half(value);
}

// Convert n elements of a floating-point dtype, from `offset` on.
inline void to_float(const void* from, int64_t offset, int64_t dtype, int64_t n, float* out) {
  if (dtype == kFloat) {
    std::memcpy(out, static_cast<const float*>(from) + offset, sizeof(float) * static_cast<size_t>(n));
  } else if (dtype == kDouble) {
    for (int64_t i = 0; i < n; ++i) out[i] = static_cast<float>(static_cast<const double*>(from)[offset + i]);
  } else {
    const uint16_t* bits = static_cast<const uint16_t*>(from) + offset;
    if (dtype == kBfloat16)
      for (int64_t i = 0; i < n; ++i) out[i] = float_of_bits(static_cast<uint32_t>(bits[i]) << 16);
    else
      for (int64_t i = 0; i < n; ++i) out[i] = from_half(bits[i]);
  }
}

}  // namespace
