/* A stand-in for the CUDA driver: takes what Triton's launchers hand to the real one, and keeps the last launch.
 *
 * Only what Triton 3.6 calls to load and to launch a kernel is here. Pointers are believed, nothing runs.
 */
#include <stdint.h>
#include <string.h>

typedef int CUresult;
typedef struct {
  unsigned grid[3], block[3], shared_bytes;
  void *stream, *attributes;
  unsigned attribute_count;
} LaunchConfig;

enum { MOST = 512 };
static unsigned launches, shape[7], sizes[MOST], expected;
static unsigned char values[MOST][8];

/* How many parameters the next launch has, and of how many bytes each: a driver knows that from the kernel. */
void stand_in_expect(unsigned count, const unsigned *bytes) {
  expected = count < MOST ? count : MOST;
  memcpy(sizes, bytes, expected * sizeof *bytes);
}
unsigned stand_in_launches(void) { return launches; }
unsigned stand_in_shape(unsigned i) { return shape[i]; }
uint64_t stand_in_value(unsigned i) {
  uint64_t value = 0;
  memcpy(&value, values[i], sizes[i]);
  return value;
}

CUresult cuLaunchKernelEx(const LaunchConfig *config, void *function, void **parameters, void **extra) {
  memcpy(shape, config->grid, sizeof config->grid);
  memcpy(shape + 3, config->block, sizeof config->block);
  shape[6] = config->shared_bytes;
  for (unsigned i = 0; i < expected; i++) memcpy(values[i], parameters[i], sizes[i]);
  launches++;
  return 0;
}
CUresult cuPointerGetAttribute(void *result, int attribute, unsigned long long pointer) {
  memcpy(result, &pointer, sizeof pointer);
  return 0;
}

CUresult cuModuleLoadData(void **module, const void *image) { *module = (void *)image; return 0; }
CUresult cuModuleGetFunction(void **function, void *module, const char *name) { *function = module; return 0; }
CUresult cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? 1024 : 0; /* threads per block at most; no registers, no spills */
  return 0;
}
CUresult cuFuncSetAttribute(void *function, int attribute, int value) { return 0; }
CUresult cuFuncSetCacheConfig(void *function, int config) { return 0; }
CUresult cuDeviceGet(int *device, int ordinal) { *device = ordinal; return 0; }
CUresult cuDeviceGetAttribute(int *value, int attribute, int device) { *value = 232448; return 0; }
CUresult cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return 0; }
CUresult cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
CUresult cuCtxSetCurrent(void *context) { return 0; }
CUresult cuCtxGetLimit(size_t *value, int limit) { *value = 0; return 0; }
CUresult cuCtxSetLimit(int limit, size_t value) { return 0; }
CUresult cuGetErrorString(CUresult error, const char **text) { *text = "stand-in"; return 0; }
