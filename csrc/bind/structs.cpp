// The structs of csrc/types.h and csrc/folded.h as Python names their fields. Strides are those of a tensor, in the order
// of its dimensions; addresses may be 0 where types.h says so.
#include "structs.h"

#include <utility>

namespace murf {

namespace {

template <class T>
struct Fields;

#define DESCRIBE(T, ...)                         \
  template <>                                    \
  struct Fields<T> {                             \
    using Struct = T;                            \
    static constexpr std::tuple list{__VA_ARGS__}; \
  };
#define FIELD(name) field(#name, &Struct::name)
#define STRIDES field("strides", &Struct::stride_b, &Struct::stride_c, &Struct::stride_y, &Struct::stride_x)
#define SHAPE field("shape", &Struct::batch, &Struct::channels, &Struct::height, &Struct::width)
#define ROWS field("rows", &Struct::row_begin, &Struct::row_end)

DESCRIBE(Strided, FIELD(data), STRIDES)
DESCRIBE(Map, FIELD(data), SHAPE, STRIDES, FIELD(y), FIELD(x))
DESCRIBE(Bias, FIELD(data), FIELD(stride_b))
DESCRIBE(CrossEntropy, FIELD(target), FIELD(weight), FIELD(ignore_index), FIELD(label_smoothing))
DESCRIBE(Labels, FIELD(data), FIELD(bytes), FIELD(ignore_index))
DESCRIBE(Image, FIELD(data), FIELD(batch), FIELD(height), FIELD(width), STRIDES)
DESCRIBE(PatchRows, FIELD(patch), FIELD(stride_b), FIELD(stride_row), FIELD(channels_first), FIELD(gain),
         FIELD(offset))
DESCRIBE(WindowAttention, FIELD(batch), FIELD(heads), FIELD(head_dim), FIELD(channels), FIELD(mean), FIELD(scale),
         FIELD(q), FIELD(k), FIELD(v), FIELD(y), FIELD(x), FIELD(bias_y), FIELD(bias_x))
DESCRIBE(WindowGradients, FIELD(grad_out), FIELD(grad_lse), FIELD(q), FIELD(k), FIELD(v), FIELD(bias_y),
         FIELD(bias_x), FIELD(shares))
DESCRIBE(FeatureUnify, SHAPE, FIELD(filters), FIELD(kernel), FIELD(released), FIELD(features), FIELD(basis))
DESCRIBE(DenseAttention, field("shape", &Struct::sequences, &Struct::tokens, &Struct::heads, &Struct::head_dim),
         FIELD(scale), FIELD(q), FIELD(k), FIELD(v), FIELD(out))
DESCRIBE(PixelLinear, FIELD(pixels), FIELD(in_channels), FIELD(out_channels), FIELD(chunk), FIELD(width), FIELD(x),
         field("x_strides", &Struct::x_stride, &Struct::x_stride_c), FIELD(gain), FIELD(offset), FIELD(unit),
         FIELD(eps), FIELD(weight), FIELD(bias), FIELD(residual), FIELD(rotate_rows), FIELD(rotate_columns),
         FIELD(rotate_group), FIELD(out), FIELD(out_stride), FIELD(statistics))
DESCRIBE(PixelConv, FIELD(height), FIELD(width), FIELD(in_channels), FIELD(out_channels), ROWS, FIELD(x),
         field("x_strides", &Struct::x_stride, &Struct::x_stride_c), FIELD(gain), FIELD(offset), FIELD(activate),
         FIELD(reflect), FIELD(weight), FIELD(bias), FIELD(out), FIELD(out_stride), FIELD(statistics))
DESCRIBE(AdaptiveConv, FIELD(batch), FIELD(channels), FIELD(y), FIELD(x), ROWS)
DESCRIBE(Bilateral, FIELD(batch), FIELD(height), FIELD(width), FIELD(guides), FIELD(key), FIELD(radius), FIELD(fixup),
         FIELD(params), FIELD(range_mask), FIELD(fixup_mask), ROWS)
DESCRIBE(GaussianBilateral, FIELD(batch), FIELD(channels), FIELD(height), FIELD(width), FIELD(out_height),
         FIELD(out_width), FIELD(guides), FIELD(radius), FIELD(values), FIELD(guidance), FIELD(cells), FIELD(radii),
         FIELD(counts))
DESCRIBE(NearestRows, FIELD(data), FIELD(dtype), FIELD(rows), FIELD(dim), FIELD(stride), FIELD(scale))
DESCRIBE(NearestBlock, FIELD(stride), FIELD(count), FIELD(first), FIELD(columns), FIELD(queries), FIELD(rows),
         FIELD(query_errors), FIELD(query_squared_norms), FIELD(error), FIELD(squared_norm), FIELD(absolute),
         FIELD(relative))
DESCRIBE(NearestState, FIELD(k), FIELD(capacity), FIELD(lower), FIELD(index), FIELD(count), FIELD(upper),
         FIELD(uppers), FIELD(exact), FIELD(exact_index), FIELD(exacts))
DESCRIBE(KCenterCodes, FIELD(data), FIELD(stride), FIELD(scales), FIELD(squared_norms), FIELD(errors))

#undef DESCRIBE
#undef FIELD
#undef STRIDES
#undef SHAPE
#undef ROWS

template <class T>
using RecordOf = Record<T, Fields<T>::list>;

template <class T, size_t n>
T choose(PyObject* value, const std::pair<const char*, T> (&known)[n]) {
  for (const auto& [name, choice] : known)
    if (PyUnicode_Check(value) && PyUnicode_CompareWithASCIIString(value, name) == 0) return choice;
  throw py::type_error("murf_fast: a kernel does not know " + std::string(py::repr(value)));
}

}  // namespace

#define MURF_READ(T)           \
  template <>                  \
  T read<T>(PyObject * value) { \
    return RecordOf<T>::read(value); \
  }
MURF_STRUCTS(MURF_READ)
#undef MURF_READ

template <>
Grid read<Grid>(PyObject* value) {
  PyObject** size = entries(value, 4);
  return {read<int64_t>(size[0]), read<int64_t>(size[1]), read<int64_t>(size[2]), read<int64_t>(size[3])};
}

template <>
DType read<DType>(PyObject* value) {
  return choose<DType>(value, {{"f32", DType::f32}, {"bf16", DType::bf16}, {"f16", DType::f16}});
}

template <>
NearestRole read<NearestRole>(PyObject* value) {
  return choose<NearestRole>(
      value, {{"plain", NearestRole::plain}, {"bank", NearestRole::bank}, {"query", NearestRole::query}});
}

template <>
NearestMetric read<NearestMetric>(PyObject* value) {
  return choose<NearestMetric>(
      value, {{"l2", NearestMetric::l2}, {"l2sq", NearestMetric::l2sq}, {"cosine", NearestMetric::cosine},
              {"ip", NearestMetric::ip}});
}

void bind_structs(py::module_& m) {
#define MURF_BIND(T) RecordOf<T>::bind(m, #T);
  MURF_STRUCTS(MURF_BIND)
#undef MURF_BIND
}

}  // namespace murf
