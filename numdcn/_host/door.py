"""What every door does around its kernels: check arrays, make room for results, gather gradients."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import numpy as np

from numdcn._host.arrays import addressable, check_array, check_out, received
from numdcn._host.arrays_cuda import follow, join
from numdcn._host.checks import describe, wanted_names
from numdcn._host.device_array import BFLOAT16, DTYPES, DeviceArray
from numdcn._host.options import Options
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
    coordinates: bool = False  # whether it may be float32 where the others are narrower


def receive(arrays: dict[str, Any]) -> dict[str, Any]:
    """The arguments by name as `received`. Raises where some are on a GPU and some are not."""
    seen = {name: received(value) for name, value in arrays.items()}
    on_gpu = [name for name, value in seen.items() if home(value) is not None]
    if on_gpu:
        first = on_gpu[0]
        for name, value in seen.items():
            check_place(name, value, first, seen[first])
        for name in on_gpu:
            _join(seen[name], home(seen[first]))
    return seen


def _join(value: Any, first: Any) -> None:
    """Have an array on a GPU used on the stream of the first one."""
    if type(value) is not PreparedWeights:
        join(value, first)
    elif value.array.stream != first.stream:  # others may be using them on theirs
        follow(first.number, first.stream, value.array.stream)


def home(value: Any) -> DeviceArray | None:
    """The array on a GPU that a value is or holds, if it is one."""
    inner = value.array if type(value) is PreparedWeights else value
    return inner if isinstance(inner, DeviceArray) else None


def check_place(name: str, value: Any, first: str, other: Any) -> None:
    """Raise if one of two arrays is on a GPU and the other is not there, or another framework's."""
    here, there = home(value), home(other)
    if value is None or (here is None and there is None):
        return
    if here is None and there is not None:
        if isinstance(value, (np.ndarray, PreparedWeights)):
            raise ValueError(
                f"`{name}` is {describe(value)} in memory, but `{first}` is {_where(there)}; expected one place for all"
            )
        return  # no array at all: told elsewhere
    if there is None:
        raise ValueError(f"`{name}` is {_where(here)}, but `{first}` is a NumPy array; expected one place for all")
    if (here.number, here.framework) != (there.number, there.framework):  # type: ignore[union-attr]
        raise ValueError(f"`{name}` is {_where(here)}, but `{first}` is {_where(there)}; expected one place for all")


def _where(array: Any) -> str:
    return f"an array of {array.framework.name} on GPU {array.number}"


def check_arguments(table: tuple[Argument, ...], arrays: dict[str, Any], weights: tuple[str, ...] = ()) -> None:
    """Raise unless the arrays are of the kinds that the table tells, and of one dtype; None where one is optional.

    `weights` may be prepared ones. Coordinates may be float32 where the other arrays are float16 or bfloat16.
    """
    given = {}
    for argument in table:
        value = arrays[argument.name]
        if value is None and argument.optional:
            continue
        if not (argument.name in weights and type(value) is PreparedWeights):
            check_array(argument.name, value, argument.ndim, argument.axes)
        given[argument] = value
    first, dtype = next((argument.name, value.dtype) for argument, value in given.items())
    for argument, value in given.items():
        if value.dtype != dtype and not (argument.coordinates and _narrow(dtype) and value.dtype == np.float32):
            raise TypeError(
                f"`{argument.name}` has dtype {value.dtype} but `{first}` has {dtype}; expected one dtype for all"
                + ", or float32" * (argument.coordinates and _narrow(dtype))
            )


def _narrow(dtype: Any) -> bool:
    return dtype.itemsize == 2


