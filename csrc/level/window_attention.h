// Window attention: queries that share most of their keys are a block, and a block is a few small matrix products.
// Scores lie by key, then query, so that a softmax over keys is vertical arithmetic on vectors of queries.
#pragma once

#include "activations.h"
#include "gemm.h"
#include "launch.h"
#include "rows.h"

namespace murf {
namespace MURF_LEVEL {

// Values are packed this many keys and channels at a time, 32 KB, to stay in the first-level cache. Products that sum
// over keys are added up in parts of this length.
constexpr int64_t kKeyChunk = 128, kChannelChunk = 64;

// A softmax's sums are added up in shorter parts: an error of theirs moves all weights of a query at once, and gradients
// of scores are differences from such a sum. With 289 keys in parts of 128, gradients had twice the error.
constexpr int64_t kSummedKeys = 16;

constexpr float kNever = -__builtin_inff();

// One block of queries with the union of their keys.
struct Block {
  int64_t b, queries, keys, width;  // width: queries, padded
  int64_t y_block, x_block, y_queries, x_queries, y_keys, x_keys;
  const int32_t *ys, *xs, *key_ys, *key_xs;

  Block(const WindowAttention& a, int64_t b, int64_t by, int64_t bx) : b(b), y_block(by), x_block(bx) {
    ys = a.y.members + a.y.member_begin[by], xs = a.x.members + a.x.member_begin[bx];
    key_ys = a.y.keys + a.y.key_begin[by], key_xs = a.x.keys + a.x.key_begin[bx];
    y_queries = a.y.member_begin[by + 1] - a.y.member_begin[by];
    x_queries = a.x.member_begin[bx + 1] - a.x.member_begin[bx];
    y_keys = a.y.key_begin[by + 1] - a.y.key_begin[by];
    x_keys = a.x.key_begin[bx + 1] - a.x.key_begin[bx];
    queries = y_queries * x_queries, keys = y_keys * x_keys, width = lanes_up(queries);
  }
  int64_t y_of(int64_t m) const { return ys[m / x_queries]; }
  int64_t x_of(int64_t m) const { return xs[m % x_queries]; }
  int64_t key_y_of(int64_t j) const { return key_ys[j / x_keys]; }
  int64_t key_x_of(int64_t j) const { return key_xs[j % x_keys]; }
  int64_t query_at(const Strided& t, int64_t m) const {
    return b * t.stride_b + y_of(m) * t.stride_y + x_of(m) * t.stride_x;
  }
  int64_t key_at(const Strided& t, int64_t j) const {
    return b * t.stride_b + key_y_of(j) * t.stride_y + key_x_of(j) * t.stride_x;
  }
};

template <class T>
inline void load_strided(float* dst, const T* src, int64_t stride, int64_t n) {
  if (stride == 1) load_row(dst, src, n);
  else
    for (int64_t i = 0; i < n; ++i) dst[i] = to_float(src[i * stride]);
}

template <class T>
inline void store_strided(T* dst, int64_t stride, const float* src, int64_t n) {
  if (stride == 1) store_row(dst, src, n);
  else
    for (int64_t i = 0; i < n; ++i) from_float(src[i], dst[i * stride]);
}

// Channels [first, first + n) of the block's queries, by query: dst[m * row + i], padded with zeros to `row`.
template <class T>
inline void pack_queries(const Block& block, const Strided& t, int64_t first, int64_t n, float scale, float* dst,
                         int64_t row) {
  for (int64_t m = 0; m < block.queries; ++m) {
    float* to = dst + m * row;
    load_strided(to, static_cast<const T*>(t.data) + block.query_at(t, m) + first * t.stride_c, t.stride_c, n);
    for (int64_t i = 0; i < n; ++i) to[i] *= scale;
    fill_row(to + n, 0.f, row - n);
  }
}

// The same by channel: dst[i * block.width + m].
inline void transpose_queries(const Block& block, const float* packed, int64_t row, int64_t n, float* dst) {
  for (int64_t i = 0; i < n; ++i) {
    float* to = dst + i * block.width;
    for (int64_t m = 0; m < block.queries; ++m) to[m] = packed[m * row + i];
    fill_row(to + block.queries, 0.f, block.width - block.queries);
  }
}

// Channels [first, first + n) of keys [begin, end): dst[(j - begin) * row + i], padded with zeros to `row`.
template <class T>
inline void pack_keys(const Block& block, const Strided& t, int64_t begin, int64_t end, int64_t first, int64_t n,
                      float* dst, int64_t row) {
  for (int64_t j = begin; j < end; ++j, dst += row) {
    load_strided(dst, static_cast<const T*>(t.data) + block.key_at(t, j) + first * t.stride_c, t.stride_c, n);
    fill_row(dst + n, 0.f, row - n);
  }
}

// What one axis adds to the scores of a head: dst[key * block.width + m]. False if it adds nothing.
inline bool axis_terms(const Block& block, const WindowAxis& axis, const float* bias, int64_t head, bool rows,
                       float* dst) {
  const int64_t at = rows ? block.y_block : block.x_block;
  const int64_t members = rows ? block.y_queries : block.x_queries, keys = rows ? block.y_keys : block.x_keys;
  const int32_t* key = rows ? block.key_ys : block.key_xs;
  const float* mask = axis.exact[at] ? nullptr : axis.masks + axis.mask_begin[at];
  if (mask == nullptr && bias == nullptr) return false;
  for (int64_t j = 0; j < keys; ++j) {
    float* to = dst + j * block.width;
    for (int64_t m = 0; m < block.queries; ++m) {
      const int64_t member = rows ? m / block.x_queries : m % block.x_queries;
      float term = mask == nullptr ? 0.f : mask[j * members + member];
      // A key outside the window stays outside whatever the bias says.
      if (bias != nullptr && term != kNever)
        term += bias[(head * axis.out + (rows ? block.y_of(m) : block.x_of(m))) * axis.in + key[j]];
      to[m] = term;
    }
    fill_row(to + block.queries, 0.f, block.width - block.queries);
  }
  return true;
}

// Scratch of one thread, for the largest block.
struct Workspace {
  int64_t queries, keys, width, depth, channels;
  float *q, *q_rows, *k, *scores, *mixed, *terms_y, *terms_x, *largest, *total, *part, *values, *result;
  double* exact;
  // backward only
  float *grad_scores, *grad_rows, *grad_columns, *delta;

