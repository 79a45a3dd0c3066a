"""What `python -m benchmarks.gpu` does before it times: versions, compiling, the choice of tests, processes that are stopped. No
GPU is needed; one walk goes through the whole program on an emulated one."""

import argparse
import json
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import device
import pytest
from checks import ROOT, limit, run_python

from benchmarks.gpu import compiling, jobs, run, testing, versions
from benchmarks.gpu.versions import Installed, Library
from tools.ptx_emulator import build

FITS = Installed(
    "580.65.06", (13, 0), (9, 0), *[Library((13, 0), "/lib/it.so")] * 3, ((8, 0), (9, 0), (10, 0)), "2.13", "13.0", True
)
COUNTED = """
import sys
import pytest, device
device.count_gpus = lambda: 1  # as where there is a GPU; nothing is run
device.KINDS = device.kinds()
sys.exit(pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", "-m", *sys.argv[1:]]))
"""


# Versions.


def test_what_goes_together():
    assert not versions.misfits(FITS) and not versions.misfits(FITS._replace(nvjitlink=Library((13, 5), "")))
    assert not versions.misfits(FITS._replace(cuda=(14, 1), driver=""))
    unknown = Installed("", (), ())
    assert not versions.misfits(unknown)


NEW = Library((13, 5), "/new/libnvvm.so.4")
OLD = {"nvvm": Library((13, 0)), "nvjitlink": Library((12, 9))}


@pytest.mark.parametrize(
    "change, words",
    [
        ({"nvvm": NEW}, ["libnvvm 13.5 (/new/libnvvm.so.4), is newer than", "nvJitLink 13.0",
          "ERROR_OUTDATED_LIBRARY", "nvidia-nvvm==13.0"]),
        (OLD, ["is newer than", "nvidia-nvjitlink-cu12", "nvidia-cuda-nvcc-cu12==12.9"]),
        ({"cuda": (12, 8)}, ["of CUDA 13, and the driver is of CUDA 12.8", "numba-cuda[cu12]"]),
        ({"capability": (12, 1)}, ["newest GPU is of compute capability 10.0, and this one is of 12.1"]),
    ],
)  # fmt: skip
def test_what_does_not_go_together(change, words):
    (told,) = versions.misfits(FITS._replace(**change))
    assert all(word in told for word in words), told


def test_what_is_left_out():
    assert not versions.notes(FITS)
    (told,) = versions.notes(FITS._replace(torch="", torch_sees=False))
    assert "torch is not installed" in told
    (told,) = versions.notes(FITS._replace(torch_cuda="", torch_sees=False))
    assert "was built without CUDA" in told


def test_the_version_of_a_compiler(tmp_path):
    (tmp_path / "libnvvm.so").write_bytes(b"\x7fELF\0Cuda compilation tools, release 13.5, V13.5.37\0")
    (tmp_path / "other.so").write_bytes(b"\x7fELF\0")
    assert versions.compiler_version(str(tmp_path / "libnvvm.so")) == (13, 5)
    assert versions.compiler_version(str(tmp_path / "other.so")) == ()


# Compiling.


def test_operators_have_rooms():
    assert set(run.OPERATORS) <= set(compiling.ROOMS)
    rooms = {path.parent.name for path in (ROOT / "numdcn" / "_cuda").glob("*/run.py")}
    assert set(compiling.ROOMS.values()) == rooms


CHOSEN = """
import json, sys
from numdcn._cuda import jit
from benchmarks.gpu import compiling
makers = compiling.makers()
for operators, kinds, vectors in json.loads(sys.argv[1]):
    jit.has_vector_reductions = lambda device: vectors
    found = compiling.chosen(operators, kinds)
    print(json.dumps([(name, " ".join(map(str, list(makers[name].variants())[number]))) for name, number in found]))
"""


def test_kernels_to_compile():
    """Those that operators can launch for some kinds of arrays, each once, the heaviest first."""
    pytest.importorskip("numba_cuda", reason="needs the cuda extra")
    operators, kinds = [*compiling.ROOMS], [*compiling.STORED]
    asked = {
        "every": (operators, kinds, True),
        "new": (["a new one"], kinds, True),
        "no vectors": (operators, kinds, False),
        "points": (["bilinear_sample"], kinds, True),
        "half": (["bilinear_sample"], ["float16"], True),
        "tf32": (["conv"], ["tf32"], True),
        "float32": (["conv"], ["float32"], True),
    }
    lines = run_python(CHOSEN, json.dumps([*asked.values()])).stdout.splitlines()
    lists = {name: [tuple(one) for one in json.loads(line)] for name, line in zip(asked, lines, strict=True)}
    found = {name: {*one} for name, one in lists.items()}
    assert found["new"] == found["every"] and len(found["every"]) == len(lists["every"])
    assert found["no vectors"] < found["every"] > found["points"] > found["half"] and found["tf32"] == found["float32"]
    parts = {name.split(".")[1] for name, _ in found["points"]}
    assert parts & {*compiling.ROOMS.values()} == {"points"} and "layout" in parts
    half = {variant for _, variant in found["half"]}
    assert "float16 float32" in half and not [one for one in half if "float64" in one or "uint16" in one]
    known = compiling.heaviness()
    weights = [known[one] for one in lists["every"]]
    assert weights == sorted(weights, reverse=True) and weights[0] > 200 > 40 > weights[-1]


