// One tile of bilateral_kernels on its way from logits to kernels, for the result and for its gradients.
#pragma once

#include <math.h>

#include "bilateral_network.h"

namespace murf {
namespace MURF_LEVEL {

// A row beyond the border is the one mirrored at it.
inline int64_t reflect(int64_t i, int64_t n) { return i < 0 ? -i : (i >= n ? 2 * (n - 1) - i : i); }

// Keys whose products are summed at a time: logits are sums of large terms whose rounding the softmax magnifies, and
// sums of sums keep it small.
constexpr int64_t kKeys = 4;

// dst[j][i] (+)= sum_c window[c][i + j] * center[c][i], for J offsets j and V vectors of i
template <int J, int V>
inline void logits_block(float* dst, const float* window, const float* center, int64_t pitch, int64_t key) {
  for (int64_t begin = 0; begin < key; begin += kKeys) {
    const int64_t end = min64(begin + kKeys, key);
    Vec sum[J][V] = {};
    for (int64_t c = begin; c < end; ++c)
      for (int v = 0; v < V; ++v) {
        const Vec p = load_vec(center + c * pitch + v * kLanes);
        for (int j = 0; j < J; ++j) sum[j][v] += p * load_vec(window + c * pitch + v * kLanes + j);
      }
    for (int j = 0; j < J; ++j)
      for (int v = 0; v < V; ++v) {
        float* to = dst + j * kPitch + v * kLanes;
        store_vec(to, begin == 0 ? sum[j][v] : load_vec(to) + sum[j][v]);
      }
  }
}

template <int J>
inline void logits_runs(float* dst, const float* window, const float* center, int64_t pitch, int64_t key,
                        int64_t width) {
  int64_t i = 0;
  for (; i + kWide * kLanes <= width; i += kWide * kLanes)
    logits_block<J, kWide>(dst + i, window + i, center + i, pitch, key);
  for (; i < width; i += kLanes) logits_block<J, 1>(dst + i, window + i, center + i, pitch, key);
}

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

  Tile(const Bilateral& n, float* scratch) : net(n), layers(n) {
    const int64_t taps = layers.taps, diameter = 2 * net.radius + 1;
    temperature = expf(net.params[0]);
    temperature = temperature < 1e-4f ? 1e-4f : (temperature > 1e4f ? 1e4f : temperature);
    spatial = scratch;
    logits = spatial + padded(taps);
    similarity = logits + taps * kPitch;
    kernels = similarity + taps * kPitch;
    before = kernels + (taps + net.guides) * kPitch;
    hidden = before + taps * kPitch;
    total = hidden + taps * kPitch;
    for (int64_t t = 0; t < taps; ++t)
      spatial[t] = expf(-distance(t / diameter, t % diameter) / (2.f * net.params[1] * net.params[1]));
  }

  // Squared distance of a tap from the centre on a grid from -1 to 1.
  float distance(int64_t i, int64_t j) const {
    const float radius = float(net.radius), dy = float(i - net.radius), dx = float(j - net.radius);
    return net.radius == 0 ? 2.f : (dy / radius) * (dy / radius) + (dx / radius) * (dx / radius);
  }

  template <class T>
  void normalized(ProjectedRows& rows, int64_t b, int64_t y, int64_t x, int64_t width) {
    const int64_t diameter = 2 * net.radius + 1, pitch = ProjectedRows::pitch(net);
    const int64_t begin = ProjectedRows::margin(net) + x;
    for (int64_t i = 0; i < diameter; ++i) {
      const float* window = rows.template row<T>(b, reflect(y + i - net.radius, net.height)) + begin - net.radius;
      const float* center = rows.template row<T>(b, y) + begin;
      for (int64_t j = 0; j < diameter;) {
        const int64_t now = min64(4, diameter - j);
        float* dst = logits + (i * diameter + j) * kPitch;
        if (now == 4) logits_runs<4>(dst, window + j, center, pitch, net.key, width);
        else if (now == 3) logits_runs<3>(dst, window + j, center, pitch, net.key, width);
        else if (now == 2) logits_runs<2>(dst, window + j, center, pitch, net.key, width);
        else logits_runs<1>(dst, window + j, center, pitch, net.key, width);
        j += now;
      }
    }
    float* largest = hidden;  // these two are free until the fix-up
    float* sum = before;
    load_row(largest, logits, width);
    for (int64_t t = 1; t < layers.taps; ++t) {
      const float* l = logits + t * kPitch;
      for (int64_t i = 0; i < width; ++i) largest[i] = l[i] > largest[i] ? l[i] : largest[i];
    }
    fill_row(sum, 0.f, width);
    for (int64_t t = 0; t < layers.taps; ++t) {
      float* l = logits + t * kPitch;
      float* r = similarity + t * kPitch;
      for (int64_t i = 0; i < width; ++i) {
        // Kept relative to the largest: the temperature's gradient would cancel otherwise.
        l[i] -= largest[i];
        const float e = exp_row_element(temperature * l[i]);
        r[i] = e;
        sum[i] += e;
      }
    }
    fill_row(total, 0.f, width);
    for (int64_t t = 0; t < layers.taps; ++t) {
      float* r = similarity + t * kPitch;
      for (int64_t i = 0; i < width; ++i) {
        r[i] /= sum[i];
        total[i] += r[i] * spatial[t];
      }
    }
    for (int64_t t = 0; t < layers.taps; ++t) {
      const float* r = similarity + t * kPitch;
      float* k = kernels + t * kPitch;
      for (int64_t i = 0; i < width; ++i) k[i] = r[i] * spatial[t] / (total[i] > 1e-7f ? total[i] : 1e-7f);
    }
  }

  // The fix-up's hidden layer, from the kernels and the guidance behind them.
  void fixup_hidden(int64_t b, int64_t width) {
    const float* p = net.params;
    const Dense first{p + layers.fixup_weight0, p + layers.fixup_bias0, layers.taps, layers.taps + net.guides};
    apply_dense(first, kernels, kPitch, before, kPitch, width);
    for (int64_t t = 0; t < layers.taps; ++t)
      gelu_row(hidden + t * kPitch, before + t * kPitch, fixup_mask(b, t), width);
  }

  float fixup_mask(int64_t b, int64_t t) const {
    return net.fixup_mask == nullptr ? 1.f : net.fixup_mask[b * layers.taps + t];
  }
};

}  // namespace MURF_LEVEL
}  // namespace murf
