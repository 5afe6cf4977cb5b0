// The class of the largest summed, resized logit of every pixel of a row.
#pragma once

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

// The classes of the pixels of a row, by one thread.
class BestClasses {
 public:
  static int64_t floats(Maps maps, Grid grid) {
    return rows_floats(maps) + 2 * padded(grid.channels) + PixelTaps::floats(maps);
  }
  BestClasses(DType dtype, Maps maps, Grid grid, Bias bias, float* at)
      : dtype_(dtype), maps_(maps), grid_(grid), bias_(bias), rows_(at), padded_bias_(rows_ + rows_floats(maps)),
        pixel_(padded_bias_ + padded(grid.channels)), taps_(maps, pixel_ + padded(grid.channels)) {}

  // each(x, best) for those pixels of row y of image b that `counts(x)`.
  template <class Counts, class Each>
  void row(int64_t b, int64_t y, Counts counts, Each each) {
    vertical_rows(dtype_, maps_, b, y, rows_);
    const float* bias_values = nullptr;
    if (bias_.data != nullptr) {
      fill_row(padded_bias_, 0.f, padded(grid_.channels));
      load_row(padded_bias_, bias_row(bias_, b), grid_.channels);
      bias_values = padded_bias_;
    }
    for (int64_t x = 0; x < grid_.width; ++x) {
      if (!counts(x)) continue;
      taps_.select(rows_, x);
      Best best;
      if (taps_.size() > kShortSum) {
        const float* cell = pixel_;
        const float one = 1.f;
        taps_.sum(bias_row(bias_, b), pixel_);
        best = best_class<0>(&cell, &one, 1, nullptr, grid_.channels);
      } else if (taps_.size() == 2) {
        best = best_class<2>(taps_.cells(), taps_.weights(), 2, bias_values, grid_.channels);
      } else {
        best = best_class<0>(taps_.cells(), taps_.weights(), taps_.size(), bias_values, grid_.channels);
      }
      each(x, best);
    }
  }

 private:
  DType dtype_;
  Maps maps_;
  Grid grid_;
  Bias bias_;
  float *rows_, *padded_bias_, *pixel_;
  PixelTaps taps_;
};

}  // namespace
}  // namespace MURF_LEVEL
}  // namespace murf
