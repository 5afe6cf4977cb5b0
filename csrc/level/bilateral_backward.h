// The gradients of bilateral_kernels run in two sweeps: the first goes from the kernels back to the logits of every
// pixel, the second gathers each pixel's projection gradient from the logits around it.
#pragma once

#include "bilateral_network.h"

namespace murf {
namespace MURF_LEVEL {

// grad[p][q] += sum_i a[p][i] b[q][i], and bias[p] += sum_i a[p][i]
inline void add_weight_gradient(float* grad, float* bias, const float* a, int64_t a_rows, int64_t a_pitch,
                                const float* b, int64_t b_rows, int64_t b_pitch, int64_t width, const float** pointers) {
  for (int64_t p = 0; p < a_rows; ++p) {
    pointers[p] = a + p * a_pitch;
    Vec sum{};
    for (int64_t i = 0; i < width; i += kLanes) sum += load_vec(pointers[p] + i);
    bias[p] += sum_vec(sum);
  }
  for (int64_t q = 0; q < b_rows; ++q) pointers[a_rows + q] = b + q * b_pitch;
  dots(pointers, a_rows, pointers + a_rows, b_rows, width, grad, b_rows, true);
}

inline void transpose(float* dst, const float* src, int64_t rows, int64_t columns) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < columns; ++c) dst[c * rows + r] = src[r * columns + c];
}

// Weights of the four layers, transposed.
struct Transposed {
  static int64_t floats(const Bilateral& net) { return Layers(net).size; }

  Transposed(const Bilateral& net, float* scratch) {
    const Layers layers(net);
    const auto one = [&](int64_t at, int64_t out, int64_t in) {
      transpose(scratch + at, net.params + at, out, in);
      return Dense{scratch + at, nullptr, in, out};
    };
    range0 = one(layers.range_weight0, net.key, net.guides);
    range1 = one(layers.range_weight1, net.key, net.key);
    if (!net.fixup) return;
    fixup0 = one(layers.fixup_weight0, layers.taps, layers.taps + net.guides);
    fixup1 = one(layers.fixup_weight1, layers.taps, layers.taps);
  }

  Dense range0, range1, fixup0, fixup1;
};

// Both sweeps work on fixed bands of rows, each with parameter gradients of its own: the result does not depend on the
// number of threads.
struct Bands {
  int64_t count;
  int64_t begin(const Bilateral& net, int64_t band) const { return net.height * band / count; }
};

// Sweep 1. Writes grad_logits (B, H, taps, W), grad_guidance (B, H, guides, W), and the gradients of the two scalars
// and the fix-up.
void bilateral_backward_logits(DType dtype, DType grad_dtype, const Bilateral& net, const Strided& guidance,
                               const Strided& grad, const Transposed& back, Bands bands, float* grad_logits,
                               float* grad_guidance, float* grad_params, int threads);

// Sweep 2. A pixel's projection is the centre of its own window and a neighbour in the windows around it, also by
// reflection. Adds to grad_guidance and writes the gradients of the projection.
void bilateral_backward_guidance(DType dtype, const Bilateral& net, const Strided& guidance, const Transposed& back,
                                 Bands bands, const float* grad_logits, float* grad_guidance, float* grad_params,
                                 int threads);

}  // namespace MURF_LEVEL
}  // namespace murf
