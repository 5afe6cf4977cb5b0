// upsample_confusion: how often a pixel of one label gets each class, from low-resolution logits; neither full-resolution
// logits nor labels exist.
#include "best_class.h"
#include "kernels.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

// Neighbouring pixels mostly have the same label and class: one addition to memory that threads share for a run of them.
class Run {
 public:
  explicit Run(int64_t* counts) : counts_(counts) {}
  ~Run() { end(); }
  void add(int64_t pair) {
    if (pair != pair_) end();
    pair_ = pair;
    ++length_;
  }

 private:
  void end() {
    if (length_ > 0) __atomic_fetch_add(counts_ + pair_, length_, __ATOMIC_RELAXED);
    length_ = 0;
  }

  int64_t* counts_;
  int64_t pair_ = -1, length_ = 0;
};

}  // namespace

void upsample_confusion(DType dtype, Maps maps, Grid grid, Bias bias, Labels target, int64_t* counts, int threads) {
  const int64_t share = padded(BestClasses::floats(maps, grid));
  Scratch scratch(share * threads);
  parallel(threads, grid.batch * grid.height, [&](int thread, int64_t begin, int64_t end) {
    BestClasses classes(dtype, maps, grid, bias, scratch.data() + thread * share);
    Run run(counts);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t row = task * grid.width;
      classes.row(
          task / grid.height, task % grid.height,
          [&](int64_t x) { return label_at(target, row + x) != target.ignore_index; },
          [&](int64_t x, Best best) { run.add(label_at(target, row + x) * grid.channels + best.index); });
    }
  });
}

}  // namespace MURF_LEVEL
}  // namespace murf
