// nearest_distance: what surrounds the matrix product of a nearest-neighbour search. Rows are rounded to the product's
// dtype with a measured error, blocks of the product are reduced at once to the rows that can still be among the k
// nearest, and those are scored exactly.
#include <type_traits>

#include "kernels.h"
#include "launch.h"
#include "rows.h"

namespace murf {
namespace MURF_LEVEL {
namespace {

constexpr int64_t kScan = 64;  // products tested at once
constexpr double kInfinity = __builtin_inf();
constexpr double kLargestFloat = 0x1.fffffep127;
constexpr float kLeastFloat = 0x1p-126f;  // normal

// One value of the product's dtype; `left` keeps what the dtype could not hold.
template <class Out>
void take(double& left, Out& out) {
  from_float(float(left), out);
  left -= double(to_float(out));
}

template <class Out>
void prepare_rows(NearestRows x, const float* mean, Out* out, int64_t out_stride, NearestRole role,
                  double* squared_norms, double* errors, int threads) {
  const int64_t width = padded(x.dim);
  Scratch scratch(x.dtype == DType::f32 ? 0 : width * threads);
  parallel(threads, x.rows, [&](int thread, int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* row = static_cast<const float*>(x.data);
      if (x.dtype == DType::f32) {
        row += i * x.stride;
      } else {
        load_values(scratch.data() + thread * width, x.dtype, x.data, i * x.stride, 1, x.dim);
        row = scratch.data() + thread * width;
      }
      Out* dst = out + i * out_stride;
      const double scale = x.scale == nullptr ? 1. : x.scale[i];
      double norm[8] = {}, error[8] = {};
      each_in_lanes<8>(x.dim, [&](int64_t j, int lane) {
        const double exact = double(row[j]) * scale - (mean == nullptr ? 0. : double(mean[j]));
        from_float(float(exact), dst[j]);
        const double rounded = double(to_float(dst[j]));
        norm[lane] += rounded * rounded;
        error[lane] += (exact - rounded) * (exact - rounded);
      });
      squared_norms[i] = sum_lanes(norm);
      errors[i] = __builtin_sqrt(sum_lanes(error));
      if (role == NearestRole::plain) continue;
      // q.b - |b|^2 / 2 - |q|^2 / 2 as one product: three columns hold a squared norm to 24 bits, three hold ones.
      Out* columns = dst + x.dim;
      Out* norms = role == NearestRole::bank ? columns : columns + 3;
      Out* ones = role == NearestRole::bank ? columns + 3 : columns;
      double left = -squared_norms[i] / 2;
      for (int64_t part = 0; part < 3; ++part) {
        take(left, norms[part]);
        from_float(1.f, ones[part]);
      }
      for (int64_t pad = x.dim + 6; pad < out_stride; ++pad) from_float(0.f, dst[pad]);
    }
  });
}

// What is known about one query: rows that can still be among the k nearest (`lower` bounds their distance), the k
// smallest upper bounds as a heap with the largest first, and the k nearest of the rows that were scored exactly.
class Search {
 public:
  Search(const NearestState& s, const NearestRows& query, const NearestRows& bank, bool ip, int64_t i, float* row)
      : ip_(ip), k_(s.k), capacity_(s.capacity), lower_(s.lower + i * s.capacity), index_(s.index + i * s.capacity),
        count_(s.count[i]), upper_(s.upper + i * s.k), uppers_(s.uppers[i]), exact_(s.exact + i * s.k),
        exact_index_(s.exact_index + i * s.k), exacts_(s.exacts[i]), query_(query), bank_(bank), i_(i), row_(row),
        scale_(query.scale == nullptr ? 1. : query.scale[i]) {}

  // No row farther than this is among the k nearest.
  float bound() const { return uppers_ < k_ ? float(kInfinity) : upper_[0]; }

  void add(int64_t index, float lower, float upper) {
    if (count_ == capacity_) make_room();
    if (lower > bound()) return;
    lower_[count_] = lower;
    index_[count_++] = index;
    if (upper < bound()) push(upper);
  }

  // Scores every candidate.
  void settle() {
    drop();
    for (int32_t c = 0; c < count_; ++c) score(index_[c]);
    count_ = 0;
    uppers_ = 0;
    // Rounded up: they stay upper bounds.
    for (int32_t e = 0; e < exacts_; ++e) push(above(ip_ ? exact_[e] : __builtin_sqrt(exact_[e])));
  }

 private:
  static float above(double x) {
    const float nearest = float(x);
    return nearest + __builtin_fabsf(nearest) * 0x1p-22f + kLeastFloat;
  }

  void make_room() {
    drop();
    if (count_ > capacity_ / 2) settle();
  }

