// Unpack pages of a quantized cache to fp32 on a CPU, a tile at a time.
//
// layout.py describes the layout. Unpacked elements are still transformed (packed.py), except that rotary keys are
// rotated to their position, so that one query serves all of them.

#pragma once

#include <memory>
#ifdef __F16C__
#include <immintrin.h>
#endif

#include "channelwise.h"

namespace {

// One packed tensor, prepared for unpacking. Strides count elements of the part between sequences,
// heads and pages.
struct Packed {
  const uint16_t* codes;
  const void* params;      // (scale, zero) pairs, fp16 or bytes; or metadata (reference/mixed.py)
  const uint16_t* book;    // [row_length (keys) or rows (values), entries, couple], fp16; null: no codebook
  const float* mean;       // [head_dim], with scale and frequency [head_dim / 2]; null unless keys are rotary
  const float* scale;
  const int32_t* frequency;  // of rotary keys, and where a rotated mean is taken off
  const int32_t* shift;    // position minus slot of each sequence, `shift_stride` apart
  const void* exact;       // with the widths of channels in its last row, where they differ
  int64_t codes_stride[3], params_stride[3], exact_stride[2];
  int64_t tables_stride;   // words between heads in book, mean, scale and frequency
  int64_t shift_stride;
  int64_t pages;           // allocated
  int32_t bits, trits, thirds, fp8, e5m3, rows, row_length, row_places, row_words, group_size;
  int32_t along_rows;      // whether a group lies along a row (else across group_size rows)
  int32_t is_key, couple, entries, head_dim, page_size, sinks;
  int32_t max_bits, code_rows, rank_field, outliers, outlier_fields;  // of pages whose tokens differ in bits; max_bits 0: they do not
  int32_t channelwise, exact_dtype, state_row;        // whether channels differ in bits, and the row of their widths
  int32_t rotary, takes_mean, mean_pairs;  // the mean is in the row behind
};

constexpr int kTrits = 5, kTritWords = 4;  // digits of a byte, words of a plane
constexpr int kPlanes = 8;  // counted in the header of a mixed page
constexpr float kRadians = static_cast<float>(6.283185307179586 / 4294967296.0);  // per unit of an angle
constexpr float kMiddle = 128.0f, kMiddleSteps = 127.0f;  // the byte of a range about zero, and steps to either side
constexpr size_t kAlignment = 64;  // bytes of a cache line
constexpr const char* kDamaged = "the cache must hold pages as its layout says; a header or a channel is out of range: the file that it came from is damaged";

// Scratch memory of a thread that unpacks and attends.
struct Scratch {
  std::vector<float> buffer;
  std::vector<uint16_t> index;
  bool damaged = false;  // whether a page contradicted its layout
  Channels channels;     // where channels differ in bits
  float *tile, *scores, *query, *scale, *zero, *cos_sin;

