// Window attention, backward: scores are computed again, block by block. Keys belong to many queries, so that their
// gradients are sums of the blocks of a share of the work, and then of the shares.
#include "kernels.h"
#include "window_attention.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

// The key rows that a run of row blocks touches.
struct KeyBand {
  int64_t begin, end;
};

KeyBand band_of(const WindowAxis& y, int64_t first, int64_t last) {
  KeyBand band{y.in, 0};
  for (int64_t i = y.key_begin[first]; i < y.key_begin[last]; ++i) {
    band.begin = min64(band.begin, y.keys[i]);
    band.end = max64(band.end, y.keys[i] + 1);
  }
  return band;
}

// One thread's share of the gradients: float32 sums for the key rows of its band.
struct BandSums {
  KeyBand band;
  int64_t width, depth, channels;
  float *keys, *values;

  float* key_row(const Block& block, int64_t j) const {
    return keys + ((block.key_y_of(j) - band.begin) * width + block.key_x_of(j)) * depth;
  }
  float* value_row(const Block& block, int64_t j) const {
    return values + ((block.key_y_of(j) - band.begin) * width + block.key_x_of(j)) * channels;
  }
};

// grad_scores = <values of a key, gradient of a query> over channels [first, first + n); the gradient packed both ways.
template <class T>
void gradient_of_weights(const WindowAttention& a, const WindowGradients& g, const Block& block, int64_t first,
                         int64_t n, Workspace& w) {
  pack_queries<T>(block, g.grad_out, first, n, 1.f, w.grad_rows, w.channels);
  transpose_queries(block, w.grad_rows, w.channels, n, w.grad_columns);
  for (int64_t begin = 0; begin < block.keys; begin += kKeyChunk) {
    const int64_t end = min64(begin + kKeyChunk, block.keys);
    for (int64_t c = 0; c < n; c += kChannelChunk) {
      const int64_t now = min64(kChannelChunk, n - c);
      pack_keys<T>(block, a.v, begin, end, first + c, now, w.values, kChannelChunk);
      gemm(end - begin, now, block.width, w.values, kChannelChunk, 1, w.grad_columns + c * block.width, block.width,
           w.grad_scores + begin * block.width, block.width, c > 0);
    }
  }
}

// sums of values += weights^T grad_out over channels [first, first + n)
void gradient_of_values(const Block& block, const float* weights, int64_t first, int64_t n, Workspace& w,
                        const BandSums& sums) {
  for (int64_t begin = 0; begin < block.keys; begin += kKeyChunk) {
    const int64_t end = min64(begin + kKeyChunk, block.keys);
    for (int64_t c = 0; c < n; c += kChannelChunk) {
      const int64_t now = min64(kChannelChunk, n - c);
      gemm(end - begin, block.queries, lanes_up(now), weights + begin * block.width, block.width, 1, w.grad_rows + c,
           w.channels, w.values, kChannelChunk, false);
      for (int64_t j = begin; j < end; ++j)
        add_scaled_row(sums.value_row(block, j) + first + c, w.values + (j - begin) * kChannelChunk, 1.f, now);
    }
  }
}

template <class T>
void block_gradients(const WindowAttention& a, const WindowGradients& g, const Block& block, int64_t part,
                     Workspace& w, const BandSums& sums) {
  const int64_t d = a.head_dim, width = block.width, n = a.mean ? a.channels : a.channels / a.heads;
  const float share = a.mean ? 1.f / float(a.heads) : 1.f;
  if (a.mean) gradient_of_weights<T>(a, g, block, 0, n, w);
  for (int64_t head = 0; head < a.heads; ++head) {
    if (!a.mean) gradient_of_weights<T>(a, g, block, head * n, n, w);
    attend<T>(a, block, head, w);
    normalize(block, w);
    if (a.mean) mix(a, block, head, w);
    else if (sums.values != nullptr) gradient_of_values(block, w.scores, head * n, n, w, sums);
    // scores become their own gradients: p ((dp - sum_j p dp) + grad_lse); largest is free by now
    float* __restrict delta = w.delta;
    float* __restrict grad_lse = w.largest;
    sum_over_keys(block, w, delta, [&](int64_t j, float* __restrict part) {
      const float* __restrict p = w.scores + j * width;
      const float* __restrict dp = w.grad_scores + j * width;
      for (int64_t m = 0; m < width; ++m) part[m] += p[m] * (share * dp[m]);
    });
    fill_row(grad_lse, 0.f, width);
    if (g.grad_lse != nullptr)
      for (int64_t m = 0; m < block.queries; ++m)
        grad_lse[m] =
            g.grad_lse[((block.b * a.heads + head) * a.y.out + block.y_of(m)) * a.x.out + block.x_of(m)];
    for (int64_t j = 0; j < block.keys; ++j) {
      float* __restrict p = w.scores + j * width;
      const float* __restrict dp = w.grad_scores + j * width;
      for (int64_t m = 0; m < width; ++m) p[m] *= (share * dp[m] - delta[m]) + grad_lse[m];
    }
    if (g.bias_y != nullptr)
      for (int64_t j = 0; j < block.keys; ++j)
        for (int64_t m = 0; m < block.queries; ++m) {
          const float ds = w.scores[j * width + m];
          g.bias_y[((part * a.heads + head) * a.y.out + block.y_of(m)) * a.y.in + block.key_y_of(j)] += ds;
          g.bias_x[((part * a.heads + head) * a.x.out + block.x_of(m)) * a.x.in + block.key_x_of(j)] += ds;
        }
    if (g.q.data != nullptr) {
      // by channel, then query; w.q is free once the scores exist
      for (int64_t begin = 0; begin < block.keys; begin += kKeyChunk)
        gemm(d, min64(kKeyChunk, block.keys - begin), width, w.k + begin * w.depth, 1, w.depth,
             w.scores + begin * width, width, w.q, width, begin > 0);
      for (int64_t m = 0; m < block.queries; ++m) {
        float* row = w.result;
        for (int64_t i = 0; i < d; ++i) row[i] = a.scale * w.q[i * width + m];
        store_strided(static_cast<T*>(g.q.data) + block.query_at(g.q, m) + head * d * g.q.stride_c, g.q.stride_c, row,
                      d);
      }
    }
    if (sums.keys != nullptr)
      for (int64_t begin = 0; begin < block.keys; begin += kKeyChunk) {
        const int64_t end = min64(begin + kKeyChunk, block.keys);
        gemm(end - begin, block.queries, w.depth, w.scores + begin * width, width, 1, w.q_rows, w.depth, w.result,
             w.depth, false);
        for (int64_t j = begin; j < end; ++j)
          add_scaled_row(sums.key_row(block, j) + head * d, w.result + (j - begin) * w.depth, 1.f, d);
      }
  }
  if (a.mean && sums.values != nullptr) gradient_of_values(block, w.mixed, 0, n, w, sums);
}

