"""Programs for test_interrupts.py: `python -m interrupt_programs NAME`. Each prints "NAME is right" if all went well.

An interrupt is an exception raised by a signal handler at an arbitrary moment. Here handlers raise only while a frame
of numdcn is on the stack, so it is always a call of the library that is interrupted, never the program itself.
"""

import contextlib
import os
import random
import signal
import sys
import threading
import time
import tracemalloc

import numpy as np
from checks import assert_same_bits, limit
from team_kernels import Meeting, leave_late, meet

import numdcn
from numdcn._cpu import program as repeated
from numdcn._cpu.threads import launch

PACKAGE = os.path.dirname(numdcn.__file__) + os.sep

RNG = np.random.default_rng(0)


def _array(*shape):
    return RNG.standard_normal(shape, dtype=np.float32)


def _calls():
    """Six operators, forward and backward, each call taking a few milliseconds at most."""
    x, w, offsets = _array(1, 32, 38, 40), _array(36, 32, 3, 3), _array(1, 18, 38, 40)
    points, rois = _array(1, 9000, 2) * 9 + 12, np.array([[0, 1, 2, 15, 17], [0, 3.5, 0, 22, 12]] * 64, np.float32)
    arguments = {
        "deform_conv": ((x, offsets, w), {"padding": 1}),
        "conv": ((x, w), {"padding": 1}),
        "bilinear_sample": ((x, points), {}),
        "dcnv3": ((_array(1, 38, 40, 32), _array(1, 38, 40, 36), _array(1, 38, 40, 18)), {"padding": 1}),
        "roi_align": ((x, rois), {"output_size": 7}),
        "deform_roi_pool": ((x, rois, _array(128, 2, 7, 7)), {"output_size": 7}),
    }
    for name, (arrays, options) in arguments.items():
        forward, backward = (getattr(numdcn, f"{name}_{direction}") for direction in ("forward", "backward"))
        y = forward(*arrays, **options)
        yield name, lambda f=forward, a=arrays, o=options: (f(*a, **o),)
        yield name, lambda f=backward, a=arrays, o=options, y=y: tuple(f(y, *a, **o))


def _same(got, want):
    for a, b in zip(got, want, strict=True):
        assert (a is None and b is None) or assert_same_bits(a, b, "result") is None


def _in_library(frame):
    while frame is not None:
        if frame.f_code.co_filename.startswith(PACKAGE):
            return True
        frame = frame.f_back
    return False


class Surprise(Exception):
    """What a handler raises, every other time."""


class Alarm:
    """A timer handler that acts while the library is running; `left` is the number of times remaining."""

    def __init__(self, action):
        self.action, self.left, self.came = action, 0, 0
        signal.signal(signal.SIGALRM, self)

    def __call__(self, number, frame):
        if self.left and _in_library(frame):
            self.left -= 1
            self.came += 1
            if self.left:
                signal.setitimer(signal.ITIMER_REAL, self.pause)
            self.action()

    def during(self, call, delay, times):
        """call(), with the action some time after its start, and again shortly after, `times` in all."""
        self.left, self.pause = times, random.choice((1e-6, 1e-5, 1e-4))
        signal.setitimer(signal.ITIMER_REAL, delay)
        try:
            return call()
        finally:
            self.left = 0
            signal.setitimer(signal.ITIMER_REAL, 0)


def _raise():
    raise KeyboardInterrupt if random.random() < 0.5 else Surprise


def interrupts(count, threads, seed):
    """`count` interrupts, one, two or three in a row; afterwards everything is as before."""
    random.seed(int(seed))
    numdcn.set_num_threads(int(threads))
    calls = [(name, call, call()) for name, call in _calls()]
    calls = [(name, call, want, _duration(call)) for name, call, want in calls]
    before, alarm, turn = _threads(), Alarm(_raise), 0
    said = time.monotonic()
    while alarm.came < int(count):
        _, call, want, duration = calls[turn % len(calls)]
        turn += 1
        got = None
        with contextlib.suppress(KeyboardInterrupt, Surprise):
            got = alarm.during(call, _moment(duration), random.choice((1, 1, 1, 2, 3)))
        if got is not None:
            _same(got, want)
        if turn % 50 == 0:
            _same(call(), want)
        if time.monotonic() - said > 5:
            said = time.monotonic()
            print(f"{alarm.came} interrupts in {turn} calls", flush=True)
    for _, call, want, _ in calls:
        _same(call(), want)
    _helpers_come(int(threads))
    assert _threads() == before, f"{before} threads before, {_threads()} after"
    print(f"{alarm.came} interrupts in {turn} calls of {len(calls) // 2} operators, {threads} threads")


