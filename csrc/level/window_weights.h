// The weights of window attention, block of queries after block, for the forward kernels.
//
// Scores of a block lie by key, then query, so that a softmax is vertical arithmetic on vectors of queries. A block with
// few keys has all its scores of a head in the second-level cache. One with more takes its keys in runs, twice: first for
// every head's largest score and sum of exponentials, then for the weights, a run at a time. That makes the products of
// queries and keys twice, and keeps memory and cache as they are with few keys, whatever the heads do with the values.
#pragma once

#include <math.h>

#include "activations.h"
#include "window_attention.h"
#include "window_products.h"

namespace murf {
namespace MURF_LEVEL {

// Scores of a run of keys: 256 KB, and as many mixed weights; no longer runs than the packed keys of half precision fit.
constexpr int64_t kRunFloats = 1 << 16, kLongestRun = 1024;

// Memory of one thread, cut into arrays; or only counted, from null.
class Arena {
 public:
  explicit Arena(float* at) : at_(at) {}
  float* floats(int64_t n) {
    float* from = at_ == nullptr ? nullptr : at_ + used_;
    used_ += padded(n);
    return from;
  }
  template <class P>
  P* pointers(int64_t n) {
    static_assert(sizeof(P) <= kPointerFloats * sizeof(float));
    return reinterpret_cast<P*>(floats(n * kPointerFloats));
  }
  int64_t used() const { return used_; }

 private:
  float* at_;
  int64_t used_ = 0;
};

// visit(i, row, column) for keys [begin, end) of a block, i counted from `begin`; row and column of its union.
template <class Visit>
inline void each_key(const Block& block, int64_t begin, int64_t end, Visit visit) {
  int64_t y = begin / block.x_keys, x = begin % block.x_keys;
  for (int64_t i = 0; i < end - begin; ++i) {
    visit(i, y, x);
    if (++x == block.x_keys) x = 0, ++y;
  }
}

// places[m]: where query m lies in its image of a map.
inline void query_places(const Block& block, const Strided& t, int64_t* places) {
  for (int64_t y = 0; y < block.y_queries; ++y)
    for (int64_t x = 0; x < block.x_queries; ++x)
      places[y * block.x_queries + x] = block.b * t.stride_b + block.ys[y] * t.stride_y + block.xs[x] * t.stride_x;
}

// Channels [first, first + n) of keys [begin, end) as float32 rows: rows[i] points to a key's, in the map itself where it
// holds such rows, else in `packed` with `row` floats a key, padded with zeros.
template <class T>
inline void key_rows(const Block& block, const Strided& t, int64_t begin, int64_t end, int64_t first, int64_t n,
                     bool as_it_is, float* packed, int64_t row, const float** rows) {
  const T* data = static_cast<const T*>(t.data) + block.b * t.stride_b + first * t.stride_c;
  each_key(block, begin, end, [&](int64_t i, int64_t y, int64_t x) {
    const T* key = data + block.key_ys[y] * t.stride_y + block.key_xs[x] * t.stride_x;
    if constexpr (sizeof(T) == sizeof(float)) {
      if (as_it_is) {
        rows[i] = key;
        return;
      }
    }
    float* to = packed + i * row;
    load_strided(to, key, t.stride_c, n);
    fill_row(to + n, 0.f, row - n);
    rows[i] = to;
  });
}

template <class T>
constexpr bool holds_rows(const Strided& t) {
  return sizeof(T) == sizeof(float) && t.stride_c == 1;
}

template <class T>
class BlockWeights {
 public:
  BlockWeights(const WindowAttention& a, Arena& arena) : a_(a), shared_terms_(a.bias_y == nullptr) {
    const int64_t queries = a.y.max_members * a.x.max_members, keys = a.y.max_keys * a.x.max_keys;
    const int64_t width = lanes_up(queries), tables = shared_terms_ ? 1 : a.heads;
    run_ = min64(max64(kRunFloats / width / kKeyChunk * kKeyChunk, kKeyChunk), kLongestRun);
    const int64_t run = min64(run_, keys);
    depth_ = lanes_up(a.head_dim);
    queries_ = arena.floats((keys > run ? a.heads : 1) * a.head_dim * width);
    keys_ = holds_rows<T>(a.k) ? nullptr : arena.floats(run * depth_);
    scores_ = arena.floats((run + kKeySlack) * width), weights_ = arena.floats(run * width);
    terms_y_ = arena.floats(tables * a.y.max_keys * width), terms_x_ = arena.floats(tables * a.x.max_keys * width);
    largest_ = arena.floats(a.heads * width), inverse_ = arena.floats(a.heads * width);
    row_ = arena.floats(kLanes * depth_);
    term_y_ = arena.pointers<const float*>(tables * a.y.max_keys);
    term_x_ = arena.pointers<const float*>(tables * a.x.max_keys);
    key_ = arena.pointers<const float*>(run + kKeySlack);
    places_ = arena.pointers<int64_t>(queries);
  }

