"""Tiles of output pixels: how an output image is divided into them, and where a tile's plan is stored.

A tile is `tile_columns` columns of a band of `band` image rows, four rows high if possible, so that taps read the same
input again while it is in the cache. Columns are numbered along the bands; a tile may start in one band and end in the
next.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numdcn._cpu.jit import block
from numdcn._cpu.simd import at, pointer, store
from numdcn._formulas.jit import helper

MOST_PIXELS = 112  # per tile
ROW = MOST_PIXELS + 32  # elements per row of a tile's buffers: vectors may overrun

# Rows of `Tile.rows`, with one number per pixel: the position of tap (0, 0) at offset 0; the tap's offset; its mask;
# the fractions and weights of its cell; the gradients of its offset and mask. All are at constant offsets from one
# pointer.
(
    BASE_Y, BASE_X, OFFSET_Y, OFFSET_X, MASK, FRACTION_Y, FRACTION_X, W00, W01, W10, W11, GRAD_Y, GRAD_X, GRAD_MASK, ROWS_END,
) = range(0, 15 * ROW, ROW)  # fmt: skip

INDEX = 4 * ROW  # start of `Tile.index`, after the int64s of `Tile.runs`, four per run
SPOTS = 5 * ROW  # start of `Tile.spots`
INTEGERS = 6 * ROW  # int64s per tile; `Tile.rows` follow


class Tiling(NamedTuple):
    """How an output image is divided into tiles; determined by its shape alone."""

    band: int  # image rows in a band
    tile_columns: int  # columns in a tile
    tile_pixels: int  # maximum number of pixels in a tile
    tiles: int  # tiles in an image


class Area(NamedTuple):
    """A rectangle of output pixels."""

    row: int  # the first
    column: int
    height: int
    width: int


class Tile(NamedTuple):
    """The pixels of a tile, and their plan for one tap. The first four fields are pointers."""

    runs: Any  # (run_count, 4) int64, one row per stretch of an image row: first pixel in the tile, row, column, length
    index: Any  # (pixels,) int64: the element of the zero-padded image where the tap's cell starts
    spots: Any  # (pixels,) int64: the element of the gradient where the cell starts
    rows: Any  # (ROWS_END / ROW, ROW): see above
    run_count: int
    pixels: int  # 0 in a tile that has not been placed


def tiling_of(out_size: tuple[int, int], pixels: int, band: int) -> Tiling:
    """Divide an output image into tiles of at most `pixels` pixels. Bands are at most `band` rows high: the largest
    number that divides `pixels`, but no more than the image has."""
    pixels = min(pixels, MOST_PIXELS)
    band = min(max(b for b in range(1, band + 1) if pixels % b == 0), out_size[0])
    tile_columns = pixels // band
    columns = -(-out_size[0] // band) * out_size[1]
    return Tiling(band, tile_columns, pixels, -(-columns // tile_columns))


def tile_bytes(itemsize: int) -> int:
    """Bytes of a `Tile` in a workspace, in whole cache lines."""
    return INTEGERS * 8 + ROWS_END * itemsize


@helper
def new_tile(address, one):
    """A `Tile` at `address` with no pixels yet, offsets of 0 and masks of 1."""
    integers, rows = pointer(address, np.int64(0)), pointer(address + INTEGERS * 8, one)
    for i in range(ROW):
        store(rows, OFFSET_Y + i, one - one)
        store(rows, OFFSET_X + i, one - one)
        store(rows, MASK + i, one)
    return Tile(integers, at(integers, INDEX), at(integers, SPOTS), rows, 0, 0)


@helper
def place_tile(tile, tiling, number, out_size, stride, before):
    """Tile `number` of an output image, in the memory of `tile`: its runs, and the positions of its pixels at tap
    (0, 0)."""
    return place_tile_in(tile, tiling, number, Area(0, 0, out_size[0], out_size[1]), stride, before)


@helper
def place_tile_in(tile, tiling, number, area, stride, before):
    """Tile `number` of an area of an output image."""
    run_count, pixels = _fill_runs(tile, tiling, number, area, stride, before)
    return Tile(tile.runs, tile.index, tile.spots, tile.rows, run_count, pixels)


@helper
def tiles_in(tiling, area):
    """The number of tiles of an area."""
    columns = (area.height + tiling.band - 1) // tiling.band * area.width
    return (columns + tiling.tile_columns - 1) // tiling.tile_columns


@helper
def tile_from(tile, first, count):
    """The index and the rows of `count` pixels of a tile. Its runs are those of the whole tile."""
    return Tile(tile.runs, at(tile.index, first), at(tile.spots, first), at(tile.rows, first), tile.run_count, count)


@block
def _fill_runs(tile, tiling, number, area, stride, before):
    """Fill in a tile's runs and positions; returns the number of runs and the number of pixels."""
    column = number * tiling.tile_columns
    bands = (area.height + tiling.band - 1) // tiling.band
    last = min(column + tiling.tile_columns, bands * area.width)
    runs, pixels = 0, 0
    while column < last:
        row, x = column // area.width * tiling.band, column % area.width
        count = min(area.width - x, last - column)
        x += area.column
        for y in range(area.row + row, area.row + min(row + tiling.band, area.height)):
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
