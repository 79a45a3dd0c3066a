// The library itself, devices, contexts and names of errors.
#include <dlfcn.h>
#include <stdio.h>
#include <string.h>

#include <algorithm>

#include "driver.h"

static const int MOST_DEVICES = 8;
static CUctx_st contexts[MOST_DEVICES] = {{0, 0}, {1, 0}, {2, 0}, {3, 0}, {4, 0}, {5, 0}, {6, 0}, {7, 0}};
static thread_local std::vector<CUcontext> stack;

CUcontext context_of(int device) { return &contexts[device]; }
CUcontext current_context() { return stack.empty() ? nullptr : stack.back(); }
u32 current_device() { return current_context() ? current_context()->device : 0; }
int device_count() { return std::clamp<long>(option("DEVICES", 1), 1, MOST_DEVICES); }

// Makes Python's numba-cuda link to PTX. It is done here, however the process was started, since everything that launches
// takes a context first. It must not hold the lock, because another thread may hold Python's and come here.
static void patch_python() {
  auto ensure = (int (*)())dlsym(RTLD_DEFAULT, "PyGILState_Ensure");
  auto let_go = (void (*)(int))dlsym(RTLD_DEFAULT, "PyGILState_Release");
  auto run = (int (*)(const char *))dlsym(RTLD_DEFAULT, "PyRun_SimpleString");
  if (!ensure || !let_go || !run) return;
  int state = ensure();
  run("import runpy as _runpy; _runpy.run_path('" LINKER "'); del _runpy");
  let_go(state);
}

API cuInit(unsigned) {
  LOCK;
  static bool done = false;
  if (!done) reserve_memory();
  done = true;
  return CUDA_SUCCESS;
}
ANSWER(cuDriverGetVersion, (int *v), *v = 13000)
ANSWER(cuDeviceGet, (CUdevice *d, int n), if (n < 0 || n >= device_count()) return CUDA_ERROR_INVALID_DEVICE; *d = n)
ANSWER(cuDeviceGetCount, (int *n), *n = device_count())
ANSWER(cuDeviceGetName, (char *name, int n, CUdevice), snprintf(name, n, "PTX emulator on the CPU"))
ANSWER(cuDeviceGetUuid, (CUuuid *u, CUdevice d), memset(u, 7 + d, sizeof *u))
ANSWER(cuDeviceTotalMem_v2, (size_t *n, CUdevice), *n = MEMORY)
ANSWER(cuDeviceGetPCIBusId, (char *p, int n, CUdevice d), snprintf(p, n, "0000:%02x:00.0", d))
ANSWER(cuDeviceCanAccessPeer, (int *v, CUdevice, CUdevice), *v = 0)

// As an H100 reports, except for what options override.
API cuDeviceGetAttribute(int *v, CUdevice_attribute which, CUdevice) {
  static const std::map<int, int> values{
      {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_BLOCK, 1024},
      {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_X, 1024},
      {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Y, 1024},
      {CU_DEVICE_ATTRIBUTE_MAX_BLOCK_DIM_Z, 64},
      {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_X, 0x7fffffff},
      {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Y, 65535},
      {CU_DEVICE_ATTRIBUTE_MAX_GRID_DIM_Z, 65535},
      {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK, 49152},
      {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN, 232448},
      {CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR, 233472},
      {CU_DEVICE_ATTRIBUTE_TOTAL_CONSTANT_MEMORY, 65536},
      {CU_DEVICE_ATTRIBUTE_WARP_SIZE, 32},
      {CU_DEVICE_ATTRIBUTE_MAX_PITCH, 0x7fffffff},
      {CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_BLOCK, 65536},
      {CU_DEVICE_ATTRIBUTE_MAX_REGISTERS_PER_MULTIPROCESSOR, 65536},
      {CU_DEVICE_ATTRIBUTE_CLOCK_RATE, 1755000},
      {CU_DEVICE_ATTRIBUTE_MEMORY_CLOCK_RATE, 2619000},
      {CU_DEVICE_ATTRIBUTE_GLOBAL_MEMORY_BUS_WIDTH, 5120},
      {CU_DEVICE_ATTRIBUTE_L2_CACHE_SIZE, 52428800},
      {CU_DEVICE_ATTRIBUTE_MAX_THREADS_PER_MULTIPROCESSOR, 2048},
      {CU_DEVICE_ATTRIBUTE_MAX_BLOCKS_PER_MULTIPROCESSOR, 32},
      {CU_DEVICE_ATTRIBUTE_UNIFIED_ADDRESSING, 1},
      {CU_DEVICE_ATTRIBUTE_CAN_MAP_HOST_MEMORY, 1},
      {CU_DEVICE_ATTRIBUTE_CONCURRENT_KERNELS, 1},
      {CU_DEVICE_ATTRIBUTE_MANAGED_MEMORY, 1},
      {CU_DEVICE_ATTRIBUTE_CONCURRENT_MANAGED_ACCESS, 1},
      {CU_DEVICE_ATTRIBUTE_ASYNC_ENGINE_COUNT, 1},
  };
  auto found = values.find(which);
  *v = found == values.end() ? 0 : found->second;
  if (which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR) *v = option("CAPABILITY", 90) / 10;
  if (which == CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR) *v = option("CAPABILITY", 90) % 10;
  if (which == CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT) *v = option("MULTIPROCESSORS", 4);
  return CUDA_SUCCESS;
}

