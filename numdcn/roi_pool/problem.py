"""RoI pooling: its arguments, its sizes, and every error of shape, type or parameter."""

from __future__ import annotations

from typing import Any

import numpy as np

from numdcn._host.arrays import is_masked, received
from numdcn._host.arrays_cuda import join
from numdcn._host.checks import describe
from numdcn._host.device_array import DeviceArray
from numdcn._host.door import check_place
from numdcn._host.rois import ROIS, RoIs, X, check_rois

ARGUMENTS = (X, ROIS)

Problem = RoIs


def problem(arrays: dict[str, Any], output_size: Any, spatial_scale: Any, check: Any) -> Problem:
    """Measure and check everything once. `arrays` holds the arguments by name."""
    p = check_rois(ARGUMENTS, arrays, output_size, spatial_scale, check)
    if p.size[0] * p.size[1] >= 2**31:
        raise ValueError(f"`x` has shape {arrays['x'].shape}, expected less than 2**31 pixels: argmax is int32")
    return p


def check_argmax(argmax: Any, p: Problem, x: Any) -> Any:
    """Raise unless `argmax` is shaped and typed as the forward's and where x is; its values are checked where they are used.
    Returns it as `receive` does."""
    argmax = received(argmax)
    if not isinstance(argmax, (np.ndarray, DeviceArray)) or is_masked(argmax):
        raise TypeError(f"`argmax` is {describe(argmax)}, expected an array of shape {p.out_shape} and dtype int32")
    check_place("argmax", argmax, "x", x)
    if isinstance(argmax, DeviceArray):
        join(argmax, x)
    if argmax.dtype != np.int32:
        raise TypeError(f"`argmax` has dtype {argmax.dtype}, expected int32")
    if argmax.shape != p.out_shape:
        raise ValueError(f"`argmax` has shape {argmax.shape}, expected {p.out_shape} = (R, C, Ph, Pw)")
    return argmax