  Scratch(int64_t page_size, int64_t dim, int64_t query_rows, bool with_tile) {
    const int64_t wide = dim > page_size ? dim : page_size, tile_size = with_tile ? page_size * dim : 0;
    buffer.resize(tile_size + query_rows * (page_size + dim) + 3 * wide + kAlignment);
    index.resize(wide);
    void* first = buffer.data();
    size_t room = buffer.size() * sizeof(float);
    tile = static_cast<float*>(std::align(kAlignment, room - kAlignment, first, room)), scores = tile + tile_size, query = scores + query_rows * page_size;
    scale = query + query_rows * dim, zero = scale + wide, cos_sin = zero + wide;
  }
};

// Write the codes of one plane: field f of word u to place f * words + u, above the `below` bits of others. Places
// from `length` on are padding.
template <int kWidth, bool kAdd, typename T>
void unpack_plane(const uint16_t* words, int count, int length, int below, T* out) {
  for (int field = 0; field < kWordBits / kWidth; ++field) {
    T* run = out + field * count;
    const int shift = field * kWidth, rest = length - field * count, n = rest < count ? rest : count;
#pragma omp simd
    for (int u = 0; u < n; ++u) {
      const int32_t code = (static_cast<int32_t>(words[u]) >> shift) & ((1 << kWidth) - 1);
      run[u] = static_cast<T>(kAdd ? run[u] + static_cast<T>(code << below) : static_cast<T>(code));
    }
  }
}

// Unpack the plane of width kWidth, if the code has one, and move on to the words of the next.
template <int kWidth, typename T>
void unpack_plane_maybe(const Packed& t, const uint16_t*& words, T* out) {
  if (!(t.bits & kWidth)) return;
  const int below = t.bits & ~(2 * kWidth - 1);  // bits in wider planes, which come first
  const int count = plane_words(t.row_places, kWidth);
  if (below)
    unpack_plane<kWidth, true>(words, count, t.row_length, below, out);
  else
    unpack_plane<kWidth, false>(words, count, t.row_length, 0, out);
  words += count;
}

// Words of the plane of trits that comes next in a row, of which `left` words follow.
inline int trit_plane(int64_t left) { return left >= kTritWords ? kTritWords : left >= 2 ? 2 : 1; }

// Unpack a row of a page of trits. Planes of all rows follow one another; in one, digit f in base 3 of byte u is code
// f * bytes + u. Dividing by 3 is exact for a byte.
template <typename T>
void unpack_trits(const Packed& t, const uint16_t* page, int row, T* out) {
  constexpr int kPiece = 8 * kTritWords;  // bytes of four planes
  uint16_t left[kPiece] = {};
  T digits[kTrits][kPiece];
  for (int first = 0; first < t.row_words;) {
    int end = first;
    for (int u = 0; end < t.row_words && u + 2 * kTritWords <= kPiece;) {
      const int width = trit_plane(t.row_words - end);
      const uint16_t* words = page + static_cast<int64_t>(end) * t.rows + static_cast<int64_t>(row) * width;
      if (width == kTritWords)
        for (int i = 0; i < kTritWords; ++i, u += 2) left[u] = words[i] & 0xFF, left[u + 1] = words[i] >> 8;
      else
        for (int i = 0; i < width; ++i, u += 2) left[u] = words[i] & 0xFF, left[u + 1] = words[i] >> 8;
      end += width;
    }
    for (int digit = 0; digit < kTrits; ++digit) {
#pragma omp simd
      for (int u = 0; u < kPiece; ++u) {
        const uint16_t third = static_cast<uint16_t>(left[u] * 171) >> 9;
        digits[digit][u] = static_cast<T>(left[u] - 3 * third);
        left[u] = third;
      }
    }
    for (int u = 0; first < end;) {
      const int width = trit_plane(t.row_words - first);
      for (int digit = 0; digit < kTrits; ++digit) {
        const int place = 2 * (kTrits * first + digit * width), rest = t.row_length - place, n = rest < 2 * width ? rest : 2 * width;
        if (n == 2 * kTritWords)
          std::memcpy(out + place, digits[digit] + u, sizeof(T) * 2 * kTritWords);
        else
          for (int i = 0; i < n; ++i) out[place + i] = digits[digit][u + i];
      }
      u += 2 * width, first += width;
    }
  }
}

// Codes of 3 bits: field i of word u of third f goes to place (5 f + i) * count + u; field 15 has the last bits of three
// words. Places from `length` on are padding.
template <typename T>
void unpack_thirds(const uint16_t* words, int count, int length, T* out) {
  const auto run = [&](int field, auto code_of) {
    const int rest = length - field * count, n = rest < count ? rest : count;
    T* to = out + field * count;
#pragma omp simd
    for (int u = 0; u < n; ++u) to[u] = static_cast<T>(code_of(u));
  };
  for (int third = 0; third < kThirds; ++third)
    for (int i = 0; i < kThirdFields; ++i)
      run(kThirdFields * third + i, [&](int u) { return (words[third * count + u] >> (kThirds * i)) & 7; });
  run(kWordBits - 1, [&](int u) { return words[u] >> 15 | (words[count + u] >> 15) << 1 | (words[2 * count + u] >> 15) << 2; });
}

template <typename T>
void unpack_row(const Packed& t, const uint16_t* page, int row, T* out) {
  if (t.trits) return unpack_trits(t, page, row, out);
  const uint16_t* words = page + static_cast<int64_t>(row) * t.row_words;
  if (t.thirds) return unpack_thirds(words, t.row_places / kWordBits, t.row_length, out);
  unpack_plane_maybe<8>(t, words, out);
  unpack_plane_maybe<4>(t, words, out);
  unpack_plane_maybe<2>(t, words, out);
  unpack_plane_maybe<1>(t, words, out);
}

// Zero point of a range about zero: `byte` says where its middle lies between the ends.
inline float zero_of(float scale, uint8_t byte, float levels) {
  const float place = (static_cast<float>(byte) - kMiddle) * (1.0f / kMiddleSteps) - 1.0f;
  return scale * (levels * 0.5f) * place;
}

// Load the pair of parameters `at` pairs behind the first of a page.
inline void load_pair(const Packed& t, int64_t page, int64_t at, float& scale, float& zero) {
  if (t.fp8) {
    const uint8_t* pair = static_cast<const uint8_t*>(t.params) + page + 2 * at;
    scale = from_e4m3(pair[0]), zero = from_e4m3(pair[1]);
  } else if (t.e5m3) {
    const uint8_t* pair = static_cast<const uint8_t*>(t.params) + page + 2 * at;
    scale = from_e5m3(pair[0]), zero = zero_of(scale, pair[1], static_cast<float>(t.entries - 1));
  } else {
    const uint16_t* pair = static_cast<const uint16_t*>(t.params) + page + 2 * at;
    scale = from_half(pair[0]), zero = from_half(pair[1]);
  }
}

// Copy a centroid for each index: of coupled channels side by side (keys).
template <int kCouple>
void copy_centroids(const Packed& t, const uint16_t* book, const uint16_t* index, float* out) {
  const int couple = kCouple ? kCouple : t.couple;
  for (int group = 0; group < t.row_length; ++group, book += static_cast<int64_t>(t.entries) * couple) {
    const uint16_t* from = book + index[group] * couple;
    float* to = out + group * couple;
    int c = 0;
#ifdef __F16C__
    for (; c + 4 <= couple; c += 4) _mm_storeu_ps(to + c, _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(from + c))));
#endif
    for (; c < couple; ++c) to[c] = from_half(from[c]);
  }
}

