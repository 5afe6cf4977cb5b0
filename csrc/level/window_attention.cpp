// Window attention, forward: see window_attention.h.
#include "window_attention.h"

#include <math.h>

#include "kernels.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

// result[m * w.channels + i] = sum over keys of weights[j][m] * values[j][first + i]
template <class T>
void weigh(const WindowAttention& a, const Block& block, const float* weights, int64_t first, int64_t n,
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
void forward(const WindowAttention& a, const Strided& out, float* lse, int threads) {
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

}  // namespace

void window_attention(DType dtype, WindowAttention attention, Strided out, float* lse, int threads) {
  with_dtype(dtype, [&](auto tag) { forward<decltype(tag)>(attention, out, lse, threads); });
}

}  // namespace MURF_LEVEL
}  // namespace murf
