"""Position-sensitive RoI operators: each bin reads channels of its own, so planes are read where they lie, row by row.

A bin's columns become vectors of weights, with zeros, and lanes that are off, at pixels between them that no sample
touches. Planes have rows of adjacent pixels; masked loads touch no other memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numdcn._cpu.jit import block, kernel
from numdcn._cpu.lanes import sum1
from numdcn._cpu.layout import fill
from numdcn._cpu.parameters import Place, unpack
from numdcn._cpu.roi.bins import Grid, lists_at, plan_bin
from numdcn._cpu.simd import (
    at,
    full,
    load,
    load_masked,
    load_scalar,
    next_task,
    pointer,
    prefetch,
    store,
    store_masked,
    width,
)
from numdcn._formulas.jit import helper
from numdcn._formulas.vectors import fma, like


class PlanesCall(NamedTuple):
    """Parameters of `planes_forward` and `planes_backward`."""

    batch: int
    channels: int  # of y
    group_size: tuple[int, int]
    classes: int
    blocks: int  # of the channels of a class: a task of the backward owns one, for one cell of the groups
    block: int  # channels in a block
    grid: Grid
    mask: Place  # there is none
    x: Place  # (N, channels * group_size**2, H, W), adjacent pixels
    y: Place  # (R, channels, Ph, Pw); in the backward: its gradient
    grad_x: Place  # as x; nowhere: not wanted
    sums: int  # address of (classes, blocks, R, Ph, Pw, 2): gradients of a bin's shifts, x first; 0: not wanted
    slots: int
    slot_bytes: int
    lists_bytes: int
    itemsize: int


class Columns(NamedTuple):
    """The columns of a bin as vectors: pointers to weights, slopes, and 1 for those that are used."""

    weight: Any
    slope: Any
    used: Any
    first: int
    vectors: int


def columns_bytes(width_: int, itemsize: int) -> int:
    """Scratch for `Columns` of an image so wide."""
    return 3 * (width_ * itemsize + 128)


@helper
def columns_of(one, x, row, buffer):
    """The `Columns` of a bin's list along x; buffer: three rows."""
    weight, slope, used = buffer, at(buffer, row), at(buffer, 2 * row)
    zero, step = one - one, width(one)
    first, extent = 0, 0
    if x.length:
        first = load_scalar(x.index, 0)
        extent = load_scalar(x.index, x.length - 1) - first + 1
    vectors = (extent + step - 1) // step
    for i in range(vectors * step):
        store(weight, i, zero)
        store(slope, i, zero)
        store(used, i, zero)
    for k in range(x.length):
        i = load_scalar(x.index, k) - first
        store(weight, i, load_scalar(x.weight, k))
        store(slope, i, load_scalar(x.slope, k))
        store(used, i, one)
    return Columns(weight, slope, used, first, vectors)


@helper
def used_lanes(columns, v, one):
    """Which lanes of vector v are used."""
    return load(columns.used, v * width(one)) != full(one - one)


@block
def plane_bin(one, plane, pitch, y, columns):
    """The sum over rows and columns of weight * weight * pixel."""
    step, total = width(one), full(one - one)
    for v in range(columns.vectors):
        used, rows = used_lanes(columns, v, one), full(one - one)
        line = at(plane, columns.first + v * step)
        for i in range(y.length):
            pixels = load_masked(line, load_scalar(y.index, i) * pitch, used)
            rows = fma(like(load_scalar(y.weight, i), rows), pixels, rows)
        total = fma(rows, load(columns.weight, v * step), total)
    return sum1(total)


@block
def add_to_plane(plane, pitch, y, columns, gradient):
    """Add the gradient to a plane in the weights of a bin."""
    one = like(1.0, gradient)
    step = width(one)
    for v in range(columns.vectors):
        used = used_lanes(columns, v, one)
        line, share = at(plane, columns.first + v * step), load(columns.weight, v * step) * full(gradient)
        for i in range(y.length):
            row = load_scalar(y.index, i) * pitch
            total = fma(like(load_scalar(y.weight, i), share), share, load_masked(line, row, used))
            store_masked(line, row, total, used)


@block
def plane_slopes(one, plane, pitch, y, columns):
    """The slopes of `plane_bin` along x and y."""
    step, by_x, by_y = width(one), full(one - one), full(one - one)
    for v in range(columns.vectors):
        used, rows, sloped = used_lanes(columns, v, one), full(one - one), full(one - one)
        line = at(plane, columns.first + v * step)
        for i in range(y.length):
            pixels = load_masked(line, load_scalar(y.index, i) * pitch, used)
            rows = fma(like(load_scalar(y.weight, i), rows), pixels, rows)
            sloped = fma(like(load_scalar(y.slope, i), rows), pixels, sloped)
        by_x = fma(rows, load(columns.slope, v * step), by_x)
        by_y = fma(sloped, load(columns.weight, v * step), by_y)
    return sum1(by_x), sum1(by_y)


@helper
def plane_at(place, n, channel, group_size, cell, one):
    """The plane of an output channel for a cell of the groups."""
    number = channel * group_size[0] * group_size[1] + cell
    return at(pointer(place.address, one), n * place.strides[0] + number * place.strides[1])


