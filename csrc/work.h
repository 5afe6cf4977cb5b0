// How many threads a call deserves. Opening a parallel region costs microseconds, and milliseconds where other processes
// hold the cores, so a thread joins only for work that takes longer. All estimates count values that are moved or
// multiplied and added; a kernel passes about 1 to 10 of them per nanosecond.
#pragma once

#include "folded.h"
#include "types.h"

namespace murf::work {

// Work per thread from which another one is worth its waking: tens of microseconds.
constexpr double kGrain = 1 << 16;
// Weight of an exponential or a GELU beside a multiply-add.
constexpr double kTranscendental = 8;

inline int threads_for(int threads, double work) {
  const double useful = work / kGrain;
  return useful >= double(threads) ? threads : useful < 2 ? 1 : int(useful);
}

inline double pixels(const Grid& grid) { return double(grid.batch) * double(grid.height) * double(grid.width); }

// Rows of every map combined to the output's height, then cells to its width.
inline double resample(const Maps& maps, const Grid& grid) {
  double per_row = 0;
  for (int64_t m = 0; m < maps.size; ++m) {
    const Map& map = maps.data[m];
    per_row += double(map.channels) * (double(map.x.in * map.y.taps) + double(grid.width * map.x.taps));
  }
  return double(grid.batch) * double(grid.height) * per_row;
}

// Resampled logits, and their softmax.
inline double softmax(const Maps& maps, const Grid& grid) {
  return resample(maps, grid) + kTranscendental * pixels(grid) * double(grid.channels);
}

inline double adjoint(const Map& map, int64_t batch) {
  const Maps one{&map, 1};
  return resample(one, {batch, map.channels, map.y.out, map.x.out});
}

// The kernel of every pixel folded into its window, and the window applied to the channels.
inline double adaptive_conv(const AdaptiveConv& conv) {
  const double taps = double(conv.y.taps * conv.x.taps), window = double(conv.y.window * conv.x.window);
  return double(conv.batch) * double((conv.row_end - conv.row_begin) * conv.x.out) *
         (taps + window * double(conv.channels));
}

inline double bilateral(const Bilateral& net) {
  const double taps = double((2 * net.radius + 1) * (2 * net.radius + 1)), key = double(net.key);
  double per_pixel = key * (double(net.guides) + key + taps) + kTranscendental * (key + taps);
  if (net.fixup) per_pixel += taps * (2 * taps + double(net.guides) + kTranscendental);
  return double(net.batch) * double((net.row_end - net.row_begin) * net.width) * per_pixel;
}

// The weight of every cell of a pixel's window, and the window applied to the channels.
inline double gaussian_bilateral(const GaussianBilateral& u) {
  const int64_t diameter = 2 * u.radius + 1;
  const double window = double(u.height < diameter ? u.height : diameter) * double(u.width < diameter ? u.width : diameter);
  return double(u.batch) * double(u.out_height * u.out_width) * window *
         (double(u.channels + u.guides) + 2 * kTranscendental);
}

inline double image_to_patches(const Image& image, const Axis& y, const Axis& x) {
  return 3 * double(image.batch) * double(y.out) * (double(image.width * y.taps) + double(x.out * x.taps));
}

// Scores of every block of queries, their softmax, and the weighted values.
inline double window_attention(const WindowAttention& a) {
  const double pairs = double(a.y.blocks * a.y.max_members) * double(a.y.max_keys) *
                       double(a.x.blocks * a.x.max_members) * double(a.x.max_keys);
  return double(a.batch) * pairs * (double(a.heads) * (double(a.head_dim) + kTranscendental) + double(a.channels));
}

inline double feature_unify(const FeatureUnify& f) {
  const double responses = double(f.batch * f.height * f.width) * double(f.channels) * double(f.filters);
  return responses * (double(f.kernel * f.kernel) + kTranscendental);
}

inline double dense_attention(const DenseAttention& a) {
  const double pairs = double(a.sequences * a.heads) * double(a.tokens) * double(a.tokens);
  return pairs * (2 * double(a.head_dim) + kTranscendental);
}

inline double pixel_linear(const PixelLinear& p) {
  const double product = p.weight == nullptr ? 1 : double(p.in_channels);
  return double(p.pixels) * (double(p.out_channels) * product + kTranscendental * double(p.in_channels));
}

inline double pixel_conv(const PixelConv& p) {
  const double pixels = double((p.row_end - p.row_begin) * p.width);
  return 3 * pixels * double(p.in_channels) * (double(p.out_channels) + kTranscendental);
}

inline double rows(const NearestRows& x) { return double(x.rows) * double(x.dim); }

// Products are read once; few of them lead to a row that is scored.
inline double nearest_scan(const NearestRows& query, const NearestBlock& block) {
  return double(block.count) * double(block.columns + query.dim);
}

inline double nearest_finish(const NearestRows& query, const NearestState& state) { return rows(query) * double(state.k); }

inline double fill(int64_t bytes) { return double(bytes / int64_t(sizeof(float))); }

}  // namespace murf::work
