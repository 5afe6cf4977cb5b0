// The weights of window attention: see window_weights.h.
#include "window_weights.h"

#include <math.h>

#include "activations.h"
#include "window_products.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

// Scores of a run of keys: 256 KB, and as many weights. Runs are no longer because keys may have to be copied.
constexpr int64_t kRunFloats = 1 << 16, kLongestRun = 960;

// Keys of an image beyond this do not stay in the second-level cache from one row of blocks to the next.
constexpr int64_t kNearFloats = 1 << 18;

inline void prefetch_row(const char* row, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(row + i, 0, 2);
}

// visit(i, row, column) for keys [begin, end) of a block, i counted from `begin`; row and column of its union.
template <class Visit>
inline void each_key(const Block& block, int64_t begin, int64_t end, Visit visit) {
  int64_t y = begin / block.x_keys, x = begin % block.x_keys;
  for (int64_t i = 0; i < end - begin; ++i) {
    visit(i, y, x);
    if (++x == block.x_keys) x = 0, ++y;
  }
}

inline Vec load_lanes(const float* from) { return load_vec(from); }
inline Vec load_lanes(const bf16* from) {
  typedef uint16_t Halves __attribute__((vector_size(kLanes * sizeof(uint16_t))));
  Halves halves;
  std::memcpy(&halves, from, sizeof halves);
  return Vec(__builtin_convertvector(halves, UintVec) << 16);
}
inline Vec load_lanes(const f16* from) {
  float lane[kLanes];
  load_row(lane, from, kLanes);
  return load_vec(lane);
}

// Up to kLanes values, and zeros.
template <class T>
inline Vec load_some(const T* from, int64_t n) {
  if (n >= kLanes) return load_lanes(from);
  float lane[kLanes] = {};
  load_row(lane, from, n);
  return load_vec(lane);
}

template <class T>
inline void load_strided(float* dst, const T* src, int64_t stride, int64_t n) {
  if (stride == 1) load_row(dst, src, n);
  else
    for (int64_t i = 0; i < n; ++i) dst[i] = to_float(src[i * stride]);
}

template <class T>
void pack_rows_of(const Block& block, const Strided& t, int64_t begin, int64_t end, int64_t first, int64_t n,
                  float* dst, int64_t row) {
  const T* data = static_cast<const T*>(t.data) + block.b * t.stride_b + first * t.stride_c;
  each_key(block, begin, end, [&](int64_t i, int64_t y, int64_t x) {
    const T* key = data + block.key_ys[y] * t.stride_y + block.key_xs[x] * t.stride_x;
    float* to = dst + i * row;
    int64_t c = 0;
    if (t.stride_c == 1) {
      for (; c + kLanes <= n; c += kLanes) store_vec(to + c, load_lanes(key + c));
    }
    load_strided(to + c, key + c * t.stride_c, t.stride_c, n - c);
    fill_row(to + n, 0.f, row - n);
  });
}

// A query without a key that counts is shifted by nothing.
inline Vec shift_of(Vec largest) { return largest == splat(kNever) ? Vec{} : largest; }

}  // namespace

void pack_rows(DType dtype, const Block& block, const Strided& t, int64_t begin, int64_t end, int64_t first, int64_t n,
               float* dst, int64_t row) {
  with_dtype(dtype, [&](auto tag) { pack_rows_of<decltype(tag)>(block, t, begin, end, first, n, dst, row); });
}

void pack_queries(DType dtype, const Block& block, const Strided& t, int64_t first, int64_t n, float scale, float* dst,
                  int64_t row) {
  with_dtype(dtype, [&](auto tag) {
    const auto* data = static_cast<const decltype(tag)*>(t.data) + first * t.stride_c;
    for (int64_t m = 0; m < block.queries; ++m) {
      float* to = dst + m * row;
      load_strided(to, data + block.query_at(t, m), t.stride_c, n);
      for (int64_t i = 0; i < n; ++i) to[i] *= scale;
      fill_row(to + n, 0.f, row - n);
    }
  });
}

