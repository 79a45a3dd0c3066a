"""Arrays of float16 and bfloat16 around kernels that know float32: widened on the way in, rounded on the way out.

The float32 copies are in scratch memory, in the memory order of the arrays. An axis of stride 0 is not copied out.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from numdcn._call.arguments import Arrays
from numdcn._call.arrays import is_half
from numdcn._call.options import Options
from numdcn._call.prepared import PreparedWeights
from numdcn._call.scratch import Scratch
from numdcn._cpu.halves import BFLOAT16, FLOAT16, STRETCH, ConvertCall, round_off, widen
from numdcn._cpu.threads import launch, plan_threads

PIECE = 1 << 16  # elements of an array with gaps that are gathered, or spread, at a time
CONVERSION = 16.0  # cost of an element, in multiply-adds
SINGLE = np.dtype(np.float32)
ONE = SINGLE.type(1)


class Widened:
    """The kernels of a room for arrays of a half type, of which coordinates may be float32 already."""

    __slots__ = ("room",)

    def __init__(self, room: Any) -> None:
        self.room = room  # for arrays in float32

    def forward(self, p: Any, arrays: Arrays, y: np.ndarray, options: Options) -> None:
        """Fill y, and what other results there are among the arrays."""
        with Singles(arrays, (y,)) as (seen, (target,)):
            self.room.forward(p, type(arrays)(*seen), target, options)

    def backward(self, p: Any, grad_y: np.ndarray, arrays: Arrays, grads: Arrays, options: Options) -> None:
        """Fill the gradients in `grads`."""
        with Singles((grad_y, *arrays), grads) as ((first, *seen), targets):
            self.room.backward(p, first, type(arrays)(*seen), type(grads)(*targets), options)


class Singles:
    """`with Singles(inputs, results) as (seen, targets)`: what kernels read and fill in the place of a call's arrays.
    Anything in no half type stays as it is. At the end the results are rounded."""

    def __init__(self, inputs: Any, results: Any) -> None:
        self.inputs, self.results = inputs, results
        cores = [*map(_core, filter(_is_half_array, inputs)), *filter(_is_half_array, results)]
        self.scratch = Scratch(*(array.size * SINGLE.itemsize for array in cores))

    def __enter__(self) -> tuple[list[Any], list[Any]]:
        self.addresses = iter(self.scratch.__enter__())
        seen = [self._seen(array) for array in self.inputs]
        self.targets = [self._room(array) if _is_half_array(array) else array for array in self.results]
        return seen, self.targets

    def __exit__(self, error: object, *more: object) -> None:
        if error is None:
            for array, target in zip(self.results, self.targets):
                if target is not array:
                    convert(array, target, back=True)
        self.scratch.__exit__(error, *more)

    def _seen(self, array: Any) -> Any:
        """An input in float32."""
        if type(array) is PreparedWeights:
            return widened_weights(array)
        if not _is_half_array(array):
            return array
        core = _core(array)
        single = self._room(core)
        convert(core, single, back=False)
        return np.broadcast_to(single, array.shape)

    def _room(self, array: np.ndarray) -> np.ndarray:
        """Room for the numbers of an array, in the order in which its own are in memory."""
        order = np.argsort([-abs(stride) for stride in array.strides], kind="stable")
        shape = [array.shape[axis] for axis in order]
        return self.scratch.array(next(self.addresses), shape, SINGLE).transpose(np.argsort(order))


def _is_half_array(array: Any) -> bool:
    return isinstance(array, np.ndarray) and is_half(array.dtype)


def _core(array: np.ndarray) -> np.ndarray:
    """An array without the repetitions along axes of stride 0."""
    if 0 not in array.strides:
        return array
    return array[tuple(slice(None) if stride else slice(1) for stride in array.strides)]


def convert(array: np.ndarray, single: np.ndarray, back: bool) -> None:
    """Copy the numbers of an array of a half type to a contiguous float32 array in the same order, or `back`."""
    kind = FLOAT16 if array.dtype == np.float16 else BFLOAT16
    kernel = round_off if back else widen
    bits = array.view(np.uint16)
    if not bits.size:
        return
    if _is_dense(bits, single):
        _launch(kernel, bits, single, kind)
        return
    ways: Any = (
        (["writeonly", "contig"], ["readonly", "contig"]) if back else (["readonly", "contig"], ["writeonly", "contig"])
    )
    pieces = np.nditer((bits, single), ["external_loop", "buffered"], ways, order="K", buffersize=PIECE)
    with pieces:
        for some_bits, singles in pieces:
            _launch(kernel, some_bits, singles, kind)


def _is_dense(bits: np.ndarray, single: np.ndarray) -> bool:
    """Whether the elements of two arrays follow each other without gaps, in the same order."""
    return all(
        n == 1 or 2 * stride == other for n, stride, other in zip(bits.shape, bits.strides, single.strides, strict=True)
    )


def _launch(kernel: Any, bits: np.ndarray, singles: np.ndarray, kind: int) -> None:
    count = bits.size
    threads = plan_threads(-(-count // STRETCH), CONVERSION * count)
    launch(kernel, ONE, ConvertCall(bits.ctypes.data, singles.ctypes.data, count, kind), threads)


def widened(array: np.ndarray) -> np.ndarray:
    """A new float32 array with the numbers of an array of a half type."""
    single = np.empty(array.shape, SINGLE)
    convert(np.ascontiguousarray(array), single, back=False)
    return single


def widened_weights(weights: PreparedWeights) -> PreparedWeights:
    """Prepared weights in float32: those of a half type as they were first needed."""
    if not is_half(weights.dtype):
        return weights
    if "float32" not in weights.layouts:
        single = PreparedWeights(widened(weights.array), weights.groups)
        weights.layouts.setdefault("float32", single)  # another thread may have been first
    made: PreparedWeights = weights.layouts["float32"]
    return made
