// Attention of every token to every token of its sequence, in bfloat16: blocks of 32 queries meet runs of keys, whose
// scores, softmax and sums are float32 (Dao et al., arXiv 2205.14135, on a CPU's matrix units).
#include "activations.h"
#include "kernels.h"
#include "launch.h"
#include "products.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

// Keys whose scores are held at a time: 64 KB of them, and half as much of weights.
constexpr int64_t kKeys = 512;
// Of their rows in memory: a power of two would crowd a few cache sets.
constexpr int64_t kPitch = kKeys + kSide;
// Queries of a task at least: it packs keys and values of its head anew.
constexpr int64_t kQueries = 256;

struct AttentionBuffers {
  int64_t dim, tokens;  // filled up to whole blocks
  bf16 *keys, *values, *rows, *queries, *weights;  // rows (2, dim)
  float *scores, *product, *sums, *largest, *factor, *total;  // total (kSide, kLanes)
  Tiles tiles;

  static int64_t floats(const DenseAttention& a) {
    const int64_t dim = sides_up(a.head_dim), tokens = sides_up(a.tokens);
    return 2 * padded(floats_of(tokens * dim)) + floats_of(2 * dim + kSide * (dim + kPitch)) + kSide * (kPitch + 2 * dim + 2 + kLanes);
  }
  AttentionBuffers(const DenseAttention& a, float* at) : dim(sides_up(a.head_dim)), tokens(sides_up(a.tokens)) {
    keys = reinterpret_cast<bf16*>(at);
    at += padded(floats_of(tokens * dim));
    values = reinterpret_cast<bf16*>(at);
    at += padded(floats_of(tokens * dim));
    rows = reinterpret_cast<bf16*>(at);
    at += floats_of(2 * dim);
    queries = reinterpret_cast<bf16*>(at);
    at += floats_of(kSide * dim);
    weights = reinterpret_cast<bf16*>(at);
    at += floats_of(kSide * kPitch);
    scores = at;
    product = scores + kSide * kPitch;
    sums = product + kSide * dim;
    largest = sums + kSide * dim;
    factor = largest + kSide;
    total = factor + kSide;
  }
};

const bf16* head_of(const Strided& x, int64_t sequence, int64_t head) {
  return static_cast<const bf16*>(x.data) + sequence * x.stride_b + head * x.stride_y;
}

// Right operands of keys and values, of zeros where these fill up a block: such scores are left out, such channels are
// never read.
void pack(const DenseAttention& a, const bf16* k, const bf16* v, AttentionBuffers& w) {
  const int64_t steps = w.dim / kSide, bytes = a.head_dim * int64_t(sizeof(bf16));
  std::memset(w.rows, 0, size_t(2 * w.dim) * sizeof(bf16));
  for (int64_t key = 0; key < w.tokens; ++key) {
    std::memset(w.rows, 0, size_t(bytes));
    if (key < a.tokens) std::memcpy(w.rows, k + key * a.k.stride_c, size_t(bytes));
    for (int64_t step = 0; step < steps; ++step) {
      bf16* column = w.keys + packed(step * kSide, key, steps);
      for (int64_t i = 0; i < kSide; i += 2) std::memcpy(column + i * 16, w.rows + step * kSide + i, 2 * sizeof(bf16));
    }
  }
  for (int64_t key = 0; key < w.tokens; key += 2) {
    std::memset(w.rows, 0, size_t(2 * w.dim) * sizeof(bf16));
    for (int64_t i = key; i < min64(key + 2, a.tokens); ++i)
      std::memcpy(w.rows + (i - key) * w.dim, v + i * a.v.stride_c, size_t(bytes));
    const int64_t first = key / kKeys * kKeys, run_steps = min64(kKeys, w.tokens - first) / kSide;
    for (int64_t c = 0; c < w.dim; c += 16) {
      bf16* pair = w.values + first * w.dim + packed(key - first, c, run_steps);
      for (int64_t n = 0; n < 16; ++n) pair[2 * n] = w.rows[c + n], pair[2 * n + 1] = w.rows[w.dim + c + n];
    }
  }
}

