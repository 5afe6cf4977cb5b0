// Window attention, backward: scores are computed again, block by block. Keys belong to many queries, so that their
// gradients are sums of the blocks of a share of the work, and then of the shares.
#include "kernels.h"
#include "window_gradients.h"

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

// w.grad_scores = <values of the run's keys, gradient of a query> over channels [first, first + n), which are packed.
void gradient_of_weights(DType dtype, const WindowAttention& a, const Block& block, int64_t first, int64_t n, Run run,
                         GradientScratch& w) {
  for (int64_t begin = run.begin; begin < run.end; begin += kKeyChunk) {
    const int64_t end = min64(begin + kKeyChunk, run.end);
    for (int64_t c = 0; c < n; c += kChannelChunk) {
      const int64_t now = min64(kChannelChunk, n - c);
      pack_rows(dtype, block, a.v, begin, end, first + c, now, w.values, kChannelChunk);
      gemm(end - begin, now, block.width, w.values, kChannelChunk, 1, w.grad_columns + c * block.width, block.width,
           w.grad_scores + (begin - run.begin) * block.width, block.width, c > 0);
    }
  }
}

// sums of values += weights^T grad_out over channels [first, first + n)
void gradient_of_values(const Block& block, const float* weights, int64_t first, int64_t n, Run run,
                        GradientScratch& w, const BandSums& sums) {
  for (int64_t begin = run.begin; begin < run.end; begin += kKeyChunk) {
    const int64_t end = min64(begin + kKeyChunk, run.end);
    for (int64_t c = 0; c < n; c += kChannelChunk) {
      const int64_t now = min64(kChannelChunk, n - c);
      gemm(end - begin, block.queries, lanes_up(now), weights + (begin - run.begin) * block.width, block.width, 1,
           w.grad_rows + c, w.channels, w.values, kChannelChunk, false);
      for (int64_t j = begin; j < end; ++j)
        add_scaled_row(sums.value_row(block, j) + first + c, w.values + (j - begin) * kChannelChunk, 1.f, now);
    }
  }
}

// w.mixed = the heads' weights, averaged; called head after head.
void mix(const Block& block, int64_t head, float share, Run run, GradientScratch& w) {
  const int64_t floats = run.count() * block.width;
  if (head == 0) scale_row(w.mixed, w.scores, share, floats);
  else add_scaled_row(w.mixed, w.scores, share, floats);
}

// Weights become the gradients of their scores: p ((dp - sum_j p dp) + grad_lse).
void gradient_of_scores(const WindowAttention& a, const WindowGradients& g, const Block& block, const GradientHead& h,
                        float share, Run run, GradientScratch& w) {
  const int64_t width = block.width;
  const float* __restrict delta = h.delta;
  float* __restrict grad_lse = w.scale;
  fill_row(grad_lse, 0.f, width);
  if (g.grad_lse != nullptr)
    for (int64_t m = 0; m < block.queries; ++m)
      grad_lse[m] = g.grad_lse[((block.b * a.heads + h.head) * a.y.out + block.y_of(m)) * a.x.out + block.x_of(m)];
  for (int64_t j = 0; j < run.count(); ++j) {
    float* __restrict p = w.scores + j * width;
    const float* __restrict dp = w.grad_scores + j * width;
    for (int64_t m = 0; m < width; ++m) p[m] *= (share * dp[m] - delta[m]) + grad_lse[m];
  }
}

void gradient_of_bias(const WindowAttention& a, const WindowGradients& g, const Block& block, int64_t head,
                      int64_t part, Run run, const GradientScratch& w) {
  for (int64_t j = run.begin; j < run.end; ++j)
    for (int64_t m = 0; m < block.queries; ++m) {
      const float ds = w.scores[(j - run.begin) * block.width + m];
      g.bias_y[((part * a.heads + head) * a.y.out + block.y_of(m)) * a.y.in + block.key_y_of(j)] += ds;
      g.bias_x[((part * a.heads + head) * a.x.out + block.x_of(m)) * a.x.in + block.key_x_of(j)] += ds;
    }
}

// What a run's gradients of scores add to the gradients of a head's queries and keys.
void gradient_of_products(const WindowAttention& a, const WindowGradients& g, const Block& block,
                          const GradientHead& h, Run run, GradientScratch& w, const BandSums& sums) {
  const int64_t d = a.head_dim, width = block.width;
  for (int64_t begin = run.begin; begin < run.end; begin += kKeyChunk) {
    const int64_t end = min64(begin + kKeyChunk, run.end), at = begin - run.begin;
    const float* scores = w.scores + at * width;
    if (g.q.data != nullptr)  // by channel, then query
      gemm(d, end - begin, width, w.k + at * w.depth, 1, w.depth, scores, width, h.grad_q, width, begin > 0);
    if (sums.keys == nullptr) continue;
    gemm(end - begin, block.queries, w.depth, scores, width, 1, h.q_rows, w.depth, w.rows, w.depth, false);
    for (int64_t j = begin; j < end; ++j)
      add_scaled_row(sums.key_row(block, j) + h.head * d, w.rows + (j - begin) * w.depth, 1.f, d);
  }
}

