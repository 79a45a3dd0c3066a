"""Boxes on the CPU: the positions of their bins, in the form the kernels take."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from numdcn._call.roi import FAR, Pooling, RoIs, SamplingRule, WholePixels
from numdcn._cpu.roi.bins import WHOLE_PIXELS
from numdcn._formulas.bilinear import ALIGN, PSROI


class Boxes(NamedTuple):
    """Boxes in the form the kernels take; see `bins.Grid`."""

    rule: int
    image_index: np.ndarray  # (R,) int64
    geometry: np.ndarray  # (R, 2, 5), or (R, bins of y and of x, 2) int64


def _corners(p: RoIs) -> np.ndarray:
    """Scaled corners (R, 2, 2): first and second, y and x, clipped to `FAR`."""
    return np.clip(p.boxes[:, 1:] * p.boxes.dtype.type(p.scale), -FAR, FAR).reshape(-1, 2, 2)[:, :, ::-1]


def _round(values: np.ndarray) -> np.ndarray:
    """Round to the nearest integer, halves away from zero."""
    whole = np.trunc(values)
    return whole + np.copysign(np.abs(values - whole) >= 0.5, values).astype(values.dtype)


def image_indices(p: RoIs) -> np.ndarray:
    """The image of each box."""
    return p.boxes[:, 0].astype(np.int64)


def _geometry(start: np.ndarray, size: np.ndarray, p: RoIs, samples: np.ndarray, reach: float) -> np.ndarray:
    """`Grid.geometry` of boxes that start at `start` (R, 2) with size `size` and `samples` per bin."""
    dtype = start.dtype
    bins = size / np.array(p.bins, dtype)
    step = bins / np.maximum(samples, 1)
    most = np.finfo(dtype).max  # keeps it finite, so that an offset of 0 shifts nothing
    far = np.clip(dtype.type(reach) * size, -most, most)
    columns = (start, bins, step, np.broadcast_to(samples, size.shape), far)
    return np.ascontiguousarray(np.stack(columns, axis=-1), dtype)


def boxes_of(p: Pooling) -> Boxes:
    """The boxes of a pooling, according to its rule."""
    if isinstance(p.rule, WholePixels):
        return _whole_boxes(p.rois, p.rule.last_counts)
    return _align_boxes(p.rois, p.rule) if p.rule.border == ALIGN else _psroi_boxes(p.rois, p.rule)


def _align_boxes(p: RoIs, rule: SamplingRule) -> Boxes:
    """Boxes of the RoI align family."""
    dtype = p.boxes.dtype
    corners = _corners(p) - dtype.type(rule.half)
    start, size = corners[:, 0], corners[:, 1] - corners[:, 0]
    if rule.least > -np.inf:
        size = np.maximum(size, dtype.type(rule.least))
    samples = np.full(size.shape, rule.samples, dtype)
    if rule.samples <= 0:
        samples = np.maximum(np.ceil(size / np.array(p.bins, dtype)), dtype.type(0))
    return Boxes(ALIGN, image_indices(p), _geometry(start, size, p, samples, rule.reach))


def _psroi_boxes(p: RoIs, rule: SamplingRule) -> Boxes:
    """Boxes of deformable position-sensitive pooling: whole pixels in the boxes' own coordinates, both ends counted."""
    dtype = p.boxes.dtype
    first, last = _round(p.boxes[:, 1:]).reshape(-1, 2, 2).swapaxes(0, 1)[:, :, ::-1]
    scale, half = dtype.type(p.scale), dtype.type(rule.half)
    start = np.clip(first * scale, -FAR, FAR) - half
    size = np.maximum(np.clip((last + 1) * scale, -FAR, FAR) - half - start, dtype.type(rule.least))
    return Boxes(PSROI, image_indices(p), _geometry(start, size, p, np.array(rule.samples, dtype), rule.reach))


def _whole_boxes(p: RoIs, last_counts: bool) -> Boxes:
    """Boxes of whole pixels: rounded corners, the second included if `last_counts`; bins of whole pixels, which may
    overlap, clipped to the image."""
    corners = _round(_corners(p)).astype(np.int64)
    start, size = corners[:, 0], np.maximum(corners[:, 1] - corners[:, 0] + last_counts, 1)
    ranges = []
    for axis in (0, 1):
        bins, steps = p.bins[axis], np.arange(p.bins[axis])
        first = steps * size[:, axis, None] // bins + start[:, axis, None]
        end = -(-(steps + 1) * size[:, axis, None] // bins) + start[:, axis, None]
        ranges.append(np.clip(np.stack((first, end), axis=-1), 0, p.size[axis]))
    return Boxes(WHOLE_PIXELS, image_indices(p), np.ascontiguousarray(np.concatenate(ranges, axis=1)))
