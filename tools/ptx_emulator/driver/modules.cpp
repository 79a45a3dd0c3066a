// Modules and kernels: PTX is translated to C, compiled and loaded. Translations are stored in files named by a hash of the PTX.
#include <dlfcn.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

#include <algorithm>

#include "driver.h"

static const u32 MOST_SHARED = 48 << 10;  // bytes per block
static std::vector<CUkern_st *> all_kernels;

static u64 hash(const char *data, size_t size) {  // FNV-1a
  u64 h = 14695981039346656037ull;
  for (size_t i = 0; i < size; i++) h = (h ^ (u8)data[i]) * 1099511628211ull;
  return h;
}

// Leaves base.ptx (reports refer to its lines), base.c and base.so.
static bool translate(const char *image, size_t size, const std::string &base) {
  std::string temporary = base + "." + std::to_string(getpid()), source = base + ".ptx";
  FILE *file = fopen(temporary.c_str(), "wb");
  if (!file || fwrite(image, 1, size, file) != size || fclose(file) || rename(temporary.c_str(), source.c_str())) return false;
  std::string command = "cd '" ROOT "' && env -u LD_PRELOAD -u PYTHONPATH -u PYTHONSAFEPATH ";
  command += "'" PYTHON "' -S -m tools.ptx_emulator.translator '" + source + "' '" + base + ".so' 2>&1";
  FILE *translator = popen(command.c_str(), "r");
  if (!translator) return false;
  std::string said;
  char part[4096];
  while (fgets(part, sizeof part, translator)) said += part;
  if (!pclose(translator)) return true;
  report("%s", said.substr(0, said.find_last_not_of("\n") + 1).c_str());
  return false;
}

static void mark_shared(CUlib_st *library) {
  library->variables.assign(library->module->shared_size, 0);
  int number = 0;
  for (const SharedInfo *array = library->module->shared; array->size; array++) {
    number = number % 255 + 1;
    memset(&library->variables[array->offset], number, array->size);
  }
}

static u32 shared_bytes(const CUlib_st *library) {  // as on a GPU, without the emulator's gaps
  u32 total = 0;
  for (const SharedInfo *array = library->module->shared; array->size; array++) total += array->size;
  return total;
}

static void tell_statistics() {
  auto list = all_kernels;
  std::sort(list.begin(), list.end(), [](auto *a, auto *b) { return a->seconds > b->seconds; });
  for (auto *k : list)
    if (k->launches) report("%6lu launches %8.3f s  %.150s", k->launches, k->seconds, k->info->name);
}

static CUresult load(CUlib_st **made, const char *image) {
  LOCK;
  static const bool told_at_exit = option("STATISTICS", 0) && !atexit(tell_statistics);
  (void)told_at_exit;
  static const char elf[] = {0x7f, 'E', 'L', 'F'};
  if (!memcmp(image, elf, 4)) {
    report("machine code was loaded: numba-cuda's linker was not told to make PTX, see linker.py");
    return CUDA_ERROR_INVALID_IMAGE;
  }
  size_t size = strlen(image);
  char name[32];
  snprintf(name, sizeof name, "/%016lx", hash(image, size));
  std::string base = std::string(TRANSLATIONS) + name, object = base + ".so";
  if (access(object.c_str(), R_OK) && !translate(image, size, base)) return CUDA_ERROR_INVALID_PTX;
  void *handle = dlopen(object.c_str(), RTLD_NOW | RTLD_LOCAL);
  if (!handle) {
    report("%s", dlerror());
    return CUDA_ERROR_INVALID_PTX;
  }
  CUlib_st *library = new CUlib_st{(const ModuleInfo *)dlsym(handle, "emulated_module"), base + ".ptx", {}, {}, {}};
  *library->module->runtime = &runtime;
  mark_shared(library);
  if (shared_bytes(library) > MOST_SHARED) {
    report("%u bytes of shared memory", shared_bytes(library));
    return CUDA_ERROR_INVALID_PTX;
  }
  for (const GlobalInfo *variable = library->module->globals; variable->name; variable++) {
    if (CUresult error = allocate(variable->address, variable->size)) return error;
    memcpy((void *)*variable->address, variable->content, variable->size);
    library->globals[variable->name] = {*variable->address, variable->size};
  }
  for (const KernelInfo *info = library->module->kernels; info->name; info++) {
    all_kernels.push_back(new CUkern_st{library, info, 0, 0});
    library->kernels[info->name] = all_kernels.back();
  }
  *made = library;
  return CUDA_SUCCESS;
}

