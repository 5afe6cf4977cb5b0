// upsample_expectation: per pixel, a distribution over channels made from the summed, resized logits (softmax, or
// relu + 0.1 normalized) and dotted with one value per channel: the depth head of DINOv2 and MuRF.
#include "activations.h"
#include "adjoint.h"
#include "kernels.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

constexpr float kLinearFloor = 0.1f;

float floored(float logit) { return (logit < 0.f ? 0.f : logit) + kLinearFloor; }

// Turns logits into the unnormalized distribution in place and returns its sum.
float distribution(float* v, int64_t n, bool softmax) {
  if (softmax) return exp_row(v, max_of(v, n), n);
  for (int64_t i = 0; i < n; ++i) v[i] = floored(v[i]);
  return sum_of(v, n);
}

void forward(DType dtype, Maps maps, Grid grid, Bias bias, const float* values, bool softmax, float* out, int threads) {
  const int64_t n = grid.channels, rows_size = rows_floats(maps);
  const int64_t share = rows_size + padded(n) + PixelTaps::floats(maps);
  Scratch scratch(share * threads);
  parallel(threads, grid.batch * grid.height, [&](int thread, int64_t begin, int64_t end) {
    float* rows = scratch.data() + thread * share;
    float* pixel = rows + rows_size;
    PixelTaps taps(maps, pixel + padded(n));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / grid.height;
      vertical_rows(dtype, maps, b, task % grid.height, rows);
      for (int64_t x = 0; x < grid.width; ++x) {
        taps.select(rows, x);
        taps.sum(bias_row(bias, b), pixel);
        const float total = distribution(pixel, n, softmax);
        out[task * grid.width + x] = dot_of(pixel, values, n) / total;
      }
    }
  });
}

// d out / d logit_k = p_k (value_k - out) for the softmax; for the linear norm p_k is 1 / sum where the logit is > 0.
void backward(DType dtype, Maps maps, Grid grid, Bias bias, const float* values, bool softmax, const float* grad_out,
              float* const* gradients, float* row_value_gradients, int threads) {
  const int64_t n = grid.channels;
  spread_pixel_gradients(dtype, maps, grid, bias, gradients, threads,
                            [&](int64_t b, int64_t y, int64_t x, bool owned, float* v) {
    const int64_t row = b * grid.height + y;
    const float upstream = grad_out[row * grid.width + x];
    float* sums = owned && row_value_gradients != nullptr ? row_value_gradients + row * n : nullptr;
    if (!softmax) {
      // The logits stay: the slope of relu is that of their sign, which beside the floor is rounded away.
      float total = 0.f, moment = 0.f;
      for (int64_t i = 0; i < n; ++i) {
        total += floored(v[i]);
        moment += floored(v[i]) * values[i];
      }
      const float expectation = moment / total, scale = upstream / total;
      if (sums != nullptr)
        for (int64_t i = 0; i < n; ++i) sums[i] += scale * floored(v[i]);
      for (int64_t i = 0; i < n; ++i) v[i] = v[i] > 0.f ? scale * (values[i] - expectation) : 0.f;
      return true;
    }
    const float total = exp_row(v, max_of(v, n), n);
    const float expectation = dot_of(v, values, n) / total, scale = upstream / total;
    if (sums != nullptr)
      for (int64_t i = 0; i < n; ++i) sums[i] += scale * v[i];
    for (int64_t i = 0; i < n; ++i) v[i] = scale * v[i] * (values[i] - expectation);
    return true;
  });
}

}  // namespace

void upsample_expectation(DType dtype, Maps maps, Grid grid, Bias bias, const float* values, bool softmax, float* out,
                          int threads) {
  forward(dtype, maps, grid, bias, values, softmax, out, threads);
}

void upsample_expectation_backward(DType dtype, Maps maps, Grid grid, Bias bias, const float* values, bool softmax,
                                   const float* grad_out, float* const* gradients, float* row_value_gradients,
                                   int threads) {
  backward(dtype, maps, grid, bias, values, softmax, grad_out, gradients, row_value_gradients, threads);
}

}  // namespace MURF_LEVEL
}  // namespace murf
