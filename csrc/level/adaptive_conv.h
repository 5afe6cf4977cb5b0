// adaptive_conv and its gradients. Resize and padding are folded into every pixel's kernel (FoldedAxis on both axes), so
// the low-resolution source is all that is read: out = sum over a small window of the source, with weights A_y^T K A_x.
// Neighbouring outputs share their window (two by two at a factor of two), and a load of the source serves them all.
#pragma once

#include "folded.h"
#include "launch.h"
#include "micro.h"
#include "rows.h"

namespace murf {
namespace MURF_LEVEL {

// Folding works on rows of eight floats.
constexpr int64_t kOct = 8;

inline int64_t padded_octs(int64_t n) { return (n + kOct - 1) / kOct * kOct; }

// Outputs i, i + 1, ... that read the same inputs, at most `limit`.
inline int64_t group_size(const FoldedAxis& axis, int64_t i, int64_t end, int64_t limit) {
  int64_t n = 1;
  while (n < limit && i + n < end && axis.first[i + n] == axis.first[i] && axis.count[i + n] == axis.count[i]) ++n;
  return n;
}

// Taps of one pixel in float32, rows padded to whole octs (with whatever follows: the fold multiplies it by nothing).
inline void load_taps(DType dtype, float* dst, const Strided& kernels, int64_t b, int64_t y, int64_t x, int64_t taps) {
  const int64_t at = b * kernels.stride_b + y * kernels.stride_y + x * kernels.stride_x, row = padded_octs(taps);
  with_dtype(dtype, [&](auto tag) {
    const auto* src = static_cast<const decltype(tag)*>(kernels.data) + at;
    for (int64_t i = 0; i < taps; ++i)
      for (int64_t j = 0; j < taps; ++j) dst[i * row + j] = to_float(src[(i * taps + j) * kernels.stride_c]);
  });
}

// dst[m] = sum_j v[j] * A_x[j][m]
inline void fold_x(float* dst, const float* v, const FoldedAxis& axis, int64_t x) {
  const float* a = axis.weights + x * axis.taps * axis.window;
  for (int64_t m = 0; m < axis.window; m += kOct) {
    Vec8 sum{};
    for (int64_t j = 0; j < axis.taps; ++j) sum += v[j] * load_vec<Vec8>(a + j * axis.window + m);
    store_vec(dst + m, sum);
  }
}

// dst[j] = sum_i A_y[i][n] * K[i][j], the kernel's share of the window's row n
inline void fold_y(float* dst, const float* kernel, const FoldedAxis& axis, int64_t y, int64_t n) {
  const float* a = axis.weights + y * axis.taps * axis.window + n;
  const int64_t row = padded_octs(axis.taps);
  for (int64_t j = 0; j < row; j += kOct) {
    Vec8 sum{};
    for (int64_t i = 0; i < axis.taps; ++i) sum += a[i * axis.window] * load_vec<Vec8>(kernel + i * row + j);
    store_vec(dst + j, sum);
  }
}

// Rows of the source as float32 pixels padded to whole cache lines, kept while the windows of consecutive outputs
// need them.
class SourceRows {
 public:
  static int64_t floats(const AdaptiveConv& conv) {
    return conv.y.window * conv.x.in * padded(conv.channels) + padded(2 * conv.y.window);
  }

  SourceRows(DType dtype, const AdaptiveConv& conv, const Strided& source, float* scratch)
      : dtype_(dtype),
        conv_(conv),
        source_(source),
        stride_(padded(conv.channels)),
        rows_(scratch),
        held_(reinterpret_cast<int64_t*>(scratch + conv.y.window * conv.x.in * stride_)) {
    for (int64_t i = 0; i < conv.y.window; ++i) held_[i] = -1;
  }

  const float* row(int64_t b, int64_t y) {
    const int64_t slot = y % conv_.y.window, tag = b * conv_.y.in + y;
    float* dst = rows_ + slot * conv_.x.in * stride_;
    if (held_[slot] == tag) return dst;
    held_[slot] = tag;
    const int64_t at = b * source_.stride_b + y * source_.stride_y;
    with_dtype(dtype_, [&](auto tag) {
      const auto* src = static_cast<const decltype(tag)*>(source_.data) + at;
      if (source_.stride_c == 1 || conv_.channels == 1) {
        for (int64_t x = 0; x < conv_.x.in; ++x) load_row(dst + x * stride_, src + x * source_.stride_x, conv_.channels);
      } else {
        for (int64_t c = 0; c < conv_.channels; ++c)
          for (int64_t x = 0; x < conv_.x.in; ++x)
            dst[x * stride_ + c] = to_float(src[c * source_.stride_c + x * source_.stride_x]);
      }
    });
    if (stride_ != conv_.channels)
      for (int64_t x = 0; x < conv_.x.in; ++x)
        fill_row(dst + x * stride_ + conv_.channels, 0.f, stride_ - conv_.channels);
    return dst;
  }

 private:
  DType dtype_;
  const AdaptiveConv& conv_;
  const Strided& source_;
  int64_t stride_;
  float* rows_;
  int64_t* held_;
};

// A finished tile, pixels of `stride` floats, to one row of the output.
inline void write_tile(DType dtype, const Strided& out, int64_t b, int64_t y, int64_t x, int64_t pixels,
                       int64_t channels, const float* tile, int64_t stride, float* scratch, bool stream) {
  const int64_t at = b * out.stride_b + y * out.stride_y + x * out.stride_x;
  if (out.stride_c == 1 || channels == 1) {
    for (int64_t i = 0; i < pixels; ++i) {
      if (stream) stream_values(dtype, out.data, at + i * out.stride_x, tile + i * stride, channels, scratch);
      else store_values(dtype, out.data, at + i * out.stride_x, 1, tile + i * stride, channels);
    }
    return;
  }
  with_dtype(dtype, [&](auto tag) {
    auto* dst = static_cast<decltype(tag)*>(out.data) + at;
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t i = 0; i < pixels; ++i) from_float(tile[i * stride + c], dst[c * out.stride_c + i * out.stride_x]);
  });
}

// Tasks are bands of rows that share their windows: groups are not torn apart, and a band refills its source rows once.
template <class Body>
inline void for_row_bands(const AdaptiveConv& conv, int threads, Body body) {
  const int64_t rows = conv.row_end - conv.row_begin, bands = max64(1, min64(4 * threads, rows / 16));
  parallel(threads, conv.batch * bands, [&](int thread, int64_t begin, int64_t end) {
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / bands, band = task % bands;
      // A band begins and ends at an even row, where the groups of a doubling begin.
      const int64_t y0 = rows * band / bands / 2 * 2;
      const int64_t y1 = band + 1 == bands ? rows : rows * (band + 1) / bands / 2 * 2;
      body(thread, b, conv.row_begin + y0, conv.row_begin + y1);
    }
  });
}

}  // namespace MURF_LEVEL
}  // namespace murf
