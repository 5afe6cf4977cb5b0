// Attention of every token to every token of its sequence: blocks of queries meet runs of keys, whose scores, softmax
// and sums are float32 (Dao et al., arXiv 2205.14135, on a CPU). Products are float32 too, and where tile registers
// multiply it, of bfloat16.
#include "activations.h"
#include "gemm.h"
#include "kernels.h"
#include "launch.h"
#include "products.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

// Keys whose scores are held at a time: for 48 queries 100 KB of them.
constexpr int64_t kKeys = 512;
// Of their rows in memory: a power of two would crowd a few cache sets.
constexpr int64_t kPitch = kKeys + kSide;
// Keys whose values stay in the first cache.
constexpr int64_t kNear = 128;
constexpr float kLog2e = 1.44269504f;
// Queries of a task at least: it packs keys and values of its head anew.
constexpr int64_t kQueries = 256;

// e^x for x <= 0, within 3e-6, which bfloat16 does not see; not below 2^-126.
inline Vec weight_of(Vec x, bf16) {
  const Vec least = splat(-126.f);
  x *= kLog2e;
  x = x < least ? least : x;
  const Vec shifted = x + 12582912.f;  // 1.5 * 2^23: rounds to an integer, in its lowest bits
  const Vec r = x - (shifted - 12582912.f);
  Vec p = splat(0.0095701f);
  p = p * r + 0.05591786f;
  p = p * r + 0.24024745f;
  p = p * r + 0.69312181f;
  p = p * r + 0.99999926f;
  return p * Vec((UintVec(shifted) << 23) + 0x3f800000u);
}
inline Vec weight_of(Vec x, float) { return exp_of_negative(x); }

inline void store_weights(float* to, Vec v) { store_vec(to, v); }
inline void store_weights(bf16* to, Vec v) { round_vec(to, v); }

inline void store_row(float* to, const float* row, int64_t n) { std::memcpy(to, row, size_t(n) * sizeof(float)); }
inline void store_row(bf16* to, const float* row, int64_t n) { round_row(to, row, n); }

// A head's packed keys and values, the queries of a block, and their products, in float32.
template <class T>
struct PlainHead {
  using Element = T;
  using Weight = float;
  static constexpr int64_t kRows = 48, kPanel = kWide * kLanes;

  static int64_t width(int64_t dim) { return lanes_up(dim); }
  static int64_t keys_up(int64_t tokens) { return (tokens + kPanel - 1) / kPanel * kPanel; }
  static int64_t floats(const DenseAttention& a) {
    return padded(keys_up(a.tokens) * a.head_dim) + padded(a.tokens * width(a.head_dim)) + padded(kRows * a.head_dim);
  }
  PlainHead(const DenseAttention& a, float* at) : dim_(a.head_dim), width_(width(a.head_dim)), tokens_(a.tokens) {
    keys_ = at;
    values_ = keys_ + padded(keys_up(a.tokens) * a.head_dim);
    queries_ = values_ + padded(a.tokens * width_);
  }

  // Keys by panels, (head_dim, kPanel) each; values by rows.
  void pack(const T* k, int64_t k_row, const T* v, int64_t v_row) {
    for (int64_t key = 0; key < keys_up(tokens_); key += kPanel) {
      const int64_t count = min64(kPanel, tokens_ - key);
      float* panel = keys_ + key * dim_;
      if (count < kPanel) std::memset(panel, 0, size_t(dim_ * kPanel) * sizeof(float));
      for (int64_t n = 0; n < count; ++n)
        for (int64_t c = 0; c < dim_; ++c) panel[c * kPanel + n] = to_float(k[(key + n) * k_row + c]);
    }
    for (int64_t key = 0; key < tokens_; ++key) {
      float* row = values_ + key * width_;
      for (int64_t c = 0; c < dim_; ++c) row[c] = to_float(v[key * v_row + c]);
      std::memset(row + dim_, 0, size_t(width_ - dim_) * sizeof(float));
    }
  }

