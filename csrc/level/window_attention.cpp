// Window attention, forward: see window_weights.h.
#include "kernels.h"
#include "window_products.h"
#include "window_weights.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

// Whether channels of the result are planes, written one after the other.
bool planar(const WindowAttention& a, const Strided& out) { return out.stride_c != 1 && a.channels > 1; }

class Output {
 public:
  Output(DType dtype, const WindowAttention& a, const Strided& out, Arena& arena)
      : dtype_(dtype), a_(a), out_(out) {
    const int64_t queries = a.y.max_members * a.x.max_members;
    width_ = a.mean ? a.channels : a.channels / a.heads;
    row_ = (a.mean ? 1 : a.heads) * lanes_up(width_);
    // The aligned rows of a large result go past the caches.
    const bool large = worth_streaming(a.batch * a.channels * a.y.out * a.x.out * size_of(dtype));
    const int64_t strides = out.stride_b | out.stride_y | out.stride_x;
    rows_ = holds_rows(dtype, out);
    stream_ = rows_ && large && reinterpret_cast<uintptr_t>(out.data) % (kLanes * sizeof(float)) == 0 &&
              strides % kLanes == 0;
    planar_ = planar(a, out);
    result_ = arena.floats(planar_ ? row_ * lanes_up(queries) : (queries + 1) * row_);
    values_ = arena.floats(kValueChunk * kChannelChunk);
    tile_ = arena.floats(kMostRows * kChannelChunk);
    places_ = arena.pointers<int64_t>(queries);
    rows_of_ = arena.structs<KeyRows>(a.y.max_members);
  }

  void enter(const Block& block) {
    query_places(block, out_, places_);
    key_rows_of_queries(a_.y, block, rows_of_);
    by_row_ = !a_.y.exact[block.y_block];
  }

  // Weights times the values of keys [begin, end): a head's channels, or all of them.
  void take(const Block& block, int64_t head, int64_t begin, int64_t end, const float* weights) {
    const int64_t n = width_, first = head * n;
    const bool last = end == block.keys;
    // Results are whole vectors, those of a head apart from the next one's.
    head_result_ = result_ + head * (lanes_up(n) - n);
    for (int64_t c = 0; c < n; c += kChannelChunk) {
      const int64_t now = min64(kChannelChunk, n - c);
      for (int64_t at = begin; at < end; at += kValueChunk) {
        const int64_t stop = min64(at + kValueChunk, end);
        pack_rows(dtype_, block, a_.v, at, stop, first + c, now, values_, kChannelChunk);
        const float* own = weights + (at - begin) * block.width;
        if (planar_) {
          gemm(now, stop - at, block.width, values_, 1, kChannelChunk, own, block.width,
               result_ + (first + c) * block.width, block.width, at > 0);
        } else {
          weigh(block, first + c, now, at, stop, own);
        }
      }
      if (last && planar_) write_planes(block, first + c, now);
    }
    if (last && !planar_ && block.keys > kValueChunk)
      for (int64_t m = 0; m < block.queries; ++m)
        store_values(dtype_, out_.data, places_[m] + first, 1, head_result_ + m * row_ + first, n);
  }

 private:
  static constexpr int kMostRows = 8;

  // Where windows of rows differ, every row of queries has its own run of keys.
  void weigh(const Block& block, int64_t first, int64_t n, int64_t begin, int64_t end, const float* weights) {
    if (!by_row_) return weigh_queries(block, 0, block.queries, begin, end, first, n, begin, weights);
    for (int64_t y = 0; y < block.y_queries; ++y) {
      const int64_t from = max64(begin, rows_of_[y].begin * block.x_keys);
      const int64_t to = max64(min64(end, rows_of_[y].end * block.x_keys), from);
      weigh_queries(block, y * block.x_queries, (y + 1) * block.x_queries, from, to, first, n, begin, weights);
    }
  }