void key_rows_of_queries(const WindowAxis& y, const Block& block, KeyRows* rows) {
  const float* mask = y.exact[block.y_block] ? nullptr : y.masks + y.mask_begin[block.y_block];
  for (int64_t i = 0; i < block.y_queries; ++i) {
    int64_t begin = 0, end = block.y_keys;
    if (mask != nullptr) {
      while (mask[begin * block.y_queries + i] == kNever) ++begin;
      while (mask[(end - 1) * block.y_queries + i] == kNever) --end;
    }
    rows[i] = {begin, end};
  }
}

BlockWeights::BlockWeights(DType dtype, const WindowAttention& a, bool dense, Arena& arena)
    : dtype_(dtype), a_(a), shared_terms_(a.bias_y == nullptr), dense_(dense) {
  const int64_t queries = a.y.max_members * a.x.max_members, keys = a.y.max_keys * a.x.max_keys;
  const int64_t width = lanes_up(queries), tables = shared_terms_ ? 1 : a.heads;
  run_ = min64(max64(kRunFloats / width / kValueChunk * kValueChunk, kValueChunk), kLongestRun);
  const int64_t run = min64(run_, keys);
  depth_ = lanes_up(a.head_dim);
  far_ = a.k.stride_c == 1 && a.v.stride_c == 1 && a.y.in * a.x.in * a.heads * a.head_dim > kNearFloats;
  queries_ = arena.floats(a.heads * a.head_dim * width);
  keys_ = holds_rows(dtype, a.k) ? nullptr : arena.floats(run * depth_);
  scores_ = arena.floats((run + kKeySlack) * width), weights_ = arena.floats(run * width);
  terms_y_ = arena.floats(tables * a.y.max_keys * width), terms_x_ = arena.floats(tables * a.x.max_keys * width);
  largest_ = arena.floats(a.heads * width), inverse_ = arena.floats(a.heads * width);
  term_y_ = arena.pointers<const float*>(tables * a.y.max_keys);
  term_x_ = arena.pointers<const float*>(tables * a.x.max_keys);
  key_ = arena.pointers<const float*>(run + kKeySlack);
  places_ = arena.pointers<int64_t>(queries);
  bands_ = arena.structs<Band>(width / kLanes);
  rows_ = arena.structs<KeyRows>(a.y.max_members);
}

void BlockWeights::each(const Block& block, float* lse, Taker take) {
  query_places(block, a_.q, places_);
  transpose_queries(block);
  find_bands(block);
  for (int64_t head = 0; head < (shared_terms_ ? 1 : a_.heads); ++head) {
    make_terms(block, a_.y, a_.bias_y, head, true, terms_y_ + head * a_.y.max_keys * block.width,
               term_y_ + head * a_.y.max_keys);
    make_terms(block, a_.x, a_.bias_x, head, false, terms_x_ + head * a_.x.max_keys * block.width,
               term_x_ + head * a_.x.max_keys);
  }
  const bool whole = block.keys <= run_;
  for (int64_t head = 0; head < a_.heads; ++head) {
    fill_row(largest_ + head * block.width, kNever, block.width);
    fill_row(inverse_ + head * block.width, 0.f, block.width);
    for (int64_t begin = 0; begin < block.keys; begin += run_) {
      const int64_t end = min64(begin + run_, block.keys);
      score(block, head, begin, end);
      if (whole) exponentials<true>(block, head, begin, end);
      else exponentials<false>(block, head, begin, end);
    }
    finish(block, head, lse);
    if (!whole) continue;
    mix(block, head, 0, block.keys);
    if (!a_.mean) take(head, int64_t(0), block.keys, weights_);
  }
  if (whole) {
    if (a_.mean) take(int64_t(0), int64_t(0), block.keys, weights_);
    return;
  }
  for (int64_t begin = 0; begin < block.keys; begin += run_) {
    const int64_t end = min64(begin + run_, block.keys);
    for (int64_t head = 0; head < a_.heads; ++head) {
      score(block, head, begin, end);
      mix_exponentials(block, head, begin, end);
      if (!a_.mean) take(head, begin, end, weights_);
    }
    if (a_.mean) take(int64_t(0), begin, end, weights_);
  }
}


