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

constexpr int kBlock = 4;

// The same for any run and 1 to kBlock results; `length` is a multiple of kLanes.
void product(const Operand& s, int64_t length, int64_t results, const float* const* w, int64_t w_step,
             float* const* dst, bool accumulate);

// dst[p * dst_step + q] (+)= sum_i a[p][i] * b[q][i] for any number of rows of either operand, `length` a multiple of
// kLanes
void dots(const float* const* a, int64_t a_count, const float* const* b, int64_t b_count, int64_t length,
          float* dst, int64_t dst_step, bool accumulate);

}  // namespace MURF_LEVEL
}  // namespace murf
