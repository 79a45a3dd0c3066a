"""The points of a query: read into the workspace, and planned, a vector of points at a time.

A plan has a column for each of the M * T points of a query, in the order of heads, and rows for their numbers, `pitch`
elements each. Corners outside an image are at the element `nowhere`, where a pixel of zeros is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numdcn._cpu.jit import block
from numdcn._cpu.lanes import alternate_high, alternate_low, even_lanes, odd_lanes
from numdcn._cpu.simd import (
    at,
    first_lanes,
    full,
    load,
    load_like,
    load_masked,
    load_scalar,
    pointer,
    store,
    store_masked,
    width,
)
from numdcn._formulas.bilinear import cell, corner_weights
from numdcn._formulas.jit import helper
from numdcn._formulas.vectors import fma, like, select

# Rows of a plan: x, y (of the caller, then of its position) and weight of each point, its fractions and corner weights,
# and sums of a backward.
X, Y, WEIGHT, FRACTION_Y, FRACTION_X, W00, W01, W10, W11, BY_Y, BY_X, BY_WEIGHT, PLAN_ROWS = range(13)
# Rows of `Plan.corners`: the elements where its four corners begin, and its row in the image, from -1.
C00, C01, C10, C11, ROW, CORNER_ROWS = range(6)
# Rows of the table of points, by number.
TAP_Y, TAP_X, SCALE_Y, SCALE_X, HEIGHT, WIDTH, TABLE_ROWS = range(7)
# Rows of the table's whole numbers: columns of the point's level, elements from value to its head and level, rows.
COLUMNS, START, HEIGHT_ROWS, NUMBER_ROWS = range(4)


class PointsPlace(NamedTuple):
    """Where a kernel finds points (B, Q, M, T, 2), or their gradient."""

    address: int
    strides: tuple[int, int, int, int, int]


class Table(NamedTuple):
    """What is known of each point by its number alone. `TABLE_ROWS` and `NUMBER_ROWS` rows of `pitch` elements."""

    floats: int  # address
    numbers: int  # address, int64
    pitch: int
    pixel_stride: int  # elements from pixel to pixel of value


class Notes(NamedTuple):
    """What a pass over all queries notes for the gradient of value, whose tasks see one head and one level."""

    levels: int
    level_rows: int  # address of (levels, 5) int64: height, width, pixels before it, first point, points
    rows: (
        int  # address of (B, tiles, M, levels, 2) int64: the first row that a tile adds to, and the last; 0: not wanted
    )
    points: int  # address of three arrays (B, M, T, Q), y, x and weight, where a level's part (T, Q) is (Q, T)
    count: int  # elements of each array


class Plan(NamedTuple):
    """Memory for the plan of a query; both are pointers."""

    rows: Any
    corners: Any  # int64
    pitch: int


@helper
def read_pairs(source, strides, count, xs, ys):
    """Copy `count` points, strides[0] elements apart, into a row for x and one for y."""
    lane = full(load_scalar(xs, 0))
    step = width(load_scalar(xs, 0))
    if strides[1] != 1 or strides[0] != 2:
        for i in range(count):
            store(xs, i, load_scalar(source, i * strides[0]))
            store(ys, i, load_scalar(source, i * strides[0] + strides[1]))
        return
    for i in range(0, count, step):
        left = 2 * (count - i)
        low = load_masked(source, 2 * i, first_lanes(left, lane))
        high = load_masked(source, 2 * i + step, first_lanes(left - step, lane))
        store(xs, i, even_lanes(low, high))
        store(ys, i, odd_lanes(low, high))


@helper
def read_line(source, stride, count, target):
    """Copy `count` elements, `stride` apart."""
    lane = full(load_scalar(target, 0))
    step = width(load_scalar(target, 0))
    if stride != 1:
        for i in range(count):
            store(target, i, load_scalar(source, i * stride))
        return
    for i in range(0, count, step):
        store(target, i, load_masked(source, i, first_lanes(count - i, lane)))


@helper
def write_pairs(xs, ys, count, target, strides):
    """Copy a row for x and one for y to `count` points, strides[0] elements apart."""
    lane = full(load_scalar(xs, 0))
    step = width(load_scalar(xs, 0))
    if strides[1] != 1 or strides[0] != 2:
        for i in range(count):
            store(target, i * strides[0], load_scalar(xs, i))
            store(target, i * strides[0] + strides[1], load_scalar(ys, i))
        return
    for i in range(0, count, step):
        x, y, left = load(xs, i), load(ys, i), 2 * (count - i)
        store_masked(target, 2 * i, alternate_low(x, y), first_lanes(left, lane))
        store_masked(target, 2 * i + step, alternate_high(x, y), first_lanes(left - step, lane))


@block
def read_query(points, points_strides, weights, weights_strides, heads, count, plan):
    """Read the points and weights of a query of `heads` heads with `count` points each; strides are those of heads and
    points, and of x and y."""
    xs, ys, ws = at(plan.rows, X * plan.pitch), at(plan.rows, Y * plan.pitch), at(plan.rows, WEIGHT * plan.pitch)
    if points_strides[0] == count * points_strides[1]:
        read_pairs(points, (points_strides[1], points_strides[2]), heads * count, xs, ys)
    else:
        for m in range(heads):
            spot = at(points, m * points_strides[0])
            read_pairs(spot, (points_strides[1], points_strides[2]), count, at(xs, m * count), at(ys, m * count))
    if weights_strides[0] == count * weights_strides[1]:
        read_line(weights, weights_strides[1], heads * count, ws)
    else:
        for m in range(heads):
            read_line(at(weights, m * weights_strides[0]), weights_strides[1], count, at(ws, m * count))


@block
def plan_query(floats, numbers, table, base, count, nowhere, plan):
    """Fill in the plan of a query whose points were read. Overruns by up to a full register."""
    one = like(1.0, load_scalar(plan.rows, 0))
    lane, pitch = full(one), table.pitch
    base_y, base_x, rows = like(base[0], lane), like(base[1], lane), plan.pitch
    for i in range(0, count, width(one)):
        y = fma(
            load(floats, SCALE_Y * pitch + i), load(floats, TAP_Y * pitch + i) + load(plan.rows, Y * rows + i), base_y
        )
        x = fma(
            load(floats, SCALE_X * pitch + i), load(floats, TAP_X * pitch + i) + load(plan.rows, X * rows + i), base_x
        )
        store(plan.rows, Y * rows + i, y)
        store(plan.rows, X * rows + i, x)
        row, column, fraction_y, fraction_x = cell(
            y, x, load(floats, HEIGHT * pitch + i), load(floats, WIDTH * pitch + i)
        )
        w00, w01, w10, w11 = corner_weights(fraction_y, fraction_x)
        store(plan.rows, FRACTION_Y * rows + i, fraction_y)
        store(plan.rows, FRACTION_X * rows + i, fraction_x)
        store(plan.rows, W00 * rows + i, w00)
        store(plan.rows, W01 * rows + i, w01)
        store(plan.rows, W10 * rows + i, w10)
        store(plan.rows, W11 * rows + i, w11)
        _store_corners(numbers, table, row, column, nowhere, i, plan)


@helper
def _store_corners(numbers, table, row, column, nowhere, i, plan):
    """The elements where the corners of cells begin; `row` and `column` count from a rim of zeros."""
    pitch, unit = table.pitch, like(1, row)
    columns, height = load_like(numbers, COLUMNS * pitch + i, row), load_like(numbers, HEIGHT_ROWS * pitch + i, row)
    top, bottom = (row >= unit) & (row < height + unit), row < height
    left, right = (column >= unit) & (column < columns + unit), column < columns
    pixel_stride, outside = like(table.pixel_stride, row), like(nowhere, row)
    line = columns * pixel_stride
    first = load_like(numbers, START * pitch + i, row) + (row - unit) * line + (column - unit) * pixel_stride
    store(plan.corners, C00 * plan.pitch + i, select(top & left, first, outside))
    store(plan.corners, C01 * plan.pitch + i, select(top & right, first + pixel_stride, outside))
    store(plan.corners, C10 * plan.pitch + i, select(bottom & left, first + line, outside))
    store(plan.corners, C11 * plan.pitch + i, select(bottom & right, first + line + pixel_stride, outside))
    store(plan.corners, ROW * plan.pitch + i, row - unit)


@helper
def _rows_of(notes, tile, heads):
    """Where the rows of a tile, counted over all images, are noted."""
    return at(pointer(notes.rows, 0), tile * heads * notes.levels * 2)


@helper
def begin_tile(notes, tile, heads):
    """Note that no row has a point of a tile yet."""
    spot, levels = _rows_of(notes, tile, heads), pointer(notes.level_rows, 0)
    for i in range(heads * notes.levels):
        store(spot, 2 * i, load_scalar(levels, 5 * (i % notes.levels)))
        store(spot, 2 * i + 1, -1)


@block
def note_query(notes, s, n, tile, q, plan):
    """Note the points of a planned query of image n, and their rows."""
    spot, levels = _rows_of(notes, tile, s.heads), pointer(notes.level_rows, 0)
    one, pitch, i = like(1.0, load_scalar(plan.rows, 0)), plan.pitch, 0
    target = pointer(notes.points, one)
    for m in range(s.heads):
        for level in range(notes.levels):
            height, low, high = load_scalar(levels, 5 * level), load_scalar(spot, 0), load_scalar(spot, 1)
            points = load_scalar(levels, 5 * level + 4)
            first = ((n * s.heads + m) * s.points + load_scalar(levels, 5 * level + 3)) * s.queries + q * points
            for k in range(0, points, width(one)):
                some = first_lanes(points - k, full(one))
                store_masked(target, first + k, load(plan.rows, Y * pitch + i + k), some)
                store_masked(target, notes.count + first + k, load(plan.rows, X * pitch + i + k), some)
                store_masked(target, 2 * notes.count + first + k, load(plan.rows, WEIGHT * pitch + i + k), some)
            for k in range(i, i + points):
                row = load_scalar(plan.corners, ROW * pitch + k)
                low = min(low, row) if row < height else low
                high = max(high, row + 1) if row < height else high
            store(spot, 0, low)
            store(spot, 1, high)
            spot, i = at(spot, 2), i + points
