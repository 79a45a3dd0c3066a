"""The benchmarks on a CPU: what a turn is, tables, reports, the picture, and two checkouts compared. No speed is judged here."""

import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
from checks import ROOT, run_python

from benchmarks import chart, run
from benchmarks.cases.layers import CASES
from benchmarks.cases.operators import GROUPS
from benchmarks.harness import group_report, report, scaling_report, terminal, worker
from benchmarks.rivals.contender import Unsupported
from benchmarks.rivals.frameworks import check_columns

MACHINE = {"cpu": "Some CPU", "SIMD": "AVX2", "load average before": "0, 0, 0", "date": "2000-01-02"}
COMMITTED = sorted((ROOT / "benchmarks" / "results").glob("amd-epyc*.json"))
COMMITTED = [path for path in COMMITTED if not path.stem.endswith("-training")]


def benchmark(*arguments, check=True):
    return run_python(["-m", *arguments], PYTHONSAFEPATH=None, timeout=400, check=check)


def made(name, **milliseconds):
    """Results of an operator: each contender's forward, at every case and number of threads; backward takes twice as long."""
    plan = run.parse(["--operators", name])[1][0]._replace(threads=[1, 2])
    one = run.operator(name)
    records = [
        {"case": case, "direction": direction, "contender": contender, "threads": threads, "status": "ok", "detail": ""}
        | {"rounds": [[factor * ms / 1e3]]}
        for case in plan.cases
        for direction, factor in (("forward", 1), ("backward", 2))
        for contender, ms in milliseconds.items()
        for threads in plan.threads
        if direction in one.contender(contender).directions
    ]
    found = {
        c: {"status": "ok", "version": "1"} if c in milliseconds else {"status": "absent"} for c in plan.contenders
    }
    cases = {case: one.cases[case].text for case in plan.cases}
    results = {"machine": MACHINE, "plan": plan._asdict(), "cases": cases, "contenders": found, "times": records}
    return results | {"memory": [], "start": {}}


def everyone():
    """Of the deformable convolution."""
    times = {"numdcn": 10, "numdcn-prepared": 8, "numdcn-float64": 30, "onnxruntime": 24, "openvino": 16, "ncnn": 20}
    return made("deform_conv", **times, paddle=70, torchvision=150, conv2d=6)


class Clock:
    """Time that passes in calls alone."""

    def __init__(self, seconds):
        self.now, self.seconds, self.calls = 0.0, seconds, 0

    def perf_counter(self):
        return self.now

    def call(self, given):
        self.now, self.calls = self.now + self.seconds, self.calls + 1


@pytest.mark.parametrize(
    "seconds, timed, calls",
    [(1 / 1024, 50, 102), (1 / 128, 39, 46), (1 / 8, 5, 7), (1, 3, 4), (1.75, 2, 2), (20, 1, 1)],
)
def test_slow_contenders_get_fewer_runs(seconds, timed, calls, monkeypatch):
    clock = Clock(seconds)
    monkeypatch.setattr(worker, "time", clock)
    served = object.__new__(worker.Served)
    served.inputs = lambda seed, direction: np.zeros(1)
    served.contender = SimpleNamespace(convert=lambda inputs: inputs, forward=clock.call)
    times = served.time("forward", 0, 0.3, 5, 50)["times"]
    assert times == pytest.approx([seconds] * timed, rel=1e-3)
    assert clock.calls == calls


def test_columns_that_do_not_fit_are_left_out():
    for case in CASES.values():
        check_columns(case)
    check_columns(CASES["large"]._replace(n=33, h=256))  # 11 images at a time
    check_columns(CASES["large"]._replace(n=37))  # one
    with pytest.raises(Unsupported, match=r"column buffer of 18\.1 GB"):
        check_columns(CASES["large"]._replace(n=32, h=256))


