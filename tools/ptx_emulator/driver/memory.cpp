// Device memory: a reserved range of addresses. There are gaps between allocations, no address is used twice, and new memory
// is full of NaN.
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <memory>

#include "driver.h"

static const u64 ARENA = 0x100000000000ull, ARENA_SIZE = 64ull << 30, MOST_ALLOCATIONS = 1u << 24;
static const u64 GAP = 1024, PAGE = 4096;
Runtime runtime;
static u32 allocations;
static u64 next_free, live_bytes;

static void *reserve(u64 at, u64 size) {
  int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | (at ? MAP_FIXED_NOREPLACE : 0);
  void *made = mmap((void *)at, size, PROT_READ | PROT_WRITE, flags, -1, 0);
  if (made == MAP_FAILED) {
    perror("emulator: mmap");
    abort();
  }
  return made;
}

void reserve_memory() {
  runtime.arena = (u64)reserve(ARENA, ARENA_SIZE);
  runtime.arena_size = ARENA_SIZE;
  runtime.owners = (u32 *)reserve(0, ARENA_SIZE / 256 * sizeof(u32));
  runtime.allocations = (Allocation *)reserve(0, MOST_ALLOCATIONS * sizeof(Allocation));
  next_free = ARENA + PAGE;
}

CUresult allocate(u64 *address, u64 size) {
  LOCK;
  if (!size) return CUDA_ERROR_INVALID_VALUE;
  if (live_bytes + size > MEMORY || next_free + size + 2 * PAGE > ARENA + ARENA_SIZE || allocations + 1 >= MOST_ALLOCATIONS)
    return CUDA_ERROR_OUT_OF_MEMORY;
  u32 number = ++allocations;
  u64 at = next_free;
  runtime.allocations[number] = {at, at + size, 1, current_device()};
  for (u64 i = (at - ARENA) >> 8; i <= (at + size - 1 - ARENA) >> 8; i++) runtime.owners[i] = number;
  next_free = (at + size + GAP + 255) & ~255ull;
  if (next_free % 512 == 0) next_free += 256;  // no better aligned than CUDA promises
  memset((void *)at, 0xff, size);
  live_bytes += size;
  *address = at;
  return CUDA_SUCCESS;
}

Allocation *owner(u64 a) {
  if (a - ARENA >= ARENA_SIZE) return nullptr;
  Allocation *m = &runtime.allocations[runtime.owners[(a - ARENA) >> 8]];
  return m->alive && a >= m->base && a < m->end ? m : nullptr;
}

static bool inside(u64 a, u64 size) {
  Allocation *m = owner(a);
  return !size || (m && a + size <= m->end);
}

static CUresult release(u64 a) {
  LOCK;
  if (!a) return CUDA_SUCCESS;
  Allocation *m = owner(a);
  if (!m || m->base != a) {
    report("cuMemFree of %#lx, which is no allocation", a);
    return CUDA_ERROR_INVALID_VALUE;
  }
  m->alive = 0;
  live_bytes -= m->end - m->base;
  u64 low = (m->base + PAGE - 1) & ~(PAGE - 1), high = m->end & ~(PAGE - 1);
  if (high > low) madvise((void *)low, high - low, MADV_DONTNEED);
  return CUDA_SUCCESS;
}

std::string nearest_allocation(u64 a) {
  if (a - ARENA >= ARENA_SIZE) return "no memory of the device";
  u32 best = 0;
  u64 least = ~0ull;
  for (u32 i = 1; i <= allocations; i++) {
    Allocation *m = &runtime.allocations[i];
    u64 distance = a < m->base ? m->base - a : a >= m->end ? a - m->end + 1 : 0;
    if (distance < least) least = distance, best = i;
  }
  Allocation *m = &runtime.allocations[best];
  char text[200];
  snprintf(text, sizeof text, "nearest: allocation %u of %lu bytes%s, offset %ld", best, m->end - m->base, m->alive ? "" : " (freed)",
           (long)(a - m->base));
  return text;
}

