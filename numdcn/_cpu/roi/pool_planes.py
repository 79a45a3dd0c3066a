"""Kernels of position-sensitive RoI operators: each bin reads channels of its own, so planes are read in place.

A bin's columns become vectors of weights; pixels between them that no sample touches have weight zero and their lanes
off. Planes have rows of adjacent pixels; masked loads touch no other memory.
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
    group_size: tuple[int, int]  # cells of a box, each with channels of its own, along y and x
    classes: int
    blocks: int  # per class: a task of the backward owns one, for one cell of the groups
    block: int  # channels per block
    grid: Grid
    x: Place  # (N, channels * group_size**2, H, W), adjacent pixels
    y: Place  # (R, channels, Ph, Pw); in the backward: its gradient
    grad_x: Place  # as x; `NOWHERE`: not wanted
    sums: int  # address of (classes, blocks, R, Ph, Pw, 2): gradients of a bin's shifts, x first; 0: not wanted
    workspaces: int  # address of the threads' workspaces
    workspace_bytes: int  # per thread
    lists_bytes: int  # of these, for lists
    itemsize: int


class BinColumns(NamedTuple):
    """The columns of a bin as vectors. The first three fields are pointers to one number per column."""

    weight: Any
    slope: Any
    used: Any  # 1 if a sample touches the column, else 0
    first: int  # column
    vectors: int


class Share(NamedTuple):
    """The share of a task: a cell of the groups, and a block of channels of a class."""

    cell: int
    rows: tuple[int, int]  # bins that read the cell, along y
    columns: tuple[int, int]  # along x
    class_: int
    channels: tuple[int, int]  # of y
    block: int  # index of the block, over all classes


def columns_bytes(width_: int, itemsize: int) -> int:
    """Bytes of the `BinColumns` for an image of this width, in a workspace."""
    return 3 * (width_ * itemsize + 128)


@helper
def columns_of(one, x, pitch, buffer):
    """The `BinColumns` for a bin's list along x. `buffer` has room for three times `pitch` elements."""
    weight, slope, used = buffer, at(buffer, pitch), at(buffer, 2 * pitch)
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
    return BinColumns(weight, slope, used, first, vectors)


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
    """Add the gradient, times the weights of a bin, to a plane."""
    one = like(1.0, gradient)
    step = width(one)
    for v in range(columns.vectors):
        used = used_lanes(columns, v, one)
        line, weighted = at(plane, columns.first + v * step), load(columns.weight, v * step) * full(gradient)
        for i in range(y.length):
            row = load_scalar(y.index, i) * pitch
            total = fma(like(load_scalar(y.weight, i), weighted), weighted, load_masked(line, row, used))
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
def share_of(a, task):
    """The share of a task."""
    cells = a.group_size[0] * a.group_size[1]
    cell, block_, per_class = task % cells, task // cells, a.channels // a.classes
    y, x = cell // a.group_size[1], cell % a.group_size[1]
    rows = (_first(y, a.grid.bins[0], a.group_size[0]), _first(y + 1, a.grid.bins[0], a.group_size[0]))
    columns = (_first(x, a.grid.bins[1], a.group_size[1]), _first(x + 1, a.grid.bins[1], a.group_size[1]))
    class_ = block_ // a.blocks
    first = class_ * per_class + block_ % a.blocks * a.block
    return Share(cell, rows, columns, class_, (first, min(first + a.block, (class_ + 1) * per_class)), block_)


@helper
def _first(cell, bins, cells):
    """The first bin that reads a cell: the smallest i with i * cells // bins >= cell."""
    return (cell * bins + cells - 1) // cells


@helper
def _fetch_planes(one, a, share):
    """Prefetch a task's planes in order, if the boxes will read most of them out of order."""
    step, height, width_ = 64 // a.itemsize, a.grid.size[0], a.grid.size[1]
    if a.grid.rois * 64 < a.batch * height * width_:
        return
    for n in range(a.batch):
        for c in range(share.channels[0], share.channels[1]):
            plane = plane_at(a.x, n, c, a.group_size, share.cell, one)
            for i in range(height):
                for j in range(0, width_, step):
                    prefetch(plane, i * a.x.strides[2] + j)


