// Read a quantized cache on a CPU: unpack pages to fp32, or attend to a whole cache with a few query rows.
//
// The layout is PageLayout's (spec.py). A page is unpacked row by row into a tile that stays in the first
// or second cache level, so a packed byte crosses the memory bus once and an unpacked number never does.
// Unpacked numbers are in the basis in which they were coded (bases.py); only rotary keys are turned to their
// position, since what meets them then is the same for all of them.
// reference.py is the specification; numbers are the same, only sums are taken in another order.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>
#ifdef __F16C__
#include <immintrin.h>
#endif

namespace {

float from_half(uint16_t bits) {
#ifdef __FLT16_MAX__
  _Float16 half;
  std::memcpy(&half, &bits, sizeof half);
  return static_cast<float>(half);
#else
  const uint32_t sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 0x1F, mantissa = bits & 0x3FF;
  if (exponent == 0) return (sign ? -1.0f : 1.0f) * std::ldexp(static_cast<float>(mantissa), -24);
  const uint32_t wide = sign | (exponent == 31 ? 0x7F800000u : (exponent + 112) << 23) | mantissa << 13;
  float value;
  std::memcpy(&value, &wide, sizeof value);
  return value;
#endif
}

// The fields of an e4m3 byte, read with fp16's bias.
float from_e4m3(uint8_t byte) {
  return 256 * from_half(static_cast<uint16_t>((byte & 0x80) << 8 | (byte & 0x7F) << 7));
}

}  // namespace

extern "C" {

// One packed tensor. Strides count elements of the part between sequences, heads and pages.
struct Packed {
  const uint16_t* codes;
  const void* params;      // (scale, zero) pairs, fp16 or e4m3
  const uint16_t* book;    // [row_length (keys) or rows (values), entries, couple], fp16; null: uniform codes
  const float* mean;       // [head_dim], with scale and frequency [head_dim / 2]; null unless keys are rotary
  const float* scale;
  const int32_t* frequency;
  const int32_t* shift;    // position minus slot of each sequence
  int64_t codes_stride[3];
  int64_t params_stride[3];
  int64_t tables_stride;   // words between heads in book, mean, scale and frequency
  int64_t first_slot;      // of page 0
  int32_t bits, trits, fp8, rows, row_length, units, group_size;
  int32_t along_rows;      // whether a group lies along a row (else across group_size rows)
  int32_t is_key, couple, entries, head_dim, page_size;
};

// Exact rows of one tensor: sinks and ring of the cache, and the call's new tokens, in the model's dtype.
struct Exact {
  const void* held;
  const void* fresh;
  int64_t held_stride[2];   // between sequences and heads; rows are contiguous
  int64_t fresh_stride[3];  // between sequences, heads and tokens
};

struct Attend {
  Packed key, value;
  Exact exact_key, exact_value;
  const float* query;     // [batch, heads, query_rows, key head_dim], scaled, in the basis of exact keys
  const float* coded;     // the same in the basis of packed keys
  const float* constant;  // added to the scores of packed keys, or null: [batch, heads, query_rows]
  const float* bias;      // added to the scores, or null: [batch, heads, query_rows, slots] by strides
  int64_t bias_stride[4];
  float* turns;           // rotary keys: [heads, page_size, key head_dim] for cosines and sines inside a page
  float* accumulator;     // [batch, heads, splits + 1, query_rows, value head_dim]
  float* running_max;     // [batch, heads, splits + 1, query_rows]
  float* running_sum;     // the same
  float* packed_out;      // [batch, heads, query_rows, value head_dim], in the basis of packed values
  float* weight_out;      // [batch, heads, query_rows]: what packed values weigh
  float* exact_out;       // as packed_out, in the basis of exact values
  int32_t batch, heads, query_rows, pages, page_size, splits;
  int32_t sinks, ring, dtype;  // dtype of exact rows: 0 fp32, 1 bf16, 2 fp16
  int64_t held, start, visible;  // slots of the cache that may be seen, first new slot, end of what may be seen
};

}  // extern "C"