// 2^x for x <= 0, within 3e-6, which bfloat16 does not see; not below 2^-126.
inline Vec exp2_of_negative(Vec x) {
  const Vec least = splat(-126.f);
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

// Turns the sign bits.
void negate(bf16* row, int64_t n) {
  for (int64_t c = 0; c < n; ++c) {
    uint16_t bits;
    std::memcpy(&bits, row + c, sizeof bits);
    bits ^= 0x8000u;
    std::memcpy(row + c, &bits, sizeof bits);
  }
}

// Scores to weights, in bfloat16, of zero behind the last key. `scale` >= 0 is that of powers of 2. Sums so far are to
// be multiplied with `factor`.
void weigh(AttentionBuffers& w, int64_t count, int64_t keys, int64_t filled, float scale) {
  for (int64_t i = 0; i < count; ++i) {
    float* scores = w.scores + i * kPitch;
    const float now = max_of(scores, keys) * scale;
    w.factor[i] = w.largest[i];
    w.largest[i] = now > w.largest[i] || now != now ? now : w.largest[i];
  }
  for (int64_t i = 0; i < kSide; i += kLanes)
    store_vec(w.factor + i, exp2_of_negative(load_vec(w.factor + i) - load_vec(w.largest + i)));
  for (int64_t i = 0; i < count; ++i) {
    const float *scores = w.scores + i * kPitch, largest = w.largest[i];
    bf16* weights = w.weights + i * kPitch;
    Vec sums[2] = {load_vec(w.total + i * kLanes) * w.factor[i], Vec{}};
    for (int64_t k = 0; k < filled; k += 2 * kLanes)
      for (int64_t j = 0; j < 2; ++j) {
        Vec e = exp2_of_negative(load_vec(scores + k + j * kLanes) * scale - largest);
        for (int64_t n = max64(keys - k - j * kLanes, 0); n < kLanes; ++n) e[n] = 0.f;
        round_vec(weights + k + j * kLanes, e);
        sums[j] += e;
      }
    store_vec(w.total + i * kLanes, sums[0] + sums[1]);
  }
}

// Queries from `first` on, 32 or fewer.
void attend(const DenseAttention& a, const bf16* q, int64_t first, bf16* out, AttentionBuffers& w) {
  const int64_t count = min64(kSide, a.tokens - first), steps = w.dim / kSide;
  const float scale = __builtin_fabsf(a.scale) * 1.44269504f;
  for (int64_t i = 0; i < count; ++i) {
    bf16* row = w.queries + i * w.dim;
    std::memcpy(row, q + (first + i) * a.q.stride_c, size_t(a.head_dim) * sizeof(bf16));
    if (a.scale < 0) negate(row, a.head_dim);
  }
  for (int64_t i = 0; i < kSide; ++i) w.largest[i] = -__builtin_inff();
  std::memset(w.total, 0, size_t(kSide * kLanes) * sizeof(float));
  std::memset(w.sums, 0, size_t(kSide * w.dim) * sizeof(float));
  for (int64_t begin = 0; begin < a.tokens; begin += kKeys) {
    const int64_t filled = min64(kKeys, w.tokens - begin), keys = min64(filled, a.tokens - begin);
    for (int64_t k = 0; k < filled; k += kSide)
      block_product(&w.queries, 1, w.dim, steps, w.keys + (begin + k) * w.dim, w.scores + k, kPitch, w.tiles);
    weigh(w, count, keys, filled, scale);
    for (int64_t c = 0; c < w.dim; c += kSide)
      block_product(&w.weights, 1, kPitch, filled / kSide, w.values + begin * w.dim + c * filled, w.product + c, w.dim,
                    w.tiles);
    for (int64_t i = 0; i < count; ++i)
      for (int64_t c = 0; c < w.dim; ++c)
        w.sums[i * w.dim + c] = w.sums[i * w.dim + c] * w.factor[i] + w.product[i * w.dim + c];
  }
  for (int64_t i = 0; i < count; ++i) {
    float* row = w.sums + i * w.dim;
    const float share = 1.f / sum_vec(load_vec(w.total + i * kLanes));
    for (int64_t c = 0; c < a.head_dim; ++c) row[c] *= share;
    round_row(out + (first + i) * a.out.stride_c, row, a.head_dim);
  }
}

}  // namespace

void dense_attention(DenseAttention a, int threads) {
  const int64_t heads = a.sequences * a.heads, share = padded(AttentionBuffers::floats(a));
  // Results do not depend on how many tasks a head is.
  const int64_t wanted = threads > 1 ? (2 * threads + heads - 1) / heads : 1;
  const int64_t parts = max64(min64(wanted, a.tokens / kQueries), 1);
  const int64_t blocks = (a.tokens + kSide - 1) / kSide;
  Scratch scratch(share * threads);
  parallel(threads, heads * parts, [&](int thread, int64_t begin, int64_t end) {
    AttentionBuffers w(a, scratch.data() + thread * share);
    std::memset(w.queries, 0, size_t(kSide * w.dim) * sizeof(bf16));
    std::memset(w.weights, 0, size_t(kSide * kPitch) * sizeof(bf16));
    int64_t packed_head = -1;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t head = task / parts, part = task % parts, sequence = head / a.heads, n = head % a.heads;
      if (head != packed_head) pack(a, head_of(a.k, sequence, n), head_of(a.v, sequence, n), w);
      packed_head = head;
      bf16* out = const_cast<bf16*>(head_of(a.out, sequence, n));
      for (int64_t block = blocks * part / parts; block < blocks * (part + 1) / parts; ++block)
        attend(a, head_of(a.q, sequence, n), block * kSide, out, w);
    }
  });
}

}  // namespace MURF_LEVEL
}  // namespace murf
