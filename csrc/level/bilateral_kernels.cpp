// bilateral_kernels, and the order of the sweeps that are its gradients.
#include "bilateral_backward.h"
#include "bilateral_tile.h"
#include "kernels.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

void forward(DType dtype, DType out_dtype, const Bilateral& net, const Strided& guidance, const Strided& out,
             int threads) {
  const int64_t share = padded(ProjectedRows::floats(net)) + padded(Tile::floats(net)) + Layers(net).taps * kPitch;
  Scratch scratch(share * threads);
  const int64_t height = net.row_end - net.row_begin, bands = max64(1, min64(2 * threads, height / 32));
  parallel(threads, net.batch * bands, [&](int thread, int64_t first, int64_t last) {
    float* at = scratch.data() + thread * share;
    ProjectedRows rows(dtype, net, guidance, at);
    Tile tile(net, at + padded(ProjectedRows::floats(net)));
    float* fixed = at + padded(ProjectedRows::floats(net)) + padded(Tile::floats(net));
    const int64_t taps = tile.layers.taps;
    const Dense second{net.params + tile.layers.fixup_weight1, net.params + tile.layers.fixup_bias1, taps, taps};
    for (int64_t task = first; task < last; ++task) {
      const int64_t b = task / bands, band = task % bands;
      for (int64_t at_row = height * band / bands; at_row < height * (band + 1) / bands; ++at_row)
        for (int64_t x = 0; x < net.width; x += kTile) {
          const int64_t y = net.row_begin + at_row, length = min64(kTile, net.width - x), width = padded(length);
          tile.normalized(rows, b, y, x, width);
          const float* result = tile.kernels;
          if (net.fixup) {
            load_guidance(dtype, tile.kernels + taps * kPitch, kPitch, guidance, net.guides, b, y, x, length, width);
            tile.fixup_hidden(b, width);
            apply_dense(second, tile.hidden, kPitch, fixed, kPitch, width);
            for (int64_t t = 0; t < taps; ++t) {
              float* f = fixed + t * kPitch;
              const float* k = tile.kernels + t * kPitch;
              for (int64_t i = 0; i < width; ++i) f[i] = k[i] + 0.1f * f[i];
            }
            result = fixed;
          }
          const int64_t to = b * out.stride_b + at_row * out.stride_y + x * out.stride_x;
          with_dtype(out_dtype, [&](auto tag) {
            auto* dst = static_cast<decltype(tag)*>(out.data) + to;
            for (int64_t i = 0; i < length; ++i)
              for (int64_t t = 0; t < taps; ++t)
                from_float(result[t * kPitch + i], dst[i * out.stride_x + t * out.stride_c]);
          });
        }
    }
  });
}

}  // namespace

void bilateral_kernels(DType dtype, DType out_dtype, Bilateral net, Strided guidance, Strided out, int threads) {
  forward(dtype, out_dtype, net, guidance, out, threads);
}

void bilateral_kernels_backward(DType dtype, DType grad_dtype, Bilateral net, Strided guidance, Strided grad,
                                int64_t bands, float* grad_logits, float* grad_guidance, float* grad_params,
                                int threads) {
  fill_row(grad_params, 0.f, net.batch * bands * Layers(net).size);
  Scratch scratch(Transposed::floats(net));
  const Transposed back(net, scratch.data());
  bilateral_backward_logits(dtype, grad_dtype, net, guidance, grad, back, {bands}, grad_logits, grad_guidance, grad_params,
                            threads);
  bilateral_backward_guidance(dtype, net, guidance, back, {bands}, grad_logits, grad_guidance, grad_params, threads);
}

}  // namespace MURF_LEVEL
}  // namespace murf
