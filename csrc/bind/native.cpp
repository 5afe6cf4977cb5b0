// The bindings as one translation unit: pybind11's headers alone take as long to compile as ten kernels.
#include "arguments.cpp"
#include "module.cpp"
#include "structs.cpp"
#include "tables.cpp"
