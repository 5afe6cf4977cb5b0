// Numbers, the compiler's own vectors of them, and their sums: all that depends on the registers of a level.
// Multiply-adds are contracted by the compiler. Everything under csrc/level lives in the level's own namespace, and no
// std:: template is instantiated, so that the linker can never merge code built for one instruction set into another.
#pragma once

#include <cstdint>
#include <cstring>

#include "types.h"

#ifndef MURF_LEVEL
#error "compile with -DMURF_LEVEL=<baseline|avx2|avx512|amx>"
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

// Floats of a register, and registers side by side in a block of sums: four rows of them, or six, are kept.
#if defined(__AVX512F__)
constexpr int kLanes = 16, kWide = 4;
#elif defined(__AVX2__)
constexpr int kLanes = 8, kWide = 2;
#else
constexpr int kLanes = 4, kWide = 2;
#endif
typedef float Vec __attribute__((vector_size(kLanes * sizeof(float))));
typedef uint32_t UintVec __attribute__((vector_size(kLanes * sizeof(uint32_t))));
// The same width at every level; the compiler splits them where registers are narrower.
typedef float Vec4 __attribute__((vector_size(4 * sizeof(float))));
typedef float Vec8 __attribute__((vector_size(8 * sizeof(float))));
typedef float Vec16 __attribute__((vector_size(16 * sizeof(float))));
typedef int32_t IntVec16 __attribute__((vector_size(16 * sizeof(int32_t))));

inline int64_t lanes_up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

template <class V = Vec>
inline V load_vec(const float* p) {
  V v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class V>
inline void store_vec(float* p, V v) {
  std::memcpy(p, &v, sizeof v);
}
inline Vec splat(float v) { return v - Vec{}; }

// The sum as a tree; the lanes are lost.
template <class T, int N>
inline T sum_lanes(T (&lane)[N]) {
  for (int half = N / 2; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}
inline float sum_vec(Vec v) {
  float lane[kLanes];
  store_vec(lane, v);
  return sum_lanes(lane);
}

// visit(i, i % N) for every i < n, N at a time
template <int N, class Visit>
inline void each_in_lanes(int64_t n, Visit visit) {
  int64_t i = 0;
  for (; i + N <= n; i += N)
    for (int lane = 0; lane < N; ++lane) visit(i + lane, lane);
  for (int lane = 0; i < n; ++i, ++lane) visit(i, lane);
}

template <class V>
inline V larger(V a, V b) {
  return a > b ? a : b;
}

// NaN if the first is one; others are passed over. The last register overlaps the one before, so that no element is
// left over. With `omp simd` Clang makes no vectors of a maximum; GCC does, and takes about as long.
inline float max_of(const float* v, int64_t n) {
  float largest = v[0];
  if (n < kLanes) {
    for (int64_t i = 1; i < n; ++i) largest = larger(v[i], largest);
    return largest;
  }
  Vec most = larger(load_vec(v + n - kLanes), splat(largest));
  for (int64_t i = 0; i + kLanes <= n; i += kLanes) most = larger(load_vec(v + i), most);
  float lane[kLanes];
  store_vec(lane, most);
  Vec4 four = load_vec<Vec4>(lane);
  for (int i = 4; i < kLanes; i += 4) four = larger(load_vec<Vec4>(lane + i), four);
  return larger(larger(four[0], four[1]), larger(four[2], four[3]));
}

inline float sum_of(const float* v, int64_t n) {
  float total = 0.f;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += v[i];
  return total;
}

inline double exact_sum_of(const float* v, int64_t n) {
  double total = 0.;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += double(v[i]);
  return total;
}

inline double exact_dot_of(const float* a, const float* b, int64_t n) {
  double total = 0.;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += double(a[i]) * double(b[i]);
  return total;
}

inline float dot_of(const float* a, const float* b, int64_t n) {
  float total = 0.f;
#pragma omp simd reduction(+ : total)
  for (int64_t i = 0; i < n; ++i) total += a[i] * b[i];
  return total;
}

// |a_scale a - b_scale b|^2 in Sum, by sixteen sums of float or eight of double, the same at every level. The relative
// error is below (n / lanes + 8) roundings, those of the scaling apart.
template <class Sum, class A, class B>
inline Sum squared_distance(const A* a, Sum a_scale, const B* b, Sum b_scale, int64_t n) {
  constexpr int kSums = 64 / int(sizeof(Sum));
  Sum sums[kSums] = {};
  each_in_lanes<kSums>(n, [&](int64_t i, int lane) {
    const Sum d = Sum(to_float(a[i])) * a_scale - Sum(to_float(b[i])) * b_scale;
    sums[lane] += d * d;
  });
  return sum_lanes(sums);
}

// a.b in double, by eight sums that are the same at every level.
template <class A, class B>
inline double inner_product(const A* a, const B* b, int64_t n) {
  double sums[8] = {};
  each_in_lanes<8>(n, [&](int64_t i, int lane) { sums[lane] += double(to_float(a[i])) * double(to_float(b[i])); });
  return sum_lanes(sums);
}

}  // namespace MURF_LEVEL
}  // namespace murf
