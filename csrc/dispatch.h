// Chooses the instruction-set level at run time.
#pragma once

#include <string>
#include <vector>

#include "kernels.h"

namespace murf {

// Levels this binary holds and this processor runs, best last.
std::vector<std::string> available_levels();

// The best level, or the one that MURF_FAST_CPU names; throws std::runtime_error when that one cannot run here.
// Read at every call, so that tests can switch within one process.
const Kernels& current_kernels();
std::string current_level();

}  // namespace murf