  void drop() {
    int32_t kept = 0;
    const float largest = bound();
    for (int32_t c = 0; c < count_; ++c) {
      if (lower_[c] > largest) continue;
      lower_[kept] = lower_[c];
      index_[kept++] = index_[c];
    }
    count_ = kept;
  }

  void push(float upper) {
    int64_t hole;
    if (uppers_ < k_) {
      hole = uppers_++;
      for (; hole > 0 && upper_[(hole - 1) / 2] < upper; hole = (hole - 1) / 2) upper_[hole] = upper_[(hole - 1) / 2];
    } else {
      hole = 0;
      for (int64_t child = 1; child < k_; child = 2 * hole + 1) {
        if (child + 1 < k_ && upper_[child + 1] > upper_[child]) ++child;
        if (upper_[child] <= upper) break;
        upper_[hole] = upper_[child];
        hole = child;
      }
    }
    upper_[hole] = upper;
  }

  // Read when the first candidate is scored: most blocks leave none that has to be.
  void load() {
    if (loaded_) return;
    load_values(row_, query_.dtype, query_.data, i_ * query_.stride, 1, query_.dim);
    loaded_ = true;
  }

  void score(int64_t j) {
    load();
    with_dtype(bank_.dtype, [&](auto tag) { score_as<decltype(tag)>(j); });
  }

  template <class T>
  __attribute__((noinline)) void score_as(int64_t j) {
    const T* b = static_cast<const T*>(bank_.data) + j * bank_.stride;
    const double b_scale = bank_.scale == nullptr ? 1. : bank_.scale[j];
    // Scales of rows near the smallest numbers are beyond float32.
    if (!ip_ && exacts_ == k_ && scale_ <= kLargestFloat && b_scale <= kLargestFloat) {
      // Double precision is for those that float32 cannot tell from the k-th. Scaled rows have norm one.
      const double rough = __builtin_sqrt(double(squared_distance(row_, float(scale_), b, float(b_scale), bank_.dim)));
      const double relative = double(bank_.dim / 16 + 8) * 0x1p-23;
      const double slack = bank_.scale == nullptr ? 0. : 8 * 0x1p-23;
      if (rough * (1 - relative) - slack > __builtin_sqrt(exact_[k_ - 1])) return;
    }
    const double d =
        ip_ ? -inner_product(row_, b, bank_.dim) : squared_distance(row_, scale_, b, b_scale, bank_.dim);
    int64_t at = exacts_ < k_ ? exacts_ : k_ - 1;
    if (exacts_ == k_ && !before(d, j, at)) return;
    for (; at > 0 && before(d, j, at - 1); --at) {
      exact_[at] = exact_[at - 1];
      exact_index_[at] = exact_index_[at - 1];
    }
    exact_[at] = d;
    exact_index_[at] = j;
    if (exacts_ < k_) ++exacts_;
  }

  bool before(double d, int64_t j, int64_t at) const {
    return d < exact_[at] || (d == exact_[at] && j < exact_index_[at]);
  }

  const bool ip_;
  const int64_t k_, capacity_;
  float* lower_;
  int64_t* index_;
  int32_t& count_;
  float* upper_;
  int32_t& uppers_;
  double* exact_;
  int64_t* exact_index_;
  int32_t& exacts_;
  const NearestRows& query_;
  const NearestRows& bank_;
  const int64_t i_;
  float* row_;
  bool loaded_ = false;
  const double scale_;
};

// Bounds of a distance from its product p = -d^2 / 2, between rounded rows: the triangle inequality adds the errors of
// both rows, `absolute` is the error of the float32 sum in d^2 and `relative` the rounding of p to its dtype.
struct Bounds {
  float errors, absolute, relative;

  float lower(float p) const {
    const float squared = (-2.f * p) * (1.f - relative) - absolute;
    const float d = (squared > 0.f ? __builtin_sqrtf(squared) : 0.f) * (1.f - 0x1p-21f) - errors;
    return d > 0.f ? d : 0.f;
  }
  float upper(float p) const {
    const float squared = (p < 0.f ? -2.f * p : 0.f) * (1.f + relative) + absolute;
    return (__builtin_sqrtf(squared) + errors) * (1.f + 0x1p-21f);
  }
  // The smallest product whose lower bound may not exceed `bound`.
  float threshold(float bound) const {
    const float d = (bound + errors) * (1.f + 0x1p-20f);
    return -0.5f * (d * d + absolute) * (1.f + 2.f * relative + 0x1p-20f);
  }
};

// Bounds of a negative inner product from the product p of rounded rows: `errors` is what rounding the rows and summing
// in float32 can change, `relative` the rounding of p to its dtype.
struct ProductBounds {
  float errors, relative;

