"""Convolution: its arguments, its sizes, and every error of shape, type or parameter."""

from __future__ import annotations

from typing import Any

from numdcn._host.convolution import Sizes, convolution
from numdcn._host.door import Argument, check_arguments, check_shapes

ARGUMENTS = (
    Argument("x", "(N, C, H, W)", 4, False, True, True),
    Argument("w", "(C_out, C/groups, kh, kw)", 4, False, True, True),
    Argument("bias", "(C_out,)", None, True, True, False),
)

Problem = Sizes


def problem(arrays: dict[str, Any], stride: Any, padding: Any, dilation: Any) -> Problem:
    """Measure and check everything once. `arrays` holds the arguments by name, None where an optional one is absent."""
    check_arguments(ARGUMENTS, arrays, weights=("w",))
    x, w, bias = (arrays[a.name] for a in ARGUMENTS)
    made = convolution(x, w, bias, stride, padding, dilation)
    check_shapes({"bias": (bias, (made.out_channels,))}, ARGUMENTS, f"C_out={made.out_channels}")
    return made
