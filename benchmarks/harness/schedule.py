"""How long a call takes on many cores, computed from its tasks' times on one.

Tasks are taken in order by whoever is free; launches follow one another; what is between them runs on one core. Helpers
come late, by the measured time of waking one, and each wakes up to two others (`numdcn/_cpu/team.py`). Every core is as
fast as one alone: where caches, memory or the clock rate, which cores share, limit a call, it takes longer than computed.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

MOST = 64  # cores


class Launch(NamedTuple):
    """One launch of a kernel; times in seconds."""

    kernel: str
    threads: int  # that it would use of MOST
    before: float  # serial, from the launch before it or from the start of the call
    head: float  # from its start to its first task
    tasks: list[float]
    tail: float


class Waking(NamedTuple):
    """What it costs two threads to share a launch, by the pause that the helper has had; times in seconds."""

    pauses: list[float]  # rising
    first: list[float]  # from the launch to the first task
    second: list[float]  # to the second one
    join: list[float]  # from the end of the last task to that of the launch

    def after(self, pause: float) -> tuple[float, float, float]:
        """first, second and join after a pause."""
        first, second, join = (float(np.interp(pause, self.pauses, column)) for column in self[1:])
        return first, second, join


def finish(tasks: Iterable[float], starts: list[float]) -> float:
    """When the last task ends, each taken in order by the first that is free of those who come at `starts`."""
    free, end = sorted(starts), 0.0
    for seconds in tasks:
        done = free[0] + seconds
        heapq.heapreplace(free, done)
        end = max(end, done)
    return end


def call_seconds(launches: list[Launch], after: float, waking: Waking, cores: int) -> float:
    """How long a call takes; `after` is serial, after the last launch. Calls follow one another."""
    total, pause = after, after
    for launch in launches:
        count = min(cores, launch.threads)
        total, pause = total + launch.before, pause + launch.before
        if count == 1:
            spent = launch.head + sum(launch.tasks) + launch.tail
            pause += spent
        else:
            first, second, join = waking.after(pause)
            # the caller wakes helpers 1 and 2, they 3 to 6, and so on
            starts = [first, *(((helper + 1).bit_length() - 1) * second for helper in range(1, count))]
            spent = launch.head + finish(launch.tasks, starts) + join + launch.tail
            pause = 0.0
        total += spent
    return total


def speedups(launches: list[Launch], after: float, waking: Waking, most: int = MOST) -> list[float]:
    """How many times as fast as one core 1, 2, ... cores are."""
    seconds = [call_seconds(launches, after, waking, cores) for cores in range(1, most + 1)]
    return [seconds[0] / one for one in seconds]
