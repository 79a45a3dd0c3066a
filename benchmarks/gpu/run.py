"""Everything that needs a GPU in one command: `python -m benchmarks.gpu`. Under eight minutes on an H100; needs
numba-cuda and NumPy, and uses torch, torchvision, CuPy, pytest and matplotlib if they are installed.

Its stages, each of which may take a share of the time limit (STAGES):

1. versions: of the driver, the compiler, the linker, the packages; what does not go together is told in words, and a small
   kernel is compiled, linked and loaded. If that fails, so would the rest: it ends.
2. compile: all kernels, on all CPUs, into the cache on disk.
3. check: the GPU tests, and in turn with them every operator is compared with the CPU's results and with torchvision's.
4. time: the rows, contenders in turn.

It writes gpu-<name>.md and .json before stage 4 and again at the end, then with a .png. A watchdog ends a GPU that hangs.
Exit codes: 0 all is right; 1 something was wrong; 2 no usable GPU, nothing was done; 3 nothing was wrong, but not everything
was run: the time limit. `--simulator` goes through it all at tiny sizes in Numba's simulator, and
`python -m tools.ptx_emulator python -m benchmarks.gpu --out FOLDER` on an emulated GPU; neither says anything about speed.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import faulthandler
import importlib.util
import itertools
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

# Import Numba only after the simulator is requested: no module of the benchmarks imports it, or numdcn, at the top.
from benchmarks.gpu import compiling, floors, report, testing, timing, versions
from benchmarks.gpu.compare import DTYPES, worker
from benchmarks.gpu.device import Device, NoGPU
from benchmarks.gpu.jobs import ROOT, Job, end_if_told, run_jobs

SIMULATOR = "NUMBA_ENABLE_CUDASIM"
OPERATORS = (
    "deform_conv", "conv", "deform_conv_layer", "bilinear_sample", "roi_align", "roi_pool", "ps_roi_align", "ps_roi_pool",
    "deform_roi_pool", "deform_ps_roi_pool", "ms_deform_attn", "dcnv3", "dcnv4", "arrays",
)  # fmt: skip
PARTS = "compile,tests,compare,time"
LIMIT = 460.0  # seconds for the whole run
STAGES = {"compile": 0.4, "check": 0.7}  # until when, in shares of the limit; times take what is left
HANG = 60.0  # seconds after the limit at which a GPU that does not answer is given up
ROWS_SHARE = 0.75  # share of the rest for S1 to S7; what remains is for the other operators
RIGHT, WRONG, NO_GPU, INCOMPLETE = range(4)  # exit codes


def arguments_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gpu", description="Compiles, tests, compares and times numdcn on a GPU."
    )
    parser.add_argument(
        "--simulator", action="store_true", help=f"tiny sizes in Numba's simulator (as {SIMULATOR}=1): no speeds"
    )
    parser.add_argument(
        "--floors", action="store_true", help="print the floors and the plan of every row, measure nothing"
    )
    parser.add_argument("--parts", default=PARTS, help=f"default: {PARTS}")
    parser.add_argument("--operators", default=",".join(OPERATORS), help="to compare and time; default: all")
    parser.add_argument("--kinds", help="types to compile and compare, such as float32,bfloat16; default: all")
    parser.add_argument("--rounds", type=int, default=5, help="of timing; default: 5")
    parser.add_argument("--limit", type=float, default=LIMIT, help=f"seconds of the whole run; default: {LIMIT:g}")
    parser.add_argument("--seed", type=int, help="of the inputs; default: another each time")
    parser.add_argument(
        "--out", type=Path, help="folder of the report; default: benchmarks/results, needed where the GPU is simulated"
    )
    parser.add_argument("--report", type=Path, metavar="JSON", help="measure nothing: report these results")
    parser.add_argument("--worker", metavar="OPERATOR", help=argparse.SUPPRESS)  # a single comparing process
    parser.add_argument("--compiler", action="store_true", help=argparse.SUPPRESS)  # the process of stage 2
    return parser


def kinds_of(args: argparse.Namespace) -> Iterable[str]:
    """The types to compile and compare."""
    return args.kinds.split(",") if args.kinds else DTYPES


def worker_command(operator: str, args: argparse.Namespace) -> list[str]:
    command = [sys.executable, "-m", "benchmarks.gpu", "--worker", operator]
    command += ["--simulator"] * args.simulator
    return command + (["--kinds", args.kinds] if args.kinds else [])


def verdicts_of(operators: Iterable[str], jobs: dict[str, Job]) -> list[dict[str, Any]]:
    """The results of the comparing processes; one that died or was stopped is reported too."""
    found = []
    for operator in operators:
        job = jobs.get(operator)
        lines = [] if job is None else [line for line in job.output.splitlines() if line.startswith('{"operator"')]
        found += [json.loads(line) for line in lines if line.endswith("}")]
        status, trouble = "stopped", ""
        if job is None:
            trouble = "not started: no time left"
        elif job.late:
            trouble = f"stopped after {len(lines)} comparisons: no time left"
        elif job.process.returncode or not lines:
            status, trouble = "failed", f"exit code {job.process.returncode}: {job.last_line}"
        if trouble:
            found.append({"operator": operator, "what": "process", "status": status, "worst": 0.0, "detail": trouble})
    return found


def tests_verdict(args: argparse.Namespace, files: list[str], jobs: dict[str, Job]) -> tuple[str, str]:
    """A summary of the tests, and their verdict: right, wrong, stopped, or not run."""
    if "tests" not in args.parts.split(","):
        return "Not asked for.", "not run"
    if args.simulator:
        return "The simulator's tests are a part of `python -m pytest`.", "not run"
    if not files:
        return "Not run: pytest is not installed.", "stopped"
    outcomes = [testing.outcome(file, jobs.get(file)) for file in files]
    return testing.text(outcomes), testing.verdict(outcomes)


def alternately(first: dict[str, list[str]], second: dict[str, list[str]]) -> dict[str, list[str]]:
    """The entries of both, one of each in turn while there are any."""
    pairs = itertools.zip_longest(first.items(), second.items())
    return dict(item for pair in pairs for item in pair if item is not None)


def check(args: argparse.Namespace, deadline: float) -> dict[str, Any]:
    """The tests and the comparisons, which start in turn, so that neither waits until no time is left."""
    wanted, operators = args.parts.split(","), [name for name in args.operators.split(",") if name]
    files: list[str] = []
    if "tests" in wanted and not args.simulator and importlib.util.find_spec("pytest") is not None:
        files = testing.files()
    commands = {file: testing.command(file) for file in files}
    comparisons = {name: worker_command(name, args) for name in operators if "compare" in wanted}
    with tempfile.TemporaryDirectory() as folder:
        jobs = run_jobs(alternately(commands, comparisons), Path(folder), deadline)
        tests, verdict = tests_verdict(args, files, jobs)
        verdicts = verdicts_of(operators, jobs) if "compare" in wanted else []
    return {"tests": tests, "tests_verdict": verdict, "verdicts": verdicts}


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


def verdict(results: dict[str, Any]) -> int:
    """The exit code: whether anything was found wrong, missing or failing, and whether everything was run."""
    timed_ones = [*results["rows"], *results["operators"], *results["issue"]]
    own = {r["status"] for r in timed_ones if r["contender"].startswith(("numdcn", "all", "reference"))}
    compared = {v["status"] for v in results["verdicts"]}
    compiled = results["compiled"]
    if compiled and not compiling.is_well(compiled):
        return WRONG
    if (
        results["tests_verdict"] == "wrong"
        or compared - {"right", "skipped", "stopped"}
        or own - {"ok", "no time left"}
    ):
        return WRONG
    if results["tests_verdict"] == "stopped" or "stopped" in compared or "no time left" in own:
        return INCOMPLETE
    return RIGHT


SAID = {
    RIGHT: "all that was run is right",
    WRONG: "SOMETHING WAS NOT RIGHT: see the report",
    INCOMPLETE: "nothing was wrong, but NOT EVERYTHING WAS RUN: see the report",
}


def main(arguments: list[str] | None = None) -> int:
    parser = arguments_parser()
    args = parser.parse_args(arguments)
    if args.floors:
        print(floors.text(), end="")
        return 0
    args.simulator = args.simulator or os.environ.get(SIMULATOR, "0") not in ("", "0")
    if args.simulator:
        os.environ[SIMULATOR] = "1"  # before numba.cuda is imported, here and in child processes
    if args.compiler:
        return compiling.compiler(args.operators.split(","), kinds_of(args))
    if args.worker:
        return worker(args.worker, args.simulator, kinds_of(args))
    if args.report:
        print(report.write(json.loads(args.report.read_text(encoding="utf-8")), args.report.parent))
        return 0
    if args.simulator and args.out is None:
        parser.error("--simulator needs --out FOLDER: its report tells no speeds")
    end_if_told()
    faulthandler.dump_traceback_later(args.limit + HANG, exit=True)
    try:
        return run(args)
    finally:
        faulthandler.cancel_dump_traceback_later()


def smoke() -> str:
    """Compiles, links and loads the smallest kernel, even if it is on disk, where another compiler may have put it; what went
    wrong."""
    try:
        maker = compiling.makers()["_cuda.conv.weights.sum_partials"]
        kernel = maker(*next(iter(maker.variants())))
        kernel.dispatcher._cache.disable()
        kernel.load(0)
    except Exception as error:
        return f"The smallest kernel cannot be loaded: {type(error).__name__}: {error}"
    return ""


def look(device: Device) -> tuple[dict[str, Any], list[str]]:
    """Stage 1: (facts and notes for the report, why no kernel can run). What should not go together but does is a note."""
    facts: dict[str, Any] = {"about": device.about(), "notes": []}
    if device.simulator:
        return facts, []
    found = versions.installed(device)
    facts["about"] |= found.rows()
    misfits, failed = versions.misfits(found), smoke()
    facts["notes"] = versions.notes(found) + ([] if failed else misfits)
    for name, value in facts["about"].items():
        print(f"  {name}: {value}", file=sys.stderr)
    for note in facts["notes"]:
        print(f"  NOTE: {note}", file=sys.stderr, flush=True)
    return facts, (misfits or [failed]) if failed else []


def run(args: argparse.Namespace) -> int:
    """The whole run."""
    start = time.monotonic()
    results: dict[str, Any] = {"stages": {}, "compiled": {}}

    @contextlib.contextmanager
    def stage(name: str) -> Iterator[None]:
        began = time.monotonic()
        print(f"{name}, from {began - start:.0f} s on", file=sys.stderr, flush=True)
        yield
        results["stages"][name] = time.monotonic() - began

    try:
        with stage("versions"):
            device = Device(args.simulator)
            facts, trouble = look(device)
    except NoGPU as error:
        print(f"No GPU: {error}. Nothing was measured. `--simulator --out FOLDER` goes through it all without one.")
        return NO_GPU
    if trouble:
        print("Nothing was run, as no kernel can be loaded:", *trouble, sep="\n- ")
        return NO_GPU
    if device.simulated and args.out is None:
        print("A GPU that is simulated needs --out FOLDER: its report tells no speeds.")
        return NO_GPU
    if args.seed is None:
        args.seed = int.from_bytes(os.urandom(4), "big")
    print(f"{device.name}; inputs of seed {args.seed}", file=sys.stderr, flush=True)
    if args.simulator:
        sys.setswitchinterval(1e-4)  # switch sooner between threads that wait for each other
    results |= {"simulated": device.simulated, **facts}
    results["about"] |= {"date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"), "seed": str(args.seed)}
    if "compile" in args.parts.split(",") and not args.simulator:
        with stage("compile"):
            everything = "tests" in args.parts.split(",")  # they need all kernels
            operators = list(compiling.ROOMS) if everything else args.operators.split(",")
            kinds = DTYPES if everything else kinds_of(args)
            results["compiled"] = compiling.compile_all(operators, kinds, start + STAGES["compile"] * args.limit)
        print(f"  {results['compiled']['text']}", file=sys.stderr, flush=True)
    with stage("check"):
        results |= check(args, start + STAGES["check"] * args.limit)
    return finish(args, device, results, stage, start)


def finish(args: argparse.Namespace, device: Device, results: dict[str, Any], stage: Any, start: float) -> int:
    """Stage 4 and the report, which is written before it too, in case that it does not come back."""
    out = args.out or ROOT / "benchmarks" / "results"
    results |= {
        "rows": [],
        "operators": [],
        "issue": [],
        "rate_lines": [],
        "rates": floors.nominal(device.name)._asdict(),
    }
    results["seconds"] = time.monotonic() - start
    print(f"so far: {report.write(results, out)}", file=sys.stderr, flush=True)
    with stage("time"):
        results |= timed(args, device, args.limit - (time.monotonic() - start) - 10)
    results["seconds"] = time.monotonic() - start
    path = report.write(results, out)
    for one in report.targets(results):
        print(f"{one.what}: {one.measured or '-'}, wanted {one.target}: {one.verdict}")
    code = verdict(results)
    print(f"{path}: {SAID[code]}")
    return code
