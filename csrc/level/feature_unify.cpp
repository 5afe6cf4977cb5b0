// AnyUp's feature-agnostic layer: every channel is correlated with every filter of a basis, one pixel at a time, so that
// the channels x filters maps never exist.
#include "activations.h"
#include "gemm.h"
#include "kernels.h"
#include "launch.h"
#include "rows.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

// What one pixel needs: its patches by channel, all responses in the order of the grouped convolution (channel, then
// filter), the softmax's statistics, and its share of the gradients.
struct PixelScratch {
  int64_t taps_row, filters_row;
  float *patches, *responses, *padded_responses, *largest, *total, *grad_patches, *basis, *basis_rows;
  double* sums;

  static int64_t floats(const FeatureUnify& f) { return PixelScratch(f, nullptr).used_; }

  PixelScratch(const FeatureUnify& f, float* at) {
    taps_row = lanes_up(f.kernel * f.kernel), filters_row = lanes_up(f.filters);
    used_ = 0;
    auto take = [&](int64_t n) {
      float* from = at == nullptr ? nullptr : at + used_;
      used_ += padded(n);
      return from;
    };
    const int64_t longest = max64(f.channels, f.filters);
    patches = take(f.channels * taps_row), responses = take(f.channels * f.filters);
    padded_responses = f.filters == filters_row ? responses : take(f.channels * filters_row);
    largest = take(longest), total = take(longest);
    sums = reinterpret_cast<double*>(take(2 * longest)), grad_patches = take(f.channels * taps_row);
    basis = take(taps_row * filters_row), basis_rows = take(f.filters * taps_row);
  }

  // The basis by tap, then filter, and by filter, then tap; both padded with zeros.
  void load_basis(const FeatureUnify& f) {
    const int64_t taps = f.kernel * f.kernel;
    fill_row(basis, 0.f, taps_row * filters_row);
    fill_row(basis_rows, 0.f, f.filters * taps_row);
    for (int64_t m = 0; m < f.filters; ++m)
      for (int64_t t = 0; t < taps; ++t)
        basis[t * filters_row + m] = basis_rows[m * taps_row + t] = f.basis[m * taps + t];
  }

 private:
  int64_t used_;
};

// Visits the taps of pixel (y, x) that lie in the image; visit(tap, row, column). Returns how many do.
template <class Visit>
int64_t each_tap(const FeatureUnify& f, int64_t y, int64_t x, Visit visit) {
  const int64_t radius = f.kernel / 2;
  int64_t inside = 0;
  for (int64_t t = 0; t < f.kernel * f.kernel; ++t) {
    const int64_t row = y + t / f.kernel - radius, column = x + t % f.kernel - radius;
    if (row < 0 || row >= f.height || column < 0 || column >= f.width) continue;
    visit(t, row, column);
    ++inside;
  }
  return inside;
}

// responses[c * filters + m], divided by the number of taps inside the image
void respond(DType dtype, const FeatureUnify& f, int64_t b, int64_t y, int64_t x, PixelScratch& w) {
  fill_row(w.patches, 0.f, f.channels * w.taps_row);
  int64_t inside = 0;
  with_dtype(dtype, [&](auto tag) {
    const auto* data = static_cast<const decltype(tag)*>(f.features.data) + b * f.features.stride_b;
    inside = each_tap(f, y, x, [&](int64_t t, int64_t row, int64_t column) {
      const auto* from = data + row * f.features.stride_y + column * f.features.stride_x;
      for (int64_t c = 0; c < f.channels; ++c) w.patches[c * w.taps_row + t] = to_float(from[c * f.features.stride_c]);
    });
  });
  const float share = 1.f / float(inside);
  for (int64_t i = 0; i < f.channels * w.taps_row; ++i) w.patches[i] *= share;
  gemm(f.channels, f.kernel * f.kernel, w.filters_row, w.patches, w.taps_row, 1, w.basis, w.filters_row,
       w.padded_responses, w.filters_row, false);
  if (w.padded_responses != w.responses)
    for (int64_t c = 0; c < f.channels; ++c)
      load_row(w.responses + c * f.filters, w.padded_responses + c * w.filters_row, f.filters);
}

