"""`python -m benchmarks.gpu` without a GPU: the tables of its page, the comparison's own judgement, a run in the
simulator."""

import json
import os

import numpy as np
import pytest
from checks import run_python

from benchmarks.gpu import floors, page, registers, report
from benchmarks.gpu.problems import MAKERS, SMALL, TINY, Expected, common, make, to_bfloat16


def benchmark(*arguments, check=True, **environment):
    return run_python(
        ["-m", "benchmarks.gpu", *arguments], PYTHONSAFEPATH=None, timeout=400, check=check, **environment
    )


@pytest.mark.parametrize("program", [floors, registers], ids=["floors", "registers"])
def test_the_page_holds_the_tables(program):
    """docs/design/gpu.md contains, between two markers, the output of the command named by the first one."""
    _, held, _ = page.split(page.PAGE.read_text(encoding="utf-8"), program.COMMAND)
    assert held == program.text(), f"{program.COMMAND} --write"
    printed = run_python(program.COMMAND.split()[1:], PYTHONSAFEPATH=None).stdout
    assert printed == program.text()


def test_the_floors_are_an_option_too():
    assert benchmark("--floors").stdout == floors.text()


def test_floors_of_a_row():
    """S1, batch 16: as computed by hand."""
    floor = floors.floor(floors.row("S1", 16), "forward", "float32")
    assert floor.operations == 2 * 16 * 100 * 152 * 128 * 128 * 9
    assert floor.corners == 4 * 4 * 16 * 100 * 152 * 128 * 9
    assert floor.moved == 4 * (16 * 100 * 152 * (128 + 128 + 18) + 128 * 128 * 9)
    half = floors.floor(floors.row("S1", 16), "backward", "float16")
    assert half.operations == 2 * floor.operations and half.corners == 3 * floor.corners / 2


@pytest.mark.skipif(os.path.exists("/dev/nvidia0"), reason="there is a GPU")
def test_without_a_gpu_it_says_so():
    done = benchmark("--parts", "compare", "--operators", "arrays", check=False, NUMBA_ENABLE_CUDASIM=None)
    assert done.returncode == 2 and "No GPU" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("operator, label", [(name, label) for name, labels in MAKERS.items() for label in labels])
def test_every_type_holds_the_problems(operator, label):
    problem = make(operator, label, TINY, 3)
    for name, array in problem.arrays.items():
        if array is not None:
            assert np.array_equal(common(array), array), name
    larger = make(operator, label, SMALL, 4)
    assert larger.call("forward", larger.arrays)["y"].shape == larger.grad_y.shape


def test_rounding_to_bfloat16():
    """To nearest, halves to even."""
    values = np.array([1, 1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 5 * 2.0**-10, -1 - 2.0**-7, 0], np.float32)
    assert to_bfloat16(values).tolist() == [1, 1, 1 + 2.0**-6, 1 + 2.0**-7, -1 - 2.0**-7, 0]


@pytest.mark.parametrize("dtype", ["float32", "tf32", "float64", "float16", "bfloat16"])
def test_bounds_tell_a_lost_term_from_rounding(dtype):
    """A sum of products with operands rounded to the type passes; without one of its taps it fails."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(50, 9 * 32)), rng.normal(size=9 * 32)
    precise = np.float64 if dtype == "float64" else np.float32
    rounded = {"float16": lambda v: v.astype(np.float16), "tf32": lambda v: v.astype(np.float16)}
    rounded["bfloat16"] = lambda v: to_bfloat16(v.astype(np.float32))
    columns = rounded.get(dtype, lambda v: v)(a).astype(precise)
    want = Expected(a @ b, np.abs(a) @ np.abs(b), a.shape[1])
    bound = want.bound(dtype, rounded=True)
    assert (np.abs(columns @ b.astype(precise) - want.value) <= bound).all()
    assert (np.abs(columns[:, 32:] @ b[32:].astype(precise) - want.value) > bound).any()


def test_no_speed_of_what_is_wrong(tmp_path):
    row = {"row": "S1", "batch": 16, "direction": "forward", "kind": "float32", "detail": "", "rounds": [1e-3]}
    wrong = {**row, "contender": "numdcn float32", "status": "WRONG", "detail": "y is off by 9 bounds"}
    results = {
        "simulated": False,
        "stages": {"check": 2.0},
        "notes": ["torch is not installed."],
        "compiled": {},
        "about": {"GPU": "Some GPU"},
        "rate_lines": [],
        "seconds": 1.0,
        "tests": "none",
        "rates": floors.H100._asdict(),
        "verdicts": [{"operator": "conv", "what": "y", "status": "wrong", "worst": 9.0, "detail": "y is off"}],
        "rows": [wrong, {**row, "contender": "torchvision float32", "status": "ok"}],
        "operators": [],
        "issue": [],
    }
    text = report.write(results, tmp_path).read_text(encoding="utf-8")
    line = next(line for line in text.splitlines() if line.startswith("| S1 | 16 |"))
    assert "check 2 s; NOT ENDED" in text and "Note: torch is not installed." in text
    assert "WRONG" in line and "1.00" in line and "y is off by 9 bounds" in text
    judged = report.targets(results)
    assert all(one.verdict == "not measured" for one in judged)


def test_targets_are_judged(tmp_path):
    """Twice as fast as torchvision in float32, forward: above 1.2; the others were not measured."""
    row = {"batch": 16, "direction": "forward", "kind": "float32", "detail": "", "status": "ok"}
    rows = []
    for name in floors.DENSE:
        rows.append({**row, "row": name, "contender": "numdcn float32", "rounds": [1e-3, 2e-3, 1e-3]})
        rows.append({**row, "row": name, "contender": "torchvision float32", "rounds": [2e-3]})
    found = report.targets({"rows": rows, "issue": []})
    assert found[0].verdict == "pass" and found[0].measured == "2"
    assert [one.verdict for one in found[1:5]] == ["not measured"] * 4


@pytest.mark.full
def test_a_run_in_the_simulator(tmp_path):
    """One operator is compared, nothing is timed; the full run takes minutes."""
    pytest.importorskip("numba_cuda", reason="needs the cuda extra")
    out = ["--simulator", "--out", tmp_path, "--parts", "compare", "--kinds", "float32"]
    done = benchmark(*out, "--operators", "bilinear_sample,arrays")
    results = json.loads((tmp_path / "gpu-simulator.json").read_text(encoding="utf-8"))
    assert results["simulated"] and {v["status"] for v in results["verdicts"]} == {"right"}, done.stdout
    assert {v["operator"] for v in results["verdicts"]} == {"bilinear_sample", "arrays"}
    text = (tmp_path / "gpu-simulator.md").read_text(encoding="utf-8")
    assert "simulator: no speeds" in text and "not measured" in text


def test_code_that_is_not_there_is_missing(tmp_path):
    """An operator whose wing lacks its room is reported; the exit code is 1."""
    pytest.importorskip("numba_cuda", reason="needs the cuda extra")
    code = (
        "import sys\n"
        "sys.modules['numdcn._cuda.points'] = None\n"
        "sys.argv = ['gpu', '--simulator', '--worker', 'bilinear_sample', '--kinds', 'float32']\n"
        "from benchmarks.gpu.run import main\n"
        "sys.exit(main())\n"
    )
    done = run_python(code, NUMBA_ENABLE_CUDASIM=1)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert any(v["status"] == "missing" and "no GPU code" in v["detail"] for v in found), done.stdout