namespace {

constexpr int kUnitBits = 16;
constexpr int kTrits = 5;
constexpr float kRadians = static_cast<float>(6.283185307179586 / 4294967296.0);  // of an angle's unit
constexpr size_t kAlignment = 64;  // bytes of a cache line

// What a thread needs while it unpacks and attends.
struct Scratch {
  std::vector<float> numbers;
  std::vector<uint16_t> index;
  float *tile, *scores, *query, *scale, *zero, *turns;

  Scratch(int64_t page_size, int64_t dim, int64_t query_rows, bool with_tile) {
    const int64_t wide = dim > page_size ? dim : page_size, tile_size = with_tile ? page_size * dim : 0;
    numbers.resize(tile_size + query_rows * (page_size + dim) + 3 * wide + kAlignment);
    index.resize(wide);
    void* first = numbers.data();
    size_t room = numbers.size() * sizeof(float);
    tile = static_cast<float*>(std::align(kAlignment, room - kAlignment, first, room)), scores = tile + tile_size, query = scores + query_rows * page_size;
    scale = query + query_rows * dim, zero = scale + wide, turns = zero + wide;
  }
};

// Write the codes of one plane: field f of unit u to place f * units + u, above the `below` bits of others.
template <int kWidth, bool kAdd, typename T>
void unpack_plane(const uint16_t* units, int count, int below, T* out) {
  for (int field = 0; field < kUnitBits / kWidth; ++field) {
    T* run = out + field * count;
    const int shift = field * kWidth;
#pragma omp simd
    for (int u = 0; u < count; ++u) {
      const int32_t code = (static_cast<int32_t>(units[u]) >> shift) & ((1 << kWidth) - 1);
      run[u] = static_cast<T>(kAdd ? run[u] + static_cast<T>(code << below) : static_cast<T>(code));
    }
  }
}

// Unpack the plane of width kWidth, if the code has one, behind the planes of its lower bits.
template <int kWidth, typename T>
void unpack_plane_maybe(const Packed& t, const uint16_t* units, T* out) {
  if (!(t.bits & kWidth)) return;
  const int below = t.bits & ~(2 * kWidth - 1);  // bits in wider planes, which come first
  units += t.row_length * below / kUnitBits;
  const int count = t.row_length * kWidth / kUnitBits;
  if (below)
    unpack_plane<kWidth, true>(units, count, below, out);
  else
    unpack_plane<kWidth, false>(units, count, 0, out);
}

// Digit f in base 3 of byte u goes to place f * bytes + u. Dividing by 3 is exact for a byte.
template <typename T>
void unpack_trits(const uint16_t* units, int count, T* out) {
  constexpr int kPiece = 64;
  const int bytes = (count + kTrits - 1) / kTrits;
  uint16_t left[kPiece];
  for (int first = 0; first < bytes; first += kPiece) {
    const int n = bytes - first < kPiece ? bytes - first : kPiece;
    for (int u = 0; u < n; u += 2) left[u] = units[(first + u) / 2] & 0xFF, left[u + 1] = units[(first + u) / 2] >> 8;
    for (int digit = 0; digit < kTrits; ++digit) {
      const int place = digit * bytes + first, rest = count - place < n ? count - place : n;
      T* run = out + place;
#pragma omp simd
      for (int u = 0; u < rest; ++u) {
        const uint16_t third = static_cast<uint16_t>(left[u] * 171) >> 9;
        run[u] = static_cast<T>(left[u] - 3 * third);
        left[u] = third;
      }
    }
  }
}

template <typename T>
void unpack_codes(const Packed& t, const uint16_t* units, T* out) {
  if (t.trits) return unpack_trits(units, t.row_length, out);
  unpack_plane_maybe<8>(t, units, out);
  unpack_plane_maybe<4>(t, units, out);
  unpack_plane_maybe<2>(t, units, out);
  unpack_plane_maybe<1>(t, units, out);
}

// Load the pair of parameters `at` pairs behind the first of a page.
inline void load_pair(const Packed& t, int64_t page, int64_t at, float& scale, float& zero) {
  if (t.fp8) {
    const uint8_t* pair = static_cast<const uint8_t*>(t.params) + page + 2 * at;
    scale = from_e4m3(pair[0]), zero = from_e4m3(pair[1]);
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
  for (int row = 0; row < t.rows; ++row, codes += t.units, tile += out_stride) {
    unpack_codes(t, codes, s.index.data());
    if (t.is_key)
      copy_centroids<kCouple>(t, book, s.index.data(), tile);
    else
      spread_centroids<kCouple>(t, book + static_cast<int64_t>(row) * t.entries * t.couple, s.index.data(), tile);
  }
}

// Unpack a page into a tile: a key's is [page_size, head_dim], a value's [head_dim, page_size].
void unpack_page(const Packed& t, int64_t b, int64_t h, int64_t page, float* tile, Scratch& s) {
  const uint16_t* codes = t.codes + b * t.codes_stride[0] + h * t.codes_stride[1] + page * t.codes_stride[2];
  const int64_t params = b * t.params_stride[0] + h * t.params_stride[1] + page * t.params_stride[2];
  if (t.book) {
    const auto unpack = t.couple == 2 ? unpack_coupled_page<2> : t.couple == 4 ? unpack_coupled_page<4> : t.couple == 8 ? unpack_coupled_page<8> : unpack_coupled_page<0>;
    return unpack(t, codes, h, tile, s);
  }
  for (int row = 0; row < t.rows; ++row) {
    float* out = tile + static_cast<int64_t>(row) * t.row_length;
    unpack_codes(t, codes + static_cast<int64_t>(row) * t.units, out);
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

// Cosines, then sines, of the angles at a position; frame.cosine_and_sine specifies them. Integers wrap around
// as angles do.
void turns_at(const Packed& t, int64_t h, int64_t position, float* turns) {
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
    turns[c] = along * static_cast<float>(1 - static_cast<int32_t>((quarters + 1) & 2));
    turns[half + c] = across * static_cast<float>(1 - static_cast<int32_t>(quarters & 2));
  }
}

// Take an unpacked rotary key off its tables and turn it.
void turn_key(const Packed& t, int64_t h, const float* turns, float* key) {
  const float *mean = t.mean + h * t.tables_stride, *scale = t.scale + h * t.tables_stride;
  const int half = t.head_dim / 2;
#pragma omp simd
  for (int c = 0; c < half; ++c) {
    const float a = key[c] * scale[c] + mean[c], b = key[half + c] * scale[half + c] + mean[half + c];
    key[c] = a * turns[c] - b * turns[half + c];
    key[half + c] = b * turns[c] + a * turns[half + c];
  }
}

// Turn query rows back by the angles of a page's first slot, so that its keys need only those inside the page.
void turn_back(const float* query, const float* turns, int rows, int dim, float* out) {
  const int half = dim / 2;
  for (; rows > 0; --rows, query += dim, out += dim) {
#pragma omp simd
    for (int c = 0; c < half; ++c) {
      out[c] = query[c] * turns[c] + query[half + c] * turns[half + c];
      out[half + c] = query[half + c] * turns[c] - query[c] * turns[half + c];
    }
  }
}

// out[q * stride] (+)= left[q, :] . right for q in 0 .. count - 1, four rows of left at a time.
template <bool kAdd>
void dot_rows(const float* left, int64_t left_stride, const float* right, int n, int count, float* out, int64_t stride) {
  int q = 0;
  for (; q + 4 <= count; q += 4) {
    const float* rows = left + q * left_stride;
    float a = 0, b = 0, c = 0, d = 0;
#pragma omp simd reduction(+ : a, b, c, d)
    for (int i = 0; i < n; ++i) {
      a += rows[i] * right[i];
      b += rows[left_stride + i] * right[i];
      c += rows[2 * left_stride + i] * right[i];
      d += rows[3 * left_stride + i] * right[i];
    }
    const float sums[4] = {a, b, c, d};
    for (int k = 0; k < 4; ++k) out[(q + k) * stride] = kAdd ? out[(q + k) * stride] + sums[k] : sums[k];
  }
  for (; q < count; ++q) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int i = 0; i < n; ++i) sum += left[q * left_stride + i] * right[i];
    out[q * stride] = kAdd ? out[q * stride] + sum : sum;
  }
}

// Turn the scores of one query row into weights; rescale what was summed before.
void online_softmax(float* scores, int n, float& running_max, float& running_sum, float* accumulator, int dim) {
  float new_max = running_max;
  for (int i = 0; i < n; ++i) new_max = scores[i] > new_max ? scores[i] : new_max;
  const float origin = new_max > -1e38f ? new_max : -1e38f;  // a row that sees nothing keeps weight 0
  const float decay = std::exp(running_max - origin);
  float sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int i = 0; i < n; ++i) {
    scores[i] = std::exp(scores[i] - origin);
    sum += scores[i];
  }
  if (decay != 1.0f)
    for (int i = 0; i < dim; ++i) accumulator[i] *= decay;
  running_sum = running_sum * decay + sum;
  running_max = new_max;
}

