// Walking a resize table, channels_last: the vertical taps of one output row are combined once into a float32 row of
// low-resolution width (it stays in the caches), and every output pixel combines a few of its cells.
#pragma once

#include "launch.h"
#include "rows.h"

namespace murf {
namespace MURF_LEVEL {

// Rows in scratch give every pixel a whole number of cache lines: aligned loads, and no remainder loops. The padding
// holds zeros.
inline int64_t pixel_stride(const Map& map) { return padded(map.channels); }
inline int64_t row_floats(const Map& map) { return map.x.in * pixel_stride(map); }

// dst[c] = sum_t w_t * row[x_t * stride + c], for c up to the padded channel count
inline void horizontal_pixel(const Map& map, const float* row, int64_t x, float* dst) {
  const int64_t stride = pixel_stride(map);
  combine_strided(dst, row + map.x.first[x] * stride, stride, map.x.weights + x * map.x.taps, map.x.count[x], stride);
}

// The vertical rows of several maps lie one behind the other in a thread's scratch.
inline int64_t rows_floats(Maps maps) {
  int64_t n = 0;
  for (int64_t m = 0; m < maps.size; ++m) n += row_floats(maps.data[m]);
  return n;
}

// The vertical rows of all maps, of which row y of image b of the result is made.
void vertical_rows(DType dtype, Maps maps, int64_t b, int64_t y, float* rows);

// The cells of all maps that one output pixel combines: pixel[c] = bias[c] + sum_t weights[t] * cells[t][c].
class PixelTaps {
 public:
  static int64_t capacity(Maps maps) {
    int64_t n = 0;
    for (int64_t m = 0; m < maps.size; ++m) n += maps.data[m].x.taps;
    return n;
  }
  static int64_t floats(Maps maps) {
    return padded(capacity(maps)) + padded(capacity(maps) * kPointerFloats);
  }

  PixelTaps(Maps maps, float* scratch)
      : maps_(maps), cells_(reinterpret_cast<const float**>(scratch)),
        weights_(scratch + padded(capacity(maps) * kPointerFloats)) {}

  void select(const float* rows, int64_t x) {
    size_ = 0;
    for (int64_t m = 0; m < maps_.size; ++m) {
      const Map& map = maps_.data[m];
      const int64_t stride = pixel_stride(map);
      const float* cell = rows + map.x.first[x] * stride;
      for (int64_t t = 0; t < map.x.count[x]; ++t, ++size_, cell += stride) {
        cells_[size_] = cell;
        weights_[size_] = map.x.weights[x * map.x.taps + t];
      }
      rows += row_floats(map);
    }
  }

  // Writes the padded channel count; the padding is zero.
  void sum(const float* bias, float* pixel) const {
    const int64_t n = maps_.data[0].channels, stride = pixel_stride(maps_.data[0]);
    if (bias != nullptr) {
      load_row(pixel, bias, n);
      fill_row(pixel + n, 0.f, stride - n);
    }
    combine(pixel, cells_, weights_, size_, stride, bias != nullptr);
  }

  const float* const* cells() const { return cells_; }
  const float* weights() const { return weights_; }
  int64_t size() const { return size_; }

 private:
  Maps maps_;
  const float** cells_;
  float* weights_;
  int64_t size_ = 0;
};

inline const float* bias_row(Bias bias, int64_t b) {
  return bias.data == nullptr ? nullptr : bias.data + b * bias.stride_b;
}

// Collects finished pixels of one dense row in the caches and writes them out in long runs.
class PixelWriter {
 public:
  static constexpr int64_t kFloats = 4096;  // 16 KB of float32: half a first-level cache

  // Scratch for one writer: the float32 run and its converted copy. A pixel may be written with its padding, which
  // the next pixel overwrites and the room at the end catches.
  static int64_t floats(int64_t channels) { return 2 * run_floats(channels); }

  // Writes to `dst` from element `at` on.
  PixelWriter(float* scratch, int64_t channels, DType dtype, void* dst, int64_t at, bool stream)
      : run_(scratch),
        typed_(scratch + run_floats(channels)),
        channels_(channels),
        capacity_(capacity(channels)),
        dtype_(dtype),
        dst_(dst),
        at_(at),
        stream_(stream) {}

  float* next() { return run_ + used_ * channels_; }
  void commit() {
    if (++used_ == capacity_) flush();
  }
  void flush() {
    const int64_t n = used_ * channels_;
    if (n == 0) return;
    if (stream_) stream_values(dtype_, dst_, at_, run_, n, typed_);
    else store_values(dtype_, dst_, at_, 1, run_, n);
    at_ += n;
    used_ = 0;
  }

 private:
  static int64_t capacity(int64_t channels) { return max64(1, kFloats / channels); }
  static int64_t run_floats(int64_t channels) { return padded(capacity(channels) * channels) + 16; }
  float *run_, *typed_;
  int64_t channels_, capacity_;
  DType dtype_;
  void* dst_;
  int64_t at_;
  bool stream_;
  int64_t used_ = 0;
};

}  // namespace MURF_LEVEL
}  // namespace murf
