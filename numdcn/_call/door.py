"""Before every public function: what a call that does not fit its signature is told.

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
    """The function itself; a call that does not fit its signature is told how to."""

    @functools.wraps(function)
    def call(*args: Any, **keywords: Any) -> Any:
        try:
            return function(*args, **keywords)
        except TypeError as error:
            if error.__traceback__ is None or error.__traceback__.tb_next is not None:
                raise  # an error of the function, which was entered
            text = misfit(function, args, keywords)
            if not text:
                raise
        raise TypeError(text)

    return call  # type: ignore[return-value]


def misfit(function: Callable[..., Any], args: tuple[Any, ...], keywords: dict[str, Any]) -> str:
    """What is wrong with arguments that do not fit a signature; "" where Python's own words do."""
    parameters, name = inspect.signature(function).parameters, getattr(function, "__name__", "")
    for given in keywords:
        if given not in parameters:
            return f"`{given}` is not an argument of {name}{_meant(given, tuple(parameters))}"
    places = [key for key, parameter in parameters.items() if parameter.kind is parameter.POSITIONAL_OR_KEYWORD]
    if len(args) <= len(places):
        return ""
    known = dict(zip(places, args))
    arrays = [known.get(key) for key in ("x", "offsets", "w", "bias")]  # of a deformable convolution, or None
    return (
        f"{name} takes {len(places)} arguments by position ({', '.join(places)}), {len(args)} came; expected by keyword: "
        f"{', '.join(key for key in parameters if key not in places)}{hints.order(*arrays)}"
    )


OFFSET_GROUPS = ("offset_groups", "offset_group", "deformable_groups", "deform_groups", "deformable_group")
READ_OFF_SHAPES = (  # names elsewhere, arguments of the function, what they are read off
    (("groups", "group"), {"w"}, "C over the second axis of `w`"),
    (OFFSET_GROUPS, {"offset_w"}, "the outputs of `offset_w` over 2*kh*kw, or over 3*kh*kw if modulated"),
    (OFFSET_GROUPS, {"w", "offsets"}, "the channels of `offsets` over 2*kh*kw"),
    (("kernel_size", "kernel_shape"), {"w"}, "the last two axes of `w`"),
)
ELSEWHERE = {  # the names of arguments in this package, and what they are called in others
    "x": ("input", "inputs", "image", "images", "features"),
    "w": ("weight", "weights", "kernel", "filters"),
    "offsets": ("offset",),
    "trans": ("offset", "offsets"),
    "rois": ("boxes", "bboxes"),
    "points": ("grid", "coordinates"),
    "grad_y": ("grad_output", "grad_out", "grad"),
    "padding": ("pads", "pad"),
    "output_size": ("out_size", "pooled_size", "pool_size", "crop_size"),
    "spatial_scale": ("scale", "roi_scale"),
    "sampling_ratio": ("sample_num",),
    "sample_per_part": ("sampling_ratio", "samples_per_part"),
    "offset_groups": OFFSET_GROUPS,
    "return_argmax": ("return_indices",),
}


def _meant(given: str, names: tuple[str, ...]) -> str:
    """What a name that is none of a function's stands for."""
    for others, needed, source in READ_OFF_SHAPES:
        if given in others and needed <= set(names):
            return f": it is read off the shapes, as {source}; leave it out"
    if given == "im2col_step":
        return ": batches of any size fit; leave it out"
    if given in ("output_height", "output_width") and "output_size" in names:
        return ", expected `output_size=(height, width)`"
    for name, elsewhere in ELSEWHERE.items():
        if name in names and given in elsewhere:
            return f", expected `{name}`"
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