// One split of one KV head: its scratch, and where its softmax state lies.
struct Split {
  const Attend& a;
  Scratch& s;
  int64_t b, h;
  float *accumulator, *running_max, *running_sum;
  int dim, value_dim;

  Split(const Attend& args, int64_t sequence, int64_t head, int split, Scratch& scratch)
      : a(args), s(scratch), b(sequence), h(head), dim(args.key.head_dim), value_dim(args.value.head_dim) {
    const int64_t place = ((b * a.heads + h) * (a.splits + 1) + split) * a.query_rows;
    accumulator = a.accumulator + place * value_dim;
    running_max = a.running_max + place;
    running_sum = a.running_sum + place;
    std::memset(accumulator, 0, sizeof(float) * a.query_rows * value_dim);
    for (int q = 0; q < a.query_rows; ++q) running_max[q] = -INFINITY, running_sum[q] = 0;
  }

  // The first of this head's query rows.
  int64_t first_row() const { return (b * a.heads + h) * a.query_rows; }

  // Score the first n keys of the tile, slots first_slot .. first_slot + n - 1, and turn scores into weights.
  void weigh_tile(const float* query, const float* constant, int n, int64_t first_slot) {
    const int N = a.page_size;
    for (int i = 0; i < n; ++i) dot_rows<false>(query, dim, s.tile + static_cast<int64_t>(i) * dim, dim, a.query_rows, s.scores + i, N);
    for (int q = 0; q < a.query_rows; ++q) {
      float* row = s.scores + static_cast<int64_t>(q) * N;
      if (constant)
        for (int i = 0; i < n; ++i) row[i] += constant[q];
      if (a.bias) {
        const float* bias = a.bias + b * a.bias_stride[0] + h * a.bias_stride[1] + q * a.bias_stride[2] + first_slot * a.bias_stride[3];
        for (int i = 0; i < n; ++i) row[i] += bias[i * a.bias_stride[3]];
      }
      for (int i = n; i < N; ++i) row[i] = -INFINITY;
      online_softmax(row, N, running_max[q], running_sum[q], accumulator + static_cast<int64_t>(q) * value_dim, value_dim);
    }
  }
};

