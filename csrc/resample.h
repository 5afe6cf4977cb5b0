// Walking a resize table, channels_last: the vertical taps of one output row are combined once into a float32 row of
// low-resolution width (it stays in the caches), and every output pixel combines a few of its cells.
#pragma once

#include "rows.h"

namespace murf {
namespace MURF_LEVEL {

// dst[x * C + c] = sum_t w_t * map[b, c, y_t, x]
template <class T>
inline void vertical_row(const Map& map, int64_t b, int64_t y, float* dst) {
  const int64_t n = map.channels, width = map.x.in;
  const int64_t count = map.y.count[y];
  if (count == 0) fill_row(dst, 0.f, width * n);
  for (int64_t t = 0; t < count; ++t) {
    const float w = map.y.weights[y * map.y.taps + t];
    const T* src = static_cast<const T*>(map.data) + b * map.stride_b + (map.y.first[y] + t) * map.stride_y;
    const bool dense = map.stride_x == n;
    const int64_t runs = dense ? 1 : width, length = dense ? width * n : n;
    for (int64_t x = 0; x < runs; ++x) {
      if (t == 0) scale_row(dst + x * length, src + x * map.stride_x, w, length);
      else add_scaled_row(dst + x * length, src + x * map.stride_x, w, length);
    }
  }
}

// dst[c] (+)= sum_t w_t * row[x_t * C + c]
inline void horizontal_pixel(const Map& map, const float* row, int64_t x, float* dst, bool accumulate) {
  const int64_t n = map.channels;
  combine_strided(dst, row + map.x.first[x] * n, n, map.x.weights + x * map.x.taps, map.x.count[x], n, accumulate);
}

// The vertical rows of several maps, one behind the other in a thread's scratch.
struct RowSet {
  static int64_t floats(Maps maps) {
    int64_t n = 0;
    for (int64_t m = 0; m < maps.size; ++m) n += padded(maps.data[m].x.in * maps.data[m].channels);
    return n;
  }
  static int64_t offset(Maps maps, int64_t index) { return floats(Maps{maps.data, index}); }
};

template <class T>
inline void vertical_rows(Maps maps, int64_t b, int64_t y, float* rows) {
  for (int64_t m = 0; m < maps.size; ++m) {
    vertical_row<T>(maps.data[m], b, y, rows);
    rows += padded(maps.data[m].x.in * maps.data[m].channels);
  }
}

// One pixel of the sum of all resized maps plus the bias.
inline void sum_pixel(Maps maps, const float* rows, const float* bias, int64_t x, float* dst) {
  const int64_t n = maps.data[0].channels;
  bool accumulate = bias != nullptr;
  if (accumulate) load_row(dst, bias, n);
  for (int64_t m = 0; m < maps.size; ++m) {
    horizontal_pixel(maps.data[m], rows, x, dst, accumulate);
    rows += padded(maps.data[m].x.in * n);
    accumulate = true;
  }
}

inline const float* bias_row(Bias bias, int64_t b) {
  return bias.data == nullptr ? nullptr : bias.data + b * bias.stride_b;
}

// Full rows of this size leave the caches before anyone reads them.
inline bool worth_streaming(int64_t bytes) { return bytes >= (int64_t(8) << 20); }

// Collects finished pixels of one dense row in the caches and writes them out in long runs.
template <class T>
class PixelWriter {
 public:
  static constexpr int64_t kPixels = 4096;  // 16 KB of float32: half a first-level cache

  // Scratch for one writer: the float32 run and its converted copy.
  static int64_t floats(int64_t channels) { return 2 * padded(capacity(channels) * channels); }

  PixelWriter(float* scratch, int64_t channels, T* dst, bool stream)
      : run_(scratch),
        typed_(reinterpret_cast<T*>(scratch + padded(capacity(channels) * channels))),
        channels_(channels),
        capacity_(capacity(channels)),
        dst_(dst),
        stream_(stream) {}

  float* next() { return run_ + used_ * channels_; }
  void commit() {
    if (++used_ == capacity_) flush();
  }
  void flush() {
    const int64_t n = used_ * channels_;
    if (n == 0) return;
    if (!stream_) {
      store_row(dst_, run_, n);
    } else if constexpr (sizeof(T) == sizeof(float)) {
      stream_copy(dst_, run_, n * int64_t(sizeof(T)));
    } else {
      store_row(typed_, run_, n);
      stream_copy(dst_, typed_, n * int64_t(sizeof(T)));
    }
    dst_ += n;
    used_ = 0;
  }

 private:
  static int64_t capacity(int64_t channels) { return max64(1, kPixels / max64(channels, 1)); }
  float* run_;
  T* typed_;
  int64_t channels_, capacity_;
  T* dst_;
  bool stream_;
  int64_t used_ = 0;
};

}  // namespace MURF_LEVEL
}  // namespace murf
