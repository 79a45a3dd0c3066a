"""The points of a call on the GPU: the table of what is known of each by its number alone, and where its sample lies.

The table is in memory, so that no kernel depends on the number of points or levels. A kernel writes it, from its own
parameters: nothing waits, and a recorded graph holds it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numdcn._cuda.coordinates import coordinate, coordinate_viewer
from numdcn._cuda.jit import F32, F64, Scalar, compute_type, device, kernels, scalar_type, types
from numdcn._cuda.lanes import split
from numdcn._cuda.memory import at, put, view
from numdcn._formulas import bilinear

I32, I64 = np.int32, np.int64
NUMBER = types.int64
ENTRIES = 16  # points per launch
PLACES, FORMS = 3, 4  # numbers of a point in each part of the table
TAP_Y, SCALE_Y, TAP_X, SCALE_X = range(FORMS)
C00, C01, C10, C11 = 1, 2, 4, 8  # the corners that are in the image, as a sum


class Entry(NamedTuple):
    """What is known of a point by its number. Pairs are along y, then x."""

    height: int
    width: int
    start: int
    tap: tuple[Scalar, Scalar]
    scale: tuple[Scalar, Scalar]


class Entries(NamedTuple):
    """Parameters of `write_table`."""

    table: Table
    first: int
    count: int
    entries: tuple[
        Entry, Entry, Entry, Entry, Entry, Entry, Entry, Entry, Entry, Entry, Entry, Entry, Entry, Entry, Entry, Entry
    ]


class Table(NamedTuple):
    """The table in memory."""

    places: int  # address of int64 (T, PLACES): height, width and start of the level
    forms: int  # address of the compute type (T, FORMS), in the order above


class Points(NamedTuple):
    """The points of a call, and their weights."""

    points: int  # address of (B, Q, M, T, 2)
    weights: int  # address of (B, Q, M, T)
    points_strides: tuple[int, int, int, int, int]
    weights_strides: tuple[int, int, int, int]
    table: Table
    queries: int
    heads: int
    count: int  # T
    columns: int
    stride: tuple[int, int]
    origin: tuple[Scalar, Scalar]


@kernels(Entries, lambda: [(F32,), (F64,)])
def write_table(S):
    """Write `count` entries of the table, from `first` on. For one thread."""

    def run(c):
        places, forms = view(c.table.places, NUMBER), view(c.table.forms, S)
        for i in range(ENTRIES):
            if i < c.count:
                entry, place, form = c.entries[i], (c.first + i) * PLACES, (c.first + i) * FORMS
                put(places, place, entry.height)
                put(places, place + 1, entry.width)
                put(places, place + 2, entry.start)
                put(forms, form + TAP_Y, entry.tap[0])
                put(forms, form + SCALE_Y, entry.scale[0])
                put(forms, form + TAP_X, entry.tap[1])
                put(forms, form + SCALE_X, entry.scale[1])

    return run


class Sample(NamedTuple):
    """Where a sample lies."""

    pixel: Any  # of its corner (0, 0), counted from the start of value
    width: Any  # of the level
    corners: Any  # those in the image; none for NaN
    y: Any  # fractions; NaN for a NaN position
    x: Any
    weight: Any


class Head(NamedTuple):
    """A head of a query."""

    b: Any
    q: Any
    m: Any


@device
def head_at(number, p):
    """Number `number` of all heads of queries (B, Q, M)."""
    rest, m = split(number, p.heads)
    b, q = split(rest, p.queries)
    return Head(I64(b), I64(q), I64(m))


@device
def corners_inside(row, column, height, width):
    """The corners in an image of a cell that begins at a row and column."""
    inside = 0
    if row >= 0 and row < height:
        if column >= 0 and column < width:
            inside += C00
        if column + 1 >= 0 and column + 1 < width:
            inside += C01
    if row + 1 >= 0 and row + 1 < height:
        if column >= 0 and column < width:
            inside += C10
        if column + 1 >= 0 and column + 1 < width:
            inside += C11
    return inside


class Origin(NamedTuple):
    """Where the points of a head of a query lie."""

    points: Any  # element of the first one's x
    weights: Any
    y: Any  # base position
    x: Any


def originator(T: Any) -> Any:
    """Make `origin_at(p, head)`: an `Origin`. T: type of value."""
    S = scalar_type(T)

    @device
    def origin_at(p, head):
        at_points, at_weights = p.points_strides, p.weights_strides
        row, column = split(head.q, p.columns)
        return Origin(
            head.b * at_points[0] + head.q * at_points[1] + head.m * at_points[2],
            head.b * at_weights[0] + head.q * at_weights[1] + head.m * at_weights[2],
            S(I64(row) * p.stride[0]) + p.origin[0],
            S(I64(column) * p.stride[1]) + p.origin[1],
        )

    return origin_at


def sampler(T: Any) -> Any:
    """Make `sample_at(p, origin, t)`: the `Sample` of point t. T: type of value."""
    S, A, coordinates = scalar_type(T), compute_type(T), coordinate_viewer(T)

    @device
    def sample_at(p, origin, t):
        points, weights = coordinates(p.points), coordinates(p.weights)
        places, forms = view(p.table.places, NUMBER), view(p.table.forms, A)
        spot, place, form = origin.points + t * p.points_strides[3], t * PLACES, t * FORMS
        along_x, along_y = coordinate(points, spot), coordinate(points, spot + p.points_strides[4])
        weight = coordinate(weights, origin.weights + t * p.weights_strides[3])
        y = origin.y + at(forms, form + SCALE_Y) * (at(forms, form + TAP_Y) + along_y)
        x = origin.x + at(forms, form + SCALE_X) * (at(forms, form + TAP_X) + along_x)
        height, width = I32(at(places, place)), I32(at(places, place + 1))
        padded_row, padded_column, fraction_y, fraction_x = bilinear.cell(S(y), S(x), S(height), S(width))
        row, column = I32(padded_row) - I32(1), I32(padded_column) - I32(1)
        pixel = row * width + column + I32(at(places, place + 2))
        corners = corners_inside(row, column, height, width)
        return Sample(pixel, width, I32(corners), S(fraction_y), S(fraction_x), S(weight))

    return sample_at
