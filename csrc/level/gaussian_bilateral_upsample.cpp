// gaussian_bilateral_upsample: the weights of a patch of pixels in cache, times the values of their window. Few channels
// are rows of pixels, so that they fill the vector lanes; of many, a pixel's are side by side.
#include "gaussian_bilateral.h"
#include "kernels.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

constexpr int64_t kFew = 16;

// tile[c][i] = sum_k values[c][k] weights[k][i]
void few_channels(const GaussianBilateral& u, const Window& window, const Patch& patch, const float* values,
                  float* tile) {
  const float* weights = patch.weights;
  const Operand operand{&weights, 1, window.count, kPixels};
  for (int64_t c = 0; c < u.channels; c += kBlock) {
    const int64_t now = min64(kBlock, u.channels - c);
    const float* w[kBlock];
    float* to[kBlock];
    for (int64_t p = 0; p < now; ++p) w[p] = values + (c + p) * window.count, to[p] = tile + (c + p) * kPixels;
    product(operand, patch.width, now, w, 0, to, false);
  }
}

template <int V>
void pixel_blocks(const Operand& operand, int64_t channel, const Patch& patch, float* tile, int64_t pitch) {
  // Pixels up to the next block are computed as well: their weights are there.
  for (int64_t i = 0; i < patch.count; i += kBlock) {
    const float* w[kBlock];
    float* to[kBlock];
    for (int64_t p = 0; p < kBlock; ++p) w[p] = patch.weights + i + p, to[p] = tile + (i + p) * pitch;
    product_block<kBlock, V>(operand, channel, w, kPixels, to, false);
  }
}

// tile[i][c] = sum_k weights[k][i] rows[k][c], a run of channels at a time: those of the window stay in cache
void many_channels(const Window& window, const Patch& patch, const float* const* rows, float* tile, int64_t pitch) {
  const Operand operand{rows, window.count, 1, 0};
  int64_t c = 0;
  for (; c + kWide * kLanes <= pitch; c += kWide * kLanes) pixel_blocks<kWide>(operand, c, patch, tile, pitch);
  for (; c < pitch; c += kLanes) pixel_blocks<1>(operand, c, patch, tile, pitch);
}

void forward(DType dtype, const GaussianBilateral& u, const Strided& out, int threads) {
  const bool few = u.channels <= kFew;
  const int64_t pitch = padded(u.channels), cells = Patches::cells_of(u);
  const int64_t own = padded(Patches::floats(u)), tile_floats = kPixels * pitch;
  const int64_t share = own + tile_floats + padded(few ? u.channels * cells : kPointerFloats * cells);
  Scratch scratch(share * threads);
  parallel(threads, u.batch * u.height * u.width, [&](int thread, int64_t begin, int64_t end) {
    float* at = scratch.data() + thread * share;
    Patches patches(u, at);
    float* tile = at + own;
    float* values = tile + tile_floats;
    const float** rows = reinterpret_cast<const float**>(values);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / (u.height * u.width), index = task % (u.height * u.width);
      const float* image = u.values + b * u.height * u.width * pitch;
      const auto gather = [&](const Window& window) {
        for (int64_t k = 0; k < window.count; ++k) {
          const float* value = image + window.cell[k] * pitch;
          if (!few) rows[k] = value;
          else
            for (int64_t c = 0; c < u.channels; ++c) values[c * window.count + k] = value[c];
        }
      };
      const auto apply = [&](const Window& window, const Patch& patch) {
        if (few) few_channels(u, window, patch, values, tile);
        else many_channels(window, patch, rows, tile, pitch);
        const int64_t step = few ? 1 : pitch, step_c = few ? kPixels : 1;
        if (out.stride_c == 1 && !few) {
          for (int64_t i = 0; i < patch.count; ++i)
            store_values(dtype, out.data,
                         b * out.stride_b + patch.row[i] * out.stride_y + patch.column[i] * out.stride_x, 1,
                         tile + i * pitch, u.channels);
          return;
        }
        with_dtype(dtype, [&](auto tag) {
          auto* dst = static_cast<decltype(tag)*>(out.data) + b * out.stride_b;
          for (int64_t c = 0; c < u.channels; ++c)
            for (int64_t i = 0; i < patch.count; ++i)
              from_float(tile[i * step + c * step_c],
                         dst[patch.row[i] * out.stride_y + patch.column[i] * out.stride_x + c * out.stride_c]);
        });
      };
      patches.each(b, index / u.width, index % u.width, gather, apply);
    }
  });
}

}  // namespace

void gaussian_bilateral_upsample(DType dtype, GaussianBilateral upsampling, Strided out, int threads) {
  forward(dtype, upsampling, out, threads);
}

}  // namespace MURF_LEVEL
}  // namespace murf