def test_the_terminal_shows_a_table():
    text = terminal.text(everyone())
    assert max(map(len, text.splitlines())) <= 100
    rows = [line.split() for line in text.splitlines() if line.startswith("S8 ")]
    assert rows == [
        ["S8", "10.0", "8.00", "24.0", "16.0", "20.0", "70.0", "150", "6.00", "1.60", "openvino"],
        ["S8", "20.0", "140", "300", "12.0", "7.00", "paddle"],
    ]
    assert "2 threads" in text and "fastest rival" in text and "\nconv2d: the operator that is not deformed" in text


def test_the_terminal_names_who_is_missing_and_what_is_unsupported():
    results = made("deform_conv", numdcn=10, torchvision=150)
    for record in results["times"]:
        if (record["case"], record["contender"], record["direction"]) == ("S7", "torchvision", "backward"):
            record.update(status="unsupported", rounds=[])
    text = terminal.text(results)
    assert "\nopenvino: absent\n" in text
    assert [line.split() for line in text.splitlines() if line.startswith("S7 ")][1] == ["S7", "20.0", "-"]


@pytest.mark.parametrize(
    "write, results", [(report.write, everyone()), (group_report.write, {"conv": made("conv", numdcn=5, conv2d=4)})]
)
def test_targets_only_in_whole_reports(write, results, tmp_path):
    group = {} if "plan" in results else {"group": "convolution"}
    whole = write(results, tmp_path, "cpu", **group).read_text(encoding="utf-8")
    part = write(results, tmp_path, "cpu" + report.PART, **group).read_text(encoding="utf-8")
    assert "## Targets" in whole and "Targets" not in part
    assert part.replace("cpu-part.png", "cpu.png") == re.sub(r"## Targets.*?(?=^## )", "", whole, flags=re.M | re.S)


@pytest.mark.parametrize(
    "arguments", ["--quick", "--cases=S8", "--contenders=numdcn", "--direction=forward", "--parts=times"]
)
def test_what_is_whole(arguments):
    assert run.is_whole(run.parse(["--rounds", "3"])[1][0])
    assert not run.is_whole(run.parse([arguments])[1][0])


def test_torchvision_is_a_rival_but_no_engine():
    results = everyone()
    before = report.Report(results).targets()
    for record in results["times"]:
        if record["contender"] == "torchvision":
            record["rounds"] = [[1e-6]]
    text = report.Report(results).markdown(None)
    assert report.Report(results).targets() == before
    backward = text[text.index("## Backward, 2 threads") :]
    assert "fastest rival / numdcn" in backward and "(torchvision)" in backward
    assert "(torchvision)" not in text[: text.index("## Backward")]


@pytest.mark.parametrize("path", COMMITTED, ids=lambda path: path.stem)
def test_committed_reports_are_those_of_the_committed_results(path):
    results, picture = json.loads(path.read_text(encoding="utf-8")), path.with_suffix(".png").name
    if "plan" in results:
        text = report.Report(results).markdown(picture)
    elif path.stem.endswith("-scaling"):
        text = scaling_report.markdown(
            results, [f"{path.stem}-{direction}.png" for direction in ("forward", "backward")]
        )
    else:
        group = next(name for name in GROUPS if path.stem.endswith(name))
        text = group_report.markdown([group_report.OperatorReport(one) for one in results.values()], group, picture)
    assert path.with_suffix(".md").read_text(encoding="utf-8") == text


@pytest.mark.full
def test_a_quick_look(tmp_path):
    """One command: the table, and at the end the report's path."""
    what = [
        "--quick",
        "--cases=S8",
        "--contenders=numdcn",
        "--threads=1",
        "--parts=times",
        "--rounds=1",
        f"--out={tmp_path}",
    ]
    lines = benchmark("benchmarks.run", *what).stdout.splitlines()
    assert [len(re.findall(r" \d+\.\d+", line)) for line in lines if line.startswith("S8 ")] == [1, 1]
    (path,) = tmp_path.glob("*.md")
    assert lines[-1] == f"Report: {path}" and path.stem.endswith("-part")
    assert "Targets" not in path.read_text(encoding="utf-8")
    assert json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))["machine"]["minutes taken"]


