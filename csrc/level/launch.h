// What every kernel begins with: its scratch memory, its threads and its dtype.
#pragma once

#include <new>
#if defined(_OPENMP)
#include <omp.h>
#endif

#include "simd.h"

namespace murf {
namespace MURF_LEVEL {

// Scratch memory, allocated before a parallel region: an exception must not leave one.
class Scratch {
 public:
  explicit Scratch(int64_t floats)
      : data_(static_cast<float*>(::operator new(size_t(max64(floats, 1)) * sizeof(float), std::align_val_t(64)))) {}
  ~Scratch() { ::operator delete(data_, std::align_val_t(64)); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  float* data() { return data_; }

 private:
  float* data_;
};

// Floats of scratch that hold one pointer.
constexpr int64_t kPointerFloats = 2;
static_assert(sizeof(float*) <= kPointerFloats * sizeof(float));

// Scratch offsets are rounded up so that every thread's rows begin on a cache line.
inline int64_t padded(int64_t floats) { return (floats + 15) / 16 * 16; }

// Runs body(thread, begin, end) on contiguous shares of [0, tasks).
template <class Body>
inline void parallel(int threads, int64_t tasks, Body body) {
#if defined(_OPENMP)
  if (threads > 1 && tasks > 1) {
#pragma omp parallel num_threads(int(min64(threads, tasks)))
    {
      const int64_t id = omp_get_thread_num(), n = omp_get_num_threads();
      body(int(id), tasks * id / n, tasks * (id + 1) / n);
    }
    return;
  }
#endif
  body(0, 0, tasks);
}

template <class Body>
inline void with_dtype(DType dtype, Body body) {
  if (dtype == DType::f32) body(float{});
  else if (dtype == DType::bf16) body(bf16{});
  else body(f16{});
}

inline int64_t size_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

}  // namespace MURF_LEVEL
}  // namespace murf