def _moment(duration):
    """A random moment of a call; near its start, where most of the Python is, as often as elsewhere."""
    return random.uniform(1e-6, random.choice((3e-4, 1.1 * duration)))


def _duration(call):
    times = []
    for _ in range(9):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return sorted(times)[4]


def _threads():
    """Threads of this process, as counted by the system, once those that are starting or ending have settled."""
    time.sleep(0.05)
    return len(os.listdir("/proc/self/task"))


def _helpers_come(threads):
    """A kernel in which each thread waits for all others: every helper is alive and enters a call."""
    words = np.zeros(2, np.int64)
    launch(meet, np.float32(1), Meeting(words.ctypes.data, threads), threads)
    assert words.tolist() == [threads, threads], f"of {threads} threads {words[0]} came"


def every_instruction(direction):
    """An exception before each Python instruction of a call, in whatever file, one after another: of a call that repeats the
    launches of an earlier one, then of one that records them."""
    numdcn.set_num_threads(3)
    calls = [call for name, call in _calls() if name == "deform_conv"]
    call = calls[direction == "backward"]
    want, counts = call(), []
    before = _threads()
    for forget in (lambda: None, repeated._known.clear):
        number, raised, going = 0, 0, True
        while going:
            number += 1
            forget()
            try:
                going = _at_instruction(number, call)
            except (KeyboardInterrupt, Surprise):
                raised += 1
            if number % 20 == 0 or not going:
                _same(call(), want)
        counts.append(raised)
    _helpers_come(3)
    assert _threads() == before
    assert counts[0] > 500 and counts[1] > 2000, f"only {counts} instructions"
    print(counts, "instructions")


def _at_instruction(number, function):
    """function(), raising just before its instruction `number`; returns whether there was one. Only the first execution
    of a repeated instruction counts."""
    seen = set()

    def on_instruction(code, offset):
        if code.co_filename != __file__ and (code, offset) not in seen:
            seen.add((code, offset))
            if len(seen) == number:
                _raise()

    with _watching(on_instruction):
        function()
    return len(seen) >= number


@contextlib.contextmanager
def _watching(on_instruction):
    """on_instruction(code, offset) before each instruction. (Traced frames of Python 3.13 do not report all of
    them.)"""
    if hasattr(sys, "monitoring"):
        tool, events = sys.monitoring.DEBUGGER_ID, sys.monitoring.events.INSTRUCTION
        sys.monitoring.use_tool_id(tool, "interrupts")
        sys.monitoring.register_callback(tool, events, on_instruction)
        sys.monitoring.set_events(tool, events)
        try:
            yield
        finally:
            sys.monitoring.set_events(tool, 0)
            sys.monitoring.free_tool_id(tool)
        return

    def on_event(frame, event, _):
        if event == "opcode":
            on_instruction(frame.f_code, frame.f_lasti)
        else:
            frame.f_trace_opcodes, frame.f_trace_lines = True, False
        return on_event

    sys.settrace(on_event)
    try:
        yield
    finally:
        sys.settrace(None)


def waits_for_helpers():
    """The caller has nothing left to do, but a helper does: an exception waits until the helper has left."""
    numdcn.set_num_threads(2)
    words = np.ones(3, np.int64)
    launch(leave_late, np.float32(1), Meeting(words.ctypes.data, 2), 2)  # compiled, and no helper stays
    for kind in (KeyboardInterrupt, TimeoutError):
        words = np.zeros(3, np.int64)
        threading.Timer(0.4, lambda words=words: words.__setitem__(1, 1)).start()

        def handler(*_, kind=kind):
            raise kind

        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.1)
        try:
            launch(leave_late, np.float32(1), Meeting(words.ctypes.data, 2), 2)
        except (KeyboardInterrupt, TimeoutError) as error:
            assert type(error) is kind
            assert words[2] == 1, "the call raised while a helper was at work"
        else:
            raise AssertionError("the exception was lost")
        _helpers_come(2)


def handler_calls(seed):
    """A handler that calls the library, at random moments of calls."""
    random.seed(int(seed))
    numdcn.set_num_threads(3)
    calls = [(call, call(), _duration(call)) for _, call in _calls()]

    def action():
        inner, want, _ = random.choice(calls)
        _same(inner(), want)

    alarm = Alarm(action)
    while alarm.came < 400:
        call, want, duration = random.choice(calls)
        _same(alarm.during(call, _moment(duration), random.choice((1, 2))), want)
    _helpers_come(3)