// Copy the centroids of one group of channels, each channel a row of row_length tokens (values).
template <int kCouple>
void spread_centroids(const Packed& t, const uint16_t* book, const uint16_t* index, float* out) {
  const int couple = kCouple ? kCouple : t.couple, n = t.row_length;
  int c = 0;
#ifdef __F16C__
  for (; c + 4 <= couple; c += 4)  // four tokens at a time; a row is a multiple of four long
    for (int i = 0; i < n; i += 4) {
      __m128 rows[4];
      for (int k = 0; k < 4; ++k) rows[k] = _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(book + index[i + k] * couple + c)));
      _MM_TRANSPOSE4_PS(rows[0], rows[1], rows[2], rows[3]);
      for (int k = 0; k < 4; ++k) _mm_storeu_ps(out + static_cast<int64_t>(c + k) * n + i, rows[k]);
    }
#endif
  for (; c < couple; ++c)
    for (int i = 0; i < n; ++i) out[static_cast<int64_t>(c) * n + i] = from_half(book[index[i] * couple + c]);
}

template <int kCouple>
void unpack_coupled_page(const Packed& t, const uint16_t* codes, int64_t h, float* tile, Scratch& s) {
  const uint16_t* book = t.book + 2 * h * t.tables_stride;
  const int64_t out_stride = static_cast<int64_t>(t.row_length) * t.couple;
  for (int row = 0; row < t.rows; ++row, tile += out_stride) {
    unpack_row(t, codes, row, s.index.data());
    if (t.is_key)
      copy_centroids<kCouple>(t, book, s.index.data(), tile);
    else
      spread_centroids<kCouple>(t, book + static_cast<int64_t>(row) * t.entries * t.couple, s.index.data(), tile);
  }
}

