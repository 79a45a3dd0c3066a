"""Tiles of output pixels: which pixels, their plan for one tap (cell, weights), their samples along the channels.

A tile is `tile_columns` columns of a band of `band` image rows: nearly square, so that the input it reads stays in the
cache from tap to tap. Columns are numbered along the bands; a tile may begin in one band and end in the next.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numdcn._kernels.bilinear import cell, corner_weights, slopes, value
from numdcn._kernels.jit_cpu import block, helper
from numdcn._kernels.lanes_cpu import sum3
from numdcn._kernels.simd_cpu import (
    at,
    fma,
    full,
    like,
    load,
    load_like,
    load_scalar,
    part,
    pointer,
    prefetch,
    store,
    width,
)

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
    index: Any  # of each pixel: the element of the rimmed image where the tap's cell begins
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
def tile_at(address, one):  # type: ignore[no-untyped-def]
    """The `Tile` whose buffers begin at `address`, with offsets of 0 and masks of 1."""
    integers, rows = pointer(address, np.int64(0)), pointer(address + 5 * ROW * 8, one)
    for i in range(ROW):
        store(rows, OFFSET_Y + i, one - one)
        store(rows, OFFSET_X + i, one - one)
        store(rows, SCALE + i, one)
    return Tile(integers, at(integers, 4 * ROW), rows)


@block
def place_tile(tile, cut, number, out_size, stride, before):  # type: ignore[no-untyped-def]
    """Fill in a tile's runs and positions; returns the numbers of its runs and of its pixels."""
    column = number * cut.tile_columns
    bands = (out_size[0] + cut.band - 1) // cut.band
    last = min(column + cut.tile_columns, bands * out_size[1])
    runs, pixels = 0, 0
    while column < last:
        row, x = column // out_size[1] * cut.band, column % out_size[1]
        count = min(out_size[1] - x, last - column)
        for y in range(row, min(row + cut.band, out_size[0])):
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
def read_plane(plane, strides, ahead, tile, runs, target):  # type: ignore[no-untyped-def]
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
def write_plane(plane, strides, tile, runs, source):  # type: ignore[no-untyped-def]
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


@block
def plan_tap(tile, pixels, tap, size, channels):  # type: ignore[no-untyped-def]
    """Fill in index, weights and fractions for the tap displaced by `tap` from the base positions.

    Runs over the tile's end up to a full register: what lies there is never used.
    """
    one = load_scalar(tile.rows, BASE_Y)
    lane = full(one)
    tap_y, tap_x = like(tap[0], lane), like(tap[1], lane)
    height, width_ = like(size[0], lane), like(size[1], lane)
    for p in range(0, pixels, width(one)):
        y = (load(tile.rows, BASE_Y + p) + tap_y) + load(tile.rows, OFFSET_Y + p)
        x = (load(tile.rows, BASE_X + p) + tap_x) + load(tile.rows, OFFSET_X + p)
        row, column, fraction_y, fraction_x = cell(y, x, height, width_)
        store(tile.index, p, (row * like(size[1] + 1, row) + column) * like(channels, row))
        w00, w01, w10, w11 = corner_weights(fraction_y, fraction_x)
        store(tile.rows, FRACTION_Y + p, fraction_y)
        store(tile.rows, FRACTION_X + p, fraction_x)
        store(tile.rows, W00 + p, w00)
        store(tile.rows, W01 + p, w01)
        store(tile.rows, W10 + p, w10)
        store(tile.rows, W11 + p, w11)


@helper
def corners(image, index, channels, below, kind):  # type: ignore[no-untyped-def]
    """The four corners of a cell, along the channels; `below`: elements from a pixel to the one under it."""
    return (
        load_like(image, index, kind),
        load_like(image, index + channels, kind),
        load_like(image, index + below, kind),
        load_like(image, index + below + channels, kind),
    )


@helper
def weights_of(tile, p, kind):  # type: ignore[no-untyped-def]
    """The corner weights of pixel p of a tile, in every lane."""
    return (
        like(load_scalar(tile.rows, W00 + p), kind),
        like(load_scalar(tile.rows, W01 + p), kind),
        like(load_scalar(tile.rows, W10 + p), kind),
        like(load_scalar(tile.rows, W11 + p), kind),
    )


