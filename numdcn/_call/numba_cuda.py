"""The only place that imports the package numba-cuda: `numba.cuda`, and what else the kernels need from it.

Up to 0.30.4 it needs `numpy.row_stack`, which NumPy 2.5 removed; without it no kernel compiles. It is provided while
numba-cuda is imported, and removed afterwards.
"""
# ruff: noqa: F401 - others take these names from here

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import numpy as np
from numba_cuda import __version__ as VERSION  # noqa: N812


@contextlib.contextmanager
def _row_stack() -> Iterator[None]:
    """Provide `numpy.row_stack`, the old name of `vstack`."""
    if hasattr(np, "row_stack"):
        yield
        return
    np.row_stack = np.vstack  # type: ignore[attr-defined]  # noqa: NPY201
    try:
        yield
    finally:
        del np.row_stack  # type: ignore[attr-defined]  # noqa: NPY201


with _row_stack():
    from numba import cuda
    from numba.cuda import cgutils, types
    from numba.cuda.core import config
    from numba.cuda.extending import intrinsic

    SIMULATED = bool(config.ENABLE_CUDASIM)
    if SIMULATED:
        from numba.cuda.simulator import kernelapi
    else:
        import numba.cuda.np.arrayobj  # needs row_stack, and would otherwise be imported later, by the first kernel
        from cuda.bindings import driver
        from numba.cuda import dispatcher, serialize, utils
