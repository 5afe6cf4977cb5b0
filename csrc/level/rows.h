// Row primitives: float32 arithmetic on contiguous runs of float32, bfloat16 or float16. Plain loops that the compiler
// vectorizes for the level it is told to build; only the non-temporal store needs intrinsics.
#pragma once

#if defined(__SSE2__)
#include <immintrin.h>
#endif

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

// dst (+)= sum_t w[t] * row(t) for many taps: pairs of pairs of pairs in float32, and those in double.
template <class Row>
__attribute__((noinline)) void combine_many(float* __restrict dst, Row row, const float* w, int64_t taps, int64_t n,
                                            bool accumulate) {
  constexpr int64_t kColumns = 256;  // of a float32 row, whose sums stay in the first-level cache
  double sum[kColumns];
  for (int64_t begin = 0; begin < n; begin += kColumns) {
    const int64_t columns = min64(kColumns, n - begin);
    for (int64_t i = 0; i < columns; ++i) sum[i] = accumulate ? double(dst[begin + i]) : 0.;
    int64_t t = 0;
    for (; t + 8 <= taps; t += 8) {
      const decltype(row(0)) src[8] = {row(t) + begin,     row(t + 1) + begin, row(t + 2) + begin, row(t + 3) + begin,
                                       row(t + 4) + begin, row(t + 5) + begin, row(t + 6) + begin, row(t + 7) + begin};
      for (int64_t i = 0; i < columns; ++i) {
        const auto term = [&](int k) { return w[t + k] * to_float(src[k][i]); };
        sum[i] += double(((term(0) + term(1)) + (term(2) + term(3))) + ((term(4) + term(5)) + (term(6) + term(7))));
      }
    }
    for (; t < taps; ++t) add_scaled_row(sum, row(t) + begin, w[t], columns);
    store_row(dst + begin, sum, columns);
  }
}

// dst (+)= sum_t w[t] * src[t]
inline void combine(float* dst, const float* const* src, const float* w, int64_t taps, int64_t n, bool accumulate) {
  if (taps > kShortSum) combine_many(dst, [=](int64_t t) { return src[t]; }, w, taps, n, accumulate);
  else combine_few(dst, src, w, taps, n, accumulate);
}

// The same for taps that lie `step` apart: dst = sum_t w[t] * src[t * step + i]
inline void combine_strided(float* dst, const float* src, int64_t step, const float* w, int64_t taps, int64_t n) {
  if (taps == 0) fill_row(dst, 0.f, n);
  if (taps > kShortSum) return combine_many(dst, [=](int64_t t) { return src + t * step; }, w, taps, n, false);
  for (int64_t t = 0; t < taps; t += 4) {
    const float* rows[4] = {src + t * step, src + (t + 1) * step, src + (t + 2) * step, src + (t + 3) * step};
    combine_few(dst, rows, w + t, min64(taps - t, 4), n, t > 0);
  }
}

// The same from rows of any dtype, a row at a time
template <class T>
inline void combine_rows(float* dst, const T* src, int64_t step, const float* w, int64_t taps, int64_t n) {
  if (taps == 0) fill_row(dst, 0.f, n);
  if (taps > kShortSum) return combine_many(dst, [=](int64_t t) { return src + t * step; }, w, taps, n, false);
  for (int64_t t = 0; t < taps; ++t) {
    if (t == 0) scale_row(dst, src, w[0], n);
    else add_scaled_row(dst, src + t * step, w[t], n);
  }
}

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
inline void stream_copy(void* dst, const void* src, int64_t bytes) {
  char* d = static_cast<char*>(dst);
  const char* s = static_cast<const char*>(src);
  const int64_t head = min64(bytes, int64_t(-reinterpret_cast<uintptr_t>(d) & 63));
  std::memcpy(d, s, size_t(head));
  d += head, s += head, bytes -= head;
#if defined(__AVX512F__)
  for (; bytes >= 64; bytes -= 64, d += 64, s += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i*>(d), _mm512_loadu_si512(s));
#elif defined(__AVX2__)
  for (; bytes >= 32; bytes -= 32, d += 32, s += 32)
    _mm256_stream_si256(reinterpret_cast<__m256i*>(d), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(s)));
#elif defined(__SSE2__)
  for (; bytes >= 16; bytes -= 16, d += 16, s += 16)
    _mm_stream_si128(reinterpret_cast<__m128i*>(d), _mm_loadu_si128(reinterpret_cast<const __m128i*>(s)));
#endif
  std::memcpy(d, s, size_t(bytes));
}

// One vector past the caches; `dst` is aligned to it.
inline void stream_vec(float* dst, Vec v) {
#if defined(__AVX512F__)
  _mm512_stream_ps(dst, __m512(v));
#elif defined(__AVX2__)
  _mm256_stream_ps(dst, __m256(v));
#elif defined(__SSE2__)
  _mm_stream_ps(dst, __m128(v));
#else
  store_vec(dst, v);
#endif
}

inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace MURF_LEVEL
}  // namespace murf
