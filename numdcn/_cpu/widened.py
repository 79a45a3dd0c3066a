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
from numdcn._cpu.halves import (
    STRETCH,
    ConvertCall,
    round_to_bfloat16,
    round_to_float16,
    widen_bfloat16,
    widen_float16,
)
from numdcn._cpu.threads import launch, plan_threads

PIECE = 1 << 16  # elements of an array with gaps that are gathered, or spread, at a time
CONVERSION = 16.0  # cost of an element, in multiply-adds
SINGLE = np.dtype(np.float32)
ONE = SINGLE.type(1)
_KERNELS = {  # by whether the half type is float16, and whether it is the result
    (True, False): widen_float16,
    (True, True): round_to_float16,
    (False, False): widen_bfloat16,
    (False, True): round_to_bfloat16,
}


class Widened:
    """The kernels of a room for arrays of a half type, of which coordinates may be float32 already."""

    __slots__ = ("room",)

    def __init__(self, room: Any) -> None:
        self.room = room  # for arrays in float32

    def forward(self, p: Any, arrays: Arrays, y: np.ndarray, options: Options) -> None:
        """Fill y, and what other results there are among the arrays."""
        computes = getattr(self.room, "computes_in_half", None)
        if computes is not None and computes(p, y.dtype):
            with Singles(arrays._replace(x=None, w=None), ()) as (seen, _):  # type: ignore[attr-defined]
                given = type(arrays)(*seen)._replace(x=arrays.x, w=arrays.w)  # type: ignore[attr-defined]
                self.room.forward(p, given, y, options)
            return
        others = self._without_images(p, arrays)
        with Singles(others, (y,)) as (seen, (target,)):
            self.room.forward(p, _with_images(type(arrays)(*seen), arrays), target, options)

    def backward(self, p: Any, grad_y: np.ndarray, arrays: Arrays, grads: Arrays, options: Options) -> None:
        """Fill the gradients in `grads`."""
        others, other_grads = self._without_images(p, arrays), self._without_images(p, grads)
        with Singles((grad_y, *others), other_grads) as ((first, *seen), targets):
            read, filled = _with_images(type(arrays)(*seen), arrays), _with_images(type(grads)(*targets), grads)
            self.room.backward(p, first, read, filled, options)

    def _without_images(self, p: Any, arrays: Arrays) -> Arrays:
        """The arrays without those that the kernels convert themselves, where they copy them anyway."""
        takes = getattr(self.room, "takes_half_images", None)
        return arrays._replace(x=None) if takes is not None and takes(p) else arrays  # type: ignore[attr-defined]


def _with_images(arrays: Arrays, given: Arrays) -> Arrays:
    """The arrays with the images of `given`, if they have none."""
    if getattr(arrays, "x", given) is None:
        return arrays._replace(x=given.x)  # type: ignore[attr-defined]
    return arrays


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
        return single if core is array else np.broadcast_to(single, array.shape)

    def _room(self, array: np.ndarray) -> np.ndarray:
        """Room for the numbers of an array, in the order in which its own are in memory."""
        if array.flags.c_contiguous:  # the usual case
            return self.scratch.array(next(self.addresses), array.shape, SINGLE)
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
    if not array.size:
        return
    bits = array.view(np.uint16)
    source, target = (single, bits) if back else (bits, single)
    kernel = _KERNELS[bool(array.dtype == np.float16), back]
    if _is_dense(bits, single):
        _launch(kernel, source, target)
        return
    ways: Any = (["readonly", "contig"], ["writeonly", "contig"])
    pieces = np.nditer((source, target), ["external_loop", "buffered"], ways, order="K", buffersize=PIECE)
    with pieces:
        for piece, room in pieces:
            _launch(kernel, piece, room)


def _is_dense(bits: np.ndarray, single: np.ndarray) -> bool:
    """Whether the elements of two arrays follow each other without gaps, in the same order."""
    if bits.flags.c_contiguous and single.flags.c_contiguous:  # the usual case
        return True
    return all(
        n == 1 or 2 * stride == other for n, stride, other in zip(bits.shape, bits.strides, single.strides, strict=True)
    )


def _launch(kernel: Any, source: np.ndarray, target: np.ndarray) -> None:
    count = source.size
    threads = plan_threads(-(-count // STRETCH), CONVERSION * count)
    launch(kernel, ONE, ConvertCall(source.ctypes.data, target.ctypes.data, count), threads)


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
