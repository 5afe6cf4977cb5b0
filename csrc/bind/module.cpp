// The whole native surface. Tensors arrive as addresses with shapes and strides in elements, checked in Python; the
// kernels run without the GIL. No torch header: one build serves every torch version.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <memory>
#include <optional>
#include <stdexcept>

#include "dispatch.h"
#include "memory.h"
#include "work.h"

namespace py = pybind11;
using namespace murf;

namespace {

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

// An axis table that owns its arrays.
class AxisTable {
 public:
  AxisTable(int64_t in, int64_t out, const py::array_t<int32_t>& first, const py::array_t<int32_t>& count,
            const py::array_t<float>& weights)
      : in_(in),
        first_(first.data(), first.data() + first.size()),
        count_(count.data(), count.data() + count.size()),
        weights_(weights.data(), weights.data() + weights.size()) {
    if (weights.ndim() != 2 || weights.shape(0) != out || int64_t(first_.size()) != out || int64_t(count_.size()) != out)
      throw std::invalid_argument("Axis: first, count and weights disagree");
    taps_ = weights.shape(1);
    for (int64_t i = 0; i < out; ++i)
      if (first_[i] < 0 || count_[i] < 0 || count_[i] > taps_ || first_[i] + count_[i] > in)
        throw std::invalid_argument("Axis: a row reads outside the input");
  }
  Axis view() const {
    return {in_, int64_t(first_.size()), taps_, first_.data(), count_.data(), weights_.data()};
  }

 private:
  int64_t in_, taps_;
  std::vector<int32_t> first_, count_;
  std::vector<float> weights_;
};

template <class T, int Flags>
std::vector<T> vector_of(const py::array_t<T, Flags>& a) {
  return std::vector<T>(a.data(), a.data() + a.size());
}

// Blocks of queries along one axis of window attention; see murf_fast/tables/query_blocks.py.
class WindowAxisTable {
 public:
  using Ints = py::array_t<int32_t, py::array::c_style | py::array::forcecast>;
  WindowAxisTable(int64_t out, int64_t in, const Ints& member_begin, const Ints& members, const Ints& key_begin,
                  const Ints& keys, const py::array_t<int64_t>& mask_begin, const py::array_t<float>& masks,
                  const py::array_t<uint8_t>& exact)
      : out_(out),
        in_(in),
        member_begin_(vector_of(member_begin)),
        members_(vector_of(members)),
        key_begin_(vector_of(key_begin)),
        keys_(vector_of(keys)),
        mask_begin_(vector_of(mask_begin)),
        masks_(vector_of(masks)),
        exact_(vector_of(exact)) {
    const size_t blocks = exact_.size();
    if (member_begin_.size() != blocks + 1 || key_begin_.size() != blocks + 1 || mask_begin_.size() != blocks)
      throw std::invalid_argument("WindowAxis: the tables disagree");
    if (size_t(member_begin_[blocks]) != members_.size() || size_t(key_begin_[blocks]) != keys_.size())
      throw std::invalid_argument("WindowAxis: members or keys are missing");
    for (int32_t m : members_)
      if (m < 0 || m >= out) throw std::invalid_argument("WindowAxis: a query outside the output");
    for (int32_t k : keys_)
      if (k < 0 || k >= in) throw std::invalid_argument("WindowAxis: a key outside the grid");
    for (size_t i = 0; i < blocks; ++i) {
      const int64_t members_here = member_begin_[i + 1] - member_begin_[i], keys_here = key_begin_[i + 1] - key_begin_[i];
      if (members_here < 1 || keys_here < 1) throw std::invalid_argument("WindowAxis: an empty block");
      if (!exact_[i] && (mask_begin_[i] < 0 || mask_begin_[i] + members_here * keys_here > int64_t(masks_.size())))
        throw std::invalid_argument("WindowAxis: a mask is missing");
      max_members_ = std::max(max_members_, members_here);
      max_keys_ = std::max(max_keys_, keys_here);
    }
  }
  WindowAxis view() const {
    return {out_,           in_,           int64_t(exact_.size()), max_members_,       max_keys_,
            member_begin_.data(), members_.data(), key_begin_.data(), keys_.data(), mask_begin_.data(), masks_.data(),
            exact_.data()};
  }

