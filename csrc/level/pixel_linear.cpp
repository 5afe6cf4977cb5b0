// One layer of a pointwise network on rows of pixels: normalize, activate, multiply, add, and the statistics that the
// next normalization needs, while the rows are in the cache.
#include "gemm.h"
#include "kernels.h"
#include "launch.h"
#include "pixels.h"
#include "products.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

// The product of a tile of pixels with the weights, which every thread packs once. `kPixels` are those of a tile.
template <class T>
struct Product;

// In float32: weights in panels of the columns of one gemm tile, so that a panel is one run of memory.
template <>
struct Product<float> {
  static constexpr int64_t kPixels = 16 * kTileRows, kPanel = kWide * kLanes;
  int64_t inputs, columns;  // of the results, rounded up
  float* weight;

  static int64_t columns_of(const PixelLinear& p) { return lanes_up(p.out_channels); }
  static int64_t floats(const PixelLinear& p) { return padded(p.in_channels * columns_of(p)); }
  Product(const PixelLinear& p, float* at) : inputs(p.in_channels), columns(columns_of(p)), weight(at) {
    const float* from = static_cast<const float*>(p.weight);
    if (from == nullptr) return;
    float* to = weight;
    for (int64_t n = 0; n < columns; n += kPanel) {
      const int64_t width = min64(kPanel, columns - n);
      for (int64_t i = 0; i < inputs; ++i, to += width)
        for (int64_t c = 0; c < width; ++c) to[c] = n + c < p.out_channels ? from[i * p.out_channels + n + c] : 0.f;
    }
  }
  void run(int64_t n, const float* x, float* y) const {
    for (int64_t c = 0; c < columns; c += kPanel) {
      const int64_t width = min64(kPanel, columns - c);
      for (int64_t i = 0; i < inputs; i += kDepth)
        gemm(n, min64(kDepth, inputs - i), width, x + i, inputs, 1, weight + c * inputs + i * width, width, y + c,
             columns, i > 0);
    }
  }
};

// In bfloat16: rows are rounded, both operands filled up to whole blocks.
template <>
struct Product<bf16> {
  static constexpr int64_t kPixels = kSide;
  int64_t inputs, depth, columns;
  bf16 *left, *weight;
  Tiles tiles;

  static int64_t columns_of(const PixelLinear& p) { return sides_up(p.out_channels); }
  static int64_t floats(const PixelLinear& p) {
    const int64_t depth = sides_up(p.in_channels);
    return padded(floats_of(kPixels * depth)) + padded(floats_of(depth * columns_of(p)));
  }
  Product(const PixelLinear& p, float* at) : inputs(p.in_channels), depth(sides_up(inputs)), columns(columns_of(p)) {
    left = reinterpret_cast<bf16*>(at);
    weight = reinterpret_cast<bf16*>(at + padded(floats_of(kPixels * depth)));
    std::memset(at, 0, size_t(floats(p)) * sizeof(float));
    const bf16* from = static_cast<const bf16*>(p.weight);
    if (from == nullptr) return;
    for (int64_t i = 0; i < inputs; ++i)
      for (int64_t n = 0; n < p.out_channels; ++n)
        weight[packed(i, n, depth / kSide)] = from[i * p.out_channels + n];
  }
  void run(int64_t n, const float* x, float* y) const {
    for (int64_t i = 0; i < n; ++i) round_row(left + i * depth, x + i * inputs, inputs);
    for (int64_t c = 0; c < columns; c += kSide)
      block_product(&left, 1, depth, depth / kSide, weight + c * depth, y + c, columns, tiles);
  }
};

// A thread's buffers: one tile of inputs and of results.
template <class T>
struct TileBuffers {
  static constexpr int64_t kPixels = Product<T>::kPixels;
  float *x, *y, *row;
  Product<T> product;

  static int64_t floats(const PixelLinear& p) {
    return padded(kPixels * p.in_channels) + padded(kPixels * Product<T>::columns_of(p)) + padded(p.out_channels) +
           Product<T>::floats(p);
  }
  TileBuffers(const PixelLinear& p, float* at)
      : x(at),
        y(x + padded(kPixels * p.in_channels)),
        row(y + padded(kPixels * Product<T>::columns_of(p))),
        product(p, row + padded(p.out_channels)) {}
};

