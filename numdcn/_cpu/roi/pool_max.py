"""Kernels of RoI operators whose bins are maxima.

The forward compares pixels along the channels of a channels-last copy; the backward adds at the positions of the maxima
to the planes of a block of channels, owned by a task.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from numdcn._cpu.jit import block, kernel
from numdcn._cpu.layout import Image, Matrix, fill, image_from
from numdcn._cpu.parameters import NOWHERE, Place, unpack
from numdcn._cpu.points_blocking import PointsBlocking
from numdcn._cpu.simd import (
    as_int32,
    at,
    full,
    load_like,
    load_once,
    load_scalar,
    narrow,
    next_task,
    pointer,
    store,
    width,
)
from numdcn._cpu.tile import new_tile, place_tile
from numdcn._cpu.tile_io import write_tile
from numdcn._formulas.jit import helper
from numdcn._formulas.vectors import select

MOST_CHANNELS = 16  # owned by a task of the backward
BACKWARD_TASKS = 64  # of a backward, at least, if there are as many channels


class MaxCall(NamedTuple):
    """Parameters of `max_bins`."""

    channels: int
    rois: int
    size: tuple[int, int]  # of an image
    bins: tuple[int, int]  # of a box
    blocking: PointsBlocking
    image_index: int  # address of the image of each box, int64
    ranges: int  # address of the first pixel and end of the bins of each box, along y and then along x, int64
    values: Place  # (R, C, 1, Ph*Pw)
    positions: Place  # likewise, int32; `NOWHERE`: not wanted
    images: int  # address of the zero-padded images
    workspaces: int  # address of the threads' workspaces
    itemsize: int


@helper
def _max_vector(vector, image, rows, columns, width_, values, positions):
    """The maximum over rows and columns, for one vector of channels, and its position; NaN counts as largest."""
    best = load_like(image.pointer, rows[0] * image.row_stride + columns[0] * image.pixel_stride, vector)
    where = as_int32(rows[0] * width_ + columns[0], vector)
    for y in range(rows[0], rows[1]):
        for x in range(columns[0], columns[1]):
            pixel = load_like(image.pointer, y * image.row_stride + x * image.pixel_stride, vector)
            larger = (best < pixel) | ((pixel != pixel) & (best >= best))
            best = select(larger, pixel, best)
            where = select(larger, as_int32(y * width_ + x, vector), where)
    store(values, 0, best)
    store(positions, 0, where)


@block
def max_bin(one, image, rows, columns, width_, count, values, positions):
    """The maximum of a bin, and its position, for `count` channels; 0 and -1 for an empty bin.

    The image starts at its pixel (0, 0), and has `width_` pixels per row.
    """
    if rows[0] >= rows[1] or columns[0] >= columns[1]:
        fill(values, 0, count, one - one)
        fill(positions, 0, count, -1)
        return
    step, c = width(one), 0
    while c < count:
        source, v, w, rest = image_from(image, c), at(values, c), at(positions, c), count - c
        if rest >= step:
            _max_vector(full(one), source, rows, columns, width_, v, w)
            c += step
        elif step > 4 and rest >= 4:
            _max_vector(narrow(one, 4), source, rows, columns, width_, v, w)
            c += 4
        else:
            _max_vector(one, source, rows, columns, width_, v, w)
            c += 1


@kernel
def max_bins(one, params, counter, slot):
    """y and the positions, box by box. A task is a tile of the bins of a box."""
    a = unpack(params, MaxCall)
    blocking = a.blocking
    base = a.workspaces + slot * blocking.workspace_bytes
    unplaced, maxima = new_tile(base, one), Matrix(pointer(base + blocking.tile_bytes, one), blocking.pitch)
    buffer = at(maxima.pointer, blocking.rows * maxima.pitch)
    address = base + blocking.tile_bytes + blocking.samples_bytes  # int32; `write_tile` moves them as float32
    positions, moved = pointer(address, np.int32(0)), Matrix(pointer(address, np.float32(0)), blocking.pitch)
    row, bins = (a.size[1] + 1) * a.channels, a.bins[0] * a.bins[1]
    while True:
        task = next_task(counter)
        if task >= a.rois * blocking.tiling.tiles:
            return
        r, number = task // blocking.tiling.tiles, task % blocking.tiling.tiles
        tile = place_tile(unplaced, blocking.tiling, number, (1, bins), (0, 0), (0, 0))
        first = number * blocking.tiling.tile_columns
        n = load_scalar(pointer(a.image_index, np.int64(0)), r)
        start = at(pointer(a.images, one), n * blocking.image_size + row + a.channels)
        image = Image(start, a.channels, row)
        ranges = at(pointer(a.ranges, np.int64(0)), 2 * r * (a.bins[0] + a.bins[1]))
        for c in range(0, a.channels, blocking.panel):
            count = min(blocking.panel, a.channels - c)
            for p in range(tile.pixels):
                i = (first + p) // a.bins[1]
                j = a.bins[0] + (first + p) % a.bins[1]
                rows = (load_scalar(ranges, 2 * i), load_scalar(ranges, 2 * i + 1))
                columns = (load_scalar(ranges, 2 * j), load_scalar(ranges, 2 * j + 1))
                spot, source = p * blocking.pitch, image_from(image, c)
                max_bin(one, source, rows, columns, a.size[1], count, at(maxima.pointer, spot), at(positions, spot))
            write_tile(one, one, a.values, NOWHERE, r, c, count, tile, maxima, buffer)
            if a.positions.address:
                lines = pointer(base + blocking.tile_bytes + blocking.rows * blocking.pitch * a.itemsize, np.float32(0))
                write_tile(np.float32(0), np.float32(0), a.positions, NOWHERE, r, c, count, tile, moved, lines)


def owned_channels(channels: int) -> int:
    """How many channels a task of the backward owns."""
    return max(1, min(channels // BACKWARD_TASKS, MOST_CHANNELS))


class MaxBackwardCall(NamedTuple):
    """Parameters of `add_at_maxima`. All arrays are contiguous."""

    batch: int
    channels: int
    owned: int  # channels per task
    rois: int
    pixels: int  # of an image
    bins: int  # of a box
    image_index: int  # address of the image of each box, int64
    argmax: int  # address of (R, C, Ph, Pw) int32
    grad_y: int  # address of (R, C, Ph, Pw)
    grad_x: int  # address of (N, C, H, W)
    stray: int  # address for a position outside the image, int64


@kernel
def add_at_maxima(one, params, counter, slot):
    """grad_x. A task is a block of channels of all images."""
    a = unpack(params, MaxBackwardCall)
    image_index, positions = pointer(a.image_index, np.int64(0)), pointer(a.argmax, np.int32(0))
    while True:
        task = next_task(counter)
        if task >= (a.channels + a.owned - 1) // a.owned:
            return
        first = task * a.owned
        count = min(a.owned, a.channels - first)
        for n in range(a.batch):
            fill(pointer(a.grad_x, one), (n * a.channels + first) * a.pixels, count * a.pixels, one - one)
        for r in range(a.rois):
            for c in range(first, first + count):
                plane = at(pointer(a.grad_x, one), (load_scalar(image_index, r) * a.channels + c) * a.pixels)
                start = (r * a.channels + c) * a.bins
                where, gradient = at(positions, start), at(pointer(a.grad_y, one), start)
                for b in range(a.bins):
                    pixel = np.int64(load_once(where, b))
                    if pixel >= 0 and pixel < a.pixels:
                        store(plane, pixel, load_scalar(plane, pixel) + load_scalar(gradient, b))
                    elif pixel != -1:
                        store(pointer(a.stray, np.int64(0)), 0, pixel)
