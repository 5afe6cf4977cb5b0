// What layers on rows of pixels share: the activation before a product, the statistics after it.
#pragma once

#include "activations.h"
#include "rows.h"

namespace murf {
namespace MURF_LEVEL {

// Inputs of a product that are summed in one run: the rounding of a sum grows with its length, and a chain of fifteen
// layers shows it.
constexpr int64_t kDepth = 32;

inline void silu_row(float* __restrict x, const float* __restrict gain, const float* __restrict offset, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float v = x[i] * gain[i] + offset[i];
    x[i] = v / (1.f + exp_row_element(-v));
  }
}

// Means and sums of squared differences from them, of the columns of a tile; `mean` and `spread` are of one tile.
inline void tile_statistics(const float* rows, int64_t stride, int64_t n, int64_t channels, float* __restrict mean,
                     float* __restrict spread) {
  fill_row(mean, 0.f, channels);
  for (int64_t i = 0; i < n; ++i) add_scaled_row(mean, rows + i * stride, 1.f, channels);
  for (int64_t c = 0; c < channels; ++c) mean[c] /= float(n);
  fill_row(spread, 0.f, channels);
  for (int64_t i = 0; i < n; ++i) {
    const float* __restrict row = rows + i * stride;
    for (int64_t c = 0; c < channels; ++c) {
      const float d = row[c] - mean[c];
      spread[c] += d * d;
    }
  }
}

// Joins a tile of n pixels to the `count` pixels before it (Chan, Golub and LeVeque): the mean, then the spread.
inline void join_statistics(double* __restrict joined, double count, const float* __restrict mean,
                     const float* __restrict spread, double n, int64_t channels) {
  const double share = n / (count + n), weight = count * share;
  for (int64_t c = 0; c < channels; ++c) {
    const double d = double(mean[c]) - joined[c];
    joined[c] += d * share;
    joined[channels + c] += double(spread[c]) + d * d * weight;
  }
}

}  // namespace MURF_LEVEL
}  // namespace murf
