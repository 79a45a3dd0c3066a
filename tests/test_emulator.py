"""The emulator of a GPU (tests/emulator) finds faults that were planted, and numdcn's kernels are right on it.

Both run in processes of their own (emulator_programs.py), by the real compiler: the wheels of the extra `cuda` are needed.
"""

import concurrent.futures
import json
import os
import subprocess
import sys

import device
import pytest
import test_cuda_compile
from checks import ROOT
from emulator import build
from emulator_programs import CASES

# What is told of each kernel of emulator_programs.FAULTS
EXPECTED = {
    "out_of_bounds": ("CUDA_ERROR_ILLEGAL_ADDRESS", "access outside of an allocation", "offset 256"),
    "out_of_a_shared_array": ("CUDA_ERROR_ILLEGAL_ADDRESS", "access outside of a shared array", "st.shared"),
    "misaligned": ("CUDA_ERROR_MISALIGNED_ADDRESS", "misaligned access to global memory", "of 16 bytes"),
    "freed": ("CUDA_ERROR_ILLEGAL_ADDRESS", "(freed)"),
    "missing_barrier": ("race in shared memory, write after read",),
    "same_place_from_two_blocks": ("race in global memory, write after write",),
    "barrier_of_some": ("CUDA_ERROR_LAUNCH_TIMEOUT", "16 at a barrier"),
    "too_many_threads": ("CUDA_ERROR_INVALID_VALUE", "more than the launch bounds"),
    "unknown_instruction": ("CUDA_ERROR_INVALID_PTX", "ptx: line ", "unknown instruction bfind.u32"),
    "copy_that_is_not_waited_for": ("returned 32 NaN",),
    "additions_of_four": (f"returned {[48.0] * 8 + [0.0] * 4}",),
    "shuffles": ("returned 160",),
    "matrices": ("returned True",),
}
EMULATED = [sys.executable, "-m", "tests.emulator", sys.executable]
SILENT = ("copy_that_is_not_waited_for", "additions_of_four", "shuffles", "matrices")


@pytest.fixture(scope="module")
def run():
    """A program's result, and what the emulator reported."""
    reason = build.missing() or test_cuda_compile.missing() or ("there is a real GPU" if device.count_gpus() else None)
    if reason:
        pytest.skip(reason)

    def result(*words, **options):
        options = {f"NUMDCN_EMULATOR_{key}": value for key, value in options.items()}
        command = [*EMULATED, "-W", "ignore", "tests/emulator_programs.py", *words]
        env = {**os.environ, **options, "PYTHONPATH": str(ROOT)}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout), done.stderr

    return result


@pytest.fixture(scope="module")
def faults(run):
    return run("faults", RACES="shared,global")[0]


@pytest.mark.parametrize("name", EXPECTED)
def test_planted_faults(faults, name):
    assert not [part for part in EXPECTED[name] if part not in faults[name]], faults[name]
    assert ("emulator: " in faults[name]) == (name not in SILENT), faults[name]


@pytest.fixture(scope="module")
def comparisons(run, faults):
    """After the faults, for which the driver was built."""

    def compare(name):  # threads, warps, blocks and streams in an order that a GPU might take
        return run("comparison", name, RACES="shared", SEED="3", LAZY="1")

    with concurrent.futures.ThreadPoolExecutor(test_cuda_compile.WORKERS) as pool:
        return dict(zip(CASES, pool.map(compare, CASES)))


@pytest.mark.parametrize("name", CASES)
def test_deform_conv(comparisons, name):
    errors, reports = comparisons[name]
    assert len(errors) == 1 + 2 * 5  # y, and twice the gradients
    assert not {what: error for what, error in errors.items() if not error < CASES[name].tolerance}
    assert not reports


def test_exit_status_is_passed_on(run):
    command = [*EMULATED, "-c", "raise SystemExit(7)"]
    assert subprocess.run(command, cwd=ROOT, env={**os.environ, "PYTHONPATH": ""}).returncode == 7
