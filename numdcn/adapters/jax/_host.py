"""What runs when a compiled JAX program reaches an operator: a call as text, and its arrays as NumPy sees them."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from numdcn.adapters._operators import Operator, operator, shaped

Order = tuple[int, ...] | None  # of axes; None: as they are


def axes_of(made: Operator) -> dict[str, str]:
    """The axes of each array by name, as tables write them. Those of y and its gradient begin as those of x, or of the boxes."""
    table = {argument.name: argument.axes for argument in (*made.arrays, *made.residuals)}
    if not made.arrays[0].axes.startswith("(N, C"):  # channels last by nature, whatever the layout
        y = "(N, ..."
    else:
        y = "(R, C" if any(axes.startswith("(R,") for axes in table.values()) else "(N, C"
    return {"y": y, "grad_y": y, **table}


def from_nhwc(axes: str, ndim: int) -> Order:
    """The order that makes the axes of numdcn from those of channels-last arrays; weights are HWIO there."""
    if axes.endswith(" C"):  # y
        return (0, ndim - 1, *range(1, ndim - 1))
    if ndim != 4 or "..." in axes or axes.startswith(("(N, H", "(N, S", "(N, Q")):
        return None
    return (0, 3, 1, 2) if axes.startswith(("(N,", "(R,")) else (3, 2, 0, 1)


def to_nhwc(axes: str, ndim: int) -> Order:
    """The way back."""
    order = from_nhwc(axes, ndim)
    return order and tuple(order.index(axis) for axis in range(ndim))


class Call(NamedTuple):
    """A call of an operator in one direction."""

    operator: str
    options: Mapping[str, Any]
    layout: str  # "NCHW" or "NHWC"
    axes: int  # how many the first input has without those of vmap
    inputs: Sequence[str]  # names of arrays; grad_y comes first in a backward
    outputs: Sequence[str]  # y, then residuals; or the names of gradients

    def text(self) -> str:
        """The call as text."""
        return json.dumps(self._asdict())


@functools.lru_cache(4096)
def _call(text: str) -> tuple[Call, Operator, dict[str, str]]:
    call = Call(**json.loads(text))
    made = operator(call.operator)
    return call._replace(options=made.full_options(call.options)), made, axes_of(made)


def run(text: str, inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]) -> None:
    """Run a call. Arrays may have further axes in front, those of vmap, of length 1 where they are the same for all."""
    call, made, axes = _call(text)
    mapped = inputs[0].ndim - call.axes
    if not mapped:
        return _run_one(call, made, axes, inputs, outputs)
    along = axes["y"][:2]  # the first axis of y, which all of vmap's can be folded into
    lengths = outputs[0].shape[:mapped]
    if all(axes[name].startswith(along) for name in call.outputs) and all(
        array.shape[:mapped] == (lengths if axes[name].startswith(along) else (1,) * mapped)
        for name, array in zip(call.inputs, inputs)
    ):
        return _run_one(call, made, axes, *([_fold(array, mapped) for array in arrays] for arrays in (inputs, outputs)))
    for index in np.ndindex(lengths):
        _run_one(call, made, axes, [_at(array, index) for array in inputs], [array[index] for array in outputs])
    return None


def _fold(array: np.ndarray, axes: int) -> np.ndarray:
    """The array with its first axes, and the next, as one."""
    return array.reshape(math.prod(array.shape[: axes + 1]), *array.shape[axes + 1 :])


def _at(array: np.ndarray, index: tuple[int, ...]) -> np.ndarray:
    return array[tuple(i if n > 1 else 0 for i, n in zip(index, array.shape))]


def _run_one(
    call: Call, made: Operator, axes: Mapping[str, str], inputs: Sequence[np.ndarray], outputs: Sequence[np.ndarray]
) -> None:
    """Run a call without axes of vmap."""
    given, targets = dict(zip(call.inputs, inputs)), dict(zip(call.outputs, outputs))
    if call.layout == "NHWC":
        for named in (given, targets):
            for name, array in named.items():
                order = from_nhwc(axes[name], array.ndim)
                named[name] = array if order is None else array.transpose(order)
    grad_y = given.get("grad_y")
    if grad_y is None:
        results = made.run([given.get(argument.name) for argument in made.arrays], call.options, out=targets["y"])
        for argument, result in zip(made.residuals, results[1:]):
            if argument.name in targets:
                targets[argument.name][...] = result
        return
    for argument in made.arrays:
        if argument.name in targets and argument.name not in given:  # its shape is all that is used
            given[argument.name] = shaped(targets[argument.name].shape, grad_y.dtype)
    arrays = [given.get(argument.name) for argument in made.arrays]
    residuals = [given.get(argument.name) for argument in made.residuals]
    wanted = [name in targets for name in made.differentiable]
    made.run_backward(grad_y, arrays, residuals, call.options, wanted, out=made.gradients(**targets))
