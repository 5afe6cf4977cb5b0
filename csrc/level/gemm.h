// Small matrix products on packed float32 blocks, for operands that live in a thread's cache. Dense layers belong to
// torch; these are the few dozen rows of one attention window.
#pragma once

#include "simd.h"

namespace murf {
namespace MURF_LEVEL {

// Rows of a tile of sums that stay in registers.
constexpr int kTileRows = 6;

// c[i][n] (+)= sum_t a[i * a_row + t * a_step] * b[t][n] for n < columns, a multiple of kLanes.
void gemm(int64_t rows, int64_t depth, int64_t columns, const float* a, int64_t a_row, int64_t a_step,
          const float* b, int64_t b_row, float* c, int64_t c_row, bool accumulate);

}  // namespace MURF_LEVEL
}  // namespace murf
