// Read pages of keys whose channels differ in bits.
//
// reference/channelwise.py is the specification. A page is loaded as bytes [bits of a token / 8, tokens]: byte k of a
// token has its fields 4 k .. 4 k + 3. Digits of a channel are side by side, so that most codes are bits of one byte, at
// the same place in all tokens; others are put together in bytes of their own, behind those. To unpack a code is a shift
// and a mask. To score it takes less: bits that are masked, but not shifted, are a code times a power of two, by which
// the query is divided.

#pragma once

#include <algorithm>
#include <cstring>
#include <vector>

#include "wire.h"

namespace {

constexpr int kMostBits = 8;    // of a channel
constexpr int kBlockWords = 8;  // words of a token in a block
constexpr int kBitsOfWord = 16, kBitsOfByte = 8, kBitsOfField = 2;
constexpr int kStrip = 32;      // tokens scored at once; a page has a multiple of them

// Where a bit of a token lies: a word of the token, counted through all blocks, and a bit of that word.
struct BitPlace {
  int64_t word, bit;
};

inline BitPlace place_of(int64_t bit, int64_t total) {
  constexpr int64_t kBlock = kBlockWords * kBitsOfWord;
  const int64_t start = bit / kBlock * kBlock, words = (total - start < kBlock ? total - start : kBlock) / kBitsOfWord;
  const int64_t field = (bit - start) / kBitsOfField;
  return {start / kBitsOfWord + field % words, field / words * kBitsOfField + bit % kBitsOfField};
}

// The codes of a channel: bits of one byte, `low` the lowest; as they lie there, they are too large by 1 / `scale`.
struct Piece {
  int32_t channel, byte;
  uint8_t mask, low;
  float scale;
};

// A part of codes that are put together in byte `target`: bits of a byte, `shift` places up.
struct Part {
  int32_t byte, target;
  int shift;
  uint8_t mask;  // of the bits, where they are put
};

// Exchange bits of x, `shift` places up, with bits of y, in 8 x 8 squares of fields.
inline void exchange(uint16_t& x, uint16_t& y, int shift, uint16_t mask) {
  const uint16_t differing = static_cast<uint16_t>((x >> shift ^ y) & mask);
  y = static_cast<uint16_t>(y ^ differing), x = static_cast<uint16_t>(x ^ differing << shift);
}

// The channels of a head: widths, where their bits lie, parameters and bits of a page.
struct Channels {
  int64_t head = -1;  // the head that the widths are of, -1: none
  bool damaged = false;
  std::vector<uint8_t> width;
  std::vector<int32_t> first, single;  // of each channel: the first bit of its digits, and what is left over
  std::vector<Piece> pieces;
  std::vector<Part> parts;
  int32_t joints = 0;  // codes that are put together
  std::vector<float> step, lowest;
  std::vector<uint16_t> words;  // of the page, [words of a token, tokens]
  std::vector<uint8_t> bytes;   // of the page, [bits of a token / 8 and joints, tokens]
  std::vector<float> turning;   // products of queries and the mean that is taken off
  std::vector<float> asked, factor, scaled;  // queries, parameters and both together, a number for each piece

  int64_t dim() const { return static_cast<int64_t>(width.size()); }

  static float half_levels(int bits) { return static_cast<float>((1 << bits) - 1) * 0.5f; }

  // Read the widths of a head; say whether a cache whose tokens have `total` bits could have found them.
  bool read(const void* exact, int64_t offset, int64_t dtype, int64_t channels, int64_t total) {
    step.resize(static_cast<size_t>(channels)), first.resize(step.size()), single.resize(step.size()), width.resize(step.size()), lowest.resize(step.size());
    to_float(exact, offset, dtype, channels, step.data());
    pieces.clear(), parts.clear(), joints = 0, words.resize(0), bytes.resize(0);
    int32_t bit = 0;
    for (size_t c = 0; c < step.size(); ++c) {
      if (!(step[c] >= 0.0f && step[c] <= kMostBits && step[c] == std::floor(step[c]))) return false;
      width[c] = static_cast<uint8_t>(step[c]), single[c] = bit;
      bit += width[c] % 2;
    }
    for (size_t c = 0; c < step.size(); ++c) first[c] = bit, bit += width[c] / 2 * 2;
    if (bit != total) return false;
    for (size_t c = 0; c < step.size(); ++c)
      if (width[c]) place_codes(static_cast<int32_t>(c), static_cast<int32_t>(total / kBitsOfByte));
    return true;
  }

