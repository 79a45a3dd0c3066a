"""Pooling over boxes of NumPy arrays: scratch memory, copies and threads around the kernels."""

from __future__ import annotations

import numpy as np

from numdcn._host.arrays import NOWHERE, place, reshaped
from numdcn._host.images_cpu import RimmedImages
from numdcn._host.rois import Boxes, RoIs
from numdcn._host.scratch import Scratch
from numdcn._host.threads import launch, plan_threads
from numdcn._kernels.bins_cpu import Grid, lists_bytes
from numdcn._kernels.points_cpu import backward_panel, forward_panel, points_cut
from numdcn._kernels.pool_cpu import PoolCall, pool_backward, pool_forward
from numdcn._kernels.pool_planes_cpu import PlanesCall, columns_bytes, planes_backward, planes_forward

READS = 32.0  # operations that a bin takes for each channel, about
CHANNEL_BLOCK = 16  # of a position-sensitive backward's task
SHARED_BYTES = 8 * 2**20  # of lists that bins share; to make longer ones again is little beside reading the pixels


def _grid(p: RoIs, boxes: Boxes, shifts: np.ndarray | None, columns: int) -> Grid:
    """The boxes and their offsets (R, 2 * classes, parts along y, along x) for the kernels."""
    moved = place(shifts)
    parts = shifts.shape[2:] if shifts is not None else (1, 1)
    return Grid(
        p.rois, p.size, p.bins, boxes.rule, columns, _pitch(p), boxes.images.ctypes.data, boxes.geometry.ctypes.data,
        moved, parts, 2 * moved.strides[1],
    )  # fmt: skip


def _pitch(p: RoIs) -> int:
    """Elements from one list of pixels to the next."""
    return max(p.size) + 2


def _shared(p: RoIs, shifts: np.ndarray | None, dtype: np.dtype) -> int:
    """The columns of bins that rows of bins share: all or, where an offset moves each bin or the lists are long, none."""
    short = lists_bytes(p.bins[1], _pitch(p), dtype.itemsize) <= SHARED_BYTES
    return p.bins[1] if shifts is None and short else 1


def _lists(grid: Grid, dtype: np.dtype) -> int:
    return lists_bytes(grid.columns, grid.pitch, dtype.itemsize)


def pool(
    p: RoIs,
    x: np.ndarray,
    boxes: Boxes,
    y: np.ndarray,
    shifts: np.ndarray | None = None,
    mask: np.ndarray | None = None,
) -> None:
    """Fill y (R, C, Ph, Pw): the mean of each bin over its samples, times its mask."""
    dtype, many = y.dtype, p.bins[0] * p.bins[1]
    grid = _grid(p, boxes, shifts, _shared(p, shifts, dtype))
    cut = points_cut(many, p.channels, p.size, forward_panel(p.channels, dtype), dtype.itemsize, _lists(grid, dtype))
    threads = plan_threads(p.rois * cut.tiles, READS * y.size)
    bounds = np.array((0, p.channels), np.int64)
    sizes = (p.batch * cut.image_size * dtype.itemsize, threads * cut.slot_bytes)
    with reshaped(y, p.rois, p.channels, 1, many) as flat, Scratch(*sizes) as (address, slots):
        RimmedImages(address, cut.image_size, bounds, slots, cut.slot_bytes, threads).pack(x)
        call = PoolCall(p.batch, p.channels, grid, cut, place(mask), NOWHERE, place(flat), address, 0, 0, slots)
        launch(pool_forward, dtype.type(1), call, threads)


