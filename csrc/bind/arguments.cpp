#include "arguments.h"

#include <algorithm>
#include <cctype>
#include <utility>

namespace murf {

Names::Names(std::string function, const std::vector<std::string>& names) : function_(std::move(function)) {
  for (const std::string& name : names) {
    names_.push_back(PyUnicode_InternFromString(name.c_str()));
    raise_if(names_.back() == nullptr);
  }
}

void Names::sort(PyObject* const* given, Py_ssize_t positional, PyObject* keywords, PyObject** values) const {
  if (positional != 0) throw py::type_error(function_ + "() takes keyword arguments only");
  std::fill_n(values, names_.size(), nullptr);
  const size_t count = keywords == nullptr ? 0 : size_t(PyTuple_GET_SIZE(keywords));
  for (size_t i = 0; i < count; ++i) {
    PyObject* name = PyTuple_GET_ITEM(keywords, i);
    size_t at = i;  // most calls keep the order, and names in a program's text are interned
    if (i >= names_.size() || names_[i] != name)
      at = size_t(std::find_if(names_.begin(), names_.end(),
                               [&](PyObject* known) { return PyUnicode_Compare(known, name) == 0; }) -
                  names_.begin());
    if (at == names_.size())
      throw py::type_error(function_ + "() got an unexpected keyword argument " + std::string(py::repr(name)));
    values[at] = given[i];
  }
  for (size_t i = 0; i < names_.size(); ++i)
    if (values[i] == nullptr) throw py::type_error(function_ + "() misses the argument " + std::string(py::repr(names_[i])));
}

std::vector<std::string> names_in(const std::string& parameters) {
  std::vector<std::string> names;
  const auto is_part = [](char c) { return std::isalnum(static_cast<unsigned char>(c)) != 0 || c == '_'; };
  for (size_t end = parameters.find_first_of(",)"); end != std::string::npos; end = parameters.find_first_of(",)", end + 1)) {
    size_t begin = end;
    while (begin > 0 && is_part(parameters[begin - 1])) --begin;
    names.push_back(parameters.substr(begin, end - begin));
  }
  return names;
}

void add_function(py::module_& m, PyMethodDef& definition) {
  m.attr(definition.ml_name) = py::reinterpret_steal<py::object>(PyCFunction_New(&definition, nullptr));
}

}  // namespace murf