def handler_forks(seed):
    """A handler that forks, at random moments of calls: the child makes a call in the handler, or continues the
    interrupted one, then makes another; it exits with code 0 in time."""
    random.seed(int(seed))
    numdcn.set_num_threads(3)
    calls = [(call, call(), _duration(call)) for _, call in _calls()]
    children, in_child = [], False

    def action():
        nonlocal in_child
        child = os.fork()
        if child:
            children.append(child)
            return
        in_child = True
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(limit(60))  # kills a child that hangs
        if random.random() < 0.5:
            _leave(calls)

    alarm = Alarm(action)
    while len(children) < 120:
        call, want, duration = random.choice(calls)
        got = alarm.during(call, _moment(duration), 1)
        _same(got, want)
        if in_child:
            _leave(calls)
        if len(children) % 4 == 0:
            _wait_for(children)
    _wait_for(children)
    _helpers_come(3)


def _leave(calls):
    """End a child, successfully if its calls are right."""
    signal.setitimer(signal.ITIMER_REAL, limit(60))
    code = 1
    try:
        for call, want, _ in random.sample(calls, 2):
            _same(call(), want)
        _helpers_come(3)
        code = 0
    finally:
        os._exit(code)


def _wait_for(children):
    for number, child in enumerate(children):
        if child:
            _, status = os.waitpid(child, 0)
            assert status == 0, f"a child ended with status {status}" + " (hung)" * (status == signal.SIGALRM)
            children[number] = 0


def first_call(delay):
    """Ctrl-C while kernels are compiled: it raises at once, and the next call waits for the compiler."""
    numdcn.set_num_threads(3)
    x, w = np.ones((1, 40, 30, 30), np.float32), np.ones((40, 40, 1, 1), np.float32)
    alarm, start = Alarm(_raise), time.perf_counter()
    try:
        alarm.during(lambda: numdcn.conv_forward(x, w), float(delay), 1)
    except (KeyboardInterrupt, Surprise):
        print(f"interrupted after {time.perf_counter() - start:.2f} s")
    assert alarm.came, "the interrupt came too late"
    assert (numdcn.conv_forward(x, w) == 40).all()
    _helpers_come(3)
    alarm.during(lambda: None, 0, 0)


def first_call_forks(delay):
    """A handler forks while kernels are compiled; parent and child continue the call."""
    numdcn.set_num_threads(3)
    x, w = np.ones((1, 40, 30, 30), np.float32), np.ones((40, 40, 1, 1), np.float32)
    children = []
    alarm = Alarm(lambda: children.append(os.fork()))
    y = alarm.during(lambda: numdcn.conv_forward(x, w), float(delay), 1)
    if children == [0]:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(limit(100))
        os._exit(not (y == 40).all() or not (numdcn.conv_forward(x, w) == 40).all())
    assert (y == 40).all() and children, "no fork" * (not children)
    _wait_for(children)


def ends_while_compiling():
    """Ctrl-C while kernels are compiled, and nothing after it: the interpreter exits."""
    alarm = Alarm(_raise)
    try:
        alarm.during(lambda: numdcn.conv_forward(np.ones((1, 1, 9, 9)), np.ones((1, 1, 3, 3))), 0.5, 1)
    except (KeyboardInterrupt, Surprise):
        return
    raise AssertionError("the interrupt came too late")


def no_thread():
    """No thread can be started: calls work, and none leaves anything behind."""
    import resource

    numdcn.set_num_threads(3)
    _, call = next(_calls())
    want = call()  # compiles, using the existing helpers
    child = os.fork()  # the child has none
    if child == 0:
        os.setuid(65534)
        resource.setrlimit(resource.RLIMIT_NPROC, (1, 1))
        try:
            threading.Thread(target=print).start()
        except RuntimeError:
            pass
        else:
            os._exit(3)
        tracemalloc.start()
        for turn in range(900):
            _same(call(), want)
            if turn == 600:  # caches of problems have reached their limits
                kept = tracemalloc.get_traced_memory()[0]
        grown = tracemalloc.get_traced_memory()[0] - kept
        print(f"{grown} bytes more after 300 calls, {_threads()} threads", flush=True)
        os._exit(0 if grown < 100_000 and _threads() == 1 else 4)
    _, status = os.waitpid(child, 0)
    assert status == 0, f"status {status}"


PROGRAMS = {
    f.__name__: f
    for f in (interrupts, every_instruction, waits_for_helpers, handler_calls, handler_forks)
    + (first_call, first_call_forks, ends_while_compiling, no_thread)
}

if __name__ == "__main__":
    program, *rest = sys.argv[1:]
    PROGRAMS[program](*rest)
    print(program, "is right", flush=True)
