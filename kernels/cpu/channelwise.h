// Read pages of keys whose channels differ in bits.
//
// reference/channelwise.py is the specification. The words of a page are turned round first, so that those of
// neighbouring tokens lie side by side and one bit of a channel is read from many tokens at once. Channels are visited
// in order of their widths, so that no width has to be looked up in between.

#pragma once

#include <vector>

#include "wire.h"

namespace {

constexpr int kMostBits = 8;     // of a channel
constexpr int kBlockWords = 8;   // words of a token in a block
constexpr int kBitsOfWord = 16;
constexpr int kStrip = 32;       // tokens read at once; a page has a multiple of them

// Where a bit of a token lies: a word of the token, counted through all blocks, and a bit of that word.
struct BitPlace {
  int32_t word, field;
};

// The channels of a head: their widths, where their bits lie, and their parameters in a page.
struct Channels {
  int64_t head = -1;               // the head that `read` was called for, -1: none
  bool damaged = false;
  std::vector<uint8_t> width;      // [dim]
  std::vector<int32_t> order;      // channels by width
  std::vector<int32_t> first;      // [dim]: the place of bit 0 in `places`
  std::vector<BitPlace> places;    // of all bits
  int32_t begins[kMostBits + 2];   // of each width, in `order`
  std::vector<uint16_t> words;     // of a page, [words of a token, tokens]
  std::vector<float> step, lowest; // of a page, [dim]

  // Find the places of all bits for `dim` widths, of `total` bits together; say whether they are that many.
  bool place(int64_t dim, int64_t total) {
    order.resize(static_cast<size_t>(dim)), first.resize(static_cast<size_t>(dim)), places.resize(static_cast<size_t>(total));
    step.resize(static_cast<size_t>(dim)), lowest.resize(static_cast<size_t>(dim));
    int32_t counts[kMostBits + 1] = {}, row = 0;
    for (int32_t c = 0; c < dim; ++c) ++counts[width[static_cast<size_t>(c)]], first[static_cast<size_t>(c)] = row, row += width[static_cast<size_t>(c)];
    if (row != total) return false;
    begins[0] = 0;
    for (int bits = 0; bits <= kMostBits; ++bits) begins[bits + 1] = begins[bits] + counts[bits];
    int32_t next[kMostBits + 1];
    std::memcpy(next, begins, sizeof next);
    for (int32_t c = 0; c < dim; ++c) order[static_cast<size_t>(next[width[static_cast<size_t>(c)]]++)] = c;
    const int32_t block = kBlockWords * kBitsOfWord;
    for (int32_t bit = 0; bit < total; ++bit) {
      const int32_t start = bit / block * block, words_of = (total - start < block ? static_cast<int32_t>(total) - start : block) / kBitsOfWord;
      places[static_cast<size_t>(bit)] = {start / kBitsOfWord + (bit - start) % words_of, (bit - start) / words_of};
    }
    return true;
  }

  // Read the widths of a head; say whether they are ones that a cache could have found.
  bool read(const void* exact, int64_t offset, int64_t dtype, int64_t dim, int64_t total) {
    std::vector<float> held(static_cast<size_t>(dim));
    to_float(exact, offset, dtype, dim, held.data());
    width.assign(static_cast<size_t>(dim), 0);
    for (size_t c = 0; c < held.size(); ++c) {
      if (!(held[c] >= 0.0f && held[c] <= kMostBits && held[c] == std::floor(held[c]))) return false;
      width[c] = static_cast<uint8_t>(held[c]);
    }
    return place(dim, total);
  }

  // Turn the words of a page round, and load its parameters.
  void load(const uint16_t* codes, const uint8_t* params, int64_t tokens) {
    const int64_t count = static_cast<int64_t>(places.size()) / kBitsOfWord, dim = static_cast<int64_t>(width.size());
    words.resize(static_cast<size_t>(count * tokens));
    uint16_t* out = words.data();
    for (int64_t done = 0; done < count; done += kBlockWords, codes += kBlockWords * tokens, out += kBlockWords * tokens) {
      const int64_t some = count - done;
      if (some >= kBlockWords) {
        for (int64_t n = 0; n < tokens; ++n)
          for (int64_t w = 0; w < kBlockWords; ++w) out[w * tokens + n] = codes[n * kBlockWords + w];
      } else {
        for (int64_t w = 0; w < some; ++w)
          for (int64_t n = 0; n < tokens; ++n) out[w * tokens + n] = codes[n * some + w];
      }
    }
    for (int64_t c = 0; c < dim; ++c) {
      const size_t at = static_cast<size_t>(c);
      const float center = from_half(static_cast<uint16_t>(params[dim + c] | params[2 * dim + c] << 8));
      step[at] = from_e5m3(params[c]);
      lowest[at] = center - step[at] * half_levels(width[at]);
    }
  }

