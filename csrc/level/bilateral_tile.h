// One tile of bilateral_kernels on its way from logits to kernels, for the result and for its gradients.
#pragma once

#include "bilateral_network.h"

namespace murf {
namespace MURF_LEVEL {

// A row beyond the border is the one mirrored at it.
inline int64_t reflect(int64_t i, int64_t n) { return i < 0 ? -i : (i >= n ? 2 * (n - 1) - i : i); }

// Everything of one tile on the way from logits to kernels; rows of kPitch floats.
struct Tile {
  const Bilateral& net;
  Layers layers;
  float temperature;
  float* spatial;     // (taps)
  float* logits;      // (taps) rows
  float* similarity;  // (taps): the softmax
  float* kernels;     // (taps + guides): normalized kernels with the guidance behind them
  float* before;      // (taps): the fix-up's hidden layer before
  float* hidden;      // (taps): and after its activation
  float* total;       // 1 row: sum of similarity * spatial

  static int64_t floats(const Bilateral& net) {
    const int64_t taps = Layers(net).taps;
    return padded(taps) + (5 * taps + net.guides + 1) * kPitch;
  }

  Tile(const Bilateral& n, float* scratch);

  // Squared distance of a tap from the centre on a grid from -1 to 1.
  float distance(int64_t i, int64_t j) const {
    const float radius = float(net.radius), dy = float(i - net.radius), dx = float(j - net.radius);
    return net.radius == 0 ? 2.f : (dy / radius) * (dy / radius) + (dx / radius) * (dx / radius);
  }

  // Logits, their softmax and the kernels of `width` pixels from x on.
  void normalized(ProjectedRows& rows, int64_t b, int64_t y, int64_t x, int64_t width);

  // The fix-up's hidden layer, from the kernels and the guidance behind them.
  void fixup_hidden(int64_t b, int64_t width);

  float fixup_mask(int64_t b, int64_t t) const {
    return net.fixup_mask == nullptr ? 1.f : net.fixup_mask[b * layers.taps + t];
  }
};

}  // namespace MURF_LEVEL
}  // namespace murf
