"""Everything that needs a GPU in one command: `python -m benchmarks.gpu`. Under eight minutes on an H100; needs
numba-cuda and NumPy, and uses torch, torchvision, CuPy, pytest and matplotlib if they are installed.

It runs the GPU tests, compares every operator with the CPU's results and with torchvision's, then times them, and
writes results/gpu-<name>.md, .json and .png. Without a GPU it says so and ends with exit code 2; with `--simulator` it
does all of this at tiny sizes in Numba's simulator, which says nothing about speed. Exit code 1: something was wrong.
"""

from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import IO, Any

# Import Numba only after the simulator is requested: no module of the benchmarks imports it, or numdcn, at the top.
from benchmarks.gpu import floors, report, timing
from benchmarks.gpu.compare import DTYPES, worker
from benchmarks.gpu.device import Device, NoGPU
from benchmarks.harness.machine import available_cpus

ROOT = Path(__file__).resolve().parents[2]
SIMULATOR = "NUMBA_ENABLE_CUDASIM"
OPERATORS = (
    "deform_conv", "conv", "deform_conv_layer", "bilinear_sample", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool",
    "deform_roi_pool", "deform_ps_roi_pool", "ms_deform_attn", "dcnv3", "dcnv4", "arrays",
)  # fmt: skip
LIMIT = 460.0  # seconds for the whole run
CHECKS = 0.55  # share of these for tests and comparisons
ROWS_SHARE = 0.75  # share of the rest for S1 to S7; what remains is for the other operators
NO_GPU = 2


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Tests, compares and times numdcn on a GPU."
    )
    parser.add_argument(
        "--simulator", action="store_true", help=f"tiny sizes in Numba's simulator (as {SIMULATOR}=1): no speeds"
    )
    parser.add_argument(
        "--floors", action="store_true", help="print the floors and the plan of every row, measure nothing"
    )
    parser.add_argument("--parts", default="tests,compare,time", help="default: tests,compare,time")
    parser.add_argument("--operators", default=",".join(OPERATORS), help="to compare and time; default: all")
    parser.add_argument("--kinds", help="types to compare, such as float32,bfloat16; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="of timing; default: 5")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds of the whole run; default: {LIMIT:g}")
    parser.add_argument("--seed", type=int, help="of the inputs; default: another each time")
    parser.add_argument(
        "--out", type=Path, help="folder of the report; default: benchmarks/results, needed with --simulator"
    )
    parser.add_argument("--report", type=Path, metavar="JSON", help="measure nothing: report these results")
    parser.add_argument("--worker", metavar="OPERATOR", help=argparse.SUPPRESS)  # a single comparing process
    return parser


class Job:
    """A process running alongside this one, with its output in a file."""

    def __init__(self, name: str, command: list[str], folder: Path) -> None:
        self.name, self.start, self.late = name, time.monotonic(), False
        self.path = folder / f"{name}.txt"
        self.file: IO[str] = self.path.open("w", encoding="utf-8")
        self.process = subprocess.Popen(command, stdout=self.file, stderr=subprocess.STDOUT, cwd=ROOT)

    def done(self) -> bool:
        return self.process.poll() is not None

    def stop(self) -> None:
        """Ends the process because it was too slow."""
        if not self.done():
            self.late = True
            self.process.kill()
        self.process.wait()
        self.file.close()

    @property
    def output(self) -> str:
        return self.path.read_text(encoding="utf-8", errors="replace")


def test_command(simulated: bool) -> list[str]:
    """The GPU tests: those whose backend is `cuda`. The simulator's are among the ordinary tests."""
    return [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-m",
        "not large",
        "-k",
        "simulator" if simulated else "cuda",
        "tests",
    ]


def worker_command(operator: str, args: argparse.Namespace) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--worker", operator]
    command += ["--simulator"] * args.simulator
    return command + (["--kinds", args.kinds] if args.kinds else [])


