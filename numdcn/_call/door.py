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

import numpy as np

from numdcn._call import hints
from numdcn._call.host_frameworks import Loan, host_framework_of, mixture

Function = TypeVar("Function", bound=Callable[..., Any])
UNTRACED = "numdcn.adapters.torch has the operators for torch.compile"  # what torch says where it needs one graph


def door(function: Function) -> Function:
    """The function itself, for arrays of any framework; its errors explain how to call it."""

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        if "torch._dynamo" in sys.modules:  # torch.compile must not trace into it: no tracer can follow addresses
            return (_untraced or _make_untraced())(function, args, keywords)
        return _call(function, args, keywords)

    # what torch.compile looks at before it traces a function
    call._torchdynamo_disable, call._torchdynamo_disable_msg = True, UNTRACED  # type: ignore[attr-defined]
    return call  # type: ignore[return-value]


_untraced: Any = None  # `_call`, into which torch.compile does not trace; once it is needed


def _make_untraced() -> Any:
    global _untraced
    _untraced = sys.modules["torch._dynamo"].disable(_call, reason=UNTRACED)
    return _untraced


def _call(function: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    """The result of a public function."""
    framework = None
    try:
        first = args[0] if args else _first(keywords)
        if type(first) is np.ndarray or (framework := host_framework_of(first)) is None:
            return function(*args, **keywords)
        usual = framework.usual(args, keywords)
        if usual is None:
            return Loan(framework, function).call(args, keywords)
        result = function(*usual[0], **usual[1])
        return framework.back(result) if type(result) is np.ndarray else Loan(framework, function).back(result)
    except TypeError as error:
        text = "" if _entered(function, error) else misfit(function, args, keywords)
        text = text or _late_gradient(error, function, args)
        wrong: type[Exception] = TypeError
        if framework is None:
            text = text or mixture(function, args, keywords)
        else:
            text = framework.advice(text or str(error)) if type(error) is TypeError else ""
        if not text:
            raise
    except ValueError as error:
        text = _late_gradient(error, function, args)
        wrong = ValueError
        if framework is not None:
            text = framework.advice(text or str(error)) if type(error) is ValueError else ""
        if not text:
            raise
    raise wrong(text)


def _first(keywords: dict[str, Any]) -> Any:
    """The array that comes first, of arguments that are all given by keyword."""
    return next((keywords[name] for name in ("grad_y", "x", "value", "w") if name in keywords), None)


def _entered(function: Callable[..., Any], error: BaseException) -> bool:
    """Whether an error came from within a function, rather than from a call that does not match its signature."""
    trace = error.__traceback__
    while trace is not None:
        if trace.tb_frame.f_code is function.__code__:
            return True
        trace = trace.tb_next
    return False


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
        + "; starts of levels and im2col_step are not needed"
        * ("spatial_shapes" in places)
    )


INFERRED = (  # names elsewhere, arguments of the function, what they are inferred from
    (("groups", "group"), {"w"}, "C / w.shape[1]"),
    (hints.OFFSET_GROUPS, {"offset_w"}, "offset_w.shape[0] / (2*kh*kw), or / (3*kh*kw) if modulated"),
    (hints.OFFSET_GROUPS, {"w", "offsets"}, "offsets.shape[1] / (2*kh*kw)"),
    (("kernel_size", "kernel_shape"), {"w"}, "w.shape[2:]"),
    (("groups", "group"), {"mask", "offset_scale"}, "mask.shape[-1] / number of points"),
    (("group_channels",), {"offset_scale"}, "x.shape[-1] / groups"),
)
NEEDLESS = (  # names elsewhere, an argument of the function, why it needs none of them
    (("im2col_step",), "x", "batches of any size fit; leave it out"),
    (("im2col_step",), "value", "batches of any size fit; leave it out"),
    (("value_level_start_index", "level_start_index"), "spatial_shapes", "levels follow one another; leave it out"),
    (("softmax",), "offset_mask", "none is applied; leave it out"),
    (("pool_mode", "mode"), "sampling_ratio", "only the average exists; leave it out"),
    (("mode",), "points", "only bilinear interpolation exists; leave it out"),
    (("align_corners", "padding_mode"), "points", "points are pixels: see docs/migrating.md"),
)

PER_AXIS = {"kernel": "kernel_size", "stride": "stride", "pad": "padding", "dilation": "dilation"}


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
    axis = next((name for part, name in PER_AXIS.items() if given in (f"{part}_h", f"{part}_w")), "")
    if axis in names:
        return f", expected `{axis}=({axis}_y, {axis}_x)`"
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
