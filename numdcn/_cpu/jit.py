"""Decorators of the CPU kernels, and the register tiles that follow from the SIMD width of the target."""

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

from numdcn import _cache
from numdcn._formulas.jit import OPTIONS, require_compiler, simd_bytes, target

STORE = _cache.Store("cpu", numba.__version__, llvmlite.__version__, np.__version__)
_INTERNAL = {**OPTIONS, "no_cpython_wrapper": True}  # Python does not call it


def entry(function: Callable[..., Any]) -> Any:
    """Compile what Python calls: kept on disk where a folder can be written, in memory alone where not."""
    return _cache.attach(STORE, numba.njit(**OPTIONS)(function), _pack, _unpack)


def kernel(function: Callable[..., Any]) -> Any:
    """Compile, as `entry` does, what threads run together, by the address of its machine code (`threads.launch`).

    The arguments of a kernel: `one`, 1 in the type of the elements; `params`, the address of its parameters (`unpack`);
    `counter`, the address of the number of the next task (`next_task`); `slot`, the number of the thread in the call.
    """
    require_compiler()
    return _cache.attach(STORE, numba.njit(**_INTERNAL)(function), _pack, _unpack)


def _pack(result: CompileResult) -> bytes | None:
    """A compiled kernel as bytes; None if it holds addresses of this process."""
    return None if result.library.has_dynamic_globals else dumps(result._reduce())


def _unpack(target_context: Any, content: bytes) -> CompileResult:
    target_context.refresh()  # this may be the first code of this process
    return CompileResult._rebuild(target_context, *pickle.loads(content))


def block(function: Callable[..., Any]) -> Any:
    """A function of kernels that is compiled by itself, which halves compile time, and called a few times a tile.

    What is called more often is a `helper`: its statements become part of the caller's, before types are known.
    """
    return numba.njit(**_INTERNAL)(function)


@functools.cache
def register_tile() -> tuple[int, int]:
    """Rows and vectors of the GEMM's register tile: as many accumulators as the register file holds beside a row
    of B and a broadcast."""
    if simd_bytes() == 64:
        return 14, 2  # 28 of 32 registers
    if has_32_registers():
        return 6, 4  # 24 of 32
    return 6, 2  # 12 of 16


def has_32_registers() -> bool:
    """Whether the target has 32 SIMD registers rather than 16."""
    return simd_bytes() == 64 or target()[0] in ("aarch64", "arm64")
