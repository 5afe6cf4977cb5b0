// upsample_argmax: the class of the largest summed, resized logit of every pixel; full-resolution logits never exist.
#include "kernels.h"
#include "resample.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

// Sixteen classes at a time stay in registers from the interpolation to the comparison.
constexpr int64_t kClasses = 16;

// v[lane ^ distance] for every lane
template <class Vector>
Vector partners(Vector v, int32_t distance) {
#if defined(__clang__)
  Vector swapped = {};
  for (int32_t lane = 0; lane < kClasses; ++lane) swapped[lane] = v[lane ^ distance];
  return swapped;
#else
  const IntVec16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return __builtin_shuffle(v, lanes ^ distance);
#endif
}

struct Best {
  int32_t index;
  float value;
};

// As torch: the lowest index among equals, and the first NaN beats everything. A tree over the lanes: a scalar loop would
// cost more than the comparisons of a hundred classes.
Best best_lane(Vec16 values, IntVec16 indices) {
  for (int32_t distance = kClasses / 2; distance > 0; distance /= 2) {
    const Vec16 v = partners(values, distance);
    const IntVec16 i = partners(indices, distance);
    const IntVec16 earlier = i < indices;
    const IntVec16 wins = (v > values) | ((v == values) & earlier) | ((v != v) & ((values == values) | earlier));
    values = wins ? v : values;
    indices = wins ? i : indices;
  }
  return {indices[0], values[0]};
}

// FixedTaps: how many cells a pixel combines, or 0 for any number.
template <int FixedTaps>
Best best_class(const float* const* cells, const float* weights, int64_t taps, const float* bias, int64_t classes) {
  const IntVec16 lanes = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  const int64_t size = FixedTaps ? FixedTaps : taps;
  Vec16 best = {};
  IntVec16 index = lanes;
  for (int64_t k = 0; k < classes; k += kClasses) {
    Vec16 v = bias == nullptr ? Vec16{} : load_vec<Vec16>(bias + k);
    for (int64_t t = 0; t < size; ++t) v += weights[t] * load_vec<Vec16>(cells[t] + k);
    const IntVec16 at = lanes + int32_t(k);
    if (classes - k < kClasses) v = at < int32_t(classes) ? v : Vec16{} - __builtin_inff();
    if (k == 0) {
      best = v;
      continue;
    }
    const IntVec16 wins = (v > best) | ((v != v) & (best == best));
    best = wins ? v : best;
    index = wins ? at : index;
  }
  return best_lane(best, index);
}

template <class T, class Label>
void argmax(Maps maps, Grid grid, Bias bias, Label* labels, T* values, int threads) {
  const int64_t rows_size = rows_floats(maps), bias_size = padded(grid.channels);
  const int64_t share = rows_size + 2 * bias_size + PixelTaps::floats(maps);
  Scratch scratch(share * threads);
  parallel(threads, grid.batch * grid.height, [&](int thread, int64_t begin, int64_t end) {
    float* rows = scratch.data() + thread * share;
    float* padded_bias = rows + rows_size;
    float* pixel = padded_bias + bias_size;
    PixelTaps taps(maps, pixel + bias_size);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / grid.height;
      vertical_rows<T>(maps, b, task % grid.height, rows);
      const float* bias_values = nullptr;
      if (bias.data != nullptr) {
        fill_row(padded_bias, 0.f, bias_size);
        load_row(padded_bias, bias_row(bias, b), grid.channels);
        bias_values = padded_bias;
      }
      for (int64_t x = 0; x < grid.width; ++x) {
        taps.select(rows, x);
        Best best;
        if (taps.size() > kShortSum) {
          const float* cell = pixel;
          const float one = 1.f;
          taps.sum(bias_row(bias, b), pixel);
          best = best_class<0>(&cell, &one, 1, nullptr, grid.channels);
        } else if (taps.size() == 2) {
          best = best_class<2>(taps.cells(), taps.weights(), 2, bias_values, grid.channels);
        } else {
          best = best_class<0>(taps.cells(), taps.weights(), taps.size(), bias_values, grid.channels);
        }
        labels[task * grid.width + x] = Label(best.index);
        if (values != nullptr) from_float(best.value, values[task * grid.width + x]);
      }
    }
  });
}

}  // namespace

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
