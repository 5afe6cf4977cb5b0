// The adjoint of a resize: grad_map = U_h^T grad U_w. Every low-resolution row is owned by one task and sums the
// full-resolution rows that read it in ascending order, so the result does not depend on the number of threads. Long
// sums are taken in double.
#include "adjoint.h"
#include "kernels.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

template <class Sum>
void store_sums(DType dtype, void* out, int64_t to, const Sum* sums, int64_t n) {
  with_dtype(dtype, [&](auto tag) { store_row(static_cast<decltype(tag)*>(out) + to, sums, n); });
}

// channels_last: a full row is first reduced to low-resolution width, then added to the low-resolution rows it touches.
template <class Sum>
void adjoint_channels_last(DType dtype, Map map, int64_t batch, void* out, int threads) {
  const int64_t n = map.channels, row = map.x.in * n;
  const int64_t bands = adjoint_bands(threads, batch, map.y.in);
  const int64_t band_rows = (map.y.in + bands - 1) / bands;
  const int64_t share = sum_floats<Sum>(row_floats(map) + padded(band_rows * row)) + padded(n);
  Scratch scratch(share * threads);
  parallel(threads, batch * bands, [&](int thread, int64_t begin, int64_t end) {
    float* pixel = scratch.data() + thread * share;
    Sum* reduced = reinterpret_cast<Sum*>(pixel + padded(n));
    Sum* sums = reduced + row_floats(map);
    fill_row(pixel, 0.f, padded(n));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / bands;
      const Band band = adjoint_band(map.y, task % bands, bands);
      fill_row(sums, 0.f, (band.end - band.begin) * row);
      for (int64_t y = 0; y < map.y.out; ++y) {
        if (!band.touched_by(map.y, y)) continue;
        fill_row(reduced, 0.f, row_floats(map));
        for (int64_t x = 0; x < map.x.out; ++x) {
          load_values(pixel, dtype, map.data, b * map.stride_b + y * map.stride_y + x * map.stride_x, 1, n);
          spread_pixel(map, x, pixel, reduced);
        }
        spread_row(map, y, band, reduced, sums);
      }
      store_sums(dtype, out, (b * map.y.in + band.begin) * row, sums, (band.end - band.begin) * row);
    }
  });
}

// planar: full rows are first added to the low-resolution rows they touch, then those are reduced in width.
template <class Sum>
void adjoint_planar(DType dtype, Map map, int64_t batch, void* out, int threads) {
  const int64_t planes = batch * map.channels, width = map.x.out;
  const int64_t bands = adjoint_bands(threads, planes, map.y.in);
  const int64_t band_rows = (map.y.in + bands - 1) / bands;
  const int64_t share = sum_floats<Sum>(padded(band_rows * width) + padded(map.x.in));
  Scratch scratch(share * threads);
  parallel(threads, planes * bands, [&](int thread, int64_t begin, int64_t end) {
    Sum* sums = reinterpret_cast<Sum*>(scratch.data() + thread * share);
    Sum* reduced = sums + padded(band_rows * width);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = task / bands;
      const int64_t source = plane / map.channels * map.stride_b + plane % map.channels * map.stride_c;
      const Band band = adjoint_band(map.y, task % bands, bands);
      fill_row(sums, 0.f, (band.end - band.begin) * width);
      for (int64_t y = 0; y < map.y.out; ++y) {
        for (int64_t t = 0; t < map.y.count[y]; ++t) {
          const int64_t row = map.y.first[y] + t;
          if (row < band.begin || row >= band.end) continue;
          with_dtype(dtype, [&](auto tag) {
            add_scaled_row(sums + (row - band.begin) * width,
                           static_cast<const decltype(tag)*>(map.data) + source + y * map.stride_y,
                           map.y.weights[y * map.y.taps + t], width);
          });
        }
      }
      for (int64_t row = band.begin; row < band.end; ++row) {
        const Sum* sum = sums + (row - band.begin) * width;
        fill_row(reduced, 0.f, map.x.in);
        for (int64_t x = 0; x < width; ++x)
          for (int64_t t = 0; t < map.x.count[x]; ++t)
            reduced[map.x.first[x] + t] += Sum(map.x.weights[x * map.x.taps + t]) * sum[x];
        store_sums(dtype, out, (plane * map.y.in + row) * map.x.in, reduced, map.x.in);
      }
    }
  });
}

}  // namespace

void resize_adjoint(DType dtype, Map map, int64_t batch, void* out, bool channels_last, int threads) {
  const bool is_long = has_long_sums(map);
  if (is_long && channels_last) adjoint_channels_last<double>(dtype, map, batch, out, threads);
  else if (is_long) adjoint_planar<double>(dtype, map, batch, out, threads);
  else if (channels_last) adjoint_channels_last<float>(dtype, map, batch, out, threads);
  else adjoint_planar<float>(dtype, map, batch, out, threads);
}

}  // namespace MURF_LEVEL
}  // namespace murf
