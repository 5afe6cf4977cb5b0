// A 3x3 convolution on rows of pixels by minimal filtering (Winograd): tiles of 2 x 4 results from 4 x 6 inputs by 24
// products instead of 72, each a small matrix product over the channels of many tiles. The group norm and the activation
// before it are applied as pixels are read, so that no normalized map is written, and the statistics that the next norm
// needs are taken from a tile while it is in the cache.
//
// Along rows 4 results come of products at the points 0, +-3/4, +-3/2 and infinity. They are exact in binary and lose
// half the digits of the usual 0, +-1, +-2; 4 x 4 results would save another quarter of the products, and lose a bit.
#include "gemm.h"
#include "kernels.h"
#include "launch.h"
#include "pixels.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

constexpr int kResultY = 2, kResultX = 4;      // of a tile
constexpr int kInputY = kResultY + 2, kInputX = kResultX + 2;
constexpr int kPoints = kInputY * kInputX;
constexpr int64_t kTiles = 5 * kTileRows;      // side by side in one product
constexpr int64_t kPanel = 64;                 // columns of the weights that lie together

// A run of four inputs to the factors of two results, and back: points 0, 1, -1, infinity.
inline void to_points(const Vec (&d)[4], Vec (&v)[4]) {
  v[0] = d[2] - d[0];
  v[1] = d[2] + d[1];
  v[2] = d[2] - d[1];
  v[3] = d[3] - d[1];
}
inline void to_results(const Vec (&m)[4], Vec (&y)[2]) {
  y[0] = m[0] + (m[1] + m[2]);
  y[1] = (m[1] - m[2]) + m[3];
}

// Six inputs to the factors of four results, and back: points 0, a, -a, b, -b, infinity.
constexpr float kA = 0.75f, kB = 1.5f;
inline void to_points(const Vec (&d)[6], Vec (&v)[6]) {
  constexpr float both = kA * kA + kB * kB, product = kA * kA * kB * kB;
  const Vec even_a = d[4] - kB * kB * d[2], odd_a = kA * (d[3] - kB * kB * d[1]);
  const Vec even_b = d[4] - kA * kA * d[2], odd_b = kB * (d[3] - kA * kA * d[1]);
  v[0] = (d[4] - both * d[2]) + product * d[0];
  v[1] = even_a + odd_a;
  v[2] = even_a - odd_a;
  v[3] = even_b + odd_b;
  v[4] = even_b - odd_b;
  v[5] = (d[5] - both * d[3]) + product * d[1];
}
inline void to_results(const Vec (&m)[6], Vec (&y)[4]) {
  const Vec even_a = m[1] + m[2], odd_a = kA * (m[1] - m[2]);
  const Vec even_b = m[3] + m[4], odd_b = kB * (m[3] - m[4]);
  y[0] = m[0] + (even_a + even_b);
  y[1] = odd_a + odd_b;
  y[2] = kA * kA * even_a + kB * kB * even_b;
  y[3] = (kA * kA * odd_a + kB * kB * odd_b) + m[5];
}

// A thread's buffers.
struct ConvBuffers {
  int64_t in, out;  // channels, filled up
  float *pixels;    // (kInputY, in): a column of inputs, activated
  float *columns;   // (kInputX, kInputY, in): the last columns, as points along y
  float *points;    // (kPoints, kTiles, in)
  float *products;  // (kPoints, kTiles, out)
  float *results;   // (kResultY * kResultX, out)
  float *mean, *spread;

  static int64_t floats(const PixelConv& p) {
    const int64_t in = padded(p.in_channels), out = padded(p.out_channels);
    return (kInputY + kPoints) * in + kPoints * kTiles * (in + out) + (kResultY * kResultX + 2) * out;
  }
  ConvBuffers(const PixelConv& p, float* at) : in(padded(p.in_channels)), out(padded(p.out_channels)) {
    fill_row(at, 0.f, floats(p));  // channels that fill up stay zero
    pixels = at;
    columns = pixels + kInputY * in;
    points = columns + kPoints * in;
    products = points + kPoints * kTiles * in;
    results = products + kPoints * kTiles * out;
    mean = results + kResultY * kResultX * out;
    spread = mean + out;
  }
};

// Column x of the inputs of a strip whose first result is in row y.
void load_column(const PixelConv& p, int64_t y, int64_t x, ConvBuffers& w, float* to) {
  const int64_t column = inside(x, p.width, p.reflect);
  for (int i = 0; i < kInputY; ++i) {
    const int64_t row = inside(y - 1 + i, p.height, p.reflect);
    float* at = w.pixels + i * w.in;
    if (row < 0 || column < 0) fill_row(at, 0.f, p.in_channels);
    else load_pixel<float>(p, row * p.width + column, at);
  }
  for (int64_t c = 0; c < w.in; c += kLanes) {
    Vec d[kInputY], v[kInputY];
    for (int i = 0; i < kInputY; ++i) d[i] = load_vec(w.pixels + i * w.in + c);
    to_points(d, v);
    for (int i = 0; i < kInputY; ++i) store_vec(to + i * w.in + c, v[i]);
  }
}

