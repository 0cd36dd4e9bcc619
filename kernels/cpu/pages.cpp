// Write and read whole pages on a CPU, bit by bit as the specification does.
//
// Every operation rounds once, in the order of reference/: this file is compiled without contraction to fused
// multiply-adds and without reassociation. Tokens are transformed in fp32 pages:
//
//     append   tokens -> kvq_to_coded -> (Hadamard transform, in torch) -> kvq_quantize -> codes, params
//     read     codes, params -> kvq_unpack -> (Hadamard transform, in torch) -> kvq_from_coded -> tokens

#include <atomic>

#include "pack_channelwise.h"

namespace {

// Tables of one head, in coded order; null where the layout has none.
struct HeadTables {
  const int32_t *order = nullptr, *frequency = nullptr;
  const float *mean = nullptr, *scale = nullptr, *inverse = nullptr, *margin = nullptr;
  const uint16_t* book = nullptr;

  HeadTables(const PackedWords& p, int64_t h) {
    const LayoutWords& t = p.layout;
    if (!t.table_words) return;
    const int32_t* words = static_cast<const int32_t*>(p.tables.data) + h * p.tables.strides[0];
    const auto floats = [&](int64_t first) { return reinterpret_cast<const float*>(words + first); };
    order = words + t.order, mean = floats(t.mean), scale = floats(t.scale), inverse = floats(t.inverse), margin = floats(t.margin);
    if (t.rotary) frequency = words + t.frequency;
    if (t.codebook) book = reinterpret_cast<const uint16_t*>(words + t.book);
  }
};

// Call work(b, h, page) for each page of the call, on w.threads threads; `page` counts within the call. `make` returns
// the scratch of a thread. Returns whether a page was damaged.
template <typename Make, typename Work>
void for_pages(const PagesWords& w, const Make& make, const Work& work) {
  const int64_t heads = w.elements.sizes[1], pages = w.elements.sizes[2], count = w.elements.sizes[0] * heads * pages;
#pragma omp parallel num_threads(static_cast<int>(w.threads))
  {
    auto own = make();
#pragma omp for
    for (int64_t i = 0; i < count; ++i) work(own, i / pages / heads, i / pages % heads, i % pages);
  }
}

float* tile_of(const PagesWords& w, int64_t b, int64_t h, int64_t page) {
  return static_cast<float*>(w.elements.data) + b * w.elements.strides[0] + h * w.elements.strides[1] + page * w.elements.strides[2];
}

int64_t first_slot(const PagesWords& w, int64_t page) {
  return w.packed.layout.sinks + (w.first_page + page) * w.packed.layout.page_size;
}

int64_t shift_of(const PagesWords& w, int64_t b) { return static_cast<const int32_t*>(w.packed.shift.data)[b * w.packed.shift.strides[0]]; }

// Gather the tokens of pages to be quantized, from the ring or, from `start` on, from the new tokens, and normalise
// them by the tables.
void to_coded(const PagesWords& w) {
  const LayoutWords& t = w.packed.layout;
  const Packed packed = unwrap(w.packed);
  const View<4>&exact = w.packed.exact, &fresh = w.new_tokens;
  const int64_t D = t.head_dim, half = D / 2;
  const auto work = [&](std::vector<float>& own, int64_t b, int64_t h, int64_t page) {
    const HeadTables tables(w.packed, h);
    float *token = own.data(), *cos_sin = token + D, *mean = cos_sin + D, *out = tile_of(w, b, h, page);
    if (packed.takes_mean) read_mean(packed, b, h, mean);
    for (int64_t slot = first_slot(w, page), end = slot + t.page_size; slot < end; ++slot, out += D) {
      float* to = tables.order ? token : out;
      if (slot < w.start)
        to_float(exact.data, b * exact.strides[0] + h * exact.strides[1] + (t.sinks + (slot - t.sinks) % t.ring) * D, exact.dtype, D, to);
      else
        to_float(fresh.data, b * fresh.strides[0] + h * fresh.strides[1] + (slot - w.start) * fresh.strides[2], fresh.dtype, D, to);
      if (!tables.order) continue;
      for (int64_t c = 0; c < D; ++c) out[c] = token[tables.order[c]];
      if (tables.frequency) {
        cos_sin_at(packed, h, slot + shift_of(w, b), cos_sin);
        for (int64_t c = 0; c < half; ++c) {
          const float x = out[c], y = out[half + c], cosine = cos_sin[c], sine = cos_sin[half + c];
          out[c] = x * cosine + y * sine, out[half + c] = y * cosine - x * sine;
        }
      }
      for (int64_t c = 0; c < D; ++c) out[c] = (out[c] - tables.mean[c]) * tables.inverse[c];
      if (!packed.takes_mean) continue;
      cos_sin_at(packed, h, slot, cos_sin), rotate_pairs(mean, cos_sin, packed.head_dim, token);
      for (int64_t c = 0; c < D; ++c) out[c] = out[c] - token[c];
    }
  };
  for_pages(w, [&] { return std::vector<float>(static_cast<size_t>(3 * D)); }, work);
}

// Invert kvq_to_coded, in place.
void from_coded(const PagesWords& w) {
  const Packed packed = unwrap(w.packed);
  const int64_t D = w.packed.layout.head_dim, N = w.packed.layout.page_size;
  const auto work = [&](std::vector<float>& own, int64_t b, int64_t h, int64_t page) {
    const HeadTables tables(w.packed, h);
    float *token = own.data(), *cos_sin = token + D, *mean = cos_sin + D, *out = tile_of(w, b, h, page);
    if (packed.takes_mean) read_mean(packed, b, h, mean);
    for (int64_t slot = first_slot(w, page), end = slot + N; slot < end; ++slot, out += D) {
      if (packed.takes_mean) {
        cos_sin_at(packed, h, slot, cos_sin), rotate_pairs(mean, cos_sin, packed.head_dim, token);
        for (int64_t c = 0; c < D; ++c) out[c] = out[c] + token[c];
      }
      if (tables.frequency) {
        std::memcpy(token, out, sizeof(float) * static_cast<size_t>(D));
        cos_sin_at(packed, h, slot + shift_of(w, b), cos_sin);
        rotate_key(packed, h, cos_sin, token);
      } else {
        for (int64_t c = 0; c < D; ++c) token[c] = out[c] * tables.scale[c] + tables.mean[c];
      }
      for (int64_t c = 0; c < D; ++c) out[tables.order[c]] = token[c];
    }
  };
  for_pages(w, [&] { return std::vector<float>(static_cast<size_t>(3 * D)); }, work);
}

// Add the mean that was taken off to a tile [dim, tokens] from slot `first` on.
void add_mean(const Packed& t, int64_t b, int64_t h, int64_t first, float* tile) {
  const int64_t D = t.head_dim, N = t.page_size;
  std::vector<float> own(static_cast<size_t>(3 * D));
  float *mean = own.data(), *cos_sin = mean + D, *turned = cos_sin + D;
  read_mean(t, b, h, mean);
  for (int64_t n = 0; n < N; ++n) {
    cos_sin_at(t, h, first + n, cos_sin), rotate_pairs(mean, cos_sin, t.head_dim, turned);
    for (int64_t c = 0; c < D; ++c) tile[c * N + n] += turned[c];
  }
}

// Unpack pages to elements, before any inverse transform; rotary keys are rotated if w.rotated. Returns whether a page
// was damaged. A tile of values has the order of unpacking: channels, then tokens.
bool unpack(const PagesWords& w) {
  const Packed packed = unwrap(w.packed);
  std::atomic<bool> damaged{false};
  const auto work = [&](Scratch& scratch, int64_t b, int64_t h, int64_t page) {
    float* out = tile_of(w, b, h, page);
    unpack_page(packed, b, h, w.first_page + page, out, scratch);
    if (scratch.damaged) damaged = true;
    if (w.rotated && packed.takes_mean) add_mean(packed, b, h, first_slot(w, page), out);
    if (!w.rotated || !packed.rotary) return;
    for (int64_t n = 0; n < packed.page_size; ++n, out += packed.head_dim) {
      cos_sin_at(packed, h, first_slot(w, page) + n + shift_of(w, b), scratch.cos_sin);
      rotate_key(packed, h, scratch.cos_sin, out);
    }
  };
  for_pages(w, [&] { return Scratch(packed.page_size, packed.head_dim, 0, false); }, work);
  return damaged;
}

// Quantize and pack pages. Returns whether the widths of channels are damaged.
bool quantize(const PagesWords& w) {
  const LayoutWords& t = w.packed.layout;
  const Packed packed = unwrap(w.packed);
  std::atomic<bool> damaged{false};
  const View<5>& codes = w.packed.codes;
  const View<6>& params = w.packed.params;
  struct Own {
    PageWriter writer;
    MixedScratch mixed;
    Lanes lanes;
    Scratch scratch;
  };
  const auto make = [&] {
    LayoutWords none = t;
    if (!t.mixed) none.page_size = 0;
    return Own{PageWriter(t), MixedScratch(none), Lanes(t.channelwise ? t.page_size : 0), Scratch(0, 0, 0, false)};
  };
  const auto work = [&](Own& own, int64_t b, int64_t h, int64_t page) {
    PageWriter& writer = own.writer;
    const HeadTables tables(w.packed, h);
    const int64_t at = w.first_page + page, param = b * params.strides[0] + h * params.strides[1] + at * params.strides[2];
    writer.codes = static_cast<uint16_t*>(codes.data) + b * codes.strides[0] + h * codes.strides[1] + at * codes.strides[2];
    writer.params = static_cast<uint8_t*>(params.data) + param * (t.byte_params ? 1 : 2);
    writer.margin = tables.margin, writer.book = tables.book;
    float* x = tile_of(w, b, h, page);
    if (t.channelwise) {
      if (read_channels(packed, b, h, own.scratch))
        quantize_channelwise_page(writer, own.scratch.channels, x, own.lanes);
      else
        damaged = true;
      return;
    }
    if (!t.mixed) return quantize_page(writer, x);
    const View<3>& weights = w.importance;
    const float* importance = nullptr;
    if (weights.data) importance = static_cast<const float*>(weights.data) + b * weights.strides[0] + h * weights.strides[1] + first_slot(w, page) * weights.strides[2];
    quantize_mixed_page(writer, x, importance, weights.strides[2], static_cast<const float*>(w.bounds.data)[page * w.bounds.strides[0]], own.mixed);
  };
  for_pages(w, make, work);
  return damaged;
}

// Find the widths of the channels of heads that have none, and the mean that is taken off their keys, from two pages in
// `elements`, the first and the last that a call fills, and from the queries held. The last is page number w.start.
void find_state(const PagesWords& w) {
  const LayoutWords& t = w.packed.layout;
  const View<4>& exact = w.packed.exact;
  const Packed packed = unwrap(w.packed);
  const int64_t D = t.head_dim, first = exact.sizes[2] - (t.exact_rows - t.sinks - t.ring), count = packed.state_row - first;
  const auto work = [&](std::vector<float>& own, int64_t b, int64_t h, int64_t page) {
    if (page > 0) return;
    const HeadTables tables(w.packed, h);
    const int64_t row = b * exact.strides[0] + h * exact.strides[1] + first * D, state = row + count * D;
    float *held = own.data(), *mean = held + D, *queries = mean + D;
    to_float(exact.data, state, exact.dtype, D, held);
    if (std::any_of(held, held + D, [](float width) { return width != 0.0f; })) return;
    for (int64_t i = 0; i < count; ++i) {
      to_float(exact.data, row + i * D, exact.dtype, D, held);
      for (int64_t c = 0; c < D; ++c) queries[i * D + c] = held[tables.order ? tables.order[c] : c];
    }
    float* ends[2] = {tile_of(w, b, h, 0), tile_of(w, b, h, 1)};
    for (float* tile : ends)
      for (int64_t i = 0; i < t.page_size * D; ++i) tile[i] = bounded(tile[i] == tile[i] ? tile[i] : 0.0f);
    if (packed.takes_mean) {
      const int64_t slots[2] = {first_slot(w, 0), t.sinks + w.start * t.page_size};
      find_mean(packed, h, ends, slots, mean);
      for (int64_t c = 0; c < D; ++c) put_rounded(exact.data, state + D + c, exact.dtype, mean[c]);
      read_mean(packed, b, h, mean);
      for (int i = 0; i < 2; ++i) take_off(packed, h, slots[i], mean, ends[i]);
    }
    std::vector<float> value = variances_of(ends[0], t.page_size, D);
    const std::vector<float> last = variances_of(ends[1], t.page_size, D), weight = weights_of(queries, count, D, t.pairs);
    for (size_t c = 0; c < value.size(); ++c) value[c] = (value[c] + last[c]) * weight[c];
    const std::vector<float> width = allocate_widths(value, t.rows * kWordBits);
    for (int64_t c = 0; c < D; ++c) put_rounded(exact.data, state + c, exact.dtype, width[static_cast<size_t>(c)]);
  };
  for_pages(w, [&] { return std::vector<float>(static_cast<size_t>((2 + count) * D)); }, work);
}

// Check the arguments of all calls; the first `in_a_row` of the pages follow one another.
void check_pages(const PagesWords& w, int64_t in_a_row, Check& check) {
  const LayoutWords& t = w.packed.layout;
  const int64_t batch = w.packed.codes.sizes[0], heads = w.packed.codes.sizes[1], pages = w.elements.sizes[2];
  check_packed("cache", w.packed, batch, heads, check);
  check.tensor("pages", w.elements, {batch, heads, pages, t.page_size, t.head_dim}, kFloat);
  check.that(w.first_page >= 0 && w.first_page + (pages < in_a_row ? pages : in_a_row) <= w.packed.codes.sizes[2], "pages must be ones that the cache has room for");
  check.that(w.threads > 0 && w.threads <= 4096, "threads must be a number of threads");
  for (int64_t h = 0; check.ok() && t.table_words && h < heads; ++h) {
    const int32_t* order = HeadTables(w.packed, h).order;
    for (int64_t c = 0; c < t.head_dim; ++c) check.that(order[c] >= 0 && order[c] < t.head_dim, "tables must name channels of the head");
  }
}

// Run a call with the arguments in `words`, after a check of its own.
template <typename Run>
const char* run_pages(const int64_t* words, int64_t count, const Run& run, int64_t in_a_row = INT64_MAX) {
  static thread_local Check check;
  check = Check();
  check.that(count * static_cast<int64_t>(sizeof(int64_t)) == static_cast<int64_t>(sizeof(PagesWords)), "the call must have %zu words, got %lld", sizeof(PagesWords) / sizeof(int64_t), static_cast<long long>(count));
  if (!check.ok()) return check.message();
  PagesWords w;
  std::memcpy(&w, words, sizeof w);
  check_pages(w, in_a_row, check);
  if (check.ok()) run(w, check);
  return check.message();
}

}  // namespace

