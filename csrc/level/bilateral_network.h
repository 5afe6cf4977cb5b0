// The parameters of bilateral_kernels and its 1x1 convolutions, on tiles with columns of pixels in the vector lanes. A
// ring of projected rows is all that is kept of the guidance's windows.
#pragma once

#include "folded.h"
#include "launch.h"
#include "micro.h"
#include "rows.h"

namespace murf {
namespace MURF_LEVEL {

constexpr int64_t kTile = 128;          // pixels of a row that are worked on together
constexpr int64_t kPitch = kTile + 16;  // apart in memory: a power of two would crowd a few cache sets

// A 1x1 convolution: weight (out, in), bias (out).
struct Dense {
  const float* weight;
  const float* bias;
  int64_t out, in;
};

// dst[o][i] = sum_k weight[o][k] src[k][i] + bias[o], rows `dst_pitch` and `src_pitch` apart
void apply_dense(const Dense& layer, const float* src, int64_t src_pitch, float* dst, int64_t dst_pitch,
                 int64_t length);

// The parameters, where they lie in the packed array, which the gradient's array follows.
struct Layers {
  int64_t taps, range_weight0, range_bias0, range_weight1, range_bias1, fixup_weight0, fixup_bias0, fixup_weight1,
      fixup_bias1, size;

  explicit Layers(const Bilateral& net) : taps((2 * net.radius + 1) * (2 * net.radius + 1)) {
    range_weight0 = 2;
    range_bias0 = range_weight0 + net.key * net.guides;
    range_weight1 = range_bias0 + net.key;
    range_bias1 = range_weight1 + net.key * net.key;
    fixup_weight0 = range_bias1 + net.key;
    fixup_bias0 = fixup_weight0 + taps * (taps + net.guides);
    fixup_weight1 = fixup_bias0 + taps;
    fixup_bias1 = fixup_weight1 + taps * taps;
    size = net.fixup ? fixup_bias1 + taps : fixup_weight0;
  }
};

// Guidance of `length` pixels in float32, zero up to the tile's width.
inline void load_guidance(DType dtype, float* dst, int64_t pitch, const Strided& guidance, int64_t guides, int64_t b,
                          int64_t y, int64_t x, int64_t length, int64_t width) {
  const int64_t at = b * guidance.stride_b + y * guidance.stride_y + x * guidance.stride_x;
  for (int64_t g = 0; g < guides; ++g) {
    load_values(dst + g * pitch, dtype, guidance.data, at + g * guidance.stride_c, guidance.stride_x, length);
    fill_row(dst + g * pitch + length, 0.f, width - length);
  }
}

// Projected rows of the guidance with reflected columns, as many as a window is high.
class ProjectedRows {
 public:
  // Column x of a row lies at x + kept margin; the margin holds `radius` reflected columns and zeros beyond them.
  static int64_t pitch(const Bilateral& net) { return padded(net.width + 4 * net.radius + 16); }
  static int64_t margin(const Bilateral& net) { return 2 * net.radius; }
  static int64_t floats(const Bilateral& net) {
    const int64_t rows = 2 * net.radius + 1;
    return rows * net.key * pitch(net) + (net.guides + 2 * net.key) * kPitch + padded(2 * rows);
  }

  ProjectedRows(DType dtype, const Bilateral& net, const Strided& guidance, float* scratch)
      : dtype_(dtype),
        net_(net),
        layers_(net),
        guidance_(guidance),
        rows_(scratch),
        tile_(scratch + (2 * net.radius + 1) * net.key * pitch(net)),
        held_(reinterpret_cast<int64_t*>(tile_ + (net.guides + 2 * net.key) * kPitch)) {
    for (int64_t i = 0; i < 2 * net.radius + 1; ++i) held_[i] = -1;
  }

  const float* row(int64_t b, int64_t y);

  float range_mask(int64_t b, int64_t k) const {
    return net_.range_mask == nullptr ? 1.f : net_.range_mask[b * net_.key + k];
  }

 private:
  DType dtype_;
  const Bilateral& net_;
  Layers layers_;
  const Strided& guidance_;
  float* rows_;
  float* tile_;
  int64_t* held_;
};

}  // namespace MURF_LEVEL
}  // namespace murf
