// The ceiling of every operation that writes a large result: non-temporal stores from a block in the first-level cache.
#include "kernels.h"
#include "launch.h"
#include "rows.h"

namespace murf {
namespace MURF_LEVEL {

void stream_fill(void* out, int64_t bytes, int threads) {
  constexpr int64_t kBlock = 4096;
  Scratch block(kBlock);
  fill_row(block.data(), 1.f, kBlock);
  const int64_t block_bytes = kBlock * int64_t(sizeof(float));
  parallel(threads, (bytes + block_bytes - 1) / block_bytes, [&](int, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      stream_copy(static_cast<char*>(out) + i * block_bytes, block.data(), min64(block_bytes, bytes - i * block_bytes));
    stream_fence();
  });
}

}  // namespace MURF_LEVEL
}  // namespace murf
