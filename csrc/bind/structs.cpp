// The structs of csrc/types.h and csrc/folded.h as Python names their fields. Strides are those of a tensor, in the order
// of its dimensions; addresses may be 0 where types.h says so.
#include "structs.h"

#include <utility>

namespace murf {

namespace {

template <class T>
struct Fields;

template <>
struct Fields<Strided> {
  static constexpr std::tuple list{
      field("data", &Strided::data),
      field("strides", &Strided::stride_b, &Strided::stride_c, &Strided::stride_y, &Strided::stride_x),
  };
};

template <>
struct Fields<Map> {
  static constexpr std::tuple list{
      field("data", &Map::data),
      field("shape", &Map::batch, &Map::channels, &Map::height, &Map::width),
      field("strides", &Map::stride_b, &Map::stride_c, &Map::stride_y, &Map::stride_x),
      field("y", &Map::y),
      field("x", &Map::x),
  };
};

template <>
struct Fields<Bias> {
  static constexpr std::tuple list{field("data", &Bias::data), field("stride_b", &Bias::stride_b)};
};

template <>
struct Fields<CrossEntropy> {
  static constexpr std::tuple list{
      field("target", &CrossEntropy::target),
      field("weight", &CrossEntropy::weight),
      field("ignore_index", &CrossEntropy::ignore_index),
      field("label_smoothing", &CrossEntropy::label_smoothing),
  };
};

template <>
struct Fields<Image> {
  static constexpr std::tuple list{
      field("data", &Image::data),
      field("batch", &Image::batch),
      field("height", &Image::height),
      field("width", &Image::width),
      field("strides", &Image::stride_b, &Image::stride_c, &Image::stride_y, &Image::stride_x),
  };
};

template <>
struct Fields<PatchRows> {
  static constexpr std::tuple list{
      field("patch", &PatchRows::patch),
      field("stride_b", &PatchRows::stride_b),
      field("stride_row", &PatchRows::stride_row),
      field("channels_first", &PatchRows::channels_first),
      field("gain", &PatchRows::gain),
      field("offset", &PatchRows::offset),
  };
};

template <>
struct Fields<WindowAttention> {
  static constexpr std::tuple list{
      field("batch", &WindowAttention::batch),
      field("heads", &WindowAttention::heads),
      field("head_dim", &WindowAttention::head_dim),
      field("channels", &WindowAttention::channels),
      field("mean", &WindowAttention::mean),
      field("scale", &WindowAttention::scale),
      field("q", &WindowAttention::q),
      field("k", &WindowAttention::k),
      field("v", &WindowAttention::v),
      field("y", &WindowAttention::y),
      field("x", &WindowAttention::x),
      field("bias_y", &WindowAttention::bias_y),
      field("bias_x", &WindowAttention::bias_x),
  };
};

template <>
struct Fields<WindowGradients> {
  static constexpr std::tuple list{
      field("grad_out", &WindowGradients::grad_out),
      field("grad_lse", &WindowGradients::grad_lse),
      field("q", &WindowGradients::q),
      field("k", &WindowGradients::k),
      field("v", &WindowGradients::v),
      field("bias_y", &WindowGradients::bias_y),
      field("bias_x", &WindowGradients::bias_x),
      field("shares", &WindowGradients::shares),
  };
};

template <>
struct Fields<FeatureUnify> {
  static constexpr std::tuple list{
      field("shape", &FeatureUnify::batch, &FeatureUnify::channels, &FeatureUnify::height, &FeatureUnify::width),
      field("filters", &FeatureUnify::filters),
      field("kernel", &FeatureUnify::kernel),
      field("released", &FeatureUnify::released),
      field("features", &FeatureUnify::features),
      field("basis", &FeatureUnify::basis),
  };
};

template <>
struct Fields<PixelLinear> {
  static constexpr std::tuple list{
      field("pixels", &PixelLinear::pixels),
      field("in_channels", &PixelLinear::in_channels),
      field("out_channels", &PixelLinear::out_channels),
      field("chunk", &PixelLinear::chunk),
      field("width", &PixelLinear::width),
      field("x", &PixelLinear::x),
      field("x_strides", &PixelLinear::x_stride, &PixelLinear::x_stride_c),
      field("gain", &PixelLinear::gain),
      field("offset", &PixelLinear::offset),
      field("unit", &PixelLinear::unit),
      field("eps", &PixelLinear::eps),
      field("weight", &PixelLinear::weight),
      field("bias", &PixelLinear::bias),
      field("residual", &PixelLinear::residual),
      field("rotate_rows", &PixelLinear::rotate_rows),
      field("rotate_columns", &PixelLinear::rotate_columns),
      field("out", &PixelLinear::out),
      field("statistics", &PixelLinear::statistics),
  };
};

template <>
struct Fields<AdaptiveConv> {
  static constexpr std::tuple list{
      field("batch", &AdaptiveConv::batch),
      field("channels", &AdaptiveConv::channels),
      field("y", &AdaptiveConv::y),
      field("x", &AdaptiveConv::x),
      field("rows", &AdaptiveConv::row_begin, &AdaptiveConv::row_end),
  };
};

template <>
struct Fields<Bilateral> {
  static constexpr std::tuple list{
      field("batch", &Bilateral::batch),
      field("height", &Bilateral::height),
      field("width", &Bilateral::width),
      field("guides", &Bilateral::guides),
      field("key", &Bilateral::key),
      field("radius", &Bilateral::radius),
      field("fixup", &Bilateral::fixup),
      field("params", &Bilateral::params),
      field("range_mask", &Bilateral::range_mask),
      field("fixup_mask", &Bilateral::fixup_mask),
      field("rows", &Bilateral::row_begin, &Bilateral::row_end),
  };
};

template <>
struct Fields<NearestRows> {
  static constexpr std::tuple list{
      field("data", &NearestRows::data),
      field("dtype", &NearestRows::dtype),
      field("rows", &NearestRows::rows),
      field("dim", &NearestRows::dim),
      field("stride", &NearestRows::stride),
      field("scale", &NearestRows::scale),
  };
};

template <>
struct Fields<NearestBlock> {
  static constexpr std::tuple list{
      field("stride", &NearestBlock::stride),
      field("first", &NearestBlock::first),
      field("columns", &NearestBlock::columns),
      field("query_errors", &NearestBlock::query_errors),
      field("query_squared_norms", &NearestBlock::query_squared_norms),
      field("error", &NearestBlock::error),
      field("squared_norm", &NearestBlock::squared_norm),
      field("absolute", &NearestBlock::absolute),
      field("relative", &NearestBlock::relative),
  };
};

template <>
struct Fields<NearestState> {
  static constexpr std::tuple list{
      field("k", &NearestState::k),
      field("capacity", &NearestState::capacity),
      field("lower", &NearestState::lower),
      field("index", &NearestState::index),
      field("count", &NearestState::count),
      field("upper", &NearestState::upper),
      field("uppers", &NearestState::uppers),
      field("exact", &NearestState::exact),
      field("exact_index", &NearestState::exact_index),
      field("exacts", &NearestState::exacts),
  };
};

template <>
struct Fields<KCenterCodes> {
  static constexpr std::tuple list{
      field("data", &KCenterCodes::data),
      field("stride", &KCenterCodes::stride),
      field("scales", &KCenterCodes::scales),
      field("squared_norms", &KCenterCodes::squared_norms),
      field("errors", &KCenterCodes::errors),
  };
};

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
      value, {{"l2", NearestMetric::l2}, {"l2sq", NearestMetric::l2sq}, {"cosine", NearestMetric::cosine}});
}

void bind_structs(py::module_& m) {
#define MURF_BIND(T) RecordOf<T>::bind(m, #T);
  MURF_STRUCTS(MURF_BIND)
#undef MURF_BIND
}

}  // namespace murf
