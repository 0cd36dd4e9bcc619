// Read packed pages on a CPU: unpack them to fp32, or attend to them with a few query rows.
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

struct Attend {
  Packed key, value;
  const float* query;     // [batch, heads, query_rows, key head_dim], scaled
  const float* bias;      // added to the scores, or null: [batch, heads, query_rows, slots] by strides
  int64_t bias_stride[4];
  float* accumulator;     // [batch, heads, splits, query_rows, value head_dim]
  float* running_max;     // [batch, heads, splits, query_rows]
  float* running_sum;     // the same
  int32_t batch, heads, query_rows, pages, page_size, splits;
  int64_t visible;        // tokens of the pages that may be seen, counted from the first
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

void attend_split(const Attend& a, int64_t b, int64_t h, int split, float* scratch) {
  const int dim = a.key.row_length, value_dim = a.value.rows, N = a.page_size, Q = a.query_rows;
  const int64_t place = ((b * a.heads + h) * a.splits + split) * Q;
  const float* query = a.query + (b * a.heads + h) * Q * dim;
  float* accumulator = a.accumulator + place * value_dim;
  float* tile = scratch;
  float* scores = tile + static_cast<int64_t>(N) * (dim > value_dim ? dim : value_dim);
  float* scale = scores + static_cast<int64_t>(Q) * N;
  float* zero = scale + (dim > N ? dim : N);
  std::memset(accumulator, 0, sizeof(float) * Q * value_dim);
  for (int q = 0; q < Q; ++q) a.running_max[place + q] = -INFINITY, a.running_sum[place + q] = 0;

  const int64_t first = static_cast<int64_t>(a.pages) * split / a.splits;
  const int64_t last = static_cast<int64_t>(a.pages) * (split + 1) / a.splits;
  for (int64_t page = first; page < last; ++page) {
    const int64_t left = a.visible - page * N;
    if (left <= 0) break;
    const int seen = left < N ? static_cast<int>(left) : N;
    unpack_page(a.key, b, h, page, tile, scale, zero);
    for (int n = 0; n < seen; ++n) dot_rows<false>(query, dim, tile + static_cast<int64_t>(n) * dim, dim, Q, scores + n, N);
    for (int q = 0; q < Q; ++q) {
      float* row = scores + static_cast<int64_t>(q) * N;
      if (a.bias) {
        const float* bias = a.bias + b * a.bias_stride[0] + h * a.bias_stride[1] + q * a.bias_stride[2] + page * N * a.bias_stride[3];
        for (int n = 0; n < seen; ++n) row[n] += bias[n * a.bias_stride[3]];
      }
      for (int n = seen; n < N; ++n) row[n] = -INFINITY;
      online_softmax(row, N, a.running_max[place + q], a.running_sum[place + q], accumulator + static_cast<int64_t>(q) * value_dim, value_dim);
    }
    unpack_page(a.value, b, h, page, tile, scale, zero);
    for (int d = 0; d < value_dim; ++d) dot_rows<true>(scores, N, tile + static_cast<int64_t>(d) * N, N, Q, accumulator + d, value_dim);
  }
}

}  // namespace

extern "C" {

// Attend to all pages; the splits' results are left to the caller to join.
void kvq_attend_pages(const Attend* a, int threads) {
  const int64_t dim = a->key.row_length > a->value.rows ? a->key.row_length : a->value.rows;
  const int64_t wide = dim > a->page_size ? dim : a->page_size;
  const int64_t work = static_cast<int64_t>(a->batch) * a->heads * a->splits;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> scratch(a->page_size * (dim + a->query_rows) + 2 * wide);
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < work; ++i)
      attend_split(*a, i / a->splits / a->heads, i / a->splits % a->heads, static_cast<int>(i % a->splits), scratch.data());
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