@kernel
def planes_forward(one, params, counter, slot):
    """y. A task is a cell of the groups and a block of channels of a class, so that its planes stay in the cache."""
    a = unpack(params, PlanesCall)
    grid, strides = a.grid, a.y.strides
    ys, xs = lists_at(a.workspaces + slot * a.workspace_bytes, grid, one)
    buffer = pointer(a.workspaces + slot * a.workspace_bytes + a.lists_bytes, one)
    pitch, image_index = (grid.size[1] // width(one) + 2) * width(one), pointer(grid.image_index, np.int64(0))
    while True:
        task = next_task(counter)
        if task >= a.group_size[0] * a.group_size[1] * a.classes * a.blocks:
            return
        share = share_of(a, task)
        _fetch_planes(one, a, share)
        for r in range(grid.rois):
            for i in range(share.rows[0], share.rows[1]):
                for j in range(share.columns[0], share.columns[1]):
                    y, x, divisor, nowhere = plan_bin(one, grid, r, i, j, share.class_, ys, xs)
                    columns, scale = columns_of(one, x, pitch, buffer), one / divisor
                    if nowhere:
                        scale = (one - one) / (one - one)
                    for c in range(share.channels[0], share.channels[1]):
                        plane = plane_at(a.x, load_scalar(image_index, r), c, a.group_size, share.cell, one)
                        value = plane_bin(one, plane, a.x.strides[2], y, columns) * scale
                        spot = r * strides[0] + c * strides[1] + i * strides[2] + j * strides[3]
                        store(pointer(a.y.address, one), spot, value)


@helper
def _bin_backward(one, a, share, n, grad_y, y, columns, scale, sums):
    """The gradients of a bin of a box on image n, for a task's channels; `grad_y` points to the bin's in channel 0."""
    by_x, by_y = one - one, one - one
    for c in range(share.channels[0], share.channels[1]):
        gradient = load_scalar(grad_y, c * a.y.strides[1]) * scale
        if a.grad_x.address:
            plane = plane_at(a.grad_x, n, c, a.group_size, share.cell, one)
            add_to_plane(plane, a.grad_x.strides[2], y, columns, gradient)
        if a.sums:
            plane = plane_at(a.x, n, c, a.group_size, share.cell, one)
            slopes = plane_slopes(one, plane, a.x.strides[2], y, columns)
            by_x, by_y = fma(gradient, slopes[0], by_x), fma(gradient, slopes[1], by_y)
    if a.sums:
        store(sums, 0, by_x)
        store(sums, 1, by_y)


@kernel
def planes_backward(one, params, counter, slot):
    """The gradients. A task is a cell of the groups and a block of channels of a class, over all images."""
    a = unpack(params, PlanesCall)
    grid = a.grid
    ys, xs = lists_at(a.workspaces + slot * a.workspace_bytes, grid, one)
    buffer = pointer(a.workspaces + slot * a.workspace_bytes + a.lists_bytes, one)
    pitch, image_index = (grid.size[1] // width(one) + 2) * width(one), pointer(grid.image_index, np.int64(0))
    while True:
        task = next_task(counter)
        if task >= a.group_size[0] * a.group_size[1] * a.classes * a.blocks:
            return
        share = share_of(a, task)
        for n in range(a.batch if a.grad_x.address else 0):
            for c in range(share.channels[0], share.channels[1]):
                for i in range(grid.size[0]):
                    plane = plane_at(a.grad_x, n, c, a.group_size, share.cell, one)
                    fill(plane, i * a.grad_x.strides[2], grid.size[1], one - one)
        for r in range(grid.rois):
            for i in range(share.rows[0], share.rows[1]):
                for j in range(share.columns[0], share.columns[1]):
                    y, x, divisor, nowhere = plan_bin(one, grid, r, i, j, share.class_, ys, xs)
                    bin_ = ((share.block * grid.rois + r) * grid.bins[0] + i) * grid.bins[1] + j
                    sums = at(pointer(a.sums, one), bin_ * 2)
                    if nowhere:
                        fill(sums, 0, 2 if a.sums else 0, (one - one) / (one - one))
                        continue
                    columns = columns_of(one, x, pitch, buffer)
                    spot = r * a.y.strides[0] + i * a.y.strides[2] + j * a.y.strides[3]
                    grad_y = at(pointer(a.y.address, one), spot)
                    _bin_backward(one, a, share, load_scalar(image_index, r), grad_y, y, columns, one / divisor, sums)
