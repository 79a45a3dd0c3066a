"""How formulas are compiled: inlined into their callers, on CPU and GPU alike; and the CPU that Numba targets.

No fast-math flag is used anywhere. A fused multiply-add or a reordered sum is written explicitly (`vectors.fma`,
`lanes.sum3`), so results do not depend on how a loop was vectorised or what was inlined.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numba

OPTIONS: dict[str, Any] = {"nogil": True, "error_model": "numpy", "boundscheck": False, "no_cfunc_wrapper": True}


def require_compiler() -> None:
    """Raise if Numba was told not to compile."""
    if numba.config.DISABLE_JIT:
        raise RuntimeError(
            "NUMBA_DISABLE_JIT is set, but numdcn's kernels need Numba's compiler; expected it unset, or 0, when Python starts "
            "(in a shell: unset NUMBA_DISABLE_JIT)"
        )


def helper(function: Callable[..., Any]) -> Any:
    """A function inlined into its callers before types are known (so it accepts any): a formula, or part of a
    kernel."""
    return numba.njit(inline="always", **OPTIONS)(function)


@functools.cache
def target() -> tuple[str, str, frozenset[str]]:
    """The machine Numba compiles for: architecture, CPU name, enabled features."""
    from numba.core.registry import cpu_target

    triple, cpu, features = cpu_target.target_context.codegen().magic_tuple()
    return str(triple).split("-")[0], str(cpu), frozenset(f[1:] for f in str(features).split(",") if f.startswith("+"))


@functools.cache
def simd_bytes() -> int:
    """Bytes in a SIMD register of the target: 64 (AVX-512), 32 (AVX2 with FMA) or 16."""
    _, _, features = target()
    if {"avx512f", "avx512dq", "avx512bw", "avx512vl"} <= features:
        return 64
    return 32 if {"avx2", "fma"} <= features else 16


def lanes(dtype: Any) -> int:
    """Elements of `dtype` (a NumPy or Numba type) in a SIMD register."""
    bits = getattr(dtype, "bitwidth", None)
    return simd_bytes() // (bits // 8 if bits else dtype.itemsize)


def has_fma() -> bool:
    """Whether the target has fused multiply-add instructions."""
    return simd_bytes() > 16 or target()[0] in ("aarch64", "arm64")
