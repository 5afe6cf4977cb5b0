// adaptive_conv, backward: to the source and to the kernels.
#include "adaptive_conv.h"
#include "kernels.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

// Rows and columns that share a window: a tile of four gradients stays in registers.
constexpr int64_t kShared = 2;

// Pixels of a gradient, in float32, padded with zeros.
inline void load_pixel(DType dtype, float* dst, const Strided& map, int64_t b, int64_t y, int64_t x, int64_t channels,
                       int64_t stride) {
  const int64_t at = b * map.stride_b + y * map.stride_y + x * map.stride_x;
  load_values(dst, dtype, map.data, at, channels == 1 ? 1 : map.stride_c, channels);
  fill_row(dst + channels, 0.f, stride - channels);
}

// The transposes: a gradient of window weights (rows of width x.window) to one of the taps (rows padded to octs).
inline void unfold_taps(float* taps, float* scratch, const float* window, const FoldedAxis& y_axis, int64_t y,
                        const FoldedAxis& x_axis, int64_t x) {
  const float* ax = x_axis.weights + x * x_axis.taps * x_axis.window;
  const float* ay = y_axis.weights + y * y_axis.taps * y_axis.window;
  const int64_t row = padded_octs(x_axis.taps), rows = y_axis.count[y];
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t j = 0; j < x_axis.taps; ++j) {
      Vec8 sum{};
      for (int64_t m = 0; m < x_axis.window; m += kOct)
        sum += load_vec<Vec8>(window + n * x_axis.window + m) * load_vec<Vec8>(ax + j * x_axis.window + m);
      float lane[kOct];
      store_vec(lane, sum);
      scratch[n * row + j] = ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));
    }
  for (int64_t i = 0; i < y_axis.taps; ++i)
    for (int64_t j = 0; j < row; j += kOct) {
      Vec8 sum{};
      for (int64_t n = 0; n < rows; ++n) sum += ay[i * y_axis.window + n] * load_vec<Vec8>(scratch + n * row + j);
      store_vec(taps + i * row + j, sum);
    }
}

// grad_K = A_y (grad_out . window) A_x^T: the products of an output's gradient with its window's pixels, unfolded.
void backward_kernels(DType dtype, DType kernels_dtype, const AdaptiveConv& conv, const Strided& grad,
                      const Strided& source, const Strided& grad_kernels, int threads) {
  const int64_t stride = padded(conv.channels), window = conv.y.window * conv.x.window;
  const int64_t taps_row = padded_octs(conv.x.taps);
  const int64_t pointers = padded(window * kPointerFloats);
  const int64_t share = SourceRows::floats(conv) + kShared * kShared * (stride + padded(window)) +
                        padded(conv.y.taps * taps_row) + padded(conv.y.window * taps_row) + pointers;
  Scratch scratch(share * threads);
  for_row_bands(conv, threads, [&](int thread, int64_t b, int64_t y_begin, int64_t y_end) {
    float* at = scratch.data() + thread * share;
    SourceRows rows(dtype, conv, source, at);
    float* pixels = at + SourceRows::floats(conv);
    float* products = pixels + kShared * kShared * stride;
    float* taps = products + kShared * kShared * padded(window);
    float* folded = taps + padded(conv.y.taps * taps_row);
    const float** cells = reinterpret_cast<const float**>(folded + padded(conv.y.window * taps_row));
    for (int64_t y = y_begin; y < y_end;) {
      const int64_t group_rows = group_size(conv.y, y, y_end, kShared), height = conv.y.count[y];
      for (int64_t x = 0; x < conv.x.out;) {
        const int64_t group_columns = group_size(conv.x, x, conv.x.out, kShared), width = conv.x.count[x];
        const float* gradients[kShared * kShared];
        int64_t count = 0;
        for (int64_t r = 0; r < group_rows; ++r)
          for (int64_t i = 0; i < group_columns; ++i, ++count) {
            load_pixel(dtype, pixels + count * stride, grad, b, y + r, x + i, conv.channels, stride);
            gradients[count] = pixels + count * stride;
          }
        fill_row(products, 0.f, count * padded(window));
        for (int64_t n = 0; n < height; ++n) {
          const float* row = rows.row(b, conv.y.first[y] + n) + conv.x.first[x] * stride;
          for (int64_t m = 0; m < width; ++m) cells[m] = row + m * stride;
          dots(gradients, count, cells, width, stride, products + n * conv.x.window, padded(window), false);
        }
        count = 0;
        for (int64_t r = 0; r < group_rows; ++r)
          for (int64_t i = 0; i < group_columns; ++i, ++count) {
            unfold_taps(taps, folded, products + count * padded(window), conv.y, y + r, conv.x, x + i);
            const int64_t to = b * grad_kernels.stride_b + (y + r) * grad_kernels.stride_y +
                               (x + i) * grad_kernels.stride_x;
            with_dtype(kernels_dtype, [&](auto tag) {
              auto* dst = static_cast<decltype(tag)*>(grad_kernels.data) + to;
              for (int64_t k = 0; k < conv.y.taps; ++k)
                for (int64_t j = 0; j < conv.x.taps; ++j)
                  from_float(taps[k * taps_row + j], dst[(k * conv.x.taps + j) * grad_kernels.stride_c]);
            });
          }
        x += group_columns;
      }
      y += group_rows;
    }
  });
}

