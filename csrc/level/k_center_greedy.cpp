// k_center_greedy: distance to the newest center, running minimum and the next center in one pass per step. The pass
// reads rows as eight-bit codes; measured errors of the codes say which rows may have come nearer, and only those are
// compared exactly.
#include "kernels.h"
#include "launch.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

template <class T>
void encode_rows(NearestRows x, const float* mean, KCenterCodes codes, int threads) {
  parallel(threads, x.rows, [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const T* row = static_cast<const T*>(x.data) + i * x.stride;
      int8_t* code = codes.data + i * codes.stride;
      float largest = 0.f;
      for (int64_t j = 0; j < x.dim; ++j) {
        const float v = __builtin_fabsf(to_float(row[j]) - mean[j]);
        largest = v > largest ? v : largest;
      }
      const double scale = largest > 0.f ? double(largest) / 127 : 1.;
      const float inverse = float(1 / scale);
      double error = 0.;
      int64_t norm = 0;
      for (int64_t j = 0; j < x.dim; ++j) {
        const float v = (to_float(row[j]) - mean[j]) * inverse;
        const float clamped = v < -127.f ? -127.f : (v > 127.f ? 127.f : v);
        const int32_t c = int32_t(clamped + (clamped < 0.f ? -0.5f : 0.5f));
        const double left = double(to_float(row[j])) - double(mean[j]) - c * scale;
        code[j] = int8_t(c);
        norm += c * c;
        error += left * left;
      }
      for (int64_t j = x.dim; j < codes.stride; ++j) code[j] = 0;
      codes.scales[i] = scale;
      codes.squared_norms[i] = double(norm) * scale * scale;
      codes.errors[i] = __builtin_sqrt(error) * (1 + 0x1p-40);
    }
  });
}

// Sums of products of codes are exact; `n` is a multiple of 64.
int64_t code_product(const int8_t* __restrict a, const int8_t* __restrict b, int64_t n) {
  constexpr int64_t kExact = 1 << 16;  // columns whose products fit in 32 bits
  int64_t sum = 0;
  for (int64_t begin = 0; begin < n; begin += kExact) {
    const int64_t end = min64(n, begin + kExact);
    int32_t part = 0;
    for (int64_t j = begin; j < end; ++j) part += int16_t(a[j]) * int16_t(b[j]);
    sum += part;
  }
  return sum;
}

struct Farthest {
  double squared;
  int64_t index;
};

// Takes `center` in and returns the row that is then farthest from all centers, the lowest among equals.
template <class T>
int64_t step(NearestRows x, KCenterCodes codes, double* nearest, int64_t center, Farthest* farthest,
             int threads) {
  const T* data = static_cast<const T*>(x.data);
  const int8_t* center_code = codes.data + center * codes.stride;
  const double center_scale = codes.scales[center], center_error = codes.errors[center];
  const double center_norm = codes.squared_norms[center];
  for (int t = 0; t < threads; ++t) farthest[t] = {-1., 0};
  parallel(threads, x.rows, [&](int thread, int64_t begin, int64_t end) {
    Farthest best{-1., begin};
    for (int64_t i = begin; i < end; ++i) {
      const double product = double(code_product(codes.data + i * codes.stride, center_code, codes.stride));
      const double norms = codes.squared_norms[i] + center_norm;
      const double squared = norms - 2 * codes.scales[i] * center_scale * product;
      // nearest[i] is a squared distance; codes closer than its root plus both errors may hide a smaller one.
      const double reach = __builtin_sqrt(nearest[i]) + codes.errors[i] + center_error;
      if (squared <= reach * reach + norms * 0x1p-40) {
        const double exact = squared_distance(data + i * x.stride, 1., data + center * x.stride, 1., x.dim);
        if (exact < nearest[i]) nearest[i] = exact;
      }
      if (nearest[i] > best.squared) best = {nearest[i], i};
    }
    farthest[thread] = best;
  });
  Farthest best = farthest[0];
  for (int t = 1; t < threads; ++t)
    if (farthest[t].squared > best.squared) best = farthest[t];
  return best.index;
}

}  // namespace

void k_center_encode(NearestRows x, const float* mean, KCenterCodes codes, int threads) {
  with_dtype(x.dtype, [&](auto tag) { encode_rows<decltype(tag)>(x, mean, codes, threads); });
}

void k_center_steps(NearestRows x, KCenterCodes codes, double* nearest, int64_t* centers, int64_t given, int64_t begin,
                    int64_t end, int threads) {
  Scratch scratch(padded(int64_t(sizeof(Farthest) / sizeof(float))) * threads);
  Farthest* farthest = reinterpret_cast<Farthest*>(scratch.data());
  with_dtype(x.dtype, [&](auto tag) {
    for (int64_t s = begin; s < end; ++s) {
      const int64_t next = step<decltype(tag)>(x, codes, nearest, centers[s], farthest, threads);
      if (s + 1 >= given) centers[s + 1] = next;
    }
  });
}

}  // namespace MURF_LEVEL
}  // namespace murf
