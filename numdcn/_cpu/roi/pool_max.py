"""RoI operators whose bins are maxima, forward and backward.

The forward compares pixels along the channels of a channels-last copy; the backward adds to the planes of a block of
channels, which a task owns, where the maxima were.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from numdcn._call.roi import RoIs
from numdcn._call.scratch import Scratch
from numdcn._cpu.arrays import NOWHERE, output, output_as, place
from numdcn._cpu.blocking import PointsBlocking, forward_panel, points_blocking
from numdcn._cpu.conv.columns import write_tile
from numdcn._cpu.images import PaddedImages
from numdcn._cpu.jit import block, kernel
from numdcn._cpu.layout import fill
from numdcn._cpu.parameters import Place, unpack
from numdcn._cpu.roi.boxes import Boxes
from numdcn._cpu.simd import (
    as_int32,
    at,
    full,
    load_like,
    load_once,
    load_scalar,
    next_task,
    part,
    pointer,
    store,
    width,
)
from numdcn._cpu.threads import launch, plan_threads
from numdcn._cpu.tile import MOST_PIXELS, place_tile, tile_at
from numdcn._formulas.jit import helper
from numdcn._formulas.vectors import select

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
    blocking: PointsBlocking
    numbers: int  # addresses: the image of each box, as int64,
    ranges: int  # first pixel and end of the bins of each box, along y and then along x, as int64,
    values: Written
    positions: Written  # as int32
    images: int
    slots: int
    itemsize: int


@helper
def _max_vector(kind, image, rows, columns, size, channels, values, positions):
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
def max_bin(one, image, rows, columns, size, channels, count, values, positions):
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
def max_bins(one, params, counter, slot):
    """y and the positions, box by box. A task is a tile of the bins of a box."""
    a = unpack(params, Call)
    blocking = a.blocking
    base = a.slots + slot * blocking.slot_bytes
    tile, samples = tile_at(base, one), pointer(base + blocking.tile_bytes, one)
    buffer = at(samples, blocking.rows * blocking.pitch)
    address = base + blocking.tile_bytes + blocking.samples_bytes  # int32, which move as float32
    positions, moved = pointer(address, np.int32(0)), pointer(address, np.float32(0))
    row, many = (a.size[1] + 1) * a.channels, a.bins[0] * a.bins[1]
    while True:
        task = next_task(counter)
        if task >= a.rois * blocking.tiles:
            return
        r, first = task // blocking.tiles, task % blocking.tiles * blocking.tile_columns
        runs, pixels = place_tile(tile, blocking, task % blocking.tiles, (1, many), (0, 0), (0, 0))
        n = load_scalar(pointer(a.numbers, np.int64(0)), r)
        image = at(pointer(a.images, one), n * blocking.image_size + row + a.channels)
        ranges = at(pointer(a.ranges, np.int64(0)), 2 * r * (a.bins[0] + a.bins[1]))
        for c in range(0, a.channels, blocking.panel):
            count = min(blocking.panel, a.channels - c)
            for p in range(pixels):
                i = (first + p) // a.bins[1]
                j = a.bins[0] + (first + p) % a.bins[1]
                rows = (load_scalar(ranges, 2 * i), load_scalar(ranges, 2 * i + 1))
                columns = (load_scalar(ranges, 2 * j), load_scalar(ranges, 2 * j + 1))
                spot = p * blocking.pitch
                max_bin(
                    one, at(image, c), rows, columns, a.size, a.channels, count, at(samples, spot), at(positions, spot)
                )  # fmt: skip
            write_tile(one, a.values, r, c, count, tile, runs, pixels, samples, blocking.pitch, buffer, False)
            if a.positions.y.address:
                lines = pointer(base + blocking.tile_bytes + blocking.rows * blocking.pitch * a.itemsize, np.float32(0))
                write_tile(
                    np.float32(0), a.positions, r, c, count, tile, runs, pixels, moved, blocking.pitch, lines, False
                )


def pool_max(p: RoIs, x: np.ndarray, boxes: Boxes, y: np.ndarray, argmax: np.ndarray | None) -> None:
    """Fill y, and the positions of the maxima, which are contiguous, if wanted."""
    dtype, many = y.dtype, p.bins[0] * p.bins[1]
    panel = forward_panel(p.channels, dtype)
    shape = (p.rois, p.channels, 1, many)
    found = None if argmax is None else argmax.reshape(shape)
    blocking = points_blocking(
        many, p.channels, p.size, panel, dtype.itemsize, (min(many, MOST_PIXELS) + 32) * (panel + 16) * 4
    )
    threads = plan_threads(p.rois * blocking.tiles, READS * y.size)
    bounds = np.array((0, p.channels), np.int64)
    sizes = (p.batch * blocking.image_size * dtype.itemsize, threads * blocking.slot_bytes)
    with output_as(y, *shape) as flat, Scratch(*sizes) as (address, slots):
        PaddedImages(address, blocking.image_size, bounds, slots, blocking.slot_bytes, threads).pack(x)
        call = Call(
            p.channels, p.rois, p.size, p.bins, blocking, boxes.images.ctypes.data, boxes.geometry.ctypes.data,
            Written(NOWHERE, place(flat)), Written(NOWHERE, place(found)), address, slots, dtype.itemsize,
        )  # fmt: skip
        launch(max_bins, dtype.type(1), call, threads)


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
def add_at_maxima(one, params, counter, slot):
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


def pool_max_gradient(
    p: RoIs, x: np.ndarray, boxes: Boxes, grad_y: np.ndarray, grad_x: np.ndarray, argmax: np.ndarray | None
) -> None:
    """Fill grad_x; `argmax` is the forward's, found again if not given."""
    if argmax is None:
        argmax = np.empty(p.out_shape, np.int32)
        pool_max(p, x, boxes, np.empty(p.out_shape, grad_y.dtype), argmax)
    argmax, grad_y = np.ascontiguousarray(argmax), np.ascontiguousarray(grad_y)
    stray = np.full(1, -1, np.int64)
    with output(grad_x, lambda array: array.flags.c_contiguous) as target:
        call = BackwardCall(
            p.batch, p.channels, p.rois, p.size[0] * p.size[1], p.bins[0] * p.bins[1], boxes.images.ctypes.data,
            argmax.ctypes.data, grad_y.ctypes.data, target.ctypes.data, stray.ctypes.data,
        )  # fmt: skip
        threads = plan_threads(-(-p.channels // BLOCK), READS * grad_y.size)
        launch(add_at_maxima, grad_y.dtype.type(1), call, threads)
        if stray[0] != -1:
            raise ValueError(
                f"`argmax` holds {stray[0]}, expected positions of pixels, from 0 to {call.pixels - 1}, or -1 for an empty bin"
            )
