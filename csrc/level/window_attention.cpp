// Window attention: queries that share most of their keys are a block, and a block is a few small matrix products.
// Scores lie by key, then query, so that a softmax over keys is vertical arithmetic on vectors of queries.
#include <cmath>

#include "gemm.h"
#include "kernels.h"
#include "softmax.h"

namespace murf {
namespace MURF_LEVEL {

// Values are packed this many keys and channels at a time, 32 KB, to stay in the first-level cache. Sums over keys are
// added up in parts of this length.
static constexpr int64_t kKeyChunk = 128, kChannelChunk = 64;

static constexpr float kNever = -__builtin_inff();

// One block of queries with the union of their keys.
struct Block {
  int64_t b, queries, keys, width;  // width: queries, padded
  int64_t y_block, x_block, y_queries, x_queries, y_keys, x_keys;
  const int32_t *ys, *xs, *key_ys, *key_xs;

  Block(const WindowAttention& a, int64_t b, int64_t by, int64_t bx) : b(b), y_block(by), x_block(bx) {
    ys = a.y.members + a.y.member_begin[by], xs = a.x.members + a.x.member_begin[bx];
    key_ys = a.y.keys + a.y.key_begin[by], key_xs = a.x.keys + a.x.key_begin[bx];
    y_queries = a.y.member_begin[by + 1] - a.y.member_begin[by];
    x_queries = a.x.member_begin[bx + 1] - a.x.member_begin[bx];
    y_keys = a.y.key_begin[by + 1] - a.y.key_begin[by];
    x_keys = a.x.key_begin[bx + 1] - a.x.key_begin[bx];
    queries = y_queries * x_queries, keys = y_keys * x_keys, width = lanes_up(queries);
  }
  int64_t y_of(int64_t m) const { return ys[m / x_queries]; }
  int64_t x_of(int64_t m) const { return xs[m % x_queries]; }
  int64_t key_y_of(int64_t j) const { return key_ys[j / x_keys]; }
  int64_t key_x_of(int64_t j) const { return key_xs[j % x_keys]; }
  int64_t query_at(const Strided& t, int64_t m) const {
    return b * t.stride_b + y_of(m) * t.stride_y + x_of(m) * t.stride_x;
  }
  int64_t key_at(const Strided& t, int64_t j) const {
    return b * t.stride_b + key_y_of(j) * t.stride_y + key_x_of(j) * t.stride_x;
  }
};

template <class T>
static void load_strided(float* dst, const T* src, int64_t stride, int64_t n) {
  if (stride == 1) load_row(dst, src, n);
  else
    for (int64_t i = 0; i < n; ++i) dst[i] = to_float(src[i * stride]);
}

template <class T>
static void store_strided(T* dst, int64_t stride, const float* src, int64_t n) {
  if (stride == 1) store_row(dst, src, n);
  else
    for (int64_t i = 0; i < n; ++i) from_float(src[i], dst[i * stride]);
}

// Channels [first, first + n) of the block's queries, by query: dst[m * row + i], padded with zeros to `row`.
template <class T>
static void pack_queries(const Block& block, const Strided& t, int64_t first, int64_t n, float scale, float* dst,
                         int64_t row) {
  for (int64_t m = 0; m < block.queries; ++m) {
    float* to = dst + m * row;
    load_strided(to, static_cast<const T*>(t.data) + block.query_at(t, m) + first * t.stride_c, t.stride_c, n);
    for (int64_t i = 0; i < n; ++i) to[i] *= scale;
    fill_row(to + n, 0.f, row - n);
  }
}

// The same by channel: dst[i * block.width + m].
static void transpose_queries(const Block& block, const float* packed, int64_t row, int64_t n, float* dst) {
  for (int64_t i = 0; i < n; ++i) {
    float* to = dst + i * block.width;
    for (int64_t m = 0; m < block.queries; ++m) to[m] = packed[m * row + i];
    fill_row(to + block.queries, 0.f, block.width - block.queries);
  }
}

// Channels [first, first + n) of keys [begin, end): dst[(j - begin) * row + i], padded with zeros to `row`.
template <class T>
static void pack_keys(const Block& block, const Strided& t, int64_t begin, int64_t end, int64_t first, int64_t n,
                      float* dst, int64_t row) {
  for (int64_t j = begin; j < end; ++j, dst += row) {
    load_strided(dst, static_cast<const T*>(t.data) + block.key_at(t, j) + first * t.stride_c, t.stride_c, n);
    fill_row(dst + n, 0.f, row - n);
  }
}

// What one axis adds to the scores of a head: dst[key * block.width + m]. False if it adds nothing.
static bool axis_terms(const Block& block, const WindowAxis& axis, const float* bias, int64_t head, bool rows,
                       float* dst) {
  const int64_t at = rows ? block.y_block : block.x_block;
  const int64_t members = rows ? block.y_queries : block.x_queries, keys = rows ? block.y_keys : block.x_keys;
  const int32_t* key = rows ? block.key_ys : block.key_xs;
  const float* mask = axis.exact[at] ? nullptr : axis.masks + axis.mask_begin[at];
  if (mask == nullptr && bias == nullptr) return false;
  for (int64_t j = 0; j < keys; ++j) {
    float* to = dst + j * block.width;
    for (int64_t m = 0; m < block.queries; ++m) {
      const int64_t member = rows ? m / block.x_queries : m % block.x_queries;
      float term = mask == nullptr ? 0.f : mask[j * members + member];
      // A key outside the window stays outside whatever the bias says.
      if (bias != nullptr && term != kNever)
        term += bias[(head * axis.out + (rows ? block.y_of(m) : block.x_of(m))) * axis.in + key[j]];
      to[m] = term;
    }
    fill_row(to + block.queries, 0.f, block.width - block.queries);
  }
  return true;
}

// Scratch of one thread, for the largest block.
struct Workspace {
  int64_t queries, keys, width, depth, channels;
  float *q, *q_rows, *k, *scores, *mixed, *terms_y, *terms_x, *largest, *total, *values, *result;
  // backward only
  float *grad_scores, *grad_rows, *grad_columns, *delta;

