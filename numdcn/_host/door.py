"""What every door does around its kernels: check arrays, make room for results, gather gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np

from numdcn._host.arrays import addressable, check_array, check_out
from numdcn._host.checks import describe, wanted_names
from numdcn._host.weights import PreparedWeights

Gradients = TypeVar("Gradients", bound=tuple[Any, ...])


class Argument(NamedTuple):
    """An array argument of an operator."""

    name: str
    axes: str
    ndim: int | None  # None: known only from the other arguments
    optional: bool
    differentiable: bool
    saved: bool  # whether the backward needs it


def check_arguments(table: tuple[Argument, ...], arrays: dict[str, Any], weights: tuple[str, ...] = ()) -> None:
    """Raise unless the arrays are of the kinds that the table tells, and of one dtype; None where one is optional.

    `weights` may be prepared ones.
    """
    given = {}
    for argument in table:
        value = arrays[argument.name]
        if value is None and argument.optional:
            continue
        if not (argument.name in weights and type(value) is PreparedWeights):
            check_array(argument.name, value, argument.ndim, argument.axes)
        given[argument.name] = value
    first, dtype = next((name, value.dtype) for name, value in given.items())
    for name, value in given.items():
        if value.dtype != dtype:
            raise TypeError(f"`{name}` has dtype {value.dtype} but `{first}` has {dtype}; expected one dtype for all")


def check_grad_y(grad_y: Any, shape: tuple[int, ...], axes: str, dtype: np.dtype) -> None:
    """Raise unless `grad_y` is shaped like y, with the dtype of the other arguments."""
    check_array("grad_y", grad_y, None, axes)
    if grad_y.dtype != dtype:
        raise TypeError(f"`grad_y` has dtype {grad_y.dtype} but `x` has {dtype}; expected one dtype for all")
    if grad_y.shape != shape:
        raise ValueError(f"`grad_y` has shape {grad_y.shape}, expected {shape} = {axes}")


def check_shapes(expected: Mapping[str, tuple[Any, tuple[int, ...]]], table: tuple[Argument, ...], sizes: str) -> None:
    """Raise unless each array that is there has the shape that is expected of it; `sizes` tells what it is made of."""
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            axes = next(a.axes for a in table if a.name == name)
            raise ValueError(f"`{name}` has shape {array.shape}, expected {shape} = {axes} with {sizes}")


def room(name: str, out: Any, shape: tuple[int, ...], dtype: np.dtype, inputs: dict[str, Any]) -> np.ndarray:
    """`out`, checked, or a fresh array."""
    if out is None:
        try:
            return np.empty(shape, dtype)
        except ValueError as error:
            raise ValueError(f"`{name}` would have shape {shape}, expected an array that can exist: {error}") from None
    plain = {n: a.array if isinstance(a, PreparedWeights) else a for n, a in inputs.items() if a is not None}
    check_out(name, out, shape, dtype, plain)
    return out


def run_forward(
    forward: Callable[[Any, dict[str, Any], np.ndarray], None],
    p: Any,
    arrays: dict[str, Any],
    out: Any,
) -> np.ndarray:
    """y of shape `p.out_shape`, filled by `forward`: `out`, checked, or a fresh array."""
    y = room("out", out, p.out_shape, arrays["x"].dtype, arrays)
    if y.size == 0:
        return y
    target = addressable(y)
    with np.errstate(all="ignore"):  # NaN and infinity are results like others
        forward(p, _addressable(arrays), target)
    if target is not y:
        y[...] = target
    return y


def run_backward(
    backward: Callable[[Any, np.ndarray, dict[str, Any], dict[str, np.ndarray]], None],
    p: Any,
    grad_y: np.ndarray,
    arrays: dict[str, Any],
    kind: type[Gradients],
    wrt: str | Iterable[str] | None,
    out: Any,
    saved: dict[str, Any] | None = None,
) -> Gradients:
    """The wanted gradients as a `kind`, filled by `backward`. `kind` has a field for each differentiable argument.

    `saved`: what the forward returned for the backward, by name."""
    grads = wanted_gradients(kind, wrt, out, arrays, grad_y, saved)
    targets = {name: addressable(grad) for name, grad in grads.items()}
    if grad_y.size == 0:
        for target in targets.values():
            target[...] = 0
    elif targets:
        with np.errstate(all="ignore"):
            backward(p, addressable(grad_y), _addressable({**arrays, **(saved or {})}), targets)
    for name, target in targets.items():
        if target is not grads[name]:
            grads[name][...] = target
    return kind(**grads)


def wanted_gradients(
    kind: Any,
    wrt: str | Iterable[str] | None,
    out: Any,
    arrays: dict[str, Any],
    grad_y: np.ndarray,
    others: dict[str, Any] | None = None,
) -> dict[str, np.ndarray]:
    """Arrays for the wanted gradients: those of `out`, checked, or fresh ones. `others` may not share memory either."""
    names = kind._fields
    wanted = wanted_names(wrt, tuple(n for n in names if arrays[n] is not None), names)
    if out is None:
        out = kind()
    elif not isinstance(out, kind):
        raise TypeError(f"`out` is {describe(out)}, expected a {kind.__name__}")
    inputs: dict[str, Any] = {"grad_y": grad_y, **arrays, **(others or {})}
    grads: dict[str, np.ndarray] = {}
    for name in names:
        given = getattr(out, name)
        if name in wanted:
            grads[name] = room(f"out.{name}", given, arrays[name].shape, grad_y.dtype, inputs)
            if given is not None:
                inputs[f"out.{name}"] = given
        elif given is not None:
            raise ValueError(
                f"`out.{name}` is {describe(given)}, expected None: the gradient of {name} is not asked for"
            )
    return grads


def _addressable(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: addressable(a) if isinstance(a, np.ndarray) else a for name, a in arrays.items()}