// Responses become softmax weights over `rows` rows of `columns`; rows are the outputs.
void softmax_over_rows(float* v, int64_t rows, int64_t columns, float* largest, double* total) {
  load_row(largest, v, columns);
  for (int64_t i = 1; i < rows; ++i) {
    const float* __restrict r = v + i * columns;
    for (int64_t j = 0; j < columns; ++j) largest[j] = r[j] > largest[j] ? r[j] : largest[j];
  }
  for (int64_t j = 0; j < columns; ++j) total[j] = 0.;
  for (int64_t i = 0; i < rows; ++i) {
    float* __restrict r = v + i * columns;
    double* __restrict sum = total;
    for (int64_t j = 0; j < columns; ++j) {
      r[j] = exp_row_element(r[j] - largest[j]);
      sum[j] += double(r[j]);
    }
  }
  for (int64_t j = 0; j < columns; ++j) largest[j] = float(1. / total[j]);
  for (int64_t i = 0; i < rows; ++i) {
    float* __restrict r = v + i * columns;
    for (int64_t j = 0; j < columns; ++j) r[j] *= largest[j];
  }
}

void softmax_in_rows(float* v, int64_t rows, int64_t columns) {
  for (int64_t i = 0; i < rows; ++i) {
    float* r = v + i * columns;
    const float inverse = 1.f / exp_row(r, max_of(r, columns), columns);
    for (int64_t j = 0; j < columns; ++j) r[j] *= inverse;
  }
}

// The responses' softmax. As released, the flat run of channels x filters values is read as filters rows of channels
// ones, and the softmax goes over those rows; in the paper it goes over the filters of a channel.
void weigh(DType dtype, const FeatureUnify& f, int64_t b, int64_t y, int64_t x, PixelScratch& w) {
  respond(dtype, f, b, y, x, w);
  if (f.released) softmax_over_rows(w.responses, f.filters, f.channels, w.largest, w.sums);
  else softmax_in_rows(w.responses, f.channels, f.filters);
}

void unify(DType dtype, const FeatureUnify& f, const Strided& out, int threads) {
  const int64_t share = PixelScratch::floats(f);
  Scratch scratch(share * threads);
  parallel(threads, f.batch * f.height * f.width, [&](int thread, int64_t begin, int64_t end) {
    PixelScratch w(f, scratch.data() + thread * share);
    w.load_basis(f);
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / f.width / f.height, y = task / f.width % f.height, x = task % f.width;
      weigh(dtype, f, b, y, x, w);
      // Means of many nearly equal weights: what tells them apart is in the digits that a float32 sum drops, and AnyUp's
      // next step, a group norm, blows just those up.
      double* __restrict sum = w.sums;
      for (int64_t m = 0; m < f.filters; ++m) sum[m] = 0.;
      if (f.released) {
        for (int64_t m = 0; m < f.filters; ++m) sum[m] = exact_sum_of(w.responses + m * f.channels, f.channels);
      } else {
        for (int64_t c = 0; c < f.channels; ++c)
          for (int64_t m = 0; m < f.filters; ++m) sum[m] += double(w.responses[c * f.filters + m]);
      }
      with_dtype(dtype, [&](auto tag) {
        auto* to = static_cast<decltype(tag)*>(out.data) + b * out.stride_b + y * out.stride_y + x * out.stride_x;
        for (int64_t m = 0; m < f.filters; ++m) from_float(float(sum[m] / double(f.channels)), to[m * out.stride_c]);
      });
    }
  });
}

