// Quantize and pack pages whose tokens differ in bits.
//
// reference/mixed.py is the specification, bit by bit; names are the ones that it uses.

#pragma once

#include <algorithm>
#include <functional>

#include "pack.h"

namespace {

constexpr int kMaxBits = 8;
constexpr float kFloor = 4.0f;  // of the mean importance of a page

// Scratch memory of a thread that writes a mixed page.
struct MixedScratch {
  std::vector<float> needs, weight, offset, middle;
  std::vector<uint8_t> levels, kept, bits, rank;
  std::vector<int> channels;

  explicit MixedScratch(const LayoutWords& t) {
    const size_t tokens = static_cast<size_t>(t.page_size), dim = static_cast<size_t>(t.head_dim);
    size_t wide = 1;
    while (wide < dim || wide < tokens) wide *= 2;
    needs.resize(tokens * kMaxBits), weight.resize(wide), offset.resize(wide), middle.resize(wide);
    levels.resize(tokens * dim), kept.resize(tokens * dim), bits.resize(tokens), rank.resize(tokens);
    channels.resize(tokens * static_cast<size_t>(t.outliers));
  }
};

// Find the outliers of a token, and clear `kept` of them: the largest, the smallest, the second largest and so on.
void find_outliers(const float* x, int64_t dim, int64_t outliers, uint8_t* kept, int* channels) {
  for (int64_t i = 0; i < outliers; ++i) {
    const float sign = i % 2 ? -1.0f : 1.0f;
    int best = -1;
    float most = -INFINITY;
    for (int c = 0; c < dim; ++c) {
      if (std::find(channels, channels + i, c) != channels + i) continue;
      const float rest = kept[c] ? x[c] * sign : -2 * kLargestHalf;
      if (rest > most) most = rest, best = c;
    }
    channels[i] = best, kept[best] = 0;
  }
}

// Importance scores of the tokens, softened or as they are.
void weigh(const LayoutWords& t, const float* importance, int64_t stride, MixedScratch& s) {
  const int64_t N = t.page_size;
  const auto known = [&](int64_t n) {
    const float at = importance[n * stride];
    return at == at ? std::min(std::max(at, -3.4028235e38f), 3.4028235e38f) : 0.0f;
  };
  if (!t.soften) {
    for (int64_t n = 0; n < N; ++n) s.weight[static_cast<size_t>(n)] = known(n);
    return;
  }
  for (int64_t n = 0; n < N; ++n) s.weight[static_cast<size_t>(n)] = known(n);
  const float mean = sum_pairs(s.weight.data(), N) / static_cast<float>(N);
  const float floor = mean > 0.0f ? mean * kFloor : 1.0f;
  for (int64_t n = 0; n < N; ++n) s.weight[static_cast<size_t>(n)] = std::sqrt(known(n) + floor);
}

// Choose the bits of each token such that s.weight[n] / 2 ** bits is at most one bound.
void allocate(const LayoutWords& t, float bound, MixedScratch& s) {
  const int64_t N = t.page_size, steps = t.max_bits - t.min_bits, count = N * steps, free = t.code_rows - t.min_bits * N;
  for (int64_t n = 0; n < N; ++n)
    for (int64_t k = 0; k < steps; ++k) s.needs[static_cast<size_t>(n * steps + k)] = s.weight[static_cast<size_t>(n)] * std::ldexp(1.0f, static_cast<int>(-t.min_bits - k));
  float least = 0.0f;
  if (free < count) {
    std::nth_element(s.needs.begin(), s.needs.begin() + free, s.needs.begin() + count, std::greater<float>());
    least = s.needs[static_cast<size_t>(free)];
  }
  least = bound > least ? bound : least;
  for (int64_t n = 0; n < N; ++n) {
    int64_t bits = t.min_bits;
    for (int64_t k = 0; k < steps; ++k) bits += s.weight[static_cast<size_t>(n)] * std::ldexp(1.0f, static_cast<int>(-t.min_bits - k)) > least;
    s.bits[static_cast<size_t>(n)] = static_cast<uint8_t>(bits);
  }
}

// Ranks of the tokens of a page sorted by bits, descending and stable.
void sort_by_bits(int64_t N, MixedScratch& s) {
  int64_t next = 0;
  for (int bits = kMaxBits; bits >= 0; --bits)
    for (int64_t n = 0; n < N; ++n)
      if (s.bits[static_cast<size_t>(n)] == bits) s.rank[static_cast<size_t>(n)] = static_cast<uint8_t>(next++);
}

void put_half(uint8_t* metadata, int64_t field, int64_t N, uint16_t half) {
  metadata[field * N] = static_cast<uint8_t>(half & 0xFF), metadata[(field + 1) * N] = static_cast<uint8_t>(half >> 8);
}

// Store a zero point or half-range in the layout's format, in field `which` of two; return the rounded value.
float store(const LayoutWords& t, uint8_t* metadata, int which, float x, bool up) {
  if (t.fp8) return from_e4m3(metadata[which * t.page_size] = to_e4m3(x));
  const uint16_t half = up ? to_half_above(x) : to_half(x);
  put_half(metadata, 2 * which, t.page_size, half);
  return from_half(half);
}

// Fit the half-range: see fit_half_range in reference/mixed.py.
void fit_half_range(const LayoutWords& t, uint8_t* metadata, int bits, const uint8_t* kept, const uint8_t* levels, const float* offset, MixedScratch& s) {
  const int64_t D = t.head_dim;
  const int shift = kMaxBits - bits;
  const float first = std::ldexp(1.0f, -bits) - 1.0f;
  for (int64_t c = 0; c < D; ++c) s.middle[static_cast<size_t>(c)] = kept[c] ? offset[c] * offset[c] : 0.0f;
  const float power = sum_pairs(s.middle.data(), D);
  for (int64_t c = 0; c < D; ++c) {
    const float place = static_cast<float>((levels[c] >> shift) << shift) * 0x1p-7f + first;
    s.middle[static_cast<size_t>(c)] = kept[c] ? offset[c] * place : 0.0f;
  }
  const float product = sum_pairs(s.middle.data(), D);
  if (bits == 0 || !(product > 0.0f)) return;
  const float half_range = power / product;
  store(t, metadata, 1, half_range < kLargestHalf ? half_range : kLargestHalf, false);
}

// Quantize one token, whose bits are known, to s.levels and its metadata.
void code_token(const LayoutWords& t, const float* x, int64_t n, float lo, float hi, uint8_t* metadata, MixedScratch& s) {
  const int64_t D = t.head_dim;
  const size_t at = static_cast<size_t>(n * D);
  uint8_t *levels = s.levels.data() + at, *kept = s.kept.data() + at;
  float* offset = s.offset.data();
  const float zero_point = store(t, metadata, 0, lo * 0.5f + hi * 0.5f, false);
  const float above = hi - zero_point, below = zero_point - lo, far = above > below ? above : below;
  const float half_range = store(t, metadata, 1, far < kLargestHalf ? far : kLargestHalf, true);
  const float width = half_range > 0.0f ? 2.0f * half_range : 1.0f;
#pragma omp simd
  for (int64_t c = 0; c < D; ++c) {
    offset[c] = x[c] - zero_point;
    const float level = std::floor((offset[c] / width + 0.5f) * 256.0f);
    const float inside = level < 0.0f ? 0.0f : level > 255.0f ? 255.0f : level;
    levels[c] = static_cast<uint8_t>(half_range > 0.0f ? static_cast<int32_t>(inside) : 0);
  }
  if (t.fit) fit_half_range(t, metadata, s.bits[static_cast<size_t>(n)], kept, levels, offset, s);
  metadata[t.rank_field * t.page_size] = s.rank[static_cast<size_t>(n)];
  const int* channels = s.channels.data() + n * t.outliers;
  for (int64_t i = 0, field = t.rank_field + 1; i < t.outliers; ++i, field += t.outlier_fields) {
    metadata[field * t.page_size] = static_cast<uint8_t>(channels[i]);
    if (t.outlier_fields > 3) metadata[(field + 1) * t.page_size] = static_cast<uint8_t>(channels[i] >> 8);
    put_half(metadata, field + t.outlier_fields - 2, t.page_size, to_half(x[channels[i]]));
  }
}

// Bit j, from the highest, of each of `count` codes.
inline uint16_t word_of(const uint8_t* levels, int count, int j) {
  uint16_t word = 0;
  for (int f = 0; f < count; ++f) word = static_cast<uint16_t>(word | ((levels[f] >> (kMaxBits - 1 - j)) & 1) << f);
  return word;
}

// Write header and planes.
void pack_planes(const LayoutWords& t, uint16_t* codes, const MixedScratch& s) {
  const int64_t N = t.page_size, D = t.head_dim, words = plane_words(D, 1), whole = D / kWordBits;
  std::memset(codes, 0, sizeof(uint16_t) * static_cast<size_t>(t.row_words));
  uint16_t* plane = codes + kPlanes;
  for (int j = 0; j < kMaxBits; plane += codes[j++] * words) {
    for (int64_t n = 0; n < N; ++n) {
      if (s.bits[static_cast<size_t>(n)] <= j) continue;
      ++codes[j];
      uint16_t* row = plane + s.rank[static_cast<size_t>(n)] * words;
      const uint8_t* levels = s.levels.data() + n * D;
      for (int64_t u = 0; u < whole; ++u) row[u] = word_of(levels + kWordBits * u, kWordBits, j);
      if (whole < words) row[whole] = word_of(levels + kWordBits * whole, static_cast<int>(D % kWordBits), j);
    }
  }
}

// Quantize a page [page_size, head_dim], whose elements are clamped in place. `importance` has one score every
// `stride` elements, or is null: all are equal.
void quantize_mixed_page(PageWriter& w, float* x, const float* importance, int64_t stride, float bound, MixedScratch& s) {
  const LayoutWords& t = w.t;
  const int64_t N = t.page_size, D = t.head_dim;
  if (importance)
    weigh(t, importance, stride, s);
  else
    std::fill(s.weight.begin(), s.weight.end(), 1.0f);
  for (int64_t n = 0; n < N; ++n) {
    float* token = x + n * D;
    uint8_t* kept = s.kept.data() + n * D;
    for (int64_t c = 0; c < D; ++c) kept[c] = is_finite(token[c]), token[c] = bounded(token[c] == token[c] ? token[c] : 0.0f);
    find_outliers(token, D, t.outliers, kept, s.channels.data() + n * t.outliers);
    float lo = INFINITY, hi = -INFINITY;
    for (int64_t c = 0; c < D; ++c)
      if (kept[c]) lo = token[c] < lo ? token[c] : lo, hi = token[c] > hi ? token[c] : hi;
    if (!(lo <= hi)) lo = hi = 0.0f;
    w.lo[static_cast<size_t>(n)] = lo, w.hi[static_cast<size_t>(n)] = hi;
    s.weight[static_cast<size_t>(n)] = importance ? (hi - lo) * s.weight[static_cast<size_t>(n)] : hi - lo;
  }
  allocate(t, bound, s);
  sort_by_bits(N, s);
  uint8_t* metadata = static_cast<uint8_t*>(w.params);
  for (int64_t n = 0; n < N; ++n) code_token(t, x + n * D, n, w.lo[static_cast<size_t>(n)], w.hi[static_cast<size_t>(n)], metadata + n, s);
  pack_planes(t, w.codes, s);
}

}  // namespace
