"""The prediction of speed-ups: schedules, the report, and the program on a small layer. No speed is judged here."""

import json
import random
import re

import numpy as np
import pytest
from checks import run_python

from benchmarks.harness import scaling_report
from benchmarks.harness.schedule import MOST, Launch, Waking, call_seconds, finish, speedups

FREE = Waking([0.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0])  # threads that are woken at no cost
COSTLY = Waking([1.0, 3.0], [0.5, 1.0], [2.0, 4.0], [0.25, 0.75])


def launch(tasks, threads=MOST, before=0.0, head=0.0, tail=0.0):
    return Launch("kernel", threads, before, head, tasks, tail)


def played(tasks, starts):
    """The end of the last task, found by letting time pass."""
    clock, left, busy = 0, list(tasks), {}
    while left:
        busy = {who: end for who, end in busy.items() if end > clock}
        for who, start in enumerate(starts):
            if start <= clock and who not in busy and left:
                busy[who] = clock + left.pop(0)
        clock += 1
    return max(busy.values())


@pytest.mark.parametrize("seed", range(20))
def test_tasks_go_in_order_to_whoever_is_free(seed):
    rng = random.Random(seed)
    tasks = [rng.randint(1, 20) for _ in range(rng.randint(1, 30))]
    starts = [0, *(rng.randint(0, 30) for _ in range(rng.randint(0, 8)))]
    assert finish(tasks, starts) == played(tasks, starts)


def test_speedups_of_equal_tasks():
    """64 tasks; 60 of them leave some cores idle; a launch may be limited to fewer threads; the rest is serial."""
    got = speedups([launch([1.0] * 64)], 0.0, FREE)
    assert [got[cores - 1] for cores in (1, 2, 8, 48, 64)] == [1, 2, 8, 32, 64]
    assert speedups([launch([1.0] * 60)], 0.0, FREE)[15] == 15
    assert speedups([launch([1.0] * 64, threads=4)], 0.0, FREE)[-1] == 4
    serial = launch([1.0] * 64, before=2.0, head=1.0, tail=1.0)
    assert speedups([serial, launch([4.0], threads=1)], 4.0, FREE)[-1] == 76 / 13


def test_helpers_come_late():
    """The first two after one waking, those that they wake after another."""
    alone, pair, four = (call_seconds([launch([8.0] * 8)], 1.0, COSTLY, cores) for cores in (1, 2, 4))
    assert alone == 65
    assert pair == 1 + max(0.5 + 4 * 8, 2 + 4 * 8) + 0.25
    assert four == 1 + (4 + 2 * 8) + 0.25  # the third helper comes at 2 * 2


def test_the_longer_the_pause_the_later():
    """A pause starts when the last shared launch ends; before the first one, the last of the call before it."""
    shared = launch([8.0] * 2)
    assert call_seconds([shared], 3.0, COSTLY, 2) == 3 + (4 + 8) + 0.75
    assert call_seconds([shared, shared._replace(before=2.0)], 1.0, COSTLY, 2) == 1 + 10.25 + 2 + (3 + 8) + 0.5
    alone = launch([2.0], threads=1)
    assert call_seconds([shared, alone, shared], 1.0, COSTLY, 2) == 1 + 10.25 + 2 + (3 + 8) + 0.5


def made(operator, case, direction, limit, measured=2.0):
    """A row whose speed-up is that of so many cores at most."""
    told = {"kernel": "compute", "tasks": 99, "threads": 8, "seconds": 0.01, "longest_seconds": 0.001}
    check = {"threads": 2, "predicted": 2.0, "measured": measured, "one_seconds": 0.01}
    row = {"operator": operator, "case": case, "direction": direction, "status": "ok", "checks": [check]}
    more = {
        "seconds": 0.01,
        "serial_seconds": 5e-6,
        "launches": [told, told | {"kernel": "end", "tasks": 3, "threads": 3}],
    }
    return row | more | {"speedups": [float(min(limit, cores)) for cores in range(1, MOST + 1)]}


