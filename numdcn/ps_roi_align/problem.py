"""Position-sensitive RoI align: its arguments, its sizes, and every error of shape, type or parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numdcn._call.checks import per_axis
from numdcn._call.roi import ROIS, SHAPE_OF_X, Pooling, RoIArrays, align_rule, check_rois, result_shape

ARGUMENTS = (SHAPE_OF_X, ROIS)


def problem(arrays: RoIArrays, output_size: Any, spatial_scale: Any, sampling_ratio: Any, check: Any) -> Pooling:
    """The `Pooling` described by the arguments; raises if one is invalid."""
    cells = per_axis("output_size", output_size, 1)
    rois = check_rois(ARGUMENTS, arrays, output_size, spatial_scale, check, group_size=cells)
    return Pooling(rois, align_rule(sampling_ratio, half_pixel=True), cells)


def result_shapes(arrays: Any, options: Mapping[str, Any]) -> tuple[Any, ...]:
    """The shapes of the forward's results, unchecked: sizes may be symbols. Options are those of the call, in full."""
    bins = options["output_size"]
    return (result_shape(arrays, bins, cells=bins[0] * bins[1]),)