  static int64_t floats(const WindowAttention& a, bool backward) { return Workspace(a, backward, nullptr).used_; }

  Workspace(const WindowAttention& a, bool backward, float* at) {
    queries = a.y.max_members * a.x.max_members, keys = a.y.max_keys * a.x.max_keys;
    width = lanes_up(queries), depth = lanes_up(a.head_dim);
    channels = padded(a.channels) + kChannelChunk;
    used_ = 0;
    auto take = [&](int64_t n) {
      float* from = at == nullptr ? nullptr : at + used_;
      used_ += padded(n);
      return from;
    };
    q = take(a.head_dim * width), q_rows = take(queries * depth), k = take(keys * depth);
    scores = take(keys * width), mixed = take(keys * width);
    terms_y = take(a.y.max_keys * width), terms_x = take(a.x.max_keys * width);
    largest = take(width), total = take(width), part = take(width), delta = take(width);
    exact = reinterpret_cast<double*>(take(2 * width));
    values = take(kKeyChunk * kChannelChunk);
    result = take(max64(queries * channels, kKeyChunk * max64(kChannelChunk, depth)));
    if (backward) {
      grad_scores = take(keys * width);
      grad_rows = take(queries * channels), grad_columns = take(channels * width);
    }
  }

 private:
  int64_t used_;
};

// sum[m] = what add(j, part) adds to part[m] for every key j of a block, in parts that are added up in double.
template <class Add>
inline void sum_over_keys(const Block& block, Workspace& w, float* sum, Add add) {
  fill_row(w.exact, 0.f, block.width);
  for (int64_t begin = 0; begin < block.keys; begin += kSummedKeys) {
    fill_row(w.part, 0.f, block.width);
    for (int64_t j = begin; j < min64(begin + kSummedKeys, block.keys); ++j) add(j, w.part);
    add_scaled_row(w.exact, w.part, 1.f, block.width);
  }
  store_row(sum, w.exact, block.width);
}

// scores = exp(one head's scaled products - largest), with largest and total per query: a softmax but for the division.
template <class T>
inline void attend(const WindowAttention& a, const Block& block, int64_t head, Workspace& w) {
  const int64_t d = a.head_dim, width = block.width;
  pack_queries<T>(block, a.q, head * d, d, a.scale, w.q_rows, w.depth);
  transpose_queries(block, w.q_rows, w.depth, d, w.q);
  pack_keys<T>(block, a.k, 0, block.keys, head * d, d, w.k, w.depth);
  gemm(block.keys, d, width, w.k, w.depth, 1, w.q, width, w.scores, width, false);
  const bool terms_y = axis_terms(block, a.y, a.bias_y, head, true, w.terms_y);
  const bool terms_x = axis_terms(block, a.x, a.bias_x, head, false, w.terms_x);
  float* __restrict largest = w.largest;
  fill_row(largest, kNever, width);
  for (int64_t j = 0; j < block.keys; ++j) {
    float* __restrict s = w.scores + j * width;
    if (terms_y) add_scaled_row(s, w.terms_y + j / block.x_keys * width, 1.f, width);
    if (terms_x) add_scaled_row(s, w.terms_x + j % block.x_keys * width, 1.f, width);
    for (int64_t m = 0; m < width; ++m) largest[m] = s[m] > largest[m] ? s[m] : largest[m];
  }
  sum_over_keys(block, w, w.total, [&](int64_t j, float* __restrict part) {
    float* __restrict s = w.scores + j * width;
    for (int64_t m = 0; m < width; ++m) {
      s[m] = exp_row_element(s[m] - largest[m]);
      part[m] += s[m];
    }
  });
}

inline void normalize(const Block& block, Workspace& w) {
  float* __restrict inverse = w.part;
  for (int64_t m = 0; m < block.width; ++m) inverse[m] = 1.f / w.total[m];
  for (int64_t j = 0; j < block.keys; ++j) {
    float* __restrict s = w.scores + j * block.width;
    for (int64_t m = 0; m < block.width; ++m) s[m] *= inverse[m];
  }
}

// mixed = the heads' normalized weights, averaged; called head after head.
inline void mix(const WindowAttention& a, const Block& block, int64_t head, Workspace& w) {
  const float share = 1.f / float(a.heads);
  for (int64_t j = 0; j < block.keys; ++j) {
    if (head == 0) scale_row(w.mixed + j * block.width, w.scores + j * block.width, share, block.width);
    else add_scaled_row(w.mixed + j * block.width, w.scores + j * block.width, share, block.width);
  }
}

}  // namespace MURF_LEVEL
}  // namespace murf