// Rows of an image are cut into `shares` runs; each sums its gradients of features apart, with the rows around it, and
// the runs are added in their order. Gradients of the basis: one part per run.
void unify_backward(DType dtype, const FeatureUnify& f, const Strided& grad_out, const Strided& grad_features,
                    float* grad_basis, int64_t shares, int threads) {
  const int64_t taps = f.kernel * f.kernel, radius = f.kernel / 2, line = f.width * f.channels;
  const int64_t longest = (f.height + shares - 1) / shares + 2 * radius;
  const bool wanted = grad_features.data != nullptr;
  Scratch sums(wanted ? f.batch * shares * longest * line : 0);
  const int64_t basis_floats = padded(taps * lanes_up(f.filters)), rows_floats = padded(f.filters);
  const int64_t share = PixelScratch::floats(f) + basis_floats + rows_floats;
  Scratch scratch(share * threads);
  auto first_row = [&](int64_t s) { return f.height * s / shares; };
  parallel(threads, f.batch * shares, [&](int thread, int64_t begin, int64_t end) {
    float* at = scratch.data() + thread * share;
    PixelScratch w(f, at);
    w.load_basis(f);
    float* basis_sums = at + PixelScratch::floats(f);
    float* grad = basis_sums + basis_floats;
    for (int64_t part = begin; part < end; ++part) {
      const int64_t b = part / shares, s = part % shares, top = first_row(s) - radius;
      float* own = sums.data() + part * longest * line;
      if (wanted) fill_row(own, 0.f, longest * line);
      fill_row(basis_sums, 0.f, basis_floats);
      for (int64_t y = first_row(s); y < first_row(s + 1); ++y)
        for (int64_t x = 0; x < f.width; ++x) {
          weigh(dtype, f, b, y, x, w);
          load_values(grad, dtype, grad_out.data,
                      b * grad_out.stride_b + y * grad_out.stride_y + x * grad_out.stride_x, grad_out.stride_c,
                      f.filters);
          for (int64_t m = 0; m < f.filters; ++m) grad[m] /= float(f.channels);
          // p (g - sum p g), the sum over the softmax
          if (f.released) {
            fill_row(w.total, 0.f, f.channels);
            for (int64_t m = 0; m < f.filters; ++m)
              add_scaled_row(w.total, w.responses + m * f.channels, grad[m], f.channels);
            for (int64_t m = 0; m < f.filters; ++m)
              for (int64_t c = 0; c < f.channels; ++c) w.responses[m * f.channels + c] *= grad[m] - w.total[c];
          } else {
            for (int64_t c = 0; c < f.channels; ++c) {
              float* p = w.responses + c * f.filters;
              const float mean = dot_of(p, grad, f.filters);
              for (int64_t m = 0; m < f.filters; ++m) p[m] *= grad[m] - mean;
            }
          }
          if (w.padded_responses != w.responses)
            for (int64_t c = 0; c < f.channels; ++c) {
              load_row(w.padded_responses + c * w.filters_row, w.responses + c * f.filters, f.filters);
              fill_row(w.padded_responses + c * w.filters_row + f.filters, 0.f, w.filters_row - f.filters);
            }
          // Patches carry the division by the taps inside the image.
          if (grad_basis != nullptr)
            gemm(taps, f.channels, w.filters_row, w.patches, 1, w.taps_row, w.padded_responses, w.filters_row,
                 basis_sums, w.filters_row, true);
          if (!wanted) continue;
          gemm(f.channels, f.filters, w.taps_row, w.padded_responses, w.filters_row, 1, w.basis_rows, w.taps_row,
               w.grad_patches, w.taps_row, false);
          const float inverse = 1.f / float(each_tap(f, y, x, [](int64_t, int64_t, int64_t) {}));
          each_tap(f, y, x, [&](int64_t t, int64_t row, int64_t column) {
            float* to = own + (row - top) * line + column * f.channels;
            for (int64_t c = 0; c < f.channels; ++c) to[c] += inverse * w.grad_patches[c * w.taps_row + t];
          });
        }
      if (grad_basis != nullptr)
        for (int64_t m = 0; m < f.filters; ++m)
          for (int64_t t = 0; t < taps; ++t)
            grad_basis[(part * f.filters + m) * taps + t] = basis_sums[t * w.filters_row + m];
    }
  });
  if (!wanted) return;
  const int64_t row_floats = padded(f.channels);
  Scratch rows(row_floats * threads);
  parallel(threads, f.batch * f.height, [&](int thread, int64_t begin, int64_t end) {
    float* row = rows.data() + thread * row_floats;
    for (int64_t task = begin; task < end; ++task) {
      const int64_t b = task / f.height, y = task % f.height;
      for (int64_t x = 0; x < f.width; ++x) {
        fill_row(row, 0.f, f.channels);
        for (int64_t s = 0; s < shares; ++s) {
          const int64_t top = first_row(s) - radius;
          if (y < top || y >= first_row(s + 1) + radius) continue;
          add_scaled_row(row, sums.data() + ((b * shares + s) * longest + y - top) * line + x * f.channels, 1.f,
                         f.channels);
        }
        store_values(dtype, grad_features.data,
                     b * grad_features.stride_b + y * grad_features.stride_y + x * grad_features.stride_x,
                     grad_features.stride_c, row, f.channels);
      }
    }
  });
}

}  // namespace

void feature_unify(DType dtype, FeatureUnify f, Strided out, int threads) {
  unify(dtype, f, out, threads);
}

void feature_unify_backward(DType dtype, FeatureUnify f, Strided grad_out, Strided grad_features, float* grad_basis,
                            int64_t shares, int threads) {
  unify_backward(dtype, f, grad_out, grad_features, grad_basis, shares, threads);
}

}  // namespace MURF_LEVEL
}  // namespace murf
