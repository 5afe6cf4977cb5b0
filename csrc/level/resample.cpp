// The vertical half of a resize, for maps of any dtype: see resample.h.
#include "resample.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

// dst[x * stride + c] = sum_t w_t * map[b, c, y_t, x]
template <class T>
void vertical_row(const Map& map, int64_t b, int64_t y, float* dst) {
  const int64_t n = map.channels, stride = pixel_stride(map), width = map.x.in;
  const int64_t count = map.y.count[y];
  const bool dense = map.stride_x == n && stride == n;
  const int64_t runs = dense ? 1 : width, length = dense ? width * n : n;
  const T* src = static_cast<const T*>(map.data) + b * map.stride_b + map.y.first[y] * map.stride_y;
  for (int64_t x = 0; x < runs; ++x)
    combine_rows(dst + x * stride, src + x * map.stride_x, map.stride_y, map.y.weights + y * map.y.taps, count, length);
  if (stride != n)
    for (int64_t x = 0; x < width; ++x) fill_row(dst + x * stride + n, 0.f, stride - n);
}

}  // namespace

void vertical_rows(DType dtype, Maps maps, int64_t b, int64_t y, float* rows) {
  with_dtype(dtype, [&](auto tag) {
    for (const Map* map = maps.data; map != maps.data + maps.size; ++map) {
      vertical_row<decltype(tag)>(*map, b, y, rows);
      rows += row_floats(*map);
    }
  });
}

}  // namespace MURF_LEVEL
}  // namespace murf
