// adaptive_conv, forward: see adaptive_conv.h.
#include "adaptive_conv.h"

#include "kernels.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

constexpr int64_t kTileWidth = 16;  // output columns that are staged together
constexpr int64_t kTileRows = 4;    // at most, of those that share their window

// Pixels of a group are dealt out in equal parts of at most kBlock.
inline int64_t part_size(int64_t pixels) {
  const int64_t parts = (pixels + kBlock - 1) / kBlock;
  return (pixels + parts - 1) / parts;
}

}  // namespace

void adaptive_conv(DType dtype, DType kernels_dtype, AdaptiveConv conv, Strided source, Strided kernels,
                   const float* bias, Strided out, int threads) {
  const int64_t stride = padded(conv.channels), window = conv.y.window * conv.x.window;
  const int64_t tap_floats = padded(conv.y.taps * padded_octs(conv.x.taps)), row_taps = padded(padded_octs(conv.x.taps));
  const int64_t tile_pixels = kTileRows * kTileWidth;
  const int64_t pointers = padded(conv.y.window * kPointerFloats);
  const int64_t share = SourceRows::floats(conv) + tap_floats + row_taps + tile_pixels * (padded(window) + stride) +
                        stride + pointers;
  Scratch scratch(share * threads);
  const bool stream = worth_streaming(conv.batch * conv.channels * conv.y.out * conv.x.out * size_of(dtype));
  for_row_bands(conv, threads, [&](int thread, int64_t b, int64_t y_begin, int64_t y_end) {
    float* at = scratch.data() + thread * share;
    SourceRows rows(dtype, conv, source, at);
    float* taps = at + SourceRows::floats(conv);
    float* row_of_taps = taps + tap_floats;
    float* weights = row_of_taps + row_taps;
    float* tile = weights + tile_pixels * padded(window);
    float* typed = tile + tile_pixels * stride;
    const float** window_rows = reinterpret_cast<const float**>(typed + stride);
    for (int64_t y = y_begin; y < y_end;) {
      const int64_t group_rows = group_size(conv.y, y, y_end, kTileRows), height = conv.y.count[y];
      for (int64_t x0 = 0; x0 < conv.x.out; x0 += kTileWidth) {
        const int64_t columns = min64(kTileWidth, conv.x.out - x0);
        for (int64_t r = 0; r < group_rows; ++r)
          for (int64_t i = 0; i < columns; ++i) {
            float* w = weights + (r * kTileWidth + i) * padded(window);
            load_taps(kernels_dtype, taps, kernels, b, y + r - conv.row_begin, x0 + i, conv.y.taps);
            for (int64_t n = 0; n < height; ++n) {
              fold_y(row_of_taps, taps, conv.y, y + r, n);
              fold_x(w + n * conv.x.window, row_of_taps, conv.x, x0 + i);
            }
          }
        // A slice of channels at a time keeps the window of the source in the first-level cache.
        const int64_t slice = 64;
        for (int64_t c = 0; c < stride; c += slice)
          for (int64_t x = x0; x < x0 + columns;) {
            const int64_t group_columns = group_size(conv.x, x, x0 + columns, kTileWidth);
            for (int64_t n = 0; n < height; ++n)
              window_rows[n] = rows.row(b, conv.y.first[y] + n) + conv.x.first[x] * stride + c;
            const Operand operand{window_rows, height, conv.x.count[x], stride};
            const int64_t pixels = group_rows * group_columns, part = part_size(pixels);
            for (int64_t p = 0; p < pixels; p += part) {
              const int64_t now = min64(part, pixels - p);
              const float* w[kBlock];
              float* dst[kBlock];
              for (int64_t k = 0; k < now; ++k) {
                const int64_t pixel = (p + k) / group_columns * kTileWidth + x - x0 + (p + k) % group_columns;
                w[k] = weights + pixel * padded(window);
                dst[k] = tile + pixel * stride + c;
              }
              product(operand, min64(slice, stride - c), now, w, conv.x.window, dst, false);
            }
            x += group_columns;
          }
        for (int64_t r = 0; r < group_rows; ++r) {
          float* pixels = tile + r * kTileWidth * stride;
          // Last: a sum that started with a large bias would be rounded to its digits at every tap.
          if (bias != nullptr)
            for (int64_t i = 0; i < columns; ++i)
              for (int64_t c = 0; c < conv.channels; ++c) pixels[i * stride + c] += bias[c];
          write_tile(dtype, out, b, y + r, x0, columns, conv.channels, pixels, stride, typed, stream);
        }
      }
      y += group_rows;
    }
    if (stream) stream_fence();
  });
}

}  // namespace MURF_LEVEL
}  // namespace murf
