// Read a quantized cache on a CPU: unpack pages to fp32, or attend to a whole cache with a few query rows.
//
// A page is unpacked row by row (unpack_pages.h) into a tile that stays in the first or second cache level, so
// a packed byte crosses the memory bus once and an unpacked number never does.
// reference.py is the specification; numbers are the same, only sums are taken in another order.

#include "unpack_pages.h"

extern "C" {

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

  // Add the first n values of the tile, [n, value_dim], by the weights that weigh_tile left.
  void add_tokens(int n) {
    for (int q = 0; q < a.query_rows; ++q) {
      float* out = accumulator + static_cast<int64_t>(q) * value_dim;
      for (int i = 0; i < n; ++i) {
        const float weight = s.scores[static_cast<int64_t>(q) * a.page_size + i];
        const float* value = s.tile + static_cast<int64_t>(i) * value_dim;
#pragma omp simd
        for (int d = 0; d < value_dim; ++d) out[d] += weight * value[d];
      }
    }
  }

  // The same of a whole tile whose channels come first, [value_dim, page_size].
  void add_channels() {
    const int N = a.page_size;
    for (int d = 0; d < value_dim; ++d) dot_rows<true>(s.scores, N, s.tile + static_cast<int64_t>(d) * N, N, a.query_rows, accumulator + d, value_dim);
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
    if (a.value.max_bits)
      state.add_tokens(N);
    else
      state.add_channels();
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
      state.add_tokens(n);
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
