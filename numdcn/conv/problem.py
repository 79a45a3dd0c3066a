"""Convolution: its arguments, its sizes, and every error of shape, type or parameter."""

from __future__ import annotations

from typing import Any

from numdcn._call.arguments import Argument, check_arguments, check_shapes
from numdcn._call.convolution import ConvArrays, Convolution, convolution

ARGUMENTS = (
    Argument("x", "(N, C, H, W)", 4),
    Argument("w", "(C_out, C/groups, kh, kw)", 4),
    Argument("bias", "(C_out,)", None, optional=True),
)


def problem(arrays: ConvArrays, stride: Any, padding: Any, dilation: Any) -> Convolution:
    """Read off and check all sizes."""
    check_arguments(ARGUMENTS, arrays, weights=("w",))
    made = convolution(arrays, stride, padding, dilation)
    check_shapes(ARGUMENTS, arrays, {"bias": (made.out_channels,)}, made.describe_shapes)
    return made
