// upsample_concat, channels_last: one write of the result. Planar outputs go through upsample_sum.cpp, a map at a time.
#include "kernels.h"
#include "resample.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

template <class T>
void concat(Maps maps, Grid grid, T* out, int threads) {
  const int64_t rows_size = rows_floats(maps);
  const int64_t share = rows_size + PixelWriter<T>::floats(grid.channels);
  Scratch scratch(share * threads);
  const bool stream = worth_streaming(grid.batch * grid.height * grid.width * grid.channels * int64_t(sizeof(T)));
  parallel(threads, grid.batch * grid.height, [&](int thread, int64_t begin, int64_t end) {
    float* rows = scratch.data() + thread * share;
    for (int64_t task = begin; task < end; ++task) {
      vertical_rows<T>(maps, task / grid.height, task % grid.height, rows);
      PixelWriter<T> writer(rows + rows_size, grid.channels, out + task * grid.width * grid.channels, stream);
      for (int64_t x = 0; x < grid.width; ++x) {
        float* pixel = writer.next();
        const float* row = rows;
        for (int64_t m = 0; m < maps.size; ++m) {
          horizontal_pixel(maps.data[m], row, x, pixel);  // its padding is overwritten by the next map
          pixel += maps.data[m].channels;
          row += row_floats(maps.data[m]);
        }
        writer.commit();
      }
      writer.flush();
    }
    if (stream) stream_fence();
  });
}

}  // namespace

void upsample_concat(DType dtype, Maps maps, Grid grid, void* out, int threads) {
  with_dtype(dtype, [&](auto tag) { concat(maps, grid, static_cast<decltype(tag)*>(out), threads); });
}

void upsample_concat_planar(DType dtype, Maps maps, Grid grid, void* out, int threads) {
  with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    const int64_t plane = grid.height * grid.width, stride_b = grid.channels * plane;
    T* dst = static_cast<T*>(out);
    for (const Map* map = maps.data; map != maps.data + maps.size; ++map) {
      const Grid own{grid.batch, map->channels, grid.height, grid.width};
      upsample_sum(dtype, {map, 1}, own, {nullptr, 0}, dst, false, stride_b, threads);
      dst += map->channels * plane;
    }
  });
}

}  // namespace MURF_LEVEL
}  // namespace murf
