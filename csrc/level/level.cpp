// Gathers the kernels of one level into its table.
#include "kernels.h"

namespace murf {
namespace MURF_LEVEL {

const Kernels kernels = {
#define MURF_ENTRY(name, arguments, work) name,
    MURF_KERNELS(MURF_ENTRY)
#undef MURF_ENTRY
};

}  // namespace MURF_LEVEL
}  // namespace murf
