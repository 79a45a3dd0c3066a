"""An array on a GPU as the library sees it, whichever framework made it, and how strides are read."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np


class BFloat16:
    """The dtype bfloat16, which NumPy lacks: the upper half of a float32."""

    name, itemsize = "bfloat16", 2

    def __repr__(self) -> str:
        return self.name


BFLOAT16 = BFloat16()
DTYPES: dict[str, Any] = {
    **{name: np.dtype(name) for name in ("float16", "float32", "float64", "int32", "int64")},
    "bfloat16": BFLOAT16,
}


@functools.cache
def name_of(dtype: Any) -> str:
    """The name of a dtype, cached because NumPy is slow to compute it."""
    return str(dtype.name)


class Framework:
    """What the library needs from a framework of arrays."""

    name: str

    def owns(self, value: Any) -> bool:
        """Whether `value` is one of this framework's arrays on a GPU."""
        raise NotImplementedError

    def seen(self, value: Any) -> DeviceArray:
        """An array of this framework as a `DeviceArray`."""
        raise NotImplementedError

    def seen_beside(self, first: DeviceArray, value: Any) -> DeviceArray | None:
        """The same, if it is an array of this framework on the device and the stream of another one; else perhaps None."""
        made = self.seen(value) if self.owns(value) else None
        return made if made is not None and (made.device, made.stream) == (first.device, first.stream) else None

    def empty(self, shape: tuple[int, ...], dtype: Any, device: int, stream: int) -> DeviceArray:
        """A new array, uninitialised and contiguous."""
        raise NotImplementedError

    def scratch(self, shape: tuple[int, ...], dtype: Any, device: int, stream: int) -> DeviceArray:
        """The same, for the duration of a call. torch and CuPy cache freed memory themselves, so theirs is `empty`, and
        `give_back` does nothing."""
        return self.empty(shape, dtype, device, stream)

    def give_back(self, array: DeviceArray) -> None:
        """Take back what `scratch` made, once all its use has been issued."""

    def multiplies(self, dtype: Any, tf32: bool, device: int, stream: int) -> bool:
        """Whether `multiply` is available for a type now: with float32 sums, and factors rounded to tf32 if and only if
        asked for."""
        return False

    def multiply(self, left: DeviceArray, right: DeviceArray, target: DeviceArray, tf32: bool) -> None:
        """target = left @ right, (batch, M, K) times (batch, K, N), issued on the framework's current stream. Rows or
        columns of the operands are contiguous. The target is float32 and contiguous. All are `empty` or views of it."""
        raise NotImplementedError


class DeviceArray:
    """An array on a GPU, whichever framework made it."""

    __slots__ = (
        "address", "device", "dtype", "framework", "keep", "own_stream", "owner", "shape", "stream", "strides", "writable"
    )  # fmt: skip

    def __init__(
        self,
        owner: Any,
        framework: Framework,
        device: int,
        address: int,
        dtype: Any,
        shape: tuple[int, ...],
        strides: tuple[int, ...],
        stream: int,
        writable: bool = True,
    ) -> None:
        self.owner = owner  # the caller's object
        self.framework = framework
        self.device = device  # index
        self.address = address  # of the first element
        self.dtype = dtype
        self.shape = shape
        self.strides = strides  # in elements
        self.own_stream = stream  # on which its owner uses it
        self.stream = stream  # on which this call uses it
        self.writable = writable
        self.keep: Any = None  # must live as long as this

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    @property
    def contiguous(self) -> bool:
        """Whether the elements are contiguous in C order and aligned to their size."""
        return strides_of(self.shape, self.strides) and self.address % self.dtype.itemsize == 0

    def view(self, shape: tuple[int, ...], strides: tuple[int, ...], offset: int = 0) -> DeviceArray:
        """The same memory with another shape and strides; its first element is `offset` elements after this array's."""
        args = (self.framework, self.device, self.address + offset * self.dtype.itemsize, self.dtype)
        made = DeviceArray(self.owner, *args, shape, strides, self.stream, self.writable)
        made.keep = self
        return made

    def reshaped(self, *shape: int) -> DeviceArray:
        """A contiguous array in another shape."""
        return self.view(shape, c_strides(shape))

    def slice(self, index: int, count: int) -> DeviceArray:
        """One of `count` equal slices along the first axis of a contiguous array."""
        made = self.reshaped(self.shape[0] // count, *self.shape[1:])
        made.address += index * made.size * self.dtype.itemsize
        return made

    @property
    def end(self) -> int:
        """The address just past a contiguous array."""
        return self.address + self.size * self.dtype.itemsize

    @property
    def ghost(self) -> np.ndarray:
        """A NumPy array of the same shape at the same address, never to be read: only for testing overlap."""
        size = self.dtype.itemsize
        interface = {
            "shape": self.shape,
            "strides": tuple(s * size for s in self.strides),
            "typestr": f"|V{size}",
            "data": (self.address or 1 << 12, False),
            "version": 3,
        }
        return np.asarray(_Interface(interface))


class _Interface:
    def __init__(self, interface: dict[str, Any]) -> None:
        self.__array_interface__ = interface


@functools.lru_cache(4096)
def c_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Strides of a contiguous array, in elements."""
    strides, step = [], 1
    for size in reversed(shape):
        strides.append(step)
        step *= max(size, 1)
    return tuple(reversed(strides))


@functools.lru_cache(4096)
def strides_of(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether these are the strides of a contiguous array, ignoring axes of one element."""
    if 0 in shape:
        return True
    return all(s == c or n == 1 for n, s, c in zip(shape, strides, c_strides(shape), strict=True))


def collapsed(shape: tuple[int, ...], *strides: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """(size, stride, stride, ...) of the axes of arrays of one shape, in order, with adjacent axes merged where
    possible."""
    axes: list[list[int]] = []
    for size, *steps in zip(shape, *strides, strict=True):
        if size == 1:
            continue
        if axes and all(before == size * step for before, step in zip(axes[-1][1:], steps, strict=True)):
            axes[-1] = [axes[-1][0] * size, *steps]
        else:
            axes.append([size, *steps])
    return (tuple(axis) for axis in axes)
