// upsample_sum: the sum of several resized maps plus a bias, for channels_last and for planar (B, C, H, W) outputs.
#include "kernels.h"
#include "resample.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

void sum_channels_last(DType dtype, Maps maps, Grid grid, Bias bias, void* out, int threads) {
  const int64_t rows_size = rows_floats(maps);
  const int64_t share = rows_size + PixelTaps::floats(maps) + PixelWriter::floats(grid.channels);
  Scratch scratch(share * threads);
  const bool stream = worth_streaming(grid.batch * grid.height * grid.width * grid.channels * size_of(dtype));
  parallel(threads, grid.batch * grid.height, [&](int thread, int64_t begin, int64_t end) {
    float* rows = scratch.data() + thread * share;
    PixelTaps taps(maps, rows + rows_size);
    float* run = rows + rows_size + PixelTaps::floats(maps);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / grid.height;
      vertical_rows(dtype, maps, b, task % grid.height, rows);
      PixelWriter writer(run, grid.channels, dtype, out, task * grid.width * grid.channels, stream);
      for (int64_t x = 0; x < grid.width; ++x) {
        taps.select(rows, x);
        taps.sum(bias_row(bias, b), writer.next());
        writer.commit();
      }
      writer.flush();
    }
    if (stream) stream_fence();
  });
}

// Planar: rows of the map are brought to the output's width once and kept in a ring as deep as the vertical filter;
// an output row is then a few long multiply-adds.
class WidenedRows {
 public:
  // The widened rows, a float32 copy of one source row, and a tag per ring slot.
  static int64_t floats(const Map& map) {
    return padded(map.y.taps * padded(map.x.out)) + padded(map.x.in) + padded(map.y.taps);
  }

  WidenedRows(const Map& map, float* scratch)
      : map_(map),
        ring_(scratch),
        source_(scratch + padded(map.y.taps * padded(map.x.out))),
        held_(reinterpret_cast<int32_t*>(source_ + padded(map.x.in))) {}

  void clear() {
    for (int64_t t = 0; t < map_.y.taps; ++t) held_[t] = -1;
  }

  // Row `index` of the plane that begins `plane` elements into the map.
  const float* row(DType dtype, int64_t plane, int64_t index) {
    const int64_t slot = index % map_.y.taps;
    float* dst = ring_ + slot * padded(map_.x.out);
    if (held_[slot] == index) return dst;
    held_[slot] = int32_t(index);
    load_values(source_, dtype, map_.data, plane + index * map_.stride_y, 1, map_.x.in);
    const Axis& axis = map_.x;
    for (int64_t x = 0; x < axis.out; ++x)
      dst[x] = weighted_sum(axis.weights + x * axis.taps, source_ + axis.first[x], axis.count[x]);
    return dst;
  }

 private:
  const Map& map_;
  float* ring_;
  float* source_;
  int32_t* held_;
};

void sum_planar(DType dtype, Maps maps, Grid grid, Bias bias, void* out, int64_t out_stride_b, int threads) {
  int64_t taps = 0, rings = 0;
  for (int64_t m = 0; m < maps.size; ++m) {
    taps += maps.data[m].y.taps;
    rings += WidenedRows::floats(maps.data[m]);
  }
  // per thread: rings, the finished row and its converted copy, tap weights, tap pointers
  const int64_t pointer_floats = padded(taps * kPointerFloats);
  const int64_t share = rings + 2 * padded(grid.width) + padded(taps) + pointer_floats;
  Scratch scratch(share * threads);
  const int64_t planes = grid.batch * grid.channels;
  // Few planes are cut into bands of rows; a band begins with empty rings, so bands are not made smaller than needed.
  const int64_t bands = max64(1, min64((4 * threads + planes - 1) / max64(planes, 1), (grid.height + 31) / 32));
  const bool stream = worth_streaming(planes * grid.height * grid.width * size_of(dtype));
  parallel(threads, planes * bands, [&](int thread, int64_t begin, int64_t end) {
    float* ring_scratch = scratch.data() + thread * share;
    float* finished = ring_scratch + rings;
    float* typed = finished + padded(grid.width);
    float* weights = finished + 2 * padded(grid.width);
    const float** pointers = reinterpret_cast<const float**>(weights + padded(taps));
    for (int64_t task = begin; task < end; ++task) {
      const int64_t plane = task / bands, band = task % bands;
      const int64_t b = plane / grid.channels, c = plane % grid.channels;
      const float* row_bias = bias_row(bias, b);
      const int64_t dst = b * out_stride_b + c * grid.height * grid.width;
      for (int64_t m = 0, offset = 0; m < maps.size; offset += WidenedRows::floats(maps.data[m]), ++m)
        WidenedRows(maps.data[m], ring_scratch + offset).clear();
      for (int64_t y = grid.height * band / bands; y < grid.height * (band + 1) / bands; ++y) {
        int64_t used = 0;
        float* at = ring_scratch;
        for (int64_t m = 0; m < maps.size; ++m) {
          const Map& map = maps.data[m];
          const int64_t source = b * map.stride_b + c * map.stride_c;
          WidenedRows ring(map, at);
          for (int64_t t = 0; t < map.y.count[y]; ++t, ++used) {
            pointers[used] = ring.row(dtype, source, map.y.first[y] + t);
            weights[used] = map.y.weights[y * map.y.taps + t];
          }
          at += WidenedRows::floats(map);
        }
        if (row_bias != nullptr) fill_row(finished, row_bias[c], grid.width);
        combine(finished, pointers, weights, used, grid.width, row_bias != nullptr);
        const int64_t to = dst + y * grid.width;
        if (stream) stream_values(dtype, out, to, finished, grid.width, typed);
        else store_values(dtype, out, to, 1, finished, grid.width);
      }
    }
    if (stream) stream_fence();
  });
}

}  // namespace

void upsample_sum(DType dtype, Maps maps, Grid grid, Bias bias, void* out, bool channels_last, int64_t out_stride_b,
                  int threads) {
  if (channels_last) sum_channels_last(dtype, maps, grid, bias, out, threads);
  else sum_planar(dtype, maps, grid, bias, out, out_stride_b, threads);
}

}  // namespace MURF_LEVEL
}  // namespace murf
