"""NumPy arrays as kernels see them: where their elements are."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np

from numdcn._call.arguments import Arrays
from numdcn._call.arrays import is_half
from numdcn._call.results import Output, Outputs
from numdcn._cpu.parameters import NOWHERE, Place


def computed(dtype: np.dtype) -> np.dtype:
    """The type in which numbers of a type are computed: float32 for a half type, else the type itself."""
    return np.dtype(np.float32) if is_half(dtype) else dtype


def is_addressable(array: np.ndarray) -> bool:
    """Whether elements are aligned and strides are multiples of the element size."""
    return array.flags.aligned and math.gcd(*array.strides) % array.itemsize == 0


def addressable(array: np.ndarray) -> np.ndarray:
    """The array, or a copy if kernels cannot address it."""
    return array if is_addressable(array) else np.array(array, order="C")  # `ascontiguousarray` keeps what is unaligned


def addressable_arrays(arrays: Arrays) -> Arrays:
    """A record of arrays, each made `addressable`; anything other than a NumPy array stays as it is."""
    return type(arrays)(*(addressable(a) if isinstance(a, np.ndarray) else a for a in arrays))


def place(array: np.ndarray | None) -> Place:
    """The place of an addressable array of at most four axes; `NOWHERE` if there is none."""
    if array is None:
        return NOWHERE
    size = array.itemsize
    a, b, c, d = [s // size for s in array.strides] + [0] * (4 - array.ndim)
    return Place(array.ctypes.data, (a, b, c, d))


def output(array: np.ndarray, suits: Callable[[np.ndarray], bool] = is_addressable) -> Output[np.ndarray]:
    """A target for a kernel to fill: the array, or a temporary that suits the kernel and is copied to the array at
    the end."""
    return Output(array, None if suits(array) else np.empty(array.shape, array.dtype), _copy)


def outputs(arrays: Arrays) -> Outputs[Arrays]:
    """Targets for a record of arrays, as `output` makes them; None stays None."""
    return Outputs(arrays, output)


def output_as(array: np.ndarray, *shape: int) -> Output[np.ndarray]:
    """A target for a kernel to fill an array seen in another shape: a view, or if there is none, a temporary copied
    at the end."""
    other = array.reshape(shape)
    temporary = None if np.may_share_memory(other, array) else other
    return Output(other, temporary, lambda made, _: _copy(made.reshape(array.shape), array))


def _copy(source: np.ndarray, target: np.ndarray) -> None:
    target[...] = source
