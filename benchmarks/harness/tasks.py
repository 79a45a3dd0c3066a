"""The tasks of numdcn's kernels, timed one by one: a `worker` whose kernels are compiled with a `next_task` that notes the time.

numdcn's code is as always. This process exchanges its kernels' `next_task` before they are compiled, and functions that
`launch` calls. It needs a NUMBA_CACHE_DIR of its own, so that no other process loads these kernels.
"""

from __future__ import annotations

import ctypes
import gc
import importlib
import pkgutil
import sys
import time
from collections.abc import Callable
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

import numdcn._cpu
from benchmarks.harness.schedule import MOST, Launch, Waking
from benchmarks.harness.worker import SET_BYTES, Served, serve
from numdcn._cpu import team, threads
from numdcn._cpu.jit import kernel
from numdcn._cpu.parameters import unpack
from numdcn._cpu.team import _pause, _read
from numdcn._formulas.vectors import I32, I64

CAPACITY = 1 << 20  # numbers of tasks for which there is room; the last row takes all further ones
MEETINGS = 200  # for each pause


def stamping(clock: int) -> Any:
    """`next_task`, which also writes the time to the row of this number, in the log whose address stands before the
    counter."""

    def make(typingctx: Any, address: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            counter, last = builder.inttoptr(args[0], I64.as_pointer()), ir.Constant(I64, CAPACITY - 1)
            task = builder.atomic_rmw("add", counter, ir.Constant(I64, 1), "monotonic")
            log = builder.load(builder.gep(counter, [ir.Constant(I64, -1)]))
            row = builder.select(builder.icmp_unsigned("<", task, last), task, last)
            timespec = builder.inttoptr(builder.add(log, builder.mul(row, ir.Constant(I64, 16))), I64.as_pointer())
            function_type = ir.FunctionType(I32, [I32, I64.as_pointer()])
            function = cgutils.get_or_insert_function(builder.module, function_type, "clock_gettime")
            builder.call(function, [ir.Constant(I32, clock), timespec])
            return task

        return types.int64(types.intp), codegen

    return intrinsic(make)


# Tasks are timed by the thread's own clock, which stands still while other processes have the core.
OWN, COMMON = time.CLOCK_THREAD_CPUTIME_ID, time.CLOCK_MONOTONIC
timed_task, met_task = stamping(OWN), stamping(COMMON)


class Meeting(NamedTuple):
    """Parameters of `meet`."""

    expected: int


@kernel
def meet(one: Any, params: Any, counter: Any, slot: Any) -> Any:
    """As many tasks as threads, which wait for each other: every thread has one."""
    a = unpack(params, Meeting)
    while True:
        if met_task(counter) >= a.expected:
            return
        while _read(counter) < a.expected:
            _pause()


class Run(NamedTuple):
    """What one launch has told: moments in seconds."""

    kernel: str
    threads: int
    entered: float
    begin: float  # of the kernel
    stamps: np.ndarray  # when each number was taken from the counter
    end: float
    left: float


class TimedTasks(Served):
    """A contender of numdcn whose calls tell when their tasks began."""

    def __init__(self, operator_name: str, name: str, count: int, spin: bool) -> None:
        super().__init__(operator_name, name, count, spin)
        for found in pkgutil.walk_packages(numdcn._cpu.__path__, "numdcn._cpu."):
            module = importlib.import_module(found.name)
            if hasattr(module, "next_task"):
                setattr(module, "next_task", timed_task)  # noqa: B010 - mypy
        self.log = np.zeros((CAPACITY, 2), np.int64)
        self.runs: list[Run] = []
        self.clock = OWN  # and then no helpers, however many are asked for

    def now(self) -> float:
        return time.clock_gettime(self.clock)

    def run_stamped(self, board: int, code: int, wide: int, values: int, counter: int, helpers: int) -> int:
        """The original `run`, and what came of it. The unused word before the counter gets the address of the log."""
        entered = self.now()
        ctypes.c_int64.from_address(counter - 8).value = self.log.ctypes.data
        name = next(key[0].__name__ for key, found in threads._codes.items() if found[0] == code)
        begin = self.now()
        failed = team.run(board, code, wide, values, counter, 0 if self.clock == OWN else helpers)
        end = self.now()
        count = ctypes.c_int64.from_address(counter).value
        if not 0 < count < CAPACITY:
            raise RuntimeError(f"{name} took {count} numbers from its counter")
        stamps = self.log[:count] @ np.array([1, 1e-9])
        self.runs.append(Run(name, helpers + 1, entered, begin, stamps, end, self.now()))
        return failed

    def watched(self, action: Callable[[], Any], **more: Any) -> tuple[float, list[Run], float]:
        """Start, launches and end of an action; `more` are other functions of `threads` to exchange meanwhile."""
        self.runs = []
        with patch.multiple(threads, run=self.run_stamped, **more):
            start = self.now()
            result = action()
            end = self.now()
        del result
        return start, self.runs, end

    def tasks(self, direction: str, seed: int, seconds: float, fewest: int) -> dict[str, Any]:
        """The launches of a call, with the seconds of every task: the medians of at least `fewest` calls on this thread alone.
        `threads` is what the call would use of MOST."""
        first = self.inputs(seed, direction)
        sets = [first] if first.nbytes > SET_BYTES else [first, self.inputs(seed + 1, direction)]
        given = [self.contender.convert(inputs) for inputs in sets]
        call = self.call(direction)

        def watch(arguments: Any) -> tuple[float, list[Run], float]:
            return self.watched(lambda: call(arguments), _recruit=lambda count: None)

        numdcn.set_num_threads(MOST)
        wanted = [run.threads for run in watch(given[0])[1]]
        numdcn.set_num_threads(1)
        watch(given[-1])  # what it allocates for one thread
        gc.collect()
        gc.disable()
        calls: list[tuple[float, list[Run], float]] = []
        while len(calls) < fewest or sum(end - start for start, _, end in calls) < seconds:
            calls.append(watch(given[0]))
            for arguments in given[1:]:  # so that the next call's inputs are not in the cache
                call(arguments)
        gc.enable()
        launches, after = launches_of(calls, wanted)
        return {"launches": launches, "after": after}

    def wake(self, pauses: list[float]) -> dict[str, list[float]]:
        """First quartiles for two threads that meet after a pause, in seconds: the pause; from the launch to the first task, to the
        second; and from the end of both to the launch's."""
        self.clock = COMMON
        table: list[list[float]] = []
        for pause in pauses:
            rows, last = [], self.now()
            for _ in range(MEETINGS):
                while self.now() < last + pause:
                    pass
                _, (run,), _ = self.watched(lambda: threads.launch(meet, np.float32(1), Meeting(2), 2))
                rows.append([run.begin - last, *(run.stamps[:2] - run.begin), run.end - run.stamps[-1]])
                last = run.end
            table.append(np.quantile(rows[1:], 0.25, axis=0).tolist())  # a core that others use wakes late
        self.clock = OWN
        columns = np.array(sorted(table)).T.tolist()
        return dict(zip(Waking._fields, columns, strict=True))


def launches_of(calls: list[tuple[float, list[Run], float]], wanted: list[int]) -> tuple[list[Launch], float]:
    """Each launch of a call, by the medians of several calls; and the seconds after the last."""
    kinds = {tuple((run.kernel, len(run.stamps)) for run in runs) for _, runs, _ in calls}
    if len(kinds) != 1 or len(wanted) != len(calls[0][1]):
        raise RuntimeError(f"calls have different tasks: {kinds}, {len(wanted)} launches on {MOST} threads")
    launches, ends = [], [start for start, _, _ in calls]
    for number, count in enumerate(wanted):
        same = [runs[number] for _, runs, _ in calls]
        moments = [np.array([run.begin, *run.stamps, run.end]) for run in same]
        head, *tasks, tail = np.median(np.diff(moments), axis=0).tolist()
        before = float(np.median([run.entered - end for run, end in zip(same, ends, strict=True)]))
        launches.append(Launch(same[0].kernel, count, before, head, tasks, tail))
        ends = [run.left for run in same]
    return launches, float(np.median([end - left for (_, _, end), left in zip(calls, ends, strict=True)]))


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4] == "1", TimedTasks)
