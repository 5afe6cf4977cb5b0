// adaptive_conv and its gradients. Resize and padding are folded into every pixel's kernel (FoldedAxis on both axes), so
// the low-resolution source is all that is read: out = sum over a small window of the source, with weights A_y^T K A_x.
// Neighbouring outputs share their window (two by two at a factor of two), and a load of the source serves them all.
#include "folded.h"
#include "kernels.h"
#include "micro.h"
#include "resample.h"

namespace murf {
namespace MURF_LEVEL {

// Folding works on rows of eight floats.
typedef float Oct __attribute__((vector_size(32)));
constexpr int64_t kOct = 8;

inline Oct load_oct(const float* p) {
  Oct v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store_oct(float* p, Oct v) { std::memcpy(p, &v, sizeof v); }

constexpr int64_t kTileWidth = 16;  // output columns that are staged together
constexpr int64_t kTileRows = 4;    // at most, of those that share their window

inline int64_t padded_octs(int64_t n) { return (n + kOct - 1) / kOct * kOct; }

// Outputs i, i + 1, ... that read the same inputs, at most `limit`.
inline int64_t group_size(const FoldedAxis& axis, int64_t i, int64_t end, int64_t limit) {
  int64_t n = 1;
  while (n < limit && i + n < end && axis.first[i + n] == axis.first[i] && axis.count[i + n] == axis.count[i]) ++n;
  return n;
}

// Taps of one pixel in float32, rows padded to whole octs (with whatever follows: the fold multiplies it by nothing).
template <class T>
inline void load_taps(float* dst, const Strided& kernels, int64_t b, int64_t y, int64_t x, int64_t taps) {
  const T* src = static_cast<const T*>(kernels.data) + b * kernels.stride_b + y * kernels.stride_y +
                 x * kernels.stride_x;
  const int64_t row = padded_octs(taps);
  for (int64_t i = 0; i < taps; ++i)
    for (int64_t j = 0; j < taps; ++j) dst[i * row + j] = to_float(src[(i * taps + j) * kernels.stride_c]);
}

// dst[m] = sum_j v[j] * A_x[j][m]
inline void fold_x(float* dst, const float* v, const FoldedAxis& axis, int64_t x) {
  const float* a = axis.weights + x * axis.taps * axis.window;
  for (int64_t m = 0; m < axis.window; m += kOct) {
    Oct sum{};
    for (int64_t j = 0; j < axis.taps; ++j) sum += v[j] * load_oct(a + j * axis.window + m);
    store_oct(dst + m, sum);
  }
}

// dst[j] = sum_i A_y[i][n] * K[i][j], the kernel's share of the window's row n
inline void fold_y(float* dst, const float* kernel, const FoldedAxis& axis, int64_t y, int64_t n) {
  const float* a = axis.weights + y * axis.taps * axis.window + n;
  const int64_t row = padded_octs(axis.taps);
  for (int64_t j = 0; j < row; j += kOct) {
    Oct sum{};
    for (int64_t i = 0; i < axis.taps; ++i) sum += a[i * axis.window] * load_oct(kernel + i * row + j);
    store_oct(dst + j, sum);
  }
}

// The transposes: a gradient of window weights (rows of width x.window) to one of the taps (rows padded to octs).
inline void unfold_taps(float* taps, float* scratch, const float* window, const FoldedAxis& y_axis, int64_t y,
                        const FoldedAxis& x_axis, int64_t x) {
  const float* ax = x_axis.weights + x * x_axis.taps * x_axis.window;
  const float* ay = y_axis.weights + y * y_axis.taps * y_axis.window;
  const int64_t row = padded_octs(x_axis.taps), rows = y_axis.count[y];
  for (int64_t n = 0; n < rows; ++n)
    for (int64_t j = 0; j < x_axis.taps; ++j) {
      Oct sum{};
      for (int64_t m = 0; m < x_axis.window; m += kOct)
        sum += load_oct(window + n * x_axis.window + m) * load_oct(ax + j * x_axis.window + m);
      float lane[kOct];
      store_oct(lane, sum);
      scratch[n * row + j] = ((lane[0] + lane[4]) + (lane[1] + lane[5])) + ((lane[2] + lane[6]) + (lane[3] + lane[7]));
    }
  for (int64_t i = 0; i < y_axis.taps; ++i)
    for (int64_t j = 0; j < row; j += kOct) {
      Oct sum{};
      for (int64_t n = 0; n < rows; ++n) sum += ay[i * y_axis.window + n] * load_oct(scratch + n * row + j);
      store_oct(taps + i * row + j, sum);
    }
}

// Rows of the source as float32 pixels padded to whole cache lines, kept while the windows of consecutive outputs
// need them.
class SourceRows {
 public:
  static int64_t floats(const AdaptiveConv& conv) {
    return conv.y.window * conv.x.in * padded(conv.channels) + padded(2 * conv.y.window);
  }

  SourceRows(const AdaptiveConv& conv, const Strided& source, float* scratch)
      : conv_(conv),
        source_(source),
        stride_(padded(conv.channels)),
        rows_(scratch),
        held_(reinterpret_cast<int64_t*>(scratch + conv.y.window * conv.x.in * stride_)) {
    for (int64_t i = 0; i < conv.y.window; ++i) held_[i] = -1;
  }

  template <class T>
  const float* row(int64_t b, int64_t y) {
    const int64_t slot = y % conv_.y.window, tag = b * conv_.y.in + y;
    float* dst = rows_ + slot * conv_.x.in * stride_;
    if (held_[slot] == tag) return dst;
    held_[slot] = tag;
    const T* src = static_cast<const T*>(source_.data) + b * source_.stride_b + y * source_.stride_y;
    if (source_.stride_c == 1 || conv_.channels == 1) {
      for (int64_t x = 0; x < conv_.x.in; ++x) load_row(dst + x * stride_, src + x * source_.stride_x, conv_.channels);
    } else {
      for (int64_t c = 0; c < conv_.channels; ++c)
        for (int64_t x = 0; x < conv_.x.in; ++x)
          dst[x * stride_ + c] = to_float(src[c * source_.stride_c + x * source_.stride_x]);
    }
    if (stride_ != conv_.channels)
      for (int64_t x = 0; x < conv_.x.in; ++x)
        fill_row(dst + x * stride_ + conv_.channels, 0.f, stride_ - conv_.channels);
    return dst;
  }

 private:
  const AdaptiveConv& conv_;
  const Strided& source_;
  int64_t stride_;
  float* rows_;
  int64_t* held_;
};

// A finished tile, pixels of `stride` floats, to one row of the output.
template <class T>
inline void write_tile(const Strided& out, int64_t b, int64_t y, int64_t x, int64_t pixels, int64_t channels,
                       const float* tile, int64_t stride, float* scratch, bool stream) {
  T* dst = static_cast<T*>(out.data) + b * out.stride_b + y * out.stride_y + x * out.stride_x;
  if (out.stride_c == 1 || channels == 1) {
    for (int64_t i = 0; i < pixels; ++i) {
      T* pixel = dst + i * out.stride_x;
      if (!stream) {
        store_row(pixel, tile + i * stride, channels);
      } else if constexpr (sizeof(T) == sizeof(float)) {
        stream_copy(pixel, tile + i * stride, channels * int64_t(sizeof(T)));
      } else {
        store_row(reinterpret_cast<T*>(scratch), tile + i * stride, channels);
        stream_copy(pixel, scratch, channels * int64_t(sizeof(T)));
      }
    }
    return;
  }
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t i = 0; i < pixels; ++i) from_float(tile[i * stride + c], dst[c * out.stride_c + i * out.stride_x]);
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

// Pixels of a group are dealt out in equal parts of at most kBlock.
inline int64_t part_size(int64_t pixels) {
  const int64_t parts = (pixels + kBlock - 1) / kBlock;
  return (pixels + parts - 1) / parts;
}

template <class T, class K>
static void forward(const AdaptiveConv& conv, const Strided& source, const Strided& kernels, const float* bias,
                    const Strided& out, int threads) {
  const int64_t stride = padded(conv.channels), window = conv.y.window * conv.x.window;
  const int64_t tap_floats = padded(conv.y.taps * padded_octs(conv.x.taps)), row_taps = padded(padded_octs(conv.x.taps));
  const int64_t tile_pixels = kTileRows * kTileWidth;
  const int64_t pointers = padded(conv.y.window * kPointerFloats);
  const int64_t share = SourceRows::floats(conv) + tap_floats + row_taps + tile_pixels * (padded(window) + stride) +
                        stride + pointers;
  Scratch scratch(share * threads);
  const bool stream = worth_streaming(conv.batch * conv.channels * conv.y.out * conv.x.out * int64_t(sizeof(T)));
  for_row_bands(conv, threads, [&](int thread, int64_t b, int64_t y_begin, int64_t y_end) {
    float* at = scratch.data() + thread * share;
    SourceRows rows(conv, source, at);
    float* taps = at + SourceRows::floats(conv);
    float* row_of_taps = taps + tap_floats;
    float* weights = row_of_taps + row_taps;
    float* tile = weights + tile_pixels * padded(window);
    float* typed = tile + tile_pixels * stride;
    const float** window_rows = reinterpret_cast<const float**>(typed + stride);
    for (int64_t y = y_begin; y < y_end;) {
      const int64_t group_rows = group_size(conv.y, y, y_end, kTileRows), height = conv.y.count[y];
      for (int64_t x0 = 0; x0 < conv.x.out; x0 += kTileWidth) {
        const int64_t columns = min64(kTileWidth, conv.x.out - x0);
        for (int64_t r = 0; r < group_rows; ++r)
          for (int64_t i = 0; i < columns; ++i) {
            float* w = weights + (r * kTileWidth + i) * padded(window);
            load_taps<K>(taps, kernels, b, y + r - conv.row_begin, x0 + i, conv.y.taps);
            for (int64_t n = 0; n < height; ++n) {
              fold_y(row_of_taps, taps, conv.y, y + r, n);
              fold_x(w + n * conv.x.window, row_of_taps, conv.x, x0 + i);
            }
          }
        // A slice of channels at a time keeps the window of the source in the first-level cache.
        const int64_t slice = 64;
        for (int64_t c = 0; c < stride; c += slice)
          for (int64_t x = x0; x < x0 + columns;) {
            const int64_t group_columns = group_size(conv.x, x, x0 + columns, kTileWidth);
            for (int64_t n = 0; n < height; ++n)
              window_rows[n] = rows.template row<T>(b, conv.y.first[y] + n) + conv.x.first[x] * stride + c;
            const Operand operand{window_rows, height, conv.x.count[x], stride};
            const int64_t pixels = group_rows * group_columns, part = part_size(pixels);
            for (int64_t p = 0; p < pixels; p += part) {
              const int64_t now = min64(part, pixels - p);
              const float* w[kBlock];
              float* dst[kBlock];
              for (int64_t k = 0; k < now; ++k) {
                const int64_t pixel = (p + k) / group_columns * kTileWidth + x - x0 + (p + k) % group_columns;
                w[k] = weights + pixel * padded(window);
                dst[k] = tile + pixel * stride + c;
              }
              product(operand, min64(slice, stride - c), now, w, conv.x.window, dst, false);
            }
            x += group_columns;
          }
        for (int64_t r = 0; r < group_rows; ++r) {
          float* pixels = tile + r * kTileWidth * stride;
          // Last: a sum that started with a large bias would be rounded to its digits at every tap.
          if (bias != nullptr)
            for (int64_t i = 0; i < columns; ++i)
              for (int64_t c = 0; c < conv.channels; ++c) pixels[i * stride + c] += bias[c];
          write_tile<T>(out, b, y + r, x0, columns, conv.channels, pixels, stride, typed, stream);
        }
      }
      y += group_rows;
    }
    if (stream) stream_fence();
  });
}

// Pixels of a gradient, in float32, padded with zeros.
template <class T>
inline void load_pixel(float* dst, const Strided& map, int64_t b, int64_t y, int64_t x, int64_t channels,
                       int64_t stride) {
  const T* src = static_cast<const T*>(map.data) + b * map.stride_b + y * map.stride_y + x * map.stride_x;
  if (map.stride_c == 1 || channels == 1) load_row(dst, src, channels);
  else
    for (int64_t c = 0; c < channels; ++c) dst[c] = to_float(src[c * map.stride_c]);
  fill_row(dst + channels, 0.f, stride - channels);
}

// grad_K = A_y (grad_out . window) A_x^T: the products of an output's gradient with its window's pixels, unfolded.
template <class T, class K>
static void backward_kernels(const AdaptiveConv& conv, const Strided& grad, const Strided& source,
                             const Strided& grad_kernels, int threads) {
  const int64_t stride = padded(conv.channels), window = conv.y.window * conv.x.window;
  const int64_t taps_row = padded_octs(conv.x.taps);
  const int64_t limit = 2;  // rows and columns that share a window: a tile of four gradients stays in registers
  const int64_t pointers = padded(window * kPointerFloats);
  const int64_t share = SourceRows::floats(conv) + limit * limit * (stride + padded(window)) +
                        padded(conv.y.taps * taps_row) + padded(conv.y.window * taps_row) + pointers;
  Scratch scratch(share * threads);
  for_row_bands(conv, threads, [&](int thread, int64_t b, int64_t y_begin, int64_t y_end) {
    float* at = scratch.data() + thread * share;
    SourceRows rows(conv, source, at);
    float* pixels = at + SourceRows::floats(conv);
    float* products = pixels + limit * limit * stride;
    float* taps = products + limit * limit * padded(window);
    float* folded = taps + padded(conv.y.taps * taps_row);
    const float** cells = reinterpret_cast<const float**>(folded + padded(conv.y.window * taps_row));
    for (int64_t y = y_begin; y < y_end;) {
      const int64_t group_rows = group_size(conv.y, y, y_end, limit), height = conv.y.count[y];
      for (int64_t x = 0; x < conv.x.out;) {
        const int64_t group_columns = group_size(conv.x, x, conv.x.out, limit), width = conv.x.count[x];
        const float* gradients[limit * limit];
        int64_t count = 0;
        for (int64_t r = 0; r < group_rows; ++r)
          for (int64_t i = 0; i < group_columns; ++i, ++count) {
            load_pixel<T>(pixels + count * stride, grad, b, y + r, x + i, conv.channels, stride);
            gradients[count] = pixels + count * stride;
          }
        fill_row(products, 0.f, count * padded(window));
        for (int64_t n = 0; n < height; ++n) {
          const float* row = rows.template row<T>(b, conv.y.first[y] + n) + conv.x.first[x] * stride;
          for (int64_t m = 0; m < width; ++m) cells[m] = row + m * stride;
          dots(gradients, count, cells, width, stride, products + n * conv.x.window, padded(window), false);
        }
        count = 0;
        for (int64_t r = 0; r < group_rows; ++r)
          for (int64_t i = 0; i < group_columns; ++i, ++count) {
            unfold_taps(taps, folded, products + count * padded(window), conv.y, y + r, conv.x, x + i);
            K* dst = static_cast<K*>(grad_kernels.data) + b * grad_kernels.stride_b + (y + r) * grad_kernels.stride_y +
                     (x + i) * grad_kernels.stride_x;
            for (int64_t k = 0; k < conv.y.taps; ++k)
              for (int64_t j = 0; j < conv.x.taps; ++j)
                from_float(taps[k * taps_row + j], dst[(k * conv.x.taps + j) * grad_kernels.stride_c]);
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
template <class T, class K>
static void backward_source(const AdaptiveConv& conv, const Strided& grad, const Strided& kernels, const Strided& out,
                            int threads) {
  const int64_t stride = padded(conv.channels), width = conv.x.window;
  const int64_t tap_floats = padded(conv.y.taps * padded_octs(conv.x.taps)), row_taps = padded(padded_octs(conv.x.taps));
  const int64_t limit = 2;
  const int64_t share = conv.x.in * stride + tap_floats + row_taps + limit * limit * (padded(width) + stride) + stride;
  Scratch scratch(share * threads);
  parallel(threads, conv.batch * conv.y.in, [&](int thread, int64_t begin, int64_t end) {
    float* sums = scratch.data() + thread * share;
    float* taps = sums + conv.x.in * stride;
    float* row_of_taps = taps + tap_floats;
    float* weights = row_of_taps + row_taps;
    float* pixels = weights + limit * limit * padded(width);
    float* typed = pixels + limit * limit * stride;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / conv.y.in, q = task % conv.y.in;
      fill_row(sums, 0.f, conv.x.in * stride);
      for (int64_t y = conv.y.reader_begin[q]; y < conv.y.reader_end[q];) {
        const int64_t n = q - conv.y.first[y];
        const int64_t group_rows = group_size(conv.y, y, conv.y.reader_end[q], limit);
        if (n < 0 || n >= conv.y.count[y]) {
          y += group_rows;
          continue;
        }
        for (int64_t x = 0; x < conv.x.out;) {
          const int64_t group_columns = group_size(conv.x, x, conv.x.out, limit);
          const float* w[limit * limit];
          const float* g[limit * limit];
          int64_t count = 0;
          for (int64_t r = 0; r < group_rows; ++r)
            for (int64_t i = 0; i < group_columns; ++i, ++count) {
              load_taps<K>(taps, kernels, b, y + r, x + i, conv.y.taps);
              fold_y(row_of_taps, taps, conv.y, y + r, n);
              fold_x(weights + count * padded(width), row_of_taps, conv.x, x + i);
              w[count] = weights + count * padded(width);
              if (sizeof(T) == sizeof(float) && grad.stride_c == 1 && stride == conv.channels) {
                g[count] = static_cast<const float*>(grad.data) + b * grad.stride_b + (y + r) * grad.stride_y +
                           (x + i) * grad.stride_x;
              } else {
                load_pixel<T>(pixels + count * stride, grad, b, y + r, x + i, conv.channels, stride);
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
      write_tile<T>(out, b, q, 0, conv.x.in, conv.channels, sums, stride, typed, false);
    }
  });
}

template <class Body>
static void with_dtypes(DType maps, DType kernels, Body body) {
  with_dtype(maps, [&](auto map) {
    // Kernels have the dtype of the maps or are float32.
    if (kernels == DType::f32) body(map, float{});
    else body(map, map);
  });
}

void adaptive_conv(DType dtype, DType kernels_dtype, AdaptiveConv conv, Strided source, Strided kernels,
                   const float* bias, Strided out, int threads) {
  with_dtypes(dtype, kernels_dtype, [&](auto map, auto kernel) {
    forward<decltype(map), decltype(kernel)>(conv, source, kernels, bias, out, threads);
  });
}

void adaptive_conv_backward_source(DType dtype, DType kernels_dtype, AdaptiveConv conv, Strided grad, Strided kernels,
                                   Strided out, int threads) {
  with_dtypes(dtype, kernels_dtype, [&](auto map, auto kernel) {
    backward_source<decltype(map), decltype(kernel)>(conv, grad, kernels, out, threads);
  });
}

void adaptive_conv_backward_kernels(DType dtype, DType kernels_dtype, AdaptiveConv conv, Strided grad, Strided source,
                                    Strided out, int threads) {
  with_dtypes(dtype, kernels_dtype, [&](auto map, auto kernel) {
    backward_kernels<decltype(map), decltype(kernel)>(conv, grad, source, out, threads);
  });
}

}  // namespace MURF_LEVEL
}  // namespace murf
