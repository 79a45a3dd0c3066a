"""The emulator finds planted faults, computes what a GPU does, and runs commands.

The kernels of faults.py run in a separate process. They need GCC, numba-cuda and its compiler.
"""

import ctypes
import json
import os
import subprocess
import sys

import pytest

from .. import build

# What is printed for each kernel of faults.FAULTS
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
SILENT = ("copy_that_is_not_waited_for", "additions_of_four", "shuffles", "matrices")


def real_gpus():
    """How many GPUs this machine's driver sees."""
    try:
        driver, count = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(0)
        return 0 if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)) else count.value
    except OSError:
        return 0


def emulated(*words, **options):
    """A finished process of `python -m tools.ptx_emulator` with these words."""
    env = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONSAFEPATH")}
    env.update({f"PTX_EMULATOR_{key}": value for key, value in options.items()})
    command = [sys.executable, "-m", "tools.ptx_emulator", *words]
    return subprocess.run(command, cwd=build.ROOT, env=env, capture_output=True, text=True)


@pytest.fixture(scope="module")
def needs():
    reason = build.missing() or ("there is a real GPU" if real_gpus() else None)
    if reason:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def faults(needs):
    program = [sys.executable, "-W", "ignore", "-m", "tools.ptx_emulator.tests.faults"]
    done = emulated(*program, RACES="shared,global")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("name", EXPECTED)
def test_planted_faults(faults, name):
    assert not [part for part in EXPECTED[name] if part not in faults[name]], faults[name]
    assert ("emulator: " in faults[name]) == (name not in SILENT), faults[name]


def test_every_fault_is_expected(faults):
    assert faults.keys() == EXPECTED.keys()


def test_exit_status_is_passed_on(needs):
    assert emulated(sys.executable, "-c", "raise SystemExit(7)").returncode == 7
    assert emulated("sh", "-c", "kill -9 $$").returncode == 128 + 9


def test_options_are_seen(needs):
    code = """
import ctypes
driver, count, name = ctypes.CDLL("libcuda.so.1"), ctypes.c_int(), ctypes.create_string_buffer(99)
assert not driver.cuInit(0) and not driver.cuDeviceGetCount(ctypes.byref(count))
assert not driver.cuDeviceGetName(name, 99, 0)
print(count.value, name.value.decode())
"""
    assert emulated(sys.executable, "-c", code, DEVICES="3").stdout == "3 PTX emulator on the CPU\n"


def test_a_command_is_asked_for():
    done = emulated()
    assert done.returncode == 1 and "usage: python -m tools.ptx_emulator COMMAND" in done.stderr
