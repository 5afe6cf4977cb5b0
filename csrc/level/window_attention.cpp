// Window attention, forward: see window_weights.h.
#include "kernels.h"
#include "window_weights.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

// Queries of a block that read one run of its keys.
struct Readers {
  int64_t first, end, key_begin, key_end;
};

template <class T>
class Output {
 public:
  Output(const WindowAttention& a, const Strided& out, Arena& arena) : a_(a), out_(out) {
    const int64_t queries = a.y.max_members * a.x.max_members;
    row_ = lanes_up(a.channels);
    // The aligned rows of a large result go past the caches.
    const bool large = worth_streaming(a.batch * a.channels * a.y.out * a.x.out * int64_t(sizeof(T)));
    const int64_t strides = out.stride_b | out.stride_y | out.stride_x;
    rows_ = holds_rows<T>(out);
    stream_ = rows_ && large && reinterpret_cast<uintptr_t>(out.data) % (kLanes * sizeof(float)) == 0 &&
              strides % kLanes == 0;
    planar_ = out.stride_c != 1 && a.channels > 1;
    result_ = arena.floats(planar_ ? row_ * lanes_up(queries) : (queries + 1) * row_);
    values_ = arena.floats(kKeyChunk * kChannelChunk);
    tile_ = arena.floats(kMostRows * kChannelChunk);
    key_ = arena.pointers<const float*>(kKeyChunk);
    places_ = arena.pointers<int64_t>(queries);
    readers_ = reinterpret_cast<Readers*>(arena.floats(a.y.max_members * int64_t(sizeof(Readers) / sizeof(float))));
  }

  void enter(const Block& block) {
    query_places(block, out_, places_);
    find_readers(block);
  }

  // Weights times channels [first, first + n) of the values of keys [begin, end).
  void take(const Block& block, int64_t first, int64_t n, int64_t begin, int64_t end, const float* weights) {
    const bool last = end == block.keys;
    for (int64_t c = 0; c < n; c += kChannelChunk) {
      const int64_t now = min64(kChannelChunk, n - c);
      // Rows are read and written in whole vectors.
      const bool as_it_is = holds_rows<T>(a_.v) && now % kLanes == 0 && !planar_;
      for (int64_t at = begin; at < end; at += kKeyChunk) {
        const int64_t stop = min64(at + kKeyChunk, end);
        key_rows<T>(block, a_.v, at, stop, first + c, now, as_it_is, values_, kChannelChunk, key_);
        const float* own = weights + (at - begin) * block.width;
        if (planar_) {
          gemm(now, stop - at, block.width, values_, 1, kChannelChunk, own, block.width,
               result_ + (first + c) * block.width, block.width, at > 0);
        } else {
          for (int64_t i = 0; i < reader_count_; ++i)
            weigh(block, readers_[i], first + c, now, at, stop, own);
        }
      }
      if (last && planar_) write_planes(block, first + c, now);
    }
    if (last && !planar_ && block.keys > kKeyChunk)
      for (int64_t m = 0; m < block.queries; ++m)
        store_row(static_cast<T*>(out_.data) + places_[m] + first, result_ + m * row_ + first, n);
  }

 private:
  static constexpr int kMostRows = 8;

  // Where windows of rows differ, every row of queries has its own run of rows of keys.
  void find_readers(const Block& block) {
    reader_count_ = 1;
    readers_[0] = {0, block.queries, 0, block.keys};
    if (a_.y.exact[block.y_block] || block.x_queries < 4) return;
    const float* mask = a_.y.masks + a_.y.mask_begin[block.y_block];
    reader_count_ = block.y_queries;
    for (int64_t i = 0; i < block.y_queries; ++i) {
      int64_t begin = 0, end = block.y_keys;
      while (mask[begin * block.y_queries + i] == kNever) ++begin;
      while (mask[(end - 1) * block.y_queries + i] == kNever) --end;
      readers_[i] = {i * block.x_queries, (i + 1) * block.x_queries, begin * block.x_keys, end * block.x_keys};
    }
  }

