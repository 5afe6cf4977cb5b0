// The native surface: one function per kernel of csrc/kernels.h, with its arguments as keywords. Tensors arrive as
// addresses with shapes and strides in elements, checked in Python; kernels run without the GIL. No torch header: one
// build serves every torch version.
#include <pybind11/stl.h>

#include "check.h"
#include "dispatch.h"
#include "memory.h"
#include "structs.h"
#include "work.h"

namespace murf {

namespace {

// Checks and estimates of csrc/kernels.h, as functions of a kernel's arguments.
#define MURF_WORK(name, arguments, work) \
  double work_of_##name arguments { return work; }
MURF_KERNELS(MURF_WORK)
#undef MURF_WORK

template <auto kernel, auto work>
struct Function;

template <class... A, void (*Kernels::*kernel)(A...), double (*work)(A...)>
struct Function<kernel, work> {
  static constexpr size_t kArguments = sizeof...(A);

  static void bind(py::module_& m, const char* name, const char* parameters) {
    names = Names(name, names_in(parameters));
    static PyMethodDef definition{name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(&call)),
                                  METH_FASTCALL | METH_KEYWORDS, nullptr};
    add_function(m, definition);
  }

  static PyObject* call(PyObject*, PyObject* const* given, Py_ssize_t positional, PyObject* keywords) {
    return guarded([&] {
      std::array<PyObject*, kArguments> values;
      names.sort(given, positional, keywords, values.data());
      run(values, std::index_sequence_for<A...>());
      return Py_NewRef(Py_None);
    });
  }

  template <size_t... i>
  static void run(const std::array<PyObject*, kArguments>& values, std::index_sequence<i...>) {
    std::tuple<Argument<A>...> arguments(values[i]...);
    const Kernels& kernels = current_kernels();
    py::gil_scoped_release release;
    int& threads = std::get<kArguments - 1>(arguments).value;
    threads = murf::work::threads_for(threads, work(std::get<i>(arguments)...));
    (kernels.*kernel)(std::get<i>(arguments)...);
  }

  static inline Names names;
};

// Whether matrix products in bfloat16 run in hardware. Processors with AMX have these instructions, too.
bool has_bf16_products() {
#if defined(MURF_X86)
  __builtin_cpu_init();
  return bool(__builtin_cpu_supports("avx512bf16"));
#else
  return false;
#endif
}

bool has_openmp() {
#if defined(_OPENMP)
  return true;
#else
  return false;
#endif
}

}  // namespace

PYBIND11_MODULE(_native, m) {
  m.doc() = "CPU kernels of murf_fast";
  bind_tables(m);
  bind_structs(m);
#define MURF_BIND(name, arguments, work) Function<&Kernels::name, &work_of_##name>::bind(m, #name, #arguments);
  MURF_KERNELS(MURF_BIND)
#undef MURF_BIND
  m.def("available_levels", &available_levels);
  m.def("current_level", &current_level);
  m.def("has_bf16_products", &has_bf16_products);
  m.def("has_openmp", &has_openmp);
  m.def("threads_for", &work::threads_for);  // threads that a call of so much work runs on, see work.h
  m.def("prefer_huge_pages",
        [](uintptr_t begin, int64_t bytes) { prefer_huge_pages(reinterpret_cast<void*>(begin), bytes); });
}

}  // namespace murf