  // Say where the codes of a channel are, or are put: behind the `count` bytes of a token.
  void place_codes(int32_t c, int32_t count) {
    const int bits = width[static_cast<size_t>(c)], digits = bits / 2 * 2;
    const int32_t at = first[static_cast<size_t>(c)], left = single[static_cast<size_t>(c)];
    const int32_t byte = digits ? at / kBitsOfByte : left / kBitsOfByte;
    const int low = (digits ? at : left) % kBitsOfByte;
    if (low + bits <= kBitsOfByte && (bits % 2 == 0 || !digits)) {
      pieces.push_back({c, byte, static_cast<uint8_t>(((1 << bits) - 1) << low), static_cast<uint8_t>(low), std::ldexp(1.0f, -low)});
      return;
    }
    const int32_t target = count + joints++;
    const int here = kBitsOfByte - low < digits ? kBitsOfByte - low : digits;  // bits of the first byte
    pieces.push_back({c, target, static_cast<uint8_t>((1 << bits) - 1), 0, 1.0f});
    parts.push_back({byte, target, -low, static_cast<uint8_t>((1 << here) - 1)});
    if (here < digits) parts.push_back({byte + 1, target, here, static_cast<uint8_t>((1 << digits) - (1 << here))});
    if (bits % 2) parts.push_back({left / kBitsOfByte, target, digits - left % kBitsOfByte, static_cast<uint8_t>(1 << digits)});
  }

  // Load a page of checked widths.
  void load(const uint16_t* codes, const uint8_t* params, int64_t tokens) {
    for (int64_t c = 0; c < dim(); ++c) {
      const size_t at = static_cast<size_t>(c);
      step[at] = from_e5m3(params[c]);
      lowest[at] = from_half(static_cast<uint16_t>(params[dim() + c] | params[2 * dim() + c] << 8)) - step[at] * half_levels(width[at]);
    }
    const int64_t total = first.back() + width.back() / 2 * 2, count = total / kBitsOfWord;
    words.resize(static_cast<size_t>(count * tokens)), bytes.resize(2 * words.size() + static_cast<size_t>(joints * tokens));
    for (int64_t done = 0; done < count; done += kBlockWords) {
      const int64_t some = count - done < kBlockWords ? count - done : kBlockWords, at = done * tokens;
      if (some == kBlockWords)
        load_block(codes + at, tokens, words.data() + at, bytes.data() + 2 * at);
      else
        load_rest(codes + at, some, tokens, words.data() + at, bytes.data() + 2 * at);
    }
    std::fill(bytes.begin() + static_cast<std::ptrdiff_t>(2 * words.size()), bytes.end(), uint8_t{0});
    for (const Part& part : parts) add_part(part, tokens);
  }

  // Add a part of codes that are put together, eight tokens at a time.
  void add_part(const Part& part, int64_t tokens) {
    const uint64_t mask = part.mask * uint64_t{0x0101010101010101};
    const uint8_t* from = bytes.data() + part.byte * tokens;
    uint8_t* to = bytes.data() + part.target * tokens;
    const int up = part.shift > 0 ? part.shift : 0, down = part.shift < 0 ? -part.shift : 0;
    for (int64_t n = 0; n < tokens; n += 8) {
      uint64_t bits, sum;
      std::memcpy(&bits, from + n, 8), std::memcpy(&sum, to + n, 8);
      sum |= bits << up >> down & mask;
      std::memcpy(to + n, &sum, 8);
    }
  }