def pool_gradients(
    p: RoIs,
    x: np.ndarray,
    boxes: Boxes,
    grad_y: np.ndarray,
    grad_x: np.ndarray | None,
    shifts: np.ndarray | None = None,
    mask: np.ndarray | None = None,
    with_sums: bool = False,
) -> np.ndarray | None:
    """Fill grad_x; return (R, Ph, Pw, 3), the sums over channels and pixels of grad_y times the pixel in the weights of
    the samples, of their slopes along y, and along x: None unless `with_sums`."""
    dtype, many = grad_y.dtype, p.bins[0] * p.bins[1]
    flat, grid = grad_y.reshape(p.rois, p.channels, 1, many), _grid(p, boxes, shifts, _shared(p, shifts, dtype))
    panel = backward_panel(p.channels, dtype)
    cut = points_cut(many, p.channels, p.size, panel, dtype.itemsize, _lists(grid, dtype))
    tasks, images_bytes = p.batch * cut.blocks, p.batch * cut.image_size * dtype.itemsize
    threads = plan_threads(tasks, READS * grad_y.size)
    bounds = np.array([*range(0, p.channels, panel), p.channels], np.int64)
    sums = np.empty((cut.blocks, p.rois, *p.bins, 3), dtype) if with_sums else None
    sizes = (images_bytes if with_sums else 0, images_bytes if grad_x is not None else 0, threads * cut.slot_bytes)
    with Scratch(*sizes) as (address, grad_address, slots):
        images, grad_images = (
            RimmedImages(where, cut.image_size, bounds, slots, cut.slot_bytes, threads)
            for where in (address, grad_address)
        )
        if with_sums:
            images.pack(x)
        if grad_x is not None:
            grad_images.clear(p.batch, dtype)
        call = PoolCall(
            p.batch, p.channels, grid, cut, place(mask), NOWHERE, place(flat), address,
            grad_address if grad_x is not None else 0, 0 if sums is None else sums.ctypes.data, slots,
        )  # fmt: skip
        launch(pool_backward, dtype.type(1), call, threads)
        if grad_x is not None:
            grad_images.unpack(grad_x)
    return None if sums is None else np.add.reduce(sums, axis=0)


def _adjacent(x: np.ndarray) -> np.ndarray:
    """x, or a copy, with adjacent pixels along the last axis."""
    return x if x.shape[3] == 1 or x.strides[3] == x.itemsize else np.ascontiguousarray(x)


def _planes_call(
    p: RoIs, boxes: Boxes, group_size: tuple[int, int], shifts: np.ndarray | None, dtype: np.dtype
) -> PlanesCall:
    """The call but for the arrays and the scratch memory."""
    grid = _grid(p, boxes, shifts, 1)
    classes = 1 if shifts is None else shifts.shape[1] // 2
    per_class, lists = p.channels // classes, _lists(grid, dtype)
    blocks = -(-per_class // CHANNEL_BLOCK)
    slot = -(-(lists + columns_bytes(p.size[1], dtype.itemsize)) // 4096) * 4096
    return PlanesCall(
        p.batch, p.channels, group_size, classes, blocks, -(-per_class // blocks), grid, NOWHERE, NOWHERE, NOWHERE, NOWHERE,
        0, 0, slot, lists, dtype.itemsize,
    )  # fmt: skip


def pool_planes(
    p: RoIs, x: np.ndarray, boxes: Boxes, group_size: tuple[int, int], y: np.ndarray, shifts: np.ndarray | None = None
) -> None:
    """Fill y (R, C / cells, Ph, Pw) as `pool` does, from the channels of each bin's cell."""
    dtype, source = y.dtype, _adjacent(x)
    call = _planes_call(p, boxes, group_size, shifts, dtype)
    tasks = group_size[0] * group_size[1] * call.classes * call.blocks
    threads = plan_threads(tasks, READS * y.size)
    with Scratch(threads * call.slot_bytes) as (slots,):
        launch(planes_forward, dtype.type(1), call._replace(x=place(source), y=place(y), slots=slots), threads)


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
    """Fill grad_x; return (classes, R, Ph, Pw, 2), the gradients of the bins' shifts along x and y: None unless
    `with_sums`."""
    dtype, source = grad_y.dtype, _adjacent(x) if with_sums else x
    call = _planes_call(p, boxes, group_size, shifts, dtype)
    target = grad_x if grad_x is None or _adjacent(grad_x) is grad_x else np.empty(grad_x.shape, dtype)
    tasks = group_size[0] * group_size[1] * call.classes * call.blocks
    threads = plan_threads(tasks, READS * grad_y.size)
    sums = np.empty((call.classes, call.blocks, p.rois, *p.bins, 2), dtype) if with_sums else None
    with Scratch(threads * call.slot_bytes) as (slots,):
        call = call._replace(
            x=place(source), y=place(grad_y), grad_x=place(target), sums=0 if sums is None else sums.ctypes.data,
            slots=slots,
        )  # fmt: skip
        launch(planes_backward, dtype.type(1), call, threads)
    if grad_x is not None and target is not grad_x:
        grad_x[...] = target
    return None if sums is None else np.add.reduce(sums, axis=1)
