// bilateral_kernels, backward: from the kernels of every pixel to its logits, its guidance behind the fix-up, and the
// parameters of both on the way.
#include <math.h>

#include "activations.h"
#include "bilateral_backward.h"
#include "bilateral_tile.h"

namespace murf {
namespace MURF_LEVEL {
void bilateral_backward_logits(DType dtype, DType grad_dtype, const Bilateral& net, const Strided& guidance,
                               const Strided& grad, const Transposed& back, Bands bands, float* grad_logits,
                               float* grad_guidance, float* grad_params, int threads) {
  const Layers layers(net);
  const int64_t taps = layers.taps, inputs = taps + net.guides, diameter = 2 * net.radius + 1;
  const int64_t ring = padded(ProjectedRows::floats(net)), tile_floats = padded(Tile::floats(net));
  const int64_t share = ring + tile_floats + (2 * taps + inputs + 2) * kPitch + padded((taps + inputs) * kPointerFloats);
  Scratch scratch(share * threads);
  parallel(threads, net.batch * bands.count, [&](int thread, int64_t first, int64_t last) {
    float* at = scratch.data() + thread * share;
    ProjectedRows rows(dtype, net, guidance, at);
    Tile tile(net, at + ring);
    float* g = at + ring + tile_floats;     // gradient of the kernels, later of the logits
    float* inner = g + taps * kPitch;       // of the fix-up's hidden layer
    float* input = inner + taps * kPitch;   // of the fix-up's input
    float* sum0 = input + inputs * kPitch;
    float* sum1 = sum0 + kPitch;
    const float** pointers = reinterpret_cast<const float**>(sum1 + kPitch);
    const float raw = expf(net.params[0]), sigma = net.params[1];
    const bool inside = raw >= 1e-4f && raw <= 1e4f;
    for (int64_t task = first; task < last; ++task) {
      const int64_t b = task / bands.count, band = task % bands.count;
      float* sums = grad_params + task * layers.size;
      double grad_temp = 0, grad_sigma = 0;
      for (int64_t y = bands.begin(net, band); y < bands.begin(net, band + 1); ++y)
        for (int64_t x = 0; x < net.width; x += kTile) {
          const int64_t length = min64(kTile, net.width - x), width = padded(length);
          const int64_t from = b * grad.stride_b + y * grad.stride_y + x * grad.stride_x;
          with_dtype(grad_dtype, [&](auto tag) {
            const auto* src = static_cast<const decltype(tag)*>(grad.data) + from;
            for (int64_t i = 0; i < length; ++i)
              for (int64_t t = 0; t < taps; ++t)
                g[t * kPitch + i] = to_float(src[i * grad.stride_x + t * grad.stride_c]);
          });
          for (int64_t t = 0; t < taps; ++t) fill_row(g + t * kPitch + length, 0.f, width - length);
          tile.normalized(rows, b, y, x, width);
          if (net.fixup) {
            load_guidance(dtype, tile.kernels + taps * kPitch, kPitch, guidance, net.guides, b, y, x, length, width);
            tile.fixup_hidden(b, width);
            apply_dense(back.fixup1, g, kPitch, inner, kPitch, width);
            add_weight_gradient(sums + layers.fixup_weight1, sums + layers.fixup_bias1, g, taps, kPitch, tile.hidden,
                                taps, kPitch, width, pointers);
            for (int64_t t = 0; t < taps; ++t)
              gelu_backward_row(inner + t * kPitch, tile.before + t * kPitch, 0.1f * tile.fixup_mask(b, t), width);
            apply_dense(back.fixup0, inner, kPitch, input, kPitch, width);
            add_weight_gradient(sums + layers.fixup_weight0, sums + layers.fixup_bias0, inner, taps, kPitch,
                                tile.kernels, inputs, kPitch, width, pointers);
            for (int64_t t = 0; t < taps; ++t) add_scaled_row(g + t * kPitch, input + t * kPitch, 1.f, width);
          }
          for (int64_t k = 0; k < net.guides; ++k) {
            float* to = grad_guidance + ((b * net.height + y) * net.guides + k) * net.width + x;
            if (net.fixup) load_row(to, input + (taps + k) * kPitch, length);
            else fill_row(to, 0.f, length);
          }
          // kernels = similarity * spatial / total, unless the clamp holds
          fill_row(sum0, 0.f, width);
          for (int64_t t = 0; t < taps; ++t) {
            const float* k = tile.kernels + t * kPitch;
            for (int64_t i = 0; i < width; ++i) sum0[i] += g[t * kPitch + i] * k[i];
          }
          // Distances count from their mean under the kernel: what they are measured from makes no difference in exact
          // arithmetic, and the error of the sum above cancels.
          float* center = tile.before;
          fill_row(center, 0.f, width);
          for (int64_t t = 0; t < taps; ++t)
            add_scaled_row(center, tile.kernels + t * kPitch, tile.distance(t / diameter, t % diameter), width);
          for (int64_t i = 0; i < width; ++i) {
            const bool clamped = tile.total[i] < 1e-7f;
            sum1[i] = 1.f / (clamped ? 1e-7f : tile.total[i]);
            sum0[i] = clamped ? 0.f : sum0[i];
            center[i] = clamped ? 0.f : center[i];
          }
          for (int64_t t = 0; t < taps; ++t) {
            float* d = g + t * kPitch;
            const float* r = tile.similarity + t * kPitch;
            const Vec distance = splat(tile.distance(t / diameter, t % diameter));
            Vec weighted{};
            for (int64_t i = 0; i < width; i += kLanes) {
              const Vec v = (load_vec(d + i) - load_vec(sum0 + i)) * load_vec(sum1 + i);
              store_vec(d + i, v * tile.spatial[t]);
              weighted += v * load_vec(r + i) * (distance - load_vec(center + i));
            }
            grad_sigma += double(sum_vec(weighted)) * tile.spatial[t] / (double(sigma) * sigma * sigma);
          }
          // similarity = softmax(temperature * logits)
          fill_row(sum0, 0.f, width);
          for (int64_t t = 0; t < taps; ++t) {
            const float* r = tile.similarity + t * kPitch;
            for (int64_t i = 0; i < width; ++i) sum0[i] += g[t * kPitch + i] * r[i];
          }
          for (int64_t t = 0; t < taps; ++t) {
            float* d = g + t * kPitch;
            const float* r = tile.similarity + t * kPitch;
            const float* l = tile.logits + t * kPitch;
            Vec weighted{};
            for (int64_t i = 0; i < width; i += kLanes) {
              const Vec v = (load_vec(d + i) - load_vec(sum0 + i)) * load_vec(r + i);
              weighted += v * load_vec(l + i);
              store_vec(d + i, v * tile.temperature);
            }
            grad_temp += double(sum_vec(weighted));
            load_row(grad_logits + ((b * net.height + y) * taps + t) * net.width + x, d, length);
          }
        }
      if (net.fixup)  // the fix-up adds a tenth of its output
        for (int64_t i = layers.fixup_weight1; i < layers.size; ++i) sums[i] *= 0.1f;
      sums[0] = inside ? float(grad_temp * raw) : 0.f;
      sums[1] = float(grad_sigma);
    }
  });
}

}  // namespace MURF_LEVEL
}  // namespace murf