// The points of a tile, the t-th of a product, from its columns.
void make_points(ConvBuffers& w, const float* const (&column)[kInputX], int64_t t) {
  for (int i = 0; i < kInputY; ++i) {
    float* to = w.points + (i * kInputX * kTiles + t) * w.in;
    for (int64_t c = 0; c < w.in; c += kLanes) {
      Vec d[kInputX], v[kInputX];
      for (int j = 0; j < kInputX; ++j) d[j] = load_vec(column[j] + i * w.in + c);
      to_points(d, v);
      for (int j = 0; j < kInputX; ++j) store_vec(to + j * kTiles * w.in + c, v[j]);
    }
  }
}

void multiply(const PixelConv& p, int64_t tiles, ConvBuffers& w) {
  for (int i = 0; i < kPoints; ++i) {
    const float* a = w.points + i * kTiles * w.in;
    const float* b = static_cast<const float*>(p.weight) + i * p.in_channels * w.out;
    float* c = w.products + i * kTiles * w.out;
    for (int64_t n = 0; n < w.out; n += kPanel) {
      const int64_t width = min64(kPanel, w.out - n);
      for (int64_t k = 0; k < p.in_channels; k += kDepth)
        gemm(tiles, min64(kDepth, p.in_channels - k), width, a + k, w.in, 1, b + n * p.in_channels + k * width, width,
             c + n, w.out, k > 0);
    }
  }
}

// The rows x columns results of the t-th tile that are inside the map, one behind the other.
void make_results(const PixelConv& p, int64_t t, int64_t rows, int64_t columns, ConvBuffers& w) {
  const float* from = w.products + t * w.out;
  for (int64_t c = 0; c < w.out; c += kLanes) {
    Vec along_x[kInputY][kResultX];
    for (int i = 0; i < kInputY; ++i) {
      Vec m[kInputX];
      for (int j = 0; j < kInputX; ++j) m[j] = load_vec(from + (i * kInputX + j) * kTiles * w.out + c);
      to_results(m, along_x[i]);
    }
    for (int64_t x = 0; x < columns; ++x) {
      Vec m[kInputY], y[kResultY];
      for (int i = 0; i < kInputY; ++i) m[i] = along_x[i][x];
      to_results(m, y);
      for (int64_t r = 0; r < rows; ++r) store_vec(w.results + (r * columns + x) * w.out + c, y[r]);
    }
  }
  if (p.bias == nullptr) return;
  for (int64_t i = 0; i < rows * columns; ++i) add_scaled_row(w.results + i * w.out, p.bias, 1.f, p.out_channels);
}

// Results of the rows from y on.
void run_strip(const PixelConv& p, int64_t y, double* joined, ConvBuffers& w) {
  const int64_t rows = min64(kResultY, p.row_end - y), tiles = (p.width + kResultX - 1) / kResultX;
  int64_t seen = 0, loaded = -1;  // pixels with statistics, the next column to load
  const auto slot = [&](int64_t x) { return w.columns + (x + 1) % kInputX * kInputY * w.in; };
  for (int64_t first = 0; first < tiles; first += kTiles) {
    const int64_t n = min64(kTiles, tiles - first);
    for (int64_t t = 0; t < n; ++t) {
      const int64_t x = (first + t) * kResultX - 1;
      for (; loaded < x + kInputX; ++loaded) load_column(p, y, loaded, w, slot(loaded));
      const float* column[kInputX];
      for (int j = 0; j < kInputX; ++j) column[j] = slot(x + j);
      make_points(w, column, t);
    }
    multiply(p, n, w);
    for (int64_t t = 0; t < n; ++t) {
      const int64_t x = (first + t) * kResultX, columns = min64(kResultX, p.width - x), pixels = rows * columns;
      make_results(p, t, rows, columns, w);
      for (int64_t i = 0; i < pixels; ++i) {
        const int64_t pixel = (y - p.row_begin + i / columns) * p.width + x + i % columns;
        load_row(static_cast<float*>(p.out) + pixel * p.out_stride, w.results + i * w.out, p.out_channels);
      }
      if (joined == nullptr) continue;
      tile_statistics(w.results, w.out, pixels, p.out_channels, w.mean, w.spread);
      join_statistics(joined, double(seen), w.mean, w.spread, double(pixels), p.out_channels);
      seen += pixels;
    }
  }
}

}  // namespace

void pixel_conv(PixelConv p, int threads) {
  const int64_t share = ConvBuffers::floats(p);
  const int64_t strips = (p.row_end - p.row_begin + kResultY - 1) / kResultY;
  Scratch scratch(share * threads);
  parallel(threads, strips, [&](int thread, int64_t begin, int64_t end) {
    ConvBuffers w(p, scratch.data() + thread * share);
    for (int64_t strip = begin; strip < end; ++strip) {
      double* joined = p.statistics == nullptr ? nullptr : p.statistics + strip * 2 * p.out_channels;
      if (joined != nullptr)
        for (int64_t c = 0; c < 2 * p.out_channels; ++c) joined[c] = 0.;
      run_strip(p, p.row_begin + strip * kResultY, joined, w);
    }
  });
}

}  // namespace MURF_LEVEL
}  // namespace murf
