"""RoI align: its arguments, its sizes, and every error of shape, type or parameter."""

from __future__ import annotations

from typing import Any, NamedTuple

from numdcn._host.checks import flag, integer
from numdcn._host.rois import MOST_SAMPLES, ROIS, RoIs, X, check_rois

ARGUMENTS = (X, ROIS)


class Problem(NamedTuple):
    """The sizes and parameters of one RoI align."""

    rois: RoIs
    sampling_ratio: int  # samples of a bin along an axis; not above 0: about one a pixel
    aligned: bool

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """The shape of y."""
        return self.rois.out_shape


def problem(
    arrays: dict[str, Any], output_size: Any, spatial_scale: Any, sampling_ratio: Any, aligned: Any, check: Any
) -> Problem:
    """Measure and check everything once. `arrays` holds the arguments by name."""
    rois = check_rois(ARGUMENTS, arrays, output_size, spatial_scale, check)
    return Problem(rois, integer("sampling_ratio", sampling_ratio, -(2**31), MOST_SAMPLES), flag("aligned", aligned))
