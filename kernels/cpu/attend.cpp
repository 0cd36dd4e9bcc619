// Attend to a quantized cache on a CPU with a few query rows, or unpack pages for a matrix product with many.
//
// A page is unpacked row by row (unpack.h) into a tile that stays in the first or second cache level, so a packed
// byte crosses the memory bus once and an unpacked element never does. Sums may be taken in any order here; code that
// must match the specification bit by bit is in pages.cpp.

#include <atomic>

#include "unpack.h"

namespace {

struct Attend {
  Packed key, value;
  View<4> exact_key, exact_value, new_key, new_value;
  const float* query;     // [batch, heads, query_rows, key head_dim], scaled, in the basis of exact keys
  const float* coded;     // the same in the basis of packed keys
  const float* constant;  // added to the scores of packed keys, or null: [batch, heads, query_rows]
  const float* bias;      // added to the scores, or null: [batch, heads, query_rows, slots] by strides
  int64_t bias_stride[4];
  const float* sink_logits;      // of what has weight and no value, or null: [batch, heads, query_rows]
  float cap, lowest, highest;    // what happens to scores before the bias: a soft cap, or 0; a clamp
  float* cos_sin;         // inside a page; rotary keys: [heads, page_size, key head_dim], mean: [heads, 2 * pairs, page_size]
  float* accumulator;     // [batch, heads, splits + 1, query_rows, value head_dim]
  float* running_max;     // [batch, heads, splits + 1, query_rows]
  float* running_sum;     // the same
  float* packed_out;      // [batch, heads, query_rows, value head_dim], in the basis of packed values
  float* weight_out;      // [batch, heads, query_rows]: sum of the weights of packed values
  float* exact_out;       // as packed_out, in the basis of exact values
  int32_t batch, heads, query_rows, pages, page_size, splits, sinks, ring;
  int64_t held, start, visible;  // kv_len of the cache, first new slot, end of the visible slots
};

// Inverse-rotate queries by the angles of a page's first slot; its keys then need only the angles inside the page.
void inverse_rotate(const float* query, const float* cos_sin, int rows, int dim, float* out) {
  const int half = dim / 2;
  for (; rows > 0; --rows, query += dim, out += dim) {
#pragma omp simd
    for (int c = 0; c < half; ++c) {
      out[c] = query[c] * cos_sin[c] + query[half + c] * cos_sin[half + c];
      out[half + c] = query[half + c] * cos_sin[c] - query[c] * cos_sin[half + c];
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

// Replace the scores of one query row by weights, and rescale the sums so far.
void online_softmax(float* scores, int n, float& running_max, float& running_sum, float* accumulator, int dim) {
  float new_max = running_max;
  for (int i = 0; i < n; ++i) new_max = scores[i] > new_max ? scores[i] : new_max;
  const float origin = new_max > -1e38f ? new_max : -1e38f;  // a fully masked row keeps weight 0
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

  // Score the first n keys of the tile.
  void score_tile(const float* query, int n) {
    for (int i = 0; i < n; ++i) dot_rows<false>(query, dim, s.tile + static_cast<int64_t>(i) * dim, dim, a.query_rows, s.scores + i, a.page_size);
  }

  // Take query rows for pages whose channels differ in bits.
  void ask_channels(const float* query) {
    if (!read_channels(a.key, b, h, s)) return;
    s.channels.ask(query, a.query_rows);
    if (!a.key.takes_mean) return;
    read_mean(a.key, b, h, s.cos_sin);
    s.channels.ask_mean(query, a.query_rows, s.cos_sin, a.key.mean_pairs);
  }

  // Score the keys of such a page from its codes.
  void score_channels(const float* query, int64_t page) {
    const int64_t N = a.page_size, pairs = a.key.mean_pairs;
    if (!load_channels(a.key, b, h, page, s)) {
      std::fill(s.scores, s.scores + a.query_rows * N, 0.0f);
      return;
    }
    s.channels.score(query, a.query_rows, N, s.scores);
    if (!a.key.takes_mean) return;
    cos_sin_at(a.key, h, a.sinks + page * N, s.cos_sin);
    s.channels.add_mean(s.cos_sin, a.cos_sin + h * 2 * pairs * N, a.query_rows, pairs, N, s.scores);
  }

  // Cap and clamp the scores of n keys of a query row.
  void bend(float* row, int n) const {
    if (a.cap > 0) {
      for (int i = 0; i < n; ++i) row[i] = a.cap * std::tanh(row[i] / a.cap);
    }
    if (a.lowest > -INFINITY || a.highest < INFINITY) {
      for (int i = 0; i < n; ++i) row[i] = row[i] < a.lowest ? a.lowest : row[i] > a.highest ? a.highest : row[i];
    }
  }

  // Replace the scores of n keys, slots first_slot .. first_slot + n - 1, by weights.
  void weigh(const float* constant, int n, int64_t first_slot) {
    const int N = a.page_size;
    for (int q = 0; q < a.query_rows; ++q) {
      float* row = s.scores + static_cast<int64_t>(q) * N;
      if (constant)
        for (int i = 0; i < n; ++i) row[i] += constant[q];
      bend(row, n);
      if (a.bias) {
        const float* bias = a.bias + b * a.bias_stride[0] + h * a.bias_stride[1] + q * a.bias_stride[2] + first_slot * a.bias_stride[3];
        for (int i = 0; i < n; ++i) row[i] += bias[i * a.bias_stride[3]];
      }
      for (int i = n; i < N; ++i) row[i] = -INFINITY;
      online_softmax(row, N, running_max[q], running_sum[q], accumulator + static_cast<int64_t>(q) * value_dim, value_dim);
    }
  }

  // Add the first n values of the tile, [n, value_dim], by the weights that `weigh` left.
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
  if (a.key.channelwise) state.ask_channels(query);
  for (int64_t page = first; page < last; ++page) {
    const int64_t slot = a.sinks + page * N, left = a.held - slot;
    if (left <= 0) break;
    const int n = left < N ? static_cast<int>(left) : N;
    if (a.key.channelwise) {
      state.score_channels(query, page);
    } else {
      unpack_page(a.key, b, h, page, s.tile, s);
      if (a.key.rotary) {
        for (int i = 0; i < N; ++i) rotate_key(a.key, h, a.cos_sin + (h * N + i) * dim, s.tile + static_cast<int64_t>(i) * dim);
        cos_sin_at(a.key, h, slot + a.key.shift[b * a.key.shift_stride], s.cos_sin);
        inverse_rotate(query, s.cos_sin, a.query_rows, dim, s.query);
      }
      state.score_tile(a.key.rotary ? s.query : query, n);
    }
    state.weigh(constant, n, slot);
    unpack_page(a.value, b, h, page, s.tile, s);
    if (a.value.max_bits)
      state.add_tokens(N);
    else
      state.add_channels();
  }
}

void load_exact(const Attend& a, const View<4>& held, const View<4>& fresh, int64_t b, int64_t h, int64_t slot, int dim, float* out) {
  if (slot >= a.start) {
    to_float(fresh.data, b * fresh.strides[0] + h * fresh.strides[1] + (slot - a.start) * fresh.strides[2], fresh.dtype, dim, out);
    return;
  }
  const int64_t row = slot < a.sinks ? slot : a.sinks + (slot - a.sinks) % a.ring;
  to_float(held.data, b * held.strides[0] + h * held.strides[1] + row * dim, held.dtype, dim, out);
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
      for (int i = 0; i < n; ++i) load_exact(a, a.exact_key, a.new_key, b, h, slot + i, dim, s.tile + static_cast<int64_t>(i) * dim);
      state.score_tile(a.query + state.first_row() * dim, n);
      state.weigh(nullptr, n, slot);
      for (int i = 0; i < n; ++i) load_exact(a, a.exact_value, a.new_value, b, h, slot + i, value_dim, s.tile + static_cast<int64_t>(i) * value_dim);
      state.add_tokens(n);
    }
  }
}

// Join the splits of one query row by their maxima, and divide by the sum of all weights.
void join_splits(const Attend& a, int64_t head, int q) {
  const int dim = a.value.head_dim;
  const int64_t Q = a.query_rows, first = head * (a.splits + 1) * Q + q;
  float top = -1e38f, total = 0;  // a fully masked row: all weights 0
  for (int s = 0; s <= a.splits; ++s) top = a.running_max[first + s * Q] > top ? a.running_max[first + s * Q] : top;
  if (a.sink_logits) {
    const float sink = a.sink_logits[head * Q + q];
    top = sink > top ? sink : top;
    total = std::exp(sink - top);
  }
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

// Cosines and sines of the angles inside a page by which a mean turns.
void angles_inside(const Attend& a, int64_t h, int64_t n, float* cos_sin) {
  const int64_t pairs = a.key.mean_pairs, half = a.key.head_dim / 2, N = a.page_size;
  float* out = a.cos_sin + h * 2 * pairs * N + n;
  cos_sin_at(a.key, h, n, cos_sin);
  for (int64_t c = 0; c < pairs; ++c) out[c * N] = cos_sin[c], out[(pairs + c) * N] = cos_sin[half + c];
}

// Attend to the whole cache and the new tokens; say whether a page was damaged. Splits of the packed part, then one
// for the exact part, are worked on in any order and joined at the end.
bool attend(const Attend& a, int threads) {
  const int64_t dim = a.key.head_dim > a.value.head_dim ? a.key.head_dim : a.value.head_dim;
  const int64_t heads = static_cast<int64_t>(a.batch) * a.heads, parts = a.splits + 1;
  std::atomic<bool> damaged{false};
#pragma omp parallel num_threads(threads)
  {
    Scratch scratch(a.page_size, dim, a.query_rows, true);
    if (a.key.takes_mean && a.pages > 0) {
#pragma omp for
      for (int64_t i = 0; i < static_cast<int64_t>(a.heads) * a.page_size; ++i) angles_inside(a, i / a.page_size, i % a.page_size, scratch.cos_sin);
    }
    if (a.key.rotary && a.pages > 0) {
#pragma omp for
      for (int64_t i = 0; i < static_cast<int64_t>(a.heads) * a.page_size; ++i)
        cos_sin_at(a.key, i / a.page_size, i % a.page_size, a.cos_sin + i * a.key.head_dim);
    }
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < heads * parts; ++i) {
      const int64_t head = i / parts;
      const int split = static_cast<int>(i % parts);
      if (split < a.splits)
        attend_packed(a, head / a.heads, head % a.heads, split, scratch);
      else
        attend_exact(a, head / a.heads, head % a.heads, scratch);
    }
    if (scratch.damaged) damaged = true;
#pragma omp for
    for (int64_t i = 0; i < heads * a.query_rows; ++i) join_splits(a, i / a.query_rows, static_cast<int>(i % a.query_rows));
  }
  return damaged;
}

// Check the arguments from Python and unpack them.
Attend unwrap(const AttendWords& w, Check& check) {
  const LayoutWords &key = w.keys.layout, &value = w.values.layout;
  const int64_t batch = w.query.sizes[0], heads = w.query.sizes[1], rows = w.query.sizes[2], new_tokens = w.new_key.sizes[2];
  const int64_t pages = w.keys.pages < w.values.pages ? w.keys.pages : w.values.pages, parts = w.splits + 1;
  check_packed("keys", w.keys, batch, heads, check);
  check_packed("values", w.values, batch, heads, check);
  check.that(key.is_key && !value.is_key, "keys and values must have layouts of keys and of values");
  check.that(key.page_size == value.page_size && key.sinks == value.sinks && key.ring == value.ring, "keys and values must lie in the same regions");
  check.tensor("query", w.query, {batch, heads, rows, key.head_dim}, kFloat);
  check.tensor("coded query", w.coded, {batch, heads, rows, key.head_dim}, kFloat);
  if (w.constant.data) check.tensor("constant", w.constant, {batch, heads, rows, 1}, kFloat);
  check.tensor("new keys", w.new_key, {batch, heads, new_tokens, key.head_dim}, w.keys.exact.dtype);
  check.tensor("new values", w.new_value, {batch, heads, new_tokens, value.head_dim}, w.values.exact.dtype);
  if (w.sink_logits.data) check.tensor("logits of sinks", w.sink_logits, {batch, heads, rows, 1}, kFloat);
  check.rows("logits of sinks", w.sink_logits, w.sink_logits.data ? 4 : 0);
  if (w.bias.data) check.tensor("bias", w.bias, {batch, heads, rows, w.bias.sizes[3]}, kFloat);
  check.tensor("packed output", w.packed_out, {batch, heads, rows, value.head_dim}, kFloat);
  check.tensor("weight output", w.weight_out, {batch, heads, rows, 1}, kFloat);
  check.tensor("exact output", w.exact_out, {batch, heads, rows, value.head_dim}, kFloat);
  check.rows("query", w.query, 4), check.rows("coded query", w.coded, 4), check.rows("constant", w.constant, w.constant.data ? 4 : 0);
  check.rows("new keys", w.new_key, 1), check.rows("new values", w.new_value, 1);
  check.rows("packed output", w.packed_out, 4), check.rows("weight output", w.weight_out, 4), check.rows("exact output", w.exact_out, 4);
  check.that(w.splits >= (pages ? 1 : 0) && w.splits <= pages && w.threads > 0 && w.threads <= 4096, "splits must be at most as many as pages");
  check.that(w.start >= 0 && w.start <= w.keys.held && w.start <= w.values.held, "start must be a slot up to the tokens held");
  check.that(w.visible >= 0 && w.visible <= w.start + new_tokens, "visible must be a slot up to the new tokens' last");
  check.that(!w.bias.data || w.bias.sizes[3] >= w.visible, "bias must have a column for each visible slot");
  const int64_t states = batch * heads * parts * rows, cos_sin = heads * key.page_size * (key.rotary ? key.head_dim : 2 * key.mean_pairs);
  check.tensor("scratch", w.scratch, {states * (value.head_dim + 2) + cos_sin}, kFloat);
  check.rows("scratch", w.scratch, 1);
  Attend a = {};
  a.key = unwrap(w.keys), a.value = unwrap(w.values);
  a.exact_key = w.keys.exact, a.exact_value = w.values.exact, a.new_key = w.new_key, a.new_value = w.new_value;
  a.query = static_cast<const float*>(w.query.data), a.coded = static_cast<const float*>(w.coded.data);
  a.constant = static_cast<const float*>(w.constant.data), a.bias = static_cast<const float*>(w.bias.data);
  for (int i = 0; i < 4; ++i) a.bias_stride[i] = w.bias.strides[i];
  a.sink_logits = static_cast<const float*>(w.sink_logits.data);
  a.cap = float_of_bits(static_cast<uint32_t>(w.cap_bits)), a.lowest = float_of_bits(static_cast<uint32_t>(w.lowest_bits)), a.highest = float_of_bits(static_cast<uint32_t>(w.highest_bits));
  a.accumulator = static_cast<float*>(w.scratch.data), a.running_max = a.accumulator + states * value.head_dim;
  a.running_sum = a.running_max + states, a.cos_sin = a.running_sum + states;
  a.packed_out = static_cast<float*>(w.packed_out.data), a.weight_out = static_cast<float*>(w.weight_out.data), a.exact_out = static_cast<float*>(w.exact_out.data);
  const auto narrow = [](int64_t word) { return static_cast<int32_t>(word); };
  a.batch = narrow(batch), a.heads = narrow(heads), a.query_rows = narrow(rows), a.pages = narrow(pages), a.page_size = narrow(key.page_size);
  a.splits = narrow(w.splits), a.sinks = narrow(key.sinks), a.ring = narrow(key.ring);
  a.held = w.start < w.visible ? w.start : w.visible, a.start = w.start, a.visible = w.visible;
  return a;
}

}  // namespace

extern "C" {

// The lists of wire.h, for Python to compare with its own.
const char* kvq_interface() { return kInterface; }

// Attend with the arguments in `words` (AttendWords). Returns an error message, or null.
const char* kvq_attend(const int64_t* words, int64_t count) {
  static thread_local Check check;
  check = Check();
  check.that(count * sizeof(int64_t) == sizeof(AttendWords), "the call must have %zu words, got %lld", sizeof(AttendWords) / sizeof(int64_t), static_cast<long long>(count));
  if (!check.ok()) return check.message();
  AttendWords w;
  std::memcpy(&w, words, sizeof w);
  const Attend call = unwrap(w, check);
  if (check.ok()) check.that(!attend(call, static_cast<int>(w.threads)), kDamaged);
  return check.message();
}

}  // extern "C"
