// Read a quantized cache on a CPU: unpack pages to fp32, or attend to a whole cache with a few query rows.
//
// The layout is PageLayout's (spec.py). A page is unpacked row by row into a tile that stays in the first
// or second cache level, so a packed byte crosses the memory bus once and an unpacked number never does.
// reference.py is the specification; numbers are the same, only sums are taken in another order.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

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

}  // namespace

extern "C" {

// One packed tensor. Strides count elements of the part between sequences, heads and pages.
struct Packed {
  const uint16_t* codes;
  const uint16_t* params;  // fp16 (scale, zero) pairs
  int64_t codes_stride[3];
  int64_t params_stride[3];
  int32_t bits, rows, row_length, group_size;
  int32_t along_rows;  // whether a group lies along a row (else across group_size rows)
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
  const float* rotated;   // the same in the basis of packed keys
  const float* bias;      // added to the scores, or null: [batch, heads, query_rows, slots] by strides
  int64_t bias_stride[4];
  float* accumulator;     // [batch, heads, splits + 1, query_rows, value head_dim]
  float* running_max;     // [batch, heads, splits + 1, query_rows]
  float* running_sum;     // the same
  float* packed_out;      // [batch, heads, query_rows, value head_dim], in the basis of packed values
  float* exact_out;       // the same, in the basis of exact values
  int32_t batch, heads, query_rows, pages, page_size, splits;
  int32_t sinks, ring, dtype;  // dtype of exact rows: 0 fp32, 1 bf16, 2 fp16
  int64_t held, start, visible;  // slots of the cache that may be seen, first new slot, end of what may be seen
};

}  // extern "C"

