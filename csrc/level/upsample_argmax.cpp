// upsample_argmax: the class of the largest summed, resized logit of every pixel; full-resolution logits never exist.
#include "best_class.h"
#include "kernels.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

template <class Label>
void argmax(DType dtype, Maps maps, Grid grid, Bias bias, Label* labels, void* values, int threads) {
  const int64_t share = padded(BestClasses::floats(maps, grid));
  Scratch scratch(share * threads);
  parallel(threads, grid.batch * grid.height, [&](int thread, int64_t begin, int64_t end) {
    BestClasses classes(dtype, maps, grid, bias, scratch.data() + thread * share);
    for (int64_t task = begin; task < end; ++task)
      classes.row(
          task / grid.height, task % grid.height, [](int64_t) { return true; },
          [&](int64_t x, Best best) {
            const int64_t at = task * grid.width + x;
            labels[at] = Label(best.index);
            if (values != nullptr)
              with_dtype(dtype, [&](auto tag) { from_float(best.value, static_cast<decltype(tag)*>(values)[at]); });
          });
  });
}

}  // namespace

void upsample_argmax(DType dtype, Maps maps, Grid grid, Bias bias, int label_bytes, void* labels, void* values,
                     int threads) {
  if (label_bytes == 1) argmax(dtype, maps, grid, bias, static_cast<uint8_t*>(labels), values, threads);
  else if (label_bytes == 2) argmax(dtype, maps, grid, bias, static_cast<int16_t*>(labels), values, threads);
  else argmax(dtype, maps, grid, bias, static_cast<int32_t*>(labels), values, threads);
}

}  // namespace MURF_LEVEL
}  // namespace murf
