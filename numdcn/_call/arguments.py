"""Array arguments: the table that describes them, where they are, and every error of kind, dtype and shape."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np

from numdcn._call import hints
from numdcn._call.arrays import check_array, received
from numdcn._call.checks import describe
from numdcn._call.device_array import DeviceArray
from numdcn._call.frameworks import follow, join
from numdcn._call.prepared import PreparedWeights

Arrays = TypeVar("Arrays", bound=tuple[Any, ...])  # the arrays of a call of a family, a NamedTuple; None if not given


class Argument:
    """An array argument of an operator."""

    __slots__ = ("axes", "coordinates", "field", "name", "ndim", "of", "optional", "saved")

    def __init__(
        self,
        name: str,
        axes: str,
        ndim: int | None,  # None: follows from the other arguments
        optional: bool = False,
        coordinates: bool = False,  # may be float32 where the others are narrower
        field: str = "",  # in the family's arrays; "": the name
        saved: bool = True,  # whether the backward reads its numbers, rather than its shape alone
    ) -> None:
        self.name, self.axes, self.ndim = name, axes, ndim
        self.optional, self.coordinates, self.saved = optional, coordinates, saved
        self.field = field or name
        self.of = operator.attrgetter(self.field)  # gets it from a family's arrays


Table = tuple[Argument, ...]  # the arguments of an operator, in order


def named(table: Table, arrays: Any) -> dict[str, Any]:
    """The arguments by their names in the call."""
    return {argument.name: argument.of(arrays) for argument in table}


def receive(table: Table, arrays: Arrays) -> Arrays:
    """The arguments as `received`. Raises if only some of them are on a GPU."""
    if all(type(value) is np.ndarray or value is None for value in arrays):  # the usual case
        views: list[Any] = [value if value is None else value.view() for value in arrays]
        return type(arrays)(*views)
    beside = _all_beside(table, arrays)
    if beside is not None:
        return beside
    seen = arrays._replace(**{a.field: received(a.of(arrays), a.name) for a in table})  # type: ignore[attr-defined]
    on_gpu = {name: value for name, value in named(table, seen).items() if device_array_of(value) is not None}
    if on_gpu:
        first = next(iter(on_gpu))
        for name, value in named(table, seen).items():
            check_place(name, value, first, on_gpu[first])
        for value in on_gpu.values():
            _join(value, device_array_of(on_gpu[first]))
    return seen


def _all_beside(table: Table, arrays: Arrays) -> Arrays | None:
    """The arguments, if all are on one GPU, of one framework and on one stream, as they usually are; else None."""
    seen: list[Any] = []
    first: DeviceArray | None = None
    for field, value in zip(arrays._fields, arrays, strict=True):  # type: ignore[attr-defined]
        if value is None:
            seen.append(None)
            continue
        if type(value) is PreparedWeights:
            inner = value.array
            if first is None or type(inner) is not DeviceArray or _place(inner) != _place(first):
                return None
            seen.append(value)
            continue
        made: Any
        if first is None:
            made = received(value, next(a.name for a in table if a.field == field))
            if type(made) is not DeviceArray:
                return None
            first = made
        else:
            try:
                made = first.framework.seen_beside(first, value)
            except (AttributeError, KeyError, TypeError, ValueError):  # for which the slower way has words
                return None
            if made is None:
                return None
        seen.append(made)
    return type(arrays)(*seen) if first is not None else None


def _place(array: DeviceArray) -> tuple[Any, ...]:
    return array.framework, array.device, array.stream


def _join(value: Any, first: Any) -> None:
    """Move the use of an array on a GPU to the stream of the first one."""
    if type(value) is not PreparedWeights:
        join(value, first)
    elif value.array.stream != first.stream:  # other calls may be using them on their own stream
        follow(first.device, first.stream, value.array.stream)


def device_array_of(value: Any) -> DeviceArray | None:
    """The GPU array that a value is or holds; None if there is none."""
    inner = value.array if type(value) is PreparedWeights else value
    return inner if isinstance(inner, DeviceArray) else None


def check_place(name: str, value: Any, first: str, other: Any) -> None:
    """Raise if exactly one of two arrays is on a GPU, or they differ in device or framework."""
    here, there = device_array_of(value), device_array_of(other)
    if value is None or (here is None and there is None):
        return
    place = "expected all arrays in one place"
    if here is None and there is not None:
        if isinstance(value, (np.ndarray, PreparedWeights)):
            hint = hints.to_gpu(name, value, there.framework)
            raise ValueError(
                f"`{name}` is {describe(value)} in host memory, but `{first}` is {_where(there)}; {place}{hint}"
            )
        return  # not an array: `check_array` raises
    if there is None:
        hint = hints.to_memory(name, value, here.framework)  # type: ignore[union-attr]
        raise ValueError(f"`{name}` is {_where(here)}, but `{first}` is a NumPy array; {place}{hint}")
    if (here.device, here.framework) != (there.device, there.framework):  # type: ignore[union-attr]
        raise ValueError(f"`{name}` is {_where(here)}, but `{first}` is {_where(there)}; {place}")


def _where(array: Any) -> str:
    return f"an array of {array.framework.name} on GPU {array.device}"


def check_arguments(table: Table, arrays: Any, weights: tuple[str, ...] = ()) -> None:
    """Raise unless the arrays are of the kinds in the table and share one dtype; optional ones may be None.

    `weights` may be prepared. Coordinates may be float32 where the other arrays are float16 or bfloat16.
    """
    given = []
    for argument in table:
        value = argument.of(arrays)
        if value is None and argument.optional:
            continue
        if not (argument.name in weights and type(value) is PreparedWeights):
            check_array(argument.name, value, argument.ndim, argument.axes)
        given.append((argument, value))
    first, dtype = given[0][0].name, given[0][1].dtype
    for argument, value in given:
        if value.dtype != dtype and not (argument.coordinates and _narrow(dtype) and value.dtype == np.float32):
            finer = argument.coordinates and _narrow(dtype)
            raise TypeError(
                f"`{argument.name}` has dtype {value.dtype} but `{first}` has {dtype}; expected one dtype for all arrays"
                + ", or float32 here" * finer
                + hints.cast(argument.name, value, np.float32 if finer else dtype)
            )


def _narrow(dtype: Any) -> bool:
    return dtype.itemsize == 2


def check_grad_y(
    grad_y: Any, shape: tuple[int, ...], axes: str, x: Any, name: str = "x", hint: Callable[[Any], str] | None = None
) -> Any:
    """Raise unless `grad_y` has the shape of y and the dtype and place of x, which may have another name. Returns it
    as `receive` does. `hint(grad_y)`: what to add to the error for its shape."""
    grad_y = received(grad_y, "grad_y")
    check_array("grad_y", grad_y, None, axes)
    check_place("grad_y", grad_y, name, x)
    if device_array_of(grad_y) is not None:
        join(grad_y, x)
    if grad_y.dtype != x.dtype:
        raise TypeError(
            f"`grad_y` has dtype {grad_y.dtype} but `{name}` has {x.dtype}; expected one dtype for all arrays"
            + hints.cast("grad_y", grad_y, x.dtype)
        )
    if grad_y.shape != shape:
        way_out = "" if hint is None else hint(grad_y)
        raise ValueError(f"`grad_y` has shape {grad_y.shape}, expected {shape} = {axes}{way_out}")
    return grad_y


def check_shapes(table: Table, arrays: Any, expected: Mapping[str, tuple[int, ...]], sizes: Callable[[], str]) -> None:
    """Raise unless each array that was given has its expected shape; `sizes()` describes where that comes from."""
    for argument in table:
        array, shape = argument.of(arrays), expected.get(argument.name)
        if array is not None and shape is not None and array.shape != shape:
            raise ValueError(
                f"`{argument.name}` has shape {array.shape}, expected {shape} = {argument.axes} with {sizes()}"
            )
