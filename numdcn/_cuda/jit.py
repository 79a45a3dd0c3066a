"""Decorators, flags and variants of the CUDA kernels.

A kernel is made by a function of its compile-time constants (types, tile sizes, flags), which are ints, bools and Numba
types; so are the helpers it needs for these constants (`device`). It takes one argument, a NamedTuple of int64s, tuples
of them, and scalars of its compute type; arrays are passed as addresses (see `memory`). Within a kernel, values that
belong together are passed as a NamedTuple: it costs no registers.

Four constants have the same names in all kernels except the copies of `layout` (from S to T, or back):

    T    the type in which images and most other arrays are stored
    C    the widest type of coordinates, as boxes and offsets; they may be as narrow as T, see `coordinates`
    A    `compute_type(T)`: the type of arrays that hold sums
    S    `scalar_type(T)`: NumPy's scalar of that type; S(0.5) is a constant of it

A kernel may close over ints, bools, Numba types, classes, and helpers made of these: the disk cache identifies it by
their names and values, and raises for anything else.

With NUMBA_ENABLE_CUDASIM=1 the kernels run in Numba's simulator, thread by thread in Python. What it cannot run (inline
PTX, vector loads) is replaced by a plain function, see `memory`.
"""

from __future__ import annotations

import functools
import pickle
import sys
import threading
import typing
from collections.abc import Callable, Iterable
from typing import Any

import llvmlite
import numba
import numpy as np

from numdcn import _cache
from numdcn._call import numba_cuda
from numdcn._call.numba_cuda import SIMULATED, cuda, types
from numdcn._cuda import launch
from numdcn._formulas.jit import require_compiler

STORE = _cache.Store("cuda", numba.__version__, llvmlite.__version__, np.__version__, numba_cuda.VERSION)
THREADS = 4 if SIMULATED else 256  # per block, unless a kernel asks for another number


def _mend_simulator() -> None:
    """Give the simulator's shared arrays a lock, without which threads of a block that request one at once would get
    two, and fill them with NaN. (Alignment means nothing here.)"""
    from numdcn._call.numba_cuda import kernelapi

    lock = threading.Lock()

    def array(self: Any, shape: Any, dtype: Any, alignment: Any = None) -> Any:
        caller = sys._getframe(1)
        place = (caller.f_code.co_filename, caller.f_lineno)
        with lock:
            if place not in self._allocations:
                stored = np.dtype(str(dtype)) if isinstance(dtype, types.Type) else np.dtype(dtype)
                nbytes = int(np.prod(shape)) * stored.itemsize
                self._allocations[place] = np.frombuffer(bytearray(b"\xff" * nbytes), stored)
            return self._allocations[place].reshape(shape)

    kernelapi.FakeCUDAShared.array = array


if SIMULATED:
    _mend_simulator()

MAKERS: list[Maker] = []  # all kernels, for the test that compiles them


class Maker:
    """The variants of a kernel. Called with its constants, it returns the compiled kernel."""

    def __init__(
        self,
        make: Callable[..., Any],
        call: type,
        variants: Callable[[], Iterable[tuple[Any, ...]]],
        bounds: Callable[..., tuple[int, int] | None],
    ) -> None:
        self.make, self.call, self.variants, self.bounds = make, call, variants, bounds
        self.name = f"{make.__module__.removeprefix('numdcn.')}.{make.__name__}"
        self._compiled: dict[tuple[Any, ...], Any] = {}
        MAKERS.append(self)

    def __call__(self, *constants: Any) -> Any:
        kernel = self._compiled.get(constants)
        if kernel is None:
            dispatcher = _jit(self.make(*constants), self.options(*constants))
            kernel = self._compiled[constants] = launch.Kernel(dispatcher, self.signature(*constants).args)
        return kernel

    def options(self, *constants: Any) -> dict[str, Any]:
        """Compiler options for a variant."""
        bounds = self.bounds(*constants)
        return {} if bounds is None else {"launch_bounds": bounds}

    def signature(self, *constants: Any) -> Any:
        """The Numba signature of a variant. The first constant determines the compute type, that of `Scalar` fields."""
        return types.void(_numba_type(self.call, compute_type(constants[0])))


