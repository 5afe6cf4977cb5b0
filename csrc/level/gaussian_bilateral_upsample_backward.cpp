// Gradients of gaussian_bilateral_upsample. Bands of rows of cells sum what their pixels give to the cells around them,
// and the bands' sums are added up in their order: as many bands, and so the same sums, for any number of threads.
#include "gaussian_bilateral.h"
#include "gemm.h"
#include "kernels.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

constexpr int64_t kPart = 64;  // channels whose products are summed before they meet the others

struct Gradients {
  float* values;    // (batch, height, width, pitch) or null
  float* guidance;  // (batch, guides, out_height, out_width) or null
  float* sums;      // (batch, height, width, 4 + guides) or null
};

// Rows of cells that band k of `bands` writes to.
struct Band {
  int64_t begin, end, first, last;
  Band(const GaussianBilateral& u, int64_t k, int64_t bands)
      : begin(u.height * k / bands),
        end(u.height * (k + 1) / bands),
        first(max64(0, begin - u.radius)),
        last(min64(u.height, end + u.radius)) {}
  static int64_t most_rows(const GaussianBilateral& u, int64_t bands) {
    return min64(u.height, (u.height + bands - 1) / bands + 2 * u.radius);
  }
};

// A thread's tiles: the incoming gradient by channel and by pixel, gradients of weights, and rows of one float per pixel.
struct Tiles {
  float *by_channel, *by_pixel, *of_weights, *part, *mean, *of_guidance;

  static int64_t floats(const GaussianBilateral& u) {
    return (2 * padded(u.channels) + Patches::cells_of(u) + kBlock + 1 + u.guides) * kPixels;
  }
  Tiles(const GaussianBilateral& u, float* scratch)
      : by_channel(scratch),
        by_pixel(by_channel + padded(u.channels) * kPixels),
        of_weights(by_pixel + padded(u.channels) * kPixels),
        part(of_weights + Patches::cells_of(u) * kPixels),
        mean(part + kBlock * kPixels),
        of_guidance(mean + kPixels) {}
};

void load_gradient(DType dtype, const GaussianBilateral& u, const Strided& grad, int64_t b, const Patch& patch, Tiles& t) {
  const int64_t pitch = padded(u.channels);
  for (int64_t i = 0; i < patch.count; ++i) {
    const int64_t from = b * grad.stride_b + patch.row[i] * grad.stride_y + patch.column[i] * grad.stride_x;
    float* pixel = t.by_pixel + i * pitch;
    load_values(pixel, dtype, grad.data, from, grad.stride_c, u.channels);
    fill_row(pixel + u.channels, 0.f, pitch - u.channels);
  }
  for (int64_t c = 0; c < u.channels; ++c) {
    float* row = t.by_channel + c * kPixels;
    for (int64_t i = 0; i < patch.count; ++i) row[i] = t.by_pixel[i * pitch + c];
    fill_row(row + patch.count, 0.f, patch.width - patch.count);
  }
}

// of_weights[k][i] = sum_c values[k][c] gradient[c][i], and their mean under the weights
void to_weights(const GaussianBilateral& u, const Window& window, const Patch& patch, const float* values, Tiles& t) {
  const int64_t pitch = padded(u.channels);
  for (int64_t k = 0; k < window.count; k += kBlock) {
    const int64_t now = min64(kBlock, window.count - k);
    for (int64_t c = 0; c < u.channels; c += kPart) {
      const float* rows = t.by_channel + c * kPixels;
      const Operand operand{&rows, 1, min64(kPart, u.channels - c), kPixels};
      const float* w[kBlock];
      float* to[kBlock];
      for (int64_t p = 0; p < now; ++p) {
        w[p] = values + window.cell[k + p] * pitch + c;
        to[p] = c == 0 ? t.of_weights + (k + p) * kPixels : t.part + p * kPixels;
      }
      product(operand, patch.width, now, w, 0, to, false);
      for (int64_t p = 0; c > 0 && p < now; ++p)
        add_scaled_row(t.of_weights + (k + p) * kPixels, to[p], 1.f, patch.width);
    }
  }
  fill_row(t.mean, 0.f, patch.width);
  for (int64_t k = 0; k < window.count; ++k)
    for (int64_t i = 0; i < patch.width; ++i)
      t.mean[i] += patch.weights[k * kPixels + i] * t.of_weights[k * kPixels + i];
}

// From gradients of a cell's weights to those of its logarithms' terms, added to `sums` and the guidance's rows.
void to_terms(const GaussianBilateral& u, const Window& window, int64_t k, const Patch& patch, const float* cell,
              Tiles& t, float* sums, bool to_guidance) {
  Vec xx{}, yy{}, xy{}, tones{};
  const float* weights = patch.weights + k * kPixels;
  float* of_logs = t.of_weights + k * kPixels;
  for (int64_t i = 0; i < patch.width; i += kLanes) {
    const Vec of_log = load_vec(weights + i) * (load_vec(of_logs + i) - load_vec(t.mean + i));
    const Vec dx = load_vec(patch.x + i) - window.x[k], dy = load_vec(patch.y + i) - window.y[k];
    const Vec along = cell[0] * dx + cell[1] * dy, across = cell[2] * dx + cell[3] * dy;
    Vec squares{};
    for (int64_t g = 0; g < u.guides; ++g) {
      const Vec difference = load_vec(patch.guidance + g * kPixels + i) - cell[5 + g];
      squares += difference * difference;
    }
    store_vec(of_logs + i, of_log);
    xx += of_log * along * along, yy += of_log * across * across, xy += of_log * along * across;
    tones += of_log * squares;
  }
  if (sums != nullptr) sums[0] += sum_vec(xx), sums[1] += sum_vec(yy), sums[2] += sum_vec(xy), sums[3] += sum_vec(tones);
  for (int64_t g = 0; g < u.guides; ++g) {
    const float* guidance = patch.guidance + g * kPixels;
    float* to = t.of_guidance + g * kPixels;
    const float scale = to_guidance ? -2.f * cell[4] : 0.f;
    Vec sum{};
    for (int64_t i = 0; i < patch.width; i += kLanes) {
      const Vec difference = load_vec(of_logs + i) * (load_vec(guidance + i) - cell[5 + g]);
      sum += difference;
      if (to_guidance) store_vec(to + i, load_vec(to + i) + scale * difference);
    }
    if (sums != nullptr) sums[4 + g] += sum_vec(sum);
  }
}

