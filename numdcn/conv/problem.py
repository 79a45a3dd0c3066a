"""Convolution: its arguments, its sizes, and every error of shape, type or parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numdcn._call.arguments import Argument, check_arguments, check_shapes
from numdcn._call.convolution import ConvArrays, Convolution, convolution, result_shape

ARGUMENTS = (
    Argument("x", "(N, C, H, W)", 4),
    Argument("w", "(C_out, C/groups, kh, kw)", 4),
    Argument("bias", "(C_out,)", None, optional=True, saved=False),
)


def problem(arrays: ConvArrays, stride: Any, padding: Any, dilation: Any) -> Convolution:
    """Read off and check all sizes."""
    check_arguments(ARGUMENTS, arrays, weights=("w",))
    made = convolution(arrays, stride, padding, dilation)
    check_shapes(ARGUMENTS, arrays, {"bias": (made.out_channels,)}, made.describe_shapes)
    return made


def result_shapes(arrays: Any, options: Mapping[str, Any]) -> tuple[Any, ...]:
    """The shapes of the forward's results, unchecked: sizes may be symbols. Options are those of the call, in full."""
    return (result_shape(arrays, options["stride"], options["padding"], options["dilation"]),)