// Keys belong to many queries: every share of the rows sums into its own band, and bands are added in their order.
template <class T>
void backward(const WindowAttention& a, const WindowGradients& g, int threads) {
  const int64_t depth = a.heads * a.head_dim, parts = a.batch * g.shares;
  auto first_block = [&](int64_t share) { return a.y.blocks * share / g.shares; };
  Scratch table(g.shares * int64_t(sizeof(KeyBand) / sizeof(float)));
  KeyBand* bands = reinterpret_cast<KeyBand*>(table.data());
  int64_t cells = 0;
  for (int64_t s = 0; s < g.shares; ++s) {
    bands[s] = band_of(a.y, first_block(s), first_block(s + 1));
    cells += (bands[s].end - bands[s].begin) * a.x.in;
  }
  const int64_t key_floats = g.k.data == nullptr ? 0 : cells * depth;
  const int64_t value_floats = g.v.data == nullptr ? 0 : cells * a.channels;
  Scratch sums(a.batch * (key_floats + value_floats));
  auto sums_of = [&](int64_t b, int64_t s) {
    int64_t before = 0;
    for (int64_t i = 0; i < s; ++i) before += (bands[i].end - bands[i].begin) * a.x.in;
    float* at = sums.data() + b * (key_floats + value_floats);
    return BandSums{bands[s], a.x.in, depth, a.channels, g.k.data == nullptr ? nullptr : at + before * depth,
                    g.v.data == nullptr ? nullptr : at + key_floats + before * a.channels};
  };
  const int64_t workspace = Workspace::floats(a, true);
  Scratch scratch(workspace * threads);
  parallel(threads, parts, [&](int thread, int64_t begin, int64_t end) {
    Workspace w(a, true, scratch.data() + thread * workspace);
    for (int64_t part = begin; part < end; ++part) {
      const int64_t b = part / g.shares, s = part % g.shares;
      const BandSums own = sums_of(b, s);
      const int64_t size = (own.band.end - own.band.begin) * own.width;
      if (own.keys != nullptr) fill_row(own.keys, 0.f, size * own.depth);
      if (own.values != nullptr) fill_row(own.values, 0.f, size * own.channels);
      if (g.bias_y != nullptr) {
        fill_row(g.bias_y + part * a.heads * a.y.out * a.y.in, 0.f, a.heads * a.y.out * a.y.in);
        fill_row(g.bias_x + part * a.heads * a.x.out * a.x.in, 0.f, a.heads * a.x.out * a.x.in);
      }
      for (int64_t by = first_block(s); by < first_block(s + 1); ++by)
        for (int64_t bx = 0; bx < a.x.blocks; ++bx)
          block_gradients<T>(a, g, Block(a, b, by, bx), part, w, own);
    }
  });
  const int64_t longest = padded(max64(depth, a.channels));
  Scratch rows(longest * threads);
  parallel(threads, a.batch * a.y.in, [&](int thread, int64_t begin, int64_t end) {
    float* row = rows.data() + thread * longest;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / a.y.in, y = task % a.y.in;
      for (int64_t x = 0; x < a.x.in; ++x)
        for (int values = 0; values < 2; ++values) {
          const Strided& to = values ? g.v : g.k;
          if (to.data == nullptr) continue;
          const int64_t n = values ? a.channels : depth;
          fill_row(row, 0.f, n);
          for (int64_t s = 0; s < g.shares; ++s) {
            const BandSums from = sums_of(b, s);
            if (y < from.band.begin || y >= from.band.end) continue;
            add_scaled_row(row, (values ? from.values : from.keys) + ((y - from.band.begin) * a.x.in + x) * n, 1.f, n);
          }
          store_strided(static_cast<T*>(to.data) + b * to.stride_b + y * to.stride_y + x * to.stride_x, to.stride_c,
                        row, n);
        }
    }
  });
}

}  // namespace

void window_attention_backward(DType dtype, WindowAttention attention, WindowGradients gradients, int threads) {
  with_dtype(dtype, [&](auto tag) { backward<decltype(tag)>(attention, gradients, threads); });
}

}  // namespace MURF_LEVEL
}  // namespace murf