@helper
def _sample_vectors(vectors, kind, lanes, image, tile, pixels, channels, below, columns, pitch):  # type: ignore[no-untyped-def]
    for p in range(pixels):
        index = load_scalar(tile.index, p)
        weights, scale = weights_of(tile, p, kind), like(load_scalar(tile.rows, SCALE + p), kind)
        for v in range(vectors):
            sample = value(weights, corners(image, index + v * lanes, channels, below, kind))
            store(columns, p * pitch + v * lanes, scale * sample)


@block
def sample_tap(image, tile, pixels, count, channels, below, columns, pitch):  # type: ignore[no-untyped-def]
    """columns[p * pitch + c] = scale * sample of channel c of `image` at pixel p, for c < count, as planned."""
    one = load_scalar(tile.rows, BASE_Y)
    step, c = width(one), 0
    while c < count:
        source, target, rest = at(image, c), at(columns, c), count - c
        if rest >= step:
            vectors = min(rest // step, 4)
            _sample_vectors(vectors, full(one), step, source, tile, pixels, channels, below, target, pitch)
            c += vectors * step
        elif step > 8 and rest >= 8:
            _sample_vectors(1, part(one, 8), 8, source, tile, pixels, channels, below, target, pitch)
            c += 8
        elif step > 4 and rest >= 4:
            _sample_vectors(1, part(one, 4), 4, source, tile, pixels, channels, below, target, pitch)
            c += 4
        else:
            _sample_vectors(1, one, 1, source, tile, pixels, channels, below, target, pitch)
            c += 1


@helper
def _copy_vectors(kind, lanes, count, image, tile, pixels, columns, pitch):  # type: ignore[no-untyped-def]
    for p in range(pixels):
        index = load_scalar(tile.index, p)
        for c in range(0, count, lanes):
            store(columns, p * pitch + c, load_like(image, index + c, kind))


@block
def copy_tap(image, tile, pixels, count, columns, pitch):  # type: ignore[no-untyped-def]
    """columns[p * pitch + c] = channel c of `image` at pixel p, for c < count: `sample_tap` with nothing to interpolate."""
    one = load_scalar(tile.rows, BASE_Y)
    step = width(one)
    whole = count // step * step
    quarters = (count - whole) // 4 * 4
    _copy_vectors(full(one), step, whole, image, tile, pixels, columns, pitch)
    _copy_vectors(part(one, 4), 4, quarters, at(image, whole), tile, pixels, at(columns, whole), pitch)
    rest = whole + quarters
    _copy_vectors(one, 1, count - rest, at(image, rest), tile, pixels, at(columns, rest), pitch)


@helper
def _exchange_vectors(kind, lanes, count, image, grad_image, wanted, tile, pixels, columns, pitch):  # type: ignore[no-untyped-def]
    for p in range(pixels):
        index = load_scalar(tile.index, p)
        for c in range(0, count, lanes):
            if wanted:
                gradient = load_like(columns, p * pitch + c, kind)
                store(grad_image, index + c, load_like(grad_image, index + c, kind) + gradient)
            store(columns, p * pitch + c, load_like(image, index + c, kind))


@block
def copy_tap_backward(image, grad_image, wanted, tile, pixels, count, columns, pitch):  # type: ignore[no-untyped-def]
    """The backward of `copy_tap`. `columns` holds the gradient of the columns and receives the columns themselves.

    Adds to `grad_image` if `wanted`.
    """
    one = load_scalar(tile.rows, BASE_Y)
    step = width(one)
    whole = count // step * step
    quarters = (count - whole) // 4 * 4
    rest = whole + quarters
    _exchange_vectors(full(one), step, whole, image, grad_image, wanted, tile, pixels, columns, pitch)
    x, g, target = at(image, whole), at(grad_image, whole), at(columns, whole)
    _exchange_vectors(part(one, 4), 4, quarters, x, g, wanted, tile, pixels, target, pitch)
    x, g, target = at(image, rest), at(grad_image, rest), at(columns, rest)
    _exchange_vectors(one, 1, count - rest, x, g, wanted, tile, pixels, target, pitch)


@helper
def _add_at(image, index, channels, below, weights, gradient):  # type: ignore[no-untyped-def]
    w00, w01, w10, w11 = weights
    c00, c01, c10, c11 = corners(image, index, channels, below, gradient)
    store(image, index, fma(w00, gradient, c00))
    store(image, index + channels, fma(w01, gradient, c01))
    store(image, index + below, fma(w10, gradient, c10))
    store(image, index + below + channels, fma(w11, gradient, c11))


@helper
def _backward_vectors(
    vectors, kind, lanes, image, grad_image, wanted, tile, pixels, channels, below, columns, pitch, add
):  # type: ignore[no-untyped-def]
    one = like(1.0, kind)
    for p in range(pixels):
        index = load_scalar(tile.index, p)
        weights, scale = weights_of(tile, p, kind), like(load_scalar(tile.rows, SCALE + p), kind)
        fraction_y, fraction_x = (
            like(load_scalar(tile.rows, FRACTION_Y + p), kind),
            like(load_scalar(tile.rows, FRACTION_X + p), kind),
        )
        fractions = (fraction_y, fraction_x, one - fraction_y, one - fraction_x)
        by_y, by_x, by_scale = one - one, one - one, one - one
        for v in range(vectors):
            gradient = load_like(columns, p * pitch + v * lanes, kind)
            around = corners(image, index + v * lanes, channels, below, kind)
            sample, (along_y, along_x) = value(weights, around), slopes(fractions, around)
            by_y, by_x = fma(gradient, along_y, by_y), fma(gradient, along_x, by_x)
            by_scale = fma(gradient, sample, by_scale)
            if wanted:
                _add_at(grad_image, index + v * lanes, channels, below, weights, gradient * scale)
            store(columns, p * pitch + v * lanes, scale * sample)
        sum_y, sum_x, sum_scale = sum3(by_y, by_x, by_scale)
        scale_p = load_scalar(tile.rows, SCALE + p)
        if add:
            store(tile.rows, GRAD_Y + p, fma(scale_p, sum_y, load_scalar(tile.rows, GRAD_Y + p)))
            store(tile.rows, GRAD_X + p, fma(scale_p, sum_x, load_scalar(tile.rows, GRAD_X + p)))
            store(tile.rows, GRAD_SCALE + p, load_scalar(tile.rows, GRAD_SCALE + p) + sum_scale)
        else:
            store(tile.rows, GRAD_Y + p, scale_p * sum_y)
            store(tile.rows, GRAD_X + p, scale_p * sum_x)
            store(tile.rows, GRAD_SCALE + p, sum_scale)


@block
def sample_tap_backward(image, grad_image, wanted, tile, pixels, count, channels, below, columns, pitch):  # type: ignore[no-untyped-def]
    """The backward of `sample_tap`. `columns` holds the gradient of the columns and receives the columns themselves.

    Adds to `grad_image` if `wanted`; fills the tile's gradients.
    """
    one = load_scalar(tile.rows, BASE_Y)
    step, c = width(one), 0
    while c < count:
        x, g, target, rest, add = at(image, c), at(grad_image, c), at(columns, c), count - c, c > 0
        if rest >= step:
            vectors = min(rest // step, 4)
            _backward_vectors(vectors, full(one), step, x, g, wanted, tile, pixels, channels, below, target, pitch, add)
            c += vectors * step
        elif step > 8 and rest >= 8:
            _backward_vectors(1, part(one, 8), 8, x, g, wanted, tile, pixels, channels, below, target, pitch, add)
            c += 8
        elif step > 4 and rest >= 4:
            _backward_vectors(1, part(one, 4), 4, x, g, wanted, tile, pixels, channels, below, target, pitch, add)
            c += 4
        else:
            _backward_vectors(1, one, 1, x, g, wanted, tile, pixels, channels, below, target, pitch, add)
            c += 1
