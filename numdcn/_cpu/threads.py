"""Running CPU kernels: how many threads a call may use, and the helper threads.

The hand-off itself is compiled (`team.run`), so no signal handler can run between its steps. What remains here may be
interrupted anywhere: it only starts helpers, which depend on nobody, and remembers addresses of machine code.
"""

from __future__ import annotations

import _thread
import atexit
import ctypes
import os
import time
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
from numba.core import types
from numba.core.compiler_lock import global_compiler_lock

from numdcn._call import notice
from numdcn._call.checks import integer
from numdcn._cpu import team
from numdcn._cpu.parameters import parameters
from numdcn._cpu.team import BOARD_WORDS, MOST_THREADS, run


def available_cpus() -> int:
    """CPUs that this process may use: its affinity, limited by a container's quota where the system reports one."""
    try:
        count = len(os.sched_getaffinity(0))  # Linux
    except (AttributeError, OSError):
        count = os.cpu_count() or 1
    quota = _container_quota()
    return max(1, min(count, quota)) if quota else max(1, count)


def _container_quota() -> int:
    """The CPUs granted by a Linux control group, rounded up; 0 if unlimited."""
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
    if not text.isdecimal() or not 1 <= int(text) <= MOST_THREADS:
        message = f"the environment variable NUMDCN_NUM_THREADS is {text!r}, expected a number from 1 to {MOST_THREADS}"
        raise ValueError(message)
    return int(text)


Result = TypeVar("Result")
_threads = _threads_from_environment()
_board_memory = (ctypes.c_int64 * (BOARD_WORDS + 16))()  # shared by the threads: see `team`
_BOARD_ADDRESS = -(-ctypes.addressof(_board_memory) // 128) * 128
ctypes.pythonapi.Py_IncRef(ctypes.py_object(_board_memory))  # for good: helpers sleep there until the process ends
_helpers = 0  # started; there may be one more if an interruption came before it was counted
_next_attempt, _pause = 0.0, 1.0  # seconds: when to retry after a helper failed to start
_WORTH = 4e6  # multiply-adds that are worth waking one more thread: some 30 us of a core at 248 GFLOP/s
_codes: dict[Any, tuple[int, int, Any]] = {}  # by kernel and type of `one`; see `_load`


def set_num_threads(n: int) -> None:
    """Set the number of threads that a call may use, including its own (initially `NUMDCN_NUM_THREADS`).

    Results do not depend on it, bit for bit.

    Args:
        n: number of threads, from 1 to 1024.

    Raises:
        TypeError: `n` is not an integer.
        ValueError: `n` is out of range.
    """
    global _threads
    count = integer("n", n, 1)
    if count > MOST_THREADS:
        raise ValueError(f"`n` is {count}, expected at most {MOST_THREADS}")
    _threads = count


def get_num_threads() -> int:
    """The number of threads that a call may use; initially the CPUs available to this process."""
    return _threads


def plan_threads(tasks: int, work: float) -> int:
    """How many threads to use for this many tasks and this much work (in multiply-adds, or what takes as long)."""
    return max(1, min(_threads, tasks, int(work / _WORTH)))


def launch(kernel: Any, one: Any, values: Any, threads: int) -> None:
    """Run a kernel in up to `threads` threads, with `values` as its parameters and elements of the type of `one`.

    Returns when the last thread is done. An exception from a signal handler is raised before the kernel or after it.
    """
    array, counter = parameters(values)
    start(kernel, type(one), array.buffer_info()[0], counter, threads)


def start(kernel: Any, kind: type, address: int, counter: int, threads: int) -> None:
    """`launch` with elements of a type, the address of the parameters and that of the counter."""
    code, wide, _ = _codes.get((kernel, kind)) or _load(kernel, kind)
    if threads > 1:
        _recruit(threads - 1)
    if run(_BOARD_ADDRESS, code, wide, address, counter, threads - 1):
        raise RuntimeError(f"{kernel.__name__} failed")


def _recruit(count: int) -> None:
    """Start helpers until there are `count` or no more can be started: then the call makes do with fewer.

    After a failure the delay before the next attempt doubles, because each failure leaks some of the interpreter's
    memory.
    """
    global _helpers, _next_attempt, _pause
    while _helpers < count and time.monotonic() >= _next_attempt:
        try:
            _thread.start_new_thread(team.run, (_BOARD_ADDRESS, 0, 0, 0, 0, 0))
        except RuntimeError:  # a limit of the system, or the interpreter is ending
            _next_attempt, _pause = time.monotonic() + _pause, 2 * _pause
            return
        _helpers += 1


def _load(kernel: Any, dtype: type) -> tuple[int, int, Any]:
    """The address of a kernel's machine code for a type, whether the type is float64, and what keeps the code alive."""
    wide = int(dtype is np.float64)
    signature = (types.float64 if wide else types.float32, types.int64, types.int64, types.int64)

    def compiled() -> tuple[int, int, Any]:
        """Compile, or load from the cache, everything a launch needs."""
        with _compiler:
            team.run.compile((types.int64,) * 6)
            kernel.compile(signature)
            result = kernel.overloads[signature]
            return result.library.get_pointer_to_function(result.fndesc.llvm_func_name), wide, result

    def waiting(seconds: float) -> None:
        notice.waited(notice.public_caller(), seconds, "CPU", kernel._cache)

    _codes[kernel, dtype] = found = _undisturbed(compiled, waiting)
    return found


def _undisturbed(action: Callable[[], Result], waiting: Callable[[float], None]) -> Result:
    """The result of `action`, run in a thread of its own so that no signal handler can interrupt it halfway. An
    exception from a handler ends the wait here while the action continues. `waiting(0.1)` is called every tenth of a
    second."""
    results: list[Result] = []
    errors: list[BaseException] = []
    process, done = os.getpid(), _thread.allocate_lock()
    done.acquire()

    def work() -> None:
        try:
            results.append(action())
        except BaseException as error:
            errors.append(error)
        finally:
            done.release()

    try:
        _thread.start_new_thread(work, ())
    except RuntimeError:  # a limit of the system, or the interpreter is ending
        return action()
    while not done.acquire(timeout=0.1):
        if os.getpid() != process:  # a handler forked: this is the child, which does not have that thread
            return action()
        waiting(0.1)
    if errors:
        raise errors[0]
    return results[0]


def _after_fork() -> None:
    """The child has none of the parent's threads."""
    global _helpers, _next_attempt, _pause
    _next_attempt, _pause = 0.0, 1.0
    ctypes.memset(_board_memory, 0, ctypes.sizeof(_board_memory))
    _helpers = 0


# A fork waits while a thread compiles, since the child's copy of the compiler would be stuck halfway forever. So does
# the end of the interpreter. The lock's own methods cannot be interrupted halfway.
_compiler: Any = global_compiler_lock._lock


def _let_compilation_end() -> None:
    with _compiler:
        pass


atexit.register(_let_compilation_end)
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)
    os.register_at_fork(before=_compiler.acquire, after_in_parent=_compiler.release, after_in_child=_compiler.release)
