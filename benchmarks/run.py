"""The benchmark, one command: `python benchmarks/run.py` (or `python -m benchmarks.run`); see --help.

Each contender runs in a process of its own, which is asked in turn, round by round; see worker.py.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
if str(ROOT) not in sys.path:  # run as a script, only this folder is on the path
    sys.path.insert(0, str(ROOT))

from benchmarks import machine, report  # noqa: E402
from benchmarks.contenders import CONTENDERS, contender_class  # noqa: E402
from benchmarks.deform_conv import CASES  # noqa: E402
from benchmarks.worker import Worker, WorkerFailed, available_cpus  # noqa: E402

DIRECTIONS = ("forward", "backward")
PARTS = ("times", "memory", "start")
MEMORY_CASES = ("S1", "S4", "S5a", "large")
START_CASES = ("S4", "S7", "S8")
SETTLE = 0.3  # seconds between turns with --spin, for idle pools to fall asleep


class Plan(NamedTuple):
    """What to measure and how long."""

    cases: list[str]
    contenders: list[str]
    directions: list[str]
    threads: list[int]
    parts: list[str]
    rounds: int
    seconds: float  # of one turn, at least, unless `most` runs are done before
    fewest: int
    most: int
    spin: bool


class Progress:
    """tqdm where installed, else one line that is written over."""

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
    """One live process for each contender and number of threads; a dead one is started again at its next turn."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.workers: dict[tuple[str, int], Worker] = {}
        self.status: dict[str, dict[str, str]] = {}

    def start(self) -> list[str]:
        """Starts what is installed and imports; returns those names. `status` tells of all."""
        ready = []
        for name in self.plan.contenders:
            kind = contender_class(name)
            if not kind.installed():
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
            self.workers[key] = Worker(name, threads, self.plan.spin)
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


def measure_times(plan: Plan, team: Team, names: list[str]) -> list[dict[str, Any]]:
    """Every contender at every case: verified, then timed in turns."""
    records = []
    turns = sum(len([d for d in plan.directions if d in contender_class(name).directions]) for name in names)
    progress = Progress(turns * len(plan.threads) * len(plan.cases) * (plan.rounds + 1))
    for case in plan.cases:
        for direction in plan.directions:
            able = [name for name in names if direction in contender_class(name).directions]
            group = []
            for name in able:
                for threads in plan.threads:
                    status, detail = status_of(team.ask(name, threads, "load", case=case))
                    if status == "ok":
                        status, detail = status_of(team.ask(name, threads, "verify", direction=direction))
                    record = {"case": case, "direction": direction, "contender": name, "threads": threads}
                    group.append(record | {"status": status, "detail": detail, "rounds": []})
                    progress.step(f"{case} {direction} {name} {threads}T verify", 1 + plan.rounds * (status != "ok"))
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
    """The answer of a process started for this one question."""
    worker = Worker(name, threads, plan.spin, env)
    try:
        return worker.ask(do, **what)
    except WorkerFailed as error:
        return {"failed": str(error)}
    finally:
        worker.close()


def measure_memory(plan: Plan, names: list[str]) -> list[dict[str, Any]]:
    """Peak extra memory of one call, each in a fresh process, with the most threads."""
    cases = [case for case in plan.cases if case in MEMORY_CASES]
    jobs = [
        (case, direction, name)
        for case in cases
        for direction in plan.directions
        for name in names
        if direction in contender_class(name).directions and name != "numdcn-float64"
    ]
    records, progress = [], Progress(len(jobs))
    for case, direction, name in jobs:
        answer = ask_fresh(name, max(plan.threads), plan, "memory", case=case, direction=direction)
        records.append({"case": case, "direction": direction, "contender": name} | answer)
        progress.step(f"memory {case} {direction} {name}")
    progress.close()
    return records


def measure_start(plan: Plan, names: list[str]) -> dict[str, Any]:
    """Import time; the first call with an empty and a filled cache and the files each leaves."""
    cases = [case for case in plan.cases if case in START_CASES] or plan.cases[:1]
    names = [name for name in names if name not in ("numdcn-prepared", "numdcn-float64")]
    progress = Progress(len(cases) * (len(names) + 1))
    start: dict[str, Any] = {"first": []}
    if "numdcn" in names:
        code = "import time; t = time.perf_counter(); import numdcn; print(time.perf_counter() - t)"
        seconds = []
        for _ in range(5):
            done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
            seconds.append(float(done.stdout))
        start["import_seconds"] = statistics.median(seconds)
    for case in cases:
        for name in names:
            what = {"case": case, "directions": [d for d in plan.directions if d in contender_class(name).directions]}
            with tempfile.TemporaryDirectory() as folder:
                env = {"NUMBA_CACHE_DIR": folder}
                for cache in ("cold", "warm") if name == "numdcn" else ("none",):
                    answer = ask_fresh(name, max(plan.threads), plan, "first", env, **what)
                    files = sum(len(found) for _, _, found in os.walk(folder))
                    start["first"].append({"case": case, "contender": name, "cache": cache, "files": files} | answer)
                    progress.step(f"first call {case} {name}")
    progress.close()
    return start