@helper
def task_of(a, task):
    """The cell of the groups that a task owns, the bins along both axes that read it, its class, its channels, its number
    among the tasks of the cell."""
    cells = a.group_size[0] * a.group_size[1]
    cell, part, per_class = task % cells, task // cells, a.channels // a.classes
    y, x = cell // a.group_size[1], cell % a.group_size[1]
    rows = (_first(y, a.grid.bins[0], a.group_size[0]), _first(y + 1, a.grid.bins[0], a.group_size[0]))
    columns = (_first(x, a.grid.bins[1], a.group_size[1]), _first(x + 1, a.grid.bins[1], a.group_size[1]))
    class_ = part // a.blocks
    first = class_ * per_class + part % a.blocks * a.block
    return cell, rows, columns, class_, (first, min(first + a.block, (class_ + 1) * per_class)), part


@helper
def _first(cell, bins, cells):
    """The first bin that reads a cell: the least i with i * cells // bins >= cell."""
    return (cell * bins + cells - 1) // cells


@helper
def _fetch_planes(one, a, cell, channels):
    """Bring a task's planes near in their order, where the boxes will read most of them out of order."""
    step, height, width_ = 64 // a.itemsize, a.grid.size[0], a.grid.size[1]
    if a.grid.rois * 64 < a.batch * height * width_:
        return
    for n in range(a.batch):
        for c in range(channels[0], channels[1]):
            plane = plane_at(a.x, n, c, a.group_size, cell, one)
            for i in range(height):
                for j in range(0, width_, step):
                    prefetch(plane, i * a.x.strides[2] + j)


@kernel
def planes_forward(one, params, counter, slot):
    """y. A task is a cell of the groups and a block of channels of a class: its planes stay in the cache."""
    a = unpack(params, PlanesCall)
    grid, strides = a.grid, a.y.strides
    ys, xs = lists_at(a.slots + slot * a.slot_bytes, grid, one)
    buffer = pointer(a.slots + slot * a.slot_bytes + a.lists_bytes, one)
    row, images = (grid.size[1] // width(one) + 2) * width(one), pointer(grid.images, np.int64(0))
    while True:
        task = next_task(counter)
        if task >= a.group_size[0] * a.group_size[1] * a.classes * a.blocks:
            return
        cell, rows, columns, class_, channels, _ = task_of(a, task)
        _fetch_planes(one, a, cell, channels)
        for r in range(grid.rois):
            for i in range(rows[0], rows[1]):
                for j in range(columns[0], columns[1]):
                    y, x, _, divisor, nowhere = plan_bin(one, grid, a.mask, r, i, j, class_, ys, xs)
                    vectors, scale = columns_of(one, x, row, buffer), one / divisor
                    if nowhere:
                        scale = (one - one) / (one - one)
                    for c in range(channels[0], channels[1]):
                        plane = plane_at(a.x, load_scalar(images, r), c, a.group_size, cell, one)
                        value = plane_bin(one, plane, a.x.strides[2], y, vectors) * scale
                        spot = r * strides[0] + c * strides[1] + i * strides[2] + j * strides[3]
                        store(pointer(a.y.address, one), spot, value)


@helper
def _bin_backward(one, a, r, n, i, j, cell, channels, y, columns, scale, sums):
    """The gradients of a bin, for a task's channels."""
    strides = a.y.strides
    by_x, by_y = one - one, one - one
    for c in range(channels[0], channels[1]):
        spot = r * strides[0] + c * strides[1] + i * strides[2] + j * strides[3]
        gradient = load_scalar(pointer(a.y.address, one), spot) * scale
        if a.grad_x.address:
            plane = plane_at(a.grad_x, n, c, a.group_size, cell, one)
            add_to_plane(plane, a.grad_x.strides[2], y, columns, gradient)
        if a.sums:
            slopes = plane_slopes(one, plane_at(a.x, n, c, a.group_size, cell, one), a.x.strides[2], y, columns)
            by_x, by_y = fma(gradient, slopes[0], by_x), fma(gradient, slopes[1], by_y)
    if a.sums:
        store(sums, 0, by_x)
        store(sums, 1, by_y)


@kernel
def planes_backward(one, params, counter, slot):
    """The gradients. A task is a cell of the groups and a block of channels of a class, of all images."""
    a = unpack(params, PlanesCall)
    grid = a.grid
    ys, xs = lists_at(a.slots + slot * a.slot_bytes, grid, one)
    buffer = pointer(a.slots + slot * a.slot_bytes + a.lists_bytes, one)
    row, images = (grid.size[1] // width(one) + 2) * width(one), pointer(grid.images, np.int64(0))
    while True:
        task = next_task(counter)
        if task >= a.group_size[0] * a.group_size[1] * a.classes * a.blocks:
            return
        cell, rows, columns, class_, channels, part = task_of(a, task)
        for n in range(a.batch if a.grad_x.address else 0):
            for c in range(channels[0], channels[1]):
                for i in range(grid.size[0]):
                    plane = plane_at(a.grad_x, n, c, a.group_size, cell, one)
                    fill(plane, i * a.grad_x.strides[2], grid.size[1], one - one)
        for r in range(grid.rois):
            for i in range(rows[0], rows[1]):
                for j in range(columns[0], columns[1]):
                    y, x, _, divisor, nowhere = plan_bin(one, grid, a.mask, r, i, j, class_, ys, xs)
                    bin_ = ((part * grid.rois + r) * grid.bins[0] + i) * grid.bins[1] + j
                    sums = at(pointer(a.sums, one), bin_ * 2)
                    if nowhere:
                        fill(sums, 0, 2 if a.sums else 0, (one - one) / (one - one))
                        continue
                    vectors = columns_of(one, x, row, buffer)
                    _bin_backward(
                        one, a, r, load_scalar(images, r), i, j, cell, channels, y, vectors, one / divisor, sums
                    )  # fmt: skip
