// Register-blocked products of any size: see micro.h.
#include "micro.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

// dst[p * dst_step + q] (+)= sum_i a[p][i] * b[q][i], `length` a multiple of kLanes
template <int P, int Q>
inline void dots_block(const float* const* a, const float* const* b, int64_t length, float* dst, int64_t dst_step,
                       bool accumulate) {
  Vec sum[P][Q] = {};
  for (int64_t i = 0; i < length; i += kLanes) {
    Vec y[Q];
    for (int q = 0; q < Q; ++q) y[q] = load_vec(b[q] + i);
    for (int p = 0; p < P; ++p) {
      const Vec x = load_vec(a[p] + i);
      for (int q = 0; q < Q; ++q) sum[p][q] += x * y[q];
    }
  }
  for (int p = 0; p < P; ++p)
    for (int q = 0; q < Q; ++q)
      dst[p * dst_step + q] = sum_vec(sum[p][q]) + (accumulate ? dst[p * dst_step + q] : 0.f);
}

template <int P>
inline void dots_rows(const float* const* a, const float* const* b, int64_t b_count, int64_t length, float* dst,
                      int64_t dst_step, bool accumulate) {
  int64_t q = 0;
  for (; q + kWide <= b_count; q += kWide) dots_block<P, kWide>(a, b + q, length, dst + q, dst_step, accumulate);
  for (; q < b_count; ++q) dots_block<P, 1>(a, b + q, length, dst + q, dst_step, accumulate);
}

}  // namespace

void dots(const float* const* a, int64_t a_count, const float* const* b, int64_t b_count, int64_t length,
          float* dst, int64_t dst_step, bool accumulate) {
  for (int64_t p = 0; p < a_count;) {
    const int64_t now = min64(a_count - p, kBlock);
    float* to = dst + p * dst_step;
    if (now == 4) dots_rows<4>(a + p, b, b_count, length, to, dst_step, accumulate);
    else if (now == 3) dots_rows<3>(a + p, b, b_count, length, to, dst_step, accumulate);
    else if (now == 2) dots_rows<2>(a + p, b, b_count, length, to, dst_step, accumulate);
    else dots_rows<1>(a + p, b, b_count, length, to, dst_step, accumulate);
    p += now;
  }
}

}  // namespace MURF_LEVEL
}  // namespace murf
