// upsample_cross_entropy: the loss of every pixel and the gradients of the low-resolution logits, without
// full-resolution logits in either direction. Per pixel, with target t, class weights w and smoothing e over K classes:
//   loss = (1 - e) w_t (lse - z_t) + e / K sum_k w_k (lse - z_k)
//   d loss / d z_k = (1 - e) w_t (p_k - [k = t]) + e / K (p_k sum_j w_j - w_k)
// `lse` is kept in two parts, the largest logit of every pixel and then the logarithm of the sum of exp(z - largest):
// their sum would have the digits of the largest logit only.
#include <math.h>

#include "activations.h"
#include "adjoint.h"
#include "kernels.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

float weight_of(CrossEntropy ce, int64_t k) { return ce.weight == nullptr ? 1.f : ce.weight[k]; }

void forward(DType dtype, Maps maps, Grid grid, Bias bias, CrossEntropy ce, float* loss, float* lse, int threads) {
  const int64_t n = grid.channels, rows_size = rows_floats(maps);
  const int64_t share = rows_size + padded(n) + PixelTaps::floats(maps);
  const float smooth = ce.label_smoothing / float(n);
  const float weight_sum = ce.weight == nullptr ? float(n) : sum_of(ce.weight, n);
  float *largest = lse, *log_sums = lse + grid.batch * grid.height * grid.width;
  Scratch scratch(share * threads);
  parallel(threads, grid.batch * grid.height, [&](int thread, int64_t begin, int64_t end) {
    float* rows = scratch.data() + thread * share;
    float* pixel = rows + rows_size;
    PixelTaps taps(maps, pixel + padded(n));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / grid.height;
      vertical_rows(dtype, maps, b, task % grid.height, rows);
      for (int64_t x = 0; x < grid.width; ++x) {
        const int64_t at = task * grid.width + x, target = ce.target[at];
        loss[at] = largest[at] = log_sums[at] = 0.f;
        if (target == ce.ignore_index) continue;
        taps.select(rows, x);
        taps.sum(bias_row(bias, b), pixel);
        const float shift = max_of(pixel, n);
        for (int64_t i = 0; i < n; ++i) pixel[i] -= shift;
        const float logit = pixel[target];
        float smoothing = 0.f;
        if (smooth > 0.f)
          smoothing = ce.weight == nullptr ? sum_of(pixel, n) : dot_of(pixel, ce.weight, n);
        const float log_sum = logf(exp_row(pixel, 0.f, n));
        largest[at] = shift;
        log_sums[at] = log_sum;
        loss[at] = (1.f - ce.label_smoothing) * weight_of(ce, target) * (log_sum - logit);
        if (smooth > 0.f) loss[at] += smooth * (weight_sum * log_sum - smoothing);
      }
    }
  });
}

void backward(DType dtype, Maps maps, Grid grid, Bias bias, CrossEntropy ce, const float* lse, const float* grad_loss,
              float* const* gradients, int threads) {
  const int64_t n = grid.channels;
  const float smooth = ce.label_smoothing / float(n);
  const float weight_sum = ce.weight == nullptr ? float(n) : sum_of(ce.weight, n);
  const float *largest = lse, *log_sums = lse + grid.batch * grid.height * grid.width;
  spread_pixel_gradients(dtype, maps, grid, bias, gradients, threads,
                            [&](int64_t b, int64_t y, int64_t x, bool, float* v) {
    const int64_t at = (b * grid.height + y) * grid.width + x, target = ce.target[at];
    if (target == ce.ignore_index) return false;
    const float hard = grad_loss[at] * (1.f - ce.label_smoothing) * weight_of(ce, target);
    const float soft = grad_loss[at] * smooth, scale = hard + soft * weight_sum;
    const float shift = largest[at], log_sum = log_sums[at];
    for (int64_t i = 0; i < n; ++i) v[i] = scale * exp_row_element((v[i] - shift) - log_sum);
    v[target] -= hard;
    if (soft != 0.f) {
      if (ce.weight == nullptr) {
        for (int64_t i = 0; i < n; ++i) v[i] -= soft;
      } else {
        for (int64_t i = 0; i < n; ++i) v[i] -= soft * ce.weight[i];
      }
    }
    return true;
  });
}

}  // namespace

void upsample_cross_entropy(DType dtype, Maps maps, Grid grid, Bias bias, CrossEntropy ce, float* loss, float* lse,
                            int threads) {
  forward(dtype, maps, grid, bias, ce, loss, lse, threads);
}

void upsample_cross_entropy_backward(DType dtype, Maps maps, Grid grid, Bias bias, CrossEntropy ce, const float* lse,
                                     const float* grad_loss, float* const* gradients, int threads) {
  backward(dtype, maps, grid, bias, ce, lse, grad_loss, gradients, threads);
}

}  // namespace MURF_LEVEL
}  // namespace murf
