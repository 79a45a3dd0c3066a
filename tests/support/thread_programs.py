"""Programs for test_threads.py: `python -m thread_programs NAME`. Each prints "NAME is right" if all went well.

They run in separate processes because a defect in a fork, a signal handler or an interrupt hangs or kills.
"""

import atexit
import collections
import linecache
import multiprocessing
import os
import signal
import sys
import threading
import time

import numpy as np
from checks import assert_same_bits, cpu, limit
from conv_cases import Case
from family import assert_same
from test_deform_conv import make

import numdcn

PACKAGE = os.path.dirname(numdcn.__file__) + os.sep

BACKEND = cpu("deform_conv")
CASE = Case(2, 36, 34, (34, 35), padding=1, groups=2, offset_groups=4, mask=True, bias=True)  # work for three threads
LONG = Case(2, 64, 64, (96, 97), padding=1, mask=True, bias=True)
SLOW_TASKS = Case(1, 256, 256, (12, 13), padding=1)  # a helper is often still busy when the caller is done


def both(problem):
    return problem.forward(BACKEND), problem.backward(BACKEND)


def same(got, want):
    assert_same(got[0], want[0])
    assert_same(got[1], want[1])
    return True


def in_child(function, seconds=30):
    """Runs function() in a forked child, which must exit with code 0 in time."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            signal.alarm(limit(seconds))  # kills a child that hangs
            code = 0 if function() else 2
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"the child ended with status {status}" + " (hangs)" * (status == signal.SIGALRM)
    return True


def fork():
    problem = make(CASE, np.float32)
    want = both(problem)  # the pool has started
    for _ in range(3):
        in_child(lambda: same(both(problem), want))
        same(both(problem), want)


def fork_of_a_fork():
    problem = make(CASE, np.float32)
    want = both(problem)

    def child():
        return same(both(problem), want) and in_child(lambda: same(both(problem), want))

    in_child(child)
    same(both(problem), want)


def fork_while_calls_run():
    """Fork while other threads are inside calls, so that any lock they hold stays locked in the child forever."""
    problem = make(CASE, np.float32)
    want = both(problem)
    done, failures = threading.Event(), []

    def work():
        while not done.is_set():
            try:
                same(both(problem), want)
            except BaseException as error:
                failures.append(error)
                return

    threads = [threading.Thread(target=work) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(15):
            time.sleep(0.003)
            in_child(lambda: same(both(problem), want))
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert not failures, failures[0]


def _forward_sum(seed):
    return both(make(CASE, np.float32, seed))


def _in_a_pool(method):
    wanted = [_forward_sum(seed) for seed in range(4)]
    with multiprocessing.get_context(method).Pool(2) as pool:
        for got, want in zip(pool.map_async(_forward_sum, range(4)).get(limit(100)), wanted, strict=True):
            same((got[0], got[1]), want)


def multiprocessing_fork():
    _in_a_pool("fork")


def multiprocessing_spawn():
    _in_a_pool("spawn")


def signal_handler():
    """A timer handler makes a call while the same thread is inside another one."""
    outer, inner = make(LONG, np.float32), make(CASE, np.float32)
    want_outer, want_inner = both(outer), both(inner)
    calls = []

    def handler(*_):
        calls.append(same(both(inner), want_inner))
        if len(calls) < 8:
            signal.setitimer(signal.ITIMER_REAL, 0.005)

    signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.005)
    until = time.monotonic() + limit(60)
    while len(calls) < 8:
        same(both(outer), want_outer)
        assert time.monotonic() < until, "the handler does not run"


def interrupt(direction):
    """Ctrl-C at many moments of a call: it raises, no worker writes to `out` afterwards, and the next call is right."""
    problem = make(LONG, np.float32)
    want = both(problem)
    started = time.perf_counter()
    getattr(problem, direction)(BACKEND)
    duration = time.perf_counter() - started
    gradients = type(want[1])
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    raised = 0
    for turn in range(24):
        out = np.zeros_like(want[0]) if direction == "forward" else gradients(*(np.zeros_like(a) for a in want[1]))
        arrays = [out] if direction == "forward" else list(out)
        inside = True
        try:
            signal.setitimer(signal.ITIMER_REAL, duration * (turn % 8 + 0.5) / 8)
            getattr(problem, direction)(BACKEND, out=out)
            inside = False
            time.sleep(10)  # wait for an interrupt that comes too late
        except KeyboardInterrupt:
            raised += inside
            kept = [array.copy() for array in arrays]
            time.sleep(0.1)
            for array, copy in zip(arrays, kept, strict=True):
                assert_same_bits(array, copy, "out after the interrupt")
        same(both(problem), want)
    assert raised >= 8, f"only {raised} interrupts came inside a call"


def _at_line(number, action, function):
    """Runs function(), and action() just before line `number` of the lines of numdcn that this thread executes.

    Returns whether there was such a line. A line counts the first and the second time it runs. `with` lines do not
    count: Python also reports one between the end of the block and the exit of its manager, where the interpreter
    itself never delivers a signal.
    """
    count, seen = 0, collections.Counter()

    def on_line(frame, event, _):
        nonlocal count
        place = frame.f_code.co_filename, frame.f_lineno
        if event != "line" or linecache.getline(*place).lstrip().startswith("with "):
            return on_line
        seen[place] += 1
        count += seen[place] <= 2
        if count == number and seen[place] <= 2:
            print(f"line {number}: {os.path.basename(place[0])}:{place[1]}", flush=True)
            action()
        return on_line

    def on_call(frame, *_):
        return on_line if frame.f_code.co_filename.startswith(PACKAGE) else None

    sys.settrace(on_call)
    try:
        function()
    finally:
        sys.settrace(None)
    return count >= number


def interrupt_at_every_line(direction):
    """An exception before each line of the library, as Ctrl-C and signal handlers that raise may cause it."""
    problem = make(SLOW_TASKS, np.float32)
    want = both(problem)
    interrupted = number = 0
    going = True

    def action():
        raise KeyboardInterrupt if interrupted % 2 else TimeoutError

    while going:
        number += 1
        for _ in range(2):  # one of each kind
            out = np.full_like(want[0], np.nan) if direction == "forward" else type(want[1])(*map(_nan_like, want[1]))
            arrays = [array for array in ([out] if direction == "forward" else out) if array is not None]
            try:
                going = _at_line(number, action, lambda out=out: getattr(problem, direction)(BACKEND, out=out))
            except (KeyboardInterrupt, TimeoutError):
                interrupted += 1
                kept = [array.copy() for array in arrays]
                time.sleep(0.004)
                for array, copy in zip(arrays, kept, strict=True):
                    assert_same_bits(array, copy, f"out after an interrupt at line {number}")
        if number % 20 == 0:
            same(both(problem), want)
    assert interrupted > 60, f"only {interrupted} lines"


def _nan_like(array):
    return None if array is None else np.full_like(array, np.nan)


def signal_at_every_line(direction):
    """A signal before each line of the library, whose handler makes a call: no lock may block it."""
    problem, inner = make(CASE, np.float32), make(CASE, np.float32, 1)
    want, want_inner = both(problem), both(inner)
    calls, number, going = 0, 0, True

    def handler(*_):
        nonlocal calls
        sys.settrace(None)
        calls += same(both(inner), want_inner)

    signal.signal(signal.SIGUSR1, handler)
    signal.alarm(limit(40))

    def run():
        assert_same(getattr(problem, direction)(BACKEND), want[direction == "backward"])

    while going:
        number += 1
        going = _at_line(number, lambda: signal.raise_signal(signal.SIGUSR1), run)
    assert calls > 60, f"only {calls} lines"


def at_exit(order):
    problem = make(CASE, np.float32)

    def last_call(want=None):
        try:
            got = both(problem)
        except Exception as error:
            print("the call at exit raised", repr(error), flush=True)
        else:
            assert want is None or same(got, want)
            print("the call at exit was right", flush=True)

    if order == "in_a_daemon_thread":
        long = make(LONG, np.float32)
        both(long)
        started = threading.Event()

        def for_ever():
            started.set()
            while True:
                both(long)

        threading.Thread(target=for_ever, daemon=True).start()
        started.wait()
        time.sleep(0.05)
        print("leaving", flush=True)
    elif order == "first_call":
        atexit.register(last_call)
    elif order == "registered_first":
        want = []
        atexit.register(lambda: last_call(*want))  # runs after any handlers registered by the first call
        want.append(both(problem))
    else:
        want = both(problem)
        atexit.register(lambda: last_call(want))


PROGRAMS = {
    f.__name__: f
    for f in (fork, fork_of_a_fork, fork_while_calls_run, multiprocessing_fork, multiprocessing_spawn)
    + (signal_handler, signal_at_every_line, interrupt, interrupt_at_every_line, at_exit)
}

if __name__ == "__main__":
    program, *rest = sys.argv[1:]
    PROGRAMS[program](*rest)
    print(program, "is right", flush=True)
