"""Decorators and flags of the CPU kernels, the SIMD width of the target, and the register tiles that follow from it.

No fast-math flag is used anywhere: where a fused multiply-add or a reordered sum is wanted it is written out
(`simd_cpu.fma`, `lanes_cpu.sum3`), so that results depend neither on how a loop was vectorised nor on what was inlined.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from typing import Any

import llvmlite
import numba
import numpy as np
from numba.core.compiler import CompileResult
from numba.core.serialize import dumps

from numdcn._kernels import cache

STORE = cache.Store("cpu", numba.__version__, llvmlite.__version__, np.__version__)
_OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False, "no_cfunc_wrapper": True}
_INTERNAL = {**_OPTIONS, "no_cpython_wrapper": True}  # Python does not call it


def entry(function: Callable[..., Any]) -> Any:
    """Compile what Python calls: kept on disk where a folder can be written, in memory alone where not."""
    return cache.attach(STORE, numba.njit(**_OPTIONS)(function), _pack, _unpack)


def kernel(function: Callable[..., Any]) -> Any:
    """The same for what threads run together, by the address of its machine code (`threads.launch`)."""
    return cache.attach(STORE, numba.njit(**_INTERNAL)(function), _pack, _unpack)


def _pack(result: CompileResult) -> bytes | None:
    """A compiled kernel as bytes; None if it holds addresses of this process."""
    return None if result.library.has_dynamic_globals else dumps(result._reduce())


def _unpack(target_context: Any, content: bytes) -> CompileResult:
    target_context.refresh()  # this may be the first code of this process
    return CompileResult._rebuild(target_context, *pickle.loads(content))


def helper(function: Callable[..., Any]) -> Any:
    """A formula: its statements become part of whoever calls it, before types are known (so it takes any)."""
    return numba.njit(inline="always", **_OPTIONS)(function)


def block(function: Callable[..., Any]) -> Any:
    """A part of a kernel, compiled by itself (which halves compile time) and called a few times a tile."""
    return numba.njit(**_INTERNAL)(function)


@functools.cache
def target() -> tuple[str, str, frozenset[str]]:
    """The machine that Numba compiles for: architecture, CPU name, enabled features. Part of a file's name in the cache."""
    from numba.core.registry import cpu_target

    triple, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    return str(triple).split("-")[0], str(cpu), frozenset(f[1:] for f in str(features).split(",") if f.startswith("+"))


@functools.cache
def simd_bytes() -> int:
    """Bytes of a SIMD register of the target: 64 (AVX-512), 32 (AVX2 with FMA) or 16."""
    _, _, features = target()
    if {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= features:
        return 64
    return 32 if {"avx2", "fma"} <= features else 16


def lanes(dtype: Any) -> int:
    """Elements of `dtype` (a NumPy or Numba type) in a SIMD register."""
    bits = getattr(dtype, "bitwidth", None)
    return simd_bytes() // (bits // 8 if bits else dtype.itemsize)


@functools.cache
def register_tile() -> tuple[int, int]:
    """Rows and vectors of the GEMM's register tile: as many accumulators as the register file holds."""
    if simd_bytes() == 64:
        return 14, 2  # 28 of 32 registers
    if has_32_registers():
        return 6, 4  # 24 of 32
    return 6, 2  # 12 of 16


def has_32_registers() -> bool:
    """Whether the target has 32 SIMD registers rather than 16."""
    return simd_bytes() == 64 or target()[0] in ("aarch64", "arm64")


def has_fma() -> bool:
    """Whether the target fuses multiply-adds in hardware."""
    return simd_bytes() > 16 or target()[0] in ("aarch64", "arm64")
