"""Bilinear sampling: its arguments, its sizes, and every error of shape or type."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from numdcn._call.arguments import Argument, check_arguments
from numdcn._call.checks import check_countable
from numdcn._call.points import PointArrays, Sampling

ARGUMENTS = (
    Argument("x", "(N, C, H, W)", 4),
    Argument("points", "(N, ..., 2)", None, coordinates=True),
)


def problem(arrays: PointArrays) -> Sampling:
    """Read off and check all sizes."""
    check_arguments(ARGUMENTS, arrays)
    x, points = arrays.x, arrays.points
    if points.ndim < 2 or points.shape[-1] != 2:
        raise ValueError(f"`points` has shape {points.shape}, expected (N, ..., 2): y and x last")
    if points.shape[0] != x.shape[0]:
        raise ValueError(
            f"`points` has shape {points.shape}, expected ({x.shape[0]}, ..., 2): as many images as `x` with shape {x.shape}"
        )
    if min(x.shape[1:]) < 1:
        raise ValueError(f"`x` has shape {x.shape}, expected no empty axis except the batch")
    check_countable("x", max(x.shape[2:]), x.dtype)
    between = points.shape[1:-1]
    batch, channels, *size = x.shape
    return Sampling(batch, channels, (size[0], size[1]), math.prod(between), (batch, channels, *between))


def result_shapes(arrays: Any, options: Mapping[str, Any]) -> tuple[Any, ...]:
    """The shapes of the forward's results, unchecked: sizes may be symbols. Options are those of the call, in full."""
    return ((*arrays.x.shape[:2], *arrays.points.shape[1:-1]),)
