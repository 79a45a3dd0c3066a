"""Pooling over boxes of NumPy arrays: copies, scratch memory and threads around the kernels for the three kinds of
bins."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import numpy as np

from numdcn._call.options import Options
from numdcn._call.roi import Pooling, RoIArrays, RoIs, SamplingRule, WholePixels
from numdcn._call.scratch import Scratch
from numdcn._cpu.arrays import Outline, addressable, addressable_arrays, output, output_as, outputs, place
from numdcn._cpu.bands import SPAN, bands_of
from numdcn._cpu.images import PaddedImages, suited
from numdcn._cpu.parameters import NOWHERE, channel_bounds
from numdcn._cpu.points_blocking import backward_panel, forward_panel, points_blocking
from numdcn._cpu.program import Recording, run_recorded
from numdcn._cpu.roi.bins import REACH, Grid, lists_bytes
from numdcn._cpu.roi.boxes import Boxes, boxes_of, image_indices, record_boxes
from numdcn._cpu.roi.pool import PoolCall, bin_gradients, pool_forward
from numdcn._cpu.roi.pool_max import MaxBackwardCall, MaxCall, add_at_maxima, max_bins, owned_channels
from numdcn._cpu.roi.pool_planes import PlanesCall, columns_bytes, planes_backward, planes_forward
from numdcn._cpu.roi.spread import SpreadCall, spread_bfloat16, spread_bins, spread_blocking, spread_float16
from numdcn._cpu.roi.survey import BOXES, HEAD, SurveyCall, Surveys, room_for_lists, survey_boxes
from numdcn._cpu.threads import launch, plan_threads
from numdcn._cpu.tile import MOST_PIXELS

# What a bin costs per channel, in multiply-adds of a product; about half of what the benchmarks measured.
READS = 100.0
COMPARISONS = 100.0  # if it is a maximum
PLANE_READS = 2000.0  # if it reads planes, which hardly anything shares
CHANNEL_BLOCK = 16  # channels per task of a position-sensitive backward
SHARED_BYTES = 8 * 2**20  # of lists that bins share; remaking longer ones is cheap next to reading their pixels


def takes_half_images(p: Pooling) -> bool:
    """Whether x and its gradient may be of a half type."""
    return p.cells is None and not isinstance(p.rule, WholePixels)  # others read or fill x in place


def forward(p: Pooling, arrays: RoIArrays, y: np.ndarray, options: Options) -> None:
    """Fill y, and `arrays.argmax` if there is one."""
    x, _, shifts, mask, argmax = addressable_arrays(arrays)
    with np.errstate(all="ignore"), output(y) as target:
        if p.cells is not None:
            pool_planes(p.rois, x, boxes_of(p), p.cells, target, shifts)
        elif isinstance(p.rule, WholePixels):
            pool_max(p.rois, x, boxes_of(p), target, argmax)
        else:
            with output_as(target, *_flat(p.rois)) as flat:
                run_recorded(pool, p[:2], p.boxes, x, flat, shifts, mask)


def backward(p: Pooling, grad_y: np.ndarray, arrays: RoIArrays, grads: RoIArrays, options: Options) -> None:
    """Fill the gradients in `grads`."""
    x, _, shifts, mask, argmax = addressable_arrays(arrays)
    grad_y = addressable(grad_y)
    with np.errstate(all="ignore"), outputs(grads) as targets:
        if p.cells is None and isinstance(p.rule, WholePixels):
            pool_max_gradient(p, x, grad_y, targets.x, argmax)
            return
        if p.cells is None:
            flat = grad_y.reshape(_flat(p.rois))
            if targets.shifts is not None or targets.mask is not None:
                run_recorded(pool_gradients, p[:2], p.boxes, x, flat, shifts, mask, targets.shifts, targets.mask)
            if targets.x is not None:
                run_recorded(spread, p[:2], p.boxes, flat, shifts, mask, targets.x)
            return
        boxes = boxes_of(p)
        slopes = pool_planes_gradients(p.rois, x, boxes, p.cells, grad_y, targets.x, shifts, targets.shifts is not None)
        if slopes is not None:
            _parts_gradient(p.rois, boxes, slopes, targets.shifts)


def _flat(p: RoIs) -> tuple[int, int, int, int]:
    """The shape of y with the bins of a box in a row."""
    return p.box_count, p.channels, 1, p.bins[0] * p.bins[1]


def _parts_gradient(p: RoIs, boxes: Boxes, slopes: np.ndarray, grad: np.ndarray) -> None:
    """Fill the gradient of shifts that bins may share, from the result of `pool_planes_gradients`."""
    bins_y, bins_x = p.bins
    moved = slopes * boxes.arrays[1][:, None, None, ::-1, REACH]  # (classes, R, Ph, Pw, 2), x first
    parts = grad.shape[2:]
    if parts == p.bins:
        grad.reshape(p.box_count, len(moved), 2, *parts)[...] = moved.transpose(1, 0, 4, 2, 3)
        return
    grad[...] = 0
    for i in range(bins_y):
        for j in range(bins_x):  # into (R, 2*classes)
            bin_ = moved[:, :, i, j].transpose(1, 0, 2).reshape(grad.shape[:2])
            grad[:, :, i * parts[0] // bins_y, j * parts[1] // bins_x] += bin_


def _grid(p: RoIs, boxes: Boxes, shifts: np.ndarray | Outline | None, columns: int) -> Grid:
    """The boxes and their offsets (R, 2 * classes, part_h, part_w) in the form the kernels take."""
    shifts_place = place(shifts)
    parts = (shifts.shape[2], shifts.shape[3]) if shifts is not None else (1, 1)
    return Grid(
        p.box_count, p.size, p.bins, boxes.rule, columns, _pitch(p), boxes.image_index, boxes.geometry,
        shifts_place, parts, 2 * shifts_place.strides[1],
    )  # fmt: skip


def _pitch(p: RoIs) -> int:
    """Elements from one list of pixels to the next."""
    return max(p.size) + 2


def _shared(p: RoIs, shifts: Outline | None, dtype: np.dtype) -> int:
    """Columns whose lists are kept for all rows of bins: all, or one if offsets move each bin or the lists are long."""
    short = lists_bytes(p.bins[1], _pitch(p), dtype.itemsize) <= SHARED_BYTES
    return p.bins[1] if shifts is None and short else 1


def _lists(grid: Grid, dtype: np.dtype) -> int:
    return lists_bytes(grid.columns, grid.pitch, dtype.itemsize)


def pool(
    recording: Recording, p: tuple[RoIs, SamplingRule], boxes: Outline, x: Outline, y: Outline, *more: Any
) -> None:
    """Record what fills y (R, C, 1, bins): the mean of each bin over its samples, times its mask. `more`: the outlines of
    shifts and mask."""
    rois, (shifts, mask), dtype = p[0], more, y.dtype
    grid = _grid(rois, record_boxes(recording, Pooling(*p), boxes), shifts, _shared(rois, shifts, dtype))
    call, threads = _pool_call(recording, rois, grid, x, y)
    call = call._replace(mask=place(mask), y=place(y))
    recording.launch(pool_forward, dtype.type(1), call, threads)


def _pool_call(recording: Recording, p: RoIs, grid: Grid, x: Outline, y: Outline) -> tuple[PoolCall, int]:
    """The call of a kernel that reads whole bins of x, which is copied, and its threads. Most arrays are missing."""
    dtype = y.dtype
    blocking = points_blocking(
        y.shape[3], p.channels, p.size, forward_panel(p.channels, dtype), dtype.itemsize, _lists(grid, dtype)
    )
    threads = plan_threads(p.box_count * blocking.tiling.tiles, READS * y.size)
    images, workspaces = recording.scratch(
        p.batch * blocking.image_size * dtype.itemsize, threads * blocking.workspace_bytes
    )
    bounds = recording.numbers(channel_bounds(p.channels, p.channels).memory)
    room = workspaces, blocking.workspace_bytes
    PaddedImages(images, blocking.image_size, bounds, *room, threads, recording.launch).pack(x)
    call = PoolCall(p.channels, grid, blocking, NOWHERE, NOWHERE, NOWHERE, NOWHERE, images, workspaces)
    return call, threads


def pool_gradients(
    recording: Recording, p: tuple[RoIs, SamplingRule], boxes: Outline, x: Outline, grad_y: Outline, *more: Any
) -> None:
    """Record what fills the gradients of the bins' shifts and mask. `more`: the outlines of shifts and mask, and those of the
    gradients."""
    rois, (shifts, mask, grad_shifts, grad_mask), dtype = p[0], more, grad_y.dtype
    grid = _grid(rois, record_boxes(recording, Pooling(*p), boxes), shifts, _shared(rois, shifts, dtype))
    call, threads = _pool_call(recording, rois, grid, x, grad_y)
    call = call._replace(mask=place(mask), y=place(grad_y), grad_shifts=place(grad_shifts), grad_mask=place(grad_mask))
    recording.launch(bin_gradients, dtype.type(1), call, threads)


def spread(recording: Recording, p: tuple[RoIs, SamplingRule], boxes: Outline, grad_y: Outline, *more: Any) -> None:
    """Record what fills the gradient of x. `more`: the outlines of shifts and mask, and that of the gradient."""
    rois, (shifts, mask, grad_x), dtype = p[0], more, grad_y.dtype
    one = dtype.type(1)
    grid = _grid(rois, record_boxes(recording, Pooling(*p), boxes), shifts, _shared(rois, shifts, dtype))
    bands = bands_of(rois.batch, rois.channels, rois.size, backward_panel(rois.channels, dtype), dtype.itemsize)
    blocking = spread_blocking(bands, _lists(grid, dtype), dtype.itemsize)
    lists, entries = room_for_lists(rois.size, rois.bins, grid.shifts.address != 0)
    threads = plan_threads(rois.batch * bands.count * bands.blocks, READS * grad_y.size)
    spans, heads, index, weight, workspaces = recording.scratch(
        SPAN * rois.box_count * 8, HEAD * lists * rois.box_count * 8, entries * rois.box_count * 8,
        entries * rois.box_count * dtype.itemsize, threads * blocking.workspace_bytes,
    )  # fmt: skip
    surveys = Surveys(spans, heads, index, weight, lists, entries)
    survey = SurveyCall(grid, surveys, workspaces, blocking.workspace_bytes)
    recording.launch(survey_boxes, one, survey, max(1, min(threads, -(-rois.box_count // BOXES))))
    kernel = suited(grad_x.dtype, spread_bins, spread_float16, spread_bfloat16)
    call = SpreadCall(
        rois.batch, rois.channels, grid, surveys, blocking, place(mask), place(grad_y), place(grad_x), workspaces
    )
    recording.launch(kernel, one, call, threads)


def pool_max(p: RoIs, x: np.ndarray, boxes: Boxes, y: np.ndarray, argmax: np.ndarray | None) -> None:
    """Fill y, and the positions of the maxima, which are contiguous, if wanted."""
    dtype, bins = y.dtype, p.bins[0] * p.bins[1]
    panel = forward_panel(p.channels, dtype)
    shape = (p.box_count, p.channels, 1, bins)
    found = None if argmax is None else argmax.reshape(shape)
    blocking = points_blocking(
        bins, p.channels, p.size, panel, dtype.itemsize, (min(bins, MOST_PIXELS) + 32) * (panel + 16) * 4
    )
    threads = plan_threads(p.box_count * blocking.tiling.tiles, COMPARISONS * y.size)
    bounds = channel_bounds(p.channels, p.channels)
    sizes = (p.batch * blocking.image_size * dtype.itemsize, threads * blocking.workspace_bytes)
    with output_as(y, *shape) as flat, Scratch(*sizes) as (address, workspaces):
        PaddedImages(address, blocking.image_size, bounds, workspaces, blocking.workspace_bytes, threads).pack(x)
        call = MaxCall(
            p.channels, p.box_count, p.size, p.bins, blocking, boxes.image_index, boxes.geometry,
            place(flat), place(found), address, workspaces, dtype.itemsize,
        )  # fmt: skip
        launch(max_bins, dtype.type(1), call, threads)


def pool_max_gradient(
    p: Pooling, x: np.ndarray, grad_y: np.ndarray, grad_x: np.ndarray, argmax: np.ndarray | None
) -> None:
    """Fill grad_x; `argmax` is the forward's, recomputed if not given."""
    rois = p.rois
    if argmax is None:
        argmax = np.empty(rois.out_shape, np.int32)
        pool_max(rois, x, boxes_of(p), np.empty(rois.out_shape, grad_y.dtype), argmax)
    argmax, grad_y = np.ascontiguousarray(argmax), np.ascontiguousarray(grad_y)
    image_index, stray, owned = image_indices(p), np.full(1, -1, np.int64), owned_channels(rois.channels)
    with output(grad_x, lambda array: array.flags.c_contiguous) as target:
        call = MaxBackwardCall(
            rois.batch, rois.channels, owned, rois.box_count, rois.size[0] * rois.size[1], rois.bins[0] * rois.bins[1],
            image_index.ctypes.data, argmax.ctypes.data, grad_y.ctypes.data, target.ctypes.data, stray.ctypes.data,
        )  # fmt: skip
        threads = plan_threads(-(-rois.channels // owned), COMPARISONS * grad_y.size)
        launch(add_at_maxima, grad_y.dtype.type(1), call, threads)
        if stray[0] != -1:
            raise ValueError(
                f"`argmax` holds {stray[0]}, expected positions of pixels, from 0 to {call.pixels - 1}, or -1 for an empty bin"
            )


def _is_adjacent(x: np.ndarray) -> bool:
    """Whether pixels along the last axis are adjacent."""
    return x.shape[3] == 1 or x.strides[3] == x.itemsize


def _adjacent(x: np.ndarray) -> np.ndarray:
    """x, or a copy with adjacent pixels."""
    return x if _is_adjacent(x) else np.ascontiguousarray(x)


def _planes_call(
    p: RoIs, boxes: Boxes, group_size: tuple[int, int], shifts: np.ndarray | None, dtype: np.dtype
) -> PlanesCall:
    """The call, except for the arrays and the scratch memory."""
    grid = _grid(p, boxes, shifts, 1)
    classes = 1 if shifts is None else shifts.shape[1] // 2
    per_class, lists = p.channels // classes, _lists(grid, dtype)
    blocks = -(-per_class // CHANNEL_BLOCK)
    workspace = -(-(lists + columns_bytes(p.size[1], dtype.itemsize)) // 4096) * 4096
    return PlanesCall(
        p.batch, p.channels, group_size, classes, blocks, -(-per_class // blocks), grid, NOWHERE, NOWHERE, NOWHERE,
        0, 0, workspace, lists, dtype.itemsize,
    )  # fmt: skip


def pool_planes(
    p: RoIs, x: np.ndarray, boxes: Boxes, group_size: tuple[int, int], y: np.ndarray, shifts: np.ndarray | None = None
) -> None:
    """Fill y (R, C / cells, Ph, Pw) as `pool` does, from the channels of each bin's cell."""
    dtype, source = y.dtype, _adjacent(x)
    call = _planes_call(p, boxes, group_size, shifts, dtype)
    tasks = group_size[0] * group_size[1] * call.classes * call.blocks
    threads = plan_threads(tasks, PLANE_READS * y.size)
    with Scratch(threads * call.workspace_bytes) as (workspaces,):
        launch(
            planes_forward, dtype.type(1), call._replace(x=place(source), y=place(y), workspaces=workspaces), threads
        )


def pool_planes_gradients(
    p: RoIs,
    x: np.ndarray,
    boxes: Boxes,
    group_size: tuple[int, int],
    grad_y: np.ndarray,
    grad_x: np.ndarray | None,
    shifts: np.ndarray | None = None,
    with_sums: bool = False,
) -> np.ndarray | None:
    """Fill grad_x; return (classes, R, Ph, Pw, 2), the gradients of the bins' shifts along x and y; None unless
    `with_sums`."""
    dtype, source = grad_y.dtype, _adjacent(x) if with_sums else x
    call = _planes_call(p, boxes, group_size, shifts, dtype)
    tasks = group_size[0] * group_size[1] * call.classes * call.blocks
    threads = plan_threads(tasks, PLANE_READS * grad_y.size)
    sums = np.empty((call.classes, call.blocks, p.box_count, *p.bins, 2), dtype) if with_sums else None
    with ExitStack() as stack:
        target = None if grad_x is None else stack.enter_context(output(grad_x, _is_adjacent))
        (workspaces,) = stack.enter_context(Scratch(threads * call.workspace_bytes))
        call = call._replace(
            x=place(source), y=place(grad_y), grad_x=place(target), sums=0 if sums is None else sums.ctypes.data,
            workspaces=workspaces,
        )  # fmt: skip
        launch(planes_backward, dtype.type(1), call, threads)
    return None if sums is None else np.add.reduce(sums, axis=1)