  // Queries [m, end) and keys [from, to) of those from `begin` on.
  void weigh_queries(const Block& block, int64_t m, int64_t end, int64_t from, int64_t to, int64_t first, int64_t n,
                     int64_t begin, const float* weights) {
    const float* own = weights + (from - begin) * block.width;
    const float* values = values_ + (from - begin) * kChannelChunk;
    each_in_vectors(lanes_up(n), [&](int64_t c, auto vectors) {
      constexpr int V = decltype(vectors)::value, Rows = kRowsOf<V>;
      int64_t at = m;
      auto tile = [&]<int R>() {
        weigh_tile<R, V>(block, own + at, to - from, values + c, first + c, n - c, at, end, begin);
        at += R;
      };
      while (at + Rows <= end) tile.template operator()<Rows>();
      while (at + 4 <= end) tile.template operator()<4>();
      while (at < end) tile.template operator()<2>();
    });
  }

  // Queries m .. m + R - 1, of which the last may be none of the block; `first` channel of the result, n of them.
  template <int R, int V>
  void weigh_tile(const Block& block, const float* weights, int64_t keys, const float* values, int64_t first,
                  int64_t n, int64_t m, int64_t end, int64_t begin) {
    const int64_t rows = min64(R, end - m);
    float* to[R];
    if (block.keys > kValueChunk) {
      for (int i = 0; i < R; ++i) to[i] = head_result_ + (i < rows ? m + i : block.queries) * row_ + first;
      values_tile<R, V, false>(keys, weights, block.width, values, kChannelChunk, to, begin > 0);
      return;
    }
    if (rows_ && rows == R && n >= V * kLanes) {
      for (int i = 0; i < R; ++i) to[i] = static_cast<float*>(out_.data) + places_[m + i] + first;
      if (stream_ && first % kLanes == 0)
        values_tile<R, V, true>(keys, weights, block.width, values, kChannelChunk, to, false);
      else values_tile<R, V, false>(keys, weights, block.width, values, kChannelChunk, to, false);
      return;
    }
    for (int i = 0; i < R; ++i) to[i] = tile_ + i * kChannelChunk;
    values_tile<R, V, false>(keys, weights, block.width, values, kChannelChunk, to, false);
    with_dtype(dtype_, [&](auto tag) {
      auto* out = static_cast<decltype(tag)*>(out_.data) + first;
      for (int64_t i = 0; i < rows; ++i) store_row(out + places_[m + i], to[i], min64(n, V * kLanes));
    });
  }

  void write_planes(const Block& block, int64_t first, int64_t n) {
    const int64_t* places = places_;
    const int64_t queries = block.queries;
    with_dtype(dtype_, [&](auto tag) {
      for (int64_t c = first; c < first + n; ++c) {
        auto* __restrict out = static_cast<decltype(tag)*>(out_.data) + c * out_.stride_c;
        const float* __restrict row = result_ + c * block.width;
        for (int64_t m = 0; m < queries; ++m) from_float(row[m], out[places[m]]);
      }
    });
  }

  const DType dtype_;
  const WindowAttention& a_;
  const Strided& out_;
  int64_t row_, width_;
  bool rows_, stream_, planar_, by_row_ = false;
  float *result_, *head_result_ = nullptr, *values_, *tile_;
  int64_t* places_;
  KeyRows* rows_of_;
};

}  // namespace

void window_attention(DType dtype, WindowAttention attention, Strided out, float* lse, int threads) {
  auto floats = [&] {
    Arena arena(nullptr);
    BlockWeights weights(dtype, attention, planar(attention, out), arena);
    Output output(dtype, attention, out, arena);
    return arena.used();
  };
  const int64_t share = floats();
  Scratch scratch(share * threads);
  parallel(threads, attention.batch * attention.y.blocks * attention.x.blocks, [&](int thread, int64_t begin, int64_t end) {
    Arena arena(scratch.data() + thread * share);
    BlockWeights weights(dtype, attention, planar(attention, out), arena);
    Output output(dtype, attention, out, arena);
    for (int64_t task = begin; task < end; ++task) {
      const Block block = block_of(attention, task);
      output.enter(block);
      weights.each(block, lse, [&](int64_t head, int64_t from, int64_t to, const float* given) {
        output.take(block, head, from, to, given);
      });
    }
    stream_fence();
  });
}

}  // namespace MURF_LEVEL
}  // namespace murf