// What an axis adds to the scores of a head, by key, then query; at[key] is null where that is nothing.
void BlockWeights::make_terms(const Block& block, const WindowAxis& axis, const float* bias, int64_t head, bool rows, float* terms,
                const float** at) const {
  const int64_t own = rows ? block.y_block : block.x_block;
  const int64_t members = rows ? block.y_queries : block.x_queries, keys = rows ? block.y_keys : block.x_keys;
  const int32_t *member = rows ? block.ys : block.xs, *key = rows ? block.key_ys : block.key_xs;
  const float* mask = axis.exact[own] ? nullptr : axis.masks + axis.mask_begin[own];
  for (int64_t j = 0; j < keys; ++j) {
    at[j] = nullptr;
    if (mask == nullptr && bias == nullptr) continue;
    float* to = terms + j * block.width;
    bool any = false;
    for (int64_t i = 0; i < members; ++i) {
      float term = mask == nullptr ? 0.f : mask[j * members + i];
      // A key outside the window stays outside whatever the bias says.
      if (bias != nullptr && term != kNever) term += bias[(head * axis.out + member[i]) * axis.in + key[j]];
      any |= term != 0.f;
      if (rows) fill_row(to + i * block.x_queries, term, block.x_queries);
      else
        for (int64_t y = 0; y < block.y_queries; ++y) to[y * members + i] = term;
    }
    fill_row(to + block.queries, 0.f, block.width - block.queries);
    if (any) at[j] = to;
  }
}

// All heads' queries, scaled: [channel][query], zeros beyond the last query. A row of queries is read from one end to
// the other, as the prefetchers like it.
void BlockWeights::transpose_queries(const Block& block) const {
  const int64_t d = a_.heads * a_.head_dim, width = block.width;
  if (a_.q.stride_c != 1) {
    const float scale = a_.scale;
    with_dtype(dtype_, [&](auto tag) {
      for (int64_t i = 0; i < d; ++i) {
        const auto* channel = static_cast<const decltype(tag)*>(a_.q.data) + i * a_.q.stride_c;
        float* __restrict to = queries_ + i * width;
        for (int64_t m = 0; m < block.queries; ++m) to[m] = scale * to_float(channel[places_[m]]);
        fill_row(to + block.queries, 0.f, width - block.queries);
      }
    });
    return;
  }
  // One body per dtype: rows are widened in registers, not copied first.
  with_dtype(dtype_, [&](auto tag) {
    const auto* data = static_cast<const decltype(tag)*>(a_.q.data);
    for (int64_t first = 0; first < width; first += kLanes)
      for (int64_t i = 0; i < d; i += kLanes) {
        const int64_t now = min64(kLanes, d - i), rows = min64(kLanes, block.queries - first);
        Vec vecs[kLanes];
#pragma GCC unroll 16
        for (int m = 0; m < kLanes; ++m) vecs[m] = m < rows ? load_some(data + places_[first + m] + i, now) : Vec{};
        transpose_vecs(vecs);
        for (int64_t n = 0; n < now; ++n) store_vec(queries_ + (i + n) * width + first, a_.scale * vecs[n]);
      }
  });
}

void BlockWeights::find_bands(const Block& block) {
  key_rows_of_queries(a_.y, block, rows_);
  band_count_ = 0;
  for (int64_t first = 0; first < block.width; first += kLanes) {
    KeyRows rows = rows_[first / block.x_queries];
    const int64_t last = (min64(first + kLanes, block.queries) - 1) / block.x_queries;
    for (int64_t y = first / block.x_queries; y <= last; ++y)
      rows = {min64(rows.begin, rows_[y].begin), max64(rows.end, rows_[y].end)};
    const int64_t begin = rows.begin * block.x_keys, end = rows.end * block.x_keys;
    Band* before = bands_ + band_count_ - 1;
    if (band_count_ > 0 && before->key_begin == begin && before->key_end == end) ++before->vectors;
    else bands_[band_count_++] = {first, 1, begin, end};
  }
}