  void queries(const T* q, int64_t q_row, int64_t count, bool negated) {
    const float sign = negated ? -1.f : 1.f;
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < dim_; ++c) queries_[i * dim_ + c] = sign * to_float(q[i * q_row + c]);
    count_ = count;
  }

  // Inlined together, the products would leave too few registers for their sums.
  __attribute__((noinline)) void scores(int64_t begin, int64_t filled, float* to) const {
    for (int64_t k = 0; k < filled; k += kPanel)
      gemm(count_, dim_, kPanel, queries_, dim_, 1, keys_ + (begin + k) * dim_, kPanel, to + k, kPitch, false);
  }
  // Weights lie where the scores were.
  float* weights(float* scores) const { return scores; }
  __attribute__((noinline)) void add_values(int64_t begin, int64_t keys, const float* weights, float* sums) const {
    for (int64_t k = 0; k < keys; k += kNear)
      gemm(count_, min64(kNear, keys - k), width_, weights + k, kPitch, 1, values_ + (begin + k) * width_, width_, sums,
           width_, true);
  }

 private:
  int64_t dim_, width_, tokens_, count_ = 0;
  float *keys_, *values_, *queries_;
};

#if defined(__AMX_BF16__)
// The same by tile registers.
struct TiledHead {
  using Element = bf16;
  using Weight = bf16;
  static constexpr int64_t kRows = kSide, kPanel = kSide;

  static int64_t width(int64_t dim) { return sides_up(dim); }
  static int64_t keys_up(int64_t tokens) { return sides_up(tokens); }
  static int64_t floats(const DenseAttention& a) {
    const int64_t dim = width(a.head_dim);
    return 2 * padded(floats_of(keys_up(a.tokens) * dim)) + padded(floats_of(2 * dim)) + padded(floats_of(kRows * dim)) +
           padded(floats_of(kRows * kPitch)) + padded(kRows * dim);
  }
  TiledHead(const DenseAttention& a, float* at) : dim_(a.head_dim), width_(width(a.head_dim)), tokens_(a.tokens) {
    auto take = [&](int64_t halves) {
      bf16* from = reinterpret_cast<bf16*>(at);
      at += padded(floats_of(halves));
      return from;
    };
    keys_ = take(keys_up(tokens_) * width_);
    values_ = take(keys_up(tokens_) * width_);
    rows_ = take(2 * width_);
    queries_ = take(kRows * width_);
    weights_ = take(kRows * kPitch);
    product_ = at;
    // Rows and channels that fill up a block are read, and must be numbers.
    std::memset(queries_, 0, size_t(kRows * width_) * sizeof(bf16));
    std::memset(weights_, 0, size_t(kRows * kPitch) * sizeof(bf16));
  }

  // Right operands of keys and values, of zeros where these fill up a block.
  void pack(const bf16* k, int64_t k_row, const bf16* v, int64_t v_row) {
    const int64_t steps = width_ / kSide, bytes = dim_ * int64_t(sizeof(bf16)), tokens = keys_up(tokens_);
    std::memset(rows_, 0, size_t(2 * width_) * sizeof(bf16));
    for (int64_t key = 0; key < tokens; ++key) {
      std::memset(rows_, 0, size_t(bytes));
      if (key < tokens_) std::memcpy(rows_, k + key * k_row, size_t(bytes));
      for (int64_t step = 0; step < steps; ++step) {
        bf16* column = keys_ + packed(step * kSide, key, steps);
        for (int64_t i = 0; i < kSide; i += 2) std::memcpy(column + i * 16, rows_ + step * kSide + i, 2 * sizeof(bf16));
      }
    }
    for (int64_t key = 0; key < tokens; key += 2) {
      std::memset(rows_, 0, size_t(2 * width_) * sizeof(bf16));
      for (int64_t i = key; i < min64(key + 2, tokens_); ++i)
        std::memcpy(rows_ + (i - key) * width_, v + i * v_row, size_t(bytes));
      const int64_t first = key / kKeys * kKeys, run_steps = min64(kKeys, tokens - first) / kSide;
      for (int64_t c = 0; c < width_; c += 16) {
        bf16* pair = values_ + first * width_ + packed(key - first, c, run_steps);
        for (int64_t n = 0; n < 16; ++n) pair[2 * n] = rows_[c + n], pair[2 * n + 1] = rows_[width_ + c + n];
      }
    }
  }

