"""Position-sensitive RoI align: its arguments, its sizes, and every error of shape, type or parameter."""

from __future__ import annotations

from typing import Any

from numdcn._call.checks import per_axis
from numdcn._call.roi import ROIS, Pooling, RoIArrays, X, align_rule, check_rois

ARGUMENTS = (X, ROIS)


def problem(arrays: RoIArrays, output_size: Any, spatial_scale: Any, sampling_ratio: Any, check: Any) -> Pooling:
    """The `Pooling` described by the arguments; raises if one is invalid."""
    cells = per_axis("output_size", output_size, 1)
    rois = check_rois(ARGUMENTS, arrays, output_size, spatial_scale, check, group_size=cells)
    return Pooling(rois, align_rule(sampling_ratio, half_pixel=True), cells)