@pytest.fixture
def started(tmp_path):
    """code -> a job that runs it"""
    return lambda code, name="a": jobs.Job(name, [sys.executable, "-c", code], tmp_path)


def finished(job, seconds=30):
    end = time.monotonic() + seconds
    while not job.done() and time.monotonic() < end:
        time.sleep(0.02)
    job.finish()
    return job


LINE = {"kernel": "k", "variant": 0, "seconds": 1.5, "compiled": True, "error": ""}


def test_a_compiler_that_ends(started):
    code = f"print({json.dumps({'kernels': 2})!r}); print({json.dumps(LINE)!r}); print({json.dumps({**LINE, 'compiled': False})!r})"
    record = compiling.told(finished(started(code)))
    assert (record["kernels"], record["done"], record["compiled"], record["stopped"]) == (2, 2, 1, False)
    assert compiling.is_well(record) and "STOPPED" not in record["text"]


def test_a_compiler_that_fails_or_dies(started):
    bad = json.dumps({**LINE, "error": "ValueError: no"})
    record = compiling.told(finished(started(f"print({json.dumps({'kernels': 1})!r}); print({bad!r})")))
    assert not compiling.is_well(record) and "1 FAILED, the first is k: ValueError: no" in record["text"]
    record = compiling.told(finished(started(f"print({json.dumps({'kernels': 2})!r}); raise SystemExit('killed')")))
    assert not compiling.is_well(record) and "exit code 1: killed" in record["text"]


# Processes that are stopped.


def test_a_stopped_process_and_its_children(started, tmp_path):
    """What it had said is kept; a child that ignores the interrupt ends too."""
    code = f"""
import subprocess, sys, time
child = "import signal, time; signal.signal(signal.SIGINT, signal.SIG_IGN); print('ready', flush=True); time.sleep(600)"
process = subprocess.Popen([sys.executable, "-c", child], stdout=subprocess.PIPE)
process.stdout.readline()
open({str(tmp_path / "child")!r}, "w").write(str(process.pid))
print("begun")
time.sleep(600)
"""
    job = started(code)
    end = time.monotonic() + 30
    while "begun" not in job.output and time.monotonic() < end:
        time.sleep(0.02)
    job.finish()
    assert job.late and job.output.startswith("begun")
    assert gone(int((tmp_path / "child").read_text()))


def gone(pid, seconds=30):
    """Whether a process ends in time. Whoever adopted it may not have fetched its status yet."""
    end = time.monotonic() + limit(seconds)
    while time.monotonic() < end:
        try:
            if pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except OSError:
            return True
        time.sleep(0.02)
    return False


LEFT = """
import pathlib, sys, time
from benchmarks.gpu import jobs
jobs.end_if_told()
code = "import os, sys, time; open(sys.argv[1], 'w').write(str(os.getpid())); print('ready', flush=True); time.sleep(600)"
folder = pathlib.Path(sys.argv[1])
jobs.run_jobs({"a": [sys.executable, "-c", code, str(folder / "pid")]}, folder, time.monotonic() + 600)
"""


def test_jobs_of_a_process_that_is_told_to_end(tmp_path):
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen([sys.executable, "-c", LEFT, str(tmp_path)], env=env)
    told, end = tmp_path / "a.txt", time.monotonic() + limit(30)
    while not (told.exists() and "ready" in told.read_text()) and time.monotonic() < end:
        time.sleep(0.02)
    process.terminate()
    assert process.wait(limit(30)) == 128 + signal.SIGTERM
    assert gone(int((tmp_path / "pid").read_text()))