  void queries(const bf16* q, int64_t q_row, int64_t count, bool negated) {
    for (int64_t i = 0; i < count; ++i) {
      std::memcpy(queries_ + i * width_, q + i * q_row, size_t(dim_) * sizeof(bf16));
      for (int64_t c = 0; negated && c < dim_; ++c) queries_[i * width_ + c].bits ^= 0x8000u;
    }
    count_ = count;
  }

  void scores(int64_t begin, int64_t filled, float* to) {
    for (int64_t k = 0; k < filled; k += kSide)
      block_product(&queries_, 1, width_, width_ / kSide, keys_ + (begin + k) * width_, to + k, kPitch, tiles_);
  }
  bf16* weights(float*) const { return weights_; }
  void add_values(int64_t begin, int64_t keys, const bf16*, float* sums) {
    const int64_t filled = sides_up(keys);
    for (int64_t c = 0; c < width_; c += kSide)
      block_product(&weights_, 1, kPitch, filled / kSide, values_ + begin * width_ + c * filled, product_ + c, width_,
                    tiles_);
    for (int64_t i = 0; i < count_ * width_; ++i) sums[i] += product_[i];
  }

 private:
  int64_t dim_, width_, tokens_, count_ = 0;
  bf16 *keys_, *values_, *rows_, *queries_, *weights_;  // rows (2, width)
  float* product_;
  Tiles tiles_;
};
#endif

// What a block of queries has seen so far.
struct Seen {
  float *scores, *sums, *largest, *factor, *total;  // total (rows, kLanes)

  static int64_t floats(int64_t rows, int64_t width) {
    return padded(rows * kPitch) + padded(rows * width) + 2 * padded(rows) + rows * kLanes;
  }
  Seen(int64_t rows, int64_t width, float* at) {
    scores = at;
    sums = scores + padded(rows * kPitch);
    largest = sums + padded(rows * width);
    factor = largest + padded(rows);
    total = factor + padded(rows);
  }
};

// Scores, times `scale` >= 0, to weights, of zero behind the last key, and their totals. Sums so far are to be multiplied
// with `factor`. Scores lose their largest first and then become powers of 2: large ones would round before.
template <class Weight>
__attribute__((noinline)) void weigh(const Seen& w, Weight* weights, int64_t count, int64_t rows, int64_t keys,
                                     int64_t filled, float scale) {
  for (int64_t i = 0; i < count; ++i) {
    const float now = max_of(w.scores + i * kPitch, keys) * scale;
    w.factor[i] = w.largest[i];
    w.largest[i] = now > w.largest[i] || now != now ? now : w.largest[i];
  }
  for (int64_t i = 0; i < rows; i += kLanes)
    store_vec(w.factor + i, weight_of(load_vec(w.factor + i) - load_vec(w.largest + i), Weight{}));
  for (int64_t i = 0; i < count; ++i) {
    const float *scores = w.scores + i * kPitch, largest = w.largest[i];
    Weight* to = weights + i * kPitch;
    Vec sums[2] = {load_vec(w.total + i * kLanes) * w.factor[i], Vec{}};
    for (int64_t k = 0; k < filled; k += 2 * kLanes)
      for (int64_t j = 0; j < 2; ++j) {
        Vec e = weight_of(load_vec(scores + k + j * kLanes) * scale - largest, Weight{});
        for (int64_t n = max64(keys - k - j * kLanes, 0); n < kLanes; ++n) e[n] = 0.f;
        store_weights(to + k + j * kLanes, e);
        sums[j] += e;
      }
    store_vec(w.total + i * kLanes, sums[0] + sums[1]);
  }
}

