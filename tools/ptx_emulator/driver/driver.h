// Shared by the files of the driver. The driver's functions, API(..), do what CUDA's documentation says.
#pragma once
#include <cuda.h>
#include <deque>
#include <functional>
#include <map>
#include <mutex>
#include <string>
#include <vector>

#include "../kernel/interface.h"

#define API extern "C" __attribute__((visibility("default"))) CUresult
#define ANSWER(NAME, ARGUMENTS, ...) \
  API NAME ARGUMENTS { \
    __VA_ARGS__; \
    return CUDA_SUCCESS; \
  }
// At the start of functions: one thread at a time; a context must be current; a kernel's error is reported once, by the
// next call.
#define LOCK std::lock_guard<std::recursive_mutex> guard(the_lock)
#define NEEDS_CONTEXT \
  do { \
    if (!current_context()) return CUDA_ERROR_INVALID_CONTEXT; \
  } while (0)
#define TELLS_ERRORS \
  do { \
    if (CUresult error = take_error()) return error; \
  } while (0)
#define NEEDS_STREAM(S) \
  do { \
    if (!is_stream(S)) return CUDA_ERROR_INVALID_HANDLE; \
  } while (0)

extern std::recursive_mutex the_lock;
extern Runtime runtime;

// reports.cpp
long option(const char *name, long otherwise);  // $PTX_EMULATOR_name
const char *text_option(const char *name);      // "" if it is not set
void report(const char *format, ...) __attribute__((format(printf, 1, 2)));
void stop(CUresult error);  // the running kernel
CUresult take_error();
std::string source_line(int line);  // of the running kernel
std::string place(int line);        // and its location
void fault(Thread *t, int line, const char *kind, u64 address, u32 size);

// memory.cpp
const u64 MEMORY = 8ull << 30;  // bytes per device
void reserve_memory();
CUresult allocate(u64 *address, u64 size);
Allocation *owner(u64 address);                 // the live allocation there, or null
std::string nearest_allocation(u64 address);    // in words
std::vector<u32> hide_others(u32 device);       // memory of other devices, until shown again
void show(const std::vector<u32> &allocations);

// contexts.cpp
struct CUctx_st { int device, uses; };
CUcontext context_of(int device);
CUcontext current_context();
u32 current_device();
int device_count();

// streams.cpp
bool is_stream(CUstream stream);
int device_of(CUstream stream);  // -1: any
void submit(CUstream stream, std::function<void()> work);
void wait(CUstream stream);
void wait_for_all();
double now();  // seconds

// modules.cpp
struct CUlib_st;
struct CUkern_st {
  CUlib_st *library;
  const KernelInfo *info;
  u64 launches;
  double seconds;
};
struct CUlib_st {
  const ModuleInfo *module;
  std::string source;  // the PTX file
  std::map<std::string, CUkern_st *> kernels;
  std::vector<u8> variables;  // see Runtime
  std::map<std::string, std::pair<u64, u64>> globals;  // address, size
};

// blocks.cpp
struct Running {
  CUkern_st *kernel;
  void **parameters;
  bool stopped;
  u32 block, phase;              // phases end at barriers
  std::vector<u32> warp_phases;  // which end at barriers of the warp
};
extern Running running;
void start_blocks();
void run_blocks(CUkern_st *kernel, const u32 grid[3], const u32 block[3], std::vector<std::vector<u8>> &parameters);
void yield();

// races.cpp
void start_races();  // once
void clear_races();  // before each kernel
bool told_before(const void *kernel, int line, int other);