ANSWER(cuDevicePrimaryCtxRetain, (CUcontext *c, CUdevice d), patch_python(); contexts[d].uses++; *c = context_of(d))
ANSWER(cuDevicePrimaryCtxRelease_v2, (CUdevice d), contexts[d].uses--)
ANSWER(cuDevicePrimaryCtxReset_v2, (CUdevice))
ANSWER(cuDevicePrimaryCtxSetFlags_v2, (CUdevice, unsigned))
ANSWER(cuDevicePrimaryCtxGetState, (CUdevice d, unsigned *f, int *on), *f = 0; *on = contexts[d].uses > 0)
ANSWER(cuCtxGetCurrent, (CUcontext *c), *c = current_context())
ANSWER(cuCtxSetCurrent, (CUcontext c), if (!stack.empty()) stack.pop_back(); if (c) stack.push_back(c))
ANSWER(cuCtxPushCurrent_v2, (CUcontext c), if (!c) return CUDA_ERROR_INVALID_CONTEXT; stack.push_back(c))
ANSWER(cuCtxPopCurrent_v2, (CUcontext *c), NEEDS_CONTEXT; if (c) *c = stack.back(); stack.pop_back())
ANSWER(cuCtxGetDevice, (CUdevice *d), NEEDS_CONTEXT; *d = current_device())
ANSWER(cuCtxGetDevice_v2, (CUdevice *d, CUcontext c), *d = c ? c->device : current_device())
ANSWER(cuCtxGetFlags, (unsigned *f), *f = 0)
ANSWER(cuCtxGetId, (CUcontext c, unsigned long long *id), *id = 1 + (c ? c->device : current_device()))
ANSWER(cuCtxGetApiVersion, (CUcontext, unsigned *v), *v = 13000)
ANSWER(cuCtxSynchronize, (), NEEDS_CONTEXT; wait_for_all(); TELLS_ERRORS)
ANSWER(cuCtxSynchronize_v2, (CUcontext), wait_for_all(); TELLS_ERRORS)
ANSWER(cuCtxGetStreamPriorityRange, (int *least, int *greatest), *least = 0; *greatest = -5)
ANSWER(cuCtxGetLimit, (size_t *v, CUlimit), *v = 1024)
ANSWER(cuCtxSetLimit, (CUlimit, size_t))
ANSWER(cuCtxSetCacheConfig, (CUfunc_cache))
ANSWER(cuProfilerStart, ())
ANSWER(cuProfilerStop, ())

static const char *error_name(CUresult error) {
  switch (error) {
    case CUDA_SUCCESS: return "CUDA_SUCCESS";
    case CUDA_ERROR_INVALID_VALUE: return "CUDA_ERROR_INVALID_VALUE";
    case CUDA_ERROR_OUT_OF_MEMORY: return "CUDA_ERROR_OUT_OF_MEMORY";
    case CUDA_ERROR_INVALID_CONTEXT: return "CUDA_ERROR_INVALID_CONTEXT";
    case CUDA_ERROR_INVALID_PTX: return "CUDA_ERROR_INVALID_PTX";
    case CUDA_ERROR_INVALID_HANDLE: return "CUDA_ERROR_INVALID_HANDLE";
    case CUDA_ERROR_ILLEGAL_ADDRESS: return "CUDA_ERROR_ILLEGAL_ADDRESS";
    case CUDA_ERROR_MISALIGNED_ADDRESS: return "CUDA_ERROR_MISALIGNED_ADDRESS";
    case CUDA_ERROR_LAUNCH_TIMEOUT: return "CUDA_ERROR_LAUNCH_TIMEOUT";
    case CUDA_ERROR_LAUNCH_FAILED: return "CUDA_ERROR_LAUNCH_FAILED";
    default: return "an error of CUDA";
  }
}
ANSWER(cuGetErrorName, (CUresult error, const char **text), *text = error_name(error))
ANSWER(cuGetErrorString, (CUresult error, const char **text), *text = error_name(error))

API cuGetProcAddress_v2(const char *name, void **f, int version, cuuint64_t, CUdriverProcAddressQueryResult *status) {
  static void *self = [] {
    Dl_info info;
    dladdr((void *)&cuInit, &info);
    return dlopen(info.dli_fname, RTLD_NOW | RTLD_NOLOAD);
  }();
  static const std::string first_versions[] = {"cuCtxGetDevice", "cuCtxSynchronize"};  // with different arguments
  bool first = std::count(std::begin(first_versions), std::end(first_versions), name);
  first |= !strcmp(name, "cuStreamGetCtx") && version < 12050;
  *f = first ? nullptr : dlsym(self, (std::string(name) + "_v2").c_str());
  if (!*f) *f = dlsym(self, name);
  if (status) *status = *f ? CU_GET_PROC_ADDRESS_SUCCESS : CU_GET_PROC_ADDRESS_SYMBOL_NOT_FOUND;
  return *f ? CUDA_SUCCESS : CUDA_ERROR_NOT_FOUND;
}