__attribute__((noinline)) void attend_packed(const Attend& a, int64_t b, int64_t h, int split, Scratch& s) {
  Split state(a, b, h, split, s);
  const int N = a.page_size, dim = state.dim;
  const float* query = a.coded + state.first_row() * dim;
  const float* constant = a.constant ? a.constant + state.first_row() : nullptr;
  const int64_t first = static_cast<int64_t>(a.pages) * split / a.splits;
  const int64_t last = static_cast<int64_t>(a.pages) * (split + 1) / a.splits;
  for (int64_t page = first; page < last; ++page) {
    const int64_t slot = a.sinks + page * N, left = a.held - slot;
    if (left <= 0) break;
    unpack_page(a.key, b, h, page, s.tile, s);
    if (a.key.frequency) {
      for (int i = 0; i < N; ++i) turn_key(a.key, h, a.turns + (h * N + i) * dim, s.tile + static_cast<int64_t>(i) * dim);
      turns_at(a.key, h, slot + a.key.shift[b], s.turns);
      turn_back(query, s.turns, a.query_rows, dim, s.query);
    }
    state.weigh_tile(a.key.frequency ? s.query : query, constant, left < N ? static_cast<int>(left) : N, slot);
    unpack_page(a.value, b, h, page, s.tile, s);
    for (int d = 0; d < state.value_dim; ++d) dot_rows<true>(s.scores, N, s.tile + static_cast<int64_t>(d) * N, N, a.query_rows, state.accumulator + d, state.value_dim);
  }
}

