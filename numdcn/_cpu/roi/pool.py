"""Kernels of RoI operators whose bins read every channel: bins as sums over channels-last images, and their gradients.

A forward computes y by tiles of the bins of a box: plan each bin, add up its pixels along the channels, transpose the
tile into y. A backward does the same for a block of channels of an image, owned by a task, with all its boxes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from numdcn._cpu.jit import block, kernel
from numdcn._cpu.lanes import sum3
from numdcn._cpu.layout import GradientSink, Image, Matrix, fill, image_from, padded_pixels, sink_from
from numdcn._cpu.parameters import NOWHERE, Place, unpack
from numdcn._cpu.points_blocking import PointsBlocking
from numdcn._cpu.roi.bins import Grid, lists_at, plan_next_bin
from numdcn._cpu.simd import at, full, load_like, load_scalar, narrow, next_task, pointer, store, width
from numdcn._cpu.tile import new_tile, place_tile
from numdcn._cpu.tile_io import PACKING_ELEMENTS, gradient_rows, pack_gradient, write_tile
from numdcn._formulas.jit import helper
from numdcn._formulas.vectors import fma, like

SUMMED = 256  # pixels added in a single chain


class PoolCall(NamedTuple):
    """Parameters of `pool_forward` and `pool_backward`."""

    batch: int
    channels: int
    grid: Grid
    blocking: PointsBlocking
    mask: Place  # (R, 1, Ph, Pw); `NOWHERE`: none
    y: Place  # (R, C, 1, Ph*Pw); in the backward: its gradient
    images: int  # address of the zero-padded images
    grad_images: int  # address of their gradients; 0: not wanted
    sums: int  # address of (blocks, R, Ph*Pw, 3): grad_y times sample, slope along y, along x; 0: not wanted
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
            write_tile(one, a.y, NOWHERE, r, c, count, tile, samples, buffer)


@helper
def _pool_vector_backward(vector, sink, y, x, gradient, scale, with_sums):
    """Add scale * gradient, times the weights of a bin, to the image's gradient, if wanted. Returns the sums over the
    bin's pixels of gradient * pixel, weighted as in the value, the slope along y, and the slope along x, if wanted."""
    image, zero = sink.image, like(0.0, gradient)
    by_value, by_y, by_x, scaled = zero, zero, zero, gradient * like(scale, vector)
    for i in range(y.length):
        start = load_scalar(y.index, i) * image.row_stride
        weight_y, slope_y = load_scalar(y.weight, i), load_scalar(y.slope, i)
        if sink.wanted:
            for j in range(x.length):
                spot = start + load_scalar(x.index, j) * image.pixel_stride
                w = like(weight_y * load_scalar(x.weight, j), vector)
                store(sink.grad, spot, fma(w, scaled, load_like(sink.grad, spot, vector)))
        if with_sums:
            in_row, sloped = zero, zero
            for j in range(x.length):
                spot = start + load_scalar(x.index, j) * image.pixel_stride
                product = gradient * load_like(image.pointer, spot, vector)
                in_row = fma(like(load_scalar(x.weight, j), vector), product, in_row)
                sloped = fma(like(load_scalar(x.slope, j), vector), product, sloped)
            by_value = fma(like(weight_y, vector), in_row, by_value)
            by_y = fma(like(slope_y, vector), in_row, by_y)
            by_x = fma(like(weight_y, vector), sloped, by_x)
    return sum3(by_value, by_y, by_x)


@block
def pool_bin_backward(sink, y, x, count, gradient, scale, sums, with_sums):
    """The backward of `pool_bin`: adds to the image's gradient and to `sums` (three numbers), each if wanted."""
    one, c = like(1.0, scale), 0
    step = width(one)
    if y.length == 0 or x.length == 0:  # the mean and its slopes are 0, but a gradient times 0 may be NaN
        nothing = one - one
        for i in range(count if with_sums else 0):
            nothing = nothing + load_scalar(gradient, i) * (one - one)
        fill(sums, 0, 3 if with_sums else 0, nothing)
        return
    while c < count:
        source, rest = sink_from(sink, c), count - c
        if rest >= step:
            g = load_like(gradient, c, full(one))
            value, by_y, by_x = _pool_vector_backward(full(one), source, y, x, g, scale, with_sums)
            c += step
        elif step > 4 and rest >= 4:
            g = load_like(gradient, c, narrow(one, 4))
            value, by_y, by_x = _pool_vector_backward(narrow(one, 4), source, y, x, g, scale, with_sums)
            c += 4
        else:
            g = load_scalar(gradient, c)
            value, by_y, by_x = _pool_vector_backward(one, source, y, x, g, scale, with_sums)
            c += 1
        if with_sums:
            store(sums, 0, load_scalar(sums, 0) + value)
            store(sums, 1, load_scalar(sums, 1) + by_y)
            store(sums, 2, load_scalar(sums, 2) + by_x)


@kernel
def pool_backward(one, params, counter, slot):
    """The gradients. A task is a block of channels of an image, with all its boxes."""
    a = unpack(params, PoolCall)
    blocking, grid = a.blocking, a.grid
    base = a.workspaces + slot * blocking.workspace_bytes
    unplaced, buffer = new_tile(base, one), pointer(base + blocking.tile_bytes, one)
    gradients = at(buffer, PACKING_ELEMENTS)
    ys, xs = lists_at(base + blocking.tile_bytes + blocking.samples_bytes, grid, one)
    image_index, bins = pointer(grid.image_index, np.int64(0)), grid.bins[0] * grid.bins[1]
    nan, with_sums = (one - one) / (one - one), a.sums != 0
    while True:
        task = next_task(counter)
        if task >= a.batch * blocking.blocks:
            return
        n, block_ = task // blocking.blocks, task % blocking.blocks
        channel = block_ * blocking.panel
        count = min(blocking.panel, a.channels - channel)
        row = (grid.size[1] + 1) * count
        start = n * blocking.image_size + channel * padded_pixels(grid.size) + row + count
        image = Image(at(pointer(a.images, one), start), count, row)
        sink = GradientSink(image, at(pointer(a.grad_images, one), start), row, a.grad_images != 0)
        for r in range(grid.rois):
            for number in range(blocking.tiling.tiles if load_scalar(image_index, r) == n else 0):
                tile = place_tile(unplaced, blocking.tiling, number, (1, bins), (0, 0), (0, 0))
                first = number * blocking.tiling.tile_columns
                target = gradient_rows(gradients, blocking.panel, blocking.rows)
                pack_gradient(one, a.y, r, channel, count, tile, target, buffer)
                for p in range(tile.pixels):
                    y, x, divisor, nowhere = plan_next_bin(one, grid, r, first + p, first, ys, xs)
                    sums = at(pointer(a.sums, one), ((block_ * grid.rois + r) * bins + first + p) * 3)
                    if with_sums:
                        fill(sums, 0, 3, nan if nowhere else one - one)
                    if not nowhere:
                        g = at(gradients, p * blocking.panel)
                        scale = mask_of(one, a.mask, grid, r, first + p) / divisor
                        pool_bin_backward(sink, y, x, count, g, scale, sums, with_sums)
