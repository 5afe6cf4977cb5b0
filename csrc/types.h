// Plain data that crosses the boundary between the bindings and the kernels. No code: this header is read by
// translation units compiled for different instruction sets.
#pragma once

#include <cstdint>

namespace murf {

enum class DType : int { f32 = 0, bf16 = 1, f16 = 2 };

struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

// One axis of a resize: output i reads inputs first[i] .. first[i] + count[i] - 1 with weights[i * taps + t].
struct Axis {
  int64_t in, out, taps;
  const int32_t* first;
  const int32_t* count;
  const float* weights;
};

// A low-resolution map (batch, channels, y.in, x.in) and the two axes that bring it to the output grid; where a resize is
// transposed, a gradient (batch, channels, y.out, x.out). Strides are in elements.
struct Map {
  const void* data;
  int64_t batch, channels, height, width;
  int64_t stride_b, stride_c, stride_y, stride_x;
  Axis y, x;
};

// The full-resolution side. Dense; channels_last means (B, H, W, C) in memory, else (B, C, H, W).
struct Grid {
  int64_t batch, channels, height, width;
};

struct Maps {
  const Map* data;
  int64_t size;
};

// A bias row per image: data[b * stride_b + c]; data may be null.
struct Bias {
  const float* data;
  int64_t stride_b;
};

// Everything about a cross-entropy but the logits.
struct CrossEntropy {
  const int64_t* target;  // (B, H, W) dense
  const float* weight;    // (C,) or null
  int64_t ignore_index;
  float label_smoothing;
};

// What pixels are, and which of it does not count: whole numbers of 1 (without a sign), 2, 4 or 8 bytes.
struct Labels {
  const void* data;  // (B, H, W) dense
  int64_t bytes;
  int64_t ignore_index;
};

inline int64_t label_at(const Labels& labels, int64_t i) {
  if (labels.bytes == 1) return static_cast<const uint8_t*>(labels.data)[i];
  if (labels.bytes == 2) return static_cast<const int16_t*>(labels.data)[i];
  if (labels.bytes == 4) return static_cast<const int32_t*>(labels.data)[i];
  return static_cast<const int64_t*>(labels.data)[i];
}

// A batch of three-channel images at full size; strides in elements. Rows are read in runs: either interleaved
// (stride_x = 3, stride_c = 1) or planar (stride_x = 1).
struct Image {
  const void* data;
  int64_t batch, height, width;
  int64_t stride_b, stride_c, stride_y, stride_x;
};

// Patches as matrix rows of 3 * patch^2 values: pixel * gain + offset, in the order (c, y, x) or (y, x, c).
struct PatchRows {
  int64_t patch, stride_b, stride_row;
  bool channels_first;
  float gain[3], offset[3];
};

// A map (batch, channels, height, width) of any strides, in elements.
struct Strided {
  void* data;
  int64_t stride_b, stride_c, stride_y, stride_x;
};

// One axis of window attention, cut into blocks of queries. Block i has the queries members[member_begin[i] ..] and the
// union of their keys, keys[key_begin[i] ..]. Unless it is exact (every query has every key), masks + mask_begin[i]
// holds the logarithm of how often a query counts a key, by key, then query.
struct WindowAxis {
  int64_t out, in, blocks, max_members, max_keys;
  const int32_t *member_begin, *members, *key_begin, *keys;
  const int64_t* mask_begin;
  const float* masks;
  const uint8_t* exact;
};

// Queries (batch, heads * head_dim, y.out, x.out), keys at (y.in, x.in), values with `channels` channels there: averaged
// over the heads, or split between them. The biases (heads, out, in) of both axes may be null.
struct WindowAttention {
  int64_t batch, heads, head_dim, channels;
  bool mean;
  float scale;
  Strided q, k, v;
  WindowAxis y, x;
  const float *bias_y, *bias_x;
};

// grad_lse (batch, heads, y.out, x.out) may be null, as may every result. Bias gradients come in one part per share of
// the work: (parts, heads, out, in). A part is a run of blocks of rows of one image.
struct WindowGradients {
  Strided grad_out;
  const float* grad_lse;
  Strided q, k, v;
  float *bias_y, *bias_x;
  int64_t shares;  // per image
};

// Features (batch, channels, height, width) against a float32 basis (filters, kernel, kernel); `released`: as AnyUp's
// code computes it, else as its paper does.
struct FeatureUnify {
  int64_t batch, channels, height, width, filters, kernel;
  bool released;
  Strided features;
  const float* basis;
};

// Softmax attention in float32 or bfloat16 within sequences: q, k, v and out (sequences, tokens, heads, head_dim), whose channels lie
// side by side. Scores are times `scale`.
struct DenseAttention {
  int64_t sequences, tokens, heads, head_dim;
  float scale;
  Strided q, k, v, out;
};

// One layer on rows of pixels: x, weight, residual and out in float32 or bfloat16, all else and all sums in float32. x
// (pixels, in_channels) of any strides, normalized by channel and activated (gain, offset; SiLU) or brought to unit
// mean square (unit, eps) or as it is, times weight (in_channels, out_channels), plus bias, plus residual (pixels,
// out_channels), turned by the angles of the pixel's row and column (cosines, then sines, of every channel) with the
// halves of every rotate_group channels as pairs, to out, rows of out_channels that lie out_stride apart. All but x and
// out may be null; out may be x or the residual.
// statistics (chunks, 2, out_channels): of every `chunk` pixels the means, and the sums of squared differences.
struct PixelLinear {
  int64_t pixels, in_channels, out_channels, chunk, width;
  const void* x;
  int64_t x_stride, x_stride_c;
  const float *gain, *offset;
  bool unit;
  float eps;
  const void* weight;
  const float* bias;
  const void* residual;
  const float *rotate_rows, *rotate_columns;
  int64_t rotate_group;
  void* out;
  int64_t out_stride;
  double* statistics;
};

// A 3x3 convolution, x, weight and out in float32 or (pixel_conv_direct) bfloat16, of x, rows of in_channels per pixel
// of a map of height x width, of any strides: normalized by channel (gain, offset) and activated (SiLU), or as it is
// (null); with borders reflected or zero; plus bias (may be null). weight is (24, panels of 64 columns, in_channels,
// columns) in Winograd's domain, its columns filled up to a multiple of 16; of a direct sum a right operand of
// products.h, whose rows are the taps' inputs filled up to 32. Rows row_begin to row_end of the result come to out,
// pixels that lie out_stride apart.
// statistics (may be null; pairs of rows, 2, out_channels): the means, and the sums of squared differences.
struct PixelConv {
  int64_t height, width, in_channels, out_channels, row_begin, row_end;
  const void* x;
  int64_t x_stride, x_stride_c;
  const float *gain, *offset;
  bool activate, reflect;
  const void* weight;
  const float* bias;
  void* out;
  int64_t out_stride;
  double* statistics;
};

// Values (batch, height, width, channels up to a multiple of 16) and a guidance of the result's pixels (batch, guides,
// out_height, out_width), float32. cells (batch, height, width, 5 + guides): a matrix [[0, 1], [2, 3]] that takes the
// distance (x, y) of a pixel to the two numbers whose squares a weight's logarithm loses, the factor of the squared
// difference in guidance, and the guidance. radii (batch, out_height, out_width): windows in cells, null for `radius`.
// counts (3, 3, radius + 1, radius + 1, radius + 1): how often they count a cell, see murf_fast/tables/disk.py.
struct GaussianBilateral {
  int64_t batch, channels, height, width, out_height, out_width, guides, radius;
  const float* values;
  Strided guidance;
  const float* cells;
  const uint8_t* radii;
  const float* counts;
};

// Rows of features: data[row * stride + i], times scale[row] where there is one (unit norm, for cosine distances).
struct NearestRows {
  const void* data;
  DType dtype;
  int64_t rows, dim, stride;
  const double* scale;
};

// Which columns follow a prepared row: none, or those that turn a matrix product into distances.
enum class NearestRole : int { plain = 0, bank = 1, query = 2 };
enum class NearestMetric : int { l2 = 0, l2sq = 1, cosine = 2, ip = 3 };

// A block of the product of prepared queries and `columns` prepared bank rows from `first` on, with the largest error
// and squared norm of those rows. `absolute` is the error of a product's sum relative to the squared norms, `relative`
// that of its rounding. Product i is that of query queries[i], no two of the same one, or of query i where there is no
// such list, and likewise `rows` numbers the rows of the bank.
struct NearestBlock {
  int64_t stride, count, first, columns;
  const int64_t* queries;
  const int64_t* rows;
  const double* query_errors;
  const double* query_squared_norms;
  double error, squared_norm, absolute;
  float relative;
};

// The state of a search, per query: candidates (capacity), upper bounds (k) and exact distances (k), with their counts.
// A distance is what grows as rows are farther: squared where it is exact, and for inner products their negative.
struct NearestState {
  int64_t k, capacity;
  float* lower;
  int64_t* index;
  int32_t* count;
  float* upper;
  int32_t* uppers;
  double* exact;
  int64_t* exact_index;
  int32_t* exacts;
};

// Rows as integers in [-127, 127] times a scale, with their squared norms and the distance of each row to its code.
struct KCenterCodes {
  int8_t* data;
  int64_t stride;
  double* scales;
  double* squared_norms;
  double* errors;
};

}  // namespace murf
