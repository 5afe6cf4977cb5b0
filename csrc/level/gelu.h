// The exact (erf) GELU and its derivative, vectorizable.
#pragma once

#include "rows.h"

namespace murf {
namespace MURF_LEVEL {

// Within 1.5e-7 of erf: an odd polynomial below 1, and 1 - e^P(x) above, P fitted to log(erfc(x)) on [1, 4]; erf is 1 in
// float32 beyond.
inline float erf_row_element(float x) {
  const float magnitude = x < 0.f ? -x : x;
  const float limited = magnitude > 4.f ? 4.f : magnitude;
  const float z = limited * limited, u = limited - 2.f;
  float near = 7.85410201e-05f;
  near = near * z + -0.000801027319f;
  near = near * z + 0.00518833781f;
  near = near * z + -0.0268538181f;
  near = near * z + 0.112835853f;
  near = near * z + -0.376126258f;
  near = near * z + 1.12837917f;
  float far = 2.51337112e-07f;
  far = far * u + -2.12935445e-05f;
  far = far * u + 0.000137529306f;
  far = far * u + -0.000730776017f;
  far = far * u + 0.00357035005f;
  far = far * u + -0.0164656891f;
  far = far * u + -0.923750921f;
  far = far * u + -4.41816078f;
  far = far * u + -5.36494126f;
  const float result = limited < 1.f ? limited * near : 1.f - exp_row_element(far);
  return x < 0.f ? -result : result;
}

inline void gelu_row(float* __restrict dst, const float* __restrict src, float scale, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float x = src[i];
    dst[i] = scale * (0.5f * x * (1.f + erf_row_element(x * 0.707106781f)));
  }
}

// grad *= scale * GELU'(x)
inline void gelu_backward_row(float* __restrict grad, const float* __restrict src, float scale, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float x = src[i];
    const float cumulative = 0.5f * (1.f + erf_row_element(x * 0.707106781f));
    const float density = 0.398942280f * exp_row_element(-0.5f * x * x);
    grad[i] *= scale * (cumulative + x * density);
  }
}

}  // namespace MURF_LEVEL
}  // namespace murf
