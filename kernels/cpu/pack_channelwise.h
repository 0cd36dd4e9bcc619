// Quantize and pack pages of keys whose channels differ in bits, and find those bits.
//
// reference/channelwise.py is the specification, bit by bit; names are the ones that it uses.

#pragma once

#include "pack_mixed.h"

namespace {

constexpr int kLanes = 16;  // channels quantized at once
constexpr int kClips = 8;
constexpr float kClip[kClips] = {1.0f, 0.92f, 0.84f, 0.76f, 0.68f, 0.6f, 0.5f, 0.4f};
// What a bit takes from the mean squared error of a channel of variance 1.
constexpr float kGain[kMostBits] = {0.6366f, 0.2459f, 0.08296f, 0.025043f, 0.006997f, 0.00185f, 0.00048f, 0.00013f};
constexpr float kPrior = 2.5f;  // queries that look at all channels alike, added to those known
enum Pairs : int64_t { kNoPairs = 0, kHalves = 1, kNeighbours = 2 };

// Some channels of a page, a lane each, and scratch memory: [tokens, kLanes].
struct Lanes {
  std::vector<float> x, finite, error;
  float half_levels[kLanes], center[kLanes], size[kLanes], lowest[kLanes], most[kLanes];

  explicit Lanes(int64_t tokens) : x(static_cast<size_t>(tokens * kLanes)), finite(x), error(x) {}
};

// Sum n rows, a power of two, by adding neighbours repeatedly, in place; the sums are in the first row.
void sum_rows(float* x, int64_t n) {
  for (; n > 1; n /= 2)
    for (int64_t i = 0; i < n / 2; ++i) {
      const float *a = x + 2 * i * kLanes, *b = a + kLanes;
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) x[i * kLanes + l] = a[l] + b[l];
    }
}

// Set size, lowest and most from the step of each lane.
void take_steps(Lanes& s, const uint8_t* step) {
  for (int l = 0; l < kLanes; ++l) {
    s.size[l] = from_e5m3(step[l]);
    s.lowest[l] = s.center[l] - s.size[l] * s.half_levels[l];
    s.most[l] = s.size[l] > 0.0f ? 2.0f * s.half_levels[l] : 0.0f;
  }
}

// The nearest codes of one token, as fp32.
inline void nearest_codes(const Lanes& s, const float* x, float* codes) {
#pragma omp simd
  for (int l = 0; l < kLanes; ++l) {
    const float place = (x[l] - s.lowest[l]) / (s.size[l] > 0.0f ? s.size[l] : 1.0f);
    const float code = std::floor(place + 0.5f), above = code > 0.0f ? code : 0.0f;
    codes[l] = above < s.most[l] ? above : s.most[l];
  }
}

// Choose the step of each lane by the squared error that it leaves.
void choose_steps(Lanes& s, int64_t tokens, const float* half_range, uint8_t* step) {
  float least[kLanes] = {}, codes[kLanes];
  for (int clip = 0; clip < kClips; ++clip) {
    uint8_t trial[kLanes];
    for (int l = 0; l < kLanes; ++l) trial[l] = s.half_levels[l] > 0.0f ? to_e5m3(half_range[l] * kClip[clip] / s.half_levels[l]) : 0;
    take_steps(s, trial);
    for (int64_t n = 0; n < tokens; ++n) {
      const float *x = s.x.data() + n * kLanes, *finite = s.finite.data() + n * kLanes;
      nearest_codes(s, x, codes);
#pragma omp simd
      for (int l = 0; l < kLanes; ++l) {
        const float difference = (codes[l] * s.size[l] + s.lowest[l] - x[l]) * finite[l];
        s.error[static_cast<size_t>(n * kLanes + l)] = difference * difference;
      }
    }
    sum_rows(s.error.data(), tokens);
    for (int l = 0; l < kLanes; ++l) {
      const float error = s.error[static_cast<size_t>(l)];
      if (clip && !(error < least[l])) continue;
      least[l] = error, step[l] = trial[l];
    }
  }
}

