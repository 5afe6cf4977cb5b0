// Register-blocked products of any size: see micro.h.
#include "micro.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

// The same for any run; `length` is a multiple of kLanes.
template <int P>
inline void product_runs(const Operand& s, int64_t length, const float* const* w, int64_t w_step, float* const* dst,
                         bool accumulate) {
  // One row of results needs more vectors in flight to hide the latency of its additions.
  constexpr int V = P == 1 ? 2 * kWide : kWide;
  int64_t i = 0;
  for (; i + V * kLanes <= length; i += V * kLanes) product_block<P, V>(s, i, w, w_step, dst, accumulate);
  for (; i < length; i += kLanes) product_block<P, 1>(s, i, w, w_step, dst, accumulate);
}

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

void product(const Operand& s, int64_t length, int64_t results, const float* const* w, int64_t w_step,
             float* const* dst, bool accumulate) {
  if (results == 4) product_runs<4>(s, length, w, w_step, dst, accumulate);
  else if (results == 3) product_runs<3>(s, length, w, w_step, dst, accumulate);
  else if (results == 2) product_runs<2>(s, length, w, w_step, dst, accumulate);
  else product_runs<1>(s, length, w, w_step, dst, accumulate);
}

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
