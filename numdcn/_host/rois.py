"""Regions of interest: their checks, and the geometry of their bins, for all operators that pool over boxes."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numdcn._host.arrays import host_copy
from numdcn._host.checks import countable, flag, number, per_axis
from numdcn._host.door import Argument, check_arguments
from numdcn._kernels.bins_cpu import RULE_P, RULE_R, WHOLE_PIXELS

X = Argument("x", "(N, C, H, W)", 4, False, True, True)
ROIS = Argument("rois", "(R, 5): batch index, x1, y1, x2, y2", 2, False, False, True, coordinates=True)
FAR = 2.0**30  # pixels; corners are clipped to it
MOST_SAMPLES = 2**16  # that may be asked for along an axis of a bin


class RoIs(NamedTuple):
    """The sizes of one pooling over boxes. Tuples have an entry for each axis, y first."""

    batch: int
    in_channels: int
    channels: int  # of the result
    size: tuple[int, int]  # of an image
    rois: int
    bins: tuple[int, int]  # of a box
    scale: float  # from the boxes' coordinates to pixels
    boxes: Any  # (R, 5): the copy that was checked, as the caller's array may change meanwhile; None on a GPU

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """The shape of y."""
        return self.rois, self.channels, *self.bins


class Boxes(NamedTuple):
    """Boxes as the kernels take them; see `bins_cpu.Grid`."""

    rule: int
    images: np.ndarray  # (R,) int64
    geometry: np.ndarray  # (R, 2, 5), or (R, bins of y and of x, 2) int64


def check_rois(
    table: tuple[Argument, ...],
    arrays: dict[str, Any],
    output_size: Any,
    spatial_scale: Any,
    check: Any,
    group_size: Any = None,
) -> RoIs:
    """Measure and check the arguments that all operators over boxes have. `group_size`: of a position-sensitive one, whose
    result has C / group_size**2 channels; a pair, each below which bins share channels. `check`: whether to wait for a GPU to
    look at the boxes."""
    check_arguments(table, arrays)
    x, rois = arrays["x"], arrays["rois"]
    if min(x.shape[1:]) < 1:
        raise ValueError(f"`x` has shape {x.shape}, expected no empty axis but the batch")
    countable("x", max(x.shape[2:]), x.dtype)
    if rois.shape[1] != 5:
        raise ValueError(f"`rois` has shape {rois.shape}, expected (R, 5): batch index, x1, y1, x2, y2")
    bins = per_axis("output_size", output_size, 1)
    scale = number("spatial_scale", spatial_scale, x.dtype, positive=True)
    boxes = np.array(rois, order="C") if isinstance(rois, np.ndarray) else None
    if flag("check", check) or boxes is not None:
        _check_boxes(host_copy(rois) if boxes is None else boxes, x.shape[0])
    channels = x.shape[1]
    if group_size is not None:
        cells = group_size[0] * group_size[1]
        if channels % cells:
            raise ValueError(
                f"`x` has C = {channels} (shape {x.shape}), expected a multiple of {cells} = "
                f"{group_size[0]}*{group_size[1]}: channels of its own for each cell of the boxes"
            )
        channels //= cells
    return RoIs(x.shape[0], x.shape[1], channels, x.shape[2:], len(rois), bins, scale, boxes)


def _check_boxes(rois: np.ndarray, batch: int) -> None:
    """Raise at the first row that is no box of one of the images."""
    numbers = rois[:, 0]
    good = (numbers >= 0) & (numbers < batch) & (numbers == np.floor(numbers))
    good &= np.isfinite(rois[:, 1:]).all(axis=1)
    if good.all():
        return
    row = int(np.argmin(good))
    n, *corners = (float(v) for v in rois[row])
    if not np.isfinite(corners).all():
        raise ValueError(f"`rois` has corners {corners} in row {row}, expected finite numbers")
    some = f"a whole number from 0 to {batch - 1}" if batch else "no boxes, as `x` has no images"
    raise ValueError(f"`rois` has batch index {n} in row {row}, expected {some}")


def _corners(p: RoIs) -> np.ndarray:
    """Scaled corners (R, 2, 2): first and second, y and x, no farther than `FAR`."""
    return np.clip(p.boxes[:, 1:] * p.boxes.dtype.type(p.scale), -FAR, FAR).reshape(-1, 2, 2)[:, :, ::-1]


def _round(values: np.ndarray) -> np.ndarray:
    """To the nearest integer, halves away from zero."""
    whole = np.trunc(values)
    return whole + np.copysign(np.abs(values - whole) >= 0.5, values).astype(values.dtype)


def image_numbers(p: RoIs) -> np.ndarray:
    """The image of each box."""
    return p.boxes[:, 0].astype(np.int64)


def _geometry(start: np.ndarray, size: np.ndarray, p: RoIs, samples: np.ndarray, reach: float) -> np.ndarray:
    """`Grid.geometry` of boxes that begin at `start` (R, 2) and are `size` long, with `samples` a bin."""
    dtype = start.dtype
    bins = size / np.array(p.bins, dtype)
    step = bins / np.maximum(samples, 1)
    most = np.finfo(dtype).max  # so that an offset of 0 shifts nothing
    far = np.clip(dtype.type(reach) * size, -most, most)
    columns = (start, bins, step, np.broadcast_to(samples, size.shape), far)
    return np.ascontiguousarray(np.stack(columns, axis=-1), dtype)


def align_boxes(p: RoIs, sampling_ratio: int, half_pixel: bool, least: float | None, reach: float = 0.0) -> Boxes:
    """Boxes of the RoI align family (rule R): `sampling_ratio` samples an axis and bin, or if it is not above 0 about one a
    pixel; shifted by half a pixel or not; at least `least` long."""
    dtype = p.boxes.dtype
    corners = _corners(p) - dtype.type(0.5 if half_pixel else 0.0)
    start, size = corners[:, 0], corners[:, 1] - corners[:, 0]
    if least is not None:
        size = np.maximum(size, dtype.type(least))
    samples = np.full(size.shape, sampling_ratio, dtype)
    if sampling_ratio <= 0:
        samples = np.maximum(np.ceil(size / np.array(p.bins, dtype)), dtype.type(0))
    return Boxes(RULE_R, image_numbers(p), _geometry(start, size, p, samples, reach))


def sampled_boxes(p: RoIs, samples: int, reach: float) -> Boxes:
    """Boxes of deformable position-sensitive pooling (rule P): whole pixels of the boxes' own coordinates, both ends
    counted, `samples` samples an axis and bin."""
    dtype = p.boxes.dtype
    first, last = _round(p.boxes[:, 1:]).reshape(-1, 2, 2).swapaxes(0, 1)[:, :, ::-1]
    scale, half = dtype.type(p.scale), dtype.type(0.5)
    start = np.clip(first * scale, -FAR, FAR) - half
    size = np.maximum(np.clip((last + 1) * scale, -FAR, FAR) - half - start, dtype.type(0.1))
    return Boxes(RULE_P, image_numbers(p), _geometry(start, size, p, np.array(samples, dtype), reach))


def whole_boxes(p: RoIs, inclusive: bool) -> Boxes:
    """Boxes of RoI pooling: corners rounded to whole pixels, of which the second counts if `inclusive`; bins of whole
    pixels, which may overlap, clipped to the image."""
    corners = _round(_corners(p)).astype(np.int64)
    start, size = corners[:, 0], np.maximum(corners[:, 1] - corners[:, 0] + inclusive, 1)
    ranges = []
    for axis in (0, 1):
        bins, steps = p.bins[axis], np.arange(p.bins[axis])
        first = steps * size[:, axis, None] // bins + start[:, axis, None]
        end = -(-(steps + 1) * size[:, axis, None] // bins) + start[:, axis, None]
        ranges.append(np.clip(np.stack((first, end), axis=-1), 0, p.size[axis]))
    return Boxes(WHOLE_PIXELS, image_numbers(p), np.ascontiguousarray(np.concatenate(ranges, axis=1)))