def run_jobs(commands: dict[str, list[str]], folder: Path, deadline: float) -> dict[str, Job]:
    """Runs processes in parallel, as many as there are CPUs for, until the deadline. They also fill the kernel
    cache."""
    waiting, running, finished = list(commands), {}, {}  # type: ignore[var-annotated]
    most = max(2, min(8, len(available_cpus()) // 2))
    while waiting or running:
        late = time.monotonic() > deadline
        while waiting and len(running) < most and not late:
            name = waiting.pop(0)
            running[name] = Job(name, commands[name], folder)
        for name, job in list(running.items()):
            if job.done() or late:
                job.stop()
                finished[name] = running.pop(name)
                took = time.monotonic() - job.start
                print(f"  {name}: {'stopped' if job.late else 'done'} after {took:.0f} s", file=sys.stderr, flush=True)
        if late:
            break
        time.sleep(0.1)
    return finished


def verdicts_of(operators: Iterable[str], jobs: dict[str, Job]) -> list[dict[str, Any]]:
    """The results of the comparing processes; one that died or was late is reported too."""
    found = []
    for operator in operators:
        job = jobs.get(operator)
        lines = [] if job is None else [line for line in job.output.splitlines() if line.startswith('{"operator"')]
        found += [json.loads(line) for line in lines]
        trouble = ""
        if job is None:
            trouble = "no time left"
        elif job.late:
            trouble = f"stopped after {len(lines)} comparisons: no time left"
        elif job.process.returncode:
            trouble = f"exit code {job.process.returncode}: {(job.output.strip().splitlines() or [''])[-1][:300]}"
        if trouble:
            found.append({"operator": operator, "what": "process", "status": "failed", "worst": 0.0, "detail": trouble})
    return found


def tests_text(job: Job | None, wanted: bool, simulated: bool) -> tuple[str, bool]:
    """A summary of the tests, and whether they passed."""
    if not wanted:
        return "Not asked for.", True
    if simulated:
        return "The simulator's tests are a part of `python -m pytest`.", True
    if job is None:
        return "Not run: " + (
            "no time left." if importlib.util.find_spec("pytest") else "pytest is not installed."
        ), True
    last = (job.output.strip().splitlines() or ["no output"])[-1].strip("= ")
    if job.late:
        return f"Stopped, as no time was left: `{last[:300]}`", True
    code = job.process.returncode
    if code == 5:
        return "No test has the `cuda` backend.", False
    failures = [line for line in job.output.splitlines() if line.startswith(("FAILED", "ERROR"))]
    return "\n".join(
        [f"`{' '.join(test_command(False)[1:])}`: {last}", "", *(f"- `{f[:300]}`" for f in failures[:40])]
    ), code == 0


def check(args: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """The tests and the comparisons."""
    wanted, operators = args.parts.split(","), [name for name in args.operators.split(",") if name]
    commands: dict[str, list[str]] = {}
    if "compare" in wanted:
        commands = {name: worker_command(name, args) for name in operators}
    if "tests" in wanted and not args.simulator and importlib.util.find_spec("pytest") is not None:
        commands["tests"] = test_command(False)
    print(f"tests and comparisons: {len(commands)} processes", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        jobs = run_jobs(commands, Path(folder), deadline)
        tests, well = tests_text(jobs.get("tests"), "tests" in wanted, args.simulator)
        verdicts = verdicts_of(operators, jobs) if "compare" in wanted else []
    return {"tests": tests, "tests_well": well, "verdicts": verdicts}


def timed(args: argparse.Namespace, device: Any, clock_seconds: float) -> dict[str, Any]:
    """The times."""
    found: dict[str, Any] = {"rows": [], "operators": [], "issue": [], "rate_lines": []}
    rates = floors.nominal(device.name)
    if "time" in args.parts.split(","):
        clock, rows_clock = timing.Clock(clock_seconds), timing.Clock(ROWS_SHARE * clock_seconds)

        def say(line: str) -> None:
            print(f"  {clock.left():4.0f} s left  {line}", file=sys.stderr, flush=True)

        rates, found["rate_lines"] = timing.measured_rates(device)
        operators = args.operators.split(",")
        found["issue"] = timing.issue_times(device, operators, say)
        if "deform_conv" in operators:
            found["rows"] = timing.time_rows(device, rows_clock, args.rounds, args.seed, say)
        found["operators"] = timing.time_operators(device, clock, args.rounds, operators, say)
    return {**found, "rates": rates._asdict()}


def is_well(results: dict[str, Any]) -> bool:
    """Whether nothing was found wrong, missing or failing."""
    timed_ones = [*results["rows"], *results["operators"], *results["issue"]]
    own = [r for r in timed_ones if r["contender"].startswith(("numdcn", "all", "reference"))]
    good = all(v["status"] in ("right", "skipped") for v in results["verdicts"])
    return bool(results["tests_well"] and good and all(r["status"] in ("ok", "no time left") for r in own))


def main(arguments: list[str] | None = None) -> int:
    parser = arguments_parser()
    args = parser.parse_args(arguments)
    if args.floors:
        print(floors.text(), end="")
        return 0
    args.simulator = args.simulator or os.environ.get(SIMULATOR, "0") not in ("", "0")
    if args.simulator:
        os.environ[SIMULATOR] = "1"  # before numba.cuda is imported, here and in child processes
    if args.worker:
        return worker(args.worker, args.simulator, args.kinds.split(",") if args.kinds else DTYPES)
    if args.report:
        print(report.write(json.loads(args.report.read_text(encoding="utf-8")), args.report.parent))
        return 0
    if args.simulator and args.out is None:
        parser.error("--simulator needs --out FOLDER: its report tells no speeds")
    return run(args)


def run(args: argparse.Namespace) -> int:
    """The whole run."""
    start = time.monotonic()
    try:
        device = Device(args.simulator)
    except NoGPU as error:
        print(f"No GPU: {error}. Nothing was measured. `--simulator --out FOLDER` goes through it all without one.")
        return NO_GPU
    if args.seed is None:
        args.seed = int.from_bytes(os.urandom(4), "big")
    print(f"{device.name}; inputs of seed {args.seed}", file=sys.stderr, flush=True)
    if args.simulator:
        sys.setswitchinterval(1e-4)  # switch sooner between threads that wait for each other
    results: dict[str, Any] = {"simulated": args.simulator, "about": device.about()}
    results["about"] |= {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"), "seed": str(args.seed)}
    results |= check(args, start + CHECKS * args.limit)
    results |= timed(args, device, args.limit - (time.monotonic() - start) - 10)
    results["seconds"] = time.monotonic() - start
    path = report.write(results, args.out or ROOT / "benchmarks" / "results")
    for one in report.targets(results):
        print(f"{one.what}: {one.measured or '-'}, wanted {one.target}: {one.verdict}")
    well = is_well(results)
    print(f"{path}: {'all that was run is right' if well else 'SOMETHING WAS NOT RIGHT: see the report'}")
    return 0 if well else 1
