// Register-blocked products of small matrices, the inner loops of the bilateral kernels and adaptive convolutions.
#pragma once

#include "simd.h"

namespace murf {
namespace MURF_LEVEL {

// The right-hand operand of a product: rows[n] + m * step is entry (n, m), a run of floats.
struct Operand {
  const float* const* rows;
  int64_t count;  // of rows
  int64_t width;  // entries of a row
  int64_t step;
};

// dst[p][i] (+)= sum_{n,m} w[p][n * w_step + m] * rows[n][m * step + i], for V vectors of i
template <int P, int V>
inline void product_block(const Operand& s, int64_t offset, const float* const* w, int64_t w_step, float* const* dst,
                          bool accumulate) {
  Vec sum[P][V];
  for (int p = 0; p < P; ++p)
    for (int v = 0; v < V; ++v) sum[p][v] = accumulate ? load_vec(dst[p] + offset + v * kLanes) : Vec{};
  for (int64_t n = 0; n < s.count; ++n) {
    const float* at = s.rows[n] + offset;
    for (int64_t m = 0; m < s.width; ++m, at += s.step) {
      Vec x[V];
      for (int v = 0; v < V; ++v) x[v] = load_vec(at + v * kLanes);
      for (int p = 0; p < P; ++p) {
        const Vec weight = splat(w[p][n * w_step + m]);
        for (int v = 0; v < V; ++v) sum[p][v] += weight * x[v];
      }
    }
  }
  for (int p = 0; p < P; ++p)
    for (int v = 0; v < V; ++v) store_vec(dst[p] + offset + v * kLanes, sum[p][v]);
}

// The same for any run; `length` is a multiple of kLanes.
template <int P>
inline void product_runs(const Operand& s, int64_t length, const float* const* w, int64_t w_step, float* const* dst,
                         bool accumulate) {
  // One row of results needs more vectors in flight to hide the latency of its additions.
  constexpr int V = P == 1 ? 2 * kWide : kWide;
  int64_t i = 0;
  for (; i + V * kLanes <= length; i += V * kLanes) product_block<P, V>(s, i, w, w_step, dst, accumulate);
  for (; i < length; i += kLanes) product_block<P, 1>(s, i, w, w_step, dst, accumulate);
}

constexpr int kBlock = 4;

// The same for 1 to kBlock results.
inline void product(const Operand& s, int64_t length, int64_t results, const float* const* w, int64_t w_step,
                    float* const* dst, bool accumulate) {
  if (results == 4) product_runs<4>(s, length, w, w_step, dst, accumulate);
  else if (results == 3) product_runs<3>(s, length, w, w_step, dst, accumulate);
  else if (results == 2) product_runs<2>(s, length, w, w_step, dst, accumulate);
  else product_runs<1>(s, length, w, w_step, dst, accumulate);
}

// dst[p * dst_step + q] (+)= sum_i a[p][i] * b[q][i] for any number of rows of either operand, `length` a multiple of
// kLanes
void dots(const float* const* a, int64_t a_count, const float* const* b, int64_t b_count, int64_t length,
          float* dst, int64_t dst_step, bool accumulate);

}  // namespace MURF_LEVEL
}  // namespace murf
