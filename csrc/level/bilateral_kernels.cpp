// bilateral_kernels and its gradients. A ring of projected rows is all that is kept of the guidance's windows; columns
// of pixels lie in the vector lanes throughout. The gradient runs in two sweeps: the first goes from the kernels back to
// the logits of every pixel, the second gathers each pixel's projection gradient from the logits around it.
#include <cmath>

#include "folded.h"
#include "gelu.h"
#include "kernels.h"
#include "micro.h"

namespace murf {
namespace MURF_LEVEL {

constexpr int64_t kTile = 128;          // pixels of a row that are worked on together
constexpr int64_t kPitch = kTile + 16;  // apart in memory: a power of two would crowd a few cache sets

// A 1x1 convolution: weight (out, in), bias (out).
struct Dense {
  const float* weight;
  const float* bias;
  int64_t out, in;
};

// dst[o][i] (+)= sum_k weight[o][k] src[k][i] + bias[o], rows `dst_pitch` and `src_pitch` apart
inline void apply_dense(const Dense& layer, const float* src, int64_t src_pitch, float* dst, int64_t dst_pitch,
                        int64_t length, bool accumulate = false) {
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
    product(operand, length, now, w, 0, to, accumulate || layer.bias != nullptr);
  }
}

// The parameters, where they lie in the packed array, which the gradient's array follows.
struct Layers {
  int64_t taps, range_weight0, range_bias0, range_weight1, range_bias1, fixup_weight0, fixup_bias0, fixup_weight1,
      fixup_bias1, size;

  explicit Layers(const Bilateral& net) : taps((2 * net.radius + 1) * (2 * net.radius + 1)) {
    range_weight0 = 2;
    range_bias0 = range_weight0 + net.key * net.guides;
    range_weight1 = range_bias0 + net.key;
    range_bias1 = range_weight1 + net.key * net.key;
    fixup_weight0 = range_bias1 + net.key;
    fixup_bias0 = fixup_weight0 + taps * (taps + net.guides);
    fixup_weight1 = fixup_bias0 + taps;
    fixup_bias1 = fixup_weight1 + taps * taps;
    size = net.fixup ? fixup_bias1 + taps : fixup_weight0;
  }
};

inline int64_t reflect(int64_t i, int64_t n) { return i < 0 ? -i : (i >= n ? 2 * (n - 1) - i : i); }

// Guidance of `length` pixels in float32, zero up to the tile's width.
template <class T>
inline void load_guidance(float* dst, int64_t pitch, const Strided& guidance, int64_t guides, int64_t b, int64_t y,
                          int64_t x, int64_t length, int64_t width) {
  for (int64_t g = 0; g < guides; ++g) {
    const T* src = static_cast<const T*>(guidance.data) + b * guidance.stride_b + g * guidance.stride_c +
                   y * guidance.stride_y + x * guidance.stride_x;
    for (int64_t i = 0; i < length; ++i) dst[g * pitch + i] = to_float(src[i * guidance.stride_x]);
    fill_row(dst + g * pitch + length, 0.f, width - length);
  }
}

// Projected rows of the guidance with reflected columns, as many as a window is high.
class ProjectedRows {
 public:
  // Column x of a row lies at x + kept margin; the margin holds `radius` reflected columns and zeros beyond them.
  static int64_t pitch(const Bilateral& net) { return padded(net.width + 4 * net.radius + 16); }
  static int64_t margin(const Bilateral& net) { return 2 * net.radius; }
  static int64_t floats(const Bilateral& net) {
    const int64_t rows = 2 * net.radius + 1;
    return rows * net.key * pitch(net) + (net.guides + 2 * net.key) * kPitch + padded(2 * rows);
  }

  ProjectedRows(const Bilateral& net, const Strided& guidance, float* scratch)
      : net_(net),
        layers_(net),
        guidance_(guidance),
        rows_(scratch),
        tile_(scratch + (2 * net.radius + 1) * net.key * pitch(net)),
        held_(reinterpret_cast<int64_t*>(tile_ + (net.guides + 2 * net.key) * kPitch)) {
    for (int64_t i = 0; i < 2 * net.radius + 1; ++i) held_[i] = -1;
  }

