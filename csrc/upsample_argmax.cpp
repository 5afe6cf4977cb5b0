// upsample_argmax: the class of the largest summed, resized logit of every pixel; full-resolution logits never exist.
#include "kernels.h"
#include "resample.h"

namespace murf {
namespace MURF_LEVEL {

struct Best {
  int32_t index;
  float value;
};

// As torch: the lowest index among equals, and the first NaN beats everything.
static Best best_of(const float* v, int64_t n) {
  float largest = v[0];
  int32_t nan = INT32_MAX;
#pragma omp simd reduction(max : largest) reduction(min : nan)
  for (int64_t i = 0; i < n; ++i) {
    largest = v[i] > largest ? v[i] : largest;
    const int32_t candidate = v[i] != v[i] ? int32_t(i) : INT32_MAX;
    nan = candidate < nan ? candidate : nan;
  }
  if (nan != INT32_MAX) return {nan, v[nan]};
  int32_t index = INT32_MAX;
#pragma omp simd reduction(min : index)
  for (int64_t i = 0; i < n; ++i) {
    const int32_t candidate = v[i] == largest ? int32_t(i) : INT32_MAX;
    index = candidate < index ? candidate : index;
  }
  return {index, largest};
}

template <class T, class Label>
static void argmax(Maps maps, Grid grid, Bias bias, Label* labels, T* values, int threads) {
  const int64_t rows_floats = RowSet::floats(maps);
  const int64_t share = rows_floats + padded(grid.channels);
  Scratch scratch(share * threads);
  parallel(threads, grid.batch * grid.height, [&](int thread, int64_t begin, int64_t end) {
    float* rows = scratch.data() + thread * share;
    float* pixel = rows + rows_floats;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / grid.height;
      vertical_rows<T>(maps, b, task % grid.height, rows);
      for (int64_t x = 0; x < grid.width; ++x) {
        sum_pixel(maps, rows, bias_row(bias, b), x, pixel);
        const Best best = best_of(pixel, grid.channels);
        labels[task * grid.width + x] = Label(best.index);
        if (values != nullptr) from_float(best.value, values[task * grid.width + x]);
      }
    }
  });
}

void upsample_argmax(DType dtype, Maps maps, Grid grid, Bias bias, int label_bytes, void* labels, void* values,
                     int threads) {
  with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    T* v = static_cast<T*>(values);
    if (label_bytes == 1) argmax<T>(maps, grid, bias, static_cast<uint8_t*>(labels), v, threads);
    else if (label_bytes == 2) argmax<T>(maps, grid, bias, static_cast<int16_t*>(labels), v, threads);
    else argmax<T>(maps, grid, bias, static_cast<int32_t*>(labels), v, threads);
  });
}

}  // namespace MURF_LEVEL
}  // namespace murf
