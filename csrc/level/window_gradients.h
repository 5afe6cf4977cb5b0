// A block of window attention as its gradients need it: queries both ways round, and the scores of a head, a run of
// keys at a time. A block with few keys is one run, and its scores are kept; one with more takes its runs twice, first
// for the numbers of every softmax, then for the gradients, so that memory does not grow with the window.
#pragma once

#include "activations.h"
#include "window_attention.h"

namespace murf {
namespace MURF_LEVEL {

// Scores of a block that are kept, 512 KB, and those of a run of a block that has more.
constexpr int64_t kKeptFloats = 1 << 17, kRunOfGradients = 1 << 16;

// Packed queries by channel: dst[i * block.width + m].
inline void transpose_queries(const Block& block, const float* packed, int64_t row, int64_t n, float* dst) {
  for (int64_t i = 0; i < n; ++i) {
    float* to = dst + i * block.width;
    for (int64_t m = 0; m < block.queries; ++m) to[m] = packed[m * row + i];
    fill_row(to + block.queries, 0.f, block.width - block.queries);
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

// Keys [begin, end) of a block.
struct Run {
  int64_t begin, end;
  int64_t count() const { return end - begin; }
};

// Scratch of one thread, for the largest block. Heads that share the gradient of their weights are a group: all of them
// where values are averaged, else each for itself.
struct GradientScratch {
  int64_t group, run, depth, channels;  // of a group: heads, channels; keys of a run
  float *q, *q_rows, *grad_q, *terms_y, *terms_x, *largest, *total, *delta;  // of a group's heads
  float *k, *scores, *grad_scores, *mixed;                                   // of a run
  float *grad_rows, *grad_columns, *part, *scale, *values, *rows;
  double *totals, *deltas;

  static int64_t floats(const WindowAttention& a) { return GradientScratch(a, nullptr).used_; }

  GradientScratch(const WindowAttention& a, float* at) {
    const int64_t queries = a.y.max_members * a.x.max_members, keys = a.y.max_keys * a.x.max_keys;
    const int64_t width = lanes_up(queries), n = a.mean ? a.channels : a.channels / a.heads;
    group = a.mean ? a.heads : 1;
    run = keys * width <= kKeptFloats ? keys : max64(kRunOfGradients / width / kKeyChunk * kKeyChunk, kKeyChunk);
    // A cache line apart: rows of a power of two would share their sets of the first-level cache.
    depth = lanes_up(a.head_dim), channels = padded(n) + 16;
    used_ = 0;
    auto take = [&](int64_t floats) {
      float* from = at == nullptr ? nullptr : at + used_;
      used_ += padded(floats);
      return from;
    };
    q = take(group * a.head_dim * width), q_rows = take(group * queries * depth);
    grad_q = take(group * a.head_dim * width);
    terms_y = take(group * a.y.max_keys * width), terms_x = take(group * a.x.max_keys * width);
    largest = take(group * width), total = take(group * width), delta = take(group * width);
    totals = reinterpret_cast<double*>(take(2 * group * width));
    deltas = reinterpret_cast<double*>(take(2 * group * width));
    k = take(run * depth), scores = take(run * width), grad_scores = take(run * width);
    mixed = take(a.mean ? run * width : 0);
    grad_rows = take(queries * channels), grad_columns = take(channels * width);
    part = take(2 * width), scale = take(width);
    values = take(kKeyChunk * kChannelChunk), rows = take(max64(kKeyChunk, a.head_dim) * depth);
  }

 private:
  int64_t used_;
};

// One head of a group: its share of the scratch.
struct GradientHead {
  int64_t head;  // of all
  float *q, *q_rows, *grad_q, *largest, *total, *delta;
  double *totals, *deltas;
  const float *terms_y, *terms_x;  // null: nothing is added

  GradientHead(const WindowAttention& a, const Block& block, int64_t head, const GradientScratch& w) : head(head) {
    const int64_t at = a.mean ? head : 0, width = block.width;
    q = w.q + at * a.head_dim * width, q_rows = w.q_rows + at * block.queries * w.depth;
    grad_q = w.grad_q + at * a.head_dim * width;
    largest = w.largest + at * width, total = w.total + at * width, delta = w.delta + at * width;
    totals = w.totals + at * width, deltas = w.deltas + at * width;
    float* own_y = w.terms_y + at * a.y.max_keys * width;
    float* own_x = w.terms_x + at * a.x.max_keys * width;
    terms_y = axis_terms(block, a.y, a.bias_y, head, true, own_y) ? own_y : nullptr;
    terms_x = axis_terms(block, a.x, a.bias_x, head, false, own_x) ? own_x : nullptr;
  }
};

// w.scores = a head's scaled products with the keys of a run and what the axes add; the keys stay in w.k.
inline void score(DType dtype, const WindowAttention& a, const Block& block, const GradientHead& h, Run run,
                  GradientScratch& w) {
  const int64_t d = a.head_dim, width = block.width;
  pack_rows(dtype, block, a.k, run.begin, run.end, h.head * d, d, w.k, w.depth);
  gemm(run.count(), d, width, w.k, w.depth, 1, h.q, width, w.scores, width, false);
  for (int64_t j = run.begin; j < run.end; ++j) {
    float* s = w.scores + (j - run.begin) * width;
    if (h.terms_y != nullptr) add_scaled_row(s, h.terms_y + j / block.x_keys * width, 1.f, width);
    if (h.terms_x != nullptr) add_scaled_row(s, h.terms_x + j % block.x_keys * width, 1.f, width);
  }
}

// A query without a key that counts is shifted by nothing.
inline float shift_of(float largest) { return largest == kNever ? 0.f : largest; }

// Raises `largest` to the scores of a run, which become exponentials, and adds those to `totals`, and their products
// with the gradients of the weights to `deltas`.
inline void exponentials(const Block& block, const GradientHead& h, Run run, GradientScratch& w) {
  const int64_t width = block.width;
  float* __restrict largest = h.largest;
  float* __restrict shift = w.scale;
  double* __restrict totals = h.totals;
  double* __restrict deltas = h.deltas;
  std::memcpy(shift, largest, size_t(width) * sizeof(float));
  for (int64_t j = 0; j < run.count(); ++j) {
    const float* __restrict s = w.scores + j * width;
    for (int64_t m = 0; m < width; ++m) largest[m] = s[m] > largest[m] ? s[m] : largest[m];
  }
  for (int64_t m = 0; m < width; ++m) {
    const float to = shift_of(largest[m]), falls = exp_row_element(shift[m] - to);
    shift[m] = to, totals[m] *= double(falls), deltas[m] *= double(falls);
  }
  float* __restrict total = w.part;
  float* __restrict delta = w.part + width;
  for (int64_t begin = 0; begin < run.count(); begin += kSummedKeys) {
    fill_row(total, 0.f, width);
    fill_row(delta, 0.f, width);
    for (int64_t j = begin; j < min64(begin + kSummedKeys, run.count()); ++j) {
      float* __restrict s = w.scores + j * width;
      const float* __restrict dp = w.grad_scores + j * width;
      for (int64_t m = 0; m < width; ++m) {
        s[m] = exp_row_element(s[m] - shift[m]);
        total[m] += s[m], delta[m] += s[m] * dp[m];
      }
    }
    add_scaled_row(totals, total, 1.f, width);
    add_scaled_row(deltas, delta, 1.f, width);
  }
}

// After the last run: total and delta, of weights that add up to 1 and a gradient shared by so many heads.
inline void finish(const Block& block, const GradientHead& h, float share) {
  for (int64_t m = 0; m < block.width; ++m) {
    h.total[m] = float(h.totals[m]);
    h.delta[m] = float(double(share) * h.deltas[m] / h.totals[m]);
  }
}

// w.scores, exponentials if they were kept, become weights.
inline void weigh(const Block& block, const GradientHead& h, Run run, bool kept, GradientScratch& w) {
  const int64_t width = block.width;
  const float* __restrict largest = h.largest;
  float* __restrict inverse = w.scale;
  for (int64_t m = 0; m < width; ++m) inverse[m] = 1.f / h.total[m];
  for (int64_t j = 0; j < run.count(); ++j) {
    float* __restrict s = w.scores + j * width;
    if (kept)
      for (int64_t m = 0; m < width; ++m) s[m] *= inverse[m];
    else
      for (int64_t m = 0; m < width; ++m) s[m] = exp_row_element(s[m] - shift_of(largest[m])) * inverse[m];
  }
}

}  // namespace MURF_LEVEL
}  // namespace murf
