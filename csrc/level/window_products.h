// The matrix products of window attention's forward kernels. Keys are read where they lie, by the pointers of their
// rows: a block of queries meets each of them once, which would not pay for a packed copy. Values meet every few
// queries, and are packed: 64 keys of 1024 channels, 4 KB apart, share four sets of the first-level cache. Copies of a
// head's keys and values, made once for a strip of blocks, took two fifths off the time of the scores (16 heads of 64,
// windows of 7), but cost more than that to make.
#pragma once

#include <utility>

#include "rows.h"

namespace murf {
namespace MURF_LEVEL {

// Rows of a tile of sums that is so many vectors wide: as many as the registers hold, but for the operands. One vector
// takes eight rows to hide the latency of its additions.
template <int Vectors>
constexpr int kRowsOf = Vectors == kWide ? 6 : 8;

template <int Vectors>
using VectorCount = std::integral_constant<int, Vectors>;

// visit(n, VectorCount<V>) for runs of V vectors that make up `width` floats, n the first of a run.
template <class Visit>
inline void each_in_vectors(int64_t width, Visit visit) {
  int64_t n = 0;
  for (; n + kWide * kLanes <= width; n += kWide * kLanes) visit(n, VectorCount<kWide>{});
  const int64_t rest = (width - n) / kLanes;
  if constexpr (kWide == 4) {
    if (rest == 3) return visit(n, VectorCount<3>{});
    if (rest == 2) return visit(n, VectorCount<2>{});
  }
  if (rest == 1) visit(n, VectorCount<1>{});
}

// An initializer would be a call of memset for every tile.
template <int Rows, int Vectors>
inline void clear(Vec (&sum)[Rows][Vectors]) {
#pragma GCC unroll 8
  for (int i = 0; i < Rows; ++i)
#pragma GCC unroll 8
    for (int n = 0; n < Vectors; ++n) sum[i][n] = Vec{};
}

template <int Rows, int Vectors>
__attribute__((always_inline)) inline void scores_tile(int64_t depth, const float* const* keys, const float* queries, int64_t width, float* scores) {
  Vec sum[Rows][Vectors];
  clear(sum);
  const float* key[Rows];
  for (int i = 0; i < Rows; ++i) key[i] = keys[i];
#pragma GCC unroll 4
  for (int64_t t = 0; t < depth; ++t) {
    Vec right[Vectors];
    for (int n = 0; n < Vectors; ++n) right[n] = load_vec(queries + t * width + n * kLanes);
    for (int i = 0; i < Rows; ++i)
      for (int n = 0; n < Vectors; ++n) sum[i][n] += key[i][t] * right[n];
  }
  for (int i = 0; i < Rows; ++i)
    for (int n = 0; n < Vectors; ++n) store_vec(scores + i * width + n * kLanes, sum[i][n]);
}

// Keys beyond the last that a product may read and scores that it may write.
constexpr int64_t kKeySlack = 8;

// scores[j][m] = <keys[j], queries[.][m]> for so many vectors of queries. The pointers go on for kKeySlack keys, to any
// that exist, and so do scores. ahead(j) is called before the products of keys up to j.
template <int Vectors, class Ahead>
inline void score_products(int64_t count, int64_t depth, const float* const* keys, const float* queries, int64_t width,
                           float* scores, Ahead ahead) {
  constexpr int Rows = kRowsOf<Vectors>;
  int64_t j = 0;
  for (; j + Rows / 2 < count; j += Rows) {
    ahead(min64(j + Rows, count));
    scores_tile<Rows, Vectors>(depth, keys + j, queries, width, scores + j * width);
  }
  if (j >= count) return;
  ahead(count);
  scores_tile<Rows / 2, Vectors>(depth, keys + j, queries, width, scores + j * width);
}

// sum_t weights[t * width + i] * values[t * row + n], into rows of their own.
template <int Rows, int Vectors, bool Stream>
inline void values_tile(int64_t keys, const float* weights, int64_t width, const float* values, int64_t row,
                        float* const* to, bool accumulate) {
  Vec sum[Rows][Vectors];
  clear(sum);
  for (int64_t t = 0; t < keys; ++t) {
    Vec right[Vectors];
    for (int n = 0; n < Vectors; ++n) right[n] = load_vec(values + t * row + n * kLanes);
    for (int i = 0; i < Rows; ++i)
      for (int n = 0; n < Vectors; ++n) sum[i][n] += weights[t * width + i] * right[n];
  }
  for (int i = 0; i < Rows; ++i)
    for (int n = 0; n < Vectors; ++n) {
      float* at = to[i] + n * kLanes;
      if constexpr (Stream) stream_vec(at, sum[i][n]);
      else store_vec(at, accumulate ? load_vec(at) + sum[i][n] : sum[i][n]);
    }
}

// A transpose of kLanes vectors, by exchanging ever smaller blocks.
template <int Step, int... Lane>
inline void exchange(Vec& a, Vec& b, std::integer_sequence<int, Lane...>) {
  const Vec upper = __builtin_shufflevector(a, b, ((Lane & Step) == 0 ? Lane : kLanes + Lane - Step)...);
  b = __builtin_shufflevector(a, b, ((Lane & Step) == 0 ? Lane + Step : kLanes + Lane)...);
  a = upper;
}
template <int Step = kLanes / 2>
inline void transpose_vecs(Vec (&row)[kLanes]) {
  for (int i = 0; i < kLanes; ++i)
    if ((i & Step) == 0) exchange<Step>(row[i], row[i + Step], std::make_integer_sequence<int, kLanes>{});
  if constexpr (Step > 1) transpose_vecs<Step / 2>(row);
}

}  // namespace MURF_LEVEL
}  // namespace murf
