// Arguments that Python passes to C++, and their checks before anything is read or written.
//
// The arguments of a call are an array of 64-bit words: layouts, tensors and integers in the order of the lists below.
// Python has the same lists (native.py) and compares the two when it loads the library, so that they cannot drift
// apart. A tensor comes with the size of its memory in bytes from its first element on; sizes and strides are checked
// against it. A check that fails leaves a message, and the call does nothing.

#pragma once

#include <cstdarg>
#include <cstdio>

#include "numbers.h"

#define KVQ_LAYOUT(WORD)                                                                                          \
  WORD(is_key) WORD(codebook) WORD(mixed) WORD(bits) WORD(trits) WORD(fp8) WORD(levels) WORD(couple)                \
  WORD(rows) WORD(row_length) WORD(row_places) WORD(row_words) WORD(groups) WORD(members) WORD(param_elements)      \
  WORD(byte_params) WORD(group_size) WORD(by_token) WORD(shrink_bits) WORD(head_dim) WORD(page_size) WORD(sinks) WORD(ring)           \
  WORD(exact_rows) WORD(rotary) WORD(table_words) WORD(order) WORD(mean) WORD(scale) WORD(inverse) WORD(margin)     \
  WORD(frequency) WORD(book) WORD(min_bits) WORD(max_bits) WORD(code_rows) WORD(rank_field) WORD(outliers)          \
  WORD(outlier_fields) WORD(fit) WORD(soften) WORD(e5m3) WORD(channelwise) WORD(pairs) WORD(takes_mean) WORD(mean_pairs) \
  WORD(search)
#define KVQ_PACKED(TENSOR, WORD)                                                                                  \
  TENSOR(codes, 5) TENSOR(params, 6) TENSOR(exact, 4) TENSOR(tables, 2) TENSOR(shift, 1) WORD(held) WORD(pages)
#define KVQ_ATTEND(TENSOR, WORD)                                                                                  \
  TENSOR(query, 4) TENSOR(coded, 4) TENSOR(constant, 4) TENSOR(bias, 4) TENSOR(sink_logits, 4) TENSOR(new_key, 4)     \
  TENSOR(new_value, 4) TENSOR(scratch, 1) TENSOR(packed_out, 4) TENSOR(weight_out, 4) TENSOR(exact_out, 4)          \
  WORD(start) WORD(visible) WORD(splits) WORD(threads) WORD(cap_bits) WORD(lowest_bits) WORD(highest_bits)
#define KVQ_PAGES(TENSOR, WORD)                                                                                   \
  TENSOR(elements, 5) TENSOR(new_tokens, 4) TENSOR(importance, 3) TENSOR(bounds, 1) WORD(first_page) WORD(start)     \
  WORD(rotated) WORD(threads)

#define KVQ_WORD_MEMBER(name) int64_t name;
#define KVQ_TENSOR_MEMBER(name, n) View<n> name;
#define KVQ_WORD_NAME(name) #name " "
#define KVQ_TENSOR_NAME(name, n) #name ":" #n " "

namespace {

// A tensor of kDims dimensions; strides count elements. A null pointer: no tensor.
template <int kDims>
struct View {
  void* data;
  int64_t bytes, dtype, sizes[kDims], strides[kDims];
};

struct LayoutWords {
  KVQ_LAYOUT(KVQ_WORD_MEMBER)
};
struct PackedWords {
  LayoutWords layout;
  KVQ_PACKED(KVQ_TENSOR_MEMBER, KVQ_WORD_MEMBER)
};
struct AttendWords {
  PackedWords keys, values;
  KVQ_ATTEND(KVQ_TENSOR_MEMBER, KVQ_WORD_MEMBER)
};
struct PagesWords {
  PackedWords packed;
  KVQ_PAGES(KVQ_TENSOR_MEMBER, KVQ_WORD_MEMBER)
};
static_assert(sizeof(void*) == sizeof(int64_t), "a pointer must be a word");

constexpr const char* kInterface = "layout " KVQ_LAYOUT(KVQ_WORD_NAME) "packed " KVQ_PACKED(KVQ_TENSOR_NAME, KVQ_WORD_NAME) "attend " KVQ_ATTEND(KVQ_TENSOR_NAME, KVQ_WORD_NAME) "pages " KVQ_PAGES(KVQ_TENSOR_NAME, KVQ_WORD_NAME);

// The first error of a call.
class Check {
 public:
  bool ok() const { return !message_[0]; }
  const char* message() const { return ok() ? nullptr : message_; }

