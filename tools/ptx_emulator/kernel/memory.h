/* Addresses: each function checks an access and returns where it goes. */
#pragma once
#define UNLIKELY(x) __builtin_expect(!!(x), 0)

static inline void *memory(Thread *t, int line, u64 a, u32 size, Access access) {
  if (UNLIKELY(a & (size - 1))) runtime->fault(t, line, "misaligned access to global memory", a, size);
  u64 offset = a - runtime->arena;
  if (UNLIKELY(offset >= runtime->arena_size)) runtime->fault(t, line, "access outside of device memory", a, size);
  const Allocation *m = &runtime->allocations[runtime->owners[offset >> 8]];
  if (UNLIKELY(a < m->base || a + size > m->end || !m->alive))
    runtime->fault(t, line, "access outside of an allocation", a, size);
  if (UNLIKELY(runtime->global_races)) runtime->touch_global(t, line, a, size, access);
  return (void *)a;
}

static inline void *shared(Thread *t, int line, u64 a, u32 size, Access access) {
  if (UNLIKELY(a & (size - 1))) runtime->fault(t, line, "misaligned access to shared memory", a, size);
  const u8 *array = runtime->variables;
  const u32 end = runtime->shared_size;
  if (UNLIKELY(a >= end || a + size > end || !array[a] || array[a] != array[a + size - 1]))
    runtime->fault(t, line, "access outside of a shared array", a, size);
  if (UNLIKELY(runtime->shared_races)) runtime->touch_shared(t, line, (u32)a, size, access);
  return runtime->shared + a;
}

static inline void *local(Thread *t, int line, u64 a, u32 size, Access access) {
  if (a & (size - 1)) runtime->fault(t, line, "misaligned access to local memory", a, size);
  if ((char *)a < t->stack || (char *)a + size > t->stack_end)
    runtime->fault(t, line, "access outside of local memory", a, size);
  return (void *)a;
}

static inline void *generic(Thread *t, int line, u64 a, u32 size, Access access) {
  if (a - SHARED_WINDOW < (1u << 24)) return shared(t, line, a - SHARED_WINDOW, size, access);
  if ((char *)a >= t->stack && (char *)a < t->stack_end) return local(t, line, a, size, access);
  return memory(t, line, a, size, access);
}

/* cp.async is done as late as allowed, when it is waited for: a missing wait shows as old content, which is NaN at first */
static inline void copy_async(Thread *t, int line, u64 to, u64 from, u32 size, u32 source) {
  shared(t, line, to, size, WRITE);
  if (from & (size - 1)) runtime->fault(t, line, "misaligned source of cp.async", from, size);
  if (source > size) runtime->fault(t, line, "source size of cp.async", from, source);
  if (t->copy_count == MOST_COPIES) runtime->fault(t, line, "more cp.async at once than are emulated", from, size);
  t->copies[t->copy_count++] = (struct Copy){to, from, size, source, t->group, line};
}

static inline void copy_wait(Thread *t, int keep) { /* for all groups but the newest `keep` */
  int left = 0;
  for (int i = 0; i < t->copy_count; i++) {
    struct Copy c = t->copies[i];
    if (c.group >= t->group - keep) {
      t->copies[left++] = c;
      continue;
    }
    u8 *to = shared(t, c.line, c.to, c.size, WRITE);
    for (u32 k = 0; k < c.source; k += 4) memcpy(to + k, memory(t, c.line, c.from + k, 4, READ), 4);
    memset(to + c.source, 0, c.size - c.source);
  }
  t->copy_count = left;
}
