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

// A low-resolution map (batch, channels, y.in, x.in) and the two axes that bring it to the output grid.
// Strides are in elements.
struct Map {
  const void* data;
  int64_t channels;
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

// Rows of features: data[row * stride + i], times scale[row] where there is one (unit norm, for cosine distances).
struct NearestRows {
  const void* data;
  DType dtype;
  int64_t rows, dim, stride;
  const double* scale;
};

// Which columns follow a prepared row: none, or those that turn a matrix product into distances.
enum class NearestRole : int { plain = 0, bank = 1, query = 2 };
enum class NearestMetric : int { l2 = 0, l2sq = 1, cosine = 2 };

// A block of the product of prepared queries and `columns` prepared bank rows from `first` on, with the largest error
// and squared norm of those rows. `absolute` is the error of a product's sum relative to the squared norms, `relative`
// that of its rounding.
struct NearestBlock {
  int64_t stride, first, columns;
  const double* query_errors;
  const double* query_squared_norms;
  double error, squared_norm, absolute;
  float relative;
};

// The state of a search, per query: candidates (capacity), upper bounds (k) and exact distances (k), with their counts.
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
