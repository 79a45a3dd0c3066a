"""Result arrays, given by the caller or allocated for it."""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable
from typing import Any, Generic, TypeVar

import numpy as np

from numdcn._call.arguments import Arrays, Table, check_place, device_array_of, named
from numdcn._call.arrays import Array, check_out, received
from numdcn._call.checks import describe, wanted_names
from numdcn._call.device_array import BFLOAT16, DTYPES, DeviceArray
from numdcn._call.frameworks import follow, join
from numdcn._call.prepared import PreparedWeights

Gradients = TypeVar("Gradients", bound=tuple[Any, ...])


class Output(Generic[Array]):
    """`with Output(array, temporary, copy) as target`: a target for a kernel to fill. It is `temporary`, copied to the
    array at the end, or the array itself if that is None."""

    __slots__ = ("array", "copy", "temporary")

    def __init__(self, array: Array, temporary: Array | None, copy: Callable[[Array, Array], None]) -> None:
        self.array, self.temporary, self.copy = array, temporary, copy

    def __enter__(self) -> Array:
        return self.array if self.temporary is None else self.temporary

    def __exit__(self, error: object, *more: object) -> None:
        if error is None and self.temporary is not None:
            self.copy(self.temporary, self.array)


class Outputs(Generic[Arrays]):
    """The targets for a record of arrays, made by `output` for each; None stays None."""

    __slots__ = ("arrays", "output", "outputs")

    def __init__(self, arrays: Arrays, output: Callable[[Any], Output[Any]]) -> None:
        self.arrays, self.output = arrays, output

    def __enter__(self) -> Arrays:
        self.outputs = [None if array is None else self.output(array) for array in self.arrays]
        targets: list[Any] = [None if output is None else output.__enter__() for output in self.outputs]
        return type(self.arrays)(*targets)

    def __exit__(self, *error: object) -> None:
        for output in self.outputs:
            if output is not None:
                output.__exit__(*error)


class _AlignedResults(threading.local):
    """Within `with aligned_results`, new results of this thread begin at a multiple of 64 bytes."""

    depth = 0

    def __enter__(self) -> None:
        self.depth += 1

    def __exit__(self, *error: object) -> None:
        self.depth -= 1


aligned_results = _AlignedResults()


def _empty_aligned(shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    memory = np.empty(math.prod(shape) * dtype.itemsize + 64, np.uint8)
    return np.ndarray(shape, dtype, memory, -memory.ctypes.data % 64)


def new_output(name: str, shape: tuple[int, ...], dtype: Any, first: Any) -> Any:
    """A new array for a result, in the place of the first input."""
    like = device_array_of(first)
    try:
        if like is not None:
            return like.framework.empty(shape, dtype, like.device, like.stream)
        return _empty_aligned(shape, dtype) if aligned_results.depth else np.empty(shape, dtype)
    except ValueError as error:
        raise ValueError(f"`{name}` would have shape {shape}, expected one that NumPy can make: {error}") from None


def output_array(name: str, out: Any, shape: tuple[int, ...], dtype: Any, inputs: dict[str, Any]) -> Any:
    """`out` as `received`, checked; or a new array. All inputs live where the first does, which is given."""
    first = next(iter(inputs.values()))
    if out is None:
        return new_output(name, shape, dtype, first)
    like = device_array_of(first)
    out = received(out, name)
    if like is not None or device_array_of(out) is not None:
        first = next(n for n, a in inputs.items() if a is not None)
        check_place(name, out, first, inputs[first])
    plain = {n: a.array if isinstance(a, PreparedWeights) else a for n, a in inputs.items() if a is not None}
    check_out(name, out, shape, dtype, plain)
    if like is not None:
        join(out, like)
    return out


def wanted_gradients(
    table: Table, arrays: Any, grad_y: Any, kind: type[Gradients], wrt: str | Iterable[str] | None, out: Any
) -> dict[str, Any]:
    """Arrays for the requested gradients by name: those of `out`, checked, or new ones. `kind` has a field for each
    differentiable argument."""
    given, names = named(table, arrays), kind._fields  # type: ignore[attr-defined]
    wanted = wanted_names(wrt, tuple(n for n in names if given[n] is not None), names)
    if out is None:
        out = kind()
    elif not isinstance(out, kind):
        raise TypeError(f"`out` is {describe(out)}, expected a {kind.__name__}")
    inputs: dict[str, Any] = {"grad_y": grad_y, **given}
    grads: dict[str, Any] = {}
    for name in names:
        target = getattr(out, name)
        if name in wanted:
            grads[name] = output_array(f"out.{name}", target, given[name].shape, given[name].dtype, inputs)
            if target is not None:
                inputs[f"out.{name}"] = grads[name]
        elif target is not None:
            raise ValueError(
                f"`out.{name}` is {describe(target)}, expected None: `wrt` does not ask for the gradient of {name}"
            )
    return grads


def given_back(array: Any, out: Any = None) -> Any:
    """The result as the caller gets it: `out` if it was given. The result's own stream waits for the work done here."""
    if not isinstance(array, DeviceArray):
        return array if out is None else out
    if array.own_stream != array.stream:
        follow(array.device, array.own_stream, array.stream)
    return array.owner


def gradients_back(kind: type[Gradients], grads: dict[str, Any], out: Gradients | None) -> Gradients:
    """The gradients as the caller gets them, those of `out` where given."""
    return kind(**{name: given_back(grad, getattr(out, name, None)) for name, grad in grads.items()})


def new_like(shape: tuple[int, ...], dtype: Any, array: Any) -> Any:
    """An uninitialised array in the place of another one."""
    here = device_array_of(array)
    if here is None:
        return np.empty(shape, dtype)
    kind = dtype if dtype is BFLOAT16 else DTYPES[np.dtype(dtype).name]
    return here.framework.empty(shape, kind, here.device, here.stream)
