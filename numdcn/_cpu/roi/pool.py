"""Kernels of RoI operators whose bins read every channel: bins as sums over channels-last images, and their gradients.

A forward computes y by tiles of the bins of a box: plan each bin, add up its pixels along the channels, transpose the
tile into y. The gradients of the bins' shifts and mask (`bin_gradients`) are sums over the same pixels, times grad_y.
That of the images is in `spread`.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from numdcn._cpu.jit import block, kernel
from numdcn._cpu.lanes import sum3
from numdcn._cpu.layout import Image, Matrix, fill, image_from
from numdcn._cpu.parameters import NOWHERE, Place, unpack
from numdcn._cpu.points_blocking import PointsBlocking
from numdcn._cpu.roi.bins import AXIS, REACH, Grid, lists_at, plan_next_bin
from numdcn._cpu.simd import at, full, load_like, load_scalar, narrow, next_task, pointer, store, width
from numdcn._cpu.tile import new_tile, place_tile
from numdcn._cpu.tile_io import PACKING_ELEMENTS, PackedGradient, pack_gradient, write_tile
from numdcn._formulas.jit import helper
from numdcn._formulas.vectors import fma, like

SUMMED = 256  # pixels added in a single chain


class PoolCall(NamedTuple):
    """Parameters of `pool_forward` and `bin_gradients`."""

    channels: int
    grid: Grid
    blocking: PointsBlocking
    mask: Place  # (R, 1, Ph, Pw); `NOWHERE`: none
    y: Place  # (R, C, 1, Ph*Pw); in the backward: its gradient
    grad_shifts: Place  # (R, 2, Ph, Pw), x first; `NOWHERE`: not wanted
    grad_mask: Place  # as mask; `NOWHERE`: not wanted
    images: int  # address of the zero-padded images
    workspaces: int  # address of the threads' workspaces


@helper
def _end_of_rows(first, y, x):
    """The end of the block of rows that starts at `first`: after about SUMMED pixels, if there are more."""
    if y.length * x.length <= SUMMED:
        return y.length
    return min(first + SUMMED // x.length + 1, y.length)


@helper
def _pool_four(vector, lanes, image, y, x, scale, target):
    """target = scale * the bin, for four vectors of channels: summed in blocks of rows, as a bin may be a whole
    image."""
    zero, first = vector - vector, 0
    total_a, total_b, total_c, total_d = zero, zero, zero, zero
    while first < y.length:
        a, b, c, d = zero, zero, zero, zero
        end = _end_of_rows(first, y, x)
        for i in range(first, end):
            line, weight = at(image.pointer, load_scalar(y.index, i) * image.row_stride), load_scalar(y.weight, i)
            for j in range(x.length):
                pixel = load_scalar(x.index, j) * image.pixel_stride
                w = like(weight * load_scalar(x.weight, j), vector)
                a = fma(w, load_like(line, pixel, vector), a)
                b = fma(w, load_like(line, pixel + lanes, vector), b)
                c = fma(w, load_like(line, pixel + 2 * lanes, vector), c)
                d = fma(w, load_like(line, pixel + 3 * lanes, vector), d)
        total_a, total_b, total_c, total_d = total_a + a, total_b + b, total_c + c, total_d + d
        first = end
    s = like(scale, vector)
    store(target, 0, total_a * s)
    store(target, lanes, total_b * s)
    store(target, 2 * lanes, total_c * s)
    store(target, 3 * lanes, total_d * s)


@helper
def _pool_one(vector, image, y, x, scale, target):
    """target = scale * the weighted sum of the pixels of a bin, for one vector of channels."""
    total, first = vector - vector, 0
    while first < y.length:
        subtotal, end = vector - vector, _end_of_rows(first, y, x)
        for i in range(first, end):
            line, weight = at(image.pointer, load_scalar(y.index, i) * image.row_stride), load_scalar(y.weight, i)
            for j in range(x.length):
                w = like(weight * load_scalar(x.weight, j), vector)
                subtotal = fma(w, load_like(line, load_scalar(x.index, j) * image.pixel_stride, vector), subtotal)
        total, first = total + subtotal, end
    store(target, 0, total * like(scale, vector))


@block
def pool_bin(image, y, x, count, scale, target):
    """target[c] = scale * sum over rows and columns of weight * weight * image[c], for c < count.

    The image starts at its pixel (0, 0).
    """
    one, c = like(1.0, scale), 0
    step = width(one)
    while c < count:
        source, spot, rest = image_from(image, c), at(target, c), count - c
        if rest >= 4 * step:
            _pool_four(full(one), step, source, y, x, scale, spot)
            c += 4 * step
        elif rest >= step:
            _pool_one(full(one), source, y, x, scale, spot)
            c += step
        elif step > 4 and rest >= 4:
            _pool_one(narrow(one, 4), source, y, x, scale, spot)
            c += 4
        else:
            _pool_one(one, source, y, x, scale, spot)
            c += 1


@helper
def mask_of(one, mask, grid, r, b):
    """The mask of bin number b of box r; 1 if there is none."""
    strides, scale = mask.strides, one
    if mask.address:
        i, j = b // grid.bins[1], b % grid.bins[1]
        scale = load_scalar(pointer(mask.address, one), r * strides[0] + i * strides[2] + j * strides[3])
    return scale


@kernel
def pool_forward(one, params, counter, slot):
    """y, box by box. A task is a tile of the bins of a box."""
    a = unpack(params, PoolCall)
    blocking, grid = a.blocking, a.grid
    base = a.workspaces + slot * blocking.workspace_bytes
    unplaced, samples = new_tile(base, one), Matrix(pointer(base + blocking.tile_bytes, one), blocking.pitch)
    buffer = at(samples.pointer, blocking.rows * samples.pitch)
    ys, xs = lists_at(base + blocking.tile_bytes + blocking.samples_bytes, grid, one)
    row, image_index = (grid.size[1] + 1) * a.channels, pointer(grid.image_index, np.int64(0))
    bins = (1, grid.bins[0] * grid.bins[1])
    while True:
        task = next_task(counter)
        if task >= grid.rois * blocking.tiling.tiles:
            return
        r, number = task // blocking.tiling.tiles, task % blocking.tiling.tiles
        tile = place_tile(unplaced, blocking.tiling, number, bins, (0, 0), (0, 0))
        first = number * blocking.tiling.tile_columns
        start = load_scalar(image_index, r) * blocking.image_size + row + a.channels
        image = Image(at(pointer(a.images, one), start), a.channels, row)
        for c in range(0, a.channels, blocking.panel):
            count = min(blocking.panel, a.channels - c)
            for p in range(tile.pixels):
                y, x, divisor, nowhere = plan_next_bin(one, grid, r, first + p, first, ys, xs)
                target = at(samples.pointer, p * samples.pitch)
                if nowhere:
                    fill(target, 0, count, (one - one) / (one - one))
                else:
                    scale = mask_of(one, a.mask, grid, r, first + p) / divisor
                    pool_bin(image_from(image, c), y, x, count, scale, target)
            write_tile(one, one, a.y, NOWHERE, r, c, count, tile, samples, buffer)


@helper
def _add_products(vector, image, y, x, gradient, sums):
    """Add to three sums, for one vector of channels or a scalar, gradient * pixel summed over the pixels of a bin, weighted
    as in the value, by the slope along y, and by the slope along x."""
    zero = vector - vector
    by_value, by_y, by_x = zero, zero, zero
    for i in range(y.length):
        line = at(image.pointer, load_scalar(y.index, i) * image.row_stride)
        in_row, sloped = zero, zero
        for j in range(x.length):
            product = gradient * load_like(line, load_scalar(x.index, j) * image.pixel_stride, vector)
            in_row = fma(like(load_scalar(x.weight, j), vector), product, in_row)
            sloped = fma(like(load_scalar(x.slope, j), vector), product, sloped)
        by_value = fma(like(load_scalar(y.weight, i), vector), in_row, by_value)
        by_y = fma(like(load_scalar(y.slope, i), vector), in_row, by_y)
        by_x = fma(like(load_scalar(y.weight, i), vector), sloped, by_x)
    return sums[0] + by_value, sums[1] + by_y, sums[2] + by_x


@block
def add_bin_sums(image, y, x, count, gradient, sums):
    """Add to three numbers, `sums`, those of `_add_products` over all channels."""
    one, c = load_scalar(gradient, 0), 0
    step, zero = width(one), full(like(0.0, one))
    value, by_y, by_x = load_scalar(sums, 0), load_scalar(sums, 1), load_scalar(sums, 2)
    if y.length == 0 or x.length == 0:  # the mean and its slopes are 0, but a gradient times 0 may be NaN
        for i in range(count):
            value = value + load_scalar(gradient, i) * like(0.0, one)
        fill(sums, 0, 3, value)
        return
    vectors = zero, zero, zero
    while c + step <= count:
        vectors = _add_products(zero, image_from(image, c), y, x, load_like(gradient, c, zero), vectors)
        c += step
    wide = sum3(vectors[0], vectors[1], vectors[2])
    scalars = value + wide[0], by_y + wide[1], by_x + wide[2]
    while c < count:
        scalars = _add_products(one, image_from(image, c), y, x, load_scalar(gradient, c), scalars)
        c += 1
    store(sums, 0, scalars[0])
    store(sums, 1, scalars[1])
    store(sums, 2, scalars[2])


@helper
def _store_gradients(one, a, r, b, sums, divisor, nowhere):
    """Store the gradients of the shifts and the mask of bin number b of box r."""
    grid, scale = a.grid, mask_of(one, a.mask, a.grid, r, b)
    i, j = b // grid.bins[1], b % grid.bins[1]
    box, missing = at(pointer(grid.geometry, one), 2 * r * AXIS), (one - one) / (one - one)
    for axis in range(2 if a.grad_shifts.address else 0):  # x, then y
        strides = a.grad_shifts.strides
        slope, reach = load_scalar(sums, 2 - axis) / divisor, load_scalar(box, (1 - axis) * AXIS + REACH)
        spot = r * strides[0] + axis * strides[1] + i * strides[2] + j * strides[3]
        store(pointer(a.grad_shifts.address, one), spot, missing if nowhere else slope * scale * reach)
    if a.grad_mask.address:
        strides = a.grad_mask.strides
        spot = r * strides[0] + i * strides[2] + j * strides[3]
        store(pointer(a.grad_mask.address, one), spot, missing if nowhere else load_scalar(sums, 0) / divisor)


@kernel
def bin_gradients(one, params, counter, slot):
    """The gradients of the bins' shifts and mask. A task is a tile of the bins of a box."""
    a = unpack(params, PoolCall)
    blocking, grid = a.blocking, a.grid
    base = a.workspaces + slot * blocking.workspace_bytes
    unplaced, buffer = new_tile(base, one), pointer(base + blocking.tile_bytes, one)
    gradients, sums = at(buffer, PACKING_ELEMENTS), unplaced.rows  # of the tile, only the runs are needed
    ys, xs = lists_at(base + blocking.tile_bytes + blocking.samples_bytes, grid, one)
    row, image_index = (grid.size[1] + 1) * a.channels, pointer(grid.image_index, np.int64(0))
    bins = (1, grid.bins[0] * grid.bins[1])
    while True:
        task = next_task(counter)
        if task >= grid.rois * blocking.tiling.tiles:
            return
        r, number = task // blocking.tiling.tiles, task % blocking.tiling.tiles
        tile = place_tile(unplaced, blocking.tiling, number, bins, (0, 0), (0, 0))
        first = number * blocking.tiling.tile_columns
        start = load_scalar(image_index, r) * blocking.image_size + row + a.channels
        image = Image(at(pointer(a.images, one), start), a.channels, row)
        fill(sums, 0, 3 * tile.pixels, one - one)
        for c in range(0, a.channels, blocking.panel):
            count = min(blocking.panel, a.channels - c)
            target = PackedGradient(gradients, blocking.pitch, blocking.rows)
            pack_gradient(one, a.y, r, c, count, tile, target, buffer)
            for p in range(tile.pixels):
                y, x, divisor, nowhere = plan_next_bin(one, grid, r, first + p, first, ys, xs)
                if not nowhere:
                    add_bin_sums(image_from(image, c), y, x, count, at(gradients, p * blocking.pitch), at(sums, 3 * p))
                if c + count == a.channels:
                    _store_gradients(one, a, r, first + p, at(sums, 3 * p), divisor, nowhere)
