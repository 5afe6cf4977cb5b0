// What a kernel's arguments are in Python: structs and tables of the extension, shapes, names.
#pragma once

#include "arguments.h"
#include "folded.h"
#include "types.h"

namespace murf {

#define MURF_STRUCTS(X)                                                                                          \
  X(Strided) X(Map) X(Bias) X(CrossEntropy) X(Labels) X(Image) X(PatchRows) X(WindowAttention)                   \
  X(WindowGradients) X(FeatureUnify) X(DenseAttention) X(PixelLinear) X(PixelConv) X(AdaptiveConv)               \
  X(Bilateral) X(GaussianBilateral) X(NearestRows) X(NearestBlock) X(NearestState) X(KCenterCodes)

#define MURF_READ(T) \
  template <>        \
  T read<T>(PyObject * value);

// Functions of keywords, see structs.cpp.
MURF_STRUCTS(MURF_READ)
// Classes of arrays, see tables.cpp.
MURF_READ(Axis)
MURF_READ(FoldedAxis)
MURF_READ(WindowAxis)
// A shape (B, C, H, W).
MURF_READ(Grid)
// Strings.
MURF_READ(DType)
MURF_READ(NearestRole)
MURF_READ(NearestMetric)
#undef MURF_READ

void bind_structs(py::module_& m);
void bind_tables(py::module_& m);

// An argument of a kernel for as long as the call: lists own what the kernel is pointed to.
template <class T>
struct Argument {
  explicit Argument(PyObject* given) : value(read<T>(given)) {}
  operator T() const { return value; }
  T value;
};

template <class T>
std::vector<T> read_list(PyObject* value) {
  PyObject** entry = entries(value, -1);
  std::vector<T> list;
  list.reserve(size_t(PySequence_Fast_GET_SIZE(value)));
  for (Py_ssize_t i = 0; i < PySequence_Fast_GET_SIZE(value); ++i) list.push_back(read<T>(entry[i]));
  return list;
}

template <>
struct Argument<Maps> {
  explicit Argument(PyObject* given) : maps(read_list<Map>(given)) {}
  operator Maps() const { return {maps.data(), int64_t(maps.size())}; }
  std::vector<Map> maps;
};

template <>
struct Argument<float* const*> {
  explicit Argument(PyObject* given) : addresses(read_list<float*>(given)) {}
  operator float* const*() const { return addresses.data(); }
  std::vector<float*> addresses;
};

}  // namespace murf