  // take(head, begin, end, weights) for every head and run of keys of a block; where heads are averaged, once for all of
  // them. Weights lie by key, then query, block.width apart; a query's add up to 1. lse: as window_attention has it.
  template <class Take>
  void each(const Block& block, float* lse, Take take) {
    query_places(block, a_.q, places_);
    for (int64_t head = 0; head < (shared_terms_ ? 1 : a_.heads); ++head) {
      make_terms(block, a_.y, a_.bias_y, head, true, terms_y_ + head * a_.y.max_keys * block.width,
                 term_y_ + head * a_.y.max_keys);
      make_terms(block, a_.x, a_.bias_x, head, false, terms_x_ + head * a_.x.max_keys * block.width,
                 term_x_ + head * a_.x.max_keys);
    }
    const bool whole = block.keys <= run_;
    for (int64_t head = 0; head < a_.heads; ++head) {
      float* q = queries_ + (whole ? 0 : head * a_.head_dim * block.width);
      transpose_queries(block, head, q);
      fill_row(largest_ + head * block.width, kNever, block.width);
      fill_row(inverse_ + head * block.width, 0.f, block.width);
      for (int64_t begin = 0; begin < block.keys; begin += run_) {
        const int64_t end = min64(begin + run_, block.keys);
        score(block, head, q, begin, end);
        if (whole) exponentials<true>(block, head, end - begin);
        else exponentials<false>(block, head, end - begin);
      }
      finish(block, head, lse);
      if (!whole) continue;
      mix(block, head, block.keys);
      if (!a_.mean) take(head, int64_t(0), block.keys, weights_);
    }
    if (whole) {
      if (a_.mean) take(int64_t(0), int64_t(0), block.keys, weights_);
      return;
    }
    for (int64_t begin = 0; begin < block.keys; begin += run_) {
      const int64_t end = min64(begin + run_, block.keys);
      for (int64_t head = 0; head < a_.heads; ++head) {
        score(block, head, queries_ + head * a_.head_dim * block.width, begin, end);
        mix_exponentials(block, head, end - begin);
        if (!a_.mean) take(head, begin, end, weights_);
      }
      if (a_.mean) take(int64_t(0), begin, end, weights_);
    }
  }

