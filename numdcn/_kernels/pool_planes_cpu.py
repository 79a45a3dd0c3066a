"""Position-sensitive RoI operators: each bin reads channels of its own, so planes are read where they lie, row by row.

A bin's columns become vectors of weights, with zeros, and lanes that are off, at pixels between them that no sample
touches. Planes have rows of adjacent pixels; masked loads touch no other memory.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numdcn._kernels.bins_cpu import Grid, lists_at, plan_bin
from numdcn._kernels.jit_cpu import block, helper, kernel
from numdcn._kernels.layout_cpu import fill
from numdcn._kernels.parameters_cpu import Place, unpack
from numdcn._kernels.simd_cpu import (
    at,
    fma,
    full,
    like,
    load,
    load_masked,
    load_scalar,
    next_task,
    pointer,
    store,
    store_masked,
    sum1,
    width,
)


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


class Columns(NamedTuple):
    """The columns of a bin as vectors: pointers to weights, slopes, and 1 for those that are used."""

    weight: Any
    slope: Any
    used: Any
    first: int
    vectors: int


def columns_bytes(width_: int) -> int:
    """Scratch for `Columns` of an image so wide."""
    return 3 * (width_ * 8 + 128)


@helper
def columns_of(one, x, row, buffer):  # type: ignore[no-untyped-def]
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
def used_lanes(columns, v, one):  # type: ignore[no-untyped-def]
    """Which lanes of vector v are used."""
    return load(columns.used, v * width(one)) != full(one - one)


@block
def plane_bin(one, plane, pitch, y, columns):  # type: ignore[no-untyped-def]
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
def add_to_plane(plane, pitch, y, columns, gradient):  # type: ignore[no-untyped-def]
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
def plane_slopes(one, plane, pitch, y, columns):  # type: ignore[no-untyped-def]
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
def plane_at(place, n, channel, group_size, cell, one):  # type: ignore[no-untyped-def]
    """The plane of an output channel for a cell of the groups."""
    number = channel * group_size[0] * group_size[1] + cell
    return at(pointer(place.address, one), n * place.strides[0] + number * place.strides[1])


@helper
def cell_of(a, i, j):  # type: ignore[no-untyped-def]
    """The cell of the groups that bin (i, j) reads."""
    return i * a.group_size[0] // a.grid.bins[0] * a.group_size[1] + j * a.group_size[1] // a.grid.bins[1]


@kernel
def planes_forward(one, params, counter, slot):  # type: ignore[no-untyped-def]
    """y. A task is a box."""
    a = unpack(params, PlanesCall)
    grid, per_class, strides = a.grid, a.channels // a.classes, a.y.strides
    ys, xs = lists_at(a.slots + slot * a.slot_bytes, grid, one)
    buffer = pointer(a.slots + slot * a.slot_bytes + a.lists_bytes, one)
    row = (grid.size[1] // width(one) + 2) * width(one)
    while True:
        r = next_task(counter)
        if r >= grid.rois:
            return
        n = load_scalar(pointer(grid.images, np.int64(0)), r)
        for b in range(grid.bins[0] * grid.bins[1]):
            i, j = b // grid.bins[1], b % grid.bins[1]
            cell = cell_of(a, i, j)
            for class_ in range(a.classes):
                y, x, _, divisor, nowhere = plan_bin(one, grid, a.mask, r, b, 0, class_, ys, xs)
                columns, scale = columns_of(one, x, row, buffer), one / divisor
                if nowhere:
                    scale = (one - one) / (one - one)
                for c in range(class_ * per_class, (class_ + 1) * per_class):
                    plane = plane_at(a.x, n, c, a.group_size, cell, one)
                    value = plane_bin(one, plane, a.x.strides[2], y, columns) * scale
                    spot = r * strides[0] + c * strides[1] + i * strides[2] + j * strides[3]
                    store(pointer(a.y.address, one), spot, value)


@helper
def _bin_backward(one, a, r, n, b, cell, class_, first, end, y, columns, scale, sums):  # type: ignore[no-untyped-def]
    """The gradients of a bin, for channels first to end."""
    i, j, strides = b // a.grid.bins[1], b % a.grid.bins[1], a.y.strides
    by_x, by_y = one - one, one - one
    for c in range(first, end):
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
def planes_backward(one, params, counter, slot):  # type: ignore[no-untyped-def]
    """The gradients. A task is a cell of the groups and a block of channels of a class, of all images."""
    a = unpack(params, PlanesCall)
    grid, per_class = a.grid, a.channels // a.classes
    ys, xs = lists_at(a.slots + slot * a.slot_bytes, grid, one)
    buffer = pointer(a.slots + slot * a.slot_bytes + a.lists_bytes, one)
    row = (grid.size[1] // width(one) + 2) * width(one)
    cells, many = a.group_size[0] * a.group_size[1], grid.bins[0] * grid.bins[1]
    nan = (one - one) / (one - one)
    while True:
        task = next_task(counter)
        if task >= cells * a.classes * a.blocks:
            return
        cell, part = task % cells, task // cells
        class_ = part // a.blocks
        first = class_ * per_class + part % a.blocks * a.block
        end = min(first + a.block, (class_ + 1) * per_class)
        for n in range(a.batch if a.grad_x.address else 0):
            for c in range(first, end):
                for i in range(grid.size[0]):
                    plane = plane_at(a.grad_x, n, c, a.group_size, cell, one)
                    fill(plane, i * a.grad_x.strides[2], grid.size[1], one - one)
        for r in range(grid.rois):
            n = load_scalar(pointer(grid.images, np.int64(0)), r)
            for b in range(many):
                if cell_of(a, b // grid.bins[1], b % grid.bins[1]) != cell:
                    continue
                y, x, _, divisor, nowhere = plan_bin(one, grid, a.mask, r, b, b, class_, ys, xs)
                sums = at(pointer(a.sums, one), ((part * grid.rois + r) * many + b) * 2)
                if nowhere:
                    fill(sums, 0, 2 if a.sums else 0, nan)
                    continue
                columns = columns_of(one, x, row, buffer)
                _bin_backward(one, a, r, n, b, cell, class_, first, end, y, columns, one / divisor, sums)
