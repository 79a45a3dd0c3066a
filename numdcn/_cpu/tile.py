"""Tiles of output pixels: which pixels, their plan for one tap (cell, weights), their samples along the channels.

A tile is `tile_columns` columns of a band of `band` image rows: nearly square, so that the input it reads stays in the
cache from tap to tap. Columns are numbered along the bands; a tile may begin in one band and end in the next.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numdcn._cpu.jit import block
from numdcn._cpu.simd import at, load, load_scalar, pointer, prefetch, store, width
from numdcn._formulas.jit import helper

MOST_PIXELS = 112  # of a tile
ROW = MOST_PIXELS + 32  # elements of a row of a tile's buffers: vectors may run over

# Rows of a tile's numbers, one for each pixel: the position of tap (0, 0) at offset 0; the tap's offset; its mask; the
# fractions and weights of its cell; the gradients of its offset and mask. All lie at constant distances from one pointer.
(
    BASE_Y, BASE_X, OFFSET_Y, OFFSET_X, SCALE, FRACTION_Y, FRACTION_X, W00, W01, W10, W11, GRAD_Y, GRAD_X, GRAD_SCALE, ROWS_END,
) = range(0, 15 * ROW, ROW)  # fmt: skip


class Tiling(NamedTuple):
    """How an output image is cut into tiles: by its shape alone."""

    band: int  # image rows in a band
    tile_columns: int  # columns in a tile
    tile_pixels: int  # the most pixels in a tile
    tiles: int  # tiles in an image


class Tile(NamedTuple):
    """The buffers of a tile, as pointers."""

    runs: Any  # (runs, 4): first pixel in the tile, image row, image column, pixels: a stretch of an image row
    index: Any  # of each pixel: the element of the zero-padded image where the tap's cell begins
    rows: Any  # see above


def tiling(out_size: tuple[int, int], pixels: int, band: int) -> Tiling:
    """Cut an output image into tiles of at most `pixels` pixels, at most `band` rows high."""
    pixels = min(pixels, MOST_PIXELS)
    band = min(max(b for b in range(1, band + 1) if pixels % b == 0), out_size[0])
    tile_columns = pixels // band
    columns = -(-out_size[0] // band) * out_size[1]
    return Tiling(band, tile_columns, pixels, -(-columns // tile_columns))


def tile_bytes(itemsize: int) -> int:
    """Scratch of a `Tile`, in whole cache lines."""
    return 5 * ROW * 8 + ROWS_END * itemsize


@helper
def tile_at(address, one):
    """The `Tile` whose buffers begin at `address`, with offsets of 0 and masks of 1."""
    integers, rows = pointer(address, np.int64(0)), pointer(address + 5 * ROW * 8, one)
    for i in range(ROW):
        store(rows, OFFSET_Y + i, one - one)
        store(rows, OFFSET_X + i, one - one)
        store(rows, SCALE + i, one)
    return Tile(integers, at(integers, 4 * ROW), rows)


@block
def place_tile(tile, blocking, number, out_size, stride, before):
    """Fill in a tile's runs and positions; returns the numbers of its runs and of its pixels."""
    column = number * blocking.tile_columns
    bands = (out_size[0] + blocking.band - 1) // blocking.band
    last = min(column + blocking.tile_columns, bands * out_size[1])
    runs, pixels = 0, 0
    while column < last:
        row, x = column // out_size[1] * blocking.band, column % out_size[1]
        count = min(out_size[1] - x, last - column)
        for y in range(row, min(row + blocking.band, out_size[0])):
            store(tile.runs, 4 * runs, pixels)
            store(tile.runs, 4 * runs + 1, y)
            store(tile.runs, 4 * runs + 2, x)
            store(tile.runs, 4 * runs + 3, count)
            for i in range(count):
                store(tile.rows, BASE_Y + pixels + i, y * stride[0] - before[0])
                store(tile.rows, BASE_X + pixels + i, (x + i) * stride[1] - before[1])
            runs += 1
            pixels += count
        column += count
    return runs, pixels


@block
def read_plane(plane, strides, ahead, tile, runs, target):
    """Copy a tile's pixels of an (out_h, out_w) plane into target, in the tile's order; the plane `ahead` elements on will be next."""
    step = width(load_scalar(target, 0))
    for run in range(runs):
        first, y = load_scalar(tile.runs, 4 * run), load_scalar(tile.runs, 4 * run + 1)
        x, count = load_scalar(tile.runs, 4 * run + 2), load_scalar(tile.runs, 4 * run + 3)
        source = at(plane, y * strides[0] + x * strides[1])
        done = 0
        for i in range(0, count, 16):
            prefetch(source, ahead + i)
        if strides[1] == 1:
            while done + step <= count:
                store(target, first + done, load(source, done))
                done += step
        for i in range(done, count):
            store(target, first + i, load_scalar(source, i * strides[1]))


@block
def write_plane(plane, strides, tile, runs, source):
    """Copy source, in a tile's order, to the tile's pixels of an (out_h, out_w) plane."""
    step = width(load_scalar(source, 0))
    for run in range(runs):
        first, y = load_scalar(tile.runs, 4 * run), load_scalar(tile.runs, 4 * run + 1)
        x, count = load_scalar(tile.runs, 4 * run + 2), load_scalar(tile.runs, 4 * run + 3)
        target, done = at(plane, y * strides[0] + x * strides[1]), 0
        if strides[1] == 1:
            while done + step <= count:
                store(target, done, load(source, first + done))
                done += step
        for i in range(done, count):
            store(target, i * strides[1], load_scalar(source, first + i))
