// bilateral_kernels, backward: from the logits of every pixel to its guidance, through the range network.
#include "activations.h"
#include "bilateral_backward.h"
#include "bilateral_tile.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

// dst[c][i] (+)= sum_k g[k][i] * p[k][c * pitch + i], for C rows c and V vectors of i
template <int C, int V>
inline void modulated_block(float* dst, int64_t dst_pitch, const float* const* g, const float* const* p, int64_t terms,
                            int64_t pitch, bool accumulate) {
  Vec sum[C][V];
  for (int c = 0; c < C; ++c)
    for (int v = 0; v < V; ++v) sum[c][v] = accumulate ? load_vec(dst + c * dst_pitch + v * kLanes) : Vec{};
  for (int64_t k = 0; k < terms; ++k)
    for (int v = 0; v < V; ++v) {
      const Vec weight = load_vec(g[k] + v * kLanes);
      for (int c = 0; c < C; ++c) sum[c][v] += weight * load_vec(p[k] + c * pitch + v * kLanes);
    }
  for (int c = 0; c < C; ++c)
    for (int v = 0; v < V; ++v) store_vec(dst + c * dst_pitch + v * kLanes, sum[c][v]);
}

// Products of shifted logit gradients with shifted projections, summed: one side of the gradient of a correlation.
class ModulatedSum {
 public:
  static int64_t floats(int64_t terms) { return padded(4 * terms * kPointerFloats); }

  ModulatedSum(int64_t capacity, float* scratch)
      : g_(reinterpret_cast<const float**>(scratch)), p_(g_ + capacity), moved_(p_ + capacity) {}

  void clear() { terms_ = 0; }
  void add(const float* g, const float* p) {
    g_[terms_] = g;
    p_[terms_++] = p;
  }

  // dst[c][i] for `key` rows c and `width` columns i
  void evaluate(float* dst, int64_t dst_pitch, int64_t key, int64_t pitch, int64_t width, bool accumulate) {
    const float** p = moved_;
    const float** g = moved_ + terms_;
    for (int64_t i = 0; i < width; i += kLanes)
      for (int64_t c = 0; c < key;) {
        for (int64_t k = 0; k < terms_; ++k) {
          g[k] = g_[k] + i;
          p[k] = p_[k] + c * pitch + i;
        }
        float* to = dst + c * dst_pitch + i;
        if (c + 8 <= key) {
          modulated_block<8, 1>(to, dst_pitch, g, p, terms_, pitch, accumulate);
          c += 8;
        } else {
          modulated_block<1, 1>(to, dst_pitch, g, p, terms_, pitch, accumulate);
          c += 1;
        }
      }
  }

 private:
  const float** g_;
  const float** p_;
  const float** moved_;
  int64_t terms_ = 0;
};

// Rows of logit gradients between margins of zeros.
class GradientRows {
 public:
  static int64_t pitch(const Bilateral& net) { return ProjectedRows::pitch(net); }
  static int64_t floats(const Bilateral& net) {
    const int64_t rows = 2 * net.radius + 1;
    return rows * rows * rows * pitch(net) + padded(2 * rows);
  }

  GradientRows(const Bilateral& net, const float* grad_logits, float* scratch)
      : net_(net), source_(grad_logits), rows_(scratch) {
    const int64_t n = 2 * net.radius + 1;
    held_ = reinterpret_cast<int64_t*>(scratch + n * n * n * pitch(net));
    for (int64_t i = 0; i < n; ++i) held_[i] = -1;
    fill_row(rows_, 0.f, n * n * n * pitch(net));
  }

  const float* row(int64_t b, int64_t y) {
    const int64_t n = 2 * net_.radius + 1, slot = y % n, tag = b * net_.height + y;
    float* dst = rows_ + slot * n * n * pitch(net_);
    if (held_[slot] == tag) return dst;
    held_[slot] = tag;
    for (int64_t t = 0; t < n * n; ++t)
      load_row(dst + t * pitch(net_) + ProjectedRows::margin(net_), source_ + (tag * n * n + t) * net_.width,
               net_.width);
    return dst;
  }

 private:
  const Bilateral& net_;
  const float* source_;
  float* rows_;
  int64_t* held_;
};

}  // namespace

