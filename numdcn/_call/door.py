"""Errors for calls of public functions that do not match the signature.

Python's own errors know nothing of other libraries, whose names and orders of arguments many callers have in mind.
"""

from __future__ import annotations

import difflib
import functools
import inspect
import sys
import types
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

from numdcn._call import hints

Function = TypeVar("Function", bound=Callable[..., Any])


def door(function: Function) -> Function:
    """The function itself; a call that does not match its signature raises an error that explains how to."""

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        try:
            return function(*args, **keywords)
        except TypeError as error:
            entered = error.__traceback__ is None or error.__traceback__.tb_next is not None
            text = "" if entered else misfit(function, args, keywords)
            text = text or _late_gradient(error, function, args)
            if not text:
                raise
            wrong: type[Exception] = TypeError
        except ValueError as error:
            text = _late_gradient(error, function, args)
            if not text:
                raise
            wrong = ValueError
        raise wrong(text)

    return call  # type: ignore[return-value]


def _places(function: Callable[..., Any]) -> tuple[str, ...]:
    """The names of the arguments that may be given by position."""
    parameters = inspect.signature(function).parameters
    return tuple(key for key, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD)


def _late_gradient(error: Exception, function: Callable[..., Any], args: tuple[Any, ...]) -> str:
    """An error's text, with the order of the arguments, if grad_y is not the first of them; else ""."""
    if type(error) not in (TypeError, ValueError):
        return ""
    order = hints.gradient_first(_places(function), args)
    return order and f"{error}{order}"


def misfit(function: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> str:
    """What is wrong with arguments that do not fit a signature; "" where Python's own words do."""
    parameters, name = inspect.signature(function).parameters, getattr(function, "__name__", "")
    for given in keywords:
        if given not in parameters:
            return f"`{given}` is not an argument of {name}{_meant(given, tuple(parameters))}"
    places = _places(function)
    if len(args) <= len(places):
        return ""
    known = dict(zip(places, args))
    arrays = [known.get(key) for key in ("x", "offsets", "w", "bias")]  # of a deformable convolution, or None
    return (
        f"{name} takes {len(places)} arguments by position ({', '.join(places)}), {len(args)} were given; pass by keyword: "
        f"{', '.join(key for key in parameters if key not in places)}{hints.order(*arrays)}"
    )


INFERRED = (  # names elsewhere, arguments of the function, what they are inferred from
    (("groups", "group"), {"w"}, "C / w.shape[1]"),
    (hints.OFFSET_GROUPS, {"offset_w"}, "offset_w.shape[0] / (2*kh*kw), or / (3*kh*kw) if modulated"),
    (hints.OFFSET_GROUPS, {"w", "offsets"}, "offsets.shape[1] / (2*kh*kw)"),
    (("kernel_size", "kernel_shape"), {"w"}, "w.shape[2:]"),
)
NEEDLESS = (  # names elsewhere, an argument of the function, why it needs none of them
    (("im2col_step",), "x", "batches of any size fit; leave it out"),
    (("pool_mode", "mode"), "sampling_ratio", "only the average exists; leave it out"),
    (("mode",), "points", "only bilinear interpolation exists; leave it out"),
    (("align_corners", "padding_mode"), "points", "points are pixels: see docs/migrating.md"),
)


def _meant(given: str, names: tuple[str, ...]) -> str:
    """The hint for an unknown argument name."""
    for others, needed, source in INFERRED:
        if given in others and needed <= set(names):
            return f": it is inferred from the shapes: {source}; leave it out"
    for unneeded, argument, reason in NEEDLESS:
        if given in unneeded and argument in names:
            return f": {reason}"
    if given in ("output_height", "output_width") and "output_size" in names:
        return ", expected `output_size=(height, width)`"
    here = hints.named_here(given, names)
    if here:
        return f", expected `{here}`"
    near = difflib.get_close_matches(given.lower(), names, 1)
    return f", expected `{near[0]}`" if near else f", expected names among {', '.join(names)}"


class _Operator(types.ModuleType):
    """The module of an operator, which is often called as if it were a function."""

    def __call__(self, *args: Any, **keywords: Any) -> NoReturn:
        name = self.__name__.rpartition(".")[2]
        raise TypeError(
            f"numdcn.{name} is a module, expected a call of numdcn.{name}_forward or numdcn.{name}_backward"
        )


def operator_module(name: str) -> None:
    """Let the module of this name say, when it is called, which functions it has."""
    sys.modules[name].__class__ = _Operator
