// The weights of gaussian_bilateral_upsample. Pixels that lie in the same cell and have windows of the same radius count
// the same cells equally often; they are worked on together, with pixels in the vector lanes.
#pragma once

#include "activations.h"
#include "launch.h"
#include "micro.h"
#include "rows.h"

namespace murf {
namespace MURF_LEVEL {

constexpr int64_t kPixels = 64;  // at most: the weights of 17 x 17 cells are 74 KB then

// The first of n pixels whose centre lies in `cell` or beyond.
inline int64_t first_pixel(int64_t cell, int64_t cells, int64_t n) {
  const int64_t twice = 2 * n * cell - cells;
  return twice <= 0 ? 0 : (twice + 2 * cells - 1) / (2 * cells);
}

// Cells that a window counts, row by row, and where a row of them begins.
struct Window {
  int64_t count, rows;
  int64_t* cell;   // index in the image
  int64_t* begin;  // of row i among the cells; rows + 1 entries
  float *x, *y;    // position relative to the cell in the middle, in pixels
  float* log;      // of how often it is counted
};

// Pixels with one window. Rows of kPixels floats, zero up to `width` pixels.
struct Patch {
  int64_t count, width;
  int64_t *row, *column;
  float *x, *y;    // position relative to the cell in the middle
  float* guidance;
  float* weights;  // of every cell
  float* largest;
  float* total;
};

// While one lives, its thread makes zeros of subnormal results, which cost a hundred times as much as others: weights of
// narrow Gaussians are subnormal nearly everywhere. Inputs are taken as they are: those in float16 may be subnormal.
class WithoutSubnormals {
 public:
#if defined(__SSE2__)
  WithoutSubnormals() : before_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(before_ | 0x8000); }
  ~WithoutSubnormals() { __builtin_ia32_ldmxcsr(before_); }

 private:
  unsigned before_;
#else
  WithoutSubnormals() {}
#endif
};

// A thread's window and pixels.
class Patches {
 public:
  static int64_t cells_of(const GaussianBilateral& u) {
    return min64(u.height, 2 * u.radius + 1) * min64(u.width, 2 * u.radius + 1);
  }
  static int64_t floats(const GaussianBilateral& u) {
    const int64_t cells = padded(cells_of(u)), rows = padded(2 * u.radius + 2);
    return 2 * (cells + rows) + 3 * cells + 2 * 2 * kPixels + (4 + u.guides + cells) * kPixels;
  }

  Patches(const Patches&) = delete;
  Patches& operator=(const Patches&) = delete;
  Patches(const GaussianBilateral& u, float* scratch)
      : u_(u), pitch_y_(double(u.out_height) / double(u.height)), pitch_x_(double(u.out_width) / double(u.width)) {
    const int64_t cells = padded(cells_of(u)), rows = padded(2 * u.radius + 2);
    const auto take = [&](int64_t n) {
      float* at = scratch;
      scratch += n;
      return at;
    };
    const auto indices = [&](int64_t n) { return reinterpret_cast<int64_t*>(take(2 * n)); };
    window_.cell = indices(cells), window_.begin = indices(rows);
    window_.x = take(cells), window_.y = take(cells), window_.log = take(cells);
    patch_.row = indices(kPixels), patch_.column = indices(kPixels);
    patch_.x = take(kPixels), patch_.y = take(kPixels);
    patch_.largest = take(kPixels), patch_.total = take(kPixels);
    patch_.guidance = take(u.guides * kPixels), patch_.weights = take(cells * kPixels);
  }

  // visit_window(window) and then visit(window, patch) for all pixels in cell (i, j) of image b, in a fixed order.
  template <class VisitWindow, class Visit>
  void each(int64_t b, int64_t i, int64_t j, VisitWindow visit_window, Visit visit) {
    const int64_t y0 = first_pixel(i, u_.height, u_.out_height), y1 = first_pixel(i + 1, u_.height, u_.out_height);
    const int64_t x0 = first_pixel(j, u_.width, u_.out_width), x1 = first_pixel(j + 1, u_.width, u_.out_width);
    if (y0 == y1 || x0 == x1) return;
    uint64_t present = u_.radii == nullptr ? uint64_t(1) << u_.radius : 0;
    if (u_.radii != nullptr)
      for (int64_t y = y0; y < y1; ++y)
        for (int64_t x = x0; x < x1; ++x) present |= uint64_t(1) << radius_of(b, y, x);
    for (int64_t radius = 1; radius <= u_.radius; ++radius) {
      if ((present >> radius & 1) == 0) continue;
      find_window(i, j, radius);
      visit_window(window_);
      patch_.count = 0;
      for (int64_t y = y0; y < y1; ++y)
        for (int64_t x = x0; x < x1; ++x) {
          if (radius_of(b, y, x) != radius) continue;
          const int64_t at = patch_.count++;
          patch_.row[at] = y, patch_.column[at] = x;
          patch_.y[at] = float(double(y) + 0.5 - (double(i) + 0.5) * pitch_y_);
          patch_.x[at] = float(double(x) + 0.5 - (double(j) + 0.5) * pitch_x_);
          if (patch_.count == kPixels) finish(b, visit);
        }
      if (patch_.count > 0) finish(b, visit);
    }
  }

