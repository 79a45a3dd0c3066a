"""Every operator as an adapter needs it: read off the public functions and their tables of arguments.

An adapter has no shape rule and no arithmetic of its own, and a new operator needs no line here but its name.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import types
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from numdcn._call.arguments import Table
from numdcn._call.checks import padding_per_axis, per_axis

NAMES = (
    "bilinear_sample", "conv", "deform_conv", "deform_conv_layer", "deform_ps_roi_pool", "deform_roi_pool", "ps_roi_align",
    "ps_roi_pool", "roi_align", "roi_pool",
)  # fmt: skip
REQUIRED = inspect.Parameter.empty
KINDS = {"IntPerAxis": "axes", "Padding": "padding", "int": "int", "float": "float", "bool": "bool"}
PER_CALL = {"out", "check", "allow_tf32", "return_argmax"}  # how it is computed rather than what
INTEGERS = {"argmax"}  # the residuals that are int32; others have the dtype in which the operator computes


class Option(NamedTuple):
    """An argument that is no array."""

    name: str
    kind: str  # "axes": (y, x); "padding": ((top, bottom), (left, right)); "int", "float" or "bool"
    default: Any  # REQUIRED if there is none

    def full(self, value: Any) -> Any:
        """A value in full, whichever short form the caller wrote."""
        if self.kind == "axes":
            return per_axis(self.name, value, 1)
        if self.kind == "padding":
            before, after = padding_per_axis(value)
            return (before[0], after[0]), (before[1], after[1])
        return value


class Operator(NamedTuple):
    """One operator: what it takes, what it returns, and how it is called."""

    name: str
    forward: Callable[..., Any]
    backward: Callable[..., Any]
    gradients: type[tuple[Any, ...]]  # one field for each differentiable argument
    arrays: Table  # the arrays it takes, in order
    residuals: Table  # further results of the forward, which the backward reads
    options: tuple[Option, ...]
    result_shapes: Callable[[Any, Mapping[str, Any]], tuple[Any, ...]]  # of y, then of the residuals (None: absent)
    problem: Callable[..., Any]  # checks a record of arrays and the options
    record: Callable[..., Any]  # makes that record

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
        """Raise what a call would raise for the shapes and dtypes of these NumPy arrays, or for its options.

        Of the arrays only shape and dtype matter, so `shaped` will do.
        """
        record = self.record(**{argument.field: array for argument, array in zip(self.arrays, arrays, strict=True)})
        parameters = tuple(inspect.signature(self.problem).parameters)[1:]
        self.problem(record, **{name: options.get(name, False) for name in parameters})  # False: `check`

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
    door, problem = (importlib.import_module(f"numdcn.{name}{part}") for part in ("", ".problem"))
    forward, backward = getattr(door, f"{name}_forward"), getattr(door, f"{name}_backward")
    table: Table = problem.ARGUMENTS
    arrays = {argument.name for argument in table}
    options = tuple(
        Option(key, KINDS[parameter.annotation], parameter.default)
        for key, parameter in inspect.signature(forward).parameters.items()
        if key not in arrays | PER_CALL
    )
    kind = next(
        value for key, value in vars(door).items() if key.endswith("Gradients") and value.__module__ == door.__name__
    )
    record = getattr(problem, inspect.signature(problem.problem).parameters["arrays"].annotation)
    return Operator(
        *(name, forward, backward, kind, table, getattr(problem, "RESULTS", ()), options),
        *(problem.result_shapes, problem.problem, record),
    )


def operators() -> tuple[Operator, ...]:
    """All operators."""
    return tuple(map(operator, NAMES))
