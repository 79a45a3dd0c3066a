"""What the package numba-cuda needs from outside, and the cache of its kernels. No GPU is needed."""

import sys
from concurrent.futures import ThreadPoolExecutor

import device
import pytest
import test_compile
from checks import ROOT, run_python

from tools.ptx_emulator import build

PROCESSES = 8
VARIANTS = """
import pathlib, sys, time
import test_compile
from numba.cuda.dispatcher import _Kernel
from numdcn import _cache

class Kernel:
    "What the cache sees of a compiled kernel; its machine code is its name."
    def __init__(self, name): self.name = name
    def _reduce_states(self): return {"name": self.name}
    @property
    def codegen(self): return Target
class Target:
    @staticmethod
    def codegen(): return Target
    @staticmethod
    def magic_tuple(): return "a GPU", (9, 0)
    @staticmethod
    def refresh(): pass
_Kernel._rebuild = staticmethod(Kernel)
every = []
for maker in test_compile.makers().values():
    for constants in maker.variants():
        kernel = maker(*constants)
        dispatcher = kernel.dispatcher
        cells = [_cache._constant(cell.cell_contents) for cell in dispatcher.py_func.__closure__ or ()]  # not each uses all constants
        name = f"{maker.name} {cells} {kernel._signature} {dispatcher.targetoptions}"
        every.append((name, dispatcher._cache, kernel._signature))
"""
WRITE = f"""
number, folder = int(sys.argv[1]), pathlib.Path(sys.argv[2])
pathlib.Path(folder, "ready" + sys.argv[1]).touch()
while len(list(folder.glob("ready*"))) < {PROCESSES}:
    time.sleep(0.001)
for name, cache, signature in every[number::{PROCESSES}]:
    cache.save_overload(signature, Kernel(name))
"""
READ = """
for name, cache, signature in every:
    found = cache.load_overload(signature, Target)
    print(name, found and found.name, sep=" | ")
"""


@pytest.fixture(autouse=True)
def compiler():
    reason = test_compile.missing()
    if reason:
        pytest.skip(reason)


@pytest.mark.full
def test_processes_that_keep_variants_at_once(tmp_path):
    """Each variant is found again, unmixed."""
    with ThreadPoolExecutor(PROCESSES) as pool:
        for job in [
            pool.submit(run_python, VARIANTS + WRITE, number, tmp_path, NUMBA_CACHE_DIR=tmp_path / "cache")
            for number in range(PROCESSES)
        ]:
            job.result()
    told = run_python(VARIANTS + READ, NUMBA_CACHE_DIR=tmp_path / "cache").stdout
    rows = [line.split(" | ") for line in told.splitlines()]
    assert len(rows) > 100
    assert not [row for row in rows if row[0] != row[1]]


@pytest.mark.full
@pytest.mark.cuda
def test_real_kernels_are_kept(tmp_path):
    """On a GPU, or an emulated one: processes that compile at the same time are right, and the next one compiles
    nothing."""
    code = """
import sys
import numba
import numpy as np
numba.config.CACHE_DIR = sys.argv[1]
import numba.cuda
import numdcn
from numdcn._cuda import jit
for dtype in np.float32, np.float64:
    x, w = np.arange(36, dtype=dtype).reshape(1, 1, 6, 6), np.ones((2, 1, 3, 3), dtype)
    y = numdcn.conv_forward(numba.cuda.to_device(x), numba.cuda.to_device(w)).copy_to_host()
    assert np.array_equal(y, numdcn.conv_forward(x, w))
dispatchers = [kernel.dispatcher for maker in jit.MAKERS for kernel in maker._compiled.values()]
print(*(sum(sum(d.stats[number].values()) for d in dispatchers) for number in (1, 2)))  # loaded, compiled
"""
    reason = None if device.count_gpus() else build.missing()
    if reason:
        pytest.skip(reason)
    emulated = [] if device.count_gpus() else ["-m", "tools.ptx_emulator", sys.executable]

    def run(_):
        return run_python([*emulated, "-c", code, tmp_path], PYTHONPATH=ROOT, PYTHONSAFEPATH=None).stdout

    with ThreadPoolExecutor(2) as pool:
        first = list(pool.map(run, range(2)))
    compiled = sum(int(told.split()[1]) for told in first)
    loaded, more = map(int, run(0).split())
    assert compiled >= loaded >= 4 and more == 0


def test_compilation_without_row_stack():
    """NumPy 2.5 lacks it, and still does afterwards."""
    code = """
import numpy
vars(numpy).pop("row_stack", None)
numpy.__all__ = [name for name in numpy.__all__ if name != "row_stack"]
import test_compile
job = next(job for job in test_compile.jobs() if job[0].endswith("_cuda.conv.weights.sum_partials"))
print([row[2] for row in test_compile.compiled(job).rows], hasattr(numpy, "row_stack"))
"""
    assert run_python(code).stdout == f"{[test_compile.sm(arch) for arch in test_compile.supported()]} False\n"


def test_numpy_keeps_its_own_row_stack():
    code = """
import numpy
numpy.row_stack = before = numpy.vstack
from numdcn._cuda import jit
assert numpy.row_stack is before
"""
    run_python(code)


class Refused:
    """A dispatcher whose code the linker rejects."""

    def __init__(self, error):
        self.error = error

    def compile(self, signature):
        raise self.error


def test_a_linker_that_is_too_old():
    from cuda.bindings import nvjitlink
    from numba.cuda import types

    from numdcn._cuda.launch import Kernel

    outdated = nvjitlink.nvJitLinkError(int(nvjitlink.Result.ERROR_OUTDATED_LIBRARY))
    kernel = Kernel(Refused(outdated), (types.UniTuple(types.int64, 2),))
    with pytest.raises(RuntimeError, match=r"nvJitLink \d+\.\d+ .*older.*libnvvm.*pip install") as raised:
        kernel._load(0)
    assert raised.value.__cause__ is outdated
    other = nvjitlink.nvJitLinkError(int(nvjitlink.Result.ERROR_INTERNAL))
    with pytest.raises(nvjitlink.nvJitLinkError) as raised:
        Kernel(Refused(other), (types.UniTuple(types.int64, 2),))._load(0)
    assert raised.value is other