// sums[m][i] += sum_p w[p][m] * grad[p][i]
template <int P, int V>
inline void scatter_block(float* sums, int64_t step, int64_t width, const float* const* w, const float* const* grad,
                          int64_t offset) {
  Vec g[P][V];
  for (int p = 0; p < P; ++p)
    for (int v = 0; v < V; ++v) g[p][v] = load_vec(grad[p] + offset + v * kLanes);
  for (int64_t m = 0; m < width; ++m, sums += step) {
    Vec s[V];
    for (int v = 0; v < V; ++v) s[v] = load_vec(sums + offset + v * kLanes);
    for (int p = 0; p < P; ++p) {
      const Vec weight = splat(w[p][m]);
      for (int v = 0; v < V; ++v) s[v] += weight * g[p][v];
    }
    for (int v = 0; v < V; ++v) store_vec(sums + offset + v * kLanes, s[v]);
  }
}

template <int P>
inline void scatter_runs(float* sums, int64_t step, int64_t width, const float* const* w, const float* const* grad,
                         int64_t length) {
  int64_t i = 0;
  for (; i + kWide * kLanes <= length; i += kWide * kLanes) scatter_block<P, kWide>(sums, step, width, w, grad, i);
  for (; i < length; i += kLanes) scatter_block<P, 1>(sums, step, width, w, grad, i);
}

// One row of the source's gradient: every output row that reads it gives each of its pixels' gradients to the pixels
// of its window in this row. Rows are independent and their readers come in order: no atomics, one result.
void backward_source(DType dtype, DType kernels_dtype, const AdaptiveConv& conv, const Strided& grad,
                     const Strided& kernels, const Strided& out, int threads) {
  const int64_t stride = padded(conv.channels), width = conv.x.window;
  const int64_t tap_floats = padded(conv.y.taps * padded_octs(conv.x.taps)), row_taps = padded(padded_octs(conv.x.taps));
  const int64_t share = conv.x.in * stride + tap_floats + row_taps + kShared * kShared * (padded(width) + stride) +
                        stride;
  Scratch scratch(share * threads);
  parallel(threads, conv.batch * conv.y.in, [&](int thread, int64_t begin, int64_t end) {
    float* sums = scratch.data() + thread * share;
    float* taps = sums + conv.x.in * stride;
    float* row_of_taps = taps + tap_floats;
    float* weights = row_of_taps + row_taps;
    float* pixels = weights + kShared * kShared * padded(width);
    float* typed = pixels + kShared * kShared * stride;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / conv.y.in, q = task % conv.y.in;
      fill_row(sums, 0.f, conv.x.in * stride);
      for (int64_t y = conv.y.reader_begin[q]; y < conv.y.reader_end[q];) {
        const int64_t n = q - conv.y.first[y];
        const int64_t group_rows = group_size(conv.y, y, conv.y.reader_end[q], kShared);
        if (n < 0 || n >= conv.y.count[y]) {
          y += group_rows;
          continue;
        }
        for (int64_t x = 0; x < conv.x.out;) {
          const int64_t group_columns = group_size(conv.x, x, conv.x.out, kShared);
          const float* w[kShared * kShared];
          const float* g[kShared * kShared];
          int64_t count = 0;
          for (int64_t r = 0; r < group_rows; ++r)
            for (int64_t i = 0; i < group_columns; ++i, ++count) {
              load_taps(kernels_dtype, taps, kernels, b, y + r, x + i, conv.y.taps);
              fold_y(row_of_taps, taps, conv.y, y + r, n);
              fold_x(weights + count * padded(width), row_of_taps, conv.x, x + i);
              w[count] = weights + count * padded(width);
              if (dtype == DType::f32 && grad.stride_c == 1 && stride == conv.channels) {
                g[count] = static_cast<const float*>(grad.data) + b * grad.stride_b + (y + r) * grad.stride_y +
                           (x + i) * grad.stride_x;
              } else {
                load_pixel(dtype, pixels + count * stride, grad, b, y + r, x + i, conv.channels, stride);
                g[count] = pixels + count * stride;
              }
            }
          float* to = sums + conv.x.first[x] * stride;
          if (count == 4) scatter_runs<4>(to, stride, conv.x.count[x], w, g, stride);
          else if (count == 2) scatter_runs<2>(to, stride, conv.x.count[x], w, g, stride);
          else scatter_runs<1>(to, stride, conv.x.count[x], w, g, stride);
          x += group_columns;
        }
        y += group_rows;
      }
      write_tile(dtype, out, b, q, 0, conv.x.in, conv.channels, sums, stride, typed, false);
    }
  });
}

}  // namespace

void adaptive_conv_backward_source(DType dtype, DType kernels_dtype, AdaptiveConv conv, Strided grad, Strided kernels,
                                   Strided out, int threads) {
  backward_source(dtype, kernels_dtype, conv, grad, kernels, out, threads);
}

void adaptive_conv_backward_kernels(DType dtype, DType kernels_dtype, AdaptiveConv conv, Strided grad, Strided source,
                                    Strided out, int threads) {
  backward_kernels(dtype, kernels_dtype, conv, grad, source, out, threads);
}

}  // namespace MURF_LEVEL
}  // namespace murf