void bilateral_backward_guidance(DType dtype, const Bilateral& net, const Strided& guidance, const Transposed& back,
                                 Bands bands, const float* grad_logits, float* grad_guidance, float* grad_params,
                                 int threads) {
  const Layers layers(net);
  const int64_t radius = net.radius, diameter = 2 * radius + 1, taps = layers.taps, key = net.key;
  const int64_t pitch = ProjectedRows::pitch(net), margin = ProjectedRows::margin(net);
  const int64_t ring = padded(ProjectedRows::floats(net)), gradient_ring = padded(GradientRows::floats(net));
  const int64_t share = ring + gradient_ring + 2 * key * pitch + ModulatedSum::floats(3 * taps) +
                        (2 * net.guides + 3 * key) * kPitch + padded((2 * key + net.guides) * kPointerFloats);
  Scratch scratch(share * threads);
  parallel(threads, net.batch * bands.count, [&](int thread, int64_t first, int64_t last) {
    float* at = scratch.data() + thread * share;
    ProjectedRows rows(dtype, net, guidance, at);
    GradientRows gradients(net, grad_logits, at + ring);
    float* grad = at + ring + gradient_ring;  // of one projected row
    float* spread = grad + key * pitch;       // the same over the padded columns, before they are folded back
    float* lists = spread + key * pitch;
    float* guides = lists + ModulatedSum::floats(3 * taps);
    float* grad_guides = guides + net.guides * kPitch;
    float* before = grad_guides + net.guides * kPitch;
    float* hidden = before + key * kPitch;
    float* inner = hidden + key * kPitch;
    const float** pointers = reinterpret_cast<const float**>(inner + key * kPitch);
    ModulatedSum sum(3 * taps, lists);
    const Dense layer0{net.params + layers.range_weight0, net.params + layers.range_bias0, key, net.guides};
    for (int64_t task = first; task < last; ++task) {
      const int64_t b = task / bands.count, band = task % bands.count;
      float* sums = grad_params + task * layers.size;
      for (int64_t y = bands.begin(net, band); y < bands.begin(net, band + 1); ++y) {
        sum.clear();
        const float* own = gradients.row(b, y) + margin;
        for (int64_t t = 0; t < taps; ++t) {
          const float* window = rows.row(b, reflect(y + t / diameter - radius, net.height));
          sum.add(own + t * pitch, window + margin - radius + t % diameter);
        }
        sum.evaluate(grad, pitch, key, pitch, padded(net.width), false);

        sum.clear();
        const int64_t copies[3] = {y, -y, 2 * (net.height - 1) - y};
        for (int64_t copy = 0; copy < 3; ++copy) {
          // The row itself, and its reflections above and below.
          const int64_t row = copies[copy];
          if (copy > 0 && (row == y || row < -radius || row >= net.height + radius)) continue;
          for (int64_t i = 0; i < diameter; ++i) {
            const int64_t center = row + radius - i;
            if (center < 0 || center >= net.height) continue;
            const float* g = gradients.row(b, center) + margin;
            const float* p = rows.row(b, center) + margin;
            for (int64_t j = 0; j < diameter; ++j) sum.add(g + (i * diameter + j) * pitch - j, p - j);
          }
        }
        sum.evaluate(spread, pitch, key, pitch, padded(net.width + 2 * radius), false);
        for (int64_t c = 0; c < key; ++c) {
          float* to = grad + c * pitch;
          const float* from = spread + c * pitch + radius;
          add_scaled_row(to, from, 1.f, net.width);
          for (int64_t i = 1; i <= radius; ++i) {
            to[i] += from[-i];
            to[net.width - 1 - i] += from[net.width - 1 + i];
          }
          fill_row(to + net.width, 0.f, padded(net.width) - net.width);
        }

        for (int64_t x = 0; x < net.width; x += kTile) {
          const int64_t length = min64(kTile, net.width - x), width = padded(length);
          load_guidance(dtype, guides, kPitch, guidance, net.guides, b, y, x, length, width);
          apply_dense(layer0, guides, kPitch, before, kPitch, width);
          for (int64_t k = 0; k < key; ++k)
            gelu_row(hidden + k * kPitch, before + k * kPitch, rows.range_mask(b, k), width);
          add_weight_gradient(sums + layers.range_weight1, sums + layers.range_bias1, grad + x, key, pitch, hidden, key,
                              kPitch, width, pointers);
          apply_dense(back.range1, grad + x, pitch, inner, kPitch, width);
          for (int64_t k = 0; k < key; ++k)
            gelu_backward_row(inner + k * kPitch, before + k * kPitch, rows.range_mask(b, k), width);
          add_weight_gradient(sums + layers.range_weight0, sums + layers.range_bias0, inner, key, kPitch, guides,
                              net.guides, kPitch, width, pointers);
          apply_dense(back.range0, inner, kPitch, grad_guides, kPitch, width);
          for (int64_t k = 0; k < net.guides; ++k)
            add_scaled_row(grad_guidance + ((b * net.height + y) * net.guides + k) * net.width + x,
                           grad_guides + k * kPitch, 1.f, length);
        }
      }
    }
  });
}

}  // namespace MURF_LEVEL
}  // namespace murf