def test_jobs_at_a_deadline(tmp_path, monkeypatch):
    """One ends, one is stopped, one is not started."""
    monkeypatch.setattr(jobs, "slots", lambda: 1)
    monkeypatch.setattr(jobs, "GRACE", 0.1)
    commands = {
        name: [sys.executable, "-c", code]
        for name, code in (("a", ""), ("b", "import time; time.sleep(600)"), ("c", ""))
    }
    found = jobs.run_jobs(commands, tmp_path, time.monotonic() + 2)
    assert {name: job.late for name, job in found.items()} == {"a": False, "b": True}


def test_tests_and_comparisons_start_in_turn():
    a, b = {"t1": ["1"], "t2": ["2"]}, {name: [name] for name in "abc"}
    assert list(run.alternately(a, b).items()) == [
        ("t1", ["1"]),
        ("a", ["a"]),
        ("t2", ["2"]),
        ("b", ["b"]),
        ("c", ["c"]),
    ]
    assert list(run.alternately(b, {})) == list(run.alternately({}, b)) == [*"abc"]


# Tests.


class Told:
    """A job that has ended."""

    def __init__(self, output, code=0, late=False):
        self.output, self.late, self.seconds = output, late, 1.0
        self.process, self.last_line = argparse.Namespace(returncode=code), output.splitlines()[-1]


HEAD = "collecting ... collected 9 items / 6 deselected / 3 selected\n\n"
GOOD, SKIP = "tests/a.py::test_a[cuda-1 x] PASSED [ 33%]\n", "tests/a.py::test_b[cuda] SKIPPED (why) [ 66%]\n"
BAD = "tests/a.py::test_c[cuda] FAILED [100%]\n"


@pytest.mark.parametrize(
    "job, status",
    [
        (Told(HEAD + GOOD + SKIP + GOOD), "passed"),
        (Told(HEAD + GOOD + BAD, 1), "failed"),
        (Told(HEAD + GOOD, -9, late=True), "stopped"),
        (Told(HEAD + GOOD + BAD, -9, late=True), "failed"),
        (Told(HEAD + GOOD, -11), "failed"),
        (Told(HEAD + SKIP + SKIP), "failed"),
        (Told("collecting ... collected 9 items / 9 deselected / 0 selected\n", 5), "none"),
        (Told("ImportError: no", 4), "failed"),
        (None, "not started"),
    ],
)
def test_what_became_of_a_file(job, status):
    found = testing.outcome("tests/a.py", job)
    assert found.status == status
    assert bool(found.failures) == (status == "failed")
    if job is not None and job.output.startswith(HEAD):
        assert found.collected == 3 and found.passed == job.output.count("PASSED")


def test_the_verdict_of_the_tests():
    passed, stopped, failed = (testing.Outcome("a", status) for status in ("passed", "stopped", "failed"))
    none, waiting = testing.Outcome("a", "none"), testing.Outcome("a", "not started")
    assert testing.verdict([passed, none]) == "right"
    assert testing.verdict([passed, stopped]) == testing.verdict([passed, waiting]) == "stopped"
    assert testing.verdict([stopped, failed, passed]) == testing.verdict([none]) == testing.verdict([]) == "wrong"
    assert "| `a` | stopped |" in testing.text([passed, stopped])


def verdict_of(**changes):
    usual = {"rows": [], "operators": [], "issue": [], "verdicts": [], "compiled": {}, "tests_verdict": "right"}
    return run.verdict({**usual, **changes})


def test_what_was_stopped_is_never_right():
    row = {"contender": "numdcn float32", "status": "ok"}
    assert verdict_of() == verdict_of(rows=[row], verdicts=[{"status": "right"}]) == run.RIGHT
    assert verdict_of(tests_verdict="stopped") == run.INCOMPLETE
    assert verdict_of(verdicts=[{"status": "stopped"}]) == run.INCOMPLETE
    assert verdict_of(rows=[{**row, "status": "no time left"}]) == run.INCOMPLETE
    assert verdict_of(tests_verdict="stopped", verdicts=[{"status": "wrong"}]) == run.WRONG
    assert verdict_of(tests_verdict="wrong") == verdict_of(rows=[{**row, "status": "WRONG"}]) == run.WRONG
    assert verdict_of(compiled={"failed": [LINE], "trouble": ""}) == run.WRONG
    assert verdict_of(rows=[{"contender": "torchvision float32", "status": "failed"}]) == run.RIGHT


def test_comparisons_that_were_stopped():
    line = json.dumps({"operator": "conv", "what": "y", "status": "right", "worst": 0.5, "detail": "", "seconds": 1})
    found = run.verdicts_of(
        ["conv", "roi_pool", "dcnv3"], {"conv": Told(line, -9, late=True), "dcnv3": Told("killed", -9)}
    )
    assert [(v["operator"], v["status"]) for v in found] == [
        ("conv", "right"), ("conv", "stopped"), ("roi_pool", "stopped"), ("dcnv3", "failed"),
    ]  # fmt: skip


