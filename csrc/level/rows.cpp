// The row primitives that are compiled once per level; see rows.h.
#include "rows.h"

#include "launch.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

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

// Two rows, which is what a bilinear resize reads, in one pass over dst.
template <class T>
void combine_two(float* __restrict dst, const T* __restrict first, const T* __restrict second, float w0, float w1,
                 int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const float scaled = w0 * to_float(first[i]);
    dst[i] = scaled + w1 * to_float(second[i]);
  }
}

}  // namespace

void combine_long(float* dst, const float* const* src, const float* w, int64_t taps, int64_t n, bool accumulate) {
  combine_many(dst, [=](int64_t t) { return src[t]; }, w, taps, n, accumulate);
}

void combine_long_strided(float* dst, const float* src, int64_t step, const float* w, int64_t taps, int64_t n) {
  combine_many(dst, [=](int64_t t) { return src + t * step; }, w, taps, n, false);
}

template <class T>
void combine_rows(float* dst, const T* src, int64_t step, const float* w, int64_t taps, int64_t n) {
  if (taps == 0) fill_row(dst, 0.f, n);
  if (taps > kShortSum) return combine_many(dst, [=](int64_t t) { return src + t * step; }, w, taps, n, false);
  if (taps == 2) return combine_two(dst, src, src + step, w[0], w[1], n);
  for (int64_t t = 0; t < taps; ++t) {
    if (t == 0) scale_row(dst, src, w[0], n);
    else add_scaled_row(dst, src + t * step, w[t], n);
  }
}
template void combine_rows(float*, const float*, int64_t, const float*, int64_t, int64_t);
template void combine_rows(float*, const bf16*, int64_t, const float*, int64_t, int64_t);
template void combine_rows(float*, const f16*, int64_t, const float*, int64_t, int64_t);
template void combine_rows(float*, const uint8_t*, int64_t, const float*, int64_t, int64_t);

void load_values(float* dst, DType dtype, const void* src, int64_t from, int64_t stride, int64_t n) {
  with_dtype(dtype, [&](auto tag) {
    const auto* row = static_cast<const decltype(tag)*>(src) + from;
    if (stride == 1) load_row(dst, row, n);
    else
      for (int64_t i = 0; i < n; ++i) dst[i] = to_float(row[i * stride]);
  });
}

void store_values(DType dtype, void* dst, int64_t to, int64_t stride, const float* src, int64_t n) {
  with_dtype(dtype, [&](auto tag) {
    auto* row = static_cast<decltype(tag)*>(dst) + to;
    if (stride == 1) store_row(row, src, n);
    else
      for (int64_t i = 0; i < n; ++i) from_float(src[i], row[i * stride]);
  });
}

void stream_copy(void* dst, const void* src, int64_t bytes) {
  char* d = static_cast<char*>(dst);
  const char* s = static_cast<const char*>(src);
  const int64_t head = min64(bytes, int64_t(-reinterpret_cast<uintptr_t>(d) & 63));
  std::memcpy(d, s, size_t(head));
  d += head, s += head, bytes -= head;
  constexpr int64_t kVec = int64_t(sizeof(Vec));
  for (; bytes >= kVec; bytes -= kVec, d += kVec, s += kVec) {
    Vec v;
    std::memcpy(&v, s, sizeof v);
    stream_vec(reinterpret_cast<float*>(d), v);
  }
  std::memcpy(d, s, size_t(bytes));
}

void stream_values(DType dtype, void* dst, int64_t to, const float* src, int64_t n, float* typed) {
  char* at = static_cast<char*>(dst) + to * size_of(dtype);
  if (dtype == DType::f32) return stream_copy(at, src, n * size_of(dtype));
  store_values(dtype, typed, 0, 1, src, n);
  stream_copy(at, typed, n * size_of(dtype));
}

}  // namespace MURF_LEVEL
}  // namespace murf
