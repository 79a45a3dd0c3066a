"""Pooling over boxes (regions of interest): sizes, arrays, where bins and their samples lie, and checks of boxes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from numdcn._call import hints
from numdcn._call.arguments import Argument, Table, check_arguments
from numdcn._call.checks import check_countable, coordinate_dtype, flag, integer, number, per_axis
from numdcn._call.frameworks import host_copy
from numdcn._call.remembered import remembered
from numdcn._formulas.bilinear import ALIGN, PSROI

X = Argument("x", "(N, C, H, W)", 4)
SHAPE_OF_X = Argument("x", "(N, C, H, W)", 4, saved=False)
ROIS = Argument("rois", "(R, 5): batch index, x1, y1, x2, y2", 2, coordinates=True)
FAR = 2.0**30  # pixels; corners are clipped to +-FAR
SAMPLES_LIMIT = 2**16  # exclusive, for the samples along an axis of a bin


class RoIArrays(NamedTuple):
    """The arrays of a pooling, or their gradients; None if absent or not requested."""

    x: Any  # (N, C, H, W)
    rois: Any  # (R, 5)
    shifts: Any = None  # of bins: (R, 2*classes, part_h, part_w); for each class x, then y
    mask: Any = None  # (R, 1, Ph, Pw)
    argmax: Any = None  # (R, C, Ph, Pw) int32: positions of the maxima, written by the forward, read by the backward


class RoIs(NamedTuple):
    """The sizes of one pooling over boxes. Tuples have one entry per axis, y first."""

    batch: int
    in_channels: int
    channels: int  # of the result
    size: tuple[int, int]  # of an image
    box_count: int
    bins: tuple[int, int]  # of a box
    scale: float  # from the boxes' coordinates to pixels

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """The shape of y."""
        return self.box_count, self.channels, *self.bins


class SamplingRule(NamedTuple):
    """Where the samples of a bin lie."""

    border: int  # ALIGN: boxes are scaled; PSROI: first rounded, both ends counted
    samples: int  # of a bin along an axis; 0 or less: about one per pixel
    half: float  # pixels subtracted from scaled corners
    least: float  # minimum length of a box, in pixels
    reach: float  # shift of a bin by an offset of 1, as a fraction of the box's size


class WholePixels(NamedTuple):
    """Bins of whole pixels, without samples; corners are rounded."""

    last_counts: bool  # whether the second corner is part of the box


class Pooling(NamedTuple):
    """One pooling over boxes: what an operator passes to the wings.

    A bin is the mean of its samples or the maximum of its whole pixels; if position-sensitive, the mean of its whole
    pixels.
    """

    rois: RoIs
    rule: SamplingRule | WholePixels
    cells: tuple[int, int] | None = None  # of a box, if position-sensitive: each cell reads channels of its own
    boxes: Any = None  # (R, 5): the checked copy, as the caller's array could change meanwhile; None on a GPU

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """The shape of y."""
        return self.rois.out_shape


def align_rule(samples: Any, half_pixel: bool, least: float = -np.inf, reach: float = 0.0) -> SamplingRule:
    """The rule of the RoI align family; raises unless `samples` is a valid `sampling_ratio`."""
    ratio = integer("sampling_ratio", samples, -(2**31), SAMPLES_LIMIT)
    return SamplingRule(ALIGN, ratio, 0.5 if half_pixel else 0.0, least, reach)


def psroi_rule(samples: int, reach: float) -> SamplingRule:
    """The rule of deformable position-sensitive pooling."""
    return SamplingRule(PSROI, samples, 0.5, 0.1, reach)


def check_rois(
    table: Table,
    arrays: RoIArrays,
    output_size: Any,
    spatial_scale: Any,
    check: Any,
    group_size: tuple[int, int] | None = None,
) -> RoIs:
    """The sizes of a pooling, from the arguments common to all operators over boxes; raises if one is invalid.
    `pooling` checks the boxes.

    `group_size`: the cells of a position-sensitive operator along y and x; the result has one channel for as many
    channels of x as there are cells.
    """
    check_arguments(table, arrays)
    x, rois = arrays.x, arrays.rois
    if min(x.shape[1:]) < 1:
        raise ValueError(f"`x` has shape {x.shape}, expected no empty axis except the batch")
    check_countable("x", max(x.shape[2:]), x.dtype)
    if rois.shape[1] != 5:
        raise ValueError(
            f"`rois` has shape {rois.shape}, expected (R, 5): batch index, x1, y1, x2, y2{hints.batch_index(rois)}"
        )
    bins = per_axis("output_size", output_size, 1)
    scale = number("spatial_scale", spatial_scale, x.dtype, positive=True)
    flag("check", check)
    channels = x.shape[1]
    if group_size is not None:
        cells = group_size[0] * group_size[1]
        if channels % cells:
            raise ValueError(
                f"`x` has C = {channels} (shape {x.shape}), expected a multiple of {cells} = "
                f"{group_size[0]}*{group_size[1]}, as each cell of a box reads channels of its own"
            )
        channels //= cells
    return RoIs(x.shape[0], x.shape[1], channels, x.shape[2:], len(rois), bins, scale)


def pooling(problem: Callable[..., Pooling], arrays: RoIArrays, *options: Any) -> Pooling:
    """`problem(arrays, *options)` with its boxes; raises if one is invalid. The last option says whether to wait for a GPU
    and check the boxes there."""
    p, rois = remembered(problem, arrays, *options), arrays.rois
    boxes = np.array(rois, coordinate_dtype(rois.dtype), order="C") if isinstance(rois, np.ndarray) else None
    if options[-1] or boxes is not None:
        _check_boxes(host_copy(rois) if boxes is None else boxes, p.rois.batch)
    return p._replace(boxes=boxes)


def result_shape(arrays: Any, output_size: Any, cells: int = 1) -> tuple[Any, ...]:
    """The shape of y, of which nothing is checked: sizes may be symbols. `cells`: of a position-sensitive operator."""
    return arrays.rois.shape[0], arrays.x.shape[1] // cells, *output_size


def _check_boxes(rois: np.ndarray, batch: int) -> None:
    """Raise at the first row that is not a valid box of one of the images."""
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
