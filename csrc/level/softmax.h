// Row reductions of a softmax, in float32.
#pragma once

#include "rows.h"

namespace murf {
namespace MURF_LEVEL {

inline float max_of(const float* v, int64_t n) {
  float largest = v[0];
#pragma omp simd reduction(max : largest)
  for (int64_t i = 0; i < n; ++i) largest = v[i] > largest ? v[i] : largest;
  return largest;
}

inline float sum_of(const float* v, int64_t n) {
  float total = 0.f;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += v[i];
  return total;
}

inline float dot_of(const float* a, const float* b, int64_t n) {
  float total = 0.f;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += a[i] * b[i];
  return total;
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

}  // namespace MURF_LEVEL
}  // namespace murf