  static void load_block(const uint16_t* codes, int64_t tokens, uint16_t* turned, uint8_t* out) {
    for (int64_t n = 0; n < tokens; ++n)
      for (int64_t w = 0; w < kBlockWords; ++w) turned[w * tokens + n] = codes[n * kBlockWords + w];
#pragma omp simd
    for (int64_t n = 0; n < tokens; ++n) {
      uint16_t a = turned[n], b = turned[tokens + n], c = turned[2 * tokens + n], d = turned[3 * tokens + n];
      uint16_t e = turned[4 * tokens + n], f = turned[5 * tokens + n], g = turned[6 * tokens + n], h = turned[7 * tokens + n];
      exchange(a, e, 8, 0x00FF), exchange(b, f, 8, 0x00FF), exchange(c, g, 8, 0x00FF), exchange(d, h, 8, 0x00FF);
      exchange(a, c, 4, 0x0F0F), exchange(b, d, 4, 0x0F0F), exchange(e, g, 4, 0x0F0F), exchange(f, h, 4, 0x0F0F);
      exchange(a, b, 2, 0x3333), exchange(c, d, 2, 0x3333), exchange(e, f, 2, 0x3333), exchange(g, h, 2, 0x3333);
      const uint16_t all[kBlockWords] = {a, b, c, d, e, f, g, h};
      for (int k = 0; k < kBlockWords; ++k) {
        out[2 * k * tokens + n] = static_cast<uint8_t>(all[k]);
        out[(2 * k + 1) * tokens + n] = static_cast<uint8_t>(all[k] >> kBitsOfByte);
      }
    }
  }

  // The same of a block with fewer words.
  static void load_rest(const uint16_t* codes, int64_t count, int64_t tokens, uint16_t* turned, uint8_t* out) {
    for (int64_t w = 0; w < count; ++w)
      for (int64_t n = 0; n < tokens; ++n) turned[w * tokens + n] = codes[n * count + w];
    std::fill(out, out + 2 * count * tokens, uint8_t{0});
    for (int64_t number = 0; number < count * kBitsOfWord / kBitsOfField; ++number) {
      const uint16_t* from = turned + number % count * tokens;
      const int shift = static_cast<int>(number / count * kBitsOfField), low = static_cast<int>(number * kBitsOfField % kBitsOfByte);
      uint8_t* to = out + number * kBitsOfField / kBitsOfByte * tokens;
#pragma omp simd
      for (int64_t n = 0; n < tokens; ++n) to[n] = static_cast<uint8_t>(to[n] | ((from[n] >> shift) & 3) << low);
    }
  }

  // Dequantize the page loaded into a tile [dim, tokens].
  void unpack(int64_t tokens, float* tile) const {
    for (size_t c = 0; c < width.size(); ++c)
      if (!width[c]) std::fill(tile + static_cast<int64_t>(c) * tokens, tile + static_cast<int64_t>(c + 1) * tokens, 0.0f * step[c] + lowest[c]);
    for (const Piece& piece : pieces) {
      const size_t c = static_cast<size_t>(piece.channel);
      const uint8_t* from = bytes.data() + piece.byte * tokens;
      float* to = tile + static_cast<int64_t>(c) * tokens;
#pragma omp simd
      for (int64_t n = 0; n < tokens; ++n) to[n] = static_cast<float>((from[n] & piece.mask) >> piece.low) * step[c] + lowest[c];
    }
  }

  // Take query rows [rows, dim], to score pages of this head with `score`.
  void ask(const float* query, int64_t rows) {
    factor.resize(pieces.size()), asked.resize(static_cast<size_t>(rows) * pieces.size()), scaled.resize(asked.size());
    float* out = asked.data();
    for (int64_t q = 0; q < rows; ++q, query += dim())
      for (const Piece& piece : pieces) *out++ = query[piece.channel];
  }

  // Score the page loaded: scores[q, n] is the product of query row q, as asked, and token n.
  void score(const float* query, int64_t rows, int64_t tokens, float* scores) {
    for (size_t p = 0; p < pieces.size(); ++p) factor[p] = step[static_cast<size_t>(pieces[p].channel)] * pieces[p].scale;
    for (int64_t q = 0; q < rows; ++q) {
      const float *row = query + q * dim(), *in = asked.data() + static_cast<size_t>(q) * pieces.size();
      float constant = 0, *out = scaled.data() + static_cast<size_t>(q) * pieces.size();
#pragma omp simd reduction(+ : constant)
      for (size_t c = 0; c < width.size(); ++c) constant += row[c] * lowest[c];
#pragma omp simd
      for (size_t p = 0; p < pieces.size(); ++p) out[p] = in[p] * factor[p];
      for (int64_t n = 0; n < tokens; ++n) scores[q * tokens + n] = constant;
    }
    int64_t q = 0;
    for (; q + 4 <= rows; q += 4) add_products<4>(q, tokens, scores + q * tokens);
    for (; q + 2 <= rows; q += 2) add_products<2>(q, tokens, scores + q * tokens);
    for (; q < rows; ++q) add_products<1>(q, tokens, scores + q * tokens);
  }

