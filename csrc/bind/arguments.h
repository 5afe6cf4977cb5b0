// Arguments by name: how calls of kernels and the structs of csrc/types.h come from Python. Everything is keyword-only, so
// that a swapped field is an error.
//
// pybind11's own keyword constructors take 1.1 us for a struct of five fields; a tuple of them, read by its casters, 0.8;
// this, 0.15. Values stay Python's until a kernel is called: a struct keeps the tables alive that it points to.
#pragma once

#include <pybind11/pybind11.h>

#include <array>
#include <stdexcept>
#include <string>
#include <tuple>
#include <type_traits>
#include <vector>

namespace murf {

namespace py = pybind11;

// The names of the arguments of one function, in order.
class Names {
 public:
  Names() = default;
  Names(std::string function, const std::vector<std::string>& names);

  // Writes the values in the order of the names; throws TypeError unless each of them is given, by its name.
  void sort(PyObject* const* given, Py_ssize_t positional, PyObject* keywords, PyObject** values) const;

 private:
  std::string function_;
  std::vector<PyObject*> names_;  // interned, kept for ever
};

// The names in a C++ parameter list, "(DType dtype, const float* bias)".
std::vector<std::string> names_in(const std::string& parameters);

// Adds a function of keywords to the module; `definition` must outlive it.
void add_function(py::module_& m, PyMethodDef& definition);

// What C++ throws becomes a Python exception.
template <class Body>
PyObject* guarded(const Body& body) noexcept {
  try {
    return body();
  } catch (py::error_already_set& error) {
    error.restore();
  } catch (const py::cast_error& error) {
    PyErr_SetString(PyExc_TypeError, error.what());
  } catch (const py::builtin_exception& error) {
    error.set_error();
  } catch (const std::invalid_argument& error) {
    PyErr_SetString(PyExc_ValueError, error.what());
  } catch (const std::bad_alloc&) {
    PyErr_NoMemory();
  } catch (const std::exception& error) {
    PyErr_SetString(PyExc_RuntimeError, error.what());
  }
  return nullptr;
}

inline void raise_if(bool failed) {
  if (failed) throw py::error_already_set();
}

// A value of Python as C++ has it. Pointers are addresses, 0 for none. Structs and tables: structs.h.
template <class T>
T read(PyObject* value) {
  if constexpr (std::is_pointer_v<T>) {
    const unsigned long long address = PyLong_AsUnsignedLongLong(value);
    raise_if(address == ~0ull && PyErr_Occurred());
    return reinterpret_cast<T>(static_cast<uintptr_t>(address));
  } else if constexpr (std::is_same_v<T, bool>) {
    if (!PyBool_Check(value)) throw py::type_error("murf_fast: a flag must be True or False");
    return value == Py_True;
  } else if constexpr (std::is_floating_point_v<T>) {
    const double number = PyFloat_AsDouble(value);
    raise_if(number == -1.0 && PyErr_Occurred());
    return T(number);
  } else {
    static_assert(std::is_integral_v<T>, "declare read<T> in structs.h");
    const long long number = PyLong_AsLongLong(value);
    raise_if(number == -1 && PyErr_Occurred());
    if (T(number) != number) throw py::value_error("murf_fast: an integer is out of range");
    return T(number);
  }
}

// The entries of a tuple or list of so many; `count` of -1: of any number.
inline PyObject** entries(PyObject* value, Py_ssize_t count) {
  if (!PyTuple_Check(value) && !PyList_Check(value)) throw py::type_error("murf_fast: expected a tuple or list");
  if (count >= 0 && PySequence_Fast_GET_SIZE(value) != count)
    throw py::value_error("murf_fast: expected " + std::to_string(count) + " entries");
  return PySequence_Fast_ITEMS(value);
}

// An argument of a struct, and the field that it sets, or the fields that its entries set.
template <class T, class... M>
struct Field {
  const char* name;
  std::tuple<M T::*...> members;

  static constexpr size_t bytes = (sizeof(M) + ...);

  void set(T& object, PyObject* value) const {
    if constexpr (sizeof...(M) == 1) {
      assign(object.*std::get<0>(members), value);
    } else {
      PyObject** entry = entries(value, sizeof...(M));
      std::apply([&](auto... member) { (assign(object.*member, *entry++), ...); }, members);
    }
  }

 private:
  template <class V>
  static void assign(V& target, PyObject* value) {
    if constexpr (std::is_array_v<V>) {
      PyObject** entry = entries(value, std::extent_v<V>);
      for (auto& element : target) assign(element, *entry++);
    } else {
      target = read<V>(value);
    }
  }
};

template <class T, class... M>
constexpr Field<T, M...> field(const char* name, M T::*... members) {
  return {name, {members...}};
}

// A struct as a named tuple of Python, made by a function of keywords.
template <class T, const auto& fields>
class Record {
  static constexpr size_t kFields = std::tuple_size_v<std::remove_cvref_t<decltype(fields)>>;

 public:
  static void bind(py::module_& m, const char* name) {
    std::vector<std::string> names;
    std::apply([&](const auto&... f) { ((names.push_back(f.name), layout_[names.size() - 1] = {f.name, nullptr}), ...); },
               fields);
    static const std::string full_name = std::string("murf_fast._native.") + name;
    static PyStructSequence_Desc description{full_name.c_str(), nullptr, layout_.data(), int(kFields)};
    type_ = PyStructSequence_NewType(&description);
    raise_if(type_ == nullptr);
    names_ = Names(name, names);
    // Casting by way of void(*)(): the signature is what the flags say.
    static PyMethodDef definition{name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&make)),
                                  METH_FASTCALL | METH_KEYWORDS, nullptr};
    add_function(m, definition);
  }

  static T read(PyObject* value) {
    if (Py_TYPE(value) != type_)
      throw py::type_error(std::string("murf_fast: expected ") + type_->tp_name + ", got " + Py_TYPE(value)->tp_name);
    T object{};
    Py_ssize_t i = 0;
    std::apply([&](const auto&... f) { (f.set(object, PyStructSequence_GET_ITEM(value, i++)), ...); }, fields);
    return object;
  }

 private:
  // A field without an argument would silently be zero.
  static_assert(sizeof(T) - std::apply([](const auto&... f) { return (f.bytes + ...); }, fields) < alignof(T));

  static PyObject* make(PyObject*, PyObject* const* given, Py_ssize_t positional, PyObject* keywords) {
    return guarded([&] {
      std::array<PyObject*, kFields> values;
      names_.sort(given, positional, keywords, values.data());
      PyObject* record = PyStructSequence_New(type_);
      raise_if(record == nullptr);
      for (size_t i = 0; i < kFields; ++i) PyStructSequence_SET_ITEM(record, i, Py_NewRef(values[i]));
      return record;
    });
  }

  static inline std::array<PyStructSequence_Field, kFields + 1> layout_{};
  static inline PyTypeObject* type_ = nullptr;
  static inline Names names_;
};

}  // namespace murf