def check_grad_y(grad_y: Any, shape: tuple[int, ...], axes: str, x: Any) -> Any:
    """Raise unless `grad_y` is shaped like y, with the dtype and in the place of x. Returns it as `receive` does."""
    grad_y = received(grad_y)
    check_array("grad_y", grad_y, None, axes)
    check_place("grad_y", grad_y, "x", x)
    if home(grad_y) is not None:
        join(grad_y, x)
    if grad_y.dtype != x.dtype:
        raise TypeError(f"`grad_y` has dtype {grad_y.dtype} but `x` has {x.dtype}; expected one dtype for all")
    if grad_y.shape != shape:
        raise ValueError(f"`grad_y` has shape {grad_y.shape}, expected {shape} = {axes}")
    return grad_y


def check_shapes(expected: Mapping[str, tuple[Any, tuple[int, ...]]], table: tuple[Argument, ...], sizes: str) -> None:
    """Raise unless each array that is there has the shape that is expected of it; `sizes` tells what it is made of."""
    for name, (array, shape) in expected.items():
        if array is not None and array.shape != shape:
            axes = next(a.axes for a in table if a.name == name)
            raise ValueError(f"`{name}` has shape {array.shape}, expected {shape} = {axes} with {sizes}")


def room(name: str, out: Any, shape: tuple[int, ...], dtype: Any, inputs: dict[str, Any]) -> Any:
    """`out` as `received`, checked, or a fresh array, where the inputs are."""
    like = next((a for a in map(home, inputs.values()) if a is not None), None)
    if out is None:
        try:
            if like is not None:
                return like.framework.empty(shape, dtype, like.number, like.stream)
            return np.empty(shape, dtype)
        except ValueError as error:
            raise ValueError(f"`{name}` would have shape {shape}, expected an array that can exist: {error}") from None
    out = received(out)
    if like is not None or home(out) is not None:
        first = next(n for n, a in inputs.items() if a is not None)
        check_place(name, out, first, inputs[first])
    plain = {n: a.array if isinstance(a, PreparedWeights) else a for n, a in inputs.items() if a is not None}
    check_out(name, out, shape, dtype, plain)
    if like is not None:
        join(out, like)
    return out


def given_back(array: Any, out: Any = None) -> Any:
    """What the caller gets for a result: `out`, if that was given for it. Its own stream waits for what was done here."""
    if not isinstance(array, DeviceArray):
        return array if out is None else out
    if array.own_stream != array.stream:
        follow(array.number, array.own_stream, array.stream)
    return array.owner


@functools.cache
def _twin(operator: str, hardware: str) -> Any:
    """The module that computes an operator there. That of the GPU is imported once an array on a GPU comes."""
    return importlib.import_module(f"{operator}.{hardware}")


def run_forward(
    operator: str,
    p: Any,
    arrays: dict[str, Any],
    out: Any,
    options: Options = Options(),  # noqa: B008 - a constant
    more: Mapping[str, Any] | None = None,
) -> Any:
    """y of shape `p.out_shape`, filled by the `forward` of an operator's twin: `out`, checked, or a fresh array.

    `more`: other results to be filled, by name; the twin finds them among the arrays."""
    y = room("out", out, p.out_shape, arrays["x"].dtype, arrays)
    if y.size == 0:
        return given_back(y, out)
    everything = {**arrays, **(more or {})}
    if isinstance(y, DeviceArray):
        _on_gpu(y, lambda target: _twin(operator, "cuda").forward(p, everything, target, options))
        return given_back(y)
    target = addressable(y)
    with np.errstate(all="ignore"):  # NaN and infinity are results like others
        _twin(operator, "cpu").forward(p, _addressable(everything), target, options)
    if target is not y:
        y[...] = target
    return given_back(y, out)


