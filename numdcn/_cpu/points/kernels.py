"""CPU kernels for sampling at points.

Given zero-padded images, the forward computes y by tiles of points: plan (cells and weights), sample along the
channels, transpose the samples into y. The gradient of the points reads the same corners. That of the images is in
`spread`; both planning passes note for it which rows a tile reaches.
"""

from __future__ import annotations

from typing import NamedTuple

from numdcn._cpu.bands import span_at, write_span
from numdcn._cpu.jit import block, kernel
from numdcn._cpu.lanes import sum3
from numdcn._cpu.layout import Image, Matrix, image_from
from numdcn._cpu.parameters import NOWHERE, Place, unpack
from numdcn._cpu.points_blocking import PointsBlocking
from numdcn._cpu.sample import corners, plan_tap, sample_tap
from numdcn._cpu.simd import at, full, load_like, load_scalar, next_task, pointer, store, width
from numdcn._cpu.tile import FRACTION_X, FRACTION_Y, GRAD_X, GRAD_Y, OFFSET_X, OFFSET_Y, new_tile, place_tile
from numdcn._cpu.tile_io import PACKING_ELEMENTS, PackedGradient, pack_gradient, read_plane, write_plane, write_tile
from numdcn._formulas.bilinear import slopes
from numdcn._formulas.jit import helper
from numdcn._formulas.vectors import fma, like

POINT_COST = 12  # of adding a sample's gradient, in additions to a pixel


class PointsCall(NamedTuple):
    """Parameters of `forward_tiles` and `point_gradients`."""

    batch: int
    channels: int
    size: tuple[int, int]  # of an image
    points_size: tuple[int, int]  # the points as an image of one row
    blocking: PointsBlocking
    points: Place  # (N, points, 2)
    y: Place  # (N, C, 1, points); in the backward: its gradient
    grad_points: Place  # (N, points, 2)
    images: int  # address of the zero-padded images
    spans: int  # address of the spans of all tiles, to be filled in by the backward
    workspaces: int  # address of the threads' workspaces


@helper
def place_points(one, points_place, tiling, points_size, n, number, unplaced):
    """Tile `number` of the points of image n, as offsets from base positions of 0."""
    tile = place_tile(unplaced, tiling, number, points_size, (0, 0), (0, 0))
    strides = points_place.strides
    points = at(pointer(points_place.address, one), n * strides[0])
    read_plane(points, (0, strides[1]), 0, tile, at(tile.rows, OFFSET_Y))
    read_plane(at(points, strides[2]), (0, strides[1]), 0, tile, at(tile.rows, OFFSET_X))
    return tile


@kernel
def forward_tiles(one, params, counter, slot):
    """y, tile by tile. A task is a tile of the points of an image."""
    a = unpack(params, PointsCall)
    blocking = a.blocking
    base = a.workspaces + slot * blocking.workspace_bytes
    unplaced = new_tile(base, one)
    samples = Matrix(pointer(base + blocking.tile_bytes, one), blocking.pitch)
    buffer = at(samples.pointer, blocking.rows * samples.pitch)
    while True:
        task = next_task(counter)
        if task >= a.batch * blocking.tiling.tiles:
            return
        n = task // blocking.tiling.tiles
        number = task % blocking.tiling.tiles
        tile = place_points(one, a.points, blocking.tiling, a.points_size, n, number, unplaced)
        plan_tap(tile, (0, 0), a.size, a.channels)
        start = at(pointer(a.images, one), n * blocking.image_size)
        image = Image(start, a.channels, (a.size[1] + 1) * a.channels)
        for c in range(0, a.channels, blocking.panel):
            count = min(blocking.panel, a.channels - c)
            whole = (count + 3) // 4 * 4 if count > 1 else 1  # faster, and the overrun is never read
            sample_tap(image_from(image, c), tile, whole, samples)
            write_tile(one, one, a.y, NOWHERE, n, c, count, tile, samples, buffer)


