"""RoI align: its arguments, its sizes, and every error of shape, type or parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from numdcn._call.checks import flag
from numdcn._call.roi import ROIS, SHAPE_OF_X, Pooling, RoIArrays, align_rule, check_rois, result_shape

ARGUMENTS = (SHAPE_OF_X, ROIS)


def problem(
    arrays: RoIArrays, output_size: Any, spatial_scale: Any, sampling_ratio: Any, aligned: Any, check: Any
) -> Pooling:
    """The `Pooling` described by the arguments; raises if one is invalid.

    Boxes are shifted by half a pixel if aligned, otherwise made at least one pixel long.
    """
    rois = check_rois(ARGUMENTS, arrays, output_size, spatial_scale, check)
    half_pixel = flag("aligned", aligned)
    return Pooling(rois, align_rule(sampling_ratio, half_pixel, least=-np.inf if half_pixel else 1.0))


def result_shapes(arrays: Any, options: Mapping[str, Any]) -> tuple[Any, ...]:
    """The shapes of the forward's results, unchecked: sizes may be symbols. Options are those of the call, in full."""
    return (result_shape(arrays, options["output_size"]),)