// values[q - origin][c] += sum_i weights[q][i] gradient[i][c]
void to_values(const Window& window, const Patch& patch, const Tiles& t, int64_t origin, float* values, int64_t pitch) {
  for (int64_t row = 0; row < window.rows; ++row) {
    const int64_t begin = window.begin[row], cells = window.begin[row + 1] - begin;
    if (cells > 0)
      gemm(cells, patch.count, pitch, patch.weights + begin * kPixels, kPixels, 1, t.by_pixel, pitch,
           values + (window.cell[begin] - origin) * pitch, pitch, true);
  }
}

void backward(DType dtype, const GaussianBilateral& u, const Strided& grad, int64_t bands, const Gradients& to, int threads) {
  const int64_t pitch = padded(u.channels), cells = u.height * u.width, terms = 4 + u.guides;
  const int64_t own = padded(Patches::floats(u)), share = own + padded(Tiles::floats(u));
  const int64_t rows = Band::most_rows(u, bands) * u.width;
  const int64_t value_floats = to.values == nullptr ? 0 : rows * pitch, sum_floats = to.sums == nullptr ? 0 : rows * terms;
  const int64_t part = padded(value_floats) + padded(sum_floats);
  Scratch scratch(share * threads), parts(part * bands);
  for (int64_t b = 0; b < u.batch; ++b) {
    const float* image = u.values + b * cells * pitch;
    parallel(threads, bands, [&](int thread, int64_t begin, int64_t end) {
      Patches patches(u, scratch.data() + thread * share);
      Tiles tiles(u, scratch.data() + thread * share + own);
      for (int64_t k = begin; k < end; ++k) {
        const Band band(u, k, bands);
        float* values = parts.data() + k * part;
        float* sums = values + padded(value_floats);
        fill_row(values, 0.f, part);
        const int64_t origin = band.first * u.width;
        const auto apply = [&](const Window& window, const Patch& patch) {
          load_gradient(dtype, u, grad, b, patch, tiles);
          if (to.values != nullptr) to_values(window, patch, tiles, origin, values, pitch);
          if (to.sums == nullptr && to.guidance == nullptr) return;
          to_weights(u, window, patch, image, tiles);
          fill_row(tiles.of_guidance, 0.f, u.guides * kPixels);
          for (int64_t n = 0; n < window.count; ++n)
            to_terms(u, window, n, patch, patches.cell(b, window.cell[n]), tiles,
                     to.sums == nullptr ? nullptr : sums + (window.cell[n] - origin) * terms, to.guidance != nullptr);
          if (to.guidance == nullptr) return;
          for (int64_t g = 0; g < u.guides; ++g) {
            float* plane = to.guidance + (b * u.guides + g) * u.out_height * u.out_width;
            for (int64_t i = 0; i < patch.count; ++i)
              plane[patch.row[i] * u.out_width + patch.column[i]] = tiles.of_guidance[g * kPixels + i];
          }
        };
        for (int64_t i = band.begin; i < band.end; ++i)
          for (int64_t j = 0; j < u.width; ++j) patches.each(b, i, j, [](const Window&) {}, apply);
      }
    });
    parallel(threads, u.height, [&](int, int64_t begin, int64_t end) {
      for (int64_t y = begin; y < end; ++y) {
        float* values = to.values == nullptr ? nullptr : to.values + (b * cells + y * u.width) * pitch;
        float* sums = to.sums == nullptr ? nullptr : to.sums + (b * cells + y * u.width) * terms;
        if (values != nullptr) fill_row(values, 0.f, u.width * pitch);
        if (sums != nullptr) fill_row(sums, 0.f, u.width * terms);
        for (int64_t k = 0; k < bands; ++k) {
          const Band band(u, k, bands);
          if (y < band.first || y >= band.last) continue;
          const float* from = parts.data() + k * part;
          const int64_t row = (y - band.first) * u.width;
          if (values != nullptr) add_scaled_row(values, from + row * pitch, 1.f, u.width * pitch);
          if (sums != nullptr) add_scaled_row(sums, from + padded(value_floats) + row * terms, 1.f, u.width * terms);
        }
      }
    });
  }
}

}  // namespace

void gaussian_bilateral_upsample_backward(DType dtype, GaussianBilateral upsampling, Strided grad, int64_t shares,
                                          float* grad_values, float* grad_guidance, float* sums, int threads) {
  const Gradients to{grad_values, grad_guidance, sums};
  backward(dtype, upsampling, grad, shares, to, threads);
}

}  // namespace MURF_LEVEL
}  // namespace murf
