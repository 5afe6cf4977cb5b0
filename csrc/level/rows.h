// Row primitives: float32 arithmetic on contiguous runs of float32, bfloat16 or float16. Plain loops that the compiler
// vectorizes for the level it is told to build; only the non-temporal store needs builtins (<immintrin.h> would take half
// of the time of a small source). What is long to compile and would be a call anyhow is compiled once, in rows.cpp.
#pragma once

#include "simd.h"

namespace murf {
namespace MURF_LEVEL {

// Sums of more terms than this are taken in double: in float32 a million ones, a millionth each, are 1.009.
constexpr int64_t kShortSum = 64;

template <class Sum>
inline void fill_row(Sum* dst, float value, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = Sum(value);
}

template <class T>
inline void load_row(float* __restrict dst, const T* __restrict src, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = to_float(src[i]);
}

template <class T, class Sum>
inline void store_row(T* __restrict dst, const Sum* __restrict src, int64_t n) {
  for (int64_t i = 0; i < n; ++i) from_float(float(src[i]), dst[i]);
}

// dst = w * src, or dst += w * src in the precision of dst
template <class T>
inline void scale_row(float* __restrict dst, const T* __restrict src, float w, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = w * to_float(src[i]);
}
template <class Sum, class T>
inline void add_scaled_row(Sum* __restrict dst, const T* __restrict src, float w, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] += Sum(w) * Sum(to_float(src[i]));
}
inline void add_scaled_row(double* __restrict dst, const double* __restrict src, float w, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] += double(w) * src[i];
}

template <int Taps, bool Accumulate>
inline void combine_fixed(float* __restrict dst, const float* const* src, const float* w, int64_t n) {
  const float* __restrict s0 = src[0];
  const float* __restrict s1 = src[Taps > 1 ? 1 : 0];
  const float* __restrict s2 = src[Taps > 2 ? 2 : 0];
  const float* __restrict s3 = src[Taps > 3 ? 3 : 0];
  const float w0 = w[0], w1 = w[Taps > 1 ? 1 : 0], w2 = w[Taps > 2 ? 2 : 0], w3 = w[Taps > 3 ? 3 : 0];
  for (int64_t i = 0; i < n; ++i) {
    float v = w0 * s0[i];
    if constexpr (Taps > 1) v += w1 * s1[i];
    if constexpr (Taps > 2) v += w2 * s2[i];
    if constexpr (Taps > 3) v += w3 * s3[i];
    if constexpr (Accumulate) v += dst[i];
    dst[i] = v;
  }
}

// dst (+)= sum_t w[t] * src[t] for few taps, four rows at a time
inline void combine_few(float* dst, const float* const* src, const float* w, int64_t taps, int64_t n, bool accumulate) {
  if (taps == 0 && !accumulate) fill_row(dst, 0.f, n);
  while (taps > 0) {
    const int64_t now = min64(taps, 4);
    if (accumulate) {
      if (now == 1) combine_fixed<1, true>(dst, src, w, n);
      else if (now == 2) combine_fixed<2, true>(dst, src, w, n);
      else if (now == 3) combine_fixed<3, true>(dst, src, w, n);
      else combine_fixed<4, true>(dst, src, w, n);
    } else {
      if (now == 1) combine_fixed<1, false>(dst, src, w, n);
      else if (now == 2) combine_fixed<2, false>(dst, src, w, n);
      else if (now == 3) combine_fixed<3, false>(dst, src, w, n);
      else combine_fixed<4, false>(dst, src, w, n);
    }
    src += now, w += now, taps -= now, accumulate = true;
  }
}

// The sums of more than kShortSum taps: pairs of pairs of pairs in float32, and those in double.
void combine_long(float* dst, const float* const* src, const float* w, int64_t taps, int64_t n, bool accumulate);
void combine_long_strided(float* dst, const float* src, int64_t step, const float* w, int64_t taps, int64_t n);

// dst (+)= sum_t w[t] * src[t]. Few taps are inline: they are a pixel's.
inline void combine(float* dst, const float* const* src, const float* w, int64_t taps, int64_t n, bool accumulate) {
  if (taps > kShortSum) combine_long(dst, src, w, taps, n, accumulate);
  else combine_few(dst, src, w, taps, n, accumulate);
}

// The same for taps that lie `step` apart: dst = sum_t w[t] * src[t * step + i]
inline void combine_strided(float* dst, const float* src, int64_t step, const float* w, int64_t taps, int64_t n) {
  if (taps == 0) fill_row(dst, 0.f, n);
  if (taps > kShortSum) return combine_long_strided(dst, src, step, w, taps, n);
  for (int64_t t = 0; t < taps; t += 4) {
    const float* rows[4] = {src + t * step, src + (t + 1) * step, src + (t + 2) * step, src + (t + 3) * step};
    combine_few(dst, rows, w + t, min64(taps - t, 4), n, t > 0);
  }
}

// The same from rows of any dtype, a row at a time; float, bf16, f16 and uint8_t.
template <class T>
void combine_rows(float* dst, const T* src, int64_t step, const float* w, int64_t taps, int64_t n);

// Rows of a map whose dtype is known at run time, `from` or `to` elements into it and with values `stride` apart. What
// reads and writes its maps by these has one body for all dtypes, and the processor's time goes elsewhere.
void load_values(float* dst, DType dtype, const void* src, int64_t from, int64_t stride, int64_t n);
void store_values(DType dtype, void* dst, int64_t to, int64_t stride, const float* src, int64_t n);

// sum_t w[t] * src[t]
inline float weighted_sum(const float* w, const float* src, int64_t taps) {
  if (taps > kShortSum) return float(exact_dot_of(w, src, taps));
  float v = 0.f;
  for (int64_t t = 0; t < taps; ++t) v += w[t] * src[t];
  return v;
}

// Full rows of this size leave the caches before anyone reads them.
inline bool worth_streaming(int64_t bytes) { return bytes >= (int64_t(8) << 20); }

// Copies a finished block past the caches, so that the write-allocate read never happens.
void stream_copy(void* dst, const void* src, int64_t bytes);

// Values past the caches: see store_values. `typed` has room for them, as floats.
void stream_values(DType dtype, void* dst, int64_t to, const float* src, int64_t n, float* typed);

// One vector past the caches; `dst` is aligned to it.
inline void stream_vec(float* dst, Vec v) {
#if defined(__SSE2__) && defined(__clang__)
  __builtin_nontemporal_store(v, reinterpret_cast<Vec*>(dst));
#elif defined(__AVX512F__)
  __builtin_ia32_movntps512(dst, v);
#elif defined(__AVX2__)
  __builtin_ia32_movntps256(dst, v);
#elif defined(__SSE2__)
  __builtin_ia32_movntps(dst, v);
#else
  store_vec(dst, v);
#endif
}

inline void stream_fence() {
#if defined(__SSE2__)
  __builtin_ia32_sfence();
#endif
}

}  // namespace MURF_LEVEL
}  // namespace murf
