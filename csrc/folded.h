// The composed window of an adaptive convolution: resize, padding and kernel taps of one axis as one table.
#pragma once

#include <cstdint>

#include "types.h"

namespace murf {

// Output i reads inputs first[i] .. first[i] + count[i] - 1; tap t of its kernel gives input first[i] + m the share
// weights[(i * taps + t) * window + m]. `window` is a multiple of 8, and shares beyond count[i] are zero.
// Input j is read by outputs reader_begin[j] .. reader_end[j] - 1 and perhaps not by all of them.
struct FoldedAxis {
  int64_t in, out, taps, window;
  const int32_t* first;
  const int32_t* count;
  const float* weights;
  const int32_t* reader_begin;
  const int32_t* reader_end;
};

// Output rows row_begin .. row_end - 1 are computed; the kernels hold those rows only.
struct AdaptiveConv {
  int64_t batch, channels;
  FoldedAxis y, x;
  int64_t row_begin, row_end;
};

// The networks of bilateral_kernels: float32, row-major, one behind the other in `params`:
// range_temp, sigma_spatial, weight0 (key, guides), bias0, weight1 (key, key), bias1, and with a fix-up
// weight0 (taps, taps + guides), bias0, weight1 (taps, taps), bias1. Masks multiply hidden channels of an image.
// The kernels of rows row_begin .. row_end - 1 are computed, and are all that the result holds.
struct Bilateral {
  int64_t batch, height, width, guides, key, radius;
  bool fixup;
  const float* params;
  const float* range_mask;  // (B, key) or null
  const float* fixup_mask;  // (B, taps) or null
  int64_t row_begin, row_end;
};

}  // namespace murf