template <class T>
void load_pixels(const PixelLinear& p, int64_t first, int64_t n, float* to) {
  const T* x = static_cast<const T*>(p.x) + first * p.x_stride;
  if (p.x_stride_c == 1) {
    for (int64_t i = 0; i < n; ++i) load_row(to + i * p.in_channels, x + i * p.x_stride, p.in_channels);
  } else {
    for (int64_t c = 0; c < p.in_channels; ++c)
      for (int64_t i = 0; i < n; ++i) to[i * p.in_channels + c] = to_float(x[i * p.x_stride + c * p.x_stride_c]);
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

inline void write_row(float* to, const float* from, int64_t n) { load_row(to, from, n); }
inline void write_row(bf16* to, const float* from, int64_t n) { round_row(to, from, n); }

template <class T>
void run_tile(const PixelLinear& p, int64_t first, int64_t n, TileBuffers<T>& w) {
  load_pixels<T>(p, first, n, w.x);
  if (p.gain != nullptr)
    for (int64_t i = 0; i < n; ++i) silu_row(w.x + i * p.in_channels, p.gain, p.offset, p.in_channels);
  if (p.unit)
    for (int64_t i = 0; i < n; ++i) unit_row(w.x + i * p.in_channels, p.eps, p.in_channels);
  float* result = w.x;
  int64_t stride = p.in_channels;
  if (p.weight != nullptr) {
    w.product.run(n, w.x, w.y);
    result = w.y, stride = w.product.columns;
  }
  const T* residual = static_cast<const T*>(p.residual);
  for (int64_t i = 0; i < n; ++i) {
    float* row = result + i * stride;
    if (p.bias != nullptr) add_scaled_row(row, p.bias, 1.f, p.out_channels);
    if (residual != nullptr) add_scaled_row(row, residual + (first + i) * p.out_channels, 1.f, p.out_channels);
    if (p.rotate_rows != nullptr)
      rotate_row(row, w.row, p.rotate_rows + (first + i) / p.width * 2 * p.out_channels,
                 p.rotate_columns + (first + i) % p.width * 2 * p.out_channels, p.out_channels, p.rotate_group);
    write_row(static_cast<T*>(p.out) + (first + i) * p.out_stride, row, p.out_channels);
  }
}

template <class T>
void run(const PixelLinear& p, int threads) {
  const int64_t share = TileBuffers<T>::floats(p) + 2 * padded(p.out_channels);
  Scratch scratch(share * threads);
  const int64_t chunks = (p.pixels + p.chunk - 1) / p.chunk;
  parallel(threads, chunks, [&](int thread, int64_t begin, int64_t end) {
    float* at = scratch.data() + thread * share;
    TileBuffers<T> w(p, at);
    float* mean = at + TileBuffers<T>::floats(p);
    float* spread = mean + padded(p.out_channels);
    for (int64_t chunk = begin; chunk < end; ++chunk) {
      const int64_t from = chunk * p.chunk, to = min64(from + p.chunk, p.pixels);
      double* joined = p.statistics == nullptr ? nullptr : p.statistics + chunk * 2 * p.out_channels;
      if (joined != nullptr)
        for (int64_t c = 0; c < 2 * p.out_channels; ++c) joined[c] = 0.;
      for (int64_t first = from; first < to; first += w.kPixels) {
        const int64_t n = min64(w.kPixels, to - first);
        run_tile<T>(p, first, n, w);
        if (joined == nullptr) continue;
        const bool product = p.weight != nullptr;
        tile_statistics(product ? w.y : w.x, product ? w.product.columns : p.in_channels, n, p.out_channels, mean,
                        spread);
        join_statistics(joined, double(first - from), mean, spread, double(n), p.out_channels);
      }
    }
  });
}

}  // namespace

void pixel_linear(DType dtype, PixelLinear p, int threads) {
  if (dtype == DType::f32) run<float>(p, threads);
  else run<bf16>(p, threads);
}

}  // namespace MURF_LEVEL
}  // namespace murf