void to_float(const void* from, int64_t offset, int dtype, int n, float* out) {
  if (dtype == 0) {
    std::memcpy(out, static_cast<const float*>(from) + offset, sizeof(float) * n);
    return;
  }
  const uint16_t* bits = static_cast<const uint16_t*>(from) + offset;
  if (dtype == 1) {
    for (int i = 0; i < n; ++i) {
      const uint32_t wide = static_cast<uint32_t>(bits[i]) << 16;
      std::memcpy(out + i, &wide, sizeof wide);
    }
  } else {
    for (int i = 0; i < n; ++i) out[i] = from_half(bits[i]);
  }
}

void load_exact(const Attend& a, const Exact& t, int64_t b, int64_t h, int64_t slot, int dim, float* out) {
  if (slot >= a.start) {
    to_float(t.fresh, b * t.fresh_stride[0] + h * t.fresh_stride[1] + (slot - a.start) * t.fresh_stride[2], a.dtype, dim, out);
    return;
  }
  const int64_t row = slot < a.sinks ? slot : a.sinks + (slot - a.sinks) % a.ring;
  to_float(t.held, b * t.held_stride[0] + h * t.held_stride[1] + row * dim, a.dtype, dim, out);
}

// Sinks, recent tokens and new ones: three runs of slots, a tile at a time.
void attend_exact(const Attend& a, int64_t b, int64_t h, Scratch& s) {
  Split state(a, b, h, a.splits, s);
  const int dim = state.dim, value_dim = state.value_dim;
  const int64_t packed_end = a.sinks + static_cast<int64_t>(a.pages) * a.page_size;
  const int64_t runs[3][2] = {{0, a.held < a.sinks ? a.held : a.sinks}, {packed_end, a.held}, {a.start, a.visible}};
  for (const auto& run : runs) {
    for (int64_t slot = run[0]; slot < run[1]; slot += a.page_size) {
      const int n = static_cast<int>(run[1] - slot < a.page_size ? run[1] - slot : a.page_size);
      for (int i = 0; i < n; ++i) load_exact(a, a.exact_key, b, h, slot + i, dim, s.tile + static_cast<int64_t>(i) * dim);
      state.weigh_tile(a.query + state.first_row() * dim, nullptr, n, slot);
      for (int i = 0; i < n; ++i) load_exact(a, a.exact_value, b, h, slot + i, value_dim, s.tile + static_cast<int64_t>(i) * value_dim);
      for (int q = 0; q < a.query_rows; ++q) {
        float* out = state.accumulator + static_cast<int64_t>(q) * value_dim;
        for (int i = 0; i < n; ++i) {
          const float weight = s.scores[static_cast<int64_t>(q) * a.page_size + i];
          const float* value = s.tile + static_cast<int64_t>(i) * value_dim;
#pragma omp simd
          for (int d = 0; d < value_dim; ++d) out[d] += weight * value[d];
        }
      }
    }
  }
}