void store_gradient_of_queries(DType dtype, const WindowAttention& a, const WindowGradients& g, const Block& block,
                               const GradientHead& h, GradientScratch& w) {
  const int64_t d = a.head_dim;
  for (int64_t m = 0; m < block.queries; ++m) {
    for (int64_t i = 0; i < d; ++i) w.rows[i] = a.scale * h.grad_q[i * block.width + m];
    const int64_t to = block.query_at(g.q, m) + h.head * d * g.q.stride_c;
    store_values(dtype, g.q.data, to, g.q.stride_c, w.rows, d);
  }
}

// The gradients of heads [first, end), which share that of their weights.
void group_gradients(DType dtype, const WindowAttention& a, const WindowGradients& g, const Block& block,
                     int64_t part, int64_t first, int64_t end, GradientScratch& w, const BandSums& sums) {
  const int64_t d = a.head_dim, width = block.width, n = a.mean ? a.channels : a.channels / a.heads;
  const int64_t channel = a.mean ? 0 : first * n;
  const float share = a.mean ? 1.f / float(a.heads) : 1.f;
  pack_queries(dtype, block, g.grad_out, channel, n, 1.f, w.grad_rows, w.channels);
  transpose_queries(block, w.grad_rows, w.channels, n, w.grad_columns);
  auto head_of = [&](int64_t head) { return GradientHead(a, block, head, w); };
  auto each_run = [&](auto visit) {
    for (int64_t begin = 0; begin < block.keys; begin += w.run) visit(Run{begin, min64(begin + w.run, block.keys)});
  };
  auto enter = [&](const GradientHead& h) {
    pack_queries(dtype, block, a.q, h.head * d, d, a.scale, h.q_rows, w.depth);
    transpose_queries(block, h.q_rows, w.depth, d, h.q);
    fill_row(h.largest, kNever, width);
    fill_row(h.totals, 0.f, width);
    fill_row(h.deltas, 0.f, width);
  };
  auto gradients = [&](const GradientHead& h, Run run, bool kept) {
    weigh(block, h, run, kept, w);
    if (a.mean) mix(block, h.head, share, run, w);
    else if (sums.values != nullptr) gradient_of_values(block, w.scores, channel, n, run, w, sums);
    gradient_of_scores(a, g, block, h, share, run, w);
    if (g.bias_y != nullptr) gradient_of_bias(a, g, block, h.head, part, run, w);
    gradient_of_products(a, g, block, h, run, w, sums);
    if (g.q.data != nullptr && run.end == block.keys) store_gradient_of_queries(dtype, a, g, block, h, w);
  };
  const bool kept = block.keys <= w.run;
  if (!kept) {
    for (int64_t head = first; head < end; ++head) enter(head_of(head));
    each_run([&](Run run) {
      gradient_of_weights(dtype, a, block, channel, n, run, w);
      for (int64_t head = first; head < end; ++head) {
        const GradientHead h = head_of(head);
        score(dtype, a, block, h, run, w);
        exponentials(block, h, run, w);
      }
    });
    for (int64_t head = first; head < end; ++head) finish(block, head_of(head), share);
  }
  each_run([&](Run run) {
    gradient_of_weights(dtype, a, block, channel, n, run, w);
    for (int64_t head = first; head < end; ++head) {
      const GradientHead h = head_of(head);
      if (kept) enter(h);
      score(dtype, a, block, h, run, w);
      if (kept) {
        exponentials(block, h, run, w);
        finish(block, h, share);
      }
      gradients(h, run, kept);
    }
    if (a.mean && sums.values != nullptr) gradient_of_values(block, w.mixed, 0, n, run, w, sums);
  });
}

void block_gradients(DType dtype, const WindowAttention& a, const WindowGradients& g, const Block& block,
                     int64_t part, GradientScratch& w, const BandSums& sums) {
  for (int64_t head = 0; head < a.heads; head += w.group)
    group_gradients(dtype, a, g, block, part, head, head + w.group, w, sums);
}

// Keys belong to many queries: every share of the rows sums into its own band, and bands are added in their order.
void backward(DType dtype, const WindowAttention& a, const WindowGradients& g, int threads) {
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
  const int64_t share = GradientScratch::floats(a);
  Scratch scratch(share * threads);
  parallel(threads, parts, [&](int thread, int64_t begin, int64_t end) {
    GradientScratch w(a, scratch.data() + thread * share);
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
          block_gradients(dtype, a, g, Block(a, b, by, bx), part, w, own);
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
          store_values(dtype, to.data, b * to.stride_b + y * to.stride_y + x * to.stride_x, to.stride_c, row, n);
        }
    }
  });
}

}  // namespace

void window_attention_backward(DType dtype, WindowAttention attention, WindowGradients gradients, int threads) {
  backward(dtype, attention, gradients, threads);
}

}  // namespace MURF_LEVEL
}  // namespace murf