@block
def note_tile(tile, spans, number, n, size, pixel_stride):
    """Fill in span `number`: the rows that a planned tile of image n reaches, and what it costs to add its points."""
    nowhere = (size[0] + 1) * (size[1] + 1) * pixel_stride  # the cell of samples outside
    first, last = nowhere, -1
    for pixel in range(tile.pixels):
        index = load_scalar(tile.index, pixel)
        first, last = min(first, index), max(last, index if index < nowhere else -1)
    low, high = 0, 0
    if last >= 0:  # rows are counted from the padding
        row = (size[1] + 1) * pixel_stride
        low, high = max(first // row - 1, 0), min(last // row + 1, size[0])
    write_span(span_at(spans, number), n, low, high, POINT_COST * tile.pixels)


@helper
def _add_slopes(vector, image, index, fractions, gradient, sums):
    """Add to two sums, for one vector of channels or a scalar, gradient * slope along y, and along x."""
    along_y, along_x = slopes(fractions, corners(image, index, vector))
    return fma(gradient, along_y, sums[0]), fma(gradient, along_x, sums[1])


@block
def sum_slopes(image, tile, count, gradients, add):
    """Fill in the tile's gradients of y and x: sums over `count` channels, and what is there already if `add`."""
    one = load_scalar(tile.rows, FRACTION_Y)
    step, zero = width(one), full(like(0.0, one))
    for pixel in range(tile.pixels):
        index, row, c = load_scalar(tile.index, pixel), at(gradients.pointer, pixel * gradients.pitch), 0
        fraction_y, fraction_x = load_scalar(tile.rows, FRACTION_Y + pixel), load_scalar(tile.rows, FRACTION_X + pixel)
        scalars = (fraction_y, fraction_x, like(1.0, one) - fraction_y, like(1.0, one) - fraction_x)
        vectors = (full(scalars[0]), full(scalars[1]), full(scalars[2]), full(scalars[3]))
        sums = zero, zero
        while c + step <= count:
            sums = _add_slopes(zero, image, index + c, vectors, load_like(row, c, zero), sums)
            c += step
        by_y, by_x, _ = sum3(sums[0], sums[1], zero)
        while c < count:
            by_y, by_x = _add_slopes(one, image, index + c, scalars, load_scalar(row, c), (by_y, by_x))
            c += 1
        if add:
            by_y = load_scalar(tile.rows, GRAD_Y + pixel) + by_y
            by_x = load_scalar(tile.rows, GRAD_X + pixel) + by_x
        store(tile.rows, GRAD_Y + pixel, by_y)
        store(tile.rows, GRAD_X + pixel, by_x)


@kernel
def point_gradients(one, params, counter, slot):
    """The gradient of the points. A task is a tile of the points of an image."""
    a = unpack(params, PointsCall)
    blocking = a.blocking
    base = a.workspaces + slot * blocking.workspace_bytes
    unplaced = new_tile(base, one)
    buffer = pointer(base + blocking.tile_bytes, one)
    gradients, strides = Matrix(at(buffer, PACKING_ELEMENTS), blocking.pitch), a.grad_points.strides
    while True:
        task = next_task(counter)
        if task >= a.batch * blocking.tiling.tiles:
            return
        n = task // blocking.tiling.tiles
        number = task % blocking.tiling.tiles
        tile = place_points(one, a.points, blocking.tiling, a.points_size, n, number, unplaced)
        plan_tap(tile, (0, 0), a.size, a.channels)
        note_tile(tile, a.spans, task, n, a.size, a.channels)
        start = at(pointer(a.images, one), n * blocking.image_size)
        image = Image(start, a.channels, (a.size[1] + 1) * a.channels)
        for c in range(0, a.channels, blocking.panel):
            count = min(blocking.panel, a.channels - c)
            target = PackedGradient(gradients.pointer, gradients.pitch, blocking.rows)
            pack_gradient(one, a.y, n, c, count, tile, target, buffer)
            sum_slopes(image_from(image, c), tile, count, gradients, c > 0)
        grad_points = at(pointer(a.grad_points.address, one), n * strides[0])
        write_plane(grad_points, (0, strides[1]), tile, at(tile.rows, GRAD_Y))
        write_plane(at(grad_points, strides[2]), (0, strides[1]), tile, at(tile.rows, GRAD_X))