  __attribute__((format(printf, 3, 4))) void that(bool holds, const char* format, ...) {
    if (holds || !ok()) return;
    va_list values;
    va_start(values, format);
    std::vsnprintf(message_, sizeof message_, format, values);
    va_end(values);
  }

  // Check sizes, dtype, alignment, and that the tensor lies inside its memory.
  template <int kDims>
  void tensor(const char* name, const View<kDims>& view, const int64_t (&sizes)[kDims], int64_t dtype) {
    that(view.dtype == dtype, "%s must have dtype number %lld, got %lld", name, as_long(dtype), as_long(view.dtype));
    for (int i = 0; i < kDims; ++i)
      that(view.sizes[i] == sizes[i], "%s must have size %lld in dimension %d, got %lld", name, as_long(sizes[i]), i, as_long(view.sizes[i]));
    inside(name, view);
  }

  // Check alignment, and that the tensor lies inside its memory.
  template <int kDims>
  void inside(const char* name, const View<kDims>& view) {
    const int64_t size = bytes_of(view.dtype);
    __int128 last = 0;
    bool empty = false;
    for (int i = 0; i < kDims; ++i) {
      that(view.sizes[i] >= 0 && view.strides[i] >= 0, "%s must have sizes and strides of 0 or more", name);
      empty = empty || view.sizes[i] == 0;
      last += static_cast<__int128>(view.sizes[i] - 1) * view.strides[i];
    }
    if (empty) return;
    that(view.data, "%s must have memory", name);
    that(reinterpret_cast<uintptr_t>(view.data) % static_cast<uintptr_t>(size) == 0, "%s must be aligned to its elements", name);
    that((last + 1) * size <= view.bytes, "%s must lie inside its memory of %lld bytes", name, as_long(view.bytes));
  }

  // Check that the last `count` dimensions are contiguous.
  template <int kDims>
  void rows(const char* name, const View<kDims>& view, int count) {
    int64_t expected = 1;
    for (int i = kDims - 1; i >= kDims - count; expected *= view.sizes[i--])
      that(view.sizes[i] <= 1 || view.strides[i] == expected, "%s must be contiguous in its last %d dimensions", name, count);
  }

 private:
  static long long as_long(int64_t value) { return static_cast<long long>(value); }