// Channels 16 u + f are bits f of words u of a row in each of kBits planes, upper bits first.
template <int kBits>
void unpack_token(const uint16_t* const* planes, int dim, float half_range, float zero_point, float* out) {
  constexpr float kStep = 2.0f / (1 << kBits), kFirst = 1.0f / (1 << kBits) - 1.0f;
  const auto element = [&](int u, int f) {
    int32_t level = 0;
    for (int plane = 0; plane < kBits; ++plane) level = 2 * level + ((planes[plane][u] >> f) & 1);
    return (static_cast<float>(level) * kStep + kFirst) * half_range + zero_point;
  };
  const int whole = dim / kWordBits, rest = dim % kWordBits;
  for (int u = 0; u < whole; ++u, out += kWordBits) {
#pragma omp simd
    for (int f = 0; f < kWordBits; ++f) out[f] = element(u, f);
  }
  for (int f = 0; f < rest; ++f) out[f] = element(whole, f);
}

// Unpack a page whose tokens differ in bits (reference/mixed.py) into a tile [page_size, head_dim].
void unpack_mixed_page(const Packed& t, const uint16_t* codes, const uint8_t* metadata, float* tile, Scratch& s) {
  using Unpack = void (*)(const uint16_t* const*, int, float, float, float*);
  constexpr Unpack kUnpack[kPlanes + 1] = {unpack_token<0>, unpack_token<1>, unpack_token<2>, unpack_token<3>, unpack_token<4>, unpack_token<5>, unpack_token<6>, unpack_token<7>, unpack_token<8>};
  const int words = plane_words(t.head_dim, 1);
  int row = 0;
  for (int plane = 0; plane < t.max_bits; ++plane) row += codes[plane];
  if (row > t.code_rows) {  // a header may come from a file
    s.damaged = true;
    std::memset(tile, 0, sizeof(float) * static_cast<size_t>(t.page_size) * t.head_dim);
    return;
  }
  const uint16_t* first[kPlanes];  // row of rank 0 in each plane
  const uint16_t* next = codes + kPlanes;
  for (int plane = 0; plane < t.max_bits; next += codes[plane++] * words) first[plane] = next;
  for (int n = 0; n < t.page_size; ++n, tile += t.head_dim) {
    const auto field = [&](int number) { return metadata[static_cast<int64_t>(number) * t.page_size + n]; };
    const auto half_at = [&](int number) { return from_half(static_cast<uint16_t>(field(number) | field(number + 1) << 8)); };
    const float zero_point = t.fp8 ? from_e4m3(field(0)) : half_at(0), half_range = t.fp8 ? from_e4m3(field(1)) : half_at(2);
    const int rank = field(t.rank_field);
    const uint16_t* planes[kPlanes];
    int bits = 0;
    for (; bits < t.max_bits && codes[bits] > rank; ++bits) planes[bits] = first[bits] + rank * words;
    kUnpack[bits](planes, t.head_dim, half_range, zero_point, tile);
    for (int i = 0, at = t.rank_field + 1; i < t.outliers; ++i, at += t.outlier_fields) {
      const int channel = t.outlier_fields == 3 ? field(at) : field(at) | field(at + 1) << 8;
      if (channel < t.head_dim)
        tile[channel] = half_at(at + t.outlier_fields - 2);
      else
        s.damaged = true;
    }
  }
}

// Read the widths of the channels of a head into s.channels; say whether they, which may come from a file, are what a
// cache could have found.
bool read_channels(const Packed& t, int64_t b, int64_t h, Scratch& s) {
  const int64_t head = b * t.exact_stride[0] + h * t.exact_stride[1];
  Channels& channels = s.channels;
  if (channels.head != head) {
    channels.head = head;
    channels.damaged = !channels.read(t.exact, head + static_cast<int64_t>(t.state_row) * t.head_dim, t.exact_dtype, t.head_dim, static_cast<int64_t>(t.rows) * kWordBits);
  }
  s.damaged = s.damaged || channels.damaged;
  return !channels.damaged;
}

// Load a page whose channels differ in bits into s.channels; say whether it could be.
bool load_channels(const Packed& t, int64_t b, int64_t h, int64_t page, Scratch& s) {
  if (!read_channels(t, b, h, s)) return false;
  const uint16_t* codes = t.codes + b * t.codes_stride[0] + h * t.codes_stride[1] + page * t.codes_stride[2];
  const uint8_t* params = static_cast<const uint8_t*>(t.params) + b * t.params_stride[0] + h * t.params_stride[1] + page * t.params_stride[2];
  s.channels.load(codes, params, t.page_size);
  return true;
}