def parse(arguments: list[str] | None) -> tuple[argparse.Namespace, Plan]:
    """The command line, checked."""

    def names(text: str, known: list[str], what: str) -> list[str]:
        chosen = [name for name in text.split(",") if name]
        unknown = [name for name in chosen if name not in known]
        if unknown or not chosen:
            parser.error(f"{what}: {', '.join(unknown) or 'none given'}; known are {', '.join(known)}")
        return [name for name in known if name in chosen]

    cpus = len(available_cpus())
    parser = argparse.ArgumentParser(prog="benchmarks/run.py", description="Measures numdcn against what is installed.")
    parser.add_argument("--cases", default=",".join(CASES), help="default: all")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="default: all that are installed")
    parser.add_argument("--direction", default=",".join(DIRECTIONS), help="default: forward,backward")
    parser.add_argument("--threads", default="1,2,all", help="default: 1,2,all (as far as there are CPUs)")
    parser.add_argument("--parts", default=",".join(PARTS), help="default: times,memory,start")
    parser.add_argument("--rounds", type=int, help="default: 5, with --quick 2")
    parser.add_argument("--quick", action="store_true", help="few and short runs: to see that it works")
    parser.add_argument("--spin", action="store_true", help="let idle threads spin; pause between turns")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of the report")
    parser.add_argument("--report", type=Path, metavar="JSON", help="measure nothing: report these results")
    parser.add_argument("--list", action="store_true", help="list cases and contenders")
    args = parser.parse_args(arguments)
    try:
        threads = {cpus if word == "all" else int(word) for word in args.threads.split(",")}
    except ValueError:
        parser.error(f"--threads: {args.threads!r}; expected numbers or all")
    if args.threads == parser.get_default("threads"):
        threads = {count for count in threads if count <= cpus}
    if min(threads) < 1 or max(threads) > cpus:
        parser.error(f"--threads: {args.threads!r}; expected 1 to {cpus}, the CPUs that this process may use")
    if args.rounds is not None and args.rounds < 1:
        parser.error(f"--rounds: {args.rounds}; expected 1 or more")
    plan = Plan(
        names(args.cases, list(CASES), "--cases"),
        names(args.contenders, list(CONTENDERS), "--contenders"),
        names(args.direction, list(DIRECTIONS), "--direction"),
        sorted(threads),
        names(args.parts, list(PARTS), "--parts"),
        args.rounds or (2 if args.quick else 5),
        *((0.1, 3, 10) if args.quick else (0.3, 5, 50)),
        args.spin,
    )
    return args, plan


def print_list() -> None:
    for case in CASES.values():
        print(f"{case.name:9}{case.text}")
    for name in CONTENDERS:
        kind = contender_class(name)
        print(f"{name:17}{', '.join(kind.directions):19}{kind.version() if kind.installed() else 'not installed'}")


def measure(plan: Plan) -> dict[str, Any]:
    """All that the plan asks for, as the JSON file keeps it."""
    results: dict[str, Any] = {"machine": machine.describe(), "plan": plan._asdict()}
    results["cases"] = {name: CASES[name].text for name in plan.cases}
    team = Team(plan)
    try:
        names = team.start()
        results["contenders"] = team.status
        results["times"] = measure_times(plan, team, names) if "times" in plan.parts else []
    finally:
        team.close()
    results["memory"] = measure_memory(plan, names) if "memory" in plan.parts else []
    results["start"] = measure_start(plan, names) if "start" in plan.parts else {}
    return results


def main(arguments: list[str] | None = None) -> int:
    args, plan = parse(arguments)
    if args.list:
        print_list()
        return 0
    if args.report:
        report.write(json.loads(args.report.read_text(encoding="utf-8")), args.report.parent, args.report.stem)
        return 0
    results = measure(plan)
    whole = parse([])[1]._replace(rounds=plan.rounds) == plan
    stem = machine.slug(results["machine"]["cpu"]) + ("" if whole else "-part")
    print(report.write(results, args.out, stem))
    return 0


if __name__ == "__main__":
    sys.exit(main())
