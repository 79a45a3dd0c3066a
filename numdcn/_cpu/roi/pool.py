"""RoI operators whose bins read every channel: bins as sums over channels-last images, and their gradients."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from numdcn._cpu.blocking import PointsBlocking
from numdcn._cpu.conv.columns import pack_gradient, write_tile
from numdcn._cpu.jit import block, kernel
from numdcn._cpu.lanes import sum3
from numdcn._cpu.layout import fill, padded_pixels
from numdcn._cpu.parameters import Place, unpack
from numdcn._cpu.roi.bins import Grid, lists_at, plan_next_bin
from numdcn._cpu.simd import at, full, load_like, load_scalar, next_task, part, pointer, store, width
from numdcn._cpu.tile import ROW, place_tile, tile_at
from numdcn._formulas.jit import helper
from numdcn._formulas.vectors import fma, like

SUMMED = 256  # pixels that are added one by one


class PoolCall(NamedTuple):
    """Parameters of `pool_forward` and `pool_backward`."""

    batch: int
    channels: int
    grid: Grid
    blocking: PointsBlocking
    mask: Place  # (R, 1, Ph, Pw)
    bias: Place  # there is none
    y: Place  # (R, C, 1, Ph*Pw); in the backward: its gradient
    images: int  # addresses: zero-padded images,
    grad_images: int  # their gradients; 0: not wanted,
    sums: int  # in the backward: (blocks, R, Ph*Pw, 3): of grad_y times sample, slope along y, along x; 0: not wanted,
    slots: int  # scratch of the threads


@helper
def _end_of_rows(first, y, x):
    """Where the block of rows ends that begins at `first`: after about SUMMED pixels, where there are more."""
    if y.length * x.length <= SUMMED:
        return y.length
    return min(first + SUMMED // x.length + 1, y.length)


@helper
def _pool_four(kind, lanes, image, y, x, row, channels, scale, target):
    """target = scale * the bin, for four vectors of channels: the sum of blocks of rows, as a bin may be a whole image."""
    zero, first = kind - kind, 0
    total_a, total_b, total_c, total_d = zero, zero, zero, zero
    while first < y.length:
        a, b, c, d = zero, zero, zero, zero
        end = _end_of_rows(first, y, x)
        for i in range(first, end):
            line, weight = at(image, load_scalar(y.index, i) * row), load_scalar(y.weight, i)
            for j in range(x.length):
                pixel = load_scalar(x.index, j) * channels
                w = like(weight * load_scalar(x.weight, j), kind)
                a = fma(w, load_like(line, pixel, kind), a)
                b = fma(w, load_like(line, pixel + lanes, kind), b)
                c = fma(w, load_like(line, pixel + 2 * lanes, kind), c)
                d = fma(w, load_like(line, pixel + 3 * lanes, kind), d)
        total_a, total_b, total_c, total_d = total_a + a, total_b + b, total_c + c, total_d + d
        first = end
    s = like(scale, kind)
    store(target, 0, total_a * s)
    store(target, lanes, total_b * s)
    store(target, 2 * lanes, total_c * s)
    store(target, 3 * lanes, total_d * s)


@helper
def _pool_one(kind, image, y, x, row, channels, scale, target):
    """The same for one vector of channels."""
    total, first = kind - kind, 0
    while first < y.length:
        part_, end = kind - kind, _end_of_rows(first, y, x)
        for i in range(first, end):
            line, weight = at(image, load_scalar(y.index, i) * row), load_scalar(y.weight, i)
            for j in range(x.length):
                w = like(weight * load_scalar(x.weight, j), kind)
                part_ = fma(w, load_like(line, load_scalar(x.index, j) * channels, kind), part_)
        total, first = total + part_, end
    store(target, 0, total * like(scale, kind))


@block
def pool_bin(image, y, x, row, channels, count, scale, target):
    """target[c] = scale * sum over rows and columns of weight * weight * image[c], for c < count.

    `row`: elements from a row of the image to the next; `channels`: from a pixel to the next.
    """
    one, c = like(1.0, scale), 0
    step = width(one)
    while c < count:
        source, spot, rest = at(image, c), at(target, c), count - c
        if rest >= 4 * step:
            _pool_four(full(one), step, source, y, x, row, channels, scale, spot)
            c += 4 * step
        elif rest >= step:
            _pool_one(full(one), source, y, x, row, channels, scale, spot)
            c += step
        elif step > 4 and rest >= 4:
            _pool_one(part(one, 4), source, y, x, row, channels, scale, spot)
            c += 4
        else:
            _pool_one(one, source, y, x, row, channels, scale, spot)
            c += 1


@kernel
def pool_forward(one, params, counter, slot):
    """y, box by box. A task is a tile of the bins of a box."""
    a = unpack(params, PoolCall)
    blocking, grid = a.blocking, a.grid
    base = a.slots + slot * blocking.slot_bytes
    tile, samples = tile_at(base, one), pointer(base + blocking.tile_bytes, one)
    buffer = at(samples, blocking.rows * blocking.pitch)
    ys, xs = lists_at(base + blocking.tile_bytes + blocking.samples_bytes, grid, one)
    row, images = (grid.size[1] + 1) * a.channels, pointer(grid.images, np.int64(0))
    bins = (1, grid.bins[0] * grid.bins[1])
    while True:
        task = next_task(counter)
        if task >= grid.rois * blocking.tiles:
            return
        r = task // blocking.tiles
        runs, pixels = place_tile(tile, blocking, task % blocking.tiles, bins, (0, 0), (0, 0))
        first = task % blocking.tiles * blocking.tile_columns
        image = at(pointer(a.images, one), load_scalar(images, r) * blocking.image_size + row + a.channels)
        for c in range(0, a.channels, blocking.panel):
            count = min(blocking.panel, a.channels - c)
            for p in range(pixels):
                y, x, mask, divisor, nowhere = plan_next_bin(one, grid, a.mask, r, first + p, first, ys, xs)
                target = at(samples, p * blocking.pitch)
                if nowhere:
                    fill(target, 0, count, (one - one) / (one - one))
                else:
                    pool_bin(at(image, c), y, x, row, a.channels, count, mask / divisor, target)
            write_tile(one, a, r, c, count, tile, runs, pixels, samples, blocking.pitch, buffer, False)


@helper
def _pool_vector_backward(kind, image, grad_image, wanted, y, x, row, channels, gradient, scale):
    """Add scale * gradient to the image's gradient in the weights of a bin; returns the sums over the bin's pixels of
    gradient times the pixel in the weights of the value, of the slope along y, and along x; `wanted`: which of both."""
    zero = like(0.0, gradient)
    by_value, by_y, by_x, scaled = zero, zero, zero, gradient * like(scale, kind)
    for i in range(y.length):
        start, weight_y, slope_y = load_scalar(y.index, i) * row, load_scalar(y.weight, i), load_scalar(y.slope, i)
        if wanted[0]:
            for j in range(x.length):
                spot, w = start + load_scalar(x.index, j) * channels, like(weight_y * load_scalar(x.weight, j), kind)
                store(grad_image, spot, fma(w, scaled, load_like(grad_image, spot, kind)))
        if wanted[1]:
            in_row, sloped = zero, zero
            for j in range(x.length):
                product = gradient * load_like(image, start + load_scalar(x.index, j) * channels, kind)
                in_row = fma(like(load_scalar(x.weight, j), kind), product, in_row)
                sloped = fma(like(load_scalar(x.slope, j), kind), product, sloped)
            by_value = fma(like(weight_y, kind), in_row, by_value)
            by_y = fma(like(slope_y, kind), in_row, by_y)
            by_x = fma(like(weight_y, kind), sloped, by_x)
    return sum3(by_value, by_y, by_x)


@block
def pool_bin_backward(image, grad_image, wanted, y, x, row, channels, count, gradient, scale, sums):
    """The backward of `pool_bin`: adds to `grad_image`, and to `sums` (three numbers), each if `wanted`."""
    one, c = like(1.0, scale), 0
    step = width(one)
    if y.length == 0 or x.length == 0:  # the mean and its slopes are 0, but a gradient times 0 may be NaN
        nothing = one - one
        for i in range(count if wanted[1] else 0):
            nothing = nothing + load_scalar(gradient, i) * (one - one)
        fill(sums, 0, 3 if wanted[1] else 0, nothing)
        return
    while c < count:
        x_c, g_c, rest = at(image, c), at(grad_image, c), count - c
        if rest >= step:
            g = load_like(gradient, c, full(one))
            value, by_y, by_x = _pool_vector_backward(full(one), x_c, g_c, wanted, y, x, row, channels, g, scale)
            c += step
        elif step > 4 and rest >= 4:
            g = load_like(gradient, c, part(one, 4))
            value, by_y, by_x = _pool_vector_backward(part(one, 4), x_c, g_c, wanted, y, x, row, channels, g, scale)
            c += 4
        else:
            g = load_scalar(gradient, c)
            value, by_y, by_x = _pool_vector_backward(one, x_c, g_c, wanted, y, x, row, channels, g, scale)
            c += 1
        if wanted[1]:
            store(sums, 0, load_scalar(sums, 0) + value)
            store(sums, 1, load_scalar(sums, 1) + by_y)
            store(sums, 2, load_scalar(sums, 2) + by_x)


@kernel
def pool_backward(one, params, counter, slot):
    """The gradients. A task is a block of channels of an image, with all boxes on it."""
    a = unpack(params, PoolCall)
    blocking, grid = a.blocking, a.grid
    base = a.slots + slot * blocking.slot_bytes
    tile, lines = tile_at(base, one), pointer(base + blocking.tile_bytes, one)
    buffer, gradients = at(lines, 16 * ROW), at(lines, 16 * ROW + 256)
    ys, xs = lists_at(base + blocking.tile_bytes + blocking.samples_bytes, grid, one)
    images, many = pointer(grid.images, np.int64(0)), grid.bins[0] * grid.bins[1]
    nan, wanted = (one - one) / (one - one), (a.grad_images != 0, a.sums != 0)
    while True:
        task = next_task(counter)
        if task >= a.batch * blocking.blocks:
            return
        n, number = task // blocking.blocks, task % blocking.blocks
        channel = number * blocking.panel
        count = min(blocking.panel, a.channels - channel)
        row = (grid.size[1] + 1) * count
        start = n * blocking.image_size + channel * padded_pixels(grid.size) + row + count
        image, grad_image = at(pointer(a.images, one), start), at(pointer(a.grad_images, one), start)
        for r in range(grid.rois):
            for number_ in range(blocking.tiles if load_scalar(images, r) == n else 0):
                runs, pixels = place_tile(tile, blocking, number_, (1, many), (0, 0), (0, 0))
                first = number_ * blocking.tile_columns
                pack_gradient(
                    one, a.y, r, channel, count, blocking, (False, True), tile, runs, pixels, lines, gradients, gradients, buffer
                )  # fmt: skip
                for p in range(pixels):
                    y, x, mask, divisor, nowhere = plan_next_bin(one, grid, a.mask, r, first + p, first, ys, xs)
                    sums = at(pointer(a.sums, one), ((number * grid.rois + r) * many + first + p) * 3)
                    if wanted[1]:
                        fill(sums, 0, 3, nan if nowhere else one - one)
                    if not nowhere:
                        g = at(gradients, p * blocking.panel)
                        pool_bin_backward(
                            image, grad_image, wanted, y, x, row, count, count, g, mask / divisor, sums
                        )  # fmt: skip
