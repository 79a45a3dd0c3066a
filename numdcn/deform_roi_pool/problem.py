"""Deformable RoI pooling: its arguments, its sizes, and every error of shape, type or parameter."""

from __future__ import annotations

from typing import Any, NamedTuple

from numdcn._host.checks import integer, number
from numdcn._host.door import Argument, check_shapes
from numdcn._host.rois import MOST_SAMPLES, ROIS, RoIs, X, check_rois

ARGUMENTS = (
    X,
    ROIS,
    Argument("offsets", "(R, 2, Ph, Pw)", None, True, True, True, coordinates=True),
    Argument("mask", "(R, 1, Ph, Pw)", None, True, True, True),
)


class Problem(NamedTuple):
    """The sizes and parameters of one deformable RoI pooling."""

    rois: RoIs
    sampling_ratio: int  # samples of a bin along an axis; not above 0: about one a pixel
    gamma: float  # of a box's size, what an offset of 1 shifts a bin by

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """The shape of y."""
        return self.rois.out_shape


def problem(
    arrays: dict[str, Any], output_size: Any, spatial_scale: Any, sampling_ratio: Any, gamma: Any, check: Any
) -> Problem:
    """Measure and check everything once. `arrays` holds the arguments by name, None where an optional one is absent."""
    rois = check_rois(ARGUMENTS, arrays, output_size, spatial_scale, check)
    expected = {
        "offsets": (arrays["offsets"], (rois.rois, 2, *rois.bins)),
        "mask": (arrays["mask"], (rois.rois, 1, *rois.bins)),
    }
    check_shapes(expected, ARGUMENTS, f"R={rois.rois}, Ph={rois.bins[0]}, Pw={rois.bins[1]}")
    return Problem(
        rois,
        integer("sampling_ratio", sampling_ratio, -(2**31), MOST_SAMPLES),
        number("gamma", gamma, arrays["x"].dtype),
    )