def kernels(
    call: type,
    variants: Callable[[], Iterable[tuple[Any, ...]]],
    bounds: Callable[..., tuple[int, int] | None] = lambda *constants: None,
) -> Callable[[Callable[..., Any]], Maker]:
    """A `Maker` of the decorated function, which makes a kernel from constants. The first constant is a type of arrays;
    it determines the compute type, that of `Scalar` fields. `call`: the type of the kernel's argument. `variants`: the
    constants in use. `bounds`: the maximum number of threads per block and of blocks that must fit a multiprocessor."""
    return lambda make: Maker(make, call, variants, bounds)


def _jit(function: Callable[..., Any], options: dict[str, Any]) -> Any:
    if SIMULATED:
        return cuda.jit(function)
    require_compiler()
    return _cache.attach(STORE, cuda.jit(**options)(function), _pack, _unpack)


def _pack(kernel: Any) -> bytes:
    """A compiled kernel as bytes."""
    return numba_cuda.serialize.dumps(kernel._reduce_states())


def _unpack(target_context: Any, content: bytes) -> Any:
    with numba_cuda.utils.numba_target_override():
        target_context.refresh()  # this may be the first code in this process
        return numba_cuda.dispatcher._Kernel._rebuild(**pickle.loads(content))


def device(function: Callable[..., Any]) -> Any:
    """A helper, inlined into the kernel that calls it like the CPU's helpers. (A function compiled separately by
    Numba-CUDA needs a driver, so kernels could not be compiled on a machine without one.)"""
    return cuda.jit(device=True)(function) if SIMULATED else numba.njit(inline="always", error_model="numpy")(function)


def _numba_type(annotation: Any, compute: Any) -> Any:
    """The Numba type of an annotation: int, `Scalar`, or a tuple or NamedTuple of these."""
    if annotation is int:
        return types.int64
    if annotation is Scalar:
        return compute
    if hasattr(annotation, "_fields"):
        hints = typing.get_type_hints(annotation)
        fields = [_numba_type(hints[name], compute) for name in annotation._fields]
        return types.BaseTuple.from_types(fields, annotation)
    return types.BaseTuple.from_types([_numba_type(item, compute) for item in typing.get_args(annotation)])


class Scalar:
    """Annotation of a field that holds a scalar of the kernel's compute type."""


# The types of array elements, each with its compute type; bfloat16 is stored as its bits.

F32, F64, F16, BF16 = types.float32, types.float64, types.float16, types.uint16
STORED = {"float32": F32, "float64": F64, "float16": F16, "bfloat16": BF16}


def compute_type(stored: Any) -> Any:
    """float64 for float64, else float32."""
    return F64 if stored == F64 else F32


def scalar_type(stored: Any) -> type[np.floating[Any]]:
    """NumPy's scalar of `compute_type`."""
    return np.float64 if stored == F64 else np.float32


def type_pairs() -> list[tuple[Any, Any]]:
    """The types of images, each with the widest type of coordinates."""
    return [(dtype, compute_type(dtype)) for dtype in (F32, F64, F16, BF16)]


@functools.cache
def multiprocessors(device: int) -> int:
    """The number of multiprocessors of a device."""
    return 1 if SIMULATED else int(cuda.gpus[device].MULTIPROCESSOR_COUNT)


def has_vector_reductions(device: int) -> bool:
    """Whether a device has 16-byte atomic adds."""
    return not SIMULATED and tuple(cuda.gpus[device].compute_capability) >= (9, 0)


def has_mma(device: int) -> bool:
    """Whether a device multiplies bfloat16 and tf32 on tensor cores. The simulator claims to."""
    return SIMULATED or tuple(cuda.gpus[device].compute_capability) >= (8, 0)
