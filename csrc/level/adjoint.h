// The transposed walk: full-resolution values spread over the low-resolution cells they were made from. Work is cut
// into bands of low-resolution rows; rows at a band's edge are read by both neighbours instead of shared.
#pragma once

#include "resample.h"

namespace murf {
namespace MURF_LEVEL {

struct Band {
  int64_t begin, end;  // low-resolution rows
  bool touched_by(const Axis& axis, int64_t y) const {
    return axis.first[y] < end && axis.first[y] + axis.count[y] > begin;
  }
};

inline int64_t adjoint_bands(int threads, int64_t independent, int64_t rows) {
  return max64(1, min64((2 * threads + independent - 1) / max64(independent, 1), (rows + 3) / 4));
}

inline Band adjoint_band(const Axis& axis, int64_t index, int64_t bands) {
  return {axis.in * index / bands, axis.in * (index + 1) / bands};
}

// reduced[x_t, c] += w_t * pixel[c], over the padded channel count
inline void spread_pixel(const Map& map, int64_t x, const float* pixel, float* reduced) {
  const int64_t stride = pixel_stride(map);
  for (int64_t t = 0; t < map.x.count[x]; ++t)
    add_scaled_row(reduced + (map.x.first[x] + t) * stride, pixel, map.x.weights[x * map.x.taps + t], stride);
}

// sums[y_t - band.begin, x, c] += w_t * reduced[x, c]; sums are dense
inline void spread_row(const Map& map, int64_t y, Band band, const float* reduced, float* sums) {
  const int64_t n = map.channels, stride = pixel_stride(map), width = map.x.in;
  const int64_t runs = stride == n ? 1 : width, length = stride == n ? width * n : n;
  for (int64_t t = 0; t < map.y.count[y]; ++t) {
    const int64_t row = map.y.first[y] + t;
    if (row < band.begin || row >= band.end) continue;
    float* sum = sums + (row - band.begin) * width * n;
    for (int64_t x = 0; x < runs; ++x)
      add_scaled_row(sum + x * n, reduced + x * stride, map.y.weights[y * map.y.taps + t], length);
  }
}

// Backward of everything that turns the summed, resized logits of a pixel into a scalar: for every pixel,
// pixel_gradient(b, y, x, owned, logits) overwrites the logits by their gradients, which are spread over every map.
// `owned` is true for exactly one visit of each pixel; returning false says that the gradients are zero. Gradients are
// dense float32 channels_last maps.
template <class T, class PixelGradient>
inline void spread_pixel_gradients(Maps maps, Grid grid, Bias bias, float* const* gradients, int threads,
                                   PixelGradient pixel_gradient) {
  const int64_t n = grid.channels, rows_size = rows_floats(maps), taps_size = PixelTaps::floats(maps);
  int64_t lowest = grid.height;
  for (int64_t m = 0; m < maps.size; ++m) lowest = min64(lowest, maps.data[m].y.in);
  const int64_t bands = adjoint_bands(threads, grid.batch, lowest);
  const int64_t share = 2 * rows_size + padded(n) + taps_size;
  Scratch scratch(share * threads);
  parallel(threads, grid.batch * bands, [&](int thread, int64_t begin, int64_t end) {
    float* rows = scratch.data() + thread * share;
    float* reduced = rows + rows_size;
    float* pixel = reduced + rows_size;
    PixelTaps taps(maps, pixel + padded(n));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / bands, index = task % bands;
      for (int64_t m = 0; m < maps.size; ++m) {
        const Map& map = maps.data[m];
        const Band band = adjoint_band(map.y, index, bands);
        fill_row(gradients[m] + (b * map.y.in + band.begin) * map.x.in * n, 0.f,
                 (band.end - band.begin) * map.x.in * n);
      }
      for (int64_t y = 0; y < grid.height; ++y) {
        const bool owned = y >= grid.height * index / bands && y < grid.height * (index + 1) / bands;
        bool touched = owned;
        for (int64_t m = 0; m < maps.size; ++m)
          touched = touched || adjoint_band(maps.data[m].y, index, bands).touched_by(maps.data[m].y, y);
        if (!touched) continue;
        vertical_rows<T>(maps, b, y, rows);
        fill_row(reduced, 0.f, rows_size);
        for (int64_t x = 0; x < grid.width; ++x) {
          taps.select(rows, x);
          taps.sum(bias_row(bias, b), pixel);
          if (!pixel_gradient(b, y, x, owned, pixel)) continue;
          float* at = reduced;
          for (int64_t m = 0; m < maps.size; ++m) {
            spread_pixel(maps.data[m], x, pixel, at);
            at += row_floats(maps.data[m]);
          }
        }
        const float* at = reduced;
        for (int64_t m = 0; m < maps.size; ++m) {
          const Map& map = maps.data[m];
          const Band band = adjoint_band(map.y, index, bands);
          spread_row(map, y, band, at, gradients[m] + (b * map.y.in + band.begin) * map.x.in * n);
          at += row_floats(map);
        }
      }
    }
  });
}

}  // namespace MURF_LEVEL
}  // namespace murf