def run_backward(
    operator: str,
    p: Any,
    grad_y: Any,
    arrays: dict[str, Any],
    kind: type[Gradients],
    wrt: str | Iterable[str] | None,
    out: Any,
    options: Options = Options(),  # noqa: B008 - a constant
    saved: dict[str, Any] | None = None,
) -> Gradients:
    """The wanted gradients as a `kind`, filled by the `backward` of an operator's twin. `kind` has a field for each
    differentiable argument. `saved`: what the forward returned for the backward, by name."""
    grads = wanted_gradients(kind, wrt, out, arrays, grad_y, saved)
    everything = {**arrays, **(saved or {})}
    if isinstance(grad_y, DeviceArray):
        _gradients_on_gpu(operator, p, grad_y, everything, grads, options)
        return gradients_back(kind, grads, out)
    targets = {name: addressable(grad) for name, grad in grads.items()}
    if grad_y.size == 0:
        for target in targets.values():
            target[...] = 0
    elif targets:
        with np.errstate(all="ignore"):
            _twin(operator, "cpu").backward(p, addressable(grad_y), _addressable(everything), targets, options)
    for name, target in targets.items():
        if target is not grads[name]:
            grads[name][...] = target
    return gradients_back(kind, grads, out)


def gradients_back(kind: type[Gradients], grads: dict[str, Any], out: Gradients | None) -> Gradients:
    """What the caller gets for gradients, those of `out` where they were given."""
    return kind(**{name: given_back(grad, getattr(out, name, None)) for name, grad in grads.items()})


def _on_gpu(y: DeviceArray, fill: Any) -> None:
    """Fill y, or contiguous memory that is then copied there."""
    from numdcn._host.work_cuda import Work

    if y.contiguous:
        fill(y)
        return
    with Work(y) as work:
        target = work.empty(y.shape, y.dtype)
        fill(target)
        work.copy(target, y)


def _gradients_on_gpu(
    operator: str, p: Any, grad_y: DeviceArray, arrays: dict[str, Any], grads: dict[str, DeviceArray], options: Options
) -> None:
    from numdcn._host.work_cuda import Work

    with Work(grad_y) as work:
        wanted = {name: grad for name, grad in grads.items() if grad.size}
        if not wanted:
            return
        if grad_y.size == 0:
            for grad in wanted.values():
                work.clear(grad)
            return
        targets = {n: g if g.contiguous else work.empty(g.shape, g.dtype) for n, g in wanted.items()}
        _twin(operator, "cuda").backward(p, grad_y, arrays, targets, options)
        for name, target in targets.items():
            if target is not wanted[name]:
                work.copy(target, wanted[name])


def wanted_gradients(
    kind: Any,
    wrt: str | Iterable[str] | None,
    out: Any,
    arrays: dict[str, Any],
    grad_y: Any,
    others: dict[str, Any] | None = None,
) -> dict[str, Any]:
    """Arrays for the wanted gradients: those of `out`, checked, or fresh ones. `others` may not share memory either."""
    names = kind._fields
    wanted = wanted_names(wrt, tuple(n for n in names if arrays[n] is not None), names)
    if out is None:
        out = kind()
    elif not isinstance(out, kind):
        raise TypeError(f"`out` is {describe(out)}, expected a {kind.__name__}")
    inputs: dict[str, Any] = {"grad_y": grad_y, **arrays, **(others or {})}
    grads: dict[str, Any] = {}
    for name in names:
        given = getattr(out, name)
        if name in wanted:
            grads[name] = room(f"out.{name}", given, arrays[name].shape, arrays[name].dtype, inputs)
            if given is not None:
                inputs[f"out.{name}"] = grads[name]
        elif given is not None:
            raise ValueError(
                f"`out.{name}` is {describe(given)}, expected None: the gradient of {name} is not asked for"
            )
    return grads


def new_like(shape: tuple[int, ...], dtype: Any, array: Any) -> Any:
    """An unfilled array, where another one is."""
    here = home(array)
    if here is None:
        return np.empty(shape, dtype)
    kind = dtype if dtype is BFLOAT16 else DTYPES[np.dtype(dtype).name]
    return here.framework.empty(shape, kind, here.number, here.stream)


def _addressable(arrays: dict[str, Any]) -> dict[str, Any]:
    return {name: addressable(a) if isinstance(a, np.ndarray) else a for name, a in arrays.items()}
