// The kernels of one instruction-set level. Each kernel is declared once, here, and becomes a field of the Kernels table
// that dispatch.cpp chooses from.
#pragma once

#include "folded.h"
#include "types.h"

#define MURF_KERNELS(X)                                                                                              \
  X(upsample_concat, (DType dtype, Maps maps, Grid grid, void* out, int threads))                                    \
  X(upsample_sum, (DType dtype, Maps maps, Grid grid, Bias bias, void* out, bool channels_last,                      \
                   int64_t out_stride_b, int threads))                                                               \
  X(resize_adjoint, (DType dtype, Map map, int64_t batch, void* out, bool channels_last, int threads))               \
  X(upsample_argmax,                                                                                                 \
    (DType dtype, Maps maps, Grid grid, Bias bias, int label_bytes, void* labels, void* values, int threads))        \
  X(upsample_expectation, (DType dtype, Maps maps, Grid grid, Bias bias, const float* values, bool softmax,          \
                           float* out, int threads))                                                                 \
  X(upsample_expectation_backward,                                                                                   \
    (DType dtype, Maps maps, Grid grid, Bias bias, const float* values, bool softmax, const float* grad_out,         \
     float* const* gradients, float* row_value_gradients, int threads))                                              \
  X(upsample_cross_entropy, (DType dtype, Maps maps, Grid grid, Bias bias, CrossEntropy ce, float* loss, float* lse, \
                             int threads))                                                                           \
  X(upsample_cross_entropy_backward, (DType dtype, Maps maps, Grid grid, Bias bias, CrossEntropy ce,                 \
                                      const float* lse, const float* grad_loss, float* const* gradients, int threads))\
  X(adaptive_conv, (DType dtype, DType kernels_dtype, AdaptiveConv conv, Strided source, Strided kernels,            \
                    const float* bias, Strided out, int threads))                                                    \
  X(adaptive_conv_backward_source, (DType dtype, DType kernels_dtype, AdaptiveConv conv, Strided grad,               \
                                    Strided kernels, Strided out, int threads))                                      \
  X(adaptive_conv_backward_kernels, (DType dtype, DType kernels_dtype, AdaptiveConv conv, Strided grad,              \
                                     Strided source, Strided out, int threads))                                      \
  X(bilateral_kernels,                                                                                               \
    (DType dtype, DType out_dtype, Bilateral net, Strided guidance, Strided out, int threads))                       \
  X(bilateral_kernels_backward,                                                                                      \
    (DType dtype, DType grad_dtype, Bilateral net, Strided guidance, Strided grad, int64_t bands,                    \
     float* grad_logits, float* grad_guidance, float* grad_params, int threads))                                       \
  X(image_to_patches, (bool is_uint8, DType in, DType out, Image image, Axis axis_y, Axis axis_x, PatchRows rows,    \
                       void* result, int threads))                                                                   \
  X(window_attention, (DType dtype, WindowAttention attention, Strided out, float* lse, int threads))                \
  X(window_attention_backward,                                                                                       \
    (DType dtype, WindowAttention attention, WindowGradients gradients, int threads))                                \
  X(feature_unify, (DType dtype, FeatureUnify unify, Strided out, int threads))                                      \
  X(feature_unify_backward, (DType dtype, FeatureUnify unify, Strided grad_out, Strided grad_features,               \
                             float* grad_basis, int64_t shares, int threads))                                        \
  X(pixel_linear, (PixelLinear layer, int threads))                                                                  \
  X(nearest_prepare, (NearestRows x, const float* mean, DType out_dtype, void* out, int64_t out_stride,              \
                      NearestRole role, double* squared_norms, double* errors, int threads))                         \
  X(nearest_scan, (DType product_dtype, const void* products, NearestBlock block, NearestRows query,                 \
                   NearestRows bank, NearestState state, int threads))                                               \
  X(nearest_finish, (NearestRows query, NearestRows bank, NearestState state, NearestMetric metric,                  \
                     float* distances, int64_t* indices, int threads))                                               \
  X(k_center_encode, (NearestRows x, const float* mean, KCenterCodes codes, int threads))                            \
  X(k_center_steps, (NearestRows x, KCenterCodes codes, double* nearest, int64_t* centers, int64_t given,            \
                     int64_t begin, int64_t end, int threads))                                                       \
  X(stream_fill, (void* out, int64_t bytes, int threads))

namespace murf {

struct Kernels {
#define MURF_FIELD(name, arguments) void(*name) arguments;
  MURF_KERNELS(MURF_FIELD)
#undef MURF_FIELD
};

#if defined(MURF_LEVEL)
namespace MURF_LEVEL {
#define MURF_DECLARE(name, arguments) void name arguments;
MURF_KERNELS(MURF_DECLARE)
#undef MURF_DECLARE
extern const Kernels kernels;
}  // namespace MURF_LEVEL
#endif

}  // namespace murf
