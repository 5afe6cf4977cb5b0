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

// Where a position beside the map is read, or -1 for a zero.
inline int64_t inside(int64_t i, int64_t n, bool reflect) {
  if (i >= 0 && i < n) return i;
  if (!reflect || i > n) return -1;
  return i < 0 ? -i : 2 * n - 2 - i;
}

// An input of a convolution behind norm and activation.
template <class T>
inline void load_pixel(const PixelConv& p, int64_t pixel, float* to) {
  const T* from = static_cast<const T*>(p.x) + pixel * p.x_stride;
  if (p.x_stride_c == 1) load_row(to, from, p.in_channels);
  else
    for (int64_t c = 0; c < p.in_channels; ++c) to[c] = to_float(from[c * p.x_stride_c]);
  if (p.gain == nullptr) return;
  if (p.activate) return silu_row(to, p.gain, p.offset, p.in_channels);
  for (int64_t c = 0; c < p.in_channels; ++c) to[c] = to[c] * p.gain[c] + p.offset[c];
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
