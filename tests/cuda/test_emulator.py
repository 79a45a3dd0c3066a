"""numdcn's kernels, compiled by the real compiler, are right on an emulated GPU (tools/ptx_emulator, which has its own
tests).

Each case runs in a separate process (emulator_programs.py). The wheels of the extra `cuda` are needed.
`python -m tools.ptx_emulator python -m pytest -m cuda tests/ops/test_conv.py` runs any other GPU test there.
"""

import concurrent.futures
import json
import os
import subprocess
import sys

import device
import pytest
import test_compile
from checks import ROOT
from emulator_programs import CASES

from tools.ptx_emulator import build


def emulated(*command, **options):
    """What a Python command printed, and what the emulator reported: threads, warps, blocks and streams scheduled as on
    a GPU."""
    options = {"RACES": "shared", "SEED": "3", "LAZY": "1", **options}
    env = {
        **os.environ,
        **{f"PTX_EMULATOR_{key}": value for key, value in options.items()},
        "PYTHONPATH": str(ROOT),
        "NUMDCN_QUIET": "1",
    }
    command = [sys.executable, "-m", "tools.ptx_emulator", sys.executable, "-W", "ignore", *command]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


def compared(name):
    """The differences of a case, and what the emulator reported."""
    printed, reports = emulated("tests/support/emulator_programs.py", name)
    return json.loads(printed), reports


def prepare():
    """Skip if the emulator cannot run; else build its driver, once for all processes."""
    reason = build.missing() or ("there is a real GPU" if device.count_gpus() else None)
    if reason:
        pytest.skip(reason)
    build.driver(build.cache())


@pytest.fixture(scope="module")
def comparisons():
    prepare()
    with concurrent.futures.ThreadPoolExecutor(test_compile.WORKERS) as pool:
        return dict(zip(CASES, pool.map(compared, CASES)))


@pytest.mark.full
@pytest.mark.parametrize("name", CASES)
def test_deform_conv_on_the_emulator(comparisons, name):
    errors, reports = comparisons[name]
    assert len(errors) == 2 * (1 + 2 * 5)  # y, and the gradients in two ways, twice
    assert not {what: error for what, error in errors.items() if not error < CASES[name].tolerance}
    assert not reports


@pytest.mark.full
def test_threads_repeat_calls_on_devices_of_their_own():
    """While another device is current, on streams that run as late as they may."""
    prepare()
    printed, reports = emulated("tests/support/emulator_programs.py", "devices", DEVICES="2", RACES="")
    errors = json.loads(printed)
    assert len(errors) == 2 and max(errors.values()) < CASES["depthwise"].tolerance
    assert not reports


@pytest.mark.full
@pytest.mark.parametrize("capability", ["80", "90"])
def test_attention_on_the_emulator(capability):
    """With 16-byte atomic adds and without."""
    prepare()
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/cuda/test_attention.py", "-k", "networks"]
    printed, reports = emulated(*command, CAPABILITY=capability)
    assert "5 passed" in printed
    assert not reports


@pytest.mark.full
@pytest.mark.parametrize("capability", ["80", "90"])
def test_two_steps_on_the_emulator(capability):
    """With 16-byte atomic adds and without; the product is the stand-in's, which waits for its stream."""
    prepare()
    chosen = "against_the_reference and (both or odd)"
    command = [
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "tests/cuda/test_two_step.py",
        "-m",
        "cuda",
        "-k",
        chosen,
    ]
    printed, reports = emulated(*command, CAPABILITY=capability)
    assert "4 passed" in printed
    assert not reports
