#include "dispatch.h"

#include <cstdlib>
#include <stdexcept>
#if defined(MURF_AMX)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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
#if defined(MURF_AMX)
// Only what multiplies in bfloat16 is compiled for it.
namespace amx {
void dense_attention(DType dtype, DenseAttention attention, int threads);
void pixel_linear(DType dtype, PixelLinear layer, int threads);
void pixel_conv_direct(PixelConv layer, int threads);
}
#endif

namespace {

#if defined(MURF_AMX)
const Kernels& with_tiles() {
  static const Kernels all = [] {
    Kernels k = avx512::kernels;
    k.dense_attention = amx::dense_attention;
    k.pixel_linear = amx::pixel_linear;
    k.pixel_conv_direct = amx::pixel_conv_direct;
    return k;
  }();
  return all;
}

// Linux saves tile registers, 8 KB a thread, only for processes that ask.
bool tiles_permitted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

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
#if defined(MURF_AMX)
    const bool has_amx = has_avx512 && __builtin_cpu_supports("avx512bf16") && __builtin_cpu_supports("amx-tile") &&
                         __builtin_cpu_supports("amx-bf16");
    v.push_back({"amx", &with_tiles(), has_amx && tiles_permitted()});
#endif
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