void unpack_channelwise_page(const Packed& t, int64_t b, int64_t h, int64_t page, float* tile, Scratch& s) {
  if (!load_channels(t, b, h, page, s)) {
    std::memset(tile, 0, sizeof(float) * static_cast<size_t>(t.page_size) * t.head_dim);
    return;
  }
  s.channels.unpack(t.page_size, tile);
}

// Unpack a page into a tile: a key's is [page_size, head_dim], a value's [head_dim, page_size] unless mixed, and so is
// a key's whose channels differ in bits.
void unpack_page(const Packed& t, int64_t b, int64_t h, int64_t page, float* tile, Scratch& s) {
  const uint16_t* codes = t.codes + b * t.codes_stride[0] + h * t.codes_stride[1] + page * t.codes_stride[2];
  const int64_t params = b * t.params_stride[0] + h * t.params_stride[1] + page * t.params_stride[2];
  if (t.channelwise) return unpack_channelwise_page(t, b, h, page, tile, s);
  if (t.max_bits) return unpack_mixed_page(t, codes, static_cast<const uint8_t*>(t.params) + params, tile, s);
  if (t.book) {
    const auto unpack = t.couple == 2 ? unpack_coupled_page<2> : t.couple == 4 ? unpack_coupled_page<4> : t.couple == 8 ? unpack_coupled_page<8> : unpack_coupled_page<0>;
    return unpack(t, codes, h, tile, s);
  }
  for (int row = 0; row < t.rows; ++row) {
    float* out = tile + static_cast<int64_t>(row) * t.row_length;
    unpack_row(t, codes, row, out);
    if (t.along_rows) {
      int64_t at = row;
      for (int first = 0; first < t.row_length; first += t.group_size, at += t.rows) {
        float scale, zero;
        load_pair(t, params, at, scale, zero);
#pragma omp simd
        for (int i = first; i < first + t.group_size; ++i) out[i] = out[i] * scale + zero;
      }
    } else {
      const int64_t at = static_cast<int64_t>(row / t.group_size) * t.row_length;
      if (row % t.group_size == 0)
        for (int i = 0; i < t.row_length; ++i) load_pair(t, params, at + i, s.scale[i], s.zero[i]);
      const float *scale = s.scale, *zero = s.zero;
#pragma omp simd
      for (int i = 0; i < t.row_length; ++i) out[i] = out[i] * scale[i] + zero[i];
    }
  }
}

// Cosines, then sines, of the angles at a position, as specified by rope.cosine_and_sine. Integers wrap around as
// angles do.
void cos_sin_at(const Packed& t, int64_t h, int64_t position, float* cos_sin) {
  const int32_t* frequency = t.frequency + h * t.tables_stride;
  const int half = t.head_dim / 2;
  const uint32_t at = static_cast<uint32_t>(position);
#pragma omp simd
  for (int c = 0; c < half; ++c) {
    const uint32_t phase = at * static_cast<uint32_t>(frequency[c]);
    const uint32_t quarters = (phase + (1u << 29)) >> 30;
    const float x = static_cast<float>(static_cast<int32_t>(phase - (quarters << 30))) * kRadians;
    const float square = x * x;
    const float sine = (((2.7557314e-6f * square - 1.9841270e-4f) * square + 8.3333333e-3f) * square - 1.6666667e-1f) * square * x + x;
    const float cosine = (((2.4801587e-5f * square - 1.3888889e-3f) * square + 4.1666667e-2f) * square - 0.5f) * square + 1.0f;
    const float across = quarters & 1 ? cosine : sine, along = quarters & 1 ? sine : cosine;
    cos_sin[c] = along * static_cast<float>(1 - static_cast<int32_t>((quarters + 1) & 2));
    cos_sin[half + c] = across * static_cast<float>(1 - static_cast<int32_t>(quarters & 2));
  }
}

