// The exact (erf) GELU and its derivative, vectorizable.
#pragma once

#include "rows.h"

namespace murf {
namespace MURF_LEVEL {

// Within 3.5e-7 of erf: a rational approximation x N(x^2) / D(x^2), fitted on [0, 3.925]; erf is 1 in float32 beyond.
inline float erf_row_element(float x) {
  const float limited = x < -3.925f ? -3.925f : (x > 3.925f ? 3.925f : x);
  const float z = limited * limited;
  float n = -1.28243886e-08f;
  n = n * z + 4.61371303e-06f;
  n = n * z + 0.000376931979f;
  n = n * z + 0.00383952712f;
  n = n * z + 0.0542491189f;
  n = n * z + 0.185145689f;
  n = n * z + 1.12837917f;
  float d = 6.24411824e-05f;
  d = d * z + 0.00130193941f;
  d = d * z + 0.0154324706f;
  d = d * z + 0.113881383f;
  d = d * z + 0.497414501f;
  d = d * z + 1.f;
  return limited * n / d;
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