  template <class T>
  const float* row(int64_t b, int64_t y) {
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
      load_guidance<T>(tile_, kPitch, guidance_, net_.guides, b, y, x, length, width);
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

  float range_mask(int64_t b, int64_t k) const {
    return net_.range_mask == nullptr ? 1.f : net_.range_mask[b * net_.key + k];
  }

 private:
  const Bilateral& net_;
  Layers layers_;
  const Strided& guidance_;
  float* rows_;
  float* tile_;
  int64_t* held_;
};

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
    temperature = std::exp(net.params[0]);
    temperature = temperature < 1e-4f ? 1e-4f : (temperature > 1e4f ? 1e4f : temperature);
    spatial = scratch;
    logits = spatial + padded(taps);
    similarity = logits + taps * kPitch;
    kernels = similarity + taps * kPitch;
    before = kernels + (taps + net.guides) * kPitch;
    hidden = before + taps * kPitch;
    total = hidden + taps * kPitch;
    for (int64_t t = 0; t < taps; ++t)
      spatial[t] = std::exp(-distance(t / diameter, t % diameter) / (2.f * net.params[1] * net.params[1]));
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

template <class T, class K>
static void forward(const Bilateral& net, const Strided& guidance, const Strided& out, int threads) {
  const int64_t share = padded(ProjectedRows::floats(net)) + padded(Tile::floats(net)) + Layers(net).taps * kPitch;
  Scratch scratch(share * threads);
  const int64_t height = net.row_end - net.row_begin, bands = max64(1, min64(2 * threads, height / 32));
  parallel(threads, net.batch * bands, [&](int thread, int64_t first, int64_t last) {
    float* at = scratch.data() + thread * share;
    ProjectedRows rows(net, guidance, at);
    Tile tile(net, at + padded(ProjectedRows::floats(net)));
    float* fixed = at + padded(ProjectedRows::floats(net)) + padded(Tile::floats(net));
    const int64_t taps = tile.layers.taps;
    const Dense second{net.params + tile.layers.fixup_weight1, net.params + tile.layers.fixup_bias1, taps, taps};
    for (int64_t task = first; task < last; ++task) {
      const int64_t b = task / bands, band = task % bands;
      for (int64_t at_row = height * band / bands; at_row < height * (band + 1) / bands; ++at_row)
        for (int64_t x = 0; x < net.width; x += kTile) {
          const int64_t y = net.row_begin + at_row, length = min64(kTile, net.width - x), width = padded(length);
          tile.normalized<T>(rows, b, y, x, width);
          const float* result = tile.kernels;
          if (net.fixup) {
            load_guidance<T>(tile.kernels + taps * kPitch, kPitch, guidance, net.guides, b, y, x, length, width);
            tile.fixup_hidden(b, width);
            apply_dense(second, tile.hidden, kPitch, fixed, kPitch, width);
            for (int64_t t = 0; t < taps; ++t) {
              float* f = fixed + t * kPitch;
              const float* k = tile.kernels + t * kPitch;
              for (int64_t i = 0; i < width; ++i) f[i] = k[i] + 0.1f * f[i];
            }
            result = fixed;
          }
          K* dst = static_cast<K*>(out.data) + b * out.stride_b + at_row * out.stride_y + x * out.stride_x;
          for (int64_t i = 0; i < length; ++i)
            for (int64_t t = 0; t < taps; ++t) from_float(result[t * kPitch + i], dst[i * out.stride_x + t * out.stride_c]);
        }
    }
  });
}

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

