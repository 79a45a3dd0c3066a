"""Deformable position-sensitive RoI pooling: its arguments, its sizes, and every error of shape, type or parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numdcn._call.arguments import Argument
from numdcn._call.checks import integer, number
from numdcn._call.roi import ROIS, SAMPLES_LIMIT, Pooling, RoIArrays, RoIs, X, check_rois, psroi_rule, result_shape

TRANS = Argument("trans", "(R, 2*classes, part_h, part_w)", 4, optional=True, coordinates=True, field="shifts")
ARGUMENTS = (X, ROIS, TRANS)


def problem(
    arrays: RoIArrays,
    output_size: Any,
    group_size: Any,
    sample_per_part: Any,
    trans_std: Any,
    spatial_scale: Any,
    check: Any,
) -> Pooling:
    """The `Pooling` described by the arguments; raises if one is invalid."""
    groups = integer("group_size", group_size, 1)
    rois = check_rois(ARGUMENTS, arrays, output_size, spatial_scale, check, group_size=(groups, groups))
    if arrays.shifts is not None:
        _check_trans(rois, arrays.shifts)
    samples = integer("sample_per_part", sample_per_part, 1, SAMPLES_LIMIT)
    return Pooling(rois, psroi_rule(samples, number("trans_std", trans_std, arrays.x.dtype)), (groups, groups))


def _check_trans(rois: RoIs, trans: Any) -> None:
    """Raise unless trans has a row per box, pairs of channels whose number divides that of y's channels, and parts."""
    if len(trans) != rois.box_count:
        raise ValueError(f"`trans` has shape {trans.shape}, expected ({rois.box_count}, ...): as many rows as `rois`")
    classes = trans.shape[1] // 2
    if trans.shape[1] < 2 or trans.shape[1] % 2 or rois.channels % classes:
        raise ValueError(
            f"`trans` has {trans.shape[1]} channels (shape {trans.shape}), expected 2*classes, with classes a divisor of the "
            f"{rois.channels} channels of the result"
        )
    if min(trans.shape[2:]) < 1:
        raise ValueError(f"`trans` has shape {trans.shape}, expected at least one part along each axis")


def result_shapes(arrays: Any, options: Mapping[str, Any]) -> tuple[Any, ...]:
    """The shapes of the forward's results, unchecked: sizes may be symbols. Options are those of the call, in full."""
    return (result_shape(arrays, options["output_size"], cells=options["group_size"] ** 2),)
