// Quantize and pack pages: uniform quantization and codebooks.
//
// reference/cache.py is the specification, bit by bit: fp32 with one rounding an operation, in the order written
// there. A page is given as fp32 elements [page_size, head_dim], transformed for quantization.

#pragma once

#include "unpack.h"

namespace {

constexpr double kSearched[] = {1.0, 0.92, 0.84, 0.76, 0.68, 0.6, 0.5, 0.4};  // clips that are tried

// Destination of a page, and scratch memory of a thread.
struct PageWriter {
  const LayoutWords& t;
  uint16_t* codes;
  void* params;
  const float* margin;      // of the head, [head_dim]; null: no tables
  const uint16_t* book;     // of the head, as in Packed
  float shrink;             // of a group's range, cut off at each end
  std::vector<uint16_t> index, transposed;  // codes [page_size, code channels], and transposed
  std::vector<float> lo, hi, zero, scale, distance, entries, error;

  explicit PageWriter(const LayoutWords& layout) : t(layout), codes(nullptr), params(nullptr), margin(nullptr), book(nullptr) {
    const size_t tokens = static_cast<size_t>(t.page_size), channels = static_cast<size_t>(t.head_dim);
    shrink = float_of_bits(static_cast<uint32_t>(t.shrink_bits));
    index.resize(tokens * channels + kWordBits), transposed.resize(tokens * channels + kWordBits);
    const size_t wide = tokens > channels ? tokens : channels;
    lo.resize(wide), hi.resize(wide), zero.resize(wide), scale.resize(wide);
    if (t.search) error.resize(2 * wide);
    if (t.codebook) distance.resize(static_cast<size_t>(t.levels) + 1), entries.resize((static_cast<size_t>(t.levels) + 1) * static_cast<size_t>(t.couple));
  }
};

// Sum n elements by adding neighbours repeatedly, in place; x has room for zeros up to a power of two.
float sum_pairs(float* x, int64_t n) {
  int64_t wide = 1;
  while (wide < n) wide *= 2;
  for (int64_t i = n; i < wide; ++i) x[i] = 0.0f;
  for (; wide > 1; wide /= 2)
    for (int64_t i = 0; i < wide / 2; ++i) x[i] = x[2 * i] + x[2 * i + 1];
  return x[0];
}

bool is_finite(float x) { return std::fabs(x) <= 3.4028235e38f; }

float bounded(float x) {  // NaN stays NaN
  return x < -kLargestHalf ? -kLargestHalf : x > kLargestHalf ? kLargestHalf : x;
}

// Extend ranges, [count], by n elements `stride` apart each; the first elements of all groups are contiguous.
void take_ends(const float* x, int64_t n, int64_t stride, int64_t count, float* lo, float* hi) {
  for (int64_t i = 0; i < n; ++i, x += stride) {
#pragma omp simd
    for (int64_t c = 0; c < count; ++c) {
      const float at = bounded(x[c]);
      const bool finite = is_finite(x[c]);
      lo[c] = finite && at < lo[c] ? at : lo[c];
      hi[c] = finite && at > hi[c] ? at : hi[c];
    }
  }
}

// Range of n contiguous elements.
void take_ends(const float* x, int64_t n, float& lo, float& hi) {
  float least = INFINITY, most = -INFINITY;
#pragma omp simd reduction(min : least) reduction(max : most)
  for (int64_t i = 0; i < n; ++i) {
    const float at = bounded(x[i]);
    const bool finite = is_finite(x[i]);
    const float low = finite ? at : INFINITY, high = finite ? at : -INFINITY;
    least = low < least ? low : least;
    most = high > most ? high : most;
  }
  lo = least, hi = most;
}

// Compute parameters from the range of a group, store them at pair `at` and return the rounded values.
void store_pair(const PageWriter& w, int64_t at, float lo, float hi, float margin, float& scale, float& zero) {
  const float levels = static_cast<float>(w.t.levels);
  if (!(lo <= hi)) lo = hi = 0.0f;  // nothing is finite
  if (margin != 0.0f) {
    const float cut = (hi - lo) * margin;
    lo = lo + cut, hi = hi - cut;
  }
  if (w.t.fp8) {
    uint8_t* pair = static_cast<uint8_t*>(w.params) + 2 * at;
    pair[1] = to_e4m3(lo), zero = from_e4m3(pair[1]);
    const float step = (hi - zero) / levels;
    pair[0] = to_e4m3(step > 0.0f ? step : 0.0f), scale = from_e4m3(pair[0]);
  } else if (w.t.e5m3) {
    uint8_t* pair = static_cast<uint8_t*>(w.params) + 2 * at;
    lo = lo < 0.0f ? lo : 0.0f, hi = hi > 0.0f ? hi : 0.0f;
    pair[0] = to_e5m3((hi - lo) / levels), scale = from_e5m3(pair[0]);
    const float reach = scale * (levels * 0.5f), middle = (lo + hi) * 0.5f / (reach > 0.0f ? reach : 1.0f);
    const float place = std::floor(middle * kMiddleSteps + 0.5f) + kMiddle;
    pair[1] = static_cast<uint8_t>(place < 1.0f ? 1.0f : place > 255.0f ? 255.0f : place);
    zero = zero_of(scale, pair[1], levels);
  } else {
    uint16_t* pair = static_cast<uint16_t*>(w.params) + 2 * at;
    pair[1] = to_half_below(lo), zero = from_half(pair[1]);
    const float step = (hi - zero) / levels;
    pair[0] = to_half_above(step < kLargestHalf ? step : kLargestHalf), scale = from_half(pair[0]);
  }
}

uint16_t code_of(float x, float zero, float scale, float levels) {
  const float at = bounded(x == x ? x : 0.0f), step = scale > 0.0f ? scale : 1.0f;
  const float code = std::floor((at - zero) / step + 0.5f);
  const float inside = code < 0.0f ? 0.0f : code > levels ? levels : code;
  return static_cast<uint16_t>(scale > 0.0f ? static_cast<int32_t>(inside) : 0);
}

// Store the parameters of a group of n elements, `stride` apart, with the clip that leaves the least squared error.
void store_searched(PageWriter& w, int64_t at, const float* x, int64_t n, int64_t stride, float lo, float hi, float& scale, float& zero) {
  const float levels = static_cast<float>(w.t.levels);
  float least = INFINITY, best = 0.0f;
  for (const double clip : kSearched) {
    const float margin = static_cast<float>((1.0 - clip) / 2.0);
    store_pair(w, at, lo, hi, margin, scale, zero);
    for (int64_t i = 0; i < n; ++i) {
      const float element = x[i * stride], code = static_cast<float>(code_of(element, zero, scale, levels));
      const float value = code * scale + zero, off = is_finite(element) ? value - bounded(element) : 0.0f;
      w.error[static_cast<size_t>(i)] = off * off;
    }
    const float error = sum_pairs(w.error.data(), n);
    if (error < least) least = error, best = margin;
  }
  store_pair(w, at, lo, hi, best, scale, zero);
}

// Codes of a page whose groups lie inside tokens.
void code_tokens(PageWriter& w, const float* x) {
  const int64_t N = w.t.page_size, D = w.t.head_dim, size = w.t.group_size;
  const float levels = static_cast<float>(w.t.levels);
  for (int64_t n = 0; n < N; ++n) {
    for (int64_t first = 0, group = 0; first < D; first += size, ++group) {
      const float* run = x + n * D + first;
      uint16_t* out = w.index.data() + n * D + first;
      float lo, hi, scale, zero;
      take_ends(run, size, lo, hi);
      if (w.t.search)
        store_searched(w, group * N + n, run, size, 1, lo, hi, scale, zero);
      else
        store_pair(w, group * N + n, lo, hi, w.margin ? w.margin[first] : w.shrink, scale, zero);
#pragma omp simd
      for (int64_t i = 0; i < size; ++i) out[i] = code_of(run[i], zero, scale, levels);
    }
  }
}

// Codes of a page whose groups lie inside channels.
void code_channels(PageWriter& w, const float* x) {
  const int64_t N = w.t.page_size, D = w.t.head_dim, size = w.t.group_size;
  const float levels = static_cast<float>(w.t.levels);
  for (int64_t first = 0, group = 0; first < N; first += size, ++group) {
    std::fill(w.lo.begin(), w.lo.begin() + D, INFINITY), std::fill(w.hi.begin(), w.hi.begin() + D, -INFINITY);
    take_ends(x + first * D, size, D, D, w.lo.data(), w.hi.data());
    for (int64_t c = 0; c < D; ++c) {
      const size_t i = static_cast<size_t>(c);
      if (w.t.search)
        store_searched(w, group * D + c, x + first * D + c, size, D, w.lo[i], w.hi[i], w.scale[i], w.zero[i]);
      else
        store_pair(w, group * D + c, w.lo[i], w.hi[i], w.margin ? w.margin[c] : w.shrink, w.scale[i], w.zero[i]);
    }
    const float *scale = w.scale.data(), *zero = w.zero.data();
    for (int64_t n = first; n < first + size; ++n) {
      uint16_t* out = w.index.data() + n * D;
#pragma omp simd
      for (int64_t c = 0; c < D; ++c) out[c] = code_of(x[n * D + c], zero[c], scale[c], levels);
    }
  }
}

// Index of the centroid nearest to n coupled elements, the lowest among ties; entries [couple, count].
uint16_t nearest(const float* x, int64_t couple, const float* entries, int64_t count, float* distance) {
  for (int64_t c = 0; c < couple; ++c) {
    const float at = bounded(x[c] == x[c] ? x[c] : 0.0f);
    const float* entry = entries + c * count;
#pragma omp simd
    for (int64_t e = 0; e < count; ++e) {
      const float off = at - entry[e];
      distance[e] = (c ? distance[e] : 0.0f) + off * off;
    }
  }
  float least = INFINITY;
#pragma omp simd reduction(min : least)
  for (int64_t e = 0; e < count; ++e) least = distance[e] < least ? distance[e] : least;
  for (int64_t e = 0; e < count; ++e)
    if (distance[e] == least) return static_cast<uint16_t>(e);
  return 0;  // all distances are NaN
}

void code_coupled(PageWriter& w, const float* x) {
  const int64_t N = w.t.page_size, D = w.t.head_dim, couple = w.t.couple, count = w.t.levels + 1, groups = D / couple;
  for (int64_t group = 0; group < groups; ++group) {
    const uint16_t* book = w.book + group * count * couple;
    for (int64_t e = 0; e < count; ++e)
      for (int64_t c = 0; c < couple; ++c) w.entries[static_cast<size_t>(c * count + e)] = from_half(book[e * couple + c]);
    for (int64_t n = 0; n < N; ++n) w.index[static_cast<size_t>(n * groups + group)] = nearest(x + n * D + group * couple, couple, w.entries.data(), count, w.distance.data());
  }
}

// Pack one plane of a row: field f of word u is the code at f * count + u, its bits from `below` on; 0 from `length` on.
template <int kWidth>
void pack_plane(const uint16_t* codes, int64_t count, int64_t length, int below, uint16_t* words) {
  for (int64_t u = 0; u < count; ++u) words[u] = 0;
  for (int field = 0; field < kWordBits / kWidth; ++field) {
    const uint16_t* run = codes + field * count;
    const int64_t rest = length - field * count, n = rest < count ? rest : count;
#pragma omp simd
    for (int64_t u = 0; u < n; ++u) words[u] = static_cast<uint16_t>(words[u] | ((run[u] >> below) & ((1 << kWidth) - 1)) << (field * kWidth));
  }
}

template <int kWidth>
void pack_plane_maybe(const LayoutWords& t, const uint16_t* codes, int& below, uint16_t*& words) {
  if (!(t.bits & kWidth)) return;
  const int64_t count = plane_words(t.row_places, kWidth);
  pack_plane<kWidth>(codes, count, t.row_length, below, words);
  below += kWidth, words += count;
}

void pack_whole_planes(const LayoutWords& t, const uint16_t* codes, uint16_t* words) {
  int below = 0;
  pack_plane_maybe<8>(t, codes, below, words);
  pack_plane_maybe<4>(t, codes, below, words);
  pack_plane_maybe<2>(t, codes, below, words);
  pack_plane_maybe<1>(t, codes, below, words);
}

// The way back of unpack_trits: the first digit of a byte is the lowest.
void pack_trits(const LayoutWords& t, const uint16_t* codes, int64_t row, uint16_t* page) {
  for (int64_t first = 0; first < t.row_words;) {
    const int width = trit_plane(t.row_words - first);
    uint16_t* words = page + first * t.rows + row * width;
    for (int u = 0; u < 2 * width; ++u) {
      int byte = 0;
      for (int digit = kTrits - 1; digit >= 0; --digit) {
        const int64_t place = 2 * (kTrits * first + digit * width) + u;
        byte = 3 * byte + (place < t.row_length ? codes[place] : 0);
      }
      words[u / 2] = static_cast<uint16_t>(u % 2 ? words[u / 2] | byte << 8 : byte);
    }
    first += width;
  }
}

// The way back of unpack_thirds: five whole codes in a word of a third, and a bit of the last.
void pack_thirds(const LayoutWords& t, const uint16_t* codes, uint16_t* words) {
  const int64_t count = t.row_places / kWordBits;
  const auto code_at = [&](int64_t place) { return place < t.row_length ? codes[place] : 0; };
  for (int third = 0; third < kThirds; ++third)
    for (int64_t u = 0; u < count; ++u) {
      int word = (code_at((kWordBits - 1) * count + u) >> third & 1) << 15;
      for (int i = 0; i < kThirdFields; ++i) word |= code_at((kThirdFields * third + i) * count + u) << (kThirds * i);
      words[third * count + u] = static_cast<uint16_t>(word);
    }
}

void pack_rows(PageWriter& w) {
  const LayoutWords& t = w.t;
  const int64_t channels = t.head_dim / t.couple;
  const uint16_t* codes = w.index.data();
  if (!t.is_key) {  // rows are channels
    for (int64_t n = 0; n < t.page_size; ++n)
      for (int64_t c = 0; c < channels; ++c) w.transposed[static_cast<size_t>(c * t.page_size + n)] = codes[n * channels + c];
    codes = w.transposed.data();
  }
  uint16_t* words = w.codes;
  if (t.trits) {
    for (int64_t row = 0; row < t.rows; ++row, codes += t.row_length) pack_trits(t, codes, row, w.codes);
    return;
  }
  const auto pack_row = t.bits == kThirds && !t.codebook ? pack_thirds : pack_whole_planes;
  for (int64_t row = 0; row < t.rows; ++row, codes += t.row_length, words += t.row_words) pack_row(t, codes, words);
}

void quantize_page(PageWriter& w, const float* x) {
  if (w.t.codebook)
    code_coupled(w, x);
  else if (w.t.by_token)
    code_tokens(w, x);
  else
    code_channels(w, x);
  pack_rows(w);
}

}  // namespace