def results():
    rows = [made("deform_conv", case, "forward", limit) for case, limit in (("S1", 64), ("S2", 13), ("S8", 3))]
    rows += [made("deform_conv", "S1", "backward", 4, 1.7), made("roi_align", "two", "backward", 30)]
    rows += [{"operator": "conv", "case": "S1", "direction": "forward", "status": "wrong", "detail": "error 3 in y"}]
    waking = {"pauses": [0.0, 1e-3], "first": [1e-6, 2e-6], "second": [3e-6, 5e-5], "join": [1e-6, 1e-6]}
    return {"machine": {"cpu": "Some CPU"}, "waking": waking, "rows": rows}


def test_the_report(tmp_path):
    path = scaling_report.write(results(), tmp_path, "cpu-scaling")
    text = path.read_text(encoding="utf-8")
    assert "4 of 5 measured speed-ups are within 10%" in text and "5 of 9 targets are met." in text
    assert "| S2 | forward | 8.00 | 13.0 | 13.0 **missed** |" in text
    assert "| S1 | backward | 4.00 **missed** | 4.00 **missed** | 4.00 **missed** |" in text
    assert "| deform_conv | S1 | 10.0 | 5.00 | 2.00 | 8.00 | 16.0 | 64.0 | compute 99 (on 8), end 3 |" in text
    assert "| deform_conv | S1 | backward | 2 | 2.00 | 1.70 | -15.0% **off** | 1.000 |" in text
    assert text.endswith("- conv, S1, forward: error 3 in y\n")
    assert json.loads(path.with_suffix(".json").read_text(encoding="utf-8")) == results()


def test_the_pictures(tmp_path):
    image = pytest.importorskip("matplotlib.image", reason="needs the bench extra")
    scaling_report.write(results(), tmp_path, "cpu-scaling")
    for direction, lines in (("forward", 3), ("backward", 1)):  # in a panel
        pixels = image.imread(tmp_path / f"cpu-scaling-{direction}.png")[..., :3]
        counts = [
            (np.abs(pixels - np.array([*bytes.fromhex(colour[1:])]) / 255).max(-1) < 0.02).sum()
            for colour in scaling_report.COLOURS[:3]
        ]
        assert [count > 100 for count in counts] == [number < lines for number in range(3)], counts


@pytest.mark.full
def test_the_program(tmp_path):
    """Tasks are counted and timed, the schedule follows from them, and the call is checked on two threads."""
    what = [
        "--quick",
        "--operators=deform_conv",
        "--cases=S8",
        "--direction=forward",
        "--rounds=1",
        f"--out={tmp_path}",
    ]
    done = run_python(["-m", "benchmarks.scaling", *what], PYTHONSAFEPATH=None, timeout=400)
    (path,) = tmp_path.glob("*.json")
    found = json.loads(path.read_text(encoding="utf-8"))
    (row,) = found["rows"]
    assert path.stem.endswith("-scaling-part") and done.stdout.splitlines()[-1] == f"Report: {path.with_suffix('.md')}"
    assert [one["kernel"] for one in row["launches"]] == ["pack_images", "pack_weights", "forward_sampled"]
    assert all(one["seconds"] >= one["longest_seconds"] > 0 for one in row["launches"])
    assert row["launches"][-1]["tasks"] > 1 and len(row["speedups"]) == MOST and row["speedups"][0] == 1
    assert sum(one["seconds"] for one in row["launches"]) + row["serial_seconds"] == pytest.approx(
        row["seconds"], rel=1e-2
    )
    assert [check["threads"] for check in row["checks"]] == [2]
    assert found["waking"]["pauses"] == sorted(found["waking"]["pauses"]) and min(found["waking"]["second"]) > 0
    assert re.search(r"^deform_conv +S8 +forward +[\d.]+ +[\d.]+ +[\d.]+", done.stdout, re.M)
