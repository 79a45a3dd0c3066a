"""Results of a call: arrays that the caller gave or that are made for it, filled, and given back."""

from __future__ import annotations

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
    """`with Output(array, temporary, copy) as target`: what a kernel is to fill. The target is `temporary`, which `copy`
    copies to the array in the end; the array itself, if that is None."""

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


def output_array(name: str, out: Any, shape: tuple[int, ...], dtype: Any, inputs: dict[str, Any]) -> Any:
    """`out` as `received`, checked, or a fresh array, where the inputs are."""
    like = next((a for a in map(device_array_of, inputs.values()) if a is not None), None)
    if out is None:
        try:
            if like is not None:
                return like.framework.empty(shape, dtype, like.device, like.stream)
            return np.empty(shape, dtype)
        except ValueError as error:
            raise ValueError(f"`{name}` would have shape {shape}, expected one that NumPy can make: {error}") from None
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
    """Arrays for the wanted gradients by name: those of `out`, checked, or fresh ones. `kind` has a field for each
    argument that has a gradient."""
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
    """What the caller gets for a result: `out`, if that was given for it. Its own stream waits for what was done here."""
    if not isinstance(array, DeviceArray):
        return array if out is None else out
    if array.own_stream != array.stream:
        follow(array.device, array.own_stream, array.stream)
    return array.owner


def gradients_back(kind: type[Gradients], grads: dict[str, Any], out: Gradients | None) -> Gradients:
    """What the caller gets for gradients, those of `out` where they were given."""
    return kind(**{name: given_back(grad, getattr(out, name, None)) for name, grad in grads.items()})


def new_like(shape: tuple[int, ...], dtype: Any, array: Any) -> Any:
    """An unfilled array, where another one is."""
    here = device_array_of(array)
    if here is None:
        return np.empty(shape, dtype)
    kind = dtype if dtype is BFLOAT16 else DTYPES[np.dtype(dtype).name]
    return here.framework.empty(shape, kind, here.device, here.stream)
