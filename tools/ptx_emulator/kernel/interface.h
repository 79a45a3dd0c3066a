/* What the driver (driver/, C++) and a translated kernel (C) share. */
#pragma once
#include <stdint.h>
typedef uint8_t u8;
typedef uint16_t u16;
typedef uint32_t u32;
typedef uint64_t u64;
typedef int8_t s8;
typedef int16_t s16;
typedef int32_t s32;
typedef int64_t s64;
typedef float f32;
typedef double f64;

#define SHARED_WINDOW (1ull << 40) /* generic addresses of shared memory begin here */
#define MOST_COPIES 256            /* of a thread, that have not been waited for */

typedef struct {
  u64 base, end;
  u32 alive, device;
} Allocation;

struct Copy { /* cp.async */
  u64 to, from;
  u32 size, source;
  s32 group, line;
};

typedef struct { /* of the block that runs */
  u32 tid[3], ntid[3], ctaid[3], nctaid[3];
  u32 lane, warp, linear;
  char *stack, *stack_end;
  struct Copy copies[MOST_COPIES];
  s32 copy_count, group;
} Thread;

typedef enum { READ, WRITE, ATOMIC } Access;

/* What the lanes of a mask do at once: `in` and `out` are what each lane brings, null for the others. */
typedef void (*Collective)(u32 mask, void **in, void **out);

typedef struct {
  u64 arena, arena_size; /* all memory of the device lies in it */
  u32 *owners;           /* for each 256 bytes of it: number of the allocation, 0 for none */
  Allocation *allocations;
  u8 *shared;    /* of the block that runs */
  u8 *variables; /* for each byte of it: number of the array, 0 for a gap */
  u32 shared_size;
  u32 shared_races, global_races; /* whether they are looked for */
  void (*fault)(Thread *, int line, const char *kind, u64 address, u32 size);
  void (*barrier)(Thread *, int line, u32 number, u32 count);
  void (*collective)(Thread *, int line, u32 mask, int aligned, Collective, void *in, void *out);
  void (*warp_barrier)(Thread *, int line, u32 mask);
  void (*touch_shared)(Thread *, int line, u32 offset, u32 size, Access);
  void (*touch_global)(Thread *, int line, u64 address, u32 size, Access);
  u64 (*clock)(void);
} Runtime;

typedef struct {
  const char *name;
  void (*run)(Thread *, void **parameters);
  u32 parameters, most_threads, registers;
  const u16 *sizes; /* of the parameters */
} KernelInfo;

typedef struct {
  u32 offset, size;
} SharedInfo;

typedef struct {
  const char *name;
  u64 size;
  const u8 *content;
  u64 *address; /* the driver writes it */
} GlobalInfo;

typedef struct { /* lists end with zeros */
  const KernelInfo *kernels;
  const SharedInfo *shared;
  const GlobalInfo *globals;
  u32 shared_size;
  Runtime **runtime; /* the driver writes it */
} ModuleInfo;
