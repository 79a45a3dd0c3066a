// Races: two threads access the same memory, one of them writes, and nothing orders them. In shared memory a block barrier
// orders threads, and a warp barrier its lanes. In global memory only a barrier orders the threads of a block, and nothing
// orders two blocks of a launch.
#include <string.h>

#include <unordered_map>

#include "driver.h"

struct Touch {
  u64 launch;
  u32 block, phase, thread, warp_phase;
  int line;
  Access access;
};
struct Cell {
  Touch write, read, other_read;  // the latest; `other_read` is by a different thread than `read`
};
static std::vector<Cell> shared_cells;                 // per byte
static std::unordered_map<u64, Cell> global_cells;     // per two bytes
static u64 launch = 0;

static void tell(Thread *t, const char *space, const char *kind, const Touch &other, u64 where, int line) {
  if (told_before(running.kernel, line, other.line)) return;
  report("race in %s memory, %s, at %#lx: thread %u of block %u, then thread %u of block %u\n  %s\n  %s\n  kernel %.90s", space, kind,
         where, other.thread, other.block, t->linear, running.block, place(other.line).c_str(), place(line).c_str(),
         running.kernel->info->name);
}

template <class Meets>
static void touch(Thread *t, const char *space, Cell &cell, u64 where, const Touch &now, Meets meets) {
  if (now.access == READ) {
    if (meets(cell.write)) tell(t, space, "read after write", cell.write, where, now.line);
    if (cell.read.thread != now.thread || cell.read.block != now.block) cell.other_read = cell.read;
    cell.read = now;
  } else {
    bool both_atomic = now.access == ATOMIC && cell.write.access == ATOMIC;
    if (meets(cell.write) && !both_atomic) tell(t, space, "write after write", cell.write, where, now.line);
    for (const Touch &read : {cell.read, cell.other_read})
      if (meets(read)) tell(t, space, "write after read", read, where, now.line);
    cell.write = now;
  }
}

static Touch touch_of(Thread *t, int line, Access access) {
  return {launch, running.block, running.phase, t->linear, running.warp_phases[t->warp], line, access};
}

static void touch_shared(Thread *t, int line, u32 offset, u32 size, Access access) {
  Touch now = touch_of(t, line, access);
  auto meets = [&](const Touch &other) {
    if (other.launch != launch || other.phase != running.phase || other.thread == t->linear) return false;
    return other.thread / 32 != t->warp || other.warp_phase == now.warp_phase;
  };
  for (u32 i = offset; i < offset + size; i++) touch(t, "shared", shared_cells[i], i, now, meets);
}

static void touch_global(Thread *t, int line, u64 address, u32 size, Access access) {
  Touch now = touch_of(t, line, access);
  auto meets = [&](const Touch &other) {
    if (other.launch != launch) return false;
    return other.block != running.block || (other.thread != t->linear && other.phase == running.phase);
  };
  for (u64 i = address >> 1; i < (address + size + 1) >> 1; i++) touch(t, "global", global_cells[i], 2 * i, now, meets);
}

void start_races() {
  runtime.touch_shared = touch_shared, runtime.touch_global = touch_global;
  runtime.shared_races = strstr(text_option("RACES"), "shared") != nullptr;
  runtime.global_races = strstr(text_option("RACES"), "global") != nullptr;
}

void clear_races() {
  launch++;
  if (runtime.shared_races) shared_cells.assign(runtime.shared_size, Cell{});
  global_cells.clear();
}
