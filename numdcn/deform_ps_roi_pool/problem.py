"""Deformable position-sensitive RoI pooling: its arguments, its sizes, and every error of shape, type or parameter."""

from __future__ import annotations

from typing import Any, NamedTuple

from numdcn._host.checks import integer, number
from numdcn._host.door import Argument
from numdcn._host.rois import MOST_SAMPLES, ROIS, RoIs, X, check_rois

ARGUMENTS = (X, ROIS, Argument("trans", "(R, 2*classes, part_h, part_w)", 4, True, True, True, coordinates=True))


class Problem(NamedTuple):
    """The sizes and parameters of one deformable position-sensitive RoI pooling."""

    rois: RoIs
    group_size: tuple[int, int]
    sample_per_part: int  # samples of a bin along an axis
    trans_std: float  # of a box's size, what an offset of 1 shifts a bin by

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """The shape of y."""
        return self.rois.out_shape


def problem(
    arrays: dict[str, Any],
    output_size: Any,
    group_size: Any,
    sample_per_part: Any,
    trans_std: Any,
    spatial_scale: Any,
    check: Any,
) -> Problem:
    """Measure and check everything once. `arrays` holds the arguments by name, None where an optional one is absent."""
    groups = integer("group_size", group_size, 1)
    rois = check_rois(ARGUMENTS, arrays, output_size, spatial_scale, check, group_size=(groups, groups))
    if arrays["trans"] is not None:
        _check_trans(rois, arrays["trans"])
    samples = integer("sample_per_part", sample_per_part, 1, MOST_SAMPLES)
    return Problem(rois, (groups, groups), samples, number("trans_std", trans_std, arrays["x"].dtype))


def _check_trans(rois: RoIs, trans: Any) -> None:
    """Raise unless trans has a row for each box, pairs of channels that divide those of y, and parts."""
    if len(trans) != rois.rois:
        raise ValueError(f"`trans` has shape {trans.shape}, expected ({rois.rois}, ...): as many rows as `rois`")
    classes = trans.shape[1] // 2
    if trans.shape[1] < 2 or trans.shape[1] % 2 or rois.channels % classes:
        raise ValueError(
            f"`trans` has {trans.shape[1]} channels (shape {trans.shape}), expected 2*classes, with classes a divisor of the "
            f"{rois.channels} channels of the result"
        )
    if min(trans.shape[2:]) < 1:
        raise ValueError(f"`trans` has shape {trans.shape}, expected at least one part along each axis")