def test_the_picture(tmp_path):
    image = pytest.importorskip("matplotlib.image", reason="needs the bench extra")
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps(everyone()), encoding="utf-8")
    others = {
        "roi_align": made("roi_align", numdcn=5, torchvision=50),
        "deform_roi_pool": made("deform_roi_pool", numdcn=5),
    }
    (tmp_path / "cpu-roi.json").write_text(json.dumps(others), encoding="utf-8")
    rows, caption = chart.read(path)
    layer, box = (next(row for row in rows if row.name.startswith(name)) for name in ("S5b", "roi_align, two"))
    assert [one.ratio for one in layer.bars["forward"]] == pytest.approx([15, 1.6])
    assert [one.text for one in layer.bars["forward"]] == ["15×", "1.6× openvino"]
    assert [one.text for one in layer.bars["backward"]] == ["15×"]
    assert layer.name == "S5b: 1,64,180,320 → 64" and layer.detail == "k3 p1, 16 offset groups, mask"
    assert [one.text for one in box.bars["backward"]] == ["10×"]
    assert not [row for row in rows if row.name.startswith("deform_roi_pool")]
    assert "Some CPU" in caption and "torchvision 1" in caption
    assert chart.main([str(path), "--out", str(tmp_path / "new" / "speed.png")]) == 0
    pixels = image.imread(tmp_path / "new" / "speed.png")[..., :3]
    assert pixels.shape[1] == 1600
    for colour in (chart.VERMILION, chart.BLUE):
        like = np.abs(pixels - np.array([*bytes.fromhex(colour[1:])]) / 255).max(-1) < 0.02
        assert like.sum() > 1000, colour


def test_no_picture_without_torchvision(tmp_path):
    path = tmp_path / "cpu.json"
    path.write_text(json.dumps(made("deform_conv", numdcn=10, openvino=16)), encoding="utf-8")
    with pytest.raises(SystemExit, match="no times of torchvision's deform_conv2d forward"):
        chart.main([str(path), "--out", str(tmp_path / "speed.png")])
    assert not (tmp_path / "speed.png").exists()


def compared(old, new, *more, check=True):
    what = ["--cases=S8", "--threads=1", "--rounds=2"]
    return benchmark("benchmarks.compare", str(old), str(new), *what, *more, check=check)


@pytest.mark.full
def test_a_checkout_compared_with_itself():
    done = compared(ROOT, ROOT, "--limit", "1000")
    rows = re.findall(
        r"^deform_conv +S8 +(\w+) +1 +[\d.]+ +[\d.]+ +([\d.]+) +\(([\d.]+)-([\d.]+)\)$", done.stdout, re.M
    )
    assert [row[0] for row in rows] == ["forward", "backward"], done.stdout
    assert all(float(low) <= float(ratio) <= float(high) for _, ratio, low, high in rows)
    assert compared(ROOT, ROOT, "--limit", "0.001", check=False).returncode == 1


@pytest.mark.full
def test_a_slower_and_a_wrong_checkout_are_found(tmp_path):
    """A checkout like this one, but its forward sleeps and its backward is wrong."""
    (tmp_path / "numdcn").mkdir()
    text = WORSE.format(package=str(ROOT / "numdcn"))
    (tmp_path / "numdcn" / "__init__.py").write_text(text, encoding="utf-8")
    done = compared(ROOT, tmp_path, "--limit", "5", check=False)
    assert done.returncode == 1, done.stderr
    forward, backward = (line for line in done.stdout.splitlines() if line.startswith("deform_conv"))
    assert forward.endswith("slower") and "new: wrong" in backward
    done = compared(tmp_path, ROOT, "--limit", "5", check=False)
    assert "slower" not in done.stdout.splitlines()[1] and "old: wrong" in done.stdout


WORSE = """
import os, time

__path__ = [{package!r}]
exec(open(os.path.join(*__path__, "__init__.py"), encoding="utf-8").read())
forward, backward = deform_conv_forward, deform_conv_backward


def deform_conv_forward(*arguments, **more):
    time.sleep(0.2)
    return forward(*arguments, **more)


def deform_conv_backward(*arguments, **more):
    g = backward(*arguments, **more)
    return g._replace(w=g.w + 1)
"""