// Quantize the channels first .. first + count - 1 of a page x [tokens, dim]: their parameters, and their codes in
// w.transposed, [dim, tokens].
void code_lanes(PageWriter& w, const Channels& channels, const float* x, int64_t first, int count, Lanes& s) {
  const int64_t N = w.t.page_size, D = w.t.head_dim;
  float low[kLanes], high[kLanes], half_range[kLanes], codes[kLanes];
  std::fill(low, low + kLanes, INFINITY), std::fill(high, high + kLanes, -INFINITY);
  std::fill(s.x.begin(), s.x.end(), 0.0f), std::fill(s.finite.begin(), s.finite.end(), 0.0f);
  for (int64_t n = 0; n < N; ++n) {
    const float* from = x + n * D + first;
    take_ends(from, 1, 0, count, low, high);
    for (int l = 0; l < count; ++l) {
      s.x[static_cast<size_t>(n * kLanes + l)] = bounded(from[l] == from[l] ? from[l] : 0.0f);
      s.finite[static_cast<size_t>(n * kLanes + l)] = is_finite(from[l]) ? 1.0f : 0.0f;
    }
  }
  s.error = s.x;
  sum_rows(s.error.data(), N);
  uint8_t step[kLanes], *params = static_cast<uint8_t*>(w.params) + first;
  for (int l = 0; l < kLanes; ++l) {
    if (!(low[l] <= high[l])) low[l] = high[l] = 0.0f;  // nothing is finite
    s.half_levels[l] = l < count ? Channels::half_levels(channels.width[static_cast<size_t>(first + l)]) : 0.0f;
    const float middle = s.half_levels[l] > 0.0f ? (low[l] + high[l]) * 0.5f : s.error[static_cast<size_t>(l)] * (1.0f / static_cast<float>(N));
    const uint16_t center = to_half(middle);
    s.center[l] = from_half(center), half_range[l] = (high[l] - low[l]) * 0.5f;
    if (l < count) params[D + l] = static_cast<uint8_t>(center & 0xFF), params[2 * D + l] = static_cast<uint8_t>(center >> 8);
  }
  choose_steps(s, N, half_range, step);
  take_steps(s, step);
  std::copy(step, step + count, params);
  for (int64_t n = 0; n < N; ++n) {
    nearest_codes(s, s.x.data() + n * kLanes, codes);
    for (int l = 0; l < count; ++l) w.transposed[static_cast<size_t>((first + l) * N + n)] = static_cast<uint16_t>(codes[l]);
  }
}

// Pack the bits of the codes in w.transposed.
void pack_bits(PageWriter& w, const Channels& channels) {
  const int64_t N = w.t.page_size;
  std::vector<uint16_t> words(static_cast<size_t>(w.t.rows * N));  // [words of a token, tokens]
  for (size_t c = 0; c < channels.width.size(); ++c) {
    const uint16_t* codes = w.transposed.data() + static_cast<int64_t>(c) * N;
    for (int j = 0; j < channels.width[c]; ++j) {
      const bool left_over = j == channels.width[c] / 2 * 2;
      const BitPlace place = place_of(left_over ? channels.single[c] : channels.first[c] + j, w.t.rows * kBitsOfWord);
      uint16_t* out = words.data() + place.word * N;
#pragma omp simd
      for (int64_t n = 0; n < N; ++n) out[n] = static_cast<uint16_t>(out[n] | ((codes[n] >> j) & 1) << place.bit);
    }
  }
  for (int64_t first = 0; first < w.t.rows; first += kBlockWords) {
    const int64_t count = w.t.rows - first < kBlockWords ? w.t.rows - first : kBlockWords;
    uint16_t* out = w.codes + first * N;
    for (int64_t n = 0; n < N; ++n)
      for (int64_t i = 0; i < count; ++i) out[n * count + i] = words[static_cast<size_t>((first + i) * N + n)];
  }
}

void quantize_channelwise_page(PageWriter& w, const Channels& channels, const float* x, Lanes& s) {
  for (int64_t first = 0; first < w.t.head_dim; first += kLanes)
    code_lanes(w, channels, x, first, static_cast<int>(w.t.head_dim - first < kLanes ? w.t.head_dim - first : kLanes), s);
  pack_bits(w, channels);
}

// Widths

// Weights of channels from `count` queries [count, dim].
std::vector<float> weights_of(const float* queries, int64_t count, int64_t dim, int64_t pairs) {
  const size_t D = static_cast<size_t>(dim);
  std::vector<float> total(D), both(D), sums(2 * D + 1);
  float known = 0.0f;
  for (int64_t i = 0; i < count; ++i) {
    bool any = false;
    for (size_t c = 0; c < D; ++c) {
      const float query = queries[static_cast<size_t>(i) * D + c], at = bounded(query == query ? query : 0.0f);
      total[c] = total[c] + at * at;
      any = any || at != 0.0f;
    }
    known = known + (any ? 1.0f : 0.0f);
  }
  for (size_t c = 0; c < D; ++c) both[c] = pairs == kHalves ? total[c] + total[(c + D / 2) % D] : pairs == kNeighbours ? total[c] + total[c ^ 1] : total[c];
  std::copy(both.begin(), both.end(), sums.begin());
  const float mean = sum_pairs(sums.data(), dim) * static_cast<float>(1.0 / static_cast<double>(dim));
  const float prior = mean * (1.0f / (known > 1.0f ? known : 1.0f) * kPrior);
  for (float& weight : both) weight = mean > 0.0f ? weight + prior : 1.0f;
  return both;
}

