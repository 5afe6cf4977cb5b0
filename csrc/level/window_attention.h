// Window attention: queries that share most of their keys are a block, and a block is a few small matrix products.
// Scores lie by key, then query, so that a softmax over keys is vertical arithmetic on vectors of queries.
#pragma once

#include "gemm.h"
#include "launch.h"
#include "rows.h"

namespace murf {
namespace MURF_LEVEL {

// Values are packed this many keys and channels at a time, 32 KB, to stay in the first-level cache. Products that sum
// over keys are added up in parts of this length.
constexpr int64_t kKeyChunk = 128, kChannelChunk = 64;

// A softmax's sums are added up in shorter parts: an error of theirs moves all weights of a query at once, and the
// gradients of scores are differences from such a sum. With 289 keys in parts of 128, gradients had twice the error.
constexpr int64_t kSummedKeys = 16;

constexpr float kNever = -__builtin_inff();

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

// Channels [first, first + n) of keys [begin, end): dst[(j - begin) * row + i], padded with zeros to `row`.
void pack_rows(DType dtype, const Block& block, const Strided& t, int64_t begin, int64_t end, int64_t first, int64_t n,
               float* dst, int64_t row);

// Channels [first, first + n) of the block's queries, by query: dst[m * row + i], padded with zeros to `row`.
void pack_queries(DType dtype, const Block& block, const Strided& t, int64_t first, int64_t n, float scale, float* dst,
                  int64_t row);

}  // namespace MURF_LEVEL
}  // namespace murf
