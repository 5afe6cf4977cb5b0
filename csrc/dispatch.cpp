#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>

namespace murf {

namespace baseline {
extern const Kernels kernels;
}
#if defined(MURF_X86)
namespace avx2 {
extern const Kernels kernels;
}
namespace avx512 {
extern const Kernels kernels;
}
#endif

namespace {

struct Level {
  const char* name;
  const Kernels* kernels;
  bool runs;
};

const std::vector<Level>& levels() {
  static const std::vector<Level> all = [] {
    std::vector<Level> v{{"baseline", &baseline::kernels, true}};
#if defined(MURF_X86)
    __builtin_cpu_init();
    const bool has_avx2 =
        __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
    v.push_back({"avx2", &avx2::kernels, has_avx2});
    v.push_back({"avx512", &avx512::kernels, has_avx512});
#endif
    return v;
  }();
  return all;
}

const Level& current() {
  const char* wanted = std::getenv("MURF_FAST_CPU");
  const Level* best = nullptr;
  for (const Level& level : levels()) {
    if (!level.runs) continue;
    if (wanted != nullptr && *wanted != '\0' && std::string(wanted) != level.name) continue;
    best = &level;
  }
  if (best == nullptr) {
    std::string message = std::string("murf_fast: MURF_FAST_CPU=") + wanted + " cannot run here; available:";
    for (const std::string& name : available_levels()) message += " " + name;
    throw std::runtime_error(message);
  }
  return *best;
}

}  // namespace

std::vector<std::string> available_levels() {
  std::vector<std::string> names;
  for (const Level& level : levels())
    if (level.runs) names.push_back(level.name);
  return names;
}

const Kernels& current_kernels() { return *current().kernels; }
std::string current_level() { return current().name; }

}  // namespace murf