// Take the mean, rotated to the slots from `first` on, off the tokens of a page [tokens, dim].
void take_off(const Packed& t, int64_t h, int64_t first, const float* mean, float* x) {
  const int64_t D = t.head_dim;
  std::vector<float> own(static_cast<size_t>(2 * D));
  float *cos_sin = own.data(), *turned = cos_sin + D;
  for (int64_t n = 0; n < t.page_size; ++n, x += D) {
    cos_sin_at(t, h, first + n, cos_sin), rotate_pairs(mean, cos_sin, t.head_dim, turned);
    for (int64_t c = 0; c < D; ++c) x[c] = x[c] - turned[c];
  }
}

// The mean of the tokens of two pages, rotated back by the angles of their slots; 0 in slow pairs.
void find_mean(const Packed& t, int64_t h, float* const* ends, const int64_t* slots, float* mean) {
  const int64_t D = t.head_dim, N = t.page_size, half = D / 2;
  std::vector<float> turned(static_cast<size_t>(N * D)), cos_sin(static_cast<size_t>(D)), sums(static_cast<size_t>(N));
  const float share = 0.5f / static_cast<float>(N);
  for (int i = 0; i < 2; ++i) {
    for (int64_t n = 0; n < N; ++n) {
      const float* x = ends[i] + n * D;
      float* out = turned.data() + n * D;
      cos_sin_at(t, h, slots[i] + n, cos_sin.data());
      for (int64_t c = 0; c < half; ++c) {
        const float cosine = cos_sin[static_cast<size_t>(c)], sine = cos_sin[static_cast<size_t>(half + c)];
        out[c] = x[c] * cosine + x[half + c] * sine, out[half + c] = x[half + c] * cosine - x[c] * sine;
      }
    }
    for (int64_t c = 0; c < D; ++c) {
      for (int64_t n = 0; n < N; ++n) sums[static_cast<size_t>(n)] = turned[static_cast<size_t>(n * D + c)];
      const float sum = sum_pairs(sums.data(), N) * share;
      mean[c] = i ? bounded(mean[c] + sum) : sum;
    }
  }
  for (int64_t c = 0; c < D; ++c)
    if (c % half >= t.mean_pairs) mean[c] = 0.0f;
}

// Variance of channels of a page [tokens, dim].
std::vector<float> variances_of(const float* x, int64_t tokens, int64_t dim) {
  std::vector<float> variance(static_cast<size_t>(dim)), channel(static_cast<size_t>(tokens)), sums(channel);
  const float share = 1.0f / static_cast<float>(tokens);
  for (int64_t c = 0; c < dim; ++c) {
    for (int64_t n = 0; n < tokens; ++n) channel[static_cast<size_t>(n)] = x[n * dim + c];
    sums = channel;
    const float mean = sum_pairs(sums.data(), tokens) * share;
    for (size_t n = 0; n < channel.size(); ++n) sums[n] = (channel[n] - mean) * (channel[n] - mean);
    variance[static_cast<size_t>(c)] = sum_pairs(sums.data(), tokens) * share;
  }
  return variance;
}

// Distribute `total` bits over channels: the bits of most worth, of equal ones the lower bit, then the first channel.
std::vector<float> allocate_widths(const std::vector<float>& value, int64_t total) {
  const size_t D = value.size();
  std::vector<float> worth(D * kMostBits), width(D);
  std::vector<size_t> bits(worth.size());
  for (size_t i = 0; i < bits.size(); ++i) bits[i] = i, worth[i] = value[i % D] * kGain[i / D];
  const auto before = [&](size_t a, size_t b) { return worth[a] > worth[b] || (worth[a] == worth[b] && a < b); };
  std::nth_element(bits.begin(), bits.begin() + (total - 1), bits.end(), before);
  for (int64_t i = 0; i < total; ++i) width[bits[static_cast<size_t>(i)] % D] += 1.0f;
  return width;
}

}  // namespace
