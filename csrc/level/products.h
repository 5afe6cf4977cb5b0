// Products of bfloat16 matrices with float32 sums, for operands in a thread's cache: by the processor's tile registers
// where the level has them (Intel AMX), by plain sums elsewhere.
#pragma once

#if defined(__AMX_BF16__)
#include <immintrin.h>
#endif

#include "simd.h"

namespace murf {
namespace MURF_LEVEL {

// Rows and columns of a block of results, and the depth of one step: two tiles of 16 either way.
constexpr int64_t kSide = 32;
constexpr int64_t kStep = kSide * kSide;  // entries of the right operand that a step of a block reads

inline int64_t sides_up(int64_t n) { return (n + kSide - 1) / kSide * kSide; }

// Floats that hold so many bfloat16.
inline int64_t floats_of(int64_t halves) { return (halves + 1) / 2; }

// Where entry (i, n) of a right operand of so many steps lies: blocks of columns, steps, halves of 16 columns, and in
// those the rows by pairs.
inline int64_t packed(int64_t i, int64_t n, int64_t steps) {
  const int64_t block = n / kSide, half = n % kSide / 16, pair = i % kSide / 2;
  return ((block * steps + i / kSide) * 2 + half) * (kStep / 2) + pair * 32 + n % 16 * 2 + i % 2;
}

// A thread's tile registers, for as long as it multiplies.
class Tiles {
 public:
#if defined(__AMX_BF16__)
  Tiles() {
    struct {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    static_assert(sizeof config == 64);
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
#else
  Tiles() {}
#endif
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

// One block: to[r][n] = sum over the runs of left[run][r * left_row + i] * right(run * depth + i, n), where depth, that
// of every run, is a number of steps.
inline void block_product(const bf16* const* left, int64_t runs, int64_t left_row, int64_t steps, const bf16* right,
                          float* to, int64_t to_row, const Tiles&) {
#if defined(__AMX_BF16__)
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  const int64_t left_bytes = left_row * int64_t(sizeof(bf16)), to_bytes = to_row * int64_t(sizeof(float));
  for (int64_t run = 0; run < runs; ++run)
    for (int64_t step = 0; step < steps; ++step, right += kStep) {
      const bf16* at = left[run] + step * kSide;
      _tile_loadd(4, at, left_bytes);
      _tile_loadd(6, right, 64);
      _tile_loadd(5, at + 16 * left_row, left_bytes);
      _tile_loadd(7, right + kStep / 2, 64);
      _tile_dpbf16ps(0, 4, 6);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(1, 4, 7);
      _tile_dpbf16ps(3, 5, 7);
    }
  _tile_stored(0, to, to_bytes);
  _tile_stored(1, to + 16, to_bytes);
  _tile_stored(2, to + 16 * to_row, to_bytes);
  _tile_stored(3, to + 16 * to_row + 16, to_bytes);
#else
  for (int64_t r = 0; r < kSide; ++r) {
    float sum[kSide] = {};
    const bf16* b = right;
    for (int64_t run = 0; run < runs; ++run)
      for (int64_t i = 0; i < steps * kSide; i += 2) {
        const float even = to_float(left[run][r * left_row + i]), odd = to_float(left[run][r * left_row + i + 1]);
        const bf16* pair = b + i / kSide * kStep + i % kSide / 2 * 32;
        for (int64_t n = 0; n < kSide; ++n) {
          const bf16* two = pair + n / 16 * (kStep / 2) + n % 16 * 2;
          sum[n] += even * to_float(two[0]) + odd * to_float(two[1]);
        }
        if (i + 2 == steps * kSide) b += steps * kStep;
      }
    std::memcpy(to + r * to_row, sum, sizeof sum);
  }
#endif
}

// Rounds a row to bfloat16.
inline void round_row(bf16* to, const float* from, int64_t n) {
  int64_t i = 0;
#if defined(__AVX512BF16__)
  for (; i + 16 <= n; i += 16) {
    const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + i));
    std::memcpy(to + i, &rounded, sizeof rounded);
  }
#endif
  for (; i < n; ++i) from_float(from[i], to[i]);
}

}  // namespace MURF_LEVEL
}  // namespace murf
