"""Every operator as an adapter needs it: read off the public functions and their tables of arguments.

An adapter has no shape rule and no arithmetic of its own, and a new operator needs nothing here but its name.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from numdcn import (
    bilinear_sample,
    conv,
    dcnv3,
    dcnv4,
    deform_conv,
    deform_conv_layer,
    deform_ps_roi_pool,
    deform_roi_pool,
    ms_deform_attn,
    ps_roi_align,
    ps_roi_pool,
    roi_align,
    roi_pool,
)
from numdcn._call.arguments import Table
from numdcn._call.checks import padding_per_axis, per_axis
from numdcn._call.levels import level_points, level_shapes

DOORS = {
    door.__name__.rpartition(".")[2]: door
    for door in (
        bilinear_sample, conv, dcnv3, dcnv4, deform_conv, deform_conv_layer, deform_ps_roi_pool, deform_roi_pool,
        ms_deform_attn, ps_roi_align, ps_roi_pool, roi_align, roi_pool,
    )
}  # fmt: skip
NAMES = tuple(DOORS)
REQUIRED = inspect.Parameter.empty
KINDS = {
    "IntPerAxis": "axes", "Padding": "padding", "LevelShapes": "shapes", "LevelPoints": "ints", "int": "int",
    "float": "float", "bool": "bool",
}  # fmt: skip
PER_CALL = {"out", "check", "allow_tf32", "return_argmax"}  # how it is computed rather than what
INTEGERS = {"argmax"}  # the residuals that are int32; others have the dtype in which the operator computes


class Option(NamedTuple):
    """An argument that is no array."""

    name: str
    # "axes": (y, x); "padding": ((top, bottom), (left, right)); "shapes": (y, x) of any number of levels; "ints": any
    # number of them, or None; "int", "float" or "bool"
    kind: str
    default: Any  # REQUIRED if there is none

    def full(self, value: Any) -> Any:
        """A value in full, whichever short form the caller wrote."""
        if self.kind == "axes":
            return per_axis(self.name, value, 1)
        if self.kind == "padding":
            before, after = padding_per_axis(value)
            return (before[0], after[0]), (before[1], after[1])
        if self.kind == "shapes":
            return level_shapes(value)
        return level_points(value) if self.kind == "ints" else value


class Operator(NamedTuple):
    """One operator: what it takes, what it returns, and how it is called."""

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    results: type[tuple[Any, ...]] | None  # the record of y and the residuals, where there are any
    gradients: type[tuple[Any, ...]]  # one field for each differentiable argument
    arrays: Table  # the arrays it takes, in order
    residuals: Table  # further results of the forward, which the backward reads
    options: tuple[Option, ...]
    result_shapes: Callable[[Any, Mapping[str, Any]], tuple[Any, ...]]  # of y, then of the residuals (None: absent)
    problem: Callable[..., Any]  # reads off and checks all sizes
    family: type[tuple[Any, ...]]  # the arrays of a call, as `problem` takes them

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the arrays."""
        return tuple(argument.name for argument in self.arrays)

    @property
    def joinable(self) -> frozenset[str]:
        """The arrays whose first axis is the batch, where calls that differ in nothing else can be joined into one along
        it. Empty for operators over boxes, which refer to images by their number."""
        if any(argument.axes.startswith("(R,") for argument in self.arrays):
            return frozenset()
        return frozenset(argument.name for argument in self.arrays if argument.axes.startswith("(N,"))

    @property
    def differentiable(self) -> tuple[str, ...]:
        """The names of the arrays that have gradients, in the order in which `run_backward` returns them."""
        return self.gradients._fields  # type: ignore[attr-defined]

    def full_options(self, given: Mapping[str, Any]) -> dict[str, Any]:
        """All options by name, in full."""
        for option in self.options:
            if option.default is REQUIRED and option.name not in given:
                raise TypeError(f"{self.name}() needs the argument `{option.name}`")
        return {option.name: option.full(given.get(option.name, option.default)) for option in self.options}

    def shapes(self, arrays: Sequence[Any], options: Mapping[str, Any]) -> tuple[Any, ...]:
        """The shapes of y and of the residuals (None where absent). Of the arrays, only `shape` is used."""
        fields = {argument.name: array for argument, array in zip(self.arrays, arrays, strict=True)}
        return self.result_shapes(types.SimpleNamespace(**fields), options)

    def check(self, arrays: Sequence[Any], options: Mapping[str, Any]) -> None:
        """Raise the errors of a call, but for those about numbers. Only shape and dtype are used, so `shaped` will do."""
        fields = {argument.field: array for argument, array in zip(self.arrays, arrays, strict=True)}
        absent: dict[str, Any] = dict.fromkeys(self.family._fields)  # type: ignore[attr-defined]
        given = {"arrays": self.family(**absent | fields), "check": False, **options}
        self.problem(**{name: given[name] for name in inspect.signature(self.problem).parameters})

    def run(self, arrays: Sequence[Any], options: Mapping[str, Any], **more: Any) -> tuple[Any, ...]:
        """y and the residuals, of arrays in the order of the table; None for one that is absent.

        `more`: further arguments of the forward, as `out`.
        """
        named = {argument.name: array for argument, array in zip(self.arrays, arrays, strict=True)}
        if self.name == "roi_pool":
            more["return_argmax"] = True
        result = self.forward(**named, **options, **more)
        return tuple(result) if self.residuals else (result,)

    def run_backward(
        self,
        grad_y: Any,
        arrays: Sequence[Any],
        residuals: Sequence[Any],
        options: Mapping[str, Any],
        wanted: Iterable[bool],
        **more: Any,
    ) -> tuple[Any, ...]:
        """The gradients, in the order of `differentiable`; None where not wanted or the array is absent.

        Of arrays that are not `saved` only shape and dtype are used, so `shaped` will do.
        """
        named = {argument.name: array for argument, array in zip(self.arrays, arrays, strict=True)}
        kept = {argument.name: array for argument, array in zip(self.residuals, residuals, strict=True)}
        wrt = [name for name, want in zip(self.differentiable, wanted, strict=True) if want and named[name] is not None]
        return tuple(self.backward(grad_y, **named, **kept, **options, wrt=wrt, **more))


def shaped(shape: Iterable[int], dtype: Any) -> np.ndarray:
    """A NumPy array of this shape that needs no memory, in the place of one whose numbers nobody reads."""
    return np.broadcast_to(np.zeros((), dtype), tuple(shape))


@functools.cache
def operator(name: str) -> Operator:
    """The operator of this name."""
    door = DOORS[name]
    problem: Any = sys.modules[f"{door.__name__}.problem"]
    forward, backward = getattr(door, f"{name}_forward"), getattr(door, f"{name}_backward")
    table: Table = problem.ARGUMENTS
    arrays = {argument.name for argument in table}
    options = tuple(
        Option(key, KINDS[parameter.annotation], parameter.default)
        for key, parameter in inspect.signature(forward).parameters.items()
        if key not in arrays | PER_CALL
    )
    return Operator(
        name, forward, backward, _record(door, "Result"), _record(door, "Gradients"), table, getattr(problem, "RESULTS", ()), options,
        problem.result_shapes, problem.problem, typing.get_type_hints(problem.problem)["arrays"],
    )  # fmt: skip


def _record(door: types.ModuleType, ending: str) -> Any:
    """The record with this ending of its name that an operator defines, or None."""
    own = (value for key, value in vars(door).items() if key.endswith(ending) and value.__module__ == door.__name__)
    return next(own, None)


def operators() -> tuple[Operator, ...]:
    """All operators."""
    return tuple(map(operator, NAMES))