std::vector<u32> hide_others(u32 device) {
  std::vector<u32> hidden;
  for (u32 i = 1; i <= allocations; i++) {
    Allocation *m = &runtime.allocations[i];
    if (m->alive && m->device != device) m->alive = 0, hidden.push_back(i);
  }
  return hidden;
}

void show(const std::vector<u32> &hidden) {
  for (u32 i : hidden) runtime.allocations[i].alive = 1;
}

ANSWER(cuMemGetInfo_v2, (size_t *free, size_t *total), NEEDS_CONTEXT; *total = MEMORY; *free = MEMORY - live_bytes)
API cuMemAlloc_v2(CUdeviceptr *p, size_t n) {
  NEEDS_CONTEXT;
  TELLS_ERRORS;
  u64 made = 0;
  CUresult result = allocate(&made, n);
  *p = made;
  return result;
}
API cuMemAllocManaged(CUdeviceptr *p, size_t n, unsigned) { return cuMemAlloc_v2(p, n); }
API cuMemAllocAsync(CUdeviceptr *p, size_t n, CUstream) { return cuMemAlloc_v2(p, n); }
API cuMemFree_v2(CUdeviceptr p) {
  NEEDS_CONTEXT;
  wait_for_all();
  return release(p);
}
ANSWER(cuMemFreeAsync, (CUdeviceptr p, CUstream s), NEEDS_STREAM(s); submit(s, [p] { release(p); }))
API cuMemHostAlloc(void **p, size_t n, unsigned) {
  u64 made = 0;
  CUresult result = allocate(&made, n ? n : 1);
  *p = (void *)made;
  return result;
}
API cuMemAllocHost_v2(void **p, size_t n) { return cuMemHostAlloc(p, n, 0); }
API cuMemFreeHost(void *p) { return release((u64)p); }
ANSWER(cuMemHostGetDevicePointer_v2, (CUdeviceptr *d, void *p, unsigned), *d = (CUdeviceptr)p)
ANSWER(cuMemHostRegister_v2, (void *, size_t, unsigned))
ANSWER(cuMemHostUnregister, (void *))
API cuMemGetAddressRange_v2(CUdeviceptr *base, size_t *n, CUdeviceptr p) {
  Allocation *m = owner(p);
  if (!m) return CUDA_ERROR_NOT_FOUND;
  if (base) *base = m->base;
  if (n) *n = m->end - m->base;
  return CUDA_SUCCESS;
}

static CUresult attribute(void *data, CUpointer_attribute which, CUdeviceptr p) {
  Allocation *m = owner(p);
  switch ((int)which) {
    case CU_POINTER_ATTRIBUTE_CONTEXT: *(CUcontext *)data = m ? context_of(m->device) : nullptr; break;
    case CU_POINTER_ATTRIBUTE_MEMORY_TYPE: *(unsigned *)data = m ? CU_MEMORYTYPE_DEVICE : 0; break;
    case CU_POINTER_ATTRIBUTE_DEVICE_POINTER: *(CUdeviceptr *)data = m ? p : 0; break;
    case CU_POINTER_ATTRIBUTE_HOST_POINTER: *(void **)data = nullptr; break;
    case CU_POINTER_ATTRIBUTE_IS_MANAGED: *(unsigned *)data = 0; break;
    case CU_POINTER_ATTRIBUTE_DEVICE_ORDINAL: *(int *)data = m ? (int)m->device : -2; break;
    case CU_POINTER_ATTRIBUTE_RANGE_START_ADDR: *(void **)data = m ? (void *)m->base : nullptr; break;
    case CU_POINTER_ATTRIBUTE_RANGE_SIZE: *(size_t *)data = m ? m->end - m->base : 0; break;
    default: return CUDA_ERROR_NOT_SUPPORTED;
  }
  return CUDA_SUCCESS;
}
API cuPointerGetAttribute(void *data, CUpointer_attribute which, CUdeviceptr p) {
  NEEDS_CONTEXT;
  return owner(p) ? attribute(data, which, p) : CUDA_ERROR_INVALID_VALUE;
}
API cuPointerGetAttributes(unsigned n, CUpointer_attribute *which, void **data, CUdeviceptr p) {
  for (unsigned i = 0; i < n; i++)
    if (CUresult result = attribute(data[i], which[i], p)) return result;
  return CUDA_SUCCESS;
}