namespace {

constexpr int kUnitBits = 16;

// Write the codes of one plane as numbers: field f of unit u to place f * units + u.
template <int kWidth, bool kAdd>
void unpack_plane(const uint16_t* units, int count, float weight, float* out) {
  for (int field = 0; field < kUnitBits / kWidth; ++field) {
    float* run = out + field * count;
    const int shift = field * kWidth;
#pragma omp simd
    for (int u = 0; u < count; ++u) {
      const float code = weight * static_cast<float>((static_cast<int32_t>(units[u]) >> shift) & ((1 << kWidth) - 1));
      run[u] = kAdd ? run[u] + code : code;
    }
  }
}

void unpack_codes(const Packed& t, const uint16_t* units, float* out) {
  const int n = t.row_length;
  switch (t.bits) {
    case 1: unpack_plane<1, false>(units, n / 16, 1, out); break;
    case 2: unpack_plane<2, false>(units, n / 8, 1, out); break;
    case 3:
      unpack_plane<2, false>(units, n / 8, 1, out);
      unpack_plane<1, true>(units + n / 8, n / 16, 4, out);
      break;
    case 4: unpack_plane<4, false>(units, n / 4, 1, out); break;
    case 8: unpack_plane<8, false>(units, n / 2, 1, out); break;
  }
}

// Unpack a page into tile [rows, row_length]; scale and zero are scratch of row_length numbers each.
void unpack_page(const Packed& t, int64_t b, int64_t h, int64_t page, float* tile, float* scale, float* zero) {
  const int64_t units = static_cast<int64_t>(t.row_length) * t.bits / kUnitBits;
  const uint16_t* codes = t.codes + b * t.codes_stride[0] + h * t.codes_stride[1] + page * t.codes_stride[2];
  const uint16_t* params = t.params + b * t.params_stride[0] + h * t.params_stride[1] + page * t.params_stride[2];
  for (int row = 0; row < t.rows; ++row) {
    float* out = tile + static_cast<int64_t>(row) * t.row_length;
    unpack_codes(t, codes + row * units, out);
    if (t.along_rows) {
      for (int first = 0; first < t.row_length; first += t.group_size) {
        const uint16_t* pair = params + 2 * (static_cast<int64_t>(first / t.group_size) * t.rows + row);
        const float s = from_half(pair[0]), z = from_half(pair[1]);
#pragma omp simd
        for (int i = first; i < first + t.group_size; ++i) out[i] = out[i] * s + z;
      }
    } else {
      if (row % t.group_size == 0) {
        const uint16_t* pairs = params + 2 * static_cast<int64_t>(row / t.group_size) * t.row_length;
        for (int i = 0; i < t.row_length; ++i) scale[i] = from_half(pairs[2 * i]), zero[i] = from_half(pairs[2 * i + 1]);
      }
#pragma omp simd
      for (int i = 0; i < t.row_length; ++i) out[i] = out[i] * scale[i] + zero[i];
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
  int64_t b, h;
  float *tile, *scores, *scale, *zero;
  float *accumulator, *running_max, *running_sum;
  int dim, value_dim;

  Split(const Attend& args, int64_t sequence, int64_t head, int split, float* scratch)
      : a(args), b(sequence), h(head), dim(args.key.row_length), value_dim(args.value.rows) {
    const int64_t place = ((b * a.heads + h) * (a.splits + 1) + split) * a.query_rows;
    tile = scratch;
    scores = tile + static_cast<int64_t>(a.page_size) * (dim > value_dim ? dim : value_dim);
    scale = scores + static_cast<int64_t>(a.query_rows) * a.page_size;
    zero = scale + (dim > a.page_size ? dim : a.page_size);
    accumulator = a.accumulator + place * value_dim;
    running_max = a.running_max + place;
    running_sum = a.running_sum + place;
    std::memset(accumulator, 0, sizeof(float) * a.query_rows * value_dim);
    for (int q = 0; q < a.query_rows; ++q) running_max[q] = -INFINITY, running_sum[q] = 0;
  }

  // Score the first n keys of the tile, slots first_slot .. first_slot + n - 1, and turn scores into weights.
  void weigh_tile(const float* query, int n, int64_t first_slot) {
    const int N = a.page_size;
    query += (b * a.heads + h) * a.query_rows * dim;
    for (int i = 0; i < n; ++i) dot_rows<false>(query, dim, tile + static_cast<int64_t>(i) * dim, dim, a.query_rows, scores + i, N);
    for (int q = 0; q < a.query_rows; ++q) {
      float* row = scores + static_cast<int64_t>(q) * N;
      if (a.bias) {
        const float* bias = a.bias + b * a.bias_stride[0] + h * a.bias_stride[1] + q * a.bias_stride[2] + first_slot * a.bias_stride[3];
        for (int i = 0; i < n; ++i) row[i] += bias[i * a.bias_stride[3]];
      }
      for (int i = n; i < N; ++i) row[i] = -INFINITY;
      online_softmax(row, N, running_max[q], running_sum[q], accumulator + static_cast<int64_t>(q) * value_dim, value_dim);
    }
  }
};

void attend_packed(const Attend& a, int64_t b, int64_t h, int split, float* scratch) {
  Split s(a, b, h, split, scratch);
  const int N = a.page_size;
  const int64_t first = static_cast<int64_t>(a.pages) * split / a.splits;
  const int64_t last = static_cast<int64_t>(a.pages) * (split + 1) / a.splits;
  for (int64_t page = first; page < last; ++page) {
    const int64_t slot = a.sinks + page * N, left = a.held - slot;
    if (left <= 0) break;
    unpack_page(a.key, b, h, page, s.tile, s.scale, s.zero);
    s.weigh_tile(a.rotated, left < N ? static_cast<int>(left) : N, slot);
    unpack_page(a.value, b, h, page, s.tile, s.scale, s.zero);
    for (int d = 0; d < s.value_dim; ++d) dot_rows<true>(s.scores, N, s.tile + static_cast<int64_t>(d) * N, N, a.query_rows, s.accumulator + d, s.value_dim);
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
void attend_exact(const Attend& a, int64_t b, int64_t h, float* scratch) {
  Split s(a, b, h, a.splits, scratch);
  const int64_t packed_end = a.sinks + static_cast<int64_t>(a.pages) * a.page_size;
  const int64_t runs[3][2] = {{0, a.held < a.sinks ? a.held : a.sinks}, {packed_end, a.held}, {a.start, a.visible}};
  for (const auto& run : runs) {
    for (int64_t slot = run[0]; slot < run[1]; slot += a.page_size) {
      const int n = static_cast<int>(run[1] - slot < a.page_size ? run[1] - slot : a.page_size);
      for (int i = 0; i < n; ++i) load_exact(a, a.exact_key, b, h, slot + i, s.dim, s.tile + static_cast<int64_t>(i) * s.dim);
      s.weigh_tile(a.query, n, slot);
      for (int i = 0; i < n; ++i) load_exact(a, a.exact_value, b, h, slot + i, s.value_dim, s.tile + static_cast<int64_t>(i) * s.value_dim);
      for (int q = 0; q < a.query_rows; ++q) {
        float* out = s.accumulator + static_cast<int64_t>(q) * s.value_dim;
        for (int i = 0; i < n; ++i) {
          const float weight = s.scores[static_cast<int64_t>(q) * a.page_size + i];
          const float* value = s.tile + static_cast<int64_t>(i) * s.value_dim;
#pragma omp simd
          for (int d = 0; d < s.value_dim; ++d) out[d] += weight * value[d];
        }
      }
    }
  }
}

// Join the splits of one query row by their maxima, and divide by the sum of all weights.
void join_splits(const Attend& a, int64_t head, int q) {
  const int dim = a.value.rows;
  const int64_t Q = a.query_rows, first = head * (a.splits + 1) * Q + q;
  float top = -1e38f, total = 0;  // a row that sees nothing: all weights 0
  for (int s = 0; s <= a.splits; ++s) top = a.running_max[first + s * Q] > top ? a.running_max[first + s * Q] : top;
  for (int s = 0; s <= a.splits; ++s) total += std::exp(a.running_max[first + s * Q] - top) * a.running_sum[first + s * Q];
  const float inverse = total == 0 ? 1.0f : 1.0f / total;
  float* packed = a.packed_out + (head * Q + q) * dim;
  float* exact = a.exact_out + (head * Q + q) * dim;
  std::memset(packed, 0, sizeof(float) * dim);
  for (int s = 0; s <= a.splits; ++s) {
    const float weight = std::exp(a.running_max[first + s * Q] - top) * inverse;
    const float* part = a.accumulator + (first + s * Q) * dim;
    if (s < a.splits)
      for (int d = 0; d < dim; ++d) packed[d] += weight * part[d];
    else
      for (int d = 0; d < dim; ++d) exact[d] = weight * part[d];
  }
}

}  // namespace

extern "C" {

// Attend to the whole cache and the new tokens. Splits of the packed part, then one for the exact part, are
// worked on in any order and joined at the end.
void kvq_attend(const Attend* a, int threads) {
  const int64_t dim = a->key.row_length > a->value.rows ? a->key.row_length : a->value.rows;
  const int64_t wide = dim > a->page_size ? dim : a->page_size;
  const int64_t heads = static_cast<int64_t>(a->batch) * a->heads, parts = a->splits + 1;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> scratch(a->page_size * (dim + a->query_rows) + 2 * wide);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < heads * parts; ++i) {
      const int64_t head = i / parts;
      const int split = static_cast<int>(i % parts);
      if (split < a->splits)
        attend_packed(*a, head / a->heads, head % a->heads, split, scratch.data());
      else
        attend_exact(*a, head / a->heads, head % a->heads, scratch.data());
    }
#pragma omp for
    for (int64_t i = 0; i < heads * a->query_rows; ++i) join_splits(*a, i / a->query_rows, static_cast<int>(i % a->query_rows));
  }
}

// Unpack pages into out [batch, heads, pages, rows, row_length].
void kvq_unpack_pages(const Packed* t, int batch, int heads, int pages, float* out, int threads) {
  const int64_t work = static_cast<int64_t>(batch) * heads * pages, size = static_cast<int64_t>(t->rows) * t->row_length;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> scratch(2 * static_cast<size_t>(t->row_length));
#pragma omp for
    for (int64_t i = 0; i < work; ++i)
      unpack_page(*t, i / pages / heads, i / pages % heads, i % pages, out + i * size, scratch.data(), scratch.data() + t->row_length);
  }
}

}  // extern "C"
