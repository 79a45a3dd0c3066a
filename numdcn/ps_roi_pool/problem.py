"""Position-sensitive RoI pooling: its arguments, its sizes, and every error of shape, type or parameter."""

from __future__ import annotations

from typing import Any

from numdcn._call.checks import per_axis
from numdcn._call.roi import ROIS, Pooling, RoIArrays, WholePixels, X, check_rois

ARGUMENTS = (X, ROIS)


def problem(arrays: RoIArrays, output_size: Any, spatial_scale: Any, check: Any) -> Pooling:
    """The `Pooling` described by the arguments; raises if one is invalid."""
    cells = per_axis("output_size", output_size, 1)
    rois = check_rois(ARGUMENTS, arrays, output_size, spatial_scale, check, group_size=cells)
    return Pooling(rois, WholePixels(last_counts=False), cells)
