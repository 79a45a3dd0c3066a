// Launches: their checks, and how they enter a stream.
#include <array>
#include <memory>

#include "driver.h"

using Three = std::array<u32, 3>;
static const u32 REGISTERS = 65536;  // per multiprocessor

static CUresult check(const CUkern_st *k, const Three &grid, const Three &block, u32 dynamic_shared, bool extra, CUstream stream) {
  u64 threads = (u64)block[0] * block[1] * block[2];
  const char *name = k->info->name;
  if (!threads || threads > 1024 || block[2] > 64 || !grid[0] || !grid[1] || !grid[2] || grid[0] > 0x7fffffff ||
      grid[1] > 65535 || grid[2] > 65535) {
    report("launch of (%u, %u, %u) blocks of (%u, %u, %u) threads: %s", grid[0], grid[1], grid[2], block[0], block[1], block[2], name);
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (threads > k->info->most_threads) {
    report("%lu threads of a block, more than the launch bounds: %s", threads, name);
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (k->info->registers * ((threads + 31) & ~31ull) > REGISTERS) {
    report("%u registers times %lu threads: %s", k->info->registers, threads, name);
    return CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES;
  }
  if (extra || dynamic_shared) {
    report("dynamic shared memory and parameters in a buffer are not emulated: %s", name);
    return CUDA_ERROR_NOT_SUPPORTED;
  }
  if (device_of(stream) >= 0 && device_of(stream) != (int)current_device()) {
    report("launch on a stream of another device: %s", name);
    return CUDA_ERROR_INVALID_HANDLE;
  }
  return CUDA_SUCCESS;
}

static CUresult launch(CUkern_st *k, Three grid, Three block, u32 dynamic_shared, void **parameters, void **extra, CUstream stream) {
  LOCK;
  TELLS_ERRORS;
  NEEDS_CONTEXT;
  NEEDS_STREAM(stream);
  if (CUresult error = check(k, grid, block, dynamic_shared, extra, stream)) return error;
  static const bool nothing = option("NOOP", 0), several = device_count() > 1;
  k->launches++;
  if (nothing) return CUDA_SUCCESS;
  if (!runtime.barrier) start_blocks();
  auto values = std::make_shared<std::vector<std::vector<u8>>>();  // a copy, as the caller may change its own after the call
  for (u32 i = 0; i < k->info->parameters; i++)
    values->emplace_back((u8 *)parameters[i], (u8 *)parameters[i] + k->info->sizes[i]);
  submit(stream, [=, device = current_device()] {
    auto hidden = several ? hide_others(device) : std::vector<u32>();
    run_blocks(k, grid.data(), block.data(), *values);
    show(hidden);
  });
  return CUDA_SUCCESS;
}

API cuLaunchKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz, unsigned shared,
                   CUstream s, void **parameters, void **extra) {
  return launch((CUkern_st *)f, {gx, gy, gz}, {bx, by, bz}, shared, parameters, extra, s);
}
API cuLaunchKernelEx(const CUlaunchConfig *c, CUfunction f, void **parameters, void **extra) {
  return launch((CUkern_st *)f, {c->gridDimX, c->gridDimY, c->gridDimZ}, {c->blockDimX, c->blockDimY, c->blockDimZ},
                c->sharedMemBytes, parameters, extra, c->hStream);
}
API cuLaunchCooperativeKernel(CUfunction f, unsigned gx, unsigned gy, unsigned gz, unsigned bx, unsigned by, unsigned bz,
                              unsigned shared, CUstream s, void **parameters) {
  return launch((CUkern_st *)f, {gx, gy, gz}, {bx, by, bz}, shared, parameters, nullptr, s);
}
