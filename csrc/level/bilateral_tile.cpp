// What the bilateral kernels and their gradients have in common: see bilateral_network.h and bilateral_tile.h.
#include "bilateral_tile.h"

#include <math.h>

#include "activations.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

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

}  // namespace

void apply_dense(const Dense& layer, const float* src, int64_t src_pitch, float* dst, int64_t dst_pitch,
                 int64_t length) {
  const Operand operand{&src, 1, layer.in, src_pitch};
  for (int64_t o = 0; o < layer.out; o += kBlock) {
    const int64_t now = min64(kBlock, layer.out - o);
    const float* w[kBlock];
    float* to[kBlock];
    for (int64_t k = 0; k < now; ++k) {
      w[k] = layer.weight + (o + k) * layer.in;
      to[k] = dst + (o + k) * dst_pitch;
      if (layer.bias != nullptr) fill_row(to[k], layer.bias[o + k], length);
    }
    product(operand, length, now, w, 0, to, layer.bias != nullptr);
  }
}

const float* ProjectedRows::row(int64_t b, int64_t y) {
  const int64_t slot = y % (2 * net_.radius + 1), tag = b * net_.height + y, step = pitch(net_);
  float* dst = rows_ + slot * net_.key * step;
  if (held_[slot] == tag) return dst;
  held_[slot] = tag;
  const float* p = net_.params;
  const Dense first{p + layers_.range_weight0, p + layers_.range_bias0, net_.key, net_.guides};
  const Dense second{p + layers_.range_weight1, p + layers_.range_bias1, net_.key, net_.key};
  float* hidden = tile_ + net_.guides * kPitch;
  const int64_t begin = margin(net_);
  for (int64_t x = 0; x < net_.width; x += kTile) {
    const int64_t length = min64(kTile, net_.width - x), width = padded(length);
    load_guidance(dtype_, tile_, kPitch, guidance_, net_.guides, b, y, x, length, width);
    apply_dense(first, tile_, kPitch, hidden, kPitch, width);
    for (int64_t k = 0; k < net_.key; ++k)
      gelu_row(hidden + (net_.key + k) * kPitch, hidden + k * kPitch, range_mask(b, k), width);
    apply_dense(second, hidden + net_.key * kPitch, kPitch, dst + begin + x, step, width);
  }
  for (int64_t k = 0; k < net_.key; ++k) {
    float* line = dst + k * step;
    fill_row(line, 0.f, begin);
    fill_row(line + begin + net_.width, 0.f, step - begin - net_.width);
    for (int64_t i = 1; i <= net_.radius; ++i) {
      line[begin - i] = line[begin + i];
      line[begin + net_.width - 1 + i] = line[begin + net_.width - 1 - i];
    }
  }
  return dst;
}

Tile::Tile(const Bilateral& n, float* scratch) : net(n), layers(n) {
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

void Tile::normalized(ProjectedRows& rows, int64_t b, int64_t y, int64_t x, int64_t width) {
  const int64_t diameter = 2 * net.radius + 1, pitch = ProjectedRows::pitch(net);
  const int64_t begin = ProjectedRows::margin(net) + x;
  for (int64_t i = 0; i < diameter; ++i) {
    const float* window = rows.row(b, reflect(y + i - net.radius, net.height)) + begin - net.radius;
    const float* center = rows.row(b, y) + begin;
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

void Tile::fixup_hidden(int64_t b, int64_t width) {
  const float* p = net.params;
  const Dense first{p + layers.fixup_weight0, p + layers.fixup_bias0, layers.taps, layers.taps + net.guides};
  apply_dense(first, kernels, kPitch, before, kPitch, width);
  for (int64_t t = 0; t < layers.taps; ++t)
    gelu_row(hidden + t * kPitch, before + t * kPitch, fixup_mask(b, t), width);
}

}  // namespace MURF_LEVEL
}  // namespace murf