  char message_[256] = "";
};

constexpr int kWordBits = 16;

// Words of a plane of `width` bits in a row with room for `places` codes.
template <typename T>
constexpr T plane_words(T places, int width) {
  return (places * width + kWordBits - 1) / kWordBits;
}

constexpr int kThirds = 3, kThirdFields = 5;  // words that hold 16 codes of 3 bits, and the whole codes of each

// Words of a row with the planes of codes of `bits` bits.
inline int64_t words_of_planes(int64_t places, int64_t bits) {
  int64_t words = 0;
  for (int width = 8; width; width /= 2) words += bits & width ? plane_words(places, width) : 0;
  return words;
}

bool is_floating(int64_t dtype) { return dtype >= kFloat && dtype <= kDouble; }

// Check a cache against its layout, for `batch` sequences of `heads` heads.
void check_packed(const char* name, const PackedWords& p, int64_t batch, int64_t heads, Check& check) {
  const LayoutWords& t = p.layout;
  const int64_t pages = p.codes.sizes[2], longest = 1 << 20;
  check.that(t.page_size > 0 && t.page_size <= 1024 && t.head_dim > 0 && t.head_dim <= longest && t.couple > 0 && t.group_size > 0 && t.sinks >= 0 && t.ring >= t.page_size, "%s must have a layout with tokens and channels", name);
  if (!check.ok()) return;
  const int64_t channels = t.head_dim / t.couple, needed_words = t.trits ? ((t.row_length + 4) / 5 + 1) / 2 : words_of_planes(t.row_places, t.bits);
  if (t.channelwise) {
    check.that(t.is_key && t.row_words == t.page_size && t.rows > 0 && 2 * t.rows <= t.head_dim, "%s must have rows of words of all tokens", name);
    check.that(t.page_size >= 32 && (t.page_size & (t.page_size - 1)) == 0, "%s must have pages of a power of two tokens", name);
    check.that(t.groups == 3 && t.members == t.head_dim && t.param_elements == 1 && t.byte_params, "%s must have parameters for each channel", name);
    check.that(t.exact_rows > t.sinks + t.ring + (t.takes_mean != 0), "%s must have rows for the widths of channels and their mean", name);
    check.that(!t.takes_mean || (t.table_words >= t.frequency + t.head_dim / 2 && t.head_dim % 2 == 0 && t.mean_pairs >= 0 && 2 * t.mean_pairs <= t.head_dim), "%s must have tables of frequencies where a mean is taken off", name);
  } else if (t.mixed) {
    check.that(t.rows == 1 && t.row_words >= 8 + t.code_rows * plane_words(t.head_dim, 1) && t.max_bits <= 8 && t.page_size <= 256, "%s must have room for the planes of a page", name);
    check.that(t.groups >= t.rank_field + 1 + t.outlier_fields * t.outliers && t.outlier_fields == (t.head_dim <= 256 ? 3 : 4) && t.members == t.page_size && t.rank_field >= (t.fp8 ? 2 : 4), "%s must have metadata for each token", name);
  } else {
    check.that(t.rows == (t.is_key ? t.page_size : channels) && t.row_length == (t.is_key ? channels : t.page_size) && t.row_places >= t.row_length && t.row_places < t.row_length + kWordBits && t.row_words >= needed_words, "%s must have rows of tokens or of channels", name);
    check.that(t.codebook || (t.by_token ? t.groups * t.group_size == t.head_dim && t.members == t.page_size : t.groups * t.group_size == t.page_size && t.members == t.head_dim), "%s must have parameters for each group", name);
  }
  check.tensor(name, p.codes, {batch, heads, pages, t.rows, t.row_words}, kInt16);
  check.rows(name, p.codes, 2);
  check.tensor(name, p.params, {batch, heads, pages, t.groups, t.members, t.param_elements}, t.byte_params ? kUint8 : kHalf);
  check.rows(name, p.params, 3);
  check.that(is_floating(p.exact.dtype), "%s must hold exact tokens in a floating-point dtype", name);
  const int64_t rows = p.exact.sizes[2], token_rows = t.sinks + t.ring;
  check.that(rows == t.exact_rows || (rows < t.exact_rows && p.held <= rows - (t.exact_rows - token_rows)), "%s must have exact rows for the tokens held, got size %lld", name, static_cast<long long>(rows));
  check.tensor(name, p.exact, {batch, heads, rows, t.head_dim}, p.exact.dtype);
  check.rows(name, p.exact, 2);
  check.that(p.pages >= 0 && p.pages <= pages, "%s must say that 0 to %lld pages are packed, got %lld", name, static_cast<long long>(pages), static_cast<long long>(p.pages));
  check.that(p.held >= 0 && (p.pages == 0 || t.sinks + p.pages * t.page_size <= p.held), "%s must hold the tokens of the %lld pages packed, got %lld tokens", name, static_cast<long long>(p.pages), static_cast<long long>(p.held));
  if (t.table_words) {
    check.that(p.tables.sizes[1] >= t.table_words, "tables of %s must have %lld words a head, got %lld", name, static_cast<long long>(t.table_words), static_cast<long long>(p.tables.sizes[1]));
    check.tensor(name, p.tables, {heads, p.tables.sizes[1]}, kInt32);
    check.rows(name, p.tables, 1);
  }
  if (t.rotary) check.tensor(name, p.shift, {batch}, kInt32);
}

}  // namespace
