"""`python -m numdcn`: everything a bug report needs."""

from __future__ import annotations

import ctypes
import importlib.metadata
import os
import platform
import sys
import time

import numba
import numpy as np

import numdcn
from numdcn._call import scratch
from numdcn._call.install import install
from numdcn._cpu import gemm, jit, threads
from numdcn._formulas.jit import has_fma, simd_bytes, target


def cache_folder() -> str:
    """Where compiled kernels are stored."""
    return jit.STORE.writable() or "none (no folder that can be written to): kernels are compiled in every process"


def gpu() -> str:
    """How many GPUs the CUDA driver sees, and whether numba-cuda is installed to use them. Starts neither."""
    try:
        package = f"numba-cuda {importlib.metadata.version('numba-cuda')}"
    except importlib.metadata.PackageNotFoundError:
        package = f"numba-cuda not installed ({install('cuda')})"
    return f"{seen_gpus()}; {package}"


def seen_gpus() -> str:
    """How many GPUs the CUDA driver sees."""
    try:
        driver = ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")
        count = ctypes.c_int(0)
        if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
            return "none seen by the CUDA driver"
        return f"{count.value} seen by the CUDA driver"
    except OSError:
        return "none seen (no CUDA driver)"


def self_check() -> tuple[float, float, float]:
    """A small known case: a 3 x 3 image sampled half a pixel to the right, doubled. Returns the error and two times."""
    x = np.arange(9, dtype=np.float32).reshape(1, 1, 3, 3)
    offsets = np.zeros((1, 2, 3, 3), np.float32)
    offsets[:, 1] = 0.5
    w, bias = np.full((1, 1, 1, 1), 2, np.float32), np.ones(1, np.float32)
    expected = np.array([[2, 4, 3], [8, 10, 6], [14, 16, 9]], np.float32)
    times, error = [], 0.0
    for _ in range(2):
        start = time.perf_counter()
        y = numdcn.deform_conv_forward(x, offsets, w, bias)
        g = numdcn.deform_conv_backward(np.ones_like(y), x, offsets, w, bias)
        times.append(time.perf_counter() - start)
        assert g.x is not None
        # 15: pixels are read with weight 0.5 * w = 1, in each row the first by one sample, the others by two
        error = max(error, float(np.abs(y[0, 0] - expected).max()), abs(float(g.x.sum()) - 15.0))
    return error, times[0], times[1]


def report() -> list[tuple[str, str]]:
    """Names and values."""
    architecture, name, _ = target()
    rows = [
        ("numdcn", numdcn.__version__),
        ("Python", f"{platform.python_version()} ({platform.python_implementation()})"),
        ("numba", f"{numba.__version__} (llvmlite {importlib.metadata.version('llvmlite')})"),
        ("numpy", np.__version__),
        ("system", f"{platform.system()} {platform.release()}"),
        ("CPU", f"{architecture}, {name}"),
        ("SIMD width", f"{8 * simd_bytes()} bits, {'with' if has_fma() else 'without'} FMA"),
        ("register tile", f"{gemm.ROWS} rows x {gemm.VECTORS} vectors"),
        ("threads", f"{threads.get_num_threads()} of {threads.available_cpus()} CPUs for this process"),
        ("scratch kept", f"at most {scratch.get_scratch_limit() / 2**20:g} MiB between calls"),
        ("cache folder", cache_folder()),
        ("GPU", gpu()),
    ]
    return rows + [(k, v) for k, v in sorted(os.environ.items()) if k.startswith(("NUMDCN_", "NUMBA_"))]


def main() -> int:
    """Print the report; returns 0 if the self-check passes."""
    for name, value in report():
        print(f"{name:<14} {value}")
    error, first, second = self_check()
    good = error == 0.0
    verdict = "passed" if good else f"FAILED (difference {error:g})"
    print(f"{'self-check':<14} {verdict}: first call {first:.2f} s, second {second * 1e6:.0f} us")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
