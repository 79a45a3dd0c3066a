"""NumPy arrays as kernels see them: where their elements are."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from numdcn._call.arguments import Arrays
from numdcn._call.arrays import is_half
from numdcn._call.results import Output, Outputs
from numdcn._cpu.parameters import NOWHERE, Place


class Outline(NamedTuple):
    """An array without its numbers."""

    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...]  # in bytes
    address: int  # of the first element, or what stands for it

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def itemsize(self) -> int:
        return self.dtype.itemsize


def _address_in_object(array: np.ndarray) -> int:
    """The address of an array's first element, which follows the head of the object. (`array.ctypes` makes two objects.)"""
    return ctypes.c_ssize_t.from_address(id(array) + object.__basicsize__).value


def _address_by_ctypes(array: np.ndarray) -> int:
    return array.ctypes.data


_probe = np.empty(1)
address_of = _address_in_object if _address_in_object(_probe) == _probe.ctypes.data else _address_by_ctypes


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


def place(array: np.ndarray | Outline | None) -> Place:
    """The place of an addressable array of at most four axes; `NOWHERE` if there is none."""
    if array is None:
        return NOWHERE
    size = array.itemsize
    a, b, c, d = [s // size for s in array.strides] + [0] * (4 - array.ndim)
    return Place(address_of(array) if isinstance(array, np.ndarray) else array.address, (a, b, c, d))


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