// Join the splits of one query row by their maxima, and divide by the sum of all weights.
void join_splits(const Attend& a, int64_t head, int q) {
  const int dim = a.value.head_dim;
  const int64_t Q = a.query_rows, first = head * (a.splits + 1) * Q + q;
  float top = -1e38f, total = 0;  // a row that sees nothing: all weights 0
  for (int s = 0; s <= a.splits; ++s) top = a.running_max[first + s * Q] > top ? a.running_max[first + s * Q] : top;
  for (int s = 0; s <= a.splits; ++s) total += std::exp(a.running_max[first + s * Q] - top) * a.running_sum[first + s * Q];
  const float inverse = total == 0 ? 1.0f : 1.0f / total;
  float* packed = a.packed_out + (head * Q + q) * dim;
  float* exact = a.exact_out + (head * Q + q) * dim;
  float packed_weight = 0;
  std::memset(packed, 0, sizeof(float) * dim);
  for (int s = 0; s <= a.splits; ++s) {
    const float weight = std::exp(a.running_max[first + s * Q] - top) * inverse;
    const float* part = a.accumulator + (first + s * Q) * dim;
    if (s < a.splits) {
      packed_weight += weight * a.running_sum[first + s * Q];
      for (int d = 0; d < dim; ++d) packed[d] += weight * part[d];
    } else {
      for (int d = 0; d < dim; ++d) exact[d] = weight * part[d];
    }
  }
  a.weight_out[head * Q + q] = packed_weight;
}

}  // namespace

extern "C" {

// Attend to the whole cache and the new tokens. Splits of the packed part, then one for the exact part, are
// worked on in any order and joined at the end.
void kvq_attend(const Attend* a, int threads) {
  const int64_t dim = a->key.head_dim > a->value.head_dim ? a->key.head_dim : a->value.head_dim;
  const int64_t heads = static_cast<int64_t>(a->batch) * a->heads, parts = a->splits + 1;
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch(a->page_size, dim, a->query_rows, true);
    if (a->key.frequency && a->pages > 0) {
#pragma omp for
      for (int64_t i = 0; i < static_cast<int64_t>(a->heads) * a->page_size; ++i)
        turns_at(a->key, i / a->page_size, i % a->page_size, a->turns + i * a->key.head_dim);
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < heads * parts; ++i) {
      const int64_t head = i / parts;
      const int split = static_cast<int>(i % parts);
      if (split < a->splits)
        attend_packed(*a, head / a->heads, head % a->heads, split, scratch);
      else
        attend_exact(*a, head / a->heads, head % a->heads, scratch);
    }
#pragma omp for
    for (int64_t i = 0; i < heads * a->query_rows; ++i) join_splits(*a, i / a->query_rows, static_cast<int>(i % a->query_rows));
  }
}

// Unpack pages into out [batch, heads, pages], each a tile as unpack_page makes it; rotary keys are turned.
void kvq_unpack_pages(const Packed* t, int batch, int heads, int pages, float* out, int threads) {
  const int64_t work = static_cast<int64_t>(batch) * heads * pages, size = static_cast<int64_t>(t->page_size) * t->head_dim;
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch(t->page_size, t->head_dim, 0, false);
#pragma omp for
    for (int64_t i = 0; i < work; ++i) {
      const int64_t b = i / pages / heads, h = i / pages % heads, page = i % pages;
      unpack_page(*t, b, h, page, out + i * size, scratch);
      if (!t->frequency) continue;
      for (int64_t n = 0; n < t->page_size; ++n) {
        turns_at(*t, h, t->first_slot + page * t->page_size + n + t->shift[b], scratch.turns);
        turn_key(*t, h, scratch.turns, out + i * size + n * t->head_dim);
      }
    }
  }
}

}  // extern "C"
