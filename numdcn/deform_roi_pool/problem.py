"""Deformable RoI pooling: its arguments, its sizes, and every error of shape, type or parameter."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from numdcn._call.arguments import Argument, check_shapes
from numdcn._call.checks import number
from numdcn._call.roi import ROIS, Pooling, RoIArrays, X, align_rule, check_rois, result_shape

ARGUMENTS = (
    X,
    ROIS,
    Argument("offsets", "(R, 2, Ph, Pw)", None, optional=True, coordinates=True, field="shifts"),
    Argument("mask", "(R, 1, Ph, Pw)", None, optional=True),
)


def problem(
    arrays: RoIArrays, output_size: Any, spatial_scale: Any, sampling_ratio: Any, gamma: Any, check: Any
) -> Pooling:
    """The `Pooling` described by the arguments; raises if one is invalid."""
    rois = check_rois(ARGUMENTS, arrays, output_size, spatial_scale, check)
    expected = {"offsets": (rois.box_count, 2, *rois.bins), "mask": (rois.box_count, 1, *rois.bins)}
    check_shapes(ARGUMENTS, arrays, expected, lambda: f"R={rois.box_count}, Ph={rois.bins[0]}, Pw={rois.bins[1]}")
    rule = align_rule(sampling_ratio, half_pixel=True)
    return Pooling(rois, rule._replace(reach=number("gamma", gamma, arrays.x.dtype)))


def result_shapes(arrays: Any, options: Mapping[str, Any]) -> tuple[Any, ...]:
    """The shapes of the forward's results, unchecked: sizes may be symbols. Options are those of the call, in full."""
    return (result_shape(arrays, options["output_size"]),)
