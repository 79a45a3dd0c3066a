"""The fuzzer (tests/fuzz) finds planted faults, reports their seeds, and finds them again from these."""

import os
import re
import signal

import numpy as np
import pytest
from checks import ROOT, run_python, threads_asked_for
from fuzz.check import backend_of, check
from fuzz.draw import DRAW, Dice, draw
from test_layout import OPERATORS

import numdcn

WRAPPED = """
import os, signal, time
import numdcn
right = numdcn.roi_align_forward

def wrong(x, rois, *more, **options):
    y = right(x, rois, *more, **options)
    {}
    return y

numdcn.roi_align_forward = wrong
"""


def fuzz(folder, fault, *arguments, **environment):
    """(exit code, output) of the command, with an extra line in every roi_align_forward."""
    (folder / "sitecustomize.py").write_text(WRAPPED.format(fault))
    path = os.pathsep.join(map(str, (folder, ROOT)))
    done = run_python(["-m", "tests.fuzz"], *arguments, check=False, PYTHONPATH=path, **environment)
    return done.returncode, done.stdout


def found(printed):
    """The reported seeds of roi_align."""
    return [int(seed) for seed in re.findall(r"^--seed (\d+) --only roi_align$", printed, re.MULTILINE)]


def test_every_operator_is_drawn():
    assert sorted(DRAW) == OPERATORS


@pytest.mark.parametrize("direction", ["forward", "backward"])
@pytest.mark.parametrize("operator", OPERATORS)
def test_a_wrong_element_is_found(operator, direction, monkeypatch):
    name = f"{operator}_{direction}"
    right = getattr(numdcn, name)

    def wrong(*arrays, **options):
        result = right(*arrays, **options)
        first = next((a for a in (result if isinstance(result, tuple) else [result]) if a is not None), None)
        if first is not None and first.size:
            first[(-1,) * first.ndim] += first.dtype.type(0.01)
        return result

    monkeypatch.setattr(numdcn, name, wrong)
    with pytest.raises(AssertionError, match="expected .* within") as raised:
        for seed in range(20):
            check(operator, seed)
    assert "grad_y (" in raised.value.__notes__[-1]  # a note describes the problem


@pytest.mark.full
def test_a_seed_is_told_and_replays(tmp_path):
    fault = "y[1:2, :, -1:, -1:] *= 1.001"
    code, printed = fuzz(tmp_path, fault, "--seconds", 100, "--seed", 3, "--only", "roi_align", "--most", 1)
    (seed,) = found(printed)
    assert code == 1 and "seed 3" in printed and "1 failures of" in printed
    code, again = fuzz(tmp_path, fault, "--seed", seed, "--only", "roi_align")
    assert code == 1 and "1 failures of 1 problems" in again and found(again) == [seed]
    assert re.findall("^AssertionError.*", again, re.MULTILINE) == re.findall(
        "^AssertionError.*", printed, re.MULTILINE
    )
    code, right = fuzz(tmp_path, "pass", "--seed", seed, "--only", "roi_align")
    assert code == 0 and "0 failures of 1 problems" in right


@pytest.mark.full
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="processes end with other codes there")
def test_crashes_are_told_with_their_seeds(tmp_path):
    fault = "if x.shape[-1] == 3: os.kill(os.getpid(), signal.SIGSEGV)"
    code, printed = fuzz(tmp_path, fault, "--seconds", 100, "--seed", 5, "--only", "roi_align", "--most", 2)
    first, second = found(printed)  # it continues after the first
    assert code == 1 and first < second and printed.count(f"the process died with exit code {-signal.SIGSEGV}") == 2


@pytest.mark.full
def test_what_hangs_is_told_with_its_seed(tmp_path):
    code, printed = fuzz(tmp_path, "time.sleep(60)", "--seed", 6, "--only", "roi_align", NUMDCN_TEST_TIME=0.0125)
    assert code == 1 and found(printed) == [6] and "still running after 5 s" in printed


@pytest.mark.full
def test_every_run_has_another_seed(tmp_path):
    seeds = {fuzz(tmp_path, "pass", "--only", "roi_align")[1].splitlines()[0] for _ in range(2)}
    assert len(seeds) == 2 and all(re.fullmatch(r"seed \d+", seed) for seed in seeds)


@pytest.mark.parametrize("operator", OPERATORS)
def test_large_problems_are_shared_out(operator, monkeypatch):
    """Some run in several threads; otherwise independence of their number would prove nothing."""
    asked = threads_asked_for(monkeypatch)
    before = numdcn.get_num_threads()
    numdcn.set_num_threads(7)
    try:
        for dice in [dice for dice in (Dice(operator, seed) for seed in range(300)) if dice.large]:
            with np.errstate(all="ignore"):
                draw(operator, dice).forward(backend_of(operator))
            if max(asked, default=1) > 1:
                return
    finally:
        numdcn.set_num_threads(before)
    raise AssertionError("none is")
