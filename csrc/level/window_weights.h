// The weights of window attention, block of queries after block, for the forward kernels.
//
// Scores of a block lie by key, then query, so that a softmax is vertical arithmetic on vectors of queries. A block
// with few keys has all its scores of a head in the second-level cache. One with more takes its keys in runs, twice:
// first for every head's largest score and sum of exponentials, then for the weights, a run at a time. That makes the
// products of queries and keys twice, and keeps memory and cache as they are with few keys, whatever is made of the
// values.
#pragma once

#include "window_attention.h"

namespace murf {
namespace MURF_LEVEL {

// Values of so many keys are summed in registers.
constexpr int64_t kValueChunk = 192;

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
  template <class S>
  S* structs(int64_t n) {
    static_assert(sizeof(S) % sizeof(float) == 0);
    return reinterpret_cast<S*>(floats(n * int64_t(sizeof(S) / sizeof(float))));
  }
  int64_t used() const { return used_; }

 private:
  float* at_;
  int64_t used_ = 0;
};

// places[m]: where query m lies in its image of a map.
inline void query_places(const Block& block, const Strided& t, int64_t* places) {
  for (int64_t y = 0; y < block.y_queries; ++y)
    for (int64_t x = 0; x < block.x_queries; ++x)
      places[y * block.x_queries + x] = block.b * t.stride_b + block.ys[y] * t.stride_y + block.xs[x] * t.stride_x;
}

inline bool holds_rows(DType dtype, const Strided& t) { return dtype == DType::f32 && t.stride_c == 1; }

inline Block block_of(const WindowAttention& a, int64_t task) {
  const int64_t blocks = a.y.blocks * a.x.blocks, at = task % blocks;
  return Block(a, task / blocks, at / a.x.blocks, at % a.x.blocks);
}

// Queries of a block that read one run of its keys: whole vectors from query `first` on.
struct Band {
  int64_t first, vectors, key_begin, key_end;
};

// The run of rows of keys that a row of queries reads, of those of its block.
struct KeyRows {
  int64_t begin, end;
};

void key_rows_of_queries(const WindowAxis& y, const Block& block, KeyRows* rows);

class BlockWeights {
 public:
  // dense: weights are 0 where a band has no scores; else they are nothing there.
  BlockWeights(DType dtype, const WindowAttention& a, bool dense, Arena& arena);

  // take(head, begin, end, weights) for every head and run of keys of a block; where heads are averaged, once for all
  // of them. Weights lie by key, then query, block.width apart; a query's add up to 1. lse: as window_attention has it.
  template <class Take>
  void each(const Block& block, float* lse, Take take) {
    each(block, lse, {&take, [](void* self, int64_t head, int64_t begin, int64_t end, const float* weights) {
                        (*static_cast<Take*>(self))(head, begin, end, weights);
                      }});
  }

 private:
  // `take`, whatever it is.
  struct Taker {
    void* self;
    void (*call)(void* self, int64_t head, int64_t begin, int64_t end, const float* weights);
    void operator()(int64_t head, int64_t begin, int64_t end, const float* weights) const {
      call(self, head, begin, end, weights);
    }
  };
  void each(const Block& block, float* lse, Taker take);

  // What an axis adds to the scores of a head, by key, then query; at[key] is null where that is nothing.
  void make_terms(const Block& block, const WindowAxis& axis, const float* bias, int64_t head, bool rows, float* terms,
                  const float** at) const;
  // All heads' queries, scaled: [channel][query], zeros beyond the last query.
  void transpose_queries(const Block& block) const;
  void find_bands(const Block& block);
  // visit(n, VectorCount<V>, from, to) for vectors of queries from query n on and their keys of a run, counted from its
  // first.
  template <class Visit>
  void each_band(int64_t begin, int64_t end, Visit visit) const;
  // Points to a head's keys [begin, end) as float32 rows: in their map where it holds such rows, else to copies.
  void find_keys(const Block& block, int64_t head, int64_t begin, int64_t end);
  // Scores of keys [begin, end).
  void score(const Block& block, int64_t head, int64_t begin, int64_t end);
  // Raises `largest` to the scores of a run and adds their exponentials to `inverse`, which holds sums until the last;
  // scores become their exponentials if they are kept.
  template <bool Keep>
  void exponentials(const Block& block, int64_t head, int64_t run_begin, int64_t run_end);
  void finish(const Block& block, int64_t head, float* lse);
  // weights = exponentials / sum, or the average of the heads' so far; and the same from scores.
  void mix(const Block& block, int64_t head, int64_t begin, int64_t end);
  void mix_exponentials(const Block& block, int64_t head, int64_t begin, int64_t end);
  template <class Exponential>
  void each_weight(const Block& block, int64_t head, int64_t begin, int64_t end, Exponential exponential);

  const DType dtype_;
  const WindowAttention& a_;
  const bool shared_terms_, dense_;
  int64_t run_, depth_, band_count_ = 0;
  bool far_;
  float *queries_, *keys_, *scores_, *weights_, *terms_y_, *terms_x_, *largest_, *inverse_;
  const float **term_y_, **term_x_, **key_;
  int64_t* places_;
  Band* bands_;
  KeyRows* rows_;
};

}  // namespace MURF_LEVEL
}  // namespace murf
