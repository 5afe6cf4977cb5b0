// Tables that own their arrays, checked once so that kernels may walk them; see murf_fast/tables.
#include <pybind11/numpy.h>

#include <algorithm>
#include <memory>
#include <vector>

#include "structs.h"

namespace murf {

namespace {

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

template <class T>
const T& table(PyObject* value) {
  const T* table = py::handle(value).cast<const T*>();
  if (table == nullptr) throw py::type_error("murf_fast: expected a table, got None");
  return *table;
}

}  // namespace

template <>
Axis read<Axis>(PyObject* value) {
  return table<AxisTable>(value).view();
}
template <>
FoldedAxis read<FoldedAxis>(PyObject* value) {
  return table<FoldedTable>(value).view();
}
template <>
WindowAxis read<WindowAxis>(PyObject* value) {
  return table<WindowAxisTable>(value).view();
}

void bind_tables(py::module_& m) {
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
  py::class_<FoldedTable, std::shared_ptr<FoldedTable>>(m, "FoldedAxis")
      .def(py::init<int64_t, int64_t, const py::array_t<int32_t>&, const py::array_t<int32_t>&,
                    const py::array_t<float>&, const py::array_t<int32_t>&, const py::array_t<int32_t>&>(),
           py::kw_only(), py::arg("in_size"), py::arg("out_size"), py::arg("first"), py::arg("count"),
           py::arg("weights"), py::arg("reader_begin"), py::arg("reader_end"));
}

}  // namespace murf
