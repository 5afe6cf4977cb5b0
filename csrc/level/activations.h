// e^x, erf and what is made of them, in float32 and vectorizable: softmax and GELU.
#pragma once

#include "simd.h"

namespace murf {
namespace MURF_LEVEL {

// e^x within 2 ulp for x in [-87, 88]; 0 below, so that a softmax of -inf logits is exact. NaN stays NaN.
inline float exp_row_element(float x) {
  const float clamped = x < -87.3f ? -87.3f : (x > 88.7f ? 88.7f : x);
  const float shifted = clamped * 1.44269504f + 12582912.f;  // 1.5 * 2^23: rounds to an integer
  const float n = shifted - 12582912.f;
  const float r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  // Two half steps keep the scale representable for n = 128.
  const int32_t whole = int32_t(bits_of(shifted)) - 0x4b400000;
  const int32_t half = whole >> 1;
  const float scale = float_of(uint32_t(half + 127) << 23) * float_of(uint32_t(whole - half + 127) << 23);
  return x < -87.3f ? 0.f : p * scale;
}

// The same for x <= 0, as a softmax has it: no scale overflows.
inline Vec exp_of_negative(Vec x) {
  const Vec least = splat(-87.3f);
  const Vec clamped = x < least ? least : x;
  const Vec shifted = clamped * 1.44269504f + 12582912.f;
  const Vec n = shifted - 12582912.f;
  const Vec r = (clamped - n * 0.693359375f) + n * 2.12194440e-4f;
  Vec p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.f;
  // The lowest bits of `shifted` are n; they become the exponent.
  const UintVec scale = (UintVec(shifted) << 23) + 0x3f800000u;
  return x < least ? Vec{} : p * Vec(scale);
}

// v[i] = exp(v[i] - shift); returns the sum.
inline float exp_row(float* v, float shift, int64_t n) {
  float total = 0.f;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) {
    const float e = exp_row_element(v[i] - shift);
    v[i] = e;
    total += e;
  }
  return total;
}

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

// The exact (erf) GELU.
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