// visit(n, VectorCount<V>, from, to) for vectors of queries from query n on and their keys of a run, counted from its
// first.
template <class Visit>
void BlockWeights::each_band(int64_t begin, int64_t end, Visit visit) const {
  for (int64_t i = 0; i < band_count_; ++i) {
    const Band& band = bands_[i];
    const int64_t from = max64(band.key_begin, begin), to = max64(min64(band.key_end, end), from);
    each_in_vectors(band.vectors * kLanes, [&](int64_t n, auto vectors) {
      visit(band.first + n, vectors, from - begin, to - begin);
    });
  }
}

// Points to a head's keys [begin, end) as float32 rows: in their map where it holds such rows, else to copies.
void BlockWeights::find_keys(const Block& block, int64_t head, int64_t begin, int64_t end) {
  const int64_t d = a_.head_dim;
  if (keys_ == nullptr) {
    const float* data = static_cast<const float*>(a_.k.data) + block.b * a_.k.stride_b + head * d;
    each_key(block, begin, end, [&](int64_t i, int64_t y, int64_t x) {
      key_[i] = data + block.key_ys[y] * a_.k.stride_y + block.key_xs[x] * a_.k.stride_x;
    });
    return;
  }
  pack_rows(dtype_, block, a_.k, begin, end, head * d, d, keys_, depth_);
  for (int64_t i = 0; i < end - begin; ++i) key_[i] = keys_ + i * depth_;
}

// Scores of keys [begin, end). Rows of a large map come from far: those of the values, and of the next head's keys,
// are asked for in time.
void BlockWeights::score(const Block& block, int64_t head, int64_t begin, int64_t end) {
  const int64_t count = end - begin, width = block.width, d = a_.head_dim;
  find_keys(block, head, begin, end);
  for (int64_t i = 0; i < kKeySlack; ++i) key_[count + i] = key_[count - 1];
  const int64_t bytes = size_of(dtype_);
  const char* next = static_cast<const char*>(a_.k.data) + (block.b * a_.k.stride_b + (head + 1) * d) * bytes;
  const int64_t n_values = a_.mean ? 0 : a_.channels / a_.heads;
  const char* values = static_cast<const char*>(a_.v.data) + (block.b * a_.v.stride_b + head * n_values) * bytes;
  const float* const* term_y = term_y_ + (shared_terms_ ? 0 : head * a_.y.max_keys);
  const float* const* term_x = term_x_ + (shared_terms_ ? 0 : head * a_.x.max_keys);
  int64_t asked = far_ ? 0 : count, y = begin / block.x_keys, x = begin % block.x_keys;
  auto ahead = [&](int64_t to) {
    for (; asked < to; ++asked) {
      const int64_t key_y = block.key_ys[y], key_x = block.key_xs[x];
      if (head + 1 < a_.heads) prefetch_row(next + (key_y * a_.k.stride_y + key_x * a_.k.stride_x) * bytes, d * bytes);
      prefetch_row(values + (key_y * a_.v.stride_y + key_x * a_.v.stride_x) * bytes, n_values * bytes);
      if (++x == block.x_keys) x = 0, ++y;
    }
  };
  each_band(begin, end, [&](int64_t n, auto vectors, int64_t from, int64_t to) {
    constexpr int V = decltype(vectors)::value;
    float* scores = scores_ + from * width + n;
    score_products<V>(to - from, d, key_ + from, queries_ + head * d * width + n, width, scores,
                      [&](int64_t j) { ahead(from + j); });
    each_key(block, begin + from, begin + to, [&](int64_t i, int64_t key_y, int64_t key_x) {
      for (const float* term : {term_y[key_y], term_x[key_x]})
        if (term != nullptr)
          for (int v = 0; v < V; ++v) {
            float* at = scores + i * width + v * kLanes;
            store_vec(at, load_vec(at) + load_vec(term + n + v * kLanes));
          }
    });
  });
}