// Read the mean of the keys of a head that is taken off before they are coded.
void read_mean(const Packed& t, int64_t b, int64_t h, float* mean) {
  to_float(t.exact, b * t.exact_stride[0] + h * t.exact_stride[1] + static_cast<int64_t>(t.state_row + 1) * t.head_dim, t.exact_dtype, t.head_dim, mean);
}

// Rotate pairs by the angles of cos_sin.
void rotate_pairs(const float* x, const float* cos_sin, int dim, float* out) {
  const int half = dim / 2;
#pragma omp simd
  for (int c = 0; c < half; ++c) {
    out[c] = x[c] * cos_sin[c] - x[half + c] * cos_sin[half + c];
    out[half + c] = x[half + c] * cos_sin[c] + x[c] * cos_sin[half + c];
  }
}

// Apply mean and scale to an unpacked rotary key, and rotate it.
void rotate_key(const Packed& t, int64_t h, const float* cos_sin, float* key) {
  const float *mean = t.mean + h * t.tables_stride, *scale = t.scale + h * t.tables_stride;
  const int half = t.head_dim / 2;
#pragma omp simd
  for (int c = 0; c < half; ++c) {
    const float a = key[c] * scale[c] + mean[c], b = key[half + c] * scale[half + c] + mean[half + c];
    key[c] = a * cos_sin[c] - b * cos_sin[half + c];
    key[half + c] = b * cos_sin[c] + a * cos_sin[half + c];
  }
}

// Describe a checked cache for `unpack_page`.
Packed unwrap(const PackedWords& p) {
  const LayoutWords& t = p.layout;
  const auto table = [&](int64_t first, bool needed) { return needed ? static_cast<const int32_t*>(p.tables.data) + first : nullptr; };
  Packed packed = {};
  packed.codes = static_cast<const uint16_t*>(p.codes.data), packed.params = p.params.data;
  packed.book = reinterpret_cast<const uint16_t*>(table(t.book, t.codebook));
  packed.mean = reinterpret_cast<const float*>(table(t.mean, t.rotary)), packed.scale = reinterpret_cast<const float*>(table(t.scale, t.rotary));
  packed.frequency = table(t.frequency, t.rotary || t.takes_mean);
  packed.shift = static_cast<const int32_t*>(p.shift.data), packed.shift_stride = p.shift.strides[0];
  for (int i = 0; i < 3; ++i) packed.codes_stride[i] = p.codes.strides[i], packed.params_stride[i] = p.params.strides[i];
  packed.tables_stride = p.tables.strides[0], packed.pages = p.pages;
  const auto narrow = [](int64_t word) { return static_cast<int32_t>(word); };
  packed.bits = narrow(t.bits), packed.trits = narrow(t.trits), packed.thirds = t.bits == kThirds && !t.codebook, packed.fp8 = narrow(t.fp8), packed.e5m3 = narrow(t.e5m3);
  packed.rows = narrow(t.rows), packed.row_length = narrow(t.row_length), packed.row_places = narrow(t.row_places), packed.row_words = narrow(t.row_words);
  packed.group_size = narrow(t.group_size), packed.along_rows = t.is_key == t.by_token, packed.is_key = narrow(t.is_key);
  packed.couple = narrow(t.couple), packed.entries = narrow(t.levels + 1);
  packed.head_dim = narrow(t.head_dim), packed.page_size = narrow(t.page_size), packed.sinks = narrow(t.sinks);
  packed.max_bits = t.mixed ? narrow(t.max_bits) : 0, packed.code_rows = narrow(t.code_rows);
  packed.rank_field = narrow(t.rank_field), packed.outliers = narrow(t.outliers), packed.outlier_fields = narrow(t.outlier_fields);
  packed.channelwise = narrow(t.channelwise), packed.state_row = narrow(p.exact.sizes[2] - 1 - t.takes_mean);
  packed.rotary = narrow(t.rotary), packed.takes_mean = narrow(t.takes_mean), packed.mean_pairs = narrow(t.mean_pairs);
  packed.exact = p.exact.data, packed.exact_dtype = narrow(p.exact.dtype);
  packed.exact_stride[0] = p.exact.strides[0], packed.exact_stride[1] = p.exact.strides[1];
  return packed;
}

}  // namespace
