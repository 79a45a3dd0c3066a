"""The points of a call on the GPU: the table of what is known of each by its number alone, and where its sample lies.

The table is in memory, so that no kernel depends on the number of points or levels. A kernel writes it, from its own
parameters: nothing waits, and a recorded graph holds it.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numdcn._cuda.jit import F32, F64, Scalar, cuda, device, kernels, scalar_type, types
from numdcn._cuda.memory import at, put, view, widen
from numdcn._formulas import bilinear

I32, I64 = np.int32, np.int64
NUMBER = types.int64
ENTRIES = 16  # points per launch
PLACES, FORMS = 3, 4  # numbers of a point in each part of the table
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
    forms: int  # address of the compute type (T, FORMS): tap and scale along y, then x


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
                put(forms, form, entry.tap[0])
                put(forms, form + 1, entry.scale[0])
                put(forms, form + 2, entry.tap[1])
                put(forms, form + 3, entry.scale[1])

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
def head_at(first, beyond, queries, heads):
    """The head `beyond` heads, fewer than a block has threads, after number `first` of all (B, Q, M)."""
    rest, m = first // heads, I32(first % heads) + beyond
    b, q = rest // queries, I32(rest % queries)
    q += m // I32(heads)
    return Head(b + I64(q // I32(queries)), I64(q % I32(queries)), I64(m % I32(heads)))


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


def sampler(T: Any, C: Any, W: Any) -> Any:
    """Make `sample_at(points, head, t)`: a `Sample`. Types of value, of points and of weights."""
    S = scalar_type(T)
    N = F64 if T == F64 else F32

    @device
    def sample_at(p, head, t):
        points, weights = view(p.points, C), view(p.weights, W)
        places, forms = view(p.table.places, NUMBER), view(p.table.forms, N)
        steps = p.points_strides
        spot = head.b * steps[0] + head.q * steps[1] + head.m * steps[2] + t * steps[3]
        along_x, along_y = widen(at(points, spot)), widen(at(points, spot + steps[4]))
        steps = p.weights_strides
        weight = widen(at(weights, head.b * steps[0] + head.q * steps[1] + head.m * steps[2] + t * steps[3]))
        height, width = at(places, t * PLACES), at(places, t * PLACES + 1)
        row, column = I32(head.q) // I32(p.columns), I32(head.q) % I32(p.columns)
        base_y = S(I64(row) * p.stride[0]) + p.origin[0]
        base_x = S(I64(column) * p.stride[1]) + p.origin[1]
        y = base_y + at(forms, t * FORMS + 1) * (at(forms, t * FORMS) + along_y)
        x = base_x + at(forms, t * FORMS + 3) * (at(forms, t * FORMS + 2) + along_x)
        padded_row, padded_column, fraction_y, fraction_x = bilinear.cell(S(y), S(x), S(height), S(width))
        row, column = I32(padded_row) - I32(1), I32(padded_column) - I32(1)
        corners = I32(corners_inside(row, column, height, width))
        pixel = I32(I64(row) * width + I64(column) + at(places, t * PLACES + 2))
        return Sample(pixel, I32(width), corners, S(fraction_y), S(fraction_x), S(weight))

    return sample_at
