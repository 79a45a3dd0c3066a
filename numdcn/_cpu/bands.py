"""Bands of image rows, which share the work of adding up an image's gradient.

What is to be added (a box, a tile of points) reaches some rows, and costs about so much: its *span*, in whole numbers.
From the spans every task computes where its own band lies (`band_of`). A task adds to its rows in its workspace, in the
order of what there is to add, so no bit depends on the bands.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from numdcn._cpu.layout import fill
from numdcn._cpu.simd import at, load_scalar, pointer, store
from numdcn._formulas.jit import helper

IMAGE, FIRST, END, COST, SPAN = range(5)  # numbers of a span: image, rows, cost of each; the last is how many
ROW_COST = 2  # of clearing and writing a pixel, in additions to one
TASKS = 64  # of a call, at least, if its images have the rows
LEAST_ROWS = 4  # of a band, on average
SUMS_BYTES = 640 * 1024  # of the rows that a task adds to at a time, at most, if they are more than one


class Bands(NamedTuple):
    """Blocks of channels, bands of rows, and the memory of a task for its sums; determined by the shapes."""

    panel: int  # channels per block
    blocks: int
    count: int  # of an image
    rows: int  # of an image that are added to at a time
    costs_bytes: int  # for the costs of an image's rows
    sums_bytes: int


def bands_of(batch: int, channels: int, size: tuple[int, int], panel: int, itemsize: int) -> Bands:
    """The bands of images for blocks of `panel` channels."""
    blocks = -(-channels // panel)
    count = max(1, min(-(-TASKS // (batch * blocks)), size[0] // LEAST_ROWS))
    row = (size[1] + 1) * min(panel, channels) * itemsize
    rows = max(1, min(size[0], SUMS_BYTES // row - 2))
    sums = (rows + 2) * row + 2 * panel * itemsize + 64
    return Bands(panel, blocks, count, rows, -(-(size[0] + 1) * 8 // 64) * 64, -(-sums // 64) * 64)


@helper
def span_at(spans, number):
    """The numbers of a span, as a pointer; `spans` is the address of all."""
    return at(pointer(spans, np.int64(0)), number * SPAN)


@helper
def reaches(span, n, first, end):
    """Whether a span has rows among those from `first` to `end` of image n."""
    return load_scalar(span, IMAGE) == n and load_scalar(span, FIRST) < end and load_scalar(span, END) > first


@helper
def write_span(span, n, first, end, cost):
    """Fill in a span; `cost` is that of all rows together."""
    store(span, IMAGE, n)
    store(span, FIRST, first)
    store(span, END, end)
    store(span, COST, cost // max(end - first, 1) + 1)


@helper
def band_of(spans, count, n, size, band, bands, address):
    """The rows of one of `bands` bands of image n: the first, and the end. `address` is that of room for the costs. A row
    belongs to the band in which the middle of its cost lies."""
    costs = pointer(address, np.int64(0))
    fill(costs, 0, size[0] + 1, 0)
    for number in range(count):
        span = span_at(spans, number)
        if reaches(span, n, 0, size[0]):
            first, end, cost = load_scalar(span, FIRST), load_scalar(span, END), load_scalar(span, COST)
            store(costs, first, load_scalar(costs, first) + cost)
            store(costs, end, load_scalar(costs, end) - cost)
    total, row = 0, ROW_COST * size[1]
    for i in range(size[0]):
        row += load_scalar(costs, i)
        store(costs, i, row)
        total += row
    before, first, end = 0, 0, 0
    for i in range(size[0]):
        row = load_scalar(costs, i)
        owner = (2 * before + row) * bands // (2 * total)
        first, end = first + (1 if owner < band else 0), end + (1 if owner <= band else 0)
        before += row
    return first, end