  float lower(float p) const { return -p - __builtin_fabsf(p) * (relative + 0x1p-21f) - errors; }
  float upper(float p) const { return -p + __builtin_fabsf(p) * (relative + 0x1p-21f) + errors; }
  float threshold(float bound) const {
    const float p = -bound - errors;
    return p - __builtin_fabsf(p) * (2.f * relative + 0x1p-19f) - kLeastFloat;
  }
};

Bounds bounds_of(const NearestBlock& block, int64_t i, Bounds*) {
  const double squares = block.query_squared_norms[i] + block.squared_norm;
  return {float((block.query_errors[i] + block.error) * (1 + 0x1p-22)),
          float(squares * block.absolute * (1 + 0x1p-22)), block.relative};
}

ProductBounds bounds_of(const NearestBlock& block, int64_t i, ProductBounds*) {
  const double q = block.query_squared_norms[i], b = block.squared_norm, error = block.query_errors[i];
  const double rounding = __builtin_sqrt(q) * block.error + __builtin_sqrt(b) * error + error * block.error;
  // The sums of distances are twice as large. Terms below the least normal number may be lost whole.
  const double sum = (q + b) * block.absolute / 2 + double(kLeastFloat) * 0x1p16;
  return {float((rounding + sum) * (1 + 0x1p-20)), block.relative};
}

template <class B, class P>
void scan_rows(const P* products, NearestBlock block, NearestRows query, NearestRows bank, NearestState state,
               int threads) {
  const int64_t width = padded(query.dim);
  Scratch scratch(width * threads);
  parallel(threads, block.count, [&](int thread, int64_t begin, int64_t end) {
    for (int64_t n = begin; n < end; ++n) {
      const P* p = products + n * block.stride;
      const int64_t i = block.queries == nullptr ? n : block.queries[n];
      constexpr bool ip = std::is_same_v<B, ProductBounds>;
      Search search(state, query, bank, ip, i, scratch.data() + thread * width);
      const B bounds = bounds_of(block, i, static_cast<B*>(nullptr));
      float threshold = bounds.threshold(search.bound());
      for (int64_t c = 0; c < block.columns; c += kScan) {
        const int64_t some = min64(kScan, block.columns - c);
        int32_t hit = 0;
        if (some == kScan)
          for (int64_t l = 0; l < kScan; ++l) hit |= int32_t(to_float(p[c + l]) >= threshold);
        else
          for (int64_t l = 0; l < some; ++l) hit |= int32_t(to_float(p[c + l]) >= threshold);
        if (hit == 0) continue;
        for (int64_t l = c; l < c + some; ++l) {
          const float v = to_float(p[l]);
          if (!(v >= threshold)) continue;
          search.add(block.rows == nullptr ? block.first + l : block.rows[l], bounds.lower(v), bounds.upper(v));
          threshold = bounds.threshold(search.bound());
        }
      }
    }
  });
}

}  // namespace

void nearest_prepare(NearestRows x, const float* mean, DType out_dtype, void* out, int64_t out_stride,
                     NearestRole role, double* squared_norms, double* errors, int threads) {
  with_dtype(out_dtype, [&](auto tag) {
    prepare_rows(x, mean, static_cast<decltype(tag)*>(out), out_stride, role, squared_norms, errors, threads);
  });
}

void nearest_scan(DType product_dtype, const void* products, NearestBlock block, NearestRows query, NearestRows bank,
                  NearestState state, NearestMetric metric, int threads) {
  const auto scan = [&](auto* p) {
    if (metric == NearestMetric::ip) scan_rows<ProductBounds>(p, block, query, bank, state, threads);
    else scan_rows<Bounds>(p, block, query, bank, state, threads);
  };
  if (product_dtype == DType::f32) scan(static_cast<const float*>(products));
  else scan(static_cast<const bf16*>(products));
}

void nearest_finish(NearestRows query, NearestRows bank, NearestState state, NearestMetric metric, float* distances,
                    int64_t* indices, int threads) {
  const int64_t width = padded(query.dim);
  Scratch scratch(width * threads);
  parallel(threads, query.rows, [&](int thread, int64_t begin, int64_t end) {
    float* row = scratch.data() + thread * width;
    for (int64_t i = begin; i < end; ++i) {
      Search(state, query, bank, metric == NearestMetric::ip, i, row).settle();
      for (int64_t j = i * state.k; j < (i + 1) * state.k; ++j) {
        const double exact = state.exact[j];
        distances[j] = float(metric == NearestMetric::l2       ? __builtin_sqrt(exact)
                             : metric == NearestMetric::cosine ? exact / 2
                             : metric == NearestMetric::ip     ? -exact
                                                               : exact);
        indices[j] = state.exact_index[j];
      }
    }
  });
}

}  // namespace MURF_LEVEL
}  // namespace murf