// Queries from `first` on, as many as fill a block, or those that are left.
template <class Head>
void attend(const DenseAttention& a, Head& head, const Seen& w, const typename Head::Element* q, int64_t first,
            typename Head::Element* out) {
  constexpr int64_t kRows = Head::kRows;
  const int64_t count = min64(kRows, a.tokens - first), width = Head::width(a.head_dim);
  const float scale = __builtin_fabsf(a.scale);
  head.queries(q + first * a.q.stride_c, a.q.stride_c, count, a.scale < 0);
  for (int64_t i = 0; i < kRows; ++i) w.largest[i] = -__builtin_inff();
  std::memset(w.total, 0, size_t(kRows * kLanes) * sizeof(float));
  std::memset(w.sums, 0, size_t(kRows * width) * sizeof(float));
  for (int64_t begin = 0; begin < a.tokens; begin += kKeys) {
    const int64_t keys = min64(kKeys, a.tokens - begin);
    head.scores(begin, min64(kKeys, Head::keys_up(a.tokens) - begin), w.scores);
    weigh(w, head.weights(w.scores), count, kRows, keys, sides_up(keys), scale);
    for (int64_t i = 0; i < count && begin > 0; ++i)
      for (int64_t c = 0; c < width; ++c) w.sums[i * width + c] *= w.factor[i];
    head.add_values(begin, keys, head.weights(w.scores), w.sums);
  }
  for (int64_t i = 0; i < count; ++i) {
    float* row = w.sums + i * width;
    const float share = 1.f / sum_vec(load_vec(w.total + i * kLanes));
    for (int64_t c = 0; c < a.head_dim; ++c) row[c] *= share;
    store_row(out + (first + i) * a.out.stride_c, row, a.head_dim);
  }
}

template <class Head>
void all_heads(const DenseAttention& a, int threads) {
  using T = typename Head::Element;
  constexpr int64_t kRows = Head::kRows;
  const int64_t width = Head::width(a.head_dim), heads = a.sequences * a.heads;
  const int64_t packs = padded(Head::floats(a)), share = packs + padded(Seen::floats(kRows, width));
  // Results do not depend on how many tasks a head is.
  const int64_t wanted = threads > 1 ? (2 * threads + heads - 1) / heads : 1;
  const int64_t parts = max64(min64(wanted, a.tokens / kQueries), 1);
  const int64_t blocks = (a.tokens + kRows - 1) / kRows;
  auto at = [](const Strided& x, int64_t sequence, int64_t head) {
    return static_cast<const T*>(x.data) + sequence * x.stride_b + head * x.stride_y;
  };
  Scratch scratch(share * threads);
  parallel(threads, heads * parts, [&](int thread, int64_t begin, int64_t end) {
    float* own = scratch.data() + thread * share;
    Head packed(a, own);
    const Seen seen(kRows, width, own + packs);
    int64_t packed_head = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / parts, part = task % parts, sequence = head / a.heads, n = head % a.heads;
      if (head != packed_head)
        packed.pack(at(a.k, sequence, n), a.k.stride_c, at(a.v, sequence, n), a.v.stride_c);
      packed_head = head;
      for (int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block)
        attend(a, packed, seen, at(a.q, sequence, n), block * kRows, const_cast<T*>(at(a.out, sequence, n)));
    }
  });
}

}  // namespace

void dense_attention(DType dtype, DenseAttention a, int threads) {
#if defined(__AMX_BF16__)
  using Bf16Head = TiledHead;
#else
  using Bf16Head = PlainHead<bf16>;
#endif
  if (dtype == DType::f32) all_heads<PlainHead<float>>(a, threads);
  else all_heads<Bf16Head>(a, threads);
}

}  // namespace MURF_LEVEL
}  // namespace murf
