"""RoI pooling on NumPy arrays: forward and backward.

The forward compares pixels along the channels of a channels-last copy; the backward adds to the planes of a block of
channels, which a task owns, where the maxima were.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numdcn._host.arrays import NOWHERE, place, reshaped
from numdcn._host.images_cpu import RimmedImages
from numdcn._host.options import Options
from numdcn._host.rois import image_numbers, whole_boxes
from numdcn._host.scratch import Scratch
from numdcn._host.threads import launch, plan_threads
from numdcn._kernels.columns_cpu import write_tile
from numdcn._kernels.jit_cpu import block, helper, kernel
from numdcn._kernels.layout_cpu import fill
from numdcn._kernels.parameters_cpu import Place, unpack
from numdcn._kernels.points_cpu import PointsCut, forward_panel, points_cut
from numdcn._kernels.sample_cpu import MOST_PIXELS, place_tile, tile_at
from numdcn._kernels.simd_cpu import (
    as_int32,
    at,
    full,
    load_like,
    load_once,
    load_scalar,
    next_task,
    part,
    pointer,
    select,
    store,
    width,
)
from numdcn.roi_pool.problem import Problem

READS = 16.0  # operations that a bin takes for each channel, about
BLOCK = 16  # channels that a task of the backward owns


class Written(NamedTuple):
    """A result for `write_tile`."""

    bias: Place  # there is none
    y: Place  # (R, C, 1, Ph*Pw); nowhere: not wanted


class Call(NamedTuple):
    """Parameters of `max_bins`."""

    channels: int
    rois: int
    size: tuple[int, int]
    bins: tuple[int, int]
    cut: PointsCut
    numbers: int  # addresses: the image of each box, as int64,
    ranges: int  # first pixel and end of the bins of each box, along y and then along x, as int64,
    values: Written
    positions: Written  # as int32
    images: int
    slots: int
    itemsize: int


@helper
def _max_vector(kind, image, rows, columns, size, channels, values, positions):  # type: ignore[no-untyped-def]
    """The largest pixels of rows times columns, for one vector of channels, and their positions; NaN is the largest."""
    first = rows[0] * size[1] + columns[0]
    best, where = load_like(image, (rows[0] * (size[1] + 1) + columns[0]) * channels, kind), as_int32(first, kind)
    for y in range(rows[0], rows[1]):
        for x in range(columns[0], columns[1]):
            pixel = load_like(image, (y * (size[1] + 1) + x) * channels, kind)
            larger = (best < pixel) | ((pixel != pixel) & (best >= best))
            best = select(larger, pixel, best)
            where = select(larger, as_int32(y * size[1] + x, kind), where)
    store(values, 0, best)
    store(positions, 0, where)


@block
def max_bin(one, image, rows, columns, size, channels, count, values, positions):  # type: ignore[no-untyped-def]
    """The largest pixel of a bin, and its position, for `count` channels; 0 and -1 for an empty bin."""
    if rows[0] >= rows[1] or columns[0] >= columns[1]:
        fill(values, 0, count, one - one)
        fill(positions, 0, count, -1)
        return
    step, c = width(one), 0
    while c < count:
        source, v, w, rest = at(image, c), at(values, c), at(positions, c), count - c
        if rest >= step:
            _max_vector(full(one), source, rows, columns, size, channels, v, w)
            c += step
        elif step > 4 and rest >= 4:
            _max_vector(part(one, 4), source, rows, columns, size, channels, v, w)
            c += 4
        else:
            _max_vector(one, source, rows, columns, size, channels, v, w)
            c += 1


@kernel
def max_bins(one, params, counter, slot):  # type: ignore[no-untyped-def]
    """y and the positions, box by box. A task is a tile of the bins of a box."""
    a = unpack(params, Call)
    cut = a.cut
    base = a.slots + slot * cut.slot_bytes
    tile, samples = tile_at(base, one), pointer(base + cut.tile_bytes, one)
    buffer = at(samples, cut.rows * cut.pitch)
    address = base + cut.tile_bytes + cut.samples_bytes  # int32, which move as float32
    positions, moved = pointer(address, np.int32(0)), pointer(address, np.float32(0))
    row, many = (a.size[1] + 1) * a.channels, a.bins[0] * a.bins[1]
    while True:
        task = next_task(counter)
        if task >= a.rois * cut.tiles:
            return
        r, first = task // cut.tiles, task % cut.tiles * cut.tile_columns
        runs, pixels = place_tile(tile, cut, task % cut.tiles, (1, many), (0, 0), (0, 0))
        n = load_scalar(pointer(a.numbers, np.int64(0)), r)
        image = at(pointer(a.images, one), n * cut.image_size + row + a.channels)
        ranges = at(pointer(a.ranges, np.int64(0)), 2 * r * (a.bins[0] + a.bins[1]))
        for c in range(0, a.channels, cut.panel):
            count = min(cut.panel, a.channels - c)
            for p in range(pixels):
                i = (first + p) // a.bins[1]
                j = a.bins[0] + (first + p) % a.bins[1]
                rows = (load_scalar(ranges, 2 * i), load_scalar(ranges, 2 * i + 1))
                columns = (load_scalar(ranges, 2 * j), load_scalar(ranges, 2 * j + 1))
                spot = p * cut.pitch
                max_bin(
                    one, at(image, c), rows, columns, a.size, a.channels, count, at(samples, spot), at(positions, spot)
                )  # fmt: skip
            write_tile(one, a.values, r, c, count, tile, runs, pixels, samples, cut.pitch, buffer, False)
            if a.positions.y.address:
                lines = pointer(base + cut.tile_bytes + cut.rows * cut.pitch * a.itemsize, np.float32(0))
                write_tile(np.float32(0), a.positions, r, c, count, tile, runs, pixels, moved, cut.pitch, lines, False)


def _find(p: Problem, arrays: dict[str, Any], y: np.ndarray, argmax: np.ndarray | None) -> None:
    """Fill y, and the positions of the maxima. All arrays are addressable and checked."""
    x, dtype, many = arrays["x"], y.dtype, p.bins[0] * p.bins[1]
    boxes, panel = whole_boxes(p, inclusive=True), forward_panel(p.channels, dtype)
    shape = (p.rois, p.channels, 1, many)
    found = None if argmax is None else argmax.reshape(shape)
    cut = points_cut(many, p.channels, p.size, panel, dtype.itemsize, (min(many, MOST_PIXELS) + 32) * (panel + 16) * 4)
    threads = plan_threads(p.rois * cut.tiles, READS * y.size)
    bounds = np.array((0, p.channels), np.int64)
    sizes = (p.batch * cut.image_size * dtype.itemsize, threads * cut.slot_bytes)
    with reshaped(y, *shape) as flat, Scratch(*sizes) as (address, slots):
        RimmedImages(address, cut.image_size, bounds, slots, cut.slot_bytes, threads).pack(x)
        call = Call(
            p.channels, p.rois, p.size, p.bins, cut, boxes.images.ctypes.data, boxes.geometry.ctypes.data,
            Written(NOWHERE, place(flat)), Written(NOWHERE, place(found)), address, slots, dtype.itemsize,
        )  # fmt: skip
        launch(max_bins, dtype.type(1), call, threads)


def forward(p: Problem, arrays: dict[str, Any], y: np.ndarray, options: Options) -> None:
    """Fill y; arrays may hold room for `argmax`, contiguous. All arrays are addressable and checked."""
    _find(p, arrays, y, arrays.get("argmax"))


class BackwardCall(NamedTuple):
    """Parameters of `add_at_maxima`. All arrays are contiguous."""

    batch: int
    channels: int
    rois: int
    pixels: int  # of an image
    many: int  # bins of a box
    numbers: int  # addresses: the image of each box,
    argmax: int
    grad_y: int
    grad_x: int
    stray: int  # where to write a position that is in no image, as int64


@kernel
def add_at_maxima(one, params, counter, slot):  # type: ignore[no-untyped-def]
    """grad_x. A task is a block of channels of all images."""
    a = unpack(params, BackwardCall)
    numbers, positions = pointer(a.numbers, np.int64(0)), pointer(a.argmax, np.int32(0))
    while True:
        task = next_task(counter)
        if task >= (a.channels + BLOCK - 1) // BLOCK:
            return
        first = task * BLOCK
        count = min(BLOCK, a.channels - first)
        for n in range(a.batch):
            fill(pointer(a.grad_x, one), (n * a.channels + first) * a.pixels, count * a.pixels, one - one)
        for r in range(a.rois):
            for c in range(first, first + count):
                plane = at(pointer(a.grad_x, one), (load_scalar(numbers, r) * a.channels + c) * a.pixels)
                start = (r * a.channels + c) * a.many
                where, gradient = at(positions, start), at(pointer(a.grad_y, one), start)
                for b in range(a.many):
                    pixel = np.int64(load_once(where, b))
                    if pixel >= 0 and pixel < a.pixels:
                        store(plane, pixel, load_scalar(plane, pixel) + load_scalar(gradient, b))
                    elif pixel != -1:
                        store(pointer(a.stray, np.int64(0)), 0, pixel)


def backward(
    p: Problem, grad_y: np.ndarray, arrays: dict[str, Any], grads: dict[str, np.ndarray], options: Options
) -> None:
    """Fill the gradients in `grads`, each by the name of its argument; `arrays` may hold the forward's `argmax`, which is
    found again if not. All arrays are addressable and checked."""
    grad_x, argmax = grads["x"], arrays.get("argmax")
    if argmax is None:
        argmax = np.empty(p.out_shape, np.int32)
        _find(p, arrays, np.empty(p.out_shape, grad_y.dtype), argmax)
    argmax, grad_y = np.ascontiguousarray(argmax), np.ascontiguousarray(grad_y)
    target = grad_x if grad_x.flags.c_contiguous else np.empty(grad_x.shape, grad_x.dtype)
    numbers, stray = image_numbers(p), np.full(1, -1, np.int64)
    call = BackwardCall(
        p.batch, p.channels, p.rois, p.size[0] * p.size[1], p.bins[0] * p.bins[1], numbers.ctypes.data,
        argmax.ctypes.data, grad_y.ctypes.data, target.ctypes.data, stray.ctypes.data,
    )  # fmt: skip
    threads = plan_threads(-(-p.channels // BLOCK), READS * grad_y.size)
    launch(add_at_maxima, grad_y.dtype.type(1), call, threads)
    if stray[0] != -1:
        raise ValueError(
            f"`argmax` holds {stray[0]}, expected positions of pixels, from 0 to {call.pixels - 1}, or -1 for an empty bin"
        )
    if target is not grad_x:
        grad_x[...] = target