  const float* cell(int64_t b, int64_t index) const {
    return u_.cells + (b * u_.height * u_.width + index) * (5 + u_.guides);
  }

 private:
  int64_t radius_of(int64_t b, int64_t y, int64_t x) const {
    if (u_.radii == nullptr) return u_.radius;
    return max64(1, min64(u_.radius, u_.radii[(b * u_.out_height + y) * u_.out_width + x]));
  }

  // The first or last cell of an axis stands for those beyond it; an only one, for those on both sides.
  static int64_t kind(int64_t i, int64_t n) { return n == 1 ? 2 : int64_t(i == 0 || i == n - 1); }

  void find_window(int64_t i, int64_t j, int64_t radius) {
    const int64_t n = u_.radius + 1;
    Window& w = window_;
    w.count = w.rows = 0;
    for (int64_t y = max64(0, i - radius); y <= min64(u_.height - 1, i + radius); ++y) {
      w.begin[w.rows++] = w.count;
      for (int64_t x = max64(0, j - radius); x <= min64(u_.width - 1, j + radius); ++x) {
        const int64_t dy = y > i ? y - i : i - y, dx = x > j ? x - j : j - x;
        const int64_t kinds = 3 * kind(y, u_.height) + kind(x, u_.width);
        const float log = u_.counts[((kinds * n + radius) * n + dy) * n + dx];
        if (log < 0.f) continue;
        w.cell[w.count] = y * u_.width + x;
        w.y[w.count] = float(double(y - i) * pitch_y_), w.x[w.count] = float(double(x - j) * pitch_x_);
        w.log[w.count++] = log;
      }
    }
    w.begin[w.rows] = w.count;
  }

  template <class Visit>
  void finish(int64_t b, Visit visit) {
    Patch& p = patch_;
    p.width = padded(p.count);
    fill_row(p.x + p.count, 0.f, p.width - p.count);
    fill_row(p.y + p.count, 0.f, p.width - p.count);
    const Strided& from = u_.guidance;
    for (int64_t g = 0; g < u_.guides; ++g) {
      const float* src = static_cast<const float*>(from.data) + b * from.stride_b + g * from.stride_c;
      float* row = p.guidance + g * kPixels;
      for (int64_t i = 0; i < p.count; ++i) row[i] = src[p.row[i] * from.stride_y + p.column[i] * from.stride_x];
      fill_row(row + p.count, 0.f, p.width - p.count);
    }
    weigh(b);
    visit(window_, patch_);
    p.count = 0;
  }

  void weigh(int64_t b) {
    Patch& p = patch_;
    fill_row(p.largest, -__builtin_inff(), p.width);
    for (int64_t k = 0; k < window_.count; ++k) {
      const float* c = cell(b, window_.cell[k]);
      float* row = p.weights + k * kPixels;
      for (int64_t i = 0; i < p.width; i += kLanes) {
        const Vec dx = load_vec(p.x + i) - window_.x[k], dy = load_vec(p.y + i) - window_.y[k];
        const Vec along = c[0] * dx + c[1] * dy, across = c[2] * dx + c[3] * dy;
        Vec tones{};
        for (int64_t g = 0; g < u_.guides; ++g) {
          const Vec difference = load_vec(p.guidance + g * kPixels + i) - c[5 + g];
          tones += difference * difference;
        }
        const Vec log = window_.log[k] - (along * along + across * across + c[4] * tones);
        store_vec(row + i, log);
        const Vec largest = load_vec(p.largest + i);
        store_vec(p.largest + i, log > largest ? log : largest);
      }
    }
    fill_row(p.total, 0.f, p.width);
    for (int64_t k = 0; k < window_.count; ++k) {
      float* row = p.weights + k * kPixels;
      for (int64_t i = 0; i < p.width; ++i) {
        row[i] = exp_row_element(row[i] - p.largest[i]);
        p.total[i] += row[i];
      }
    }
    for (int64_t i = 0; i < p.width; ++i) p.total[i] = 1.f / p.total[i];
    for (int64_t k = 0; k < window_.count; ++k) {
      float* row = p.weights + k * kPixels;
      for (int64_t i = 0; i < p.width; ++i) row[i] *= p.total[i];
    }
  }

  const WithoutSubnormals without_subnormals_;
  const GaussianBilateral& u_;
  double pitch_y_, pitch_x_;
  Window window_;
  Patch patch_;
};

}  // namespace MURF_LEVEL
}  // namespace murf
