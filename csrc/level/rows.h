// Row primitives: float32 arithmetic on contiguous runs of float32, bfloat16 or float16. Plain loops that the compiler
// vectorizes for the level it is told to build; only the non-temporal store needs intrinsics. Everything lives in the
// level's own namespace, and no std:: template is instantiated here, so that the linker can never merge code built for
// one instruction set into another.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>
#if defined(__SSE2__)
#include <immintrin.h>
#endif
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "types.h"

#ifndef MURF_LEVEL
#error "compile with -DMURF_LEVEL=<baseline|avx2|avx512>"
#endif

namespace murf {
namespace MURF_LEVEL {

inline int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max64(int64_t a, int64_t b) { return a > b ? a : b; }

inline uint32_t bits_of(float v) {
  uint32_t u;
  std::memcpy(&u, &v, sizeof u);
  return u;
}
inline float float_of(uint32_t u) {
  float v;
  std::memcpy(&v, &u, sizeof v);
  return v;
}

inline float to_float(float v) { return v; }
inline float to_float(bf16 v) { return float_of(uint32_t(v.bits) << 16); }
inline float to_float(f16 v) {
  const uint32_t magnitude = uint32_t(v.bits & 0x7fffu) << 13;
  // The multiplication moves the exponent bias and normalizes subnormals; infinities and NaN keep their mantissa.
  const uint32_t finite = bits_of(float_of(magnitude) * 0x1p112f);
  const uint32_t special = magnitude | 0x7f800000u;
  const uint32_t magnitude32 = (v.bits & 0x7c00u) == 0x7c00u ? special : finite;
  return float_of(magnitude32 | (uint32_t(v.bits & 0x8000u) << 16));
}

// Round to nearest even; NaN stays NaN.
inline void from_float(float v, float& out) { out = v; }
inline void from_float(float v, bf16& out) {
  const uint32_t u = bits_of(v);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const uint32_t nan = (u >> 16) | 0x40u;
  out.bits = uint16_t((u & 0x7fffffffu) > 0x7f800000u ? nan : rounded);
}
inline void from_float(float v, f16& out) {
  const uint32_t sign = bits_of(v) & 0x80000000u;
  const uint32_t u = bits_of(v) ^ sign;
  const uint32_t special = u > 0x7f800000u ? 0x7e00u : 0x7c00u;
  const uint32_t subnormal = bits_of(float_of(u) + 0.5f) - 0x3f000000u;
  const uint32_t normal = (u - 0x38000000u + 0xfffu + ((u >> 13) & 1u)) >> 13;
  const uint32_t magnitude = u >= 0x47800000u ? special : (u < 0x38800000u ? subnormal : normal);
  out.bits = uint16_t(magnitude | (sign >> 16));
}

inline void fill_row(float* dst, float value, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = value;
}

template <class T>
inline void load_row(float* __restrict dst, const T* __restrict src, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = to_float(src[i]);
}

template <class T>
inline void store_row(T* __restrict dst, const float* __restrict src, int64_t n) {
  for (int64_t i = 0; i < n; ++i) from_float(src[i], dst[i]);
}

// dst = w * src, or dst += w * src
template <class T>
inline void scale_row(float* __restrict dst, const T* __restrict src, float w, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] = w * to_float(src[i]);
}
template <class T>
inline void add_scaled_row(float* __restrict dst, const T* __restrict src, float w, int64_t n) {
  for (int64_t i = 0; i < n; ++i) dst[i] += w * to_float(src[i]);
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

// dst (+)= sum_t w[t] * src[t], four rows at a time
inline void combine(float* dst, const float* const* src, const float* w, int64_t taps, int64_t n, bool accumulate) {
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

// The same for taps that lie `step` apart: dst = sum_t w[t] * src[t * step + i]
inline void combine_strided(float* dst, const float* src, int64_t step, const float* w, int64_t taps, int64_t n) {
  if (taps == 0) fill_row(dst, 0.f, n);
  for (int64_t t = 0; t < taps; t += 4) {
    const float* rows[4] = {src + t * step, src + (t + 1) * step, src + (t + 2) * step, src + (t + 3) * step};
    combine(dst, rows, w + t, min64(taps - t, 4), n, t > 0);
  }
}

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

inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// Scratch memory, allocated before a parallel region: an exception must not leave one.
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : data_(static_cast<float*>(::operator new(size_t(max64(floats, 1)) * sizeof(float), std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() { return data_; }

 private:
  float* data_;
};

// Floats of scratch that hold one pointer.
constexpr int64_t kPointerFloats = 2;
static_assert(sizeof(float*) <= kPointerFloats * sizeof(float));

// Scratch offsets are rounded up so that every thread's rows begin on a cache line.
inline int64_t padded(int64_t floats) { return (floats + 15) / 16 * 16; }

// Runs body(thread, begin, end) on contiguous shares of [0, tasks).
template <class Body>
inline void parallel(int threads, int64_t tasks, Body body) {
#if defined(_OPENMP)
  if (threads > 1 && tasks > 1) {
#pragma omp parallel num_threads(int(min64(threads, tasks)))
    {
      const int64_t id = omp_get_thread_num(), n = omp_get_num_threads();
      body(int(id), tasks * id / n, tasks * (id + 1) / n);
    }
    return;
  }
#endif
  body(0, 0, tasks);
}

template <class Body>
inline void with_dtype(DType dtype, Body body) {
  if (dtype == DType::f32) body(float{});
  else if (dtype == DType::bf16) body(bf16{});
  else body(f16{});
}

}  // namespace MURF_LEVEL
}  // namespace murf
