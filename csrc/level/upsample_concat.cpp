// upsample_concat, channels_last: one write of the result. Planar outputs go through upsample_sum.cpp, a map at a time.
#include "kernels.h"
#include "resample.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

void concat(DType dtype, Maps maps, Grid grid, void* out, int threads) {
  const int64_t rows_size = rows_floats(maps);
  const int64_t share = rows_size + PixelWriter::floats(grid.channels);
  Scratch scratch(share * threads);
  const bool stream = worth_streaming(grid.batch * grid.height * grid.width * grid.channels * size_of(dtype));
  parallel(threads, grid.batch * grid.height, [&](int thread, int64_t begin, int64_t end) {
    float* rows = scratch.data() + thread * share;
    for (int64_t task = begin; task < end; ++task) {
      vertical_rows(dtype, maps, task / grid.height, task % grid.height, rows);
      PixelWriter writer(rows + rows_size, grid.channels, dtype, out, task * grid.width * grid.channels, stream);
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
  concat(dtype, maps, grid, out, threads);
}

void upsample_concat_planar(DType dtype, Maps maps, Grid grid, void* out, int threads) {
  const int64_t plane = grid.height * grid.width, stride_b = grid.channels * plane;
  char* dst = static_cast<char*>(out);
  for (const Map* map = maps.data; map != maps.data + maps.size; ++map) {
    const Grid own{grid.batch, map->channels, grid.height, grid.width};
    upsample_sum(dtype, {map, 1}, own, {nullptr, 0}, dst, false, stride_b, threads);
    dst += map->channels * plane * size_of(dtype);
  }
}

}  // namespace MURF_LEVEL
}  // namespace murf
