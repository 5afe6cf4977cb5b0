// Arguments that fit each other, checked before a kernel takes them for addresses.
#pragma once

#include <stdexcept>
#include <string>

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
inline void labels(const char* op, const Labels& target, const Grid& grid) {
  const int64_t count = grid.batch * grid.height * grid.width;
  auto is_wrong = [&](int64_t i) {
    const int64_t label = label_at(target, i);
    return int64_t(uint64_t(label) >= uint64_t(grid.channels)) & int64_t(label != target.ignore_index);
  };
  int64_t wrong = 0;
  for (int64_t i = 0; i < count; ++i) wrong |= is_wrong(i);
  for (int64_t i = 0; wrong != 0 && i < count; ++i)
    if (is_wrong(i))
      throw std::invalid_argument(std::string("murf_fast.") + op + ": `target` must hold labels in [0, " +
                                  std::to_string(grid.channels) + ") or ignore_index " +
                                  std::to_string(target.ignore_index) + ", got " +
                                  std::to_string(label_at(target, i)));
}
inline void labels(const CrossEntropy& ce, const Grid& grid) {
  labels("upsample_cross_entropy", {ce.target, int64_t(sizeof(int64_t)), ce.ignore_index}, grid);
}

// Layers on rows of pixels are multiplied in two types.
inline void multiplies(DType dtype) {
  if (dtype == DType::f16) throw std::invalid_argument("murf_fast: products are of float32 or bfloat16, got float16");
}

}  // namespace murf::check