  // Take the mean that was taken off the keys, for the query rows asked: `turning` has two numbers for each pair.
  void ask_mean(const float* query, int64_t rows, const float* mean, int64_t pairs) {
    const int64_t half = dim() / 2;
    turning.resize(static_cast<size_t>(4 * rows * pairs));
    float* out = turning.data();
    for (int64_t q = 0; q < rows; ++q, query += dim(), out += 2 * pairs)
      for (int64_t c = 0; c < pairs; ++c) {
        out[c] = query[c] * mean[c] + query[half + c] * mean[half + c];
        out[pairs + c] = query[half + c] * mean[c] - query[c] * mean[half + c];
      }
  }

  // Add the products with the mean, rotated to the slots of a page. `cos_sin` is of the page's first slot, `inside` of
  // the slots inside a page: [cosines, then sines of pairs, tokens].
  void add_mean(const float* cos_sin, const float* inside, int64_t rows, int64_t pairs, int64_t tokens, float* scores) {
    const int64_t half = dim() / 2;
    const float* in = turning.data();
    float* out = turning.data() + 2 * rows * pairs;
    for (int64_t q = 0; q < rows; ++q, in += 2 * pairs, out += 2 * pairs) {
#pragma omp simd
      for (int64_t c = 0; c < pairs; ++c) {
        out[c] = in[c] * cos_sin[c] + in[pairs + c] * cos_sin[half + c];
        out[pairs + c] = in[pairs + c] * cos_sin[c] - in[c] * cos_sin[half + c];
      }
    }
    const float* factors = turning.data() + 2 * rows * pairs;
    int64_t q = 0;
    for (; q + 4 <= rows; q += 4) add_turned<4>(factors + 2 * q * pairs, inside, 2 * pairs, tokens, scores + q * tokens);
    for (; q < rows; ++q) add_turned<1>(factors + 2 * q * pairs, inside, 2 * pairs, tokens, scores + q * tokens);
  }

  // scores [kRows, tokens] += factors [kRows, count] x values [count, tokens]
  template <int kRows>
  static void add_turned(const float* factors, const float* values, int64_t count, int64_t tokens, float* scores) {
    for (int64_t n = 0; n < tokens; n += kStrip) {
      float sums[kRows][kStrip] = {};
      for (int64_t k = 0; k < count; ++k) {
        const float* at = values + k * tokens + n;
        for (int q = 0; q < kRows; ++q) {
          const float by = factors[q * count + k];
#pragma omp simd
          for (int i = 0; i < kStrip; ++i) sums[q][i] += by * at[i];
        }
      }
      for (int q = 0; q < kRows; ++q)
        for (int i = 0; i < kStrip; ++i) scores[q * tokens + n + i] += sums[q][i];
    }
  }

  template <int kRows>
  void add_products(int64_t row, int64_t tokens, float* scores) const {
    const float* factors = scaled.data() + static_cast<size_t>(row) * pieces.size();
    for (int64_t n = 0; n < tokens; n += kStrip) {
      float sums[kRows][kStrip] = {};
      for (size_t p = 0; p < pieces.size(); ++p) {
        const uint8_t* from = bytes.data() + pieces[p].byte * tokens + n;
        const uint8_t mask = pieces[p].mask;
        float values[kStrip];
#pragma omp simd
        for (int i = 0; i < kStrip; ++i) values[i] = static_cast<float>(static_cast<int32_t>(from[i] & mask));
        for (int q = 0; q < kRows; ++q) {
          const float by = factors[static_cast<size_t>(q) * pieces.size() + p];
#pragma omp simd
          for (int i = 0; i < kStrip; ++i) sums[q][i] += by * values[i];
        }
      }
      for (int q = 0; q < kRows; ++q)
        for (int i = 0; i < kStrip; ++i) scores[q * tokens + n + i] += sums[q][i];
    }
  }
};

}  // namespace