 private:
  // What an axis adds to the scores of a head, by key, then query; at[key] is null where that is nothing.
  void make_terms(const Block& block, const WindowAxis& axis, const float* bias, int64_t head, bool rows, float* terms,
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

  // One head's queries, scaled: q[channel * width + query], zeros beyond the last query.
  void transpose_queries(const Block& block, int64_t head, float* q) const {
    const T* data = static_cast<const T*>(a_.q.data) + head * a_.head_dim * a_.q.stride_c;
    const int64_t d = a_.head_dim, width = block.width;
    if (a_.q.stride_c != 1) {
      for (int64_t i = 0; i < d; ++i) {
        const T* channel = data + i * a_.q.stride_c;
        for (int64_t m = 0; m < block.queries; ++m) q[i * width + m] = a_.scale * to_float(channel[places_[m]]);
        fill_row(q + i * width + block.queries, 0.f, width - block.queries);
      }
      return;
    }
    for (int64_t first = 0; first < width; first += kLanes) {
      const int64_t now = min64(kLanes, block.queries - first);
      for (int64_t m = 0; m < kLanes; ++m) {
        float* row = row_ + m * depth_;
        const int64_t n = m < now ? d : 0;
        if (m < now) load_row(row, data + places_[first + m], d);
        fill_row(row + n, 0.f, depth_ - n);
      }
      for (int64_t i = 0; i < d; i += kLanes) {
        Vec vecs[kLanes];
        for (int m = 0; m < kLanes; ++m) vecs[m] = load_vec(row_ + m * depth_ + i);
        transpose_vecs(vecs);
        for (int64_t n = 0; n < min64(kLanes, d - i); ++n) store_vec(q + (i + n) * width + first, a_.scale * vecs[n]);
      }
    }
  }

  // Scores of keys [begin, end), with `largest` raised to theirs; what it was before is in places where sums are.
  void score(const Block& block, int64_t head, const float* q, int64_t begin, int64_t end) {
    const int64_t count = end - begin, width = block.width, d = a_.head_dim;
    key_rows<T>(block, a_.k, begin, end, head * d, d, holds_rows<T>(a_.k), keys_, depth_, key_);
    for (int64_t i = 0; i < kKeySlack; ++i) key_[count + i] = key_[count - 1];
    score_products(count, d, key_, q, width, scores_);
    const float* const* term_y = term_y_ + (shared_terms_ ? 0 : head * a_.y.max_keys);
    const float* const* term_x = term_x_ + (shared_terms_ ? 0 : head * a_.x.max_keys);
    each_key(block, begin, end, [&](int64_t i, int64_t y, int64_t x) {
      if (term_y[y] != nullptr) add_scaled_row(scores_ + i * width, term_y[y], 1.f, width);
      if (term_x[x] != nullptr) add_scaled_row(scores_ + i * width, term_x[x], 1.f, width);
    });
  }

  // A query without a key that counts is shifted by nothing.
  static Vec shift_of(Vec largest) { return largest == splat(kNever) ? Vec{} : largest; }

  // Raises `largest` to the scores of a run and adds their exponentials to `inverse`, which holds sums until the last;
  // scores become their exponentials if they are kept.
  template <bool Keep>
  void exponentials(const Block& block, int64_t head, int64_t keys) {
    const int64_t width = block.width;
    each_in_vectors(width, [&](int64_t n, auto vectors) {
      constexpr int V = decltype(vectors)::value;
      float* scores = scores_ + n;
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
      for (int64_t begin = 0; begin < keys; begin += kKeyChunk) {
        Vec part[V] = {};
        for (int64_t j = begin; j < min64(begin + kKeyChunk, keys); ++j)
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

  void finish(const Block& block, int64_t head, float* lse) {
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
  void mix(const Block& block, int64_t head, int64_t keys) {
    each_weight(block, head, keys, [](Vec e, Vec) { return e; });
  }

  // The same from scores.
  void mix_exponentials(const Block& block, int64_t head, int64_t keys) {
    each_weight(block, head, keys, [](Vec s, Vec shift) { return exp_of_negative(s - shift); });
  }

  template <class Exponential>
  void each_weight(const Block& block, int64_t head, int64_t keys, Exponential exponential) {
    const int64_t width = block.width;
    const bool add = a_.mean && head > 0;
    each_in_vectors(width, [&](int64_t n, auto vectors) {
      constexpr int V = decltype(vectors)::value;
      Vec inverse[V], shift[V];
      for (int v = 0; v < V; ++v) {
        inverse[v] = load_vec(inverse_ + head * width + n + v * kLanes);
        shift[v] = shift_of(load_vec(largest_ + head * width + n + v * kLanes));
      }
      for (int64_t j = 0; j < keys; ++j)
        for (int v = 0; v < V; ++v) {
          const int64_t at = j * width + n + v * kLanes;
          const Vec e = exponential(load_vec(scores_ + at), shift[v]) * inverse[v];
          store_vec(weights_ + at, add ? load_vec(weights_ + at) + e : e);
        }
    });
  }

  const WindowAttention& a_;
  const bool shared_terms_;
  int64_t run_, depth_;
  float *queries_, *keys_, *scores_, *weights_, *terms_y_, *terms_x_, *largest_, *inverse_, *row_;
  const float **term_y_, **term_x_, **key_;
  int64_t* places_;
};

}  // namespace MURF_LEVEL
}  // namespace murf