 private:
  int64_t out_, in_, max_members_ = 0, max_keys_ = 0;
  std::vector<int32_t> member_begin_, members_, key_begin_, keys_;
  std::vector<int64_t> mask_begin_;
  std::vector<float> masks_;
  std::vector<uint8_t> exact_;
};

using StridedTuple = std::tuple<uintptr_t, std::array<int64_t, 4>>;  // address or 0, strides (b, c, y, x)
// ((batch, heads, head_dim, channels), mean, scale, q, k, v, rows, columns, bias of rows, bias of columns)
using AttentionTuple = std::tuple<std::array<int64_t, 4>, bool, float, StridedTuple, StridedTuple, StridedTuple,
                                  std::shared_ptr<WindowAxisTable>, std::shared_ptr<WindowAxisTable>, uintptr_t,
                                  uintptr_t>;

Strided strided_of(const StridedTuple& t) {
  const auto& s = std::get<1>(t);
  return {pointer<void>(std::get<0>(t)), s[0], s[1], s[2], s[3]};
}
WindowAttention attention_of(const AttentionTuple& t) {
  const auto& [shape, mean, scale, q, k, v, y, x, bias_y, bias_x] = t;
  return {shape[0],      shape[1],      shape[2], shape[3], mean, scale, strided_of(q), strided_of(k), strided_of(v),
          y->view(), x->view(), pointer<float>(bias_y), pointer<float>(bias_x)};
}

using Shape = std::array<int64_t, 4>;  // (B, C, H, W)
// (address, shape, (stride_b, stride_c, stride_y, stride_x), axis of rows, axis of columns)
using MapTuple =
    std::tuple<uintptr_t, Shape, std::array<int64_t, 4>, std::shared_ptr<AxisTable>, std::shared_ptr<AxisTable>>;
using BiasTuple = std::tuple<uintptr_t, int64_t>;      // (address or 0, batch stride)
using CrossEntropyTuple = std::tuple<uintptr_t, uintptr_t, int64_t, float>;  // target, weight or 0, ignore, smoothing

Map map_of(const MapTuple& t) {
  const auto& s = std::get<2>(t);
  return {pointer<void>(std::get<0>(t)), std::get<1>(t)[1], s[0], s[1], s[2], s[3],
          std::get<3>(t)->view(), std::get<4>(t)->view()};
}

// Maps and axes that fit each other and a result of this shape, whose channels they share or make up together.
std::vector<Map> maps_of(const std::vector<MapTuple>& tuples, const Shape& result, bool concatenated = false) {
  std::vector<Map> maps;
  int64_t channels = 0;
  for (const MapTuple& t : tuples) {
    const Map map = map_of(t);
    const Shape& shape = std::get<1>(t);
    if (shape[0] != result[0] || shape[2] != map.y.in || shape[3] != map.x.in || map.y.out != result[2] ||
        map.x.out != result[3] || (!concatenated && map.channels != result[1]))
      throw std::invalid_argument("murf_fast: a map, its tables and the result disagree");
    channels += map.channels;
    maps.push_back(map);
  }
  if (maps.empty() || (concatenated && channels != result[1]))
    throw std::invalid_argument("murf_fast: the maps do not make up the result");
  return maps;
}

Maps view(const std::vector<Map>& maps) { return {maps.data(), int64_t(maps.size())}; }
Grid grid_of(const Shape& s) { return {s[0], s[1], s[2], s[3]}; }
Bias bias_of(const BiasTuple& t) { return {pointer<float>(std::get<0>(t)), std::get<1>(t)}; }
CrossEntropy cross_entropy_of(const CrossEntropyTuple& t) {
  return {pointer<int64_t>(std::get<0>(t)), pointer<float>(std::get<1>(t)), std::get<2>(t), std::get<3>(t)};
}
// Every label is a class or the one that does not count: kernels take labels for addresses.
void check_labels(const CrossEntropy& ce, const Grid& grid) {
  const int64_t count = grid.batch * grid.height * grid.width;
  int64_t wrong = 0;
  for (int64_t i = 0; i < count; ++i)
    wrong |= int64_t(uint64_t(ce.target[i]) >= uint64_t(grid.channels)) & int64_t(ce.target[i] != ce.ignore_index);
  if (wrong != 0) throw std::invalid_argument("murf_fast.upsample_cross_entropy: `target` holds labels out of range");
}
std::vector<float*> gradients_of(const std::vector<uintptr_t>& addresses) {
  std::vector<float*> v;
  for (uintptr_t a : addresses) v.push_back(pointer<float>(a));
  return v;
}

// The composed window of one axis, with arrays of its own.
class FoldedTable {
 public:
  FoldedTable(int64_t in, int64_t out, const py::array_t<int32_t>& first, const py::array_t<int32_t>& count,
              const py::array_t<float>& weights, const py::array_t<int32_t>& reader_begin,
              const py::array_t<int32_t>& reader_end)
      : in_(in),
        first_(first.data(), first.data() + first.size()),
        count_(count.data(), count.data() + count.size()),
        reader_begin_(reader_begin.data(), reader_begin.data() + reader_begin.size()),
        reader_end_(reader_end.data(), reader_end.data() + reader_end.size()),
        weights_(weights.data(), weights.data() + weights.size()) {
    if (weights.ndim() != 3 || weights.shape(0) != out || int64_t(first_.size()) != out || int64_t(count_.size()) != out ||
        int64_t(reader_begin_.size()) != in || int64_t(reader_end_.size()) != in)
      throw std::invalid_argument("FoldedAxis: the arrays disagree");
    taps_ = weights.shape(1), window_ = weights.shape(2);
    for (int64_t i = 0; i < out; ++i)
      if (first_[i] < 0 || count_[i] < 0 || count_[i] > window_ || first_[i] + count_[i] > in)
        throw std::invalid_argument("FoldedAxis: a window reaches outside the input");
    for (int64_t j = 0; j < in; ++j)
      if (reader_begin_[j] < 0 || reader_end_[j] > out)
        throw std::invalid_argument("FoldedAxis: a reader lies outside the output");
  }
  FoldedAxis view() const {
    return {in_, int64_t(first_.size()), taps_, window_, first_.data(), count_.data(), weights_.data(),
            reader_begin_.data(), reader_end_.data()};
  }

