// The kernels of one instruction-set level: name, arguments, and what the bindings do before the kernel runs: check that
// the arguments fit each other (check.h) and estimate the work (work.h), from which the threads of the call follow. Each
// kernel is declared once, here; it becomes a field of the Kernels table that dispatch.cpp chooses from, and a function
// of the extension with these arguments as keywords (bind/module.cpp).
#pragma once

#include "folded.h"
#include "types.h"

#define MURF_KERNELS(X)                                                                                              \
  X(upsample_concat, (DType dtype, Maps maps, Grid grid, void* out, int threads),                                    \
    (check::make_up(maps, grid), work::resample(maps, grid)))                                                        \
  X(upsample_concat_planar, (DType dtype, Maps maps, Grid grid, void* out, int threads),                             \
    (check::make_up(maps, grid), work::resample(maps, grid)))                                                        \
  X(upsample_sum,                                                                                                    \
    (DType dtype, Maps maps, Grid grid, Bias bias, void* out, bool channels_last, int64_t out_stride_b, int threads), \
    (check::share(maps, grid), work::resample(maps, grid)))                                                          \
  X(resize_adjoint, (DType dtype, Map grad, int64_t batch, void* out, bool channels_last, int threads),              \
    (check::gradient(grad, batch), work::adjoint(grad, batch)))                                                      \
  X(upsample_argmax,                                                                                                 \
    (DType dtype, Maps maps, Grid grid, Bias bias, int label_bytes, void* labels, void* values, int threads),        \
    (check::share(maps, grid), work::resample(maps, grid)))                                                          \
  X(upsample_confusion,                                                                                              \
    (DType dtype, Maps maps, Grid grid, Bias bias, Labels target, int64_t* counts, int threads),                      \
    (check::share(maps, grid), check::labels("upsample_confusion", target, grid), work::resample(maps, grid)))        \
  X(upsample_expectation,                                                                                            \
    (DType dtype, Maps maps, Grid grid, Bias bias, const float* values, bool softmax, float* out, int threads),      \
    (check::share(maps, grid), work::softmax(maps, grid)))                                                           \
  X(upsample_expectation_backward,                                                                                   \
    (DType dtype, Maps maps, Grid grid, Bias bias, const float* values, bool softmax, const float* grad_out,         \
     float* const* gradients, float* row_value_gradients, int threads),                                              \
    (check::share(maps, grid), work::softmax(maps, grid)))                                                           \
  X(upsample_cross_entropy,                                                                                          \
    (DType dtype, Maps maps, Grid grid, Bias bias, CrossEntropy ce, float* loss, float* lse, int threads),           \
    (check::share(maps, grid), work::softmax(maps, grid)))                                                           \
  X(upsample_cross_entropy_backward,                                                                                 \
    (DType dtype, Maps maps, Grid grid, Bias bias, CrossEntropy ce, const float* lse, const float* grad_loss,        \
     float* const* gradients, int threads),                                                                          \
    (check::share(maps, grid), check::labels(ce, grid), work::softmax(maps, grid)))                                  \
  X(adaptive_conv,                                                                                                   \
    (DType dtype, DType kernels_dtype, AdaptiveConv conv, Strided source, Strided kernels, const float* bias,        \
     Strided out, int threads),                                                                                      \
    work::adaptive_conv(conv))                                                                                       \
  X(adaptive_conv_backward_source,                                                                                   \
    (DType dtype, DType kernels_dtype, AdaptiveConv conv, Strided grad, Strided kernels, Strided out, int threads),  \
    work::adaptive_conv(conv))                                                                                       \
  X(adaptive_conv_backward_kernels,                                                                                  \
    (DType dtype, DType kernels_dtype, AdaptiveConv conv, Strided grad, Strided source, Strided out, int threads),   \
    work::adaptive_conv(conv))                                                                                       \
  X(bilateral_kernels, (DType dtype, DType out_dtype, Bilateral net, Strided guidance, Strided out, int threads),    \
    work::bilateral(net))                                                                                            \
  X(bilateral_kernels_backward,                                                                                      \
    (DType dtype, DType grad_dtype, Bilateral net, Strided guidance, Strided grad, int64_t bands,                    \
     float* grad_logits, float* grad_guidance, float* grad_params, int threads),                                     \
    work::bilateral(net))                                                                                            \
  X(gaussian_bilateral_upsample, (DType dtype, GaussianBilateral upsampling, Strided out, int threads),              \
    work::gaussian_bilateral(upsampling))                                                                            \
  X(gaussian_bilateral_upsample_backward,                                                                            \
    (DType dtype, GaussianBilateral upsampling, Strided grad, int64_t shares, float* grad_values,                    \
     float* grad_guidance, float* sums, int threads),                                                                \
    work::gaussian_bilateral(upsampling))                                                                            \
  X(image_to_patches,                                                                                                \
    (bool is_uint8, DType dtype, DType out_dtype, Image image, Axis y, Axis x, PatchRows rows, void* out,            \
     int threads),                                                                                                   \
    work::image_to_patches(image, y, x))                                                                             \
  X(window_attention, (DType dtype, WindowAttention attention, Strided out, float* lse, int threads),                \
    work::window_attention(attention))                                                                               \
  X(window_attention_argmax,                                                                                         \
    (DType dtype, WindowAttention attention, Bias bias, int label_bytes, void* labels, int threads),                 \
    work::window_attention(attention))                                                                               \
  X(window_attention_backward, (DType dtype, WindowAttention attention, WindowGradients gradients, int threads),     \
    work::window_attention(attention))                                                                               \
  X(feature_unify, (DType dtype, FeatureUnify unify, Strided out, int threads), work::feature_unify(unify))          \
  X(feature_unify_backward,                                                                                          \
    (DType dtype, FeatureUnify unify, Strided grad_out, Strided grad_features, float* grad_basis, int64_t shares,    \
     int threads),                                                                                                   \
    work::feature_unify(unify))                                                                                      \
  X(dense_attention, (DType dtype, DenseAttention attention, int threads),                                           \
    (check::multiplies(dtype), work::dense_attention(attention)))                                                    \
  X(pixel_linear, (DType dtype, PixelLinear layer, int threads),                                                     \
    (check::multiplies(dtype), work::pixel_linear(layer)))                                                           \
  X(pixel_conv, (PixelConv layer, int threads), work::pixel_conv(layer))                                             \
  X(pixel_conv_direct, (PixelConv layer, int threads), work::pixel_conv(layer))                                      \
  X(nearest_prepare,                                                                                                 \
    (NearestRows x, const float* mean, DType out_dtype, void* out, int64_t out_stride, NearestRole role,             \
     double* squared_norms, double* errors, int threads),                                                            \
    work::rows(x))                                                                                                   \
  X(nearest_scan,                                                                                                    \
    (DType product_dtype, const void* products, NearestBlock block, NearestRows query, NearestRows bank,             \
     NearestState state, NearestMetric metric, int threads),                                                         \
    work::nearest_scan(query, block))                                                                                \
  X(nearest_finish,                                                                                                  \
    (NearestRows query, NearestRows bank, NearestState state, NearestMetric metric, float* distances,                \
     int64_t* indices, int threads),                                                                                 \
    work::nearest_finish(query, state))                                                                              \
  X(k_center_encode, (NearestRows x, const float* mean, KCenterCodes codes, int threads), work::rows(x))             \
  X(k_center_steps,                                                                                                  \
    (NearestRows x, KCenterCodes codes, double* nearest, int64_t* centers, int64_t given, int64_t begin,             \
     int64_t end, int threads),                                                                                      \
    work::rows(x))                                                                                                   \
  X(stream_fill, (void* out, int64_t bytes, int threads), work::fill(bytes))

namespace murf {

struct Kernels {
#define MURF_FIELD(name, arguments, work) void(*name) arguments;
  MURF_KERNELS(MURF_FIELD)
#undef MURF_FIELD
};

#if defined(MURF_LEVEL)
namespace MURF_LEVEL {
#define MURF_DECLARE(name, arguments, work) void name arguments;
MURF_KERNELS(MURF_DECLARE)
#undef MURF_DECLARE
extern const Kernels kernels;
}  // namespace MURF_LEVEL
#endif

}  // namespace murf
