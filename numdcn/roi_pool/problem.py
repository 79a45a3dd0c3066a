"""RoI pooling: its arguments, its sizes, and every error of shape, type or parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from numdcn._call import hints
from numdcn._call.arguments import Argument, check_place
from numdcn._call.arrays import is_masked, received
from numdcn._call.checks import describe
from numdcn._call.device_array import DeviceArray
from numdcn._call.frameworks import join
from numdcn._call.roi import ROIS, SHAPE_OF_X, Pooling, RoIArrays, WholePixels, check_rois, result_shape

ARGUMENTS = (SHAPE_OF_X, ROIS)
RESULTS = (Argument("argmax", "(R, C, Ph, Pw)", None, optional=True),)  # given to the backward


def problem(arrays: RoIArrays, output_size: Any, spatial_scale: Any, check: Any) -> Pooling:
    """The `Pooling` described by the arguments; raises if one is invalid."""
    rois = check_rois(ARGUMENTS, arrays, output_size, spatial_scale, check)
    if rois.size[0] * rois.size[1] >= 2**31:
        raise ValueError(f"`x` has shape {arrays.x.shape}, expected fewer than 2**31 pixels, as argmax is int32")
    return Pooling(rois, WholePixels(last_counts=True))


def check_argmax(argmax: Any, p: Pooling, x: Any) -> Any:
    """Raise unless `argmax` has the shape and dtype of the forward's, in the place of x; its values are checked as they
    are used. Returns it as `receive` does."""
    argmax = received(argmax, "argmax")
    if not isinstance(argmax, (np.ndarray, DeviceArray)) or is_masked(argmax):
        raise TypeError(
            f"`argmax` is {describe(argmax)}, expected an array of shape {p.out_shape} and dtype int32"
            + hints.to_array("argmax", argmax, "int32")
        )
    check_place("argmax", argmax, "x", x)
    if isinstance(argmax, DeviceArray):
        join(argmax, x)
    if argmax.dtype != np.int32:
        raise TypeError(f"`argmax` has dtype {argmax.dtype}, expected int32{hints.cast('argmax', argmax, np.int32)}")
    if argmax.shape != p.out_shape:
        raise ValueError(f"`argmax` has shape {argmax.shape}, expected {p.out_shape} = (R, C, Ph, Pw)")
    return argmax


def result_shapes(arrays: Any, options: Mapping[str, Any]) -> tuple[Any, ...]:
    """The shapes of the forward's results, unchecked: sizes may be symbols. Options are those of the call, in full."""
    y = result_shape(arrays, options["output_size"])
    return y, y  # and argmax