// Raises `largest` to the scores of a run and adds their exponentials to `inverse`, which holds sums until the last;
// scores become their exponentials if they are kept.
template <bool Keep>
void BlockWeights::exponentials(const Block& block, int64_t head, int64_t run_begin, int64_t run_end) {
  const int64_t width = block.width;
  each_band(run_begin, run_end, [&](int64_t n, auto vectors, int64_t from, int64_t to) {
    constexpr int V = decltype(vectors)::value;
    const int64_t keys = to - from;
    float* scores = scores_ + from * width + n;
    float *largest = largest_ + head * width + n, *total = inverse_ + head * width + n;
    Vec top[V], sum[V], shift[V];
    for (int v = 0; v < V; ++v) top[v] = load_vec(largest + v * kLanes);
    for (int64_t j = 0; j < keys; ++j)
      for (int v = 0; v < V; ++v) {
        const Vec s = load_vec(scores + j * width + v * kLanes);
        top[v] = s > top[v] ? s : top[v];
      }
    for (int v = 0; v < V; ++v) {
      shift[v] = shift_of(top[v]);
      sum[v] = load_vec(total + v * kLanes) * exp_of_negative(load_vec(largest + v * kLanes) - shift[v]);
      store_vec(largest + v * kLanes, top[v]);
    }
    for (int64_t begin = 0; begin < keys; begin += kSummedKeys) {
      Vec part[V] = {};
      for (int64_t j = begin; j < min64(begin + kSummedKeys, keys); ++j)
        for (int v = 0; v < V; ++v) {
          float* at = scores + j * width + v * kLanes;
          const Vec e = exp_of_negative(load_vec(at) - shift[v]);
          if constexpr (Keep) store_vec(at, e);
          part[v] += e;
        }
      for (int v = 0; v < V; ++v) sum[v] += part[v];
    }
    for (int v = 0; v < V; ++v) store_vec(total + v * kLanes, sum[v]);
  });
}

void BlockWeights::finish(const Block& block, int64_t head, float* lse) {
  float *largest = largest_ + head * block.width, *total = inverse_ + head * block.width;
  if (lse != nullptr)
    for (int64_t y = 0, m = 0; y < block.y_queries; ++y)
      for (int64_t x = 0; x < block.x_queries; ++x, ++m)
        lse[((block.b * a_.heads + head) * a_.y.out + block.ys[y]) * a_.x.out + block.xs[x]] =
            (largest[m] == kNever ? 0.f : largest[m]) + logf(total[m]);
  const float share = a_.mean ? 1.f / float(a_.heads) : 1.f;
  for (int64_t m = 0; m < block.width; ++m) total[m] = share / total[m];
}

// weights = exponentials / sum, or the average of the heads' so far.
void BlockWeights::mix(const Block& block, int64_t head, int64_t begin, int64_t end) {
  each_weight(block, head, begin, end, [](Vec e, Vec) { return e; });
}

// The same from scores.
void BlockWeights::mix_exponentials(const Block& block, int64_t head, int64_t begin, int64_t end) {
  each_weight(block, head, begin, end, [](Vec s, Vec shift) { return exp_of_negative(s - shift); });
}

template <class Exponential>
void BlockWeights::each_weight(const Block& block, int64_t head, int64_t begin, int64_t end, Exponential exponential) {
  const int64_t width = block.width;
  const bool add = a_.mean && head > 0;
  if (dense_ && !add && band_count_ > 1) fill_row(weights_, 0.f, (end - begin) * width);
  each_band(begin, end, [&](int64_t n, auto vectors, int64_t from, int64_t to) {
    constexpr int V = decltype(vectors)::value;
    Vec inverse[V], shift[V];
    for (int v = 0; v < V; ++v) {
      inverse[v] = load_vec(inverse_ + head * width + n + v * kLanes);
      shift[v] = shift_of(load_vec(largest_ + head * width + n + v * kLanes));
    }
    // visit(weight, exponential, 1 / sum) for every vector. A loop for either way of storing: with a branch inside, it
    // is the compiler's choice whether a product and its sum are one rounding or two.
    const auto each_vec = [&](auto visit) {
      for (int64_t j = from; j < to; ++j)
        for (int v = 0; v < V; ++v) {
          const int64_t at = j * width + n + v * kLanes;
          visit(weights_ + at, exponential(load_vec(scores_ + at), shift[v]), inverse[v]);
        }
    };
    if (add) each_vec([](float* to, Vec e, Vec factor) { store_vec(to, load_vec(to) + e * factor); });
    else each_vec([](float* to, Vec e, Vec factor) { store_vec(to, e * factor); });
  });
}

}  // namespace MURF_LEVEL
}  // namespace murf
