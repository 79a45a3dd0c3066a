"""Processes that run beside each other until a deadline, each with its output in a file."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

from benchmarks.harness.machine import available_cpus

ROOT = Path(__file__).resolve().parents[2]
GRACE = 3.0  # seconds that a stopped process has for its last words
GROUPS = hasattr(os, "killpg")  # not on Windows


class Job:
    """A process and those that it starts."""

    def __init__(self, name: str, command: list[str], folder: Path) -> None:
        self.name, self.start, self.late, self.seconds = name, time.monotonic(), False, 0.0
        self.path = folder / f"{name.replace('/', '-')}.txt"
        self.file: IO[str] = self.path.open("w", encoding="utf-8")
        self.process = subprocess.Popen(
            command, stdout=self.file, stderr=subprocess.STDOUT, cwd=ROOT, start_new_session=GROUPS,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )  # fmt: skip

    def done(self) -> bool:
        return self.process.poll() is not None

    def finish(self) -> None:
        """Ends the job; one that is still running was too slow."""
        if not self.done():
            self.late = True
            self._signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(GRACE)
            self._signal(signal.SIGKILL if GROUPS else signal.SIGTERM)
        self.process.wait()
        self.file.close()
        self.seconds = time.monotonic() - self.start

    def _signal(self, number: int) -> None:
        with contextlib.suppress(OSError):  # all have ended
            if GROUPS:
                os.killpg(self.process.pid, number)
            else:
                self.process.send_signal(number)

    @property
    def output(self) -> str:
        return self.path.read_text(encoding="utf-8", errors="replace")

    @property
    def last_line(self) -> str:
        return (self.output.strip().splitlines() or [""])[-1][:300]


def end_if_told() -> None:
    """A SIGTERM ends this process as an exception does, so that its jobs end too."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))


def slots() -> int:
    """How many jobs run beside each other; some have child processes."""
    return max(2, min(12, 3 * len(available_cpus()) // 4))


def run_jobs(commands: dict[str, list[str]], folder: Path, deadline: float) -> dict[str, Job]:
    """Runs the commands in their order, as many at a time as there are slots. At the deadline those that run are stopped and
    the others are not started: they are missing in what is returned."""
    waiting, running, finished = list(commands), {}, {}  # type: ignore[var-annotated]
    try:
        while waiting or running:
            late = time.monotonic() > deadline
            while waiting and len(running) < slots() and not late:
                name = waiting.pop(0)
                running[name] = Job(name, commands[name], folder)
            for name, job in list(running.items()):
                if job.done() or late:
                    job.finish()
                    finished[name] = running.pop(name)
                    ended = "STOPPED" if job.late else "done"
                    print(f"  {name}: {ended} after {job.seconds:.0f} s", file=sys.stderr, flush=True)
            if late:
                break
            time.sleep(0.1)
    finally:
        for job in running.values():
            job.finish()
    return finished
