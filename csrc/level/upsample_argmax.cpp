// upsample_argmax: the class of the largest summed, resized logit of every pixel; full-resolution logits never exist.
#include "best_class.h"
#include "kernels.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

template <class T, class Label>
void argmax(Maps maps, Grid grid, Bias bias, Label* labels, T* values, int threads) {
  const int64_t share = padded(BestClasses<T>::floats(maps, grid));
  Scratch scratch(share * threads);
  parallel(threads, grid.batch * grid.height, [&](int thread, int64_t begin, int64_t end) {
    BestClasses<T> classes(maps, grid, bias, scratch.data() + thread * share);
    for (int64_t task = begin; task < end; ++task)
      classes.row(
          task / grid.height, task % grid.height, [](int64_t) { return true; },
          [&](int64_t x, Best best) {
            labels[task * grid.width + x] = Label(best.index);
            if (values != nullptr) from_float(best.value, values[task * grid.width + x]);
          });
  });
}

}  // namespace

void upsample_argmax(DType dtype, Maps maps, Grid grid, Bias bias, int label_bytes, void* labels, void* values,
                     int threads) {
  with_dtype(dtype, [&](auto tag) {
    using T = decltype(tag);
    T* v = static_cast<T*>(values);
    if (label_bytes == 1) argmax<T>(maps, grid, bias, static_cast<uint8_t*>(labels), v, threads);
    else if (label_bytes == 2) argmax<T>(maps, grid, bias, static_cast<int16_t*>(labels), v, threads);
    else argmax<T>(maps, grid, bias, static_cast<int32_t*>(labels), v, threads);
  });
}

}  // namespace MURF_LEVEL
}  // namespace murf
