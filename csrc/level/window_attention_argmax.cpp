// window_attention_argmax: the class of the largest attended logit of every query; see window_weights.h. Logits lie by
// class, then query, a block at a time, and the comparison is one of vectors of queries.
#include "gemm.h"
#include "kernels.h"
#include "window_weights.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

class Logits {
 public:
  Logits(DType dtype, const WindowAttention& a, Arena& arena)
      : dtype_(dtype), a_(a), classes_(a.mean ? a.channels : a.channels / a.heads) {
    logits_ = arena.floats(classes_ * lanes_up(a.y.max_members * a.x.max_members));
    values_ = arena.floats(kKeyChunk * kChannelChunk);
  }

  // Adds weights times the values of keys [begin, end) and of a head, if heads have their own.
  void take(const Block& block, int64_t head, int64_t begin, int64_t end, const float* weights) {
    for (int64_t at = begin; at < end; at += kKeyChunk) {
      const int64_t stop = min64(at + kKeyChunk, end);
      for (int64_t c = 0; c < classes_; c += kChannelChunk) {
        const int64_t now = min64(kChannelChunk, classes_ - c);
        pack_rows(dtype_, block, a_.v, at, stop, head * classes_ + c, now, values_, kChannelChunk);
        gemm(now, stop - at, block.width, values_, 1, kChannelChunk, weights + (at - begin) * block.width, block.width,
             logits_ + c * block.width, block.width, head > 0 || at > 0);
      }
    }
  }

  // As torch: the lowest class among equals, and the first NaN beats everything.
  template <class Label>
  void label(const Block& block, const Bias& bias, Label* labels) const {
    const float* row = bias.data == nullptr ? nullptr : bias.data + block.b * bias.stride_b;
    for (int64_t first = 0; first < block.width; first += kLanes) {
      Vec best = logit(block, row, 0, first);
      UintVec index = {};
      for (int64_t c = 1; c < classes_; ++c) {
        const Vec v = logit(block, row, c, first);
        const auto wins = (v > best) | ((v != v) & (best == best));
        best = wins ? v : best;
        index = wins ? UintVec{} + uint32_t(c) : index;
      }
      uint32_t found[kLanes];
      std::memcpy(found, &index, sizeof found);
      for (int64_t m = first; m < min64(first + kLanes, block.queries); ++m)
        labels[(block.b * a_.y.out + block.y_of(m)) * a_.x.out + block.x_of(m)] = Label(found[m - first]);
    }
  }

 private:
  Vec logit(const Block& block, const float* bias, int64_t c, int64_t first) const {
    const Vec v = load_vec(logits_ + c * block.width + first);
    return bias == nullptr ? v : v + bias[c];
  }

  const DType dtype_;
  const WindowAttention& a_;
  const int64_t classes_;
  float *logits_, *values_;
};

}  // namespace

void window_attention_argmax(DType dtype, WindowAttention attention, Bias bias, int label_bytes, void* labels,
                             int threads) {
  auto floats = [&] {
    Arena arena(nullptr);
    BlockWeights weights(dtype, attention, true, arena);
    Logits logits(dtype, attention, arena);
    return arena.used();
  };
  const int64_t share = floats();
  Scratch scratch(share * threads);
  parallel(threads, attention.batch * attention.y.blocks * attention.x.blocks, [&](int thread, int64_t begin, int64_t end) {
    Arena arena(scratch.data() + thread * share);
    BlockWeights weights(dtype, attention, true, arena);
    Logits logits(dtype, attention, arena);
    for (int64_t task = begin; task < end; ++task) {
      const Block block = block_of(attention, task);
      weights.each(block, nullptr, [&](int64_t head, int64_t from, int64_t to, const float* given) {
        logits.take(block, head, from, to, given);
      });
      if (label_bytes == 1) logits.label(block, bias, static_cast<uint8_t*>(labels));
      else if (label_bytes == 2) logits.label(block, bias, static_cast<int16_t*>(labels));
      else logits.label(block, bias, static_cast<int32_t*>(labels));
    }
  });
}

}  // namespace MURF_LEVEL
}  // namespace murf