  static float half_levels(int bits) { return static_cast<float>((1 << bits) - 1) * 0.5f; }
};

// Codes of kStrip tokens of a channel of kBits bits.
template <int kBits>
inline void codes_of(const uint16_t* words, int64_t tokens, const BitPlace* places, uint16_t* out) {
  const uint16_t* from[kBits + 1];
  for (int j = 0; j < kBits; ++j) from[j] = words + places[j].word * tokens;
#pragma omp simd
  for (int i = 0; i < kStrip; ++i) {
    uint16_t code = 0;
    for (int j = 0; j < kBits; ++j) code = static_cast<uint16_t>(code | ((from[j][i] >> places[j].field) & 1) << j);
    out[i] = code;
  }
}

// Dequantize the channels of kBits bits of a loaded page into a tile [dim, tokens].
template <int kBits>
void unpack_width(const Channels& s, int64_t tokens, float* tile) {
  uint16_t codes[kStrip];
  for (int32_t k = s.begins[kBits]; k < s.begins[kBits + 1]; ++k) {
    const int32_t c = s.order[static_cast<size_t>(k)];
    const float step = s.step[static_cast<size_t>(c)], lowest = s.lowest[static_cast<size_t>(c)];
    for (int64_t n = 0; n < tokens; n += kStrip) {
      codes_of<kBits>(s.words.data() + n, tokens, s.places.data() + s.first[static_cast<size_t>(c)], codes);
      float* out = tile + c * tokens + n;
#pragma omp simd
      for (int i = 0; i < kStrip; ++i) out[i] = static_cast<float>(codes[i]) * step + lowest;
    }
  }
}

// Add the channels of kBits bits of a loaded page to the scores of kStrip tokens and kRows query rows.
template <int kBits, int kRows>
void score_width(const Channels& s, const float* query, int64_t first, int64_t tokens, float (&sums)[kRows][kStrip]) {
  uint16_t codes[kStrip];
  const int64_t dim = static_cast<int64_t>(s.width.size());
  for (int32_t k = s.begins[kBits]; k < s.begins[kBits + 1]; ++k) {
    const int32_t c = s.order[static_cast<size_t>(k)];
    codes_of<kBits>(s.words.data() + first, tokens, s.places.data() + s.first[static_cast<size_t>(c)], codes);
    for (int q = 0; q < kRows; ++q) {
      const float factor = query[q * dim + c];
#pragma omp simd
      for (int i = 0; i < kStrip; ++i) sums[q][i] += factor * static_cast<float>(codes[i]);
    }
  }
}

// Score a loaded page for kRows query rows: scores[q, n] is the product of row q and token n. `scaled` is scratch,
// [kRows, dim].
template <int kRows>
void score_rows(const Channels& s, const float* query, int64_t tokens, float* scaled, float* scores) {
  const int64_t dim = static_cast<int64_t>(s.width.size());
  float constant[kRows];
  for (int q = 0; q < kRows; ++q) {
    const float* row = query + q * dim;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < dim; ++c) sum += row[c] * s.lowest[static_cast<size_t>(c)], scaled[q * dim + c] = row[c] * s.step[static_cast<size_t>(c)];
    constant[q] = sum;
  }
  for (int64_t n = 0; n < tokens; n += kStrip) {
    float sums[kRows][kStrip];
    for (int q = 0; q < kRows; ++q)
      for (int i = 0; i < kStrip; ++i) sums[q][i] = constant[q];
    score_width<1, kRows>(s, scaled, n, tokens, sums);
    score_width<2, kRows>(s, scaled, n, tokens, sums);
    score_width<3, kRows>(s, scaled, n, tokens, sums);
    score_width<4, kRows>(s, scaled, n, tokens, sums);
    score_width<5, kRows>(s, scaled, n, tokens, sums);
    score_width<6, kRows>(s, scaled, n, tokens, sums);
    score_width<7, kRows>(s, scaled, n, tokens, sums);
    score_width<8, kRows>(s, scaled, n, tokens, sums);
    for (int q = 0; q < kRows; ++q) std::memcpy(scores + q * tokens + n, sums[q], sizeof sums[q]);
  }
}

}  // namespace