  static int64_t floats(const WindowAttention& a, bool backward) { return Workspace(a, backward, nullptr).used_; }

  Workspace(const WindowAttention& a, bool backward, float* at) {
    queries = a.y.max_members * a.x.max_members, keys = a.y.max_keys * a.x.max_keys;
    width = lanes_up(queries), depth = lanes_up(a.head_dim);
    channels = padded(a.channels) + kChannelChunk;
    used_ = 0;
    auto take = [&](int64_t n) {
      float* from = at == nullptr ? nullptr : at + used_;
      used_ += padded(n);
      return from;
    };
    q = take(a.head_dim * width), q_rows = take(queries * depth), k = take(keys * depth);
    scores = take(keys * width), mixed = take(keys * width);
    terms_y = take(a.y.max_keys * width), terms_x = take(a.x.max_keys * width);
    largest = take(width), total = take(width), delta = take(width);
    values = take(kKeyChunk * kChannelChunk);
    result = take(max64(queries * channels, kKeyChunk * max64(kChannelChunk, depth)));
    if (backward) {
      grad_scores = take(keys * width);
      grad_rows = take(queries * channels), grad_columns = take(channels * width);
    }
  }

 private:
  int64_t used_;
};

// scores = exp(one head's scaled products - largest), with largest and total per query: a softmax but for the division.
template <class T>
static void attend(const WindowAttention& a, const Block& block, int64_t head, Workspace& w) {
  const int64_t d = a.head_dim, width = block.width;
  pack_queries<T>(block, a.q, head * d, d, a.scale, w.q_rows, w.depth);
  transpose_queries(block, w.q_rows, w.depth, d, w.q);
  pack_keys<T>(block, a.k, 0, block.keys, head * d, d, w.k, w.depth);
  gemm(block.keys, d, width, w.k, w.depth, 1, w.q, width, w.scores, width, false);
  const bool terms_y = axis_terms(block, a.y, a.bias_y, head, true, w.terms_y);
  const bool terms_x = axis_terms(block, a.x, a.bias_x, head, false, w.terms_x);
  float* __restrict largest = w.largest;
  float* __restrict total = w.total;
  fill_row(largest, kNever, width);
  fill_row(total, 0.f, width);
  for (int64_t j = 0; j < block.keys; ++j) {
    float* __restrict s = w.scores + j * width;
    if (terms_y) add_scaled_row(s, w.terms_y + j / block.x_keys * width, 1.f, width);
    if (terms_x) add_scaled_row(s, w.terms_x + j % block.x_keys * width, 1.f, width);
    for (int64_t m = 0; m < width; ++m) largest[m] = s[m] > largest[m] ? s[m] : largest[m];
  }
  float* __restrict part = w.delta;
  for (int64_t begin = 0; begin < block.keys; begin += kKeyChunk) {
    fill_row(part, 0.f, width);
    for (int64_t j = begin; j < min64(begin + kKeyChunk, block.keys); ++j) {
      float* __restrict s = w.scores + j * width;
      for (int64_t m = 0; m < width; ++m) {
        s[m] = exp_row_element(s[m] - largest[m]);
        part[m] += s[m];
      }
    }
    add_scaled_row(total, part, 1.f, width);
  }
}

static void normalize(const Block& block, Workspace& w) {
  float* __restrict inverse = w.delta;
  for (int64_t m = 0; m < block.width; ++m) inverse[m] = 1.f / w.total[m];
  for (int64_t j = 0; j < block.keys; ++j) {
    float* __restrict s = w.scores + j * block.width;
    for (int64_t m = 0; m < block.width; ++m) s[m] *= inverse[m];
  }
}

// mixed = the heads' normalized weights, averaged; called head after head.
static void mix(const WindowAttention& a, const Block& block, int64_t head, Workspace& w) {
  const float share = 1.f / float(a.heads);
  for (int64_t j = 0; j < block.keys; ++j) {
    if (head == 0) scale_row(w.mixed + j * block.width, w.scores + j * block.width, share, block.width);
    else add_scaled_row(w.mixed + j * block.width, w.scores + j * block.width, share, block.width);
  }
}

// result[m * w.channels + i] = sum over keys of weights[j][m] * values[j][first + i]
template <class T>
static void weigh(const WindowAttention& a, const Block& block, const float* weights, int64_t first, int64_t n,
                  Workspace& w) {
  for (int64_t begin = 0; begin < block.keys; begin += kKeyChunk) {
    const int64_t end = min64(begin + kKeyChunk, block.keys);
    for (int64_t c = 0; c < n; c += kChannelChunk) {
      const int64_t now = min64(kChannelChunk, n - c), columns = lanes_up(now);
      pack_keys<T>(block, a.v, begin, end, first + c, now, w.values, columns);
      gemm(block.queries, end - begin, columns, weights + begin * block.width, 1, block.width, w.values, columns,
           w.result + c, w.channels, begin > 0);
    }
  }
}

template <class T>
static void forward(const WindowAttention& a, const Strided& out, float* lse, int threads) {
  const int64_t share = Workspace::floats(a, false);
  Scratch scratch(share * threads);
  const int64_t blocks = a.y.blocks * a.x.blocks;
  parallel(threads, a.batch * blocks, [&](int thread, int64_t begin, int64_t end) {
    Workspace w(a, false, scratch.data() + thread * share);
    for (int64_t task = begin; task < end; ++task) {
      const Block block(a, task / blocks, task % blocks / a.x.blocks, task % a.x.blocks);
      auto write = [&](int64_t first, int64_t n) {
        for (int64_t m = 0; m < block.queries; ++m)
          store_strided(static_cast<T*>(out.data) + block.query_at(out, m) + first * out.stride_c, out.stride_c,
                        w.result + m * w.channels, n);
      };
      for (int64_t head = 0; head < a.heads; ++head) {
        attend<T>(a, block, head, w);
        if (lse != nullptr)
          for (int64_t m = 0; m < block.queries; ++m)
            lse[((block.b * a.heads + head) * a.y.out + block.y_of(m)) * a.x.out + block.x_of(m)] =
                w.largest[m] + logf(w.total[m]);
        normalize(block, w);
        if (a.mean) {
          mix(a, block, head, w);
        } else {
          const int64_t n = a.channels / a.heads;
          weigh<T>(a, block, w.scores, head * n, n, w);
          write(head * n, n);
        }
      }
      if (a.mean) {
        weigh<T>(a, block, w.mixed, 0, a.channels, w);
        write(0, a.channels);
      }
    }
  });
}

// The key rows that a run of row blocks touches.
struct Band {
  int64_t begin, end;
};

static Band band_of(const WindowAxis& y, int64_t first, int64_t last) {
  Band band{y.in, 0};
  for (int64_t i = y.key_begin[first]; i < y.key_begin[last]; ++i) {
    band.begin = min64(band.begin, y.keys[i]);
    band.end = max64(band.end, y.keys[i] + 1);
  }
  return band;
}

// One thread's share of the gradients: float32 sums for the key rows of its band.
struct BandSums {
  Band band;
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
static void gradient_of_weights(const WindowAttention& a, const WindowGradients& g, const Block& block, int64_t first,
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
static void gradient_of_values(const Block& block, const float* weights, int64_t first, int64_t n, Workspace& w,
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
static void block_gradients(const WindowAttention& a, const WindowGradients& g, const Block& block, int64_t part,
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
    // scores become their own gradients: p ((dp - sum_j p dp) + grad_lse); largest and total are free by now
    float* __restrict delta = w.delta;
    float* __restrict chunk = w.total;
    float* __restrict grad_lse = w.largest;
    fill_row(delta, 0.f, width);
    for (int64_t begin = 0; begin < block.keys; begin += kKeyChunk) {
      fill_row(chunk, 0.f, width);
      for (int64_t j = begin; j < min64(begin + kKeyChunk, block.keys); ++j) {
        const float* __restrict p = w.scores + j * width;
        const float* __restrict dp = w.grad_scores + j * width;
        for (int64_t m = 0; m < width; ++m) chunk[m] += p[m] * (share * dp[m]);
      }
      add_scaled_row(delta, chunk, 1.f, width);
    }
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
static void backward(const WindowAttention& a, const WindowGradients& g, int threads) {
  const int64_t depth = a.heads * a.head_dim, parts = a.batch * g.shares;
  auto first_block = [&](int64_t share) { return a.y.blocks * share / g.shares; };
  Scratch table(g.shares * int64_t(sizeof(Band) / sizeof(float)));
  Band* bands = reinterpret_cast<Band*>(table.data());
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

void window_attention(DType dtype, WindowAttention attention, Strided out, float* lse, int threads) {
  with_dtype(dtype, [&](auto tag) { forward<decltype(tag)>(attention, out, lse, threads); });
}

void window_attention_backward(DType dtype, WindowAttention attention, WindowGradients gradients, int threads) {
  with_dtype(dtype, [&](auto tag) { backward<decltype(tag)>(attention, gradients, threads); });
}

}  // namespace MURF_LEVEL
}  // namespace murf