  void weigh(const Block& block, const Readers& readers, int64_t first, int64_t n, int64_t begin, int64_t end,
             const float* weights) {
    const int64_t from = max64(begin, readers.key_begin), to = max64(min64(end, readers.key_end), from);
    const float* own = weights + (from - begin) * block.width;
    each_in_vectors(lanes_up(n), [&](int64_t c, auto vectors) {
      constexpr int V = decltype(vectors)::value, Rows = kRowsOf<V>;
      int64_t m = readers.first;
      auto tile = [&]<int R>() {
        weigh_tile<R, V>(block, own + m, to - from, key_ + (from - begin), c, first + c, n - c, m, readers.end, begin);
        m += R;
      };
      while (m + Rows <= readers.end) tile.template operator()<Rows>();
      while (m + 4 <= readers.end) tile.template operator()<4>();
      while (m < readers.end) tile.template operator()<2>();
    });
  }

  // Queries m .. m + R - 1, of which the last may be none of the block; `first` channel of the result, n of them.
  template <int R, int V>
  void weigh_tile(const Block& block, const float* weights, int64_t keys, const float* const* values, int64_t column,
                  int64_t first, int64_t n, int64_t m, int64_t end, int64_t begin) {
    const int64_t rows = min64(R, end - m);
    float* to[R];
    if (block.keys > kKeyChunk) {
      for (int i = 0; i < R; ++i) to[i] = result_ + (i < rows ? m + i : block.queries) * row_ + first;
      values_tile<R, V, false>(keys, weights, block.width, values, column, to, begin > 0);
      return;
    }
    T* out = static_cast<T*>(out_.data) + first;
    if constexpr (sizeof(T) == sizeof(float)) {
      if (rows_ && rows == R && n >= V * kLanes) {
        for (int i = 0; i < R; ++i) to[i] = out + places_[m + i];
        if (stream_ && first % kLanes == 0)
          values_tile<R, V, true>(keys, weights, block.width, values, column, to, false);
        else values_tile<R, V, false>(keys, weights, block.width, values, column, to, false);
        return;
      }
    }
    for (int i = 0; i < R; ++i) to[i] = tile_ + i * kChannelChunk;
    values_tile<R, V, false>(keys, weights, block.width, values, column, to, false);
    for (int64_t i = 0; i < rows; ++i) store_row(out + places_[m + i], to[i], min64(n, V * kLanes));
  }

  void write_planes(const Block& block, int64_t first, int64_t n) {
    for (int64_t c = first; c < first + n; ++c) {
      T* out = static_cast<T*>(out_.data) + c * out_.stride_c;
      const float* row = result_ + c * block.width;
      for (int64_t m = 0; m < block.queries; ++m) from_float(row[m], out[places_[m]]);
    }
  }

  const WindowAttention& a_;
  const Strided& out_;
  int64_t row_, reader_count_ = 0;
  bool rows_, stream_, planar_;
  float *result_, *values_, *tile_;
  const float** key_;
  int64_t* places_;
  Readers* readers_;
};

template <class T>
void forward(const WindowAttention& a, const Strided& out, float* lse, int threads) {
  auto floats = [&] {
    Arena arena(nullptr);
    BlockWeights<T> weights(a, arena);
    Output<T> output(a, out, arena);
    return arena.used();
  };
  const int64_t share = floats();
  Scratch scratch(share * threads);
  const int64_t blocks = a.y.blocks * a.x.blocks;
  parallel(threads, a.batch * blocks, [&](int thread, int64_t begin, int64_t end) {
    Arena arena(scratch.data() + thread * share);
    BlockWeights<T> weights(a, arena);
    Output<T> output(a, out, arena);
    for (int64_t task = begin; task < end; ++task) {
      const Block block(a, task / blocks, task % blocks / a.x.blocks, task % a.x.blocks);
      output.enter(block);
      const int64_t n = a.mean ? a.channels : a.channels / a.heads;
      weights.each(block, lse, [&](int64_t head, int64_t from, int64_t to, const float* given) {
        output.take(block, head * n, n, from, to, given);
      });
    }
    stream_fence();
  });
}

}  // namespace

void window_attention(DType dtype, WindowAttention attention, Strided out, float* lse, int threads) {
  with_dtype(dtype, [&](auto tag) { forward<decltype(tag)>(attention, out, lse, threads); });
}

}  // namespace MURF_LEVEL
}  // namespace murf