  Transposed(const Bilateral& net, float* scratch) : weights(scratch) {
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

  float* weights;
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
template <class T, class K>
static void backward_to_logits(const Bilateral& net, const Strided& guidance, const Strided& grad,
                               const Transposed& back, Bands bands, float* grad_logits, float* grad_guidance,
                               float* grad_params, int threads) {
  const Layers layers(net);
  const int64_t taps = layers.taps, inputs = taps + net.guides, diameter = 2 * net.radius + 1;
  const int64_t ring = padded(ProjectedRows::floats(net)), tile_floats = padded(Tile::floats(net));
  const int64_t share = ring + tile_floats + (2 * taps + inputs + 2) * kPitch + padded((taps + inputs) * kPointerFloats);
  Scratch scratch(share * threads);
  parallel(threads, net.batch * bands.count, [&](int thread, int64_t first, int64_t last) {
    float* at = scratch.data() + thread * share;
    ProjectedRows rows(net, guidance, at);
    Tile tile(net, at + ring);
    float* g = at + ring + tile_floats;     // gradient of the kernels, later of the logits
    float* inner = g + taps * kPitch;       // of the fix-up's hidden layer
    float* input = inner + taps * kPitch;   // of the fix-up's input
    float* sum0 = input + inputs * kPitch;
    float* sum1 = sum0 + kPitch;
    const float** pointers = reinterpret_cast<const float**>(sum1 + kPitch);
    const float raw = std::exp(net.params[0]), sigma = net.params[1];
    const bool inside = raw >= 1e-4f && raw <= 1e4f;
    for (int64_t task = first; task < last; ++task) {
      const int64_t b = task / bands.count, band = task % bands.count;
      float* sums = grad_params + task * layers.size;
      double grad_temp = 0, grad_sigma = 0;
      for (int64_t y = bands.begin(net, band); y < bands.begin(net, band + 1); ++y)
        for (int64_t x = 0; x < net.width; x += kTile) {
          const int64_t length = min64(kTile, net.width - x), width = padded(length);
          const K* src = static_cast<const K*>(grad.data) + b * grad.stride_b + y * grad.stride_y + x * grad.stride_x;
          for (int64_t i = 0; i < length; ++i)
            for (int64_t t = 0; t < taps; ++t) g[t * kPitch + i] = to_float(src[i * grad.stride_x + t * grad.stride_c]);
          for (int64_t t = 0; t < taps; ++t) fill_row(g + t * kPitch + length, 0.f, width - length);
          tile.normalized<T>(rows, b, y, x, width);
          if (net.fixup) {
            load_guidance<T>(tile.kernels + taps * kPitch, kPitch, guidance, net.guides, b, y, x, length, width);
            tile.fixup_hidden(b, width);
            apply_dense(back.fixup1, g, kPitch, inner, kPitch, width);
            add_weight_gradient(sums + layers.fixup_weight1, sums + layers.fixup_bias1, g, taps, kPitch, tile.hidden,
                                taps, kPitch, width, pointers);
            for (int64_t t = 0; t < taps; ++t)
              gelu_backward_row(inner + t * kPitch, tile.before + t * kPitch, 0.1f * tile.fixup_mask(b, t), width);
            apply_dense(back.fixup0, inner, kPitch, input, kPitch, width);
            add_weight_gradient(sums + layers.fixup_weight0, sums + layers.fixup_bias0, inner, taps, kPitch,
                                tile.kernels, inputs, kPitch, width, pointers);
            for (int64_t t = 0; t < taps; ++t) add_scaled_row(g + t * kPitch, input + t * kPitch, 1.f, width);
          }
          for (int64_t k = 0; k < net.guides; ++k) {
            float* to = grad_guidance + ((b * net.height + y) * net.guides + k) * net.width + x;
            if (net.fixup) load_row(to, input + (taps + k) * kPitch, length);
            else fill_row(to, 0.f, length);
          }
          // kernels = similarity * spatial / total, unless the clamp holds
          fill_row(sum0, 0.f, width);
          for (int64_t t = 0; t < taps; ++t) {
            const float* k = tile.kernels + t * kPitch;
            for (int64_t i = 0; i < width; ++i) sum0[i] += g[t * kPitch + i] * k[i];
          }
          // Distances count from their mean under the kernel: what they are measured from makes no difference in exact
          // arithmetic, and the error of the sum above cancels.
          float* center = tile.before;
          fill_row(center, 0.f, width);
          for (int64_t t = 0; t < taps; ++t)
            add_scaled_row(center, tile.kernels + t * kPitch, tile.distance(t / diameter, t % diameter), width);
          for (int64_t i = 0; i < width; ++i) {
            const bool clamped = tile.total[i] < 1e-7f;
            sum1[i] = 1.f / (clamped ? 1e-7f : tile.total[i]);
            sum0[i] = clamped ? 0.f : sum0[i];
            center[i] = clamped ? 0.f : center[i];
          }
          for (int64_t t = 0; t < taps; ++t) {
            float* d = g + t * kPitch;
            const float* r = tile.similarity + t * kPitch;
            const Vec distance = splat(tile.distance(t / diameter, t % diameter));
            Vec weighted{};
            for (int64_t i = 0; i < width; i += kLanes) {
              const Vec v = (load_vec(d + i) - load_vec(sum0 + i)) * load_vec(sum1 + i);
              store_vec(d + i, v * tile.spatial[t]);
              weighted += v * load_vec(r + i) * (distance - load_vec(center + i));
            }
            grad_sigma += double(sum_vec(weighted)) * tile.spatial[t] / (double(sigma) * sigma * sigma);
          }
          // similarity = softmax(temperature * logits)
          fill_row(sum0, 0.f, width);
          for (int64_t t = 0; t < taps; ++t) {
            const float* r = tile.similarity + t * kPitch;
            for (int64_t i = 0; i < width; ++i) sum0[i] += g[t * kPitch + i] * r[i];
          }
          for (int64_t t = 0; t < taps; ++t) {
            float* d = g + t * kPitch;
            const float* r = tile.similarity + t * kPitch;
            const float* l = tile.logits + t * kPitch;
            Vec weighted{};
            for (int64_t i = 0; i < width; i += kLanes) {
              const Vec v = (load_vec(d + i) - load_vec(sum0 + i)) * load_vec(r + i);
              weighted += v * load_vec(l + i);
              store_vec(d + i, v * tile.temperature);
            }
            grad_temp += double(sum_vec(weighted));
            load_row(grad_logits + ((b * net.height + y) * taps + t) * net.width + x, d, length);
          }
        }
      if (net.fixup)  // the fix-up adds a tenth of its output
        for (int64_t i = layers.fixup_weight1; i < layers.size; ++i) sums[i] *= 0.1f;
      sums[0] = inside ? float(grad_temp * raw) : 0.f;
      sums[1] = float(grad_sigma);
    }
  });
}

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

// Sweep 2. A pixel's projection is the centre of its own window and a neighbour in the windows around it, also by
// reflection. Adds to grad_guidance and writes the gradients of the projection.
template <class T>
static void backward_to_guidance(const Bilateral& net, const Strided& guidance, const Transposed& back, Bands bands,
                                 const float* grad_logits, float* grad_guidance, float* grad_params, int threads) {
  const Layers layers(net);
  const int64_t radius = net.radius, diameter = 2 * radius + 1, taps = layers.taps, key = net.key;
  const int64_t pitch = ProjectedRows::pitch(net), margin = ProjectedRows::margin(net);
  const int64_t ring = padded(ProjectedRows::floats(net)), gradient_ring = padded(GradientRows::floats(net));
  const int64_t share = ring + gradient_ring + 2 * key * pitch + ModulatedSum::floats(3 * taps) +
                        (2 * net.guides + 3 * key) * kPitch + padded((2 * key + net.guides) * kPointerFloats);
  Scratch scratch(share * threads);
  parallel(threads, net.batch * bands.count, [&](int thread, int64_t first, int64_t last) {
    float* at = scratch.data() + thread * share;
    ProjectedRows rows(net, guidance, at);
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
          const float* window = rows.template row<T>(b, reflect(y + t / diameter - radius, net.height));
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
            const float* p = rows.template row<T>(b, center) + margin;
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
          load_guidance<T>(guides, kPitch, guidance, net.guides, b, y, x, length, width);
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

void bilateral_kernels(DType dtype, DType out_dtype, Bilateral net, Strided guidance, Strided out, int threads) {
  with_dtype(dtype, [&](auto guide) {
    with_dtype(out_dtype,
               [&](auto kernel) { forward<decltype(guide), decltype(kernel)>(net, guidance, out, threads); });
  });
}

void bilateral_kernels_backward(DType dtype, DType grad_dtype, Bilateral net, Strided guidance, Strided grad,
                                int64_t bands, float* grad_logits, float* grad_guidance, float* grad_params,
                                int threads) {
  fill_row(grad_params, 0.f, net.batch * bands * Layers(net).size);
  Scratch scratch(Transposed::floats(net));
  const Transposed back(net, scratch.data());
  with_dtype(dtype, [&](auto guide) {
    using T = decltype(guide);
    with_dtype(grad_dtype, [&](auto kernel) {
      backward_to_logits<T, decltype(kernel)>(net, guidance, grad, back, {bands}, grad_logits, grad_guidance,
                                              grad_params, threads);
    });
    backward_to_guidance<T>(net, guidance, back, {bands}, grad_logits, grad_guidance, grad_params, threads);
  });
}

}  // namespace MURF_LEVEL
}  // namespace murf
