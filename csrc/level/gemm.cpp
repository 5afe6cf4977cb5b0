// Small matrix products: see gemm.h. One body for all that multiply; its tiles are long to compile.
#include "gemm.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

template <int Rows, int Vectors>
inline void gemm_tile(int64_t depth, const float* a, int64_t a_row, int64_t a_step, const float* b, int64_t b_row,
                      float* c, int64_t c_row, bool accumulate) {
  Vec sum[Rows][Vectors];
  for (int i = 0; i < Rows; ++i)
    for (int n = 0; n < Vectors; ++n) sum[i][n] = Vec{};
  for (int64_t t = 0; t < depth; ++t) {
    Vec right[Vectors];
    for (int n = 0; n < Vectors; ++n) right[n] = load_vec(b + t * b_row + n * kLanes);
    for (int i = 0; i < Rows; ++i) {
      const float left = a[i * a_row + t * a_step];
      for (int n = 0; n < Vectors; ++n) sum[i][n] += left * right[n];
    }
  }
  for (int i = 0; i < Rows; ++i)
    for (int n = 0; n < Vectors; ++n) {
      float* to = c + i * c_row + n * kLanes;
      // A long sum is added up in parts: its rounding grows with the parts' length, not with its own.
      store_vec(to, accumulate ? load_vec(to) + sum[i][n] : sum[i][n]);
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

}  // namespace

void gemm(int64_t rows, int64_t depth, int64_t columns, const float* a, int64_t a_row, int64_t a_step,
          const float* b, int64_t b_row, float* c, int64_t c_row, bool accumulate) {
  int64_t n = 0;
  for (; n + kWide * kLanes <= columns; n += kWide * kLanes)
    gemm_columns<kWide>(rows, depth, a, a_row, a_step, b + n, b_row, c + n, c_row, accumulate);
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