@pytest.mark.full
def test_tests_with_the_mark_are_those_that_run_on_a_gpu():
    """All whose parameters say so, a few that ask themselves, in the files that `testing` chooses; none compiles variants or
    reads sources."""
    ours = {line for line in run_python(COUNTED, testing.MARK, *testing.files()).stdout.splitlines() if "::" in line}
    everything = run_python(COUNTED, "not large", "tests").stdout.splitlines()
    on_gpu = {line for line in everything if re.search(r"\[(.*-)?cuda(-.*)?\]$", line)}
    assert len(on_gpu) > 500 and on_gpu <= ours
    rest = {line.split("[")[0].rpartition("::")[2] for line in ours - on_gpu}
    assert rest == {"test_real_kernels_are_kept", "test_all_sizes_on_a_real_gpu"}
    assert ours == {line for line in run_python(COUNTED, testing.MARK, "tests").stdout.splitlines() if "::" in line}


def test_the_server_of_a_device_has_the_path_of_the_tests(monkeypatch, tmp_path):
    (tmp_path / "only_here.py").write_text("def found():\n    return 7\n", encoding="utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    reason = device.missing("simulator")
    if reason:
        pytest.skip(reason)
    server = device.Server(simulated=True)
    try:
        assert server.call("only_here", "found", (), {}) == 7
    finally:
        server.stop()


# The whole program.


@pytest.mark.full
def test_the_whole_program_on_an_emulated_gpu(tmp_path):
    """It compiles, tests a file, compares an operator and goes through the times, and tells what it left out."""
    reason = build.missing() or ("there is a real GPU" if device.count_gpus() else None)
    if reason:
        pytest.skip(reason)
    code = """
import sys
from benchmarks.gpu import run, testing
testing.files = lambda: ["tests/cuda/test_device_memory.py"]
testing.command = lambda file, before=testing.command: [*before(file), "-k", "cuda and scatter"]
real = run.compiling.compile_all
run.compiling.compile_all = lambda operators, kinds, deadline: real(["bilinear_sample"], ["float32"], deadline)
run.timing.time_rows = run.timing.issue_times = lambda *_: []
run.timing.MAKERS = {"bilinear_sample": run.timing.MAKERS["bilinear_sample"]}
sys.exit(run.main(sys.argv[1:]))
"""
    given = ["--out", tmp_path, "--operators", "bilinear_sample", "--kinds", "float32", "--limit", str(limit(600))]
    done = run_python(
        ["-m", "tools.ptx_emulator", sys.executable, "-c", code, *given], PYTHONPATH=os.environ.get("PYTHONPATH", ROOT),
        PYTHONSAFEPATH=None, timeout=900, check=False,
    )  # fmt: skip
    (path,) = tmp_path.glob("gpu-*.json")
    results = json.loads(path.read_text(encoding="utf-8"))
    told = done.stdout + done.stderr
    assert results["simulated"] and results["stages"].keys() == {"versions", "compile", "check", "time"}, told
    compiled = results["compiled"]
    assert 5 < compiled["kernels"] == compiled["done"] and not compiled["failed"], told
    assert results["about"]["nvJitLink"].startswith(results["about"]["libnvvm"].split()[0])
    assert results["tests_verdict"] == "right", results["tests"]
    assert {v["status"] for v in results["verdicts"]} == {"right"}, told


SMOKE = """
import sys
from benchmarks.gpu import compiling, run
smallest = compiling.makers()["_cuda.conv.weights.sum_partials"]
kernel = smallest(*next(iter(smallest.variants())))
kernel.load(0)  # on disk, from now on
smallest._compiled.clear()
from numba.cuda.cudadrv import driver
def refused(*_):
    raise RuntimeError("nvJitLinkError: ERROR_OUTDATED_LIBRARY")
assert not run.smoke()
smallest._compiled.clear()
driver._Linker.complete = refused
print(run.smoke())
"""


@pytest.mark.full
def test_a_linker_that_refuses_is_found_though_a_kernel_is_on_disk():
    reason = build.missing() or ("there is a real GPU" if device.count_gpus() else None)
    if reason:
        pytest.skip(reason)
    told = run_python(
        ["-m", "tools.ptx_emulator", sys.executable, "-c", SMOKE], PYTHONPATH=ROOT, PYTHONSAFEPATH=None
    ).stdout
    assert "The smallest kernel cannot be loaded: RuntimeError: CUDA's linker, nvJitLink" in told
