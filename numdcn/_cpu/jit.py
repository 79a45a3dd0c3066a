"""Decorators for the CPU kernels, and the register tiles that follow from the target's SIMD width."""

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

try:
    from numdcn._cpu.compiler import BlockCompiler, KernelCompiler
except (ImportError, AttributeError):  # a Numba with other parts: compiling takes longer
    from numba.core.compiler import Compiler as BlockCompiler  # type: ignore[no-redef]
    from numba.core.compiler import Compiler as KernelCompiler  # type: ignore[no-redef]

STORE = _cache.Store("cpu", numba.__version__, llvmlite.__version__, np.__version__)
_INTERNAL = {**OPTIONS, "no_cpython_wrapper": True}  # not called from Python


def entry(function: Callable[..., Any]) -> Any:
    """Compile a function called from Python; kept on disk if a folder is writable, otherwise only in memory."""
    return _cache.attach(STORE, numba.njit(pipeline_class=KernelCompiler, **OPTIONS)(function), _pack, _unpack)


def kernel(function: Callable[..., Any]) -> Any:
    """Compile, like `entry`, a function that threads run together, called by its machine code's address
    (`threads.launch`).

    Arguments of a kernel: `one`, a 1 of the element type; `params`, the address of its parameters (`unpack`);
    `counter`, the address of the next task's number (`next_task`); `slot`, the number of the thread within the call.
    """
    require_compiler()
    return _cache.attach(STORE, numba.njit(pipeline_class=KernelCompiler, **_INTERNAL)(function), _pack, _unpack)


def _pack(result: CompileResult) -> bytes | None:
    """A compiled kernel as bytes; None if it contains addresses of this process."""
    return None if result.library.has_dynamic_globals else dumps(result._reduce())


def _unpack(target_context: Any, content: bytes) -> CompileResult:
    target_context.refresh()  # this may be the first code in this process
    return CompileResult._rebuild(target_context, *pickle.loads(content))


def block(function: Callable[..., Any]) -> Any:
    """A separately compiled part of kernels, called a few times per tile; this halves compile time.

    Anything called more often is a `helper`: its statements are inlined into the caller before types are known.
    """
    return numba.njit(pipeline_class=BlockCompiler, **_INTERNAL)(function)


@functools.cache
def register_tile() -> tuple[int, int]:
    """Rows and vectors of the GEMM's register tile: as many accumulators as fit in the register file next to a row of B
    and a broadcast."""
    if simd_bytes() == 64:
        return 14, 2  # 28 of 32 registers
    if has_32_registers():
        return 6, 4  # 24 of 32
    return 6, 2  # 12 of 16


def has_32_registers() -> bool:
    """Whether the target has 32 SIMD registers rather than 16."""
    return simd_bytes() == 64 or target()[0] in ("aarch64", "arm64")
