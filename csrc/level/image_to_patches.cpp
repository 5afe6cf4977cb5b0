// image_to_patches: resize, scale, normalize and cut an image into patches in one pass that writes the operand of the
// patch projection. Neither the resized nor the normalized image exists. Normalization is affine per channel and the rows
// of a resize sum to one, so it is applied to the finished pixel.
#include "kernels.h"
#include "launch.h"
#include "rows.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

// dst[c][x] = sum_t w_t * image[b, c, y_t, x] for the three channels, planar
template <class In>
void blend_rows_of(const Image& image, const Axis& axis, int64_t b, int64_t y, float* mixed, float* planar,
                   int64_t planar_stride) {
  const int64_t width = image.width;
  const bool interleaved = image.stride_c == 1 && image.stride_x == 3;
  for (int64_t c = 0; c < (interleaved ? 1 : 3); ++c) {
    const int64_t length = interleaved ? 3 * width : width;
    float* dst = interleaved ? mixed : planar + c * planar_stride;
    const In* src = static_cast<const In*>(image.data) + b * image.stride_b + c * image.stride_c +
                    axis.first[y] * image.stride_y;
    combine_rows(dst, src, image.stride_y, axis.weights + y * axis.taps, axis.count[y], length);
  }
  if (!interleaved) return;
  for (int64_t c = 0; c < 3; ++c) {
    float* dst = planar + c * planar_stride;
    for (int64_t x = 0; x < width; ++x) dst[x] = mixed[3 * x + c];
  }
}

void blend_rows(bool is_uint8, DType dtype, const Image& image, const Axis& axis, int64_t b, int64_t y, float* mixed,
                float* planar, int64_t planar_stride) {
  if (is_uint8) return blend_rows_of<uint8_t>(image, axis, b, y, mixed, planar, planar_stride);
  with_dtype(dtype, [&](auto tag) { blend_rows_of<decltype(tag)>(image, axis, b, y, mixed, planar, planar_stride); });
}

// dst[x] = gain * sum_t w_t * src[x_t] + offset
void narrow_row(const Axis& axis, const float* __restrict src, float gain, float offset, int64_t n,
                float* __restrict dst) {
  if (axis.taps == 2) {  // src has room behind it, and the weight of a missing second tap is zero
    for (int64_t x = 0; x < n; ++x) {
      const int64_t at = axis.first[x];
      dst[x] = gain * (axis.weights[2 * x] * src[at] + axis.weights[2 * x + 1] * src[at + 1]) + offset;
    }
    return;
  }
  for (int64_t x = 0; x < n; ++x)
    dst[x] = gain * weighted_sum(axis.weights + x * axis.taps, src + axis.first[x], axis.count[x]) + offset;
}

template <class Out>
void patches(bool is_uint8, DType in, const Image& image, Axis axis_y, Axis axis_x, const PatchRows& rows, Out* out,
             int threads) {
  const int64_t p = rows.patch, grid_h = axis_y.out / p, grid_w = axis_x.out / p, width = grid_w * p;
  const int64_t planar_stride = padded(image.width + 1);
  const int64_t share = padded(3 * image.width) + 3 * planar_stride + 3 * padded(width);
  Scratch scratch(share * threads);
  parallel(threads, image.batch * grid_h, [&](int thread, int64_t begin, int64_t end) {
    float* mixed = scratch.data() + thread * share;
    float* planar = mixed + padded(3 * image.width);
    float* pixels = planar + 3 * planar_stride;
    fill_row(planar, 0.f, 3 * planar_stride);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / grid_h, patch_y = task % grid_h;
      Out* dst = out + b * rows.stride_b + patch_y * grid_w * rows.stride_row;
      for (int64_t yy = 0; yy < p; ++yy) {
        blend_rows(is_uint8, in, image, axis_y, b, patch_y * p + yy, mixed, planar, planar_stride);
        for (int64_t c = 0; c < 3; ++c)
          narrow_row(axis_x, planar + c * planar_stride, rows.gain[c], rows.offset[c], width,
                     pixels + c * padded(width));
        for (int64_t patch_x = 0; patch_x < grid_w; ++patch_x) {
          Out* row = dst + patch_x * rows.stride_row;
          for (int64_t c = 0; c < 3; ++c) {
            const float* src = pixels + c * padded(width) + patch_x * p;
            if (rows.channels_first) {
              store_row(row + (c * p + yy) * p, src, p);
            } else {
              for (int64_t xx = 0; xx < p; ++xx) from_float(src[xx], row[(yy * p + xx) * 3 + c]);
            }
          }
        }
      }
    }
  });
}

}  // namespace

void image_to_patches(bool is_uint8, DType in, DType out, Image image, Axis axis_y, Axis axis_x, PatchRows rows,
                      void* result, int threads) {
  with_dtype(out, [&](auto out_tag) {
    patches(is_uint8, in, image, axis_y, axis_x, rows, static_cast<decltype(out_tag)*>(result), threads);
  });
}

}  // namespace MURF_LEVEL
}  // namespace murf
