// One layer of a pointwise network on rows of pixels: normalize, activate, multiply, add, and the statistics that the
// next normalization needs, while the rows are in the cache.
#include "gemm.h"
#include "kernels.h"
#include "launch.h"
#include "pixels.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

constexpr int64_t kTilePixels = 16 * kTileRows;
// A thread's buffers: one tile of inputs and of results, and the weights in panels of the columns of one gemm tile, so
// that a panel is one run of memory.
struct TileBuffers {
  static constexpr int64_t kPanel = kWide * kLanes;
  int64_t columns;  // of the results, rounded up to lanes
  float *x, *y, *weight, *row;

  static int64_t floats(const PixelLinear& p) {
    const int64_t columns = lanes_up(p.out_channels);
    return padded(kTilePixels * p.in_channels) + padded(kTilePixels * columns) + padded(p.in_channels * columns) +
           padded(p.out_channels);
  }
  TileBuffers(const PixelLinear& p, float* at) : columns(lanes_up(p.out_channels)) {
    x = at;
    y = x + padded(kTilePixels * p.in_channels);
    weight = y + padded(kTilePixels * columns);
    row = weight + padded(p.in_channels * columns);
    if (p.weight == nullptr) return;
    float* to = weight;
    for (int64_t n = 0; n < columns; n += kPanel) {
      const int64_t width = min64(kPanel, columns - n);
      for (int64_t i = 0; i < p.in_channels; ++i, to += width)
        for (int64_t c = 0; c < width; ++c)
          to[c] = n + c < p.out_channels ? p.weight[i * p.out_channels + n + c] : 0.f;
    }
  }
};

void load_pixels(const PixelLinear& p, int64_t first, int64_t n, float* to) {
  if (p.x_stride_c == 1) {
    for (int64_t i = 0; i < n; ++i) load_row(to + i * p.in_channels, p.x + (first + i) * p.x_stride, p.in_channels);
  } else {
    for (int64_t c = 0; c < p.in_channels; ++c)
      for (int64_t i = 0; i < n; ++i) to[i * p.in_channels + c] = p.x[(first + i) * p.x_stride + c * p.x_stride_c];
  }
}

void unit_row(float* x, float eps, int64_t n) {
  const float inverse = 1.f / __builtin_sqrtf(dot_of(x, x, n) / float(n) + eps);
  for (int64_t i = 0; i < n; ++i) x[i] *= inverse;
}

// row = row * cos(a) + turned(row) * sin(a), a = (angle of the image row) + (angle of the column); the table rows hold
// cosines, then sines. turned = (-second half, first half) of every `group` channels.
void rotate_row(float* __restrict row, float* __restrict old, const float* __restrict by_row,
                const float* __restrict by_column, int64_t n, int64_t group) {
  const int64_t half = group / 2;
  load_row(old, row, n);
  for (int64_t first = 0; first < n; first += group) {
    for (int64_t i = first; i < first + half; ++i) {
      const float cosine = by_row[i] * by_column[i] - by_row[n + i] * by_column[n + i];
      const float sine = by_row[n + i] * by_column[i] + by_row[i] * by_column[n + i];
      row[i] = old[i] * cosine - old[half + i] * sine;
    }
    for (int64_t i = first + half; i < first + group; ++i) {
      const float cosine = by_row[i] * by_column[i] - by_row[n + i] * by_column[n + i];
      const float sine = by_row[n + i] * by_column[i] + by_row[i] * by_column[n + i];
      row[i] = old[i] * cosine + old[i - half] * sine;
    }
  }
}

void run_tile(const PixelLinear& p, int64_t first, int64_t n, TileBuffers& w) {
  load_pixels(p, first, n, w.x);
  if (p.gain != nullptr)
    for (int64_t i = 0; i < n; ++i) silu_row(w.x + i * p.in_channels, p.gain, p.offset, p.in_channels);
  if (p.unit)
    for (int64_t i = 0; i < n; ++i) unit_row(w.x + i * p.in_channels, p.eps, p.in_channels);
  float* result = w.x;
  int64_t stride = p.in_channels;
  if (p.weight != nullptr) {
    for (int64_t c = 0; c < w.columns; c += TileBuffers::kPanel) {
      const int64_t width = min64(TileBuffers::kPanel, w.columns - c);
      for (int64_t i = 0; i < p.in_channels; i += kDepth)
        gemm(n, min64(kDepth, p.in_channels - i), width, w.x + i, p.in_channels, 1,
             w.weight + c * p.in_channels + i * width, width, w.y + c, w.columns, i > 0);
    }
    result = w.y, stride = w.columns;
  }
  for (int64_t i = 0; i < n; ++i) {
    float* row = result + i * stride;
    if (p.bias != nullptr) add_scaled_row(row, p.bias, 1.f, p.out_channels);
    if (p.residual != nullptr) add_scaled_row(row, p.residual + (first + i) * p.out_channels, 1.f, p.out_channels);
    if (p.rotate_rows != nullptr)
      rotate_row(row, w.row, p.rotate_rows + (first + i) / p.width * 2 * p.out_channels,
                 p.rotate_columns + (first + i) % p.width * 2 * p.out_channels, p.out_channels, p.rotate_group);
    load_row(p.out + (first + i) * p.out_stride, row, p.out_channels);
  }
}

}  // namespace

void pixel_linear(PixelLinear p, int threads) {
  const int64_t share = TileBuffers::floats(p) + 2 * padded(p.out_channels);
  Scratch scratch(share * threads);
  const int64_t chunks = (p.pixels + p.chunk - 1) / p.chunk;
  parallel(threads, chunks, [&](int thread, int64_t begin, int64_t end) {
    float* at = scratch.data() + thread * share;
    TileBuffers w(p, at);
    float* mean = at + TileBuffers::floats(p);
    float* spread = mean + padded(p.out_channels);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t from = chunk * p.chunk, to = min64(from + p.chunk, p.pixels);
      double* joined = p.statistics == nullptr ? nullptr : p.statistics + chunk * 2 * p.out_channels;
      if (joined != nullptr)
        for (int64_t c = 0; c < 2 * p.out_channels; ++c) joined[c] = 0.;
      for (int64_t first = from; first < to; first += kTilePixels) {
        const int64_t n = min64(kTilePixels, to - first);
        run_tile(p, first, n, w);
        if (joined == nullptr) continue;
        const bool product = p.weight != nullptr;
        tile_statistics(product ? w.y : w.x, product ? w.columns : p.in_channels, n, p.out_channels, mean, spread);
        join_statistics(joined, double(first - from), mean, spread, double(n), p.out_channels);
      }
    }
  });
}

}  // namespace MURF_LEVEL
}  // namespace murf
