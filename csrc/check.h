// Arguments that fit each other, checked before a kernel takes them for addresses.
#pragma once

#include <stdexcept>

#include "types.h"

namespace murf::check {

// Every map has the size that its tables read, the batch of the result, and is brought to its grid.
inline void resize_to(const Maps& maps, const Grid& grid) {
  if (maps.size == 0) throw std::invalid_argument("murf_fast: the maps do not make up the result");
  for (const Map* m = maps.data; m != maps.data + maps.size; ++m)
    if (m->batch != grid.batch || m->height != m->y.in || m->width != m->x.in || m->y.out != grid.height ||
        m->x.out != grid.width)
      throw std::invalid_argument("murf_fast: a map, its tables and the result disagree");
}

// The maps share the channels of the result.
inline void share(const Maps& maps, const Grid& grid) {
  resize_to(maps, grid);
  for (const Map* m = maps.data; m != maps.data + maps.size; ++m)
    if (m->channels != grid.channels)
      throw std::invalid_argument("murf_fast: a map, its tables and the result disagree");
}

// Their channels, one behind the other, are those of the result.
inline void make_up(const Maps& maps, const Grid& grid) {
  resize_to(maps, grid);
  int64_t channels = 0;
  for (const Map* m = maps.data; m != maps.data + maps.size; ++m) channels += m->channels;
  if (channels != grid.channels) throw std::invalid_argument("murf_fast: the maps do not make up the result");
}

inline void gradient(const Map& map, int64_t batch) {
  if (map.batch != batch || map.height != map.y.out || map.width != map.x.out)
    throw std::invalid_argument("murf_fast: a gradient and its tables disagree");
}

// Every label is a class or the one that does not count: kernels take labels for addresses.
inline void labels(const CrossEntropy& ce, const Grid& grid) {
  const int64_t count = grid.batch * grid.height * grid.width;
  int64_t wrong = 0;
  for (int64_t i = 0; i < count; ++i)
    wrong |= int64_t(uint64_t(ce.target[i]) >= uint64_t(grid.channels)) & int64_t(ce.target[i] != ce.ignore_index);
  if (wrong != 0) throw std::invalid_argument("murf_fast.upsample_cross_entropy: `target` holds labels out of range");
}

// Layers on rows of pixels are multiplied in two types.
inline void multiplies(DType dtype) {
  if (dtype == DType::f16) throw std::invalid_argument("murf_fast: products are of float32 or bfloat16, got float16");
}

}  // namespace murf::check
