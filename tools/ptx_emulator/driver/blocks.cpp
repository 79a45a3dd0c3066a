// The blocks of a kernel run one after another. The threads of a block are fibers, which run until they wait for each other.
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <random>

#include "driver.h"

enum State { READY, AT_BARRIER, AT_COLLECTIVE, EXITED };
static const char *const STATES[] = {"ready", "at a barrier", "with other lanes", "exited"};
struct Fiber {
  Thread thread;
  void *stack_pointer;
  State state;
  int line;                // where it waits
  u32 barrier, count;      // at a barrier: its number, and how many threads it expects (0: all)
  u32 mask;                // of a collective
  bool aligned;            // all lanes must take part
  Collective collective;   // null at a barrier of the warp
  void *in, *out;
};
static const u32 MOST_THREADS = 1024;
static const u64 STACK = 128 << 10;  // bytes; half of it for local memory, see translator/module.py
static Fiber *fibers;
static Fiber *current;
static void *scheduler;  // its stack pointer
static std::mt19937 chance;
static bool shuffled;
Running running;

extern "C" void emulator_switch(void **save, void *load);
asm(R"(
.globl emulator_switch
.hidden emulator_switch
emulator_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
static const int SAVED_REGISTERS = 6;

void yield() { emulator_switch(&current->stack_pointer, scheduler); }

static void fiber_main() {
  running.kernel->info->run(&current->thread, running.parameters);
  current->state = EXITED;
  yield();
  abort();
}

static void prepare(Fiber *f) {
  u64 *top = (u64 *)((u64)(f->thread.stack_end - 64) & ~15ull);
  *--top = 0;  // where fiber_main would return to; aligns the stack as a call does
  *--top = (u64)fiber_main;
  for (int i = 0; i < SAVED_REGISTERS; i++) *--top = 0;
  f->stack_pointer = top;
  f->state = READY;
}

static void wait_at(State state, int line) {
  current->line = line;
  current->state = state;
  yield();
}

static void barrier(Thread *, int line, u32 number, u32 count) {
  current->barrier = number, current->count = count;
  wait_at(AT_BARRIER, line);
}

static void collective(Thread *, int line, u32 mask, int aligned, Collective what, void *in, void *out) {
  current->mask = mask, current->aligned = aligned, current->collective = what, current->in = in, current->out = out;
  wait_at(AT_COLLECTIVE, line);
}

static void warp_barrier(Thread *t, int line, u32 mask) { collective(t, line, mask, false, nullptr, nullptr, nullptr); }

// The lanes that wait with lane `own` of a warp, if all those in its mask have arrived or exited; else 0.
static u32 gathered(const Fiber *warp, u32 lanes, u32 own) {
  u32 mask = 0;
  for (u32 k = 0; k < lanes; k++) {
    const Fiber &f = warp[own], &g = warp[k];
    if (!(f.mask >> k & 1) || g.state == EXITED) continue;
    if (g.state != AT_COLLECTIVE || g.collective != f.collective || g.mask != f.mask || g.line != f.line) return 0;
    mask |= 1u << k;
  }
  return mask;
}

// Performs what lanes of a warp wait for together. Returns whether any continue.
static bool serve_warp(Fiber *warp, u32 lanes) {
  bool any = false;
  for (u32 own = 0; own < lanes; own++) {
    Fiber &f = warp[own];
    if (f.state != AT_COLLECTIVE) continue;
    u32 mask = gathered(warp, lanes, own);
    bool in_own_mask = f.mask >> own & 1;
    if (!in_own_mask || (mask && f.aligned && mask != ~0u)) {
      report("%s, %s", in_own_mask ? "not all 32 lanes take part" : "a lane is not in its own mask", place(f.line).c_str());
      stop(CUDA_ERROR_LAUNCH_FAILED);
      return false;
    }
    if (!mask) continue;
    void *in[32] = {}, *out[32] = {};
    for (u32 k = 0; k < lanes; k++)
      if (mask >> k & 1) in[k] = warp[k].in, out[k] = warp[k].out, warp[k].state = READY;
    if (f.collective) f.collective(mask, in, out);
    else running.warp_phases[f.thread.warp]++;
    any = true;
  }
  return any;
}

// bar.sync is .aligned: the lanes of a warp must be at the same one.
static void check_lines(const std::vector<u32> &waiting) {
  for (u32 i : waiting) {
    if (i % 32 == 0 || fibers[i - 1].state != AT_BARRIER || fibers[i - 1].line == fibers[i].line) continue;
    if (!told_before(running.kernel, fibers[i - 1].line, fibers[i].line))
      report("lanes %u and %u wait at different barriers\n  %s\n  %s", i - 1, i, place(fibers[i - 1].line).c_str(),
             place(fibers[i].line).c_str());
  }
}

// Releases threads from barriers that all have reached. Returns whether any continue.
static bool serve_barriers(u32 threads) {
  std::map<u32, std::vector<u32>> waiting;
  u32 live = 0;
  for (u32 i = 0; i < threads; i++) {
    live += fibers[i].state != EXITED;
    if (fibers[i].state == AT_BARRIER) waiting[fibers[i].barrier].push_back(i);
  }
  bool any = false;
  for (auto &[number, list] : waiting) {
    u32 count = fibers[list[0]].count;
    if (list.size() < (count ? count : live)) continue;
    check_lines(list);
    for (u32 i : list) fibers[i].state = READY;
    any = true;
  }
  running.phase++;
  return any;
}

static void tell_stuck(u32 threads) {
  std::map<std::pair<State, int>, std::pair<u32, u32>> places;  // number of threads, and the first one
  for (u32 i = 0; i < threads; i++) {
    auto &[count, first] = places[{fibers[i].state, fibers[i].state == EXITED ? 0 : fibers[i].line}];
    if (!count++) first = i;
  }
  std::string text = "threads wait for one another for ever, or diverge at a barrier:";
  for (auto &[key, value] : places)
    text += "\n  " + std::to_string(value.first) + " " + STATES[key.first] + " (first: " + std::to_string(value.second) + ")" +
            (key.second ? ", " + place(key.second) : "");
  report("%s\n  kernel %.90s", text.c_str(), running.kernel->info->name);
  stop(CUDA_ERROR_LAUNCH_TIMEOUT);
}

static std::vector<u64> some_order(u64 count) {
  std::vector<u64> order(count);
  for (u64 i = 0; i < count; i++) order[i] = i;
  return order;
}

static void mix(std::vector<u64> &order) {
  if (shuffled) std::shuffle(order.begin(), order.end(), chance);
}

static void run_warp(u32 first, u32 lanes, std::vector<u64> &order) {
  do {
    mix(order);
    for (u32 lane : order) {
      if (lane >= lanes || fibers[first + lane].state != READY) continue;
      current = &fibers[first + lane];
      emulator_switch(&scheduler, current->stack_pointer);
      if (running.stopped) return;
    }
  } while (serve_warp(&fibers[first], lanes));
}

static void run_block(u32 threads) {
  auto warps = some_order((threads + 31) / 32), lanes = some_order(32);
  for (u32 i = 0; i < threads; i++) prepare(&fibers[i]);
  running.phase++;
  for (;;) {
    mix(warps);
    for (u32 warp : warps) {
      run_warp(32 * warp, std::min(32u, threads - 32 * warp), lanes);
      if (running.stopped) return;
    }
    if (std::all_of(fibers, fibers + threads, [](const Fiber &f) { return f.state == EXITED; })) return;
    if (!serve_barriers(threads)) return tell_stuck(threads);
  }
}

static void place_thread(Thread &t, u32 number, u64 b, const u32 grid[3], const u32 block[3]) {
  t.tid[0] = number % block[0], t.tid[1] = number / block[0] % block[1], t.tid[2] = number / block[0] / block[1];
  t.ctaid[0] = b % grid[0], t.ctaid[1] = b / grid[0] % grid[1], t.ctaid[2] = b / grid[0] / grid[1];
  for (int axis = 0; axis < 3; axis++) t.ntid[axis] = block[axis], t.nctaid[axis] = grid[axis];
  t.linear = number, t.lane = number % 32, t.warp = number / 32;
  t.copy_count = 0, t.group = 0;
}

void start_blocks() {
  const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
  char *stacks = (char *)mmap(nullptr, MOST_THREADS * STACK, PROT_READ | PROT_WRITE, flags, -1, 0);
  fibers = (Fiber *)calloc(MOST_THREADS, sizeof(Fiber));
  if (stacks == MAP_FAILED || !fibers) abort();
  for (u32 i = 0; i < MOST_THREADS; i++) {
    fibers[i].thread.stack = stacks + i * STACK;
    fibers[i].thread.stack_end = stacks + (i + 1) * STACK;
  }
  running.warp_phases.assign(MOST_THREADS / 32, 1);
  shuffled = option("SEED", 0) != 0;
  chance.seed(option("SEED", 0));
  runtime.fault = fault, runtime.barrier = barrier, runtime.collective = collective, runtime.warp_barrier = warp_barrier;
  runtime.clock = [] { return (u64)(now() * 1e9); };
  start_races();
}

void run_blocks(CUkern_st *kernel, const u32 grid[3], const u32 block[3], std::vector<std::vector<u8>> &parameters) {
  double start = now();
  std::vector<void *> pointers;
  for (auto &value : parameters) pointers.push_back(value.data());
  running.kernel = kernel, running.parameters = pointers.data(), running.stopped = false;
  u32 size = kernel->library->module->shared_size, threads = block[0] * block[1] * block[2];
  std::vector<u8> memory(size + 16);
  runtime.shared = (u8 *)(((u64)memory.data() + 15) & ~15ull);
  runtime.shared_size = size, runtime.variables = kernel->library->variables.data();
  clear_races();
  auto order = some_order((u64)grid[0] * grid[1] * grid[2]);
  mix(order);
  for (u64 b : order) {
    running.block = b;
    memset(runtime.shared, 0xff, size);
    for (u32 i = 0; i < threads; i++) place_thread(fibers[i].thread, i, b, grid, block);
    run_block(threads);
    if (running.stopped) break;
  }
  kernel->seconds += now() - start;
}