API cuLibraryLoadData(CUlibrary *l, const void *image, CUjit_option *, void **, unsigned, CUlibraryOption *, void **, unsigned) {
  return load((CUlib_st **)l, (const char *)image);
}
ANSWER(cuLibraryUnload, (CUlibrary))
API cuLibraryGetKernel(CUkernel *k, CUlibrary l, const char *name) {
  auto &kernels = ((CUlib_st *)l)->kernels;
  auto found = kernels.find(name);
  if (found == kernels.end()) return CUDA_ERROR_NOT_FOUND;
  *k = (CUkernel)found->second;
  return CUDA_SUCCESS;
}
API cuLibraryGetGlobal(CUdeviceptr *p, size_t *n, CUlibrary l, const char *name) {
  auto &globals = ((CUlib_st *)l)->globals;
  auto found = globals.find(name);
  if (found == globals.end()) return CUDA_ERROR_NOT_FOUND;
  if (p) *p = found->second.first;
  if (n) *n = found->second.second;
  return CUDA_SUCCESS;
}
ANSWER(cuLibraryGetModule, (CUmodule *m, CUlibrary l), *m = (CUmodule)l)
ANSWER(cuLibraryGetKernelCount, (unsigned *n, CUlibrary l), *n = ((CUlib_st *)l)->kernels.size())
API cuModuleLoadData(CUmodule *m, const void *image) { return load((CUlib_st **)m, (const char *)image); }
API cuModuleLoadDataEx(CUmodule *m, const void *image, unsigned, CUjit_option *, void **) { return cuModuleLoadData(m, image); }
ANSWER(cuModuleUnload, (CUmodule))
API cuModuleGetFunction(CUfunction *f, CUmodule m, const char *name) { return cuLibraryGetKernel((CUkernel *)f, (CUlibrary)m, name); }
API cuModuleGetGlobal_v2(CUdeviceptr *p, size_t *n, CUmodule m, const char *name) {
  return cuLibraryGetGlobal(p, n, (CUlibrary)m, name);
}

// A kernel and its function are the same thing here.
ANSWER(cuKernelGetFunction, (CUfunction *f, CUkernel k), *f = (CUfunction)k)
ANSWER(cuKernelGetLibrary, (CUlibrary *l, CUkernel k), *l = (CUlibrary)((CUkern_st *)k)->library)
ANSWER(cuFuncGetModule, (CUmodule *m, CUfunction f), *m = (CUmodule)((CUkern_st *)f)->library)
ANSWER(cuKernelGetName, (const char **n, CUkernel k), *n = ((CUkern_st *)k)->info->name)
ANSWER(cuFuncGetName, (const char **n, CUfunction f), *n = ((CUkern_st *)f)->info->name)
API cuKernelGetParamInfo(CUkernel k, size_t number, size_t *offset, size_t *size) {
  const KernelInfo *info = ((CUkern_st *)k)->info;
  if (number >= info->parameters) return CUDA_ERROR_INVALID_VALUE;
  size_t at = 0;
  for (size_t i = 0; i <= number; i++) {
    size_t align = std::min<size_t>(info->sizes[i], 8);
    *offset = (at + align - 1) / align * align;
    at = *offset + info->sizes[i];
  }
  if (size) *size = info->sizes[number];
  return CUDA_SUCCESS;
}
API cuFuncGetParamInfo(CUfunction f, size_t number, size_t *offset, size_t *size) {
  return cuKernelGetParamInfo((CUkernel)f, number, offset, size);
}
API cuFuncGetAttribute(int *v, CUfunction_attribute which, CUfunction f) {
  auto *k = (CUkern_st *)f;
  switch ((int)which) {
    case CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK: *v = k->info->most_threads; break;
    case CU_FUNC_ATTRIBUTE_SHARED_SIZE_BYTES: *v = shared_bytes(k->library); break;
    case CU_FUNC_ATTRIBUTE_NUM_REGS: *v = k->info->registers; break;
    case CU_FUNC_ATTRIBUTE_PTX_VERSION:
    case CU_FUNC_ATTRIBUTE_BINARY_VERSION: *v = option("CAPABILITY", 90); break;
    default: *v = 0;
  }
  return CUDA_SUCCESS;
}
API cuKernelGetAttribute(int *v, CUfunction_attribute which, CUkernel k, CUdevice) {
  return cuFuncGetAttribute(v, which, (CUfunction)k);
}
ANSWER(cuFuncSetAttribute, (CUfunction, CUfunction_attribute, int))
ANSWER(cuKernelSetAttribute, (CUfunction_attribute, int, CUkernel, CUdevice))
ANSWER(cuFuncSetCacheConfig, (CUfunction, CUfunc_cache))
ANSWER(cuKernelSetCacheConfig, (CUkernel, CUfunc_cache, CUdevice))
ANSWER(cuFuncLoad, (CUfunction))
ANSWER(cuFuncIsLoaded, (CUfunctionLoadingState *s, CUfunction), *s = CU_FUNCTION_LOADING_STATE_LOADED)
ANSWER(cuOccupancyMaxActiveBlocksPerMultiprocessor, (int *n, CUfunction, int threads, size_t),
       *n = std::max(1, 2048 / std::max(threads, 1)))
API cuOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *n, CUfunction f, int threads, size_t shared, unsigned) {
  return cuOccupancyMaxActiveBlocksPerMultiprocessor(n, f, threads, shared);
}
API cuOccupancyMaxPotentialBlockSize(int *blocks, int *threads, CUfunction f, CUoccupancyB2DSize, size_t, int) {
  *blocks = option("MULTIPROCESSORS", 4), *threads = ((CUkern_st *)f)->info->most_threads;
  return CUDA_SUCCESS;
}
