"""CPU kernels of the gradient of value.

A task owns a band of rows of one head of one level of an image, so no two tasks add to the same memory, and the order of
additions is that of the queries, however many bands there are. It adds up its band in its workspace, in images with a
rim, so that all four corners of a point are somewhere; then it writes the band once. Tiles of queries without a point in
the band are skipped: `find_rows` has noted the first and last row of each.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numdcn._cpu.attention.forward import Sizes, base_of, plan_at, plan_of
from numdcn._cpu.attention.plan import (
    PLAN_ROWS,
    SCALE_X,
    SCALE_Y,
    TAP_X,
    TAP_Y,
    W00,
    W01,
    W10,
    W11,
    WEIGHT,
    PointsPlace,
    Reach,
    Table,
    X,
    Y,
    no_rows,
    note_rows,
    read_line,
    read_pairs,
)
from numdcn._cpu.jit import block, kernel
from numdcn._cpu.lanes import even_lanes, odd_lanes
from numdcn._cpu.parameters import Place, unpack
from numdcn._cpu.simd import (
    at,
    first_lanes,
    full,
    load,
    load_masked,
    load_scalar,
    next_task,
    pointer,
    store,
    store_masked,
    width,
)
from numdcn._formulas.bilinear import cell, corner_weights
from numdcn._formulas.jit import helper
from numdcn._formulas.vectors import fma, like

POINTS = 512  # planned at a time, at least


class Bands(NamedTuple):
    """How levels are divided into bands; determined by the shapes."""

    bands: int  # of a head, all levels together
    band_rows: int  # address of (bands, 3) int64: level, first row, end
    chunk: int  # queries planned at a time
    pitch: int  # elements per row of the plan of a chunk
    padded: int  # elements per pixel of a band: the channels, rounded up to full registers


class SpreadCall(NamedTuple):
    """Parameters of `find_rows` and `spread`."""

    sizes: Sizes
    bands: Bands
    reach: Reach
    table: Table
    points: PointsPlace
    weights: Place
    grad_y: Place  # (B, Q, M, D)
    grad_value: Place  # (B, S, M, D)
    workspaces: int  # address of the threads' workspaces
    workspace_bytes: int  # per thread


class Chunk(NamedTuple):
    """Memory for the plan of the points of some queries; the first two are pointers."""

    rows: Any  # as in a `Plan`
    cells: Any  # int64: the row of each cell from -1, then its column from 0, counted from a rim
    pitch: int


class Band(NamedTuple):
    """A band of rows, and its sums: lines of `line` elements, with a rim of one pixel all around."""

    first: int
    end: int
    sums: Any  # a pointer
    line: int
    padded: int  # elements per pixel


@kernel
def find_rows(one, params, counter, slot):
    """Note which rows the points of each tile of queries are in. A task is a tile of the queries of an image."""
    a = unpack(params, SpreadCall)
    s = a.sizes
    plan = plan_at(a.workspaces + slot * a.workspace_bytes, a.table.pitch, one)
    while True:
        task = next_task(counter)
        if task >= s.batch * s.tiles:
            return
        n, first = task // s.tiles, task % s.tiles * s.tile
        no_rows(a.reach, task, s.heads)
        for q in range(first, min(first + s.tile, s.queries)):
            plan_of(one, a, n, q, 0, plan)
            note_rows(a.reach, task, plan, s.heads)


@helper
def _read_chunk(one, a, n, m, first, count, t, points, chunk):
    """The positions and weights of points t to t + points of `count` queries of a head. Overruns by up to a full
    register."""
    strides, more, lane, step = a.points.strides, a.weights.strides, full(one), width(one)
    floats, rows, pitch = pointer(a.table.floats, one), chunk.rows, chunk.pitch
    tap_y, tap_x = at(floats, TAP_Y * a.table.pitch + t), at(floats, TAP_X * a.table.pitch + t)
    scale_y, scale_x = at(floats, SCALE_Y * a.table.pitch + t), at(floats, SCALE_X * a.table.pitch + t)
    for j in range(count):
        q, i = first + j, j * points
        base = base_of(a.sizes, q, one)
        base_y, base_x = full(base[0]), full(base[1])
        source = at(pointer(a.points.address, one), n * strides[0] + q * strides[1] + m * strides[2] + t * strides[3])
        weights = at(pointer(a.weights.address, one), n * more[0] + q * more[1] + m * more[2] + t * more[3])
        if strides[3] != 2 or strides[4] != 1 or more[3] != 1:
            read_pairs(source, strides[3:], points, at(rows, X * pitch + i), at(rows, Y * pitch + i))
            read_line(weights, more[3], points, at(rows, WEIGHT * pitch + i))
            for k in range(0, points, step):
                x, y = load(rows, X * pitch + i + k), load(rows, Y * pitch + i + k)
                store(rows, X * pitch + i + k, fma(load(scale_x, k), load(tap_x, k) + x, base_x))
                store(rows, Y * pitch + i + k, fma(load(scale_y, k), load(tap_y, k) + y, base_y))
            continue
        for k in range(0, points, step):
            left = points - k
            low = load_masked(source, 2 * k, first_lanes(2 * left, lane))
            high = load_masked(source, 2 * k + step, first_lanes(2 * left - step, lane))
            x, y = even_lanes(low, high), odd_lanes(low, high)
            store(rows, X * pitch + i + k, fma(load(scale_x, k), load(tap_x, k) + x, base_x))
            store(rows, Y * pitch + i + k, fma(load(scale_y, k), load(tap_y, k) + y, base_y))
            store(rows, WEIGHT * pitch + i + k, load_masked(weights, k, first_lanes(left, lane)))


@block
def _plan_chunk(chunk, count, height, columns):
    """Rows, columns and corner weights of `count` points whose positions are known."""
    rows, cells, pitch = chunk.rows, chunk.cells, chunk.pitch
    one = like(1.0, load_scalar(rows, 0))
    lane = full(one)
    for i in range(0, count, width(one)):
        row, column, fraction_y, fraction_x = cell(
            load(rows, Y * pitch + i), load(rows, X * pitch + i), like(height, lane), like(columns, lane)
        )
        w00, w01, w10, w11 = corner_weights(fraction_y, fraction_x)
        store(rows, W00 * pitch + i, w00)
        store(rows, W01 * pitch + i, w01)
        store(rows, W10 * pitch + i, w10)
        store(rows, W11 * pitch + i, w11)
        store(cells, i, row - like(1, row))
        store(cells, pitch + i, column)


@helper
def _pixels(target, index, padded, line):
    """A register of each of four pixels."""
    return (
        load(target, index),
        load(target, index + padded),
        load(target, index + line),
        load(target, index + line + padded),
    )


@helper
def _add_four(target, index, padded, line, weights, gradient, pixels):
    """Add the gradient of a sample to a register of each of its four pixels, which were read."""
    store(target, index, fma(weights[0], gradient, pixels[0]))
    store(target, index + padded, fma(weights[1], gradient, pixels[1]))
    store(target, index + line, fma(weights[2], gradient, pixels[2]))
    store(target, index + line + padded, fma(weights[3], gradient, pixels[3]))


@block
def _add_points(chunk, point, points, band, gradient, channels):
    """Add the gradient of one query, times the weights of its `points` points, from `point` on, to the pixels of a
    band."""
    rows, cells, pitch, line, padded = chunk.rows, chunk.cells, chunk.pitch, band.line, band.padded
    one = like(1.0, load_scalar(rows, 0))
    lane, step = full(one), width(one)
    for i in range(point, point + points):
        row = load_scalar(cells, i)
        if row < band.first - 1 or row >= band.end:
            continue
        index = (row - band.first + 1) * line + load_scalar(cells, pitch + i) * padded
        weight = full(load_scalar(rows, WEIGHT * pitch + i))
        weights = (
            full(load_scalar(rows, W00 * pitch + i)),
            full(load_scalar(rows, W01 * pitch + i)),
            full(load_scalar(rows, W10 * pitch + i)),
            full(load_scalar(rows, W11 * pitch + i)),
        )
        c = 0
        while c + 2 * step <= channels:  # all reads before all writes, each of which could be what is read next
            low, high = _pixels(band.sums, index + c, padded, line), _pixels(band.sums, index + c + step, padded, line)
            _add_four(band.sums, index + c, padded, line, weights, weight * load(gradient, c), low)
            _add_four(band.sums, index + c + step, padded, line, weights, weight * load(gradient, c + step), high)
            c += 2 * step
        while c < channels:
            pixels = _pixels(band.sums, index + c, padded, line)
            rest = weight * load_masked(gradient, c, first_lanes(channels - c, lane))
            _add_four(band.sums, index + c, padded, line, weights, rest, pixels)
            c += step


@helper
def _write_band(one, a, n, m, start, columns, band):
    """Write a band of the gradient."""
    strides, channels, step = a.grad_value.strides, a.sizes.channels, width(one)
    for row in range(band.first, band.end):
        for column in range(columns):
            spot = n * strides[0] + (start + row * columns + column) * strides[1] + m * strides[2]
            target = at(pointer(a.grad_value.address, one), spot)
            source = at(band.sums, (row - band.first + 1) * band.line + (column + 1) * band.padded)
            for c in range(0, channels, step):
                store_masked(target, c, load(source, c), first_lanes(channels - c, full(one)))


@kernel
def spread(one, params, counter, slot):
    """The gradient of value. A task is a band of rows of a head of a level of an image."""
    a = unpack(params, SpreadCall)
    s, b = a.sizes, a.bands
    base = a.workspaces + slot * a.workspace_bytes
    chunk = Chunk(pointer(base + 2 * b.pitch * 8, one), pointer(base, 0), b.pitch)
    sums = at(chunk.rows, PLAN_ROWS * b.pitch)
    levels, bands, reach = pointer(a.reach.level_rows, 0), pointer(b.band_rows, 0), pointer(a.reach.address, 0)
    while True:
        task = next_task(counter)
        if task >= s.batch * s.heads * b.bands:
            return
        n, number, m = task // (s.heads * b.bands), task // s.heads % b.bands, task % s.heads
        level = load_scalar(bands, 3 * number)
        height, columns = load_scalar(levels, 5 * level), load_scalar(levels, 5 * level + 1)
        t, points = load_scalar(levels, 5 * level + 3), load_scalar(levels, 5 * level + 4)
        first, end = load_scalar(bands, 3 * number + 1), load_scalar(bands, 3 * number + 2)
        band = Band(first, end, sums, (columns + 2) * b.padded, b.padded)
        for i in range(0, (end - first + 2) * band.line, width(one)):
            store(sums, i, full(one - one))
        for tile in range(s.tiles):
            spot = 2 * (((n * s.tiles + tile) * s.heads + m) * a.reach.levels + level)
            if load_scalar(reach, spot) >= end or load_scalar(reach, spot + 1) < first:
                continue
            query_end = min((tile + 1) * s.tile, s.queries)
            for q in range(tile * s.tile, query_end, b.chunk):
                count = min(b.chunk, query_end - q)
                _read_chunk(one, a, n, m, q, count, t, points, chunk)
                _plan_chunk(chunk, count * points, height, columns)
                for j in range(count):
                    where = n * a.grad_y.strides[0] + (q + j) * a.grad_y.strides[1] + m * a.grad_y.strides[2]
                    gradient = at(pointer(a.grad_y.address, one), where)
                    _add_points(chunk, j * points, points, band, gradient, s.channels)
        _write_band(one, a, n, m, load_scalar(levels, 5 * level + 2), columns, band)
