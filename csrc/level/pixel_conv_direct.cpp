// A 3x3 convolution on rows of pixels in bfloat16, by direct sums in float32. Three rows of the map, behind norm and
// activation and with their borders, are kept as left operands: the three taps of a row are one run of memory, so that
// the convolution is a product of depth 3 x (3 x channels), and there is nothing to save by minimal filtering.
#include "kernels.h"
#include "launch.h"
#include "pixels.h"
#include "products.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

constexpr int64_t kPartRows = 2;  // whose statistics are summed apart
constexpr int kTaps = 3;

// A thread's buffers.
struct DirectBuffers {
  int64_t in, out;      // channels, filled up to whole blocks
  int64_t row_entries;  // of a row of pixels from one before the first on, up to a whole run of kSide and one more
  bf16* rows;           // (kTaps, row_entries)
  float *pixel, *sums, *mean, *spread;  // sums (kSide, out)
  int64_t loaded;       // the next row to load
  Tiles tiles;

  static int64_t entries(const PixelConv& p) { return (sides_up(p.width) + kTaps - 1) * sides_up(p.in_channels); }
  static int64_t floats(const PixelConv& p) {
    const int64_t in = sides_up(p.in_channels), out = sides_up(p.out_channels);
    return padded(floats_of(kTaps * entries(p))) + in + (kSide + 2) * out;
  }
  DirectBuffers(const PixelConv& p, float* at, int64_t first_row)
      : in(sides_up(p.in_channels)), out(sides_up(p.out_channels)), row_entries(entries(p)), loaded(first_row - 1) {
    fill_row(at, 0.f, floats(p));  // borders of zeros, and channels that fill up
    rows = reinterpret_cast<bf16*>(at);
    pixel = at + padded(floats_of(kTaps * row_entries));
    sums = pixel + in;
    mean = sums + kSide * out;
    spread = mean + out;
  }
  bf16* row(int64_t y) { return rows + (y + kTaps) % kTaps * row_entries; }
};

// Row y of the map, which may lie one beside it.
void load_row_of(const PixelConv& p, int64_t y, DirectBuffers& w) {
  const int64_t row = inside(y, p.height, p.reflect);
  bf16* to = w.row(y);
  if (row < 0) {
    std::memset(to, 0, size_t(w.row_entries) * sizeof(bf16));
    return;
  }
  for (int64_t x = 0; x < p.width; ++x) {
    load_pixel<bf16>(p, row * p.width + x, w.pixel);
    round_row(to + (x + 1) * w.in, w.pixel, p.in_channels);
  }
  if (!p.reflect) return;
  std::memcpy(to, to + 2 * w.in, size_t(w.in) * sizeof(bf16));
  std::memcpy(to + (p.width + 1) * w.in, to + (p.width - 1) * w.in, size_t(w.in) * sizeof(bf16));
}

// Row y of the result; `seen` pixels are in the statistics.
void run_row(const PixelConv& p, int64_t y, double* joined, int64_t seen, DirectBuffers& w) {
  for (; w.loaded <= y + 1; ++w.loaded) load_row_of(p, w.loaded, w);
  const int64_t steps = kTaps * w.in / kSide, depth = kTaps * steps * kSide;
  bf16* to = static_cast<bf16*>(p.out) + (y - p.row_begin) * p.width * p.out_stride;
  for (int64_t x = 0; x < p.width; x += kSide) {
    const bf16* left[kTaps] = {w.row(y - 1) + x * w.in, w.row(y) + x * w.in, w.row(y + 1) + x * w.in};
    for (int64_t c = 0; c < w.out; c += kSide)
      block_product(left, kTaps, w.in, steps, static_cast<const bf16*>(p.weight) + c * depth, w.sums + c, w.out,
                    w.tiles);
    const int64_t n = min64(kSide, p.width - x);
    for (int64_t i = 0; i < n; ++i) {
      float* row = w.sums + i * w.out;
      if (p.bias != nullptr) add_scaled_row(row, p.bias, 1.f, p.out_channels);
      round_row(to + (x + i) * p.out_stride, row, p.out_channels);
    }
    if (joined == nullptr) continue;
    tile_statistics(w.sums, w.out, n, p.out_channels, w.mean, w.spread);
    join_statistics(joined, double(seen + x), w.mean, w.spread, double(n), p.out_channels);
  }
}

}  // namespace

void pixel_conv_direct(PixelConv p, int threads) {
  const int64_t share = DirectBuffers::floats(p);
  const int64_t parts = (p.row_end - p.row_begin + kPartRows - 1) / kPartRows;
  Scratch scratch(share * threads);
  parallel(threads, parts, [&](int thread, int64_t begin, int64_t end) {
    const int64_t first = p.row_begin + begin * kPartRows;
    DirectBuffers w(p, scratch.data() + thread * share, first);
    for (int64_t part = begin; part < end; ++part) {
      double* joined = p.statistics == nullptr ? nullptr : p.statistics + part * 2 * p.out_channels;
      if (joined != nullptr)
        for (int64_t c = 0; c < 2 * p.out_channels; ++c) joined[c] = 0.;
      const int64_t y = p.row_begin + part * kPartRows, end_y = min64(y + kPartRows, p.row_end);
      for (int64_t i = y; i < end_y; ++i) run_row(p, i, joined, (i - y) * p.width, w);
    }
  });
}

}  // namespace MURF_LEVEL
}  // namespace murf
