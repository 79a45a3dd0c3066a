// Streams and events. Work is done at once, in the calling thread; with PTX_EMULATOR_LAZY=1 as late as CUDA allows: when
// someone waits for it, or when the rules of the legacy default stream order it before other work (that stream waits for all
// streams except non-blocking ones, and they wait for it).
#include <time.h>

#include <algorithm>

#include "driver.h"

static const u32 ALIVE = 0x57ea;
struct CUstream_st {
  u32 magic, flags;
  int priority, device;
  std::deque<std::function<void()>> queue;
};
struct CUevent_st {
  double time;
  bool recorded;
  CUstream stream;
};
static CUstream_st legacy{ALIVE, 0, 0, -1, {}}, per_thread{ALIVE, 0, 0, -1, {}};
static std::vector<CUstream> streams{&legacy, &per_thread};

static CUstream real(CUstream s) { return (u64)s <= 1 ? &legacy : (u64)s == 2 ? &per_thread : s; }
bool is_stream(CUstream s) { return real(s)->magic == ALIVE; }
int device_of(CUstream s) { return real(s)->device; }
static bool blocking(CUstream s) { return !(s->flags & CU_STREAM_NON_BLOCKING); }

double now() {
  timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + 1e-9 * t.tv_nsec;
}

static void drain(CUstream s) {
  while (!s->queue.empty()) {
    auto work = std::move(s->queue.front());
    s->queue.pop_front();
    work();
  }
}

static void do_what_comes_before(CUstream s) {
  if (s != &legacy && blocking(s)) drain(&legacy);
  if (s == &legacy)
    for (auto other : streams)
      if (other != s && blocking(other)) drain(other);
}

void wait_for_all() {
  LOCK;
  for (auto s : streams) drain(s);
}

void wait(CUstream s) {
  LOCK;
  do_what_comes_before(real(s));
  drain(real(s));
}

void submit(CUstream s, std::function<void()> work) {
  LOCK;
  static const bool lazy = option("LAZY", 0);
  do_what_comes_before(real(s));
  real(s)->queue.push_back(std::move(work));
  if (!lazy) drain(real(s));
}

API cuStreamCreateWithPriority(CUstream *s, unsigned flags, int priority) {
  LOCK;
  NEEDS_CONTEXT;
  streams.push_back(*s = new CUstream_st{ALIVE, flags, priority, (int)current_device(), {}});
  return CUDA_SUCCESS;
}
API cuStreamCreate(CUstream *s, unsigned flags) { return cuStreamCreateWithPriority(s, flags, 0); }
API cuStreamDestroy_v2(CUstream s) {  // its memory stays, to detect later uses
  LOCK;
  NEEDS_STREAM(s);
  wait(s);
  std::erase(streams, s);
  s->magic = 0;
  return CUDA_SUCCESS;
}
ANSWER(cuStreamSynchronize, (CUstream s), NEEDS_STREAM(s); NEEDS_CONTEXT; wait(s); TELLS_ERRORS)
ANSWER(cuStreamQuery, (CUstream s), NEEDS_STREAM(s); wait(s); TELLS_ERRORS)
ANSWER(cuStreamWaitEvent, (CUstream s, CUevent e, unsigned), NEEDS_STREAM(s); if (e->recorded) wait(e->stream))
ANSWER(cuStreamGetCtx, (CUstream, CUcontext *c), *c = context_of(current_device()))
ANSWER(cuStreamGetCtx_v2, (CUstream, CUcontext *c, CUgreenCtx *g), *c = context_of(current_device()); if (g) *g = nullptr)
ANSWER(cuStreamGetFlags, (CUstream s, unsigned *f), *f = real(s)->flags)
ANSWER(cuStreamGetPriority, (CUstream s, int *p), *p = real(s)->priority)
ANSWER(cuStreamGetDevice, (CUstream s, CUdevice *d), *d = device_of(s) < 0 ? (int)current_device() : device_of(s))
ANSWER(cuStreamGetId, (CUstream s, unsigned long long *id), *id = (u64)s)
ANSWER(cuStreamIsCapturing, (CUstream, CUstreamCaptureStatus *s), *s = CU_STREAM_CAPTURE_STATUS_NONE)
ANSWER(cuStreamAddCallback, (CUstream s, CUstreamCallback f, void *data, unsigned), wait(s); f(s, CUDA_SUCCESS, data))
ANSWER(cuLaunchHostFunc, (CUstream s, CUhostFn f, void *data), wait(s); f(data))

ANSWER(cuEventCreate, (CUevent *e, unsigned), NEEDS_CONTEXT; *e = new CUevent_st{0, false, nullptr})
ANSWER(cuEventDestroy_v2, (CUevent))  // its memory stays, as pending work may refer to it
API cuEventRecord(CUevent e, CUstream s) {
  NEEDS_STREAM(s);
  e->stream = s, e->recorded = true;
  submit(s, [e] { e->time = now(); });
  return CUDA_SUCCESS;
}
API cuEventRecordWithFlags(CUevent e, CUstream s, unsigned) { return cuEventRecord(e, s); }
ANSWER(cuEventSynchronize, (CUevent e), if (e->recorded) wait(e->stream); TELLS_ERRORS)
ANSWER(cuEventQuery, (CUevent e), if (e->recorded) wait(e->stream); TELLS_ERRORS)
API cuEventElapsedTime(float *ms, CUevent a, CUevent b) {
  if (!a->recorded || !b->recorded) return CUDA_ERROR_INVALID_HANDLE;
  *ms = 1e3 * (b->time - a->time);
  return CUDA_SUCCESS;
}
