"""The pool that runs CPU kernels: the caller works too, helpers come from one `ThreadPoolExecutor`.

A call shares out tasks by a counter in memory that its kernels increment. The caller takes tasks until none are left,
then closes the call: a helper that comes late finds it closed and leaves; the caller waits for those within. So a call
needs no helper to make progress, and returns or raises only when nobody is in its buffers.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from numdcn._host.checks import integer
from numdcn._kernels.parameters_cpu import parameters

_MOST = 1024


def available_cpus() -> int:
    """CPUs that this process may use: its affinity, and a container's quota where the system tells."""
    try:
        count = len(os.sched_getaffinity(0))  # Linux
    except (AttributeError, OSError):
        count = os.cpu_count() or 1
    quota = _container_quota()
    return max(1, min(count, quota)) if quota else max(1, count)


def _container_quota() -> int:
    """The CPUs that a Linux control group grants, rounded up; 0 where there is no such limit."""
    try:
        with open("/sys/fs/cgroup/cpu.max", encoding="ascii") as file:
            quota, period = file.read().split()[:2]
        return 0 if quota == "max" else -(-int(quota) // int(period))
    except (OSError, ValueError):
        pass
    try:
        with open("/sys/fs/cgroup/cpu/cpu.cfs_quota_us", encoding="ascii") as file:
            quota_us = int(file.read())
        with open("/sys/fs/cgroup/cpu/cpu.cfs_period_us", encoding="ascii") as file:
            period_us = int(file.read())
        return -(-quota_us // period_us) if quota_us > 0 < period_us else 0
    except (OSError, ValueError):
        return 0


def _threads_from_environment() -> int:
    text = os.environ.get("NUMDCN_NUM_THREADS", "").strip()
    if not text:
        return available_cpus()
    if not text.isdecimal() or not 1 <= int(text) <= _MOST:
        message = f"the environment variable NUMDCN_NUM_THREADS is {text!r}, expected a number from 1 to {_MOST}"
        raise ValueError(message)
    return int(text)


_threads = _threads_from_environment()
_lock = threading.RLock()
_executor: ThreadPoolExecutor | None = None
_executor_size = 0
_here = threading.local()
_ready: set[Any] = set()  # kernels that have been called, and with which type
_NO_MORE = np.int64(2**62)  # a counter that hands out no task


def set_num_threads(n: int) -> None:
    """Set the number of threads that a call may use, its own included (`NUMDCN_NUM_THREADS` at start).

    Results do not depend on it, bit for bit. Raises `TypeError` or `ValueError` unless `n` is from 1 to 1024.
    """
    global _threads
    count = integer("n", n, 1)
    if count > _MOST:
        raise ValueError(f"`n` is {count}, expected at most {_MOST}")
    _threads = count


def get_num_threads() -> int:
    """The number of threads that a call may use; at first, the CPUs that this process may use."""
    return _threads


def _helpers(count: int) -> ThreadPoolExecutor:
    """The executor, with room for `count` helpers."""
    global _executor, _executor_size
    with _lock:
        if _executor is None or _executor_size < count:
            old, _executor_size = _executor, count
            _executor = ThreadPoolExecutor(count, thread_name_prefix="numdcn")
            if old is not None:
                old.shutdown(wait=False)  # finishes what other calls gave it
        return _executor


class _Call:
    """One kernel run by several threads."""

    def __init__(self, work: Callable[[int, int], None]) -> None:
        self.work = work
        self.counter = np.zeros(1, np.int64)  # the next task
        self.changed = threading.Condition()
        self.entered = self.inside = 0
        self.closed = False
        self.error: BaseException | None = None

    def help(self) -> None:
        """Work in a helper thread, unless the call is over."""
        with self.changed:
            if self.closed:
                return
            self.entered += 1
            self.inside += 1
            slot = self.entered
        _here.busy = True
        try:
            self.work(self.counter.ctypes.data, slot)
        except BaseException as error:
            self.error = error
        finally:
            _here.busy = False
            with self.changed:
                self.inside -= 1
                self.changed.notify_all()

    def close(self) -> None:
        """Let nobody in any more, hand out no more tasks, wait for those inside."""
        self.counter[0] = _NO_MORE
        with self.changed:
            self.closed = True
            while self.inside:
                self.changed.wait()


def run(work: Callable[[int, int], None], threads: int) -> None:
    """Run `work(counter_address, slot)` in up to `threads` threads at once, slot 0 in this one, until all return.

    `work` takes task after task from the counter; slots tell its threads apart.
    """
    if threads <= 1 or getattr(_here, "busy", False):
        counter = np.zeros(1, np.int64)
        work(counter.ctypes.data, 0)
        return
    call = _Call(work)
    try:
        try:
            _share_out(call, threads)
        finally:
            _close(call)
    finally:
        _close(call)  # again, should an interruption have come at the door of the first
        _here.busy = False
    if call.error is not None:
        raise call.error


def _share_out(call: _Call, threads: int) -> None:
    """Ask for helpers, and work."""
    _here.busy = True  # a signal handler that calls the library now must not wait for what this thread holds
    try:
        executor = _helpers(threads - 1)
        for _ in range(threads - 1):
            executor.submit(call.help)
    except RuntimeError:
        pass  # the interpreter is shutting down, or no thread could be started: this thread does it all
    call.work(call.counter.ctypes.data, 0)


def launch(kernel: Callable[[Any, int, int, int], None], one: Any, values: Any, threads: int) -> None:
    """Run a kernel on its parameters, a NamedTuple, in up to `threads` threads; `one` tells the type of its elements."""
    array = parameters(values)
    address = array.buffer_info()[0]
    key = (kernel, type(one))
    if key not in _ready:  # compile or load it here: several threads would get in each other's way
        counter = np.full(1, _NO_MORE)
        kernel(one, address, counter.ctypes.data, 0)
        _ready.add(key)
    run(lambda counter, slot: kernel(one, address, counter, slot), threads)


def _close(call: _Call) -> None:
    """Close the call, even if a signal handler raises meanwhile; then let that exception go on."""
    interruption: BaseException | None = None
    while True:
        try:
            call.close()
            break
        except BaseException as error:
            interruption = error
    if interruption is not None:
        raise interruption


def _after_fork() -> None:
    """The child has none of the parent's threads."""
    global _executor, _executor_size, _lock, _here
    _executor, _executor_size, _lock, _here = None, 0, threading.RLock(), threading.local()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


def plan_threads(tasks: int, work: float) -> int:
    """How many threads so many tasks and so much work (multiply-adds of a product, or what takes as long) are worth."""
    return max(1, min(_threads, tasks, int(work / _WORTH)))


_WORTH = 4e6  # multiply-adds that pay for waking one more thread