// Copies. `to_device` and `from_device` say which of the addresses are on the device.
static CUresult copy(u64 to, u64 from, u64 n, bool to_device, bool from_device, CUstream s) {
  LOCK;
  NEEDS_CONTEXT;
  TELLS_ERRORS;
  NEEDS_STREAM(s);
  if ((to_device && !inside(to, n)) || (from_device && !inside(from, n))) {
    report("copy of %lu bytes from %#lx to %#lx leaves an allocation", n, from, to);
    return CUDA_ERROR_INVALID_VALUE;
  }
  if (to_device && from_device) {
    submit(s, [=] { memmove((void *)to, (void *)from, n); });
  } else if (to_device) {  // host memory is read at once, as CUDA does if it is not pinned
    auto data = std::make_shared<std::vector<u8>>((u8 *)from, (u8 *)from + n);
    submit(s, [=] { memcpy((void *)to, data->data(), n); });
  } else {
    wait(s);
    memmove((void *)to, (void *)from, n);
    TELLS_ERRORS;
  }
  return CUDA_SUCCESS;
}
API cuMemcpyHtoDAsync_v2(CUdeviceptr d, const void *p, size_t n, CUstream s) { return copy(d, (u64)p, n, true, false, s); }
API cuMemcpyDtoHAsync_v2(void *d, CUdeviceptr p, size_t n, CUstream s) { return copy((u64)d, p, n, false, true, s); }
API cuMemcpyDtoDAsync_v2(CUdeviceptr d, CUdeviceptr p, size_t n, CUstream s) { return copy(d, p, n, true, true, s); }
API cuMemcpyAsync(CUdeviceptr d, CUdeviceptr p, size_t n, CUstream s) { return copy(d, p, n, owner(d), owner(p), s); }
API cuMemcpyHtoD_v2(CUdeviceptr d, const void *p, size_t n) {
  CUresult result = copy(d, (u64)p, n, true, false, nullptr);
  wait(nullptr);
  return result;
}
API cuMemcpyDtoH_v2(void *d, CUdeviceptr p, size_t n) { return copy((u64)d, p, n, false, true, nullptr); }
API cuMemcpyDtoD_v2(CUdeviceptr d, CUdeviceptr p, size_t n) { return copy(d, p, n, true, true, nullptr); }
API cuMemcpy(CUdeviceptr d, CUdeviceptr p, size_t n) { return cuMemcpyAsync(d, p, n, nullptr); }

template <class T>
static CUresult fill(CUdeviceptr d, T value, size_t n, CUstream s) {
  TELLS_ERRORS;
  NEEDS_STREAM(s);
  if (!inside(d, n * sizeof(T))) return CUDA_ERROR_INVALID_VALUE;
  submit(s, [=] { std::fill_n((T *)d, n, value); });
  return CUDA_SUCCESS;
}
API cuMemsetD8Async(CUdeviceptr d, unsigned char v, size_t n, CUstream s) { return fill<u8>(d, v, n, s); }
API cuMemsetD16Async(CUdeviceptr d, unsigned short v, size_t n, CUstream s) { return fill<u16>(d, v, n, s); }
API cuMemsetD32Async(CUdeviceptr d, unsigned v, size_t n, CUstream s) { return fill<u32>(d, v, n, s); }
API cuMemsetD8_v2(CUdeviceptr d, unsigned char v, size_t n) { return fill<u8>(d, v, n, nullptr); }
API cuMemsetD16_v2(CUdeviceptr d, unsigned short v, size_t n) { return fill<u16>(d, v, n, nullptr); }
API cuMemsetD32_v2(CUdeviceptr d, unsigned v, size_t n) { return fill<u32>(d, v, n, nullptr); }
