"""CPU kernels of the gradient of value.

First the points of all queries are noted by head and level (`plan.Notes`), by `note_points` unless `point_gradients` did
it. Then a task owns a band of rows of one head of one level of an image, so no two tasks add to the same memory, and the
order of additions is that of the queries, however many bands there are. It adds up its band in its workspace, in images
with a rim, so that all four corners of a point are somewhere; then it writes the band once. Tiles of queries without a
point in the band are skipped.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numdcn._cpu.attention.forward import Sizes, plan_at, plan_of
from numdcn._cpu.attention.plan import Notes, PointsPlace, Table, begin_tile, note_query
from numdcn._cpu.jit import block, kernel
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
    prefetch,
    store,
    store_masked,
    width,
)
from numdcn._formulas.bilinear import cell, corner_weights
from numdcn._formulas.jit import helper
from numdcn._formulas.vectors import fma, like, select

POINTS = 512  # per chunk, at most, unless a single query has more
AHEAD = 32  # queries, of prefetches
CELL, POINT, GRADIENT, NUMBER_ROWS = range(4)  # rows of `Chunk.numbers`


class Bands(NamedTuple):
    """How levels are divided into bands; determined by the shapes."""

    bands: int  # of a head, all levels together
    band_rows: int  # address of (bands, 3) int64: level, first row, end
    chunk: int  # queries whose points are planned together
    pitch: int  # elements per row of a chunk
    padded: int  # elements per pixel of a band: the channels, rounded up to full registers


class SpreadCall(NamedTuple):
    """Parameters of `note_points` and `spread`."""

    sizes: Sizes
    bands: Bands
    notes: Notes
    table: Table
    points: PointsPlace
    weights: Place
    grad_y: Place  # (B, Q, M, D)
    grad_value: Place  # (B, S, M, D)
    workspaces: int  # address of the threads' workspaces
    workspace_bytes: int  # per thread


class Chunk(NamedTuple):
    """Memory for the points of some queries; the first three are pointers.

    Of every point, the element of the band where its cell begins (-1: not in the band) and its four corner weights times
    its weight. Of those in the band, their numbers and the elements where their gradients begin.
    """

    weights: Any  # four rows
    numbers: Any  # `NUMBER_ROWS` rows of int64
    gradients: Any  # of the queries, in full registers
    pitch: int


class Band(NamedTuple):
    """A band of rows, and its sums: lines of `line` elements, with a rim of one pixel all around."""

    first: int
    end: int
    sums: Any  # a pointer
    line: int
    padded: int  # elements per pixel


@kernel
def note_points(one, params, counter, slot):
    """Note the points of all queries. A task is a tile of the queries of an image."""
    a = unpack(params, SpreadCall)
    s = a.sizes
    plan = plan_at(a.workspaces + slot * a.workspace_bytes, a.table.pitch, one)
    while True:
        task = next_task(counter)
        if task >= s.batch * s.tiles:
            return
        n, first = task // s.tiles, task % s.tiles * s.tile
        begin_tile(a.notes, task, s.heads)
        for q in range(first, min(first + s.tile, s.queries)):
            plan_of(one, a, n, q, 0, plan)
            note_query(a.notes, s, n, task, q, plan)


@block
def _plan_chunk(noted, total, count, height, columns, band, chunk):
    """The cells and weights of `count` noted points, `total` elements from y to x to weight. Overruns by up to a full
    register."""
    one = like(1.0, load_scalar(noted, 0))
    lane, pitch, step = full(one), chunk.pitch, width(one)
    height, columns = like(height, lane), like(columns, lane)
    for i in range(0, count, step):
        some = first_lanes(count - i, lane)
        y, x = load_masked(noted, i, some), load_masked(noted, total + i, some)
        weight = load_masked(noted, 2 * total + i, some)
        row, column, fraction_y, fraction_x = cell(y, x, height, columns)
        w00, w01, w10, w11 = corner_weights(fraction_y, fraction_x)
        store(chunk.weights, i, w00 * weight)
        store(chunk.weights, pitch + i, w01 * weight)
        store(chunk.weights, 2 * pitch + i, w10 * weight)
        store(chunk.weights, 3 * pitch + i, w11 * weight)
        first, after = like(band.first, row), like(band.end + 1, row)
        index = (row - first) * like(band.line, row) + column * like(band.padded, row)
        store(chunk.numbers, CELL * pitch + i, select((row >= first) & (row < after), index, like(-1, row)))


@block
def _choose(chunk, queries, points, gradient, stride, channels, padded):
    """Copy the gradients of some queries, `stride` elements apart, and list the points in the band; return how many."""
    numbers, pitch, count = chunk.numbers, chunk.pitch, 0
    lane = full(load_scalar(chunk.gradients, 0))
    step = width(load_scalar(chunk.gradients, 0))
    for j in range(queries):
        prefetch(gradient, (j + AHEAD) * stride + channels - 1)
        for c in range(0, channels, step):
            prefetch(gradient, (j + AHEAD) * stride + c)
            some = first_lanes(channels - c, lane)
            store(chunk.gradients, j * padded + c, load_masked(gradient, j * stride + c, some))
        for i in range(j * points, (j + 1) * points):
            store(numbers, POINT * pitch + count, i)
            store(numbers, GRADIENT * pitch + count, j * padded)
            count += 1 if load_scalar(numbers, CELL * pitch + i) >= 0 else 0
    return count


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
def _add_points(chunk, count, channels, band):
    """Add the gradients of the `count` points that were chosen to the pixels of a band."""
    rows, numbers, pitch, line, padded = chunk.weights, chunk.numbers, chunk.pitch, band.line, band.padded
    step = width(load_scalar(rows, 0))
    for j in range(count):
        i = load_scalar(numbers, POINT * pitch + j)
        gradient = at(chunk.gradients, load_scalar(numbers, GRADIENT * pitch + j))
        index = load_scalar(numbers, CELL * pitch + i)
        weights = (
            full(load_scalar(rows, i)),
            full(load_scalar(rows, pitch + i)),
            full(load_scalar(rows, 2 * pitch + i)),
            full(load_scalar(rows, 3 * pitch + i)),
        )
        c = 0
        while c + step < channels:  # all reads before all writes, each of which could be what is read next
            low, high = _pixels(band.sums, index + c, padded, line), _pixels(band.sums, index + c + step, padded, line)
            _add_four(band.sums, index + c, padded, line, weights, load(gradient, c), low)
            _add_four(band.sums, index + c + step, padded, line, weights, load(gradient, c + step), high)
            c += 2 * step
        if c < channels:
            pixels = _pixels(band.sums, index + c, padded, line)
            _add_four(band.sums, index + c, padded, line, weights, load(gradient, c), pixels)


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
    rows = pointer(base + NUMBER_ROWS * b.pitch * 8, one)
    chunk, sums = (
        Chunk(rows, pointer(base, 0), at(rows, 4 * b.pitch), b.pitch),
        at(rows, 4 * b.pitch + b.chunk * b.padded),
    )
    levels, bands, reached = pointer(a.notes.level_rows, 0), pointer(b.band_rows, 0), pointer(a.notes.rows, 0)
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
        noted = at(pointer(a.notes.points, one), ((n * s.heads + m) * s.points + t) * s.queries)
        for tile in range(s.tiles):
            spot = 2 * (((n * s.tiles + tile) * s.heads + m) * a.notes.levels + level)
            if load_scalar(reached, spot) >= end or load_scalar(reached, spot + 1) < first:
                continue
            tile_end = min((tile + 1) * s.tile, s.queries)
            for q in range(tile * s.tile, tile_end, b.chunk):
                count = min(b.chunk, tile_end - q)
                _plan_chunk(at(noted, q * points), a.notes.count, count * points, height, columns, band, chunk)
                spot = n * a.grad_y.strides[0] + q * a.grad_y.strides[1] + m * a.grad_y.strides[2]
                gradients = at(pointer(a.grad_y.address, one), spot)
                chosen = _choose(chunk, count, points, gradients, a.grad_y.strides[1], s.channels, b.padded)
                _add_points(chunk, chosen, s.channels, band)
        _write_band(one, a, n, m, load_scalar(levels, 5 * level + 2), columns, band)