extern "C" {

const char* kvq_to_coded(const int64_t* words, int64_t count) {
  return run_pages(words, count, [](const PagesWords& w, Check& check) {
    const View<4>& fresh = w.new_tokens;
    const LayoutWords& t = w.packed.layout;
    check.that(is_floating(fresh.dtype), "new tokens must have a floating-point dtype");
    check.tensor("new tokens", fresh, {w.elements.sizes[0], w.elements.sizes[1], fresh.sizes[2], t.head_dim}, fresh.dtype);
    check.rows("new tokens", fresh, 1), check.rows("pages", w.elements, 2);
    check.that(w.start >= 0 && first_slot(w, w.elements.sizes[2]) <= w.start + fresh.sizes[2], "pages must be full: they end at slot %lld", static_cast<long long>(first_slot(w, w.elements.sizes[2])));
    if (check.ok()) to_coded(w);
  });
}

const char* kvq_from_coded(const int64_t* words, int64_t count) {
  return run_pages(words, count, [](const PagesWords& w, Check& check) {
    check.rows("pages", w.elements, 2);
    check.that(w.packed.layout.table_words > 0, "pages must be coded relative to tables");
    if (check.ok()) from_coded(w);
  });
}

const char* kvq_unpack(const int64_t* words, int64_t count) {
  return run_pages(words, count, [](const PagesWords& w, Check& check) {
    const LayoutWords& t = w.packed.layout;
    const bool by_channel = t.channelwise || (!t.is_key && !t.mixed);
    check.that(w.elements.strides[by_channel ? 4 : 3] == (by_channel ? t.page_size : t.head_dim) && w.elements.strides[by_channel ? 3 : 4] == 1, "pages must lie as they are unpacked");
    if (check.ok()) check.that(!unpack(w), kDamaged);
  });
}

const char* kvq_find_state(const int64_t* words, int64_t count) {
  return run_pages(words, count, [](const PagesWords& w, Check& check) {
    check.rows("pages", w.elements, 2);
    check.that(w.packed.layout.channelwise && w.elements.sizes[2] == 2, "widths must be found from two pages, for channels that differ in bits");
    check.that(w.start >= w.first_page && w.start < w.packed.codes.sizes[2], "the last page must be one that the cache has room for");
    if (check.ok()) find_state(w);
  }, 1);
}

const char* kvq_quantize(const int64_t* words, int64_t count) {
  return run_pages(words, count, [](const PagesWords& w, Check& check) {
    const LayoutWords& t = w.packed.layout;
    check.rows("pages", w.elements, 2);
    if (t.mixed) check.tensor("bounds", w.bounds, {w.elements.sizes[2]}, kFloat);
    if (t.mixed && w.importance.data) {
      check.tensor("importance", w.importance, {w.elements.sizes[0], w.elements.sizes[1], w.importance.sizes[2]}, kFloat);
      check.that(w.importance.sizes[2] >= first_slot(w, w.elements.sizes[2]), "importance must have a number for each slot");
    }
    if (check.ok()) check.that(!quantize(w), kDamaged);
  });
}

}  // extern "C"
