"""Measuring one operator: the processes of its contenders, run in turn, round by round; see worker.py."""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any, NamedTuple

from benchmarks.cases.operators import operator
from benchmarks.harness import machine
from benchmarks.harness.worker import ROOT, TOLERANCE, Worker, WorkerFailed

SETTLE = 0.3  # seconds between turns with --spin, to let idle pools fall asleep


class Plan(NamedTuple):
    """What to measure for an operator, and for how long."""

    operator: str
    cases: list[str]
    contenders: list[str]
    directions: list[str]
    threads: list[int]
    parts: list[str]
    rounds: int
    seconds: float  # per turn, at least, unless `most` runs are done first
    fewest: int
    most: int
    spin: bool


class Progress:
    """tqdm if installed, otherwise a single line that is overwritten."""

    def __init__(self, total: int) -> None:
        self.total, self.done = total, 0
        try:
            from tqdm import tqdm
        except ImportError:
            self.bar = None
        else:
            self.bar = tqdm(total=total, file=sys.stderr, dynamic_ncols=True, smoothing=0)

    def step(self, text: str, count: int = 1) -> None:
        self.done += count
        if self.bar is not None:
            self.bar.set_postfix_str(text, refresh=False)
            self.bar.update(count)
        else:
            end = "\n" if self.done >= self.total else ""
            print(f"\r{self.done}/{self.total} {text:<60}", end=end, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
        elif self.done < self.total:
            print(file=sys.stderr)


class Team:
    """One live process per contender and number of threads; a dead one is restarted at its next turn."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.workers: dict[tuple[str, int], Worker] = {}
        self.status: dict[str, dict[str, str]] = {}

    def start(self) -> list[str]:
        """Starts what is installed and can be imported; returns those names. `status` describes all."""
        ready = []
        for name in self.plan.contenders:
            contender = operator(self.plan.operator).contender(name)
            if not contender.installed():
                self.status[name] = {"status": "not installed"}
                continue
            try:
                hello = [self.worker(name, threads).ask("hello") for threads in self.plan.threads]
            except WorkerFailed as error:
                self.status[name] = {"status": f"failed: {error}"}
                continue
            self.status[name] = {"status": "ok", "version": hello[0]["version"]}
            ready.append(name)
        return ready

    def worker(self, name: str, threads: int) -> Worker:
        key = name, threads
        if key not in self.workers:
            python = operator(self.plan.operator).contender(name).python()
            self.workers[key] = Worker(self.plan.operator, name, threads, self.plan.spin, python=python)
        return self.workers[key]

    def ask(self, name: str, threads: int, do: str, **what: Any) -> dict[str, Any]:
        """The answer; a process that dies answers {"failed": why}."""
        try:
            return self.worker(name, threads).ask(do, **what)
        except WorkerFailed as error:
            self.workers.pop((name, threads)).close()
            return {"failed": str(error)}

    def close(self) -> None:
        for worker in self.workers.values():
            worker.close()


def status_of(answer: dict[str, Any]) -> tuple[str, str]:
    """(status, detail) of an answer to `load` or `verify`."""
    if "unsupported" in answer:
        return "unsupported", answer["unsupported"]
    if "failed" in answer:
        return "failed", answer["failed"]
    if answer.get("right") is False:
        return "wrong", answer["worst"]
    return "ok", answer.get("worst", "")


def able(plan: Plan, name: str, measurement: str) -> list[str]:
    """The directions a contender supports; none if it excludes the measurement."""
    contender = operator(plan.operator).contender(name)
    return [d for d in plan.directions if d in contender.directions and measurement in contender.measurements]


def compare(group: list[dict[str, Any]], wholes: list[dict[str, list[float]] | None]) -> None:
    """Marks as wrong whatever differs, as a whole, from the first contender that is right at some elements."""
    first = next((whole for whole in wholes if whole), None)
    for record, whole in zip(group, wholes, strict=True):
        for name, sums in (whole or {}).items():
            expected = (first or {}).get(name, sums)
            if max(abs(a - b) for a, b in zip(sums, expected, strict=True)) > TOLERANCE["float32"]:
                detail = f"{name} is not that of {next(r['contender'] for r, w in zip(group, wholes) if w is first)}"
                record["status"], record["detail"] = "wrong", detail


def measure_times(plan: Plan, team: Team, names: list[str]) -> list[dict[str, Any]]:
    """Every contender at every case: verified, then timed in turn."""
    records = []
    turns = sum(len(able(plan, name, "times")) for name in names)
    progress = Progress(turns * len(plan.threads) * len(plan.cases) * (plan.rounds + 1))
    for case in plan.cases:
        for direction in plan.directions:
            group, wholes = [], []
            for name in (name for name in names if direction in able(plan, name, "times")):
                for threads in plan.threads:
                    answer = team.ask(name, threads, "load", case=case)
                    if status_of(answer)[0] == "ok":
                        answer = team.ask(name, threads, "verify", direction=direction)
                    status, detail = status_of(answer)
                    record = {"case": case, "direction": direction, "contender": name, "threads": threads}
                    group.append(record | {"status": status, "detail": detail, "rounds": []})
                    wholes.append(answer.get("whole"))
                    progress.step(f"{case} {direction} {name} {threads}T verify", 1 + plan.rounds * (status != "ok"))
            compare(group, wholes)
            for turn in range(plan.rounds):
                for record in (r for r in group if r["status"] == "ok"):
                    take_turn(plan, team, record, turn)
                    progress.step(f"{case} {direction} {record['contender']} {record['threads']}T")
            records += group
    progress.close()
    return records


def take_turn(plan: Plan, team: Team, record: dict[str, Any], turn: int) -> None:
    """One round of one contender, its times added to its record."""
    what = {"seconds": plan.seconds, "fewest": plan.fewest, "most": plan.most}
    answer = team.ask(
        record["contender"], record["threads"], "time", direction=record["direction"], seed=100 + 10 * turn, **what
    )
    if "times" in answer:
        record["rounds"].append(answer["times"])
    else:
        record["status"], record["detail"] = status_of(answer)
    if plan.spin:
        time.sleep(SETTLE)


def ask_fresh(name: str, threads: int, plan: Plan, do: str, env: dict[str, str] | None = None, **what: Any) -> dict:
    """The answer of a process started just for this question."""
    python = operator(plan.operator).contender(name).python()
    worker = Worker(plan.operator, name, threads, plan.spin, env, python)
    try:
        return worker.ask(do, **what)
    except WorkerFailed as error:
        return {"failed": str(error)}
    finally:
        worker.close()


def measure_memory(plan: Plan, names: list[str]) -> list[dict[str, Any]]:
    """Peak extra memory of one call, each in a new process, with the maximum number of threads."""
    cases = [case for case in plan.cases if case in operator(plan.operator).memory_cases]
    jobs = [
        (case, direction, name)
        for case in cases
        for direction in plan.directions
        for name in names
        if direction in able(plan, name, "memory")
    ]
    records, progress = [], Progress(len(jobs))
    for case, direction, name in jobs:
        answer = ask_fresh(name, max(plan.threads), plan, "memory", case=case, direction=direction)
        records.append({"case": case, "direction": direction, "contender": name} | answer)
        progress.step(f"memory {case} {direction} {name}")
    progress.close()
    return records


def measure_start(plan: Plan, names: list[str]) -> dict[str, Any]:
    """Import time; the first call with an empty and with a filled cache, and the files each leaves."""
    cases = [case for case in plan.cases if case in operator(plan.operator).start_cases] or plan.cases[:1]
    names = [name for name in names if able(plan, name, "start")]
    progress = Progress(len(cases) * (len(names) + 1))
    start: dict[str, Any] = {"first": []}
    if "numdcn" in names and plan.operator == "deform_conv":  # same for all operators
        code = "import time; t = time.perf_counter(); import numdcn; print(time.perf_counter() - t)"
        seconds = []
        for _ in range(5):
            done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
            seconds.append(float(done.stdout))
        start["import_seconds"] = statistics.median(seconds)
    for case in cases:
        for name in names:
            what = {"case": case, "directions": able(plan, name, "start")}
            with tempfile.TemporaryDirectory() as folder:
                env = {"NUMBA_CACHE_DIR": folder}
                for cache in ("cold", "warm") if name == "numdcn" else ("none",):
                    answer = ask_fresh(name, max(plan.threads), plan, "first", env, **what)
                    files = sum(len(found) for _, _, found in os.walk(folder))
                    start["first"].append({"case": case, "contender": name, "cache": cache, "files": files} | answer)
                    progress.step(f"first call {case} {name}")
    progress.close()
    return start


def measure(plan: Plan) -> dict[str, Any]:
    """Everything the plan asks for, as stored in the JSON file."""
    cases, start = operator(plan.operator).cases, time.monotonic()
    results: dict[str, Any] = {"machine": machine.describe(), "plan": plan._asdict()}
    results["cases"] = {name: cases[name].text for name in plan.cases}
    team = Team(plan)
    try:
        names = team.start()
        results["contenders"] = team.status
        results["times"] = measure_times(plan, team, names) if "times" in plan.parts else []
    finally:
        team.close()
    results["memory"] = measure_memory(plan, names) if "memory" in plan.parts else []
    results["start"] = measure_start(plan, names) if "start" in plan.parts else {}
    results["machine"]["minutes taken"] = f"{(time.monotonic() - start) / 60:.1f}"
    return results
