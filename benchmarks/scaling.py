"""What numdcn would gain from many cores: python -m benchmarks.scaling [--operators NAME ...] [--cases ...] [--direction ...]

Times every task of every launch of a call alone on one core, computes from these times how long the call takes on 1 to 64
cores (harness/schedule.py), and compares the prediction with measured calls on as many cores as there are (--threads).
Writes tables, a picture for each direction and the numbers to the folder of results. Needs two CPUs, on Linux.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.cases.operators import GROUPS, OPERATORS, operator
from benchmarks.compare import make_ready, time_pairs
from benchmarks.harness import machine, scaling_report
from benchmarks.harness.group_report import DIRECTIONS, OWN
from benchmarks.harness.measure import status_of
from benchmarks.harness.report import PART, number
from benchmarks.harness.schedule import MOST, Launch, Waking, call_seconds, speedups
from benchmarks.harness.worker import Worker, WorkerFailed
from benchmarks.run import chosen_names, chosen_operators, thread_counts

TASKS = "benchmarks.harness.tasks"
PAUSES = [0.0, 1e-5, 2e-5, 5e-5, 2e-4, 1e-3]  # seconds that a helper has had nothing to do


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.scaling",
        description="Predicts numdcn's speed-up on many cores from tasks timed on one.",
    )
    parser.add_argument(
        "--operators",
        nargs="+",
        metavar="NAME",
        default=["all"],
        help=f"operators or groups of them; default: all; known: {', '.join([*OPERATORS, *GROUPS])}",
    )
    parser.add_argument("--cases", help="default: all of each operator")
    parser.add_argument("--direction", default=",".join(DIRECTIONS), help="default: forward,backward")
    parser.add_argument("--threads", default="2", help="numbers to check the prediction with, as 2,8,16; default: 2")
    parser.add_argument("--rounds", type=int, default=5, help="of the measured calls; default: 5")
    parser.add_argument("--quick", action="store_true", help="few and short runs: to see that it works")
    parser.add_argument("--out", type=Path, default=scaling_report.FOLDER, help="folder of the report")
    parser.add_argument("--report", type=Path, metavar="JSON", help="measure nothing: report these results")
    return parser


class Bench:
    """The processes for one operator: one whose tasks are timed, and one for each number of threads, plain."""

    def __init__(self, name: str, counts: list[int], cache: str, stack: contextlib.ExitStack) -> None:
        def start(threads: int, **more: Any) -> Worker:
            return stack.enter_context(contextlib.closing(Worker(name, OWN, threads, **more)))

        self.timed = start(1, env={"NUMBA_CACHE_DIR": cache}, module=TASKS)
        self.plain = {threads: start(threads) for threads in (1, *counts)}
        self.counts = counts

    def row(self, case: str, direction: str, waking: Waking, args: argparse.Namespace) -> dict[str, Any]:
        """What is told of a case in one direction."""
        for worker in (self.timed, *self.plain.values()):
            status, why = make_ready(worker, case, direction)
            if status != "ok":
                return {"status": status, "detail": why}
        seconds, fewest = (0.05, 2) if args.quick else (0.5, 7)
        answer = self.timed.ask("tasks", direction=direction, seed=100, seconds=seconds, fewest=fewest)
        if "launches" not in answer:
            raise WorkerFailed(status_of(answer)[1])
        launches, after = [Launch(*fields) for fields in answer["launches"]], answer["after"]
        predicted, one = speedups(launches, after, waking), call_seconds(launches, after, waking, 1)
        checks = []
        for threads in self.counts:
            times = time_pairs([self.plain[1], self.plain[threads]], direction, args.rounds)
            checks.append(
                {
                    "threads": threads,
                    "predicted": rounded(predicted[threads - 1]),
                    "measured": rounded(statistics.median(alone / shared for alone, shared in times)),
                    "one_seconds": rounded(statistics.median(alone for alone, _ in times)),
                }
            )
        return {
            "status": "ok",
            "seconds": rounded(one),
            "serial_seconds": rounded(after + sum(launch.before for launch in launches)),
            "launches": [told(launch) for launch in launches],
            "speedups": [rounded(value) for value in predicted],
            "checks": checks,
        }


def rounded(value: float) -> float:
    return float(f"{value:.4g}")


def told(launch: Launch) -> dict[str, Any]:
    """A launch without the times of its tasks."""
    return {
        "kernel": launch.kernel,
        "tasks": len(launch.tasks),
        "threads": launch.threads,
        "seconds": rounded(launch.head + sum(launch.tasks) + launch.tail),
        "longest_seconds": rounded(max(launch.tasks, default=0.0)),
    }


def measure_waking(cache: str) -> Waking:
    """What it costs to wake a helper."""
    worker = Worker("deform_conv", OWN, 2, env={"NUMBA_CACHE_DIR": cache}, module=TASKS)
    with contextlib.closing(worker):
        answer = worker.ask("wake", pauses=PAUSES)
    if "first" not in answer:
        raise WorkerFailed(status_of(answer)[1])
    return Waking(**answer)


def line(row: dict[str, Any]) -> str:
    """What the terminal shows of a row."""
    name = f"{row['operator']:19} {row['case']:9} {row['direction']:8}"
    if row["status"] != "ok":
        return f"{name} {row['status']}: {row['detail']}"
    predicted = "".join(f"{number(row['speedups'][cores - 1]):>6}" for cores in scaling_report.SHOWN)
    checks = [f"{check['measured']:.2f} ({scaling_report.difference(check):+.1%})" for check in row["checks"]]
    return f"{name} {number(1e3 * row['seconds']):>6} {predicted}   {', '.join(checks)}"


def measure(args: argparse.Namespace, names: list[str], cases: list[str], counts: list[int]) -> dict[str, Any]:
    """All rows, shown as they come."""
    start, rows = time.monotonic(), []
    results: dict[str, Any] = {"machine": machine.describe()}
    head = "".join(f"{f'x{cores}':>6}" for cores in scaling_report.SHOWN)
    checked = ", ".join(map(str, counts))
    with tempfile.TemporaryDirectory() as cache:
        waking = measure_waking(cache)
        results["waking"] = {field: [rounded(value) for value in column] for field, column in waking._asdict().items()}
        print(f"{'':38} {'ms':>6} {head}   measured on {checked} cores (and how far from the prediction)")
        for name in names:
            with contextlib.ExitStack() as stack:
                bench = Bench(name, counts, cache, stack)
                for case in (case for case in operator(name).cases if case in cases):
                    for direction in args.direction:
                        row = {"operator": name, "case": case, "direction": direction}
                        rows.append(row | bench.row(case, direction, waking, args))
                        print(line(rows[-1]), flush=True)
    results["machine"]["minutes taken"] = f"{(time.monotonic() - start) / 60:.1f}"
    return results | {"rows": rows}


def main(arguments: list[str] | None = None) -> int:
    parser = arguments_parser()
    args = parser.parse_args(arguments)
    if args.report:
        results = json.loads(args.report.read_text(encoding="utf-8"))
        print(f"Report: {scaling_report.write(results, args.report.parent, args.report.stem)}")
        return 0
    if len(machine.available_cpus()) < 2:
        parser.error("two CPUs are needed, to measure what waking a thread costs")
    names = chosen_operators(parser, args.operators)
    known = list(dict.fromkeys(case for name in names for case in operator(name).cases))
    cases = known if args.cases is None else chosen_names(parser, args.cases, known, "--cases")
    args.direction = chosen_names(parser, args.direction, list(DIRECTIONS), "--direction")
    counts = [count for count in thread_counts(parser, args.threads) if count > 1]
    if args.rounds < 1 or max(counts, default=1) > MOST:
        parser.error(f"--rounds: expected 1 or more; --threads: expected at most {MOST}")
    whole = (names, cases, args.direction, args.quick) == ([*OPERATORS], known, [*DIRECTIONS], False)
    results = measure(args, names, cases, counts)
    stem = f"{machine.slug(results['machine']['cpu'])}-scaling" + PART * (not whole)
    for text in scaling_report.verdicts(results):
        print(text)
    print(f"Report: {scaling_report.write(results, args.out, stem)}")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except WorkerFailed as error:
        sys.exit(f"failed: {error}")
