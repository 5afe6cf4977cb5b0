// Small matrix products on packed float32 blocks, for operands that live in a thread's cache. Dense layers belong to
// torch; these are the few dozen rows of one attention window.
#pragma once

#include "rows.h"

namespace murf {
namespace MURF_LEVEL {

#if defined(__AVX512F__)
constexpr int64_t kLanes = 16;
constexpr int kTileVectors = 4;  // 6 x 4 sums of 32 registers
#elif defined(__AVX2__)
constexpr int64_t kLanes = 8;
constexpr int kTileVectors = 2;  // 6 x 2 sums of 16 registers
#else
constexpr int64_t kLanes = 4;
constexpr int kTileVectors = 2;
#endif
constexpr int kTileRows = 6;

// may_alias and no alignment: lanes are read from any float address.
typedef float Lanes __attribute__((vector_size(kLanes * 4), aligned(4), may_alias));

inline int64_t lanes_up(int64_t n) { return (n + kLanes - 1) / kLanes * kLanes; }

template <int Rows, int Vectors>
inline void gemm_tile(int64_t depth, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row,
                      float* c, int64_t c_row, bool accumulate) {
  Lanes sum[Rows][Vectors];
  for (int i = 0; i < Rows; ++i)
    for (int n = 0; n < Vectors; ++n) sum[i][n] = Lanes{};
  for (int64_t t = 0; t < depth; ++t) {
    Lanes right[Vectors];
    for (int n = 0; n < Vectors; ++n) right[n] = *reinterpret_cast<const Lanes*>(b + t * b_row + n * kLanes);
    for (int i = 0; i < Rows; ++i) {
      const float left = a[i * a_row + t * a_step];
      for (int n = 0; n < Vectors; ++n) sum[i][n] += left * right[n];
    }
  }
  for (int i = 0; i < Rows; ++i)
    for (int n = 0; n < Vectors; ++n) {
      Lanes& to = *reinterpret_cast<Lanes*>(c + i * c_row + n * kLanes);
      // A long sum is added up in parts: its rounding grows with the parts' length, not with its own.
      to = accumulate ? to + sum[i][n] : sum[i][n];
    }
}

template <int Vectors>
inline void gemm_columns(int64_t rows, int64_t depth, const float* a, int64_t a_row, int64_t a_step, const float* b,
                         int64_t b_row, float* c, int64_t c_row, bool accumulate) {
  int64_t i = 0;
  for (; i + kTileRows <= rows; i += kTileRows)
    gemm_tile<kTileRows, Vectors>(depth, a + i * a_row, a_row, a_step, b, b_row, c + i * c_row, c_row, accumulate);
  a += i * a_row, c += i * c_row;
  switch (rows - i) {
    case 5: gemm_tile<5, Vectors>(depth, a, a_row, a_step, b, b_row, c, c_row, accumulate); break;
    case 4: gemm_tile<4, Vectors>(depth, a, a_row, a_step, b, b_row, c, c_row, accumulate); break;
    case 3: gemm_tile<3, Vectors>(depth, a, a_row, a_step, b, b_row, c, c_row, accumulate); break;
    case 2: gemm_tile<2, Vectors>(depth, a, a_row, a_step, b, b_row, c, c_row, accumulate); break;
    case 1: gemm_tile<1, Vectors>(depth, a, a_row, a_step, b, b_row, c, c_row, accumulate); break;
    default: break;
  }
}

// c[i][n] (+)= sum_t a[i * a_row + t * a_step] * b[t][n] for n < columns, a multiple of kLanes.
inline void gemm(int64_t rows, int64_t depth, int64_t columns, const float* a, int64_t a_row, int64_t a_step,
                 const float* b, int64_t b_row, float* c, int64_t c_row, bool accumulate) {
  int64_t n = 0;
  for (; n + kTileVectors * kLanes <= columns; n += kTileVectors * kLanes)
    gemm_columns<kTileVectors>(rows, depth, a, a_row, a_step, b + n, b_row, c + n, c_row, accumulate);
#if defined(__AVX512F__)
  if (n + 2 * kLanes <= columns) {
    gemm_columns<2>(rows, depth, a, a_row, a_step, b + n, b_row, c + n, c_row, accumulate);
    n += 2 * kLanes;
  }
#endif
  if (n < columns) gemm_columns<1>(rows, depth, a, a_row, a_step, b + n, b_row, c + n, c_row, accumulate);
}

}  // namespace MURF_LEVEL
}  // namespace murf
