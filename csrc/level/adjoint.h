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

// Whether a low-resolution row or column takes part in so many full-resolution ones that its sum needs double. The
// functions below sum in the type of their accumulators.
inline bool has_long_sums(const Axis& axis) {
  if (axis.out <= kShortSum) return false;
  Scratch scratch(axis.in + 1);
  int32_t* change = reinterpret_cast<int32_t*>(scratch.data());  // of the number of readers from one row to the next
  for (int64_t i = 0; i <= axis.in; ++i) change[i] = 0;
  for (int64_t i = 0; i < axis.out; ++i) ++change[axis.first[i]], --change[axis.first[i] + axis.count[i]];
  int64_t readers = 0, most = 0;
  for (int64_t i = 0; i < axis.in; ++i) most = max64(most, readers += change[i]);
  return most > kShortSum;
}
inline bool has_long_sums(const Map& map) { return has_long_sums(map.y) || has_long_sums(map.x); }

// Floats of scratch that hold `n` sums.
template <class Sum>
constexpr int64_t sum_floats(int64_t n) {
  return n * int64_t(sizeof(Sum) / sizeof(float));
}

// reduced[x_t, c] += w_t * pixel[c], over the padded channel count
template <class Sum>
inline void spread_pixel(const Map& map, int64_t x, const float* pixel, Sum* reduced) {
  const int64_t stride = pixel_stride(map);
  for (int64_t t = 0; t < map.x.count[x]; ++t)
    add_scaled_row(reduced + (map.x.first[x] + t) * stride, pixel, map.x.weights[x * map.x.taps + t], stride);
}

// sums[y_t - band.begin, x, c] += w_t * reduced[x, c]; sums are dense
template <class Sum>
inline void spread_row(const Map& map, int64_t y, Band band, const Sum* reduced, Sum* sums) {
  const int64_t n = map.channels, stride = pixel_stride(map), width = map.x.in;
  const int64_t runs = stride == n ? 1 : width, length = stride == n ? width * n : n;
  for (int64_t t = 0; t < map.y.count[y]; ++t) {
    const int64_t row = map.y.first[y] + t;
    if (row < band.begin || row >= band.end) continue;
    Sum* sum = sums + (row - band.begin) * width * n;
    for (int64_t x = 0; x < runs; ++x)
      add_scaled_row(sum + x * n, reduced + x * stride, map.y.weights[y * map.y.taps + t], length);
  }
}

template <class Sum, class PixelGradient>
inline void spread_pixel_gradients_in(DType dtype, Maps maps, Grid grid, Bias bias, float* const* gradients,
                                      int threads, PixelGradient pixel_gradient) {
  constexpr bool kInPlace = sizeof(Sum) == sizeof(float);
  const int64_t n = grid.channels, rows_size = rows_floats(maps), taps_size = PixelTaps::floats(maps);
  int64_t lowest = grid.height;
  for (int64_t m = 0; m < maps.size; ++m) lowest = min64(lowest, maps.data[m].y.in);
  const int64_t bands = adjoint_bands(threads, grid.batch, lowest);
  int64_t sums_size = 0;
  if (!kInPlace)
    for (int64_t m = 0; m < maps.size; ++m)
      sums_size += padded((maps.data[m].y.in + bands - 1) / bands * maps.data[m].x.in * n);
  const int64_t share = rows_size + padded(n) + taps_size + sum_floats<Sum>(rows_size + sums_size);
  Scratch scratch(share * threads);
  parallel(threads, grid.batch * bands, [&](int thread, int64_t begin, int64_t end) {
    float* rows = scratch.data() + thread * share;
    float* pixel = rows + rows_size;
    PixelTaps taps(maps, pixel + padded(n));
    Sum* reduced = reinterpret_cast<Sum*>(pixel + padded(n) + taps_size);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / bands, index = task % bands;
      // visit(map, band, sums, gradient, size) for every map; the sums lie in the gradient where they can.
      const auto each_band = [&](auto visit) {
        Sum* sums = reduced + rows_size;
        for (int64_t m = 0; m < maps.size; ++m) {
          const Map& map = maps.data[m];
          const Band band = adjoint_band(map.y, index, bands);
          const int64_t size = (band.end - band.begin) * map.x.in * n;
          float* gradient = gradients[m] + (b * map.y.in + band.begin) * map.x.in * n;
          if constexpr (kInPlace) sums = gradient;
          visit(map, band, sums, gradient, size);
          sums += padded(size);
        }
      };
      each_band([](const Map&, Band, Sum* sums, float*, int64_t size) { fill_row(sums, 0.f, size); });
      for (int64_t y = 0; y < grid.height; ++y) {
        const bool owned = y >= grid.height * index / bands && y < grid.height * (index + 1) / bands;
        bool touched = owned;
        for (int64_t m = 0; m < maps.size; ++m)
          touched = touched || adjoint_band(maps.data[m].y, index, bands).touched_by(maps.data[m].y, y);
        if (!touched) continue;
        vertical_rows(dtype, maps, b, y, rows);
        fill_row(reduced, 0.f, rows_size);
        for (int64_t x = 0; x < grid.width; ++x) {
          taps.select(rows, x);
          taps.sum(bias_row(bias, b), pixel);
          if (!pixel_gradient(b, y, x, owned, pixel)) continue;
          Sum* at = reduced;
          for (int64_t m = 0; m < maps.size; ++m) {
            spread_pixel(maps.data[m], x, pixel, at);
            at += row_floats(maps.data[m]);
          }
        }
        const Sum* at = reduced;
        each_band([&](const Map& map, Band band, Sum* sums, float*, int64_t) {
          spread_row(map, y, band, at, sums);
          at += row_floats(map);
        });
      }
      if constexpr (!kInPlace)
        each_band([](const Map&, Band, Sum* sums, float* to, int64_t size) { store_row(to, sums, size); });
    }
  });
}

// Backward of everything that turns the summed, resized logits of a pixel into a scalar: for every pixel,
// pixel_gradient(b, y, x, owned, logits) overwrites the logits by their gradients, which are spread over every map.
// `owned` is true for exactly one visit of each pixel; returning false says that the gradients are zero. Gradients are
// dense float32 channels_last maps.
template <class PixelGradient>
inline void spread_pixel_gradients(DType dtype, Maps maps, Grid grid, Bias bias, float* const* gradients, int threads,
                                   PixelGradient pixel_gradient) {
  bool is_long = false;
  for (int64_t m = 0; m < maps.size; ++m) is_long = is_long || has_long_sums(maps.data[m]);
  if (is_long) spread_pixel_gradients_in<double>(dtype, maps, grid, bias, gradients, threads, pixel_gradient);
  else spread_pixel_gradients_in<float>(dtype, maps, grid, bias, gradients, threads, pixel_gradient);
}

}  // namespace MURF_LEVEL
}  // namespace murf