 private:
  int64_t in_, taps_, window_;
  std::vector<int32_t> first_, count_, reader_begin_, reader_end_;
  std::vector<float> weights_;
};

// (batch, channels, axis of rows, axis of columns)
using RowsTuple = std::tuple<int64_t, int64_t>;  // begin, end
using ConvTuple =
    std::tuple<int64_t, int64_t, std::shared_ptr<FoldedTable>, std::shared_ptr<FoldedTable>, RowsTuple>;
// ((batch, height, width, guides, key, radius), fix-up, parameters, range mask or 0, fix-up mask or 0, rows)
using BilateralTuple = std::tuple<std::array<int64_t, 6>, bool, uintptr_t, uintptr_t, uintptr_t, RowsTuple>;

AdaptiveConv conv_of(const ConvTuple& t) {
  const auto& [begin, end] = std::get<4>(t);
  return {std::get<0>(t), std::get<1>(t), std::get<2>(t)->view(), std::get<3>(t)->view(), begin, end};
}
Bilateral bilateral_of(const BilateralTuple& t) {
  const auto& n = std::get<0>(t);
  const auto& [begin, end] = std::get<5>(t);
  return {n[0], n[1], n[2], n[3], n[4], n[5], std::get<1>(t), pointer<float>(std::get<2>(t)),
          pointer<float>(std::get<3>(t)), pointer<float>(std::get<4>(t)), begin, end};
}
// (address, dtype, rows, width, row stride, address of scales or 0)
using NearestRowsTuple = std::tuple<uintptr_t, DType, int64_t, int64_t, int64_t, uintptr_t>;
using KCenterCodesTuple = std::tuple<uintptr_t, int64_t, uintptr_t, uintptr_t, uintptr_t>;
// (row stride, first, columns, query errors, query squared norms, error, squared norm, absolute, relative)
using NearestBlockTuple = std::tuple<int64_t, int64_t, int64_t, uintptr_t, uintptr_t, double, double, double, float>;
using NearestStateTuple = std::tuple<int64_t, int64_t, std::array<uintptr_t, 8>>;  // k, capacity, arrays

NearestRows nearest_rows_of(const NearestRowsTuple& t) {
  const auto& [address, dtype, rows, dim, stride, scale] = t;
  return {pointer<void>(address), dtype, rows, dim, stride, pointer<double>(scale)};
}
NearestBlock nearest_block_of(const NearestBlockTuple& t) {
  const auto& [stride, first, columns, errors, squared_norms, error, squared_norm, absolute, relative] = t;
  return {stride, first, columns, pointer<double>(errors), pointer<double>(squared_norms), error, squared_norm,
          absolute, relative};
}
KCenterCodes k_center_codes_of(const KCenterCodesTuple& t) {
  const auto& [data, stride, scales, squared_norms, errors] = t;
  return {pointer<int8_t>(data), stride, pointer<double>(scales), pointer<double>(squared_norms),
          pointer<double>(errors)};
}
NearestState nearest_state_of(const NearestStateTuple& t) {
  const auto& [k, capacity, a] = t;
  return {k, capacity, pointer<float>(a[0]), pointer<int64_t>(a[1]), pointer<int32_t>(a[2]), pointer<float>(a[3]),
          pointer<int32_t>(a[4]), pointer<double>(a[5]), pointer<int64_t>(a[6]), pointer<int32_t>(a[7])};
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU kernels of murf_fast";
  py::enum_<DType>(m, "DType").value("f32", DType::f32).value("bf16", DType::bf16).value("f16", DType::f16);
  py::class_<AxisTable, std::shared_ptr<AxisTable>>(m, "AxisTable")
      .def(py::init<int64_t, int64_t, const py::array_t<int32_t>&, const py::array_t<int32_t>&,
                    const py::array_t<float>&>(),
           py::kw_only(), py::arg("in_size"), py::arg("out_size"), py::arg("first"), py::arg("count"),
           py::arg("weights"));
  py::class_<WindowAxisTable, std::shared_ptr<WindowAxisTable>>(m, "AxisBlocks")
      .def(py::init<int64_t, int64_t, const WindowAxisTable::Ints&, const WindowAxisTable::Ints&,
                    const WindowAxisTable::Ints&, const WindowAxisTable::Ints&, const py::array_t<int64_t>&,
                    const py::array_t<float>&, const py::array_t<uint8_t>&>(),
           py::kw_only(), py::arg("out_size"), py::arg("in_size"), py::arg("member_begin"), py::arg("members"),
           py::arg("key_begin"), py::arg("keys"), py::arg("mask_begin"), py::arg("masks"), py::arg("exact"));
  m.def("available_levels", &available_levels);
  m.def("current_level", &current_level);
  m.def("has_openmp", [] {
#if defined(_OPENMP)
    return true;
#else
    return false;
#endif
  });

  // Whether matrix products in bfloat16 run in hardware. Processors with AMX have these instructions, too.
  m.def("has_bf16_products", [] {
#if defined(MURF_X86)
    __builtin_cpu_init();
    return bool(__builtin_cpu_supports("avx512bf16"));
#else
    return false;
#endif
  });

  // Threads that a call of so much work runs on; see work.h.
  m.def("threads_for", &work::threads_for);

  m.def("prefer_huge_pages", [](uintptr_t begin, int64_t bytes) { prefer_huge_pages(pointer<void>(begin), bytes); });

  m.def("upsample_concat", [](DType dtype, const std::vector<MapTuple>& maps, const Shape& shape, uintptr_t out,
                              int threads) {
    const auto m = maps_of(maps, shape, true);
    const Kernels& k = current_kernels();
    py::gil_scoped_release release;
    k.upsample_concat(dtype, view(m), grid_of(shape), pointer<void>(out),
                      work::threads_for(threads, work::resample(view(m), grid_of(shape))));
  });
  m.def("upsample_sum", [](DType dtype, const std::vector<MapTuple>& maps, const Shape& shape, const BiasTuple& bias,
                           uintptr_t out, bool channels_last, int64_t out_stride_b, int threads) {
    const auto m = maps_of(maps, shape);
    const Kernels& k = current_kernels();
    py::gil_scoped_release release;
    k.upsample_sum(dtype, view(m), grid_of(shape), bias_of(bias), pointer<void>(out), channels_last, out_stride_b,
                   work::threads_for(threads, work::resample(view(m), grid_of(shape))));
  });
  m.def("resize_adjoint", [](DType dtype, const MapTuple& grad, int64_t batch, uintptr_t out, bool channels_last,
                             int threads) {
    const Map map = map_of(grad);
    const Shape& shape = std::get<1>(grad);
    if (shape[0] != batch || shape[2] != map.y.out || shape[3] != map.x.out)
      throw std::invalid_argument("murf_fast: a gradient and its tables disagree");
    const Kernels& k = current_kernels();
    py::gil_scoped_release release;
    k.resize_adjoint(dtype, map, batch, pointer<void>(out), channels_last,
                     work::threads_for(threads, work::adjoint(map, batch)));
  });
  m.def("upsample_argmax", [](DType dtype, const std::vector<MapTuple>& maps, const Shape& shape, const BiasTuple& bias,
                              int label_bytes, uintptr_t labels, uintptr_t values, int threads) {
    const auto m = maps_of(maps, shape);
    const Kernels& k = current_kernels();
    py::gil_scoped_release release;
    k.upsample_argmax(dtype, view(m), grid_of(shape), bias_of(bias), label_bytes, pointer<void>(labels),
                      pointer<void>(values), work::threads_for(threads, work::resample(view(m), grid_of(shape))));
  });
  m.def("upsample_expectation", [](DType dtype, const std::vector<MapTuple>& maps, const Shape& shape,
                                   const BiasTuple& bias, uintptr_t values, bool softmax, uintptr_t out, int threads) {
    const auto m = maps_of(maps, shape);
    const Kernels& k = current_kernels();
    py::gil_scoped_release release;
    k.upsample_expectation(dtype, view(m), grid_of(shape), bias_of(bias), pointer<float>(values), softmax,
                           pointer<float>(out), work::threads_for(threads, work::softmax(view(m), grid_of(shape))));
  });
  m.def("upsample_expectation_backward", [](DType dtype, const std::vector<MapTuple>& maps, const Shape& shape,
                                            const BiasTuple& bias, uintptr_t values, bool softmax, uintptr_t grad_out,
                                            const std::vector<uintptr_t>& gradients, uintptr_t row_value_gradients,
                                            int threads) {
    const auto m = maps_of(maps, shape);
    const auto g = gradients_of(gradients);
    const Kernels& k = current_kernels();
    py::gil_scoped_release release;
    k.upsample_expectation_backward(dtype, view(m), grid_of(shape), bias_of(bias), pointer<float>(values), softmax,
                                    pointer<float>(grad_out), g.data(), pointer<float>(row_value_gradients),
                                    work::threads_for(threads, work::softmax(view(m), grid_of(shape))));
  });
  m.def("upsample_cross_entropy", [](DType dtype, const std::vector<MapTuple>& maps, const Shape& shape,
                                     const BiasTuple& bias, const CrossEntropyTuple& ce, uintptr_t loss, uintptr_t lse,
                                     int threads) {
    const auto m = maps_of(maps, shape);
    const Kernels& k = current_kernels();
    py::gil_scoped_release release;
    k.upsample_cross_entropy(dtype, view(m), grid_of(shape), bias_of(bias), cross_entropy_of(ce), pointer<float>(loss),
                             pointer<float>(lse), work::threads_for(threads, work::softmax(view(m), grid_of(shape))));
  });
  m.def("upsample_cross_entropy_backward", [](DType dtype, const std::vector<MapTuple>& maps, const Shape& shape,
                                              const BiasTuple& bias, const CrossEntropyTuple& ce, uintptr_t lse,
                                              uintptr_t grad_loss, const std::vector<uintptr_t>& gradients,
                                              int threads) {
    const auto m = maps_of(maps, shape);
    const auto g = gradients_of(gradients);
    const Kernels& k = current_kernels();
    py::gil_scoped_release release;
    check_labels(cross_entropy_of(ce), grid_of(shape));
    k.upsample_cross_entropy_backward(dtype, view(m), grid_of(shape), bias_of(bias), cross_entropy_of(ce),
                                      pointer<float>(lse), pointer<float>(grad_loss), g.data(),
                                      work::threads_for(threads, work::softmax(view(m), grid_of(shape))));
  });

  py::class_<FoldedTable, std::shared_ptr<FoldedTable>>(m, "FoldedAxis")
      .def(py::init<int64_t, int64_t, const py::array_t<int32_t>&, const py::array_t<int32_t>&,
                    const py::array_t<float>&, const py::array_t<int32_t>&, const py::array_t<int32_t>&>(),
           py::kw_only(), py::arg("in_size"), py::arg("out_size"), py::arg("first"), py::arg("count"),
           py::arg("weights"), py::arg("reader_begin"), py::arg("reader_end"));
  m.def("adaptive_conv", [](DType dtype, DType kernels_dtype, const ConvTuple& conv, const StridedTuple& source,
                            const StridedTuple& kernels, uintptr_t bias, const StridedTuple& out, int threads) {
    const Kernels& k = current_kernels();
    const AdaptiveConv c = conv_of(conv);
    py::gil_scoped_release release;
    k.adaptive_conv(dtype, kernels_dtype, c, strided_of(source), strided_of(kernels), pointer<float>(bias),
                    strided_of(out), work::threads_for(threads, work::adaptive_conv(c)));
  });
  m.def("adaptive_conv_backward_source", [](DType dtype, DType kernels_dtype, const ConvTuple& conv,
                                            const StridedTuple& grad, const StridedTuple& kernels,
                                            const StridedTuple& out, int threads) {
    const Kernels& k = current_kernels();
    const AdaptiveConv c = conv_of(conv);
    py::gil_scoped_release release;
    k.adaptive_conv_backward_source(dtype, kernels_dtype, c, strided_of(grad), strided_of(kernels), strided_of(out),
                                    work::threads_for(threads, work::adaptive_conv(c)));
  });
  m.def("adaptive_conv_backward_kernels", [](DType dtype, DType kernels_dtype, const ConvTuple& conv,
                                             const StridedTuple& grad, const StridedTuple& source,
                                             const StridedTuple& out, int threads) {
    const Kernels& k = current_kernels();
    const AdaptiveConv c = conv_of(conv);
    py::gil_scoped_release release;
    k.adaptive_conv_backward_kernels(dtype, kernels_dtype, c, strided_of(grad), strided_of(source), strided_of(out),
                                     work::threads_for(threads, work::adaptive_conv(c)));
  });
  m.def("bilateral_kernels", [](DType dtype, DType out_dtype, const BilateralTuple& net, const StridedTuple& guidance,
                                const StridedTuple& out, int threads) {
    const Kernels& k = current_kernels();
    const Bilateral n = bilateral_of(net);
    py::gil_scoped_release release;
    k.bilateral_kernels(dtype, out_dtype, n, strided_of(guidance), strided_of(out),
                        work::threads_for(threads, work::bilateral(n)));
  });
  m.def("bilateral_kernels_backward", [](DType dtype, DType grad_dtype, const BilateralTuple& net,
                                         const StridedTuple& guidance, const StridedTuple& grad, int64_t bands,
                                         uintptr_t grad_logits, uintptr_t grad_guidance, uintptr_t grad_params,
                                         int threads) {
    const Kernels& k = current_kernels();
    const Bilateral n = bilateral_of(net);
    py::gil_scoped_release release;
    k.bilateral_kernels_backward(dtype, grad_dtype, n, strided_of(guidance), strided_of(grad), bands,
                                 pointer<float>(grad_logits), pointer<float>(grad_guidance),
                                 pointer<float>(grad_params), work::threads_for(threads, work::bilateral(n)));
  });
  // image: (address, (B, H, W), (stride_b, stride_c, stride_y, stride_x))
  // rows: (patch, stride_b, stride_row, channels_first, gains, offsets)
  m.def("image_to_patches", [](bool is_uint8, DType in, DType out,
                               const std::tuple<uintptr_t, std::array<int64_t, 3>, std::array<int64_t, 4>>& image,
                               const std::shared_ptr<AxisTable>& axis_y, const std::shared_ptr<AxisTable>& axis_x,
                               const std::tuple<int64_t, int64_t, int64_t, bool, std::array<float, 3>,
                                                std::array<float, 3>>& rows,
                               uintptr_t result, int threads) {
    const auto& [address, shape, strides] = image;
    const auto& [patch, stride_b, stride_row, channels_first, gain, offset] = rows;
    const Image view{pointer<void>(address), shape[0], shape[1], shape[2], strides[0], strides[1], strides[2],
                     strides[3]};
    const PatchRows layout{patch, stride_b, stride_row, channels_first, {gain[0], gain[1], gain[2]},
                           {offset[0], offset[1], offset[2]}};
    const Kernels& k = current_kernels();
    py::gil_scoped_release release;
    k.image_to_patches(is_uint8, in, out, view, axis_y->view(), axis_x->view(), layout, pointer<void>(result),
                       work::threads_for(threads, work::image_to_patches(view, axis_y->view(), axis_x->view())));
  });
  m.def("window_attention", [](DType dtype, const AttentionTuple& attention, const StridedTuple& out, uintptr_t lse,
                               int threads) {
    const WindowAttention a = attention_of(attention);
    const Kernels& k = current_kernels();
    py::gil_scoped_release release;
    k.window_attention(dtype, a, strided_of(out), pointer<float>(lse),
                       work::threads_for(threads, work::window_attention(a)));
  });
  // gradients of (q, k, v); (bias of rows, bias of columns): every address may be 0
  m.def("window_attention_backward", [](DType dtype, const AttentionTuple& attention, const StridedTuple& grad_out,
                                        uintptr_t grad_lse, const std::array<StridedTuple, 3>& qkv,
                                        const std::array<uintptr_t, 2>& bias, int64_t shares, int threads) {
    const WindowAttention a = attention_of(attention);
    const WindowGradients g{strided_of(grad_out),   pointer<float>(grad_lse), strided_of(qkv[0]), strided_of(qkv[1]),
                            strided_of(qkv[2]), pointer<float>(bias[0]),  pointer<float>(bias[1]), shares};
    const Kernels& k = current_kernels();
    py::gil_scoped_release release;
    k.window_attention_backward(dtype, a, g, work::threads_for(threads, work::window_attention(a)));
  });
  // (shape of the features, filters, kernel, as released, features, basis)
  using UnifyTuple = std::tuple<Shape, int64_t, int64_t, bool, StridedTuple, uintptr_t>;
  static const auto unify_of = [](const UnifyTuple& t) {
    const auto& [shape, filters, kernel, released, features, basis] = t;
    return FeatureUnify{shape[0], shape[1], shape[2],  shape[3], filters, kernel, released, strided_of(features),
                        pointer<float>(basis)};
  };
  m.def("feature_unify", [](DType dtype, const UnifyTuple& unify, const StridedTuple& out, int threads) {
    const FeatureUnify f = unify_of(unify);
    const Kernels& k = current_kernels();
    py::gil_scoped_release release;
    k.feature_unify(dtype, f, strided_of(out), work::threads_for(threads, work::feature_unify(f)));
  });
  m.def("feature_unify_backward", [](DType dtype, const UnifyTuple& unify, const StridedTuple& grad_out,
                                     const StridedTuple& grad_features, uintptr_t grad_basis, int64_t shares,
                                     int threads) {
    const FeatureUnify f = unify_of(unify);
    const Kernels& k = current_kernels();
    py::gil_scoped_release release;
    k.feature_unify_backward(dtype, f, strided_of(grad_out), strided_of(grad_features), pointer<float>(grad_basis),
                             shares, work::threads_for(threads, work::feature_unify(f)));
  });
  // ((pixels, in, out, chunk, width), x, (x strides), gain, offset, (unit, eps), weight, bias, residual, rotations of
  // rows, of columns, out, statistics); addresses may be 0
  using PixelLinearTuple =
      std::tuple<std::array<int64_t, 5>, uintptr_t, std::array<int64_t, 2>, uintptr_t, uintptr_t,
                 std::tuple<bool, float>, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t, uintptr_t>;
  m.def("pixel_linear", [](const PixelLinearTuple& t, int threads) {
    const auto& [shape, x, strides, gain, offset, unit, weight, bias, residual, rows, columns, out, statistics] = t;
    const PixelLinear layer{shape[0], shape[1], shape[2], shape[3], shape[4], pointer<float>(x), strides[0],
                            strides[1], pointer<float>(gain), pointer<float>(offset), std::get<0>(unit),
                            std::get<1>(unit), pointer<float>(weight), pointer<float>(bias), pointer<float>(residual),
                            pointer<float>(rows), pointer<float>(columns), pointer<float>(out),
                            pointer<double>(statistics)};
    const Kernels& k = current_kernels();
    py::gil_scoped_release release;
    k.pixel_linear(layer, work::threads_for(threads, work::pixel_linear(layer)));
  });
  py::enum_<NearestRole>(m, "NearestRole")
      .value("plain", NearestRole::plain)
      .value("bank", NearestRole::bank)
      .value("query", NearestRole::query);
  py::enum_<NearestMetric>(m, "NearestMetric")
      .value("l2", NearestMetric::l2)
      .value("l2sq", NearestMetric::l2sq)
      .value("cosine", NearestMetric::cosine);
  m.def("nearest_prepare", [](const NearestRowsTuple& x, uintptr_t mean, DType out_dtype, uintptr_t out,
                              int64_t out_stride, NearestRole role, uintptr_t squared_norms, uintptr_t errors,
                              int threads) {
    const Kernels& k = current_kernels();
    const NearestRows rows = nearest_rows_of(x);
    py::gil_scoped_release release;
    k.nearest_prepare(rows, pointer<float>(mean), out_dtype, pointer<void>(out), out_stride, role,
                      pointer<double>(squared_norms), pointer<double>(errors),
                      work::threads_for(threads, work::rows(rows)));
  });
  m.def("nearest_scan", [](DType product_dtype, uintptr_t products, const NearestBlockTuple& block,
                           const NearestRowsTuple& query, const NearestRowsTuple& bank,
                           const NearestStateTuple& state, int threads) {
    const Kernels& k = current_kernels();
    const NearestRows rows = nearest_rows_of(query);
    const NearestBlock products_block = nearest_block_of(block);
    py::gil_scoped_release release;
    k.nearest_scan(product_dtype, pointer<void>(products), products_block, rows, nearest_rows_of(bank),
                   nearest_state_of(state), work::threads_for(threads, work::nearest_scan(rows, products_block)));
  });
  m.def("nearest_finish", [](const NearestRowsTuple& query, const NearestRowsTuple& bank,
                             const NearestStateTuple& state, NearestMetric metric, uintptr_t distances,
                             uintptr_t indices, int threads) {
    const Kernels& k = current_kernels();
    const NearestRows rows = nearest_rows_of(query);
    const NearestState found = nearest_state_of(state);
    py::gil_scoped_release release;
    k.nearest_finish(rows, nearest_rows_of(bank), found, metric, pointer<float>(distances), pointer<int64_t>(indices),
                     work::threads_for(threads, work::nearest_finish(rows, found)));
  });
  m.def("k_center_encode", [](const NearestRowsTuple& x, uintptr_t mean, const KCenterCodesTuple& codes, int threads) {
    const Kernels& k = current_kernels();
    const NearestRows rows = nearest_rows_of(x);
    py::gil_scoped_release release;
    k.k_center_encode(rows, pointer<float>(mean), k_center_codes_of(codes),
                      work::threads_for(threads, work::rows(rows)));
  });
  m.def("k_center_steps", [](const NearestRowsTuple& x, const KCenterCodesTuple& codes, uintptr_t nearest,
                             uintptr_t centers, int64_t given, int64_t begin, int64_t end, int threads) {
    const Kernels& k = current_kernels();
    const NearestRows rows = nearest_rows_of(x);
    py::gil_scoped_release release;
    k.k_center_steps(rows, k_center_codes_of(codes), pointer<double>(nearest), pointer<int64_t>(centers), given, begin,
                     end, work::threads_for(threads, work::rows(rows)));
  });
  m.def("stream_fill", [](uintptr_t out, int64_t bytes, int threads) {
    const Kernels& k = current_kernels();
    py::gil_scoped_release release;
    k.stream_fill(pointer<void>(out), bytes, work::threads_for(threads, double(bytes / int64_t(sizeof(float)))));
  });
}
