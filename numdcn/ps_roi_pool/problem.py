"""Position-sensitive RoI pooling: its arguments, its sizes, and every error of shape, type or parameter."""

from __future__ import annotations

from typing import Any

from numdcn._host.checks import per_axis
from numdcn._host.rois import ROIS, RoIs, X, check_rois

ARGUMENTS = (X, ROIS)

Problem = RoIs


def problem(arrays: dict[str, Any], output_size: Any, spatial_scale: Any, check: Any) -> Problem:
    """Measure and check everything once. `arrays` holds the arguments by name."""
    cells = per_axis("output_size", output_size, 1)
    return check_rois(ARGUMENTS, arrays, output_size, spatial_scale, check, group_size=cells)
