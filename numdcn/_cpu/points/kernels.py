"""CPU kernels for sampling at points.

Given zero-padded images, the forward computes y by tiles of points: plan (cells and weights), sample along the
channels, transpose the samples into y. The backward does the same for a block of channels, owned by a task: it adds the
gradient of the samples to the image's gradient and produces a partial sum of that of the points.
"""

from __future__ import annotations

from typing import NamedTuple

from numdcn._cpu.jit import kernel
from numdcn._cpu.layout import GradientSink, Image, Matrix, image_from, padded_pixels
from numdcn._cpu.parameters import NOWHERE, Place, unpack
from numdcn._cpu.points_blocking import PointsBlocking
from numdcn._cpu.sample import plan_tap, sample_tap, sample_tap_backward
from numdcn._cpu.simd import at, next_task, pointer
from numdcn._cpu.tile import GRAD_X, GRAD_Y, OFFSET_X, OFFSET_Y, new_tile, place_tile
from numdcn._cpu.tile_io import PACKING_ELEMENTS, gradient_rows, pack_gradient, read_plane, write_plane, write_tile
from numdcn._formulas.jit import helper


class PointsCall(NamedTuple):
    """Parameters of the kernels."""

    batch: int
    channels: int
    size: tuple[int, int]  # of an image
    points_size: tuple[int, int]  # the points as an image of one row
    blocking: PointsBlocking
    points: Place  # (N, points, 2)
    y: Place  # (N, C, 1, points); in the backward: its gradient
    grad_points: Place  # (blocks, N, points, 2): partial sums; `NOWHERE`: not wanted
    images: int  # address of the zero-padded images
    grad_images: int  # address of their gradients; 0: not wanted
    workspaces: int  # address of the threads' workspaces


@helper
def _place_points(one, a, n, number, unplaced):
    """Tile `number` of the points of image n, as offsets from base positions of 0."""
    tile = place_tile(unplaced, a.blocking.tiling, number, a.points_size, (0, 0), (0, 0))
    strides = a.points.strides
    points = at(pointer(a.points.address, one), n * strides[0])
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
        tile = _place_points(one, a, n, task % blocking.tiling.tiles, unplaced)
        plan_tap(tile, (0, 0), a.size, a.channels)
        start = at(pointer(a.images, one), n * blocking.image_size)
        image = Image(start, a.channels, (a.size[1] + 1) * a.channels)
        for c in range(0, a.channels, blocking.panel):
            count = min(blocking.panel, a.channels - c)
            whole = (count + 3) // 4 * 4 if count > 1 else 1  # faster, and the overrun is never read
            sample_tap(image_from(image, c), tile, whole, samples)
            write_tile(one, a.y, NOWHERE, n, c, count, tile, samples, buffer)


@kernel
def backward_blocks(one, params, counter, slot):
    """The gradients. A task is a block of channels of an image."""
    a = unpack(params, PointsCall)
    blocking = a.blocking
    base = a.workspaces + slot * blocking.workspace_bytes
    unplaced = new_tile(base, one)
    buffer = pointer(base + blocking.tile_bytes, one)
    samples = Matrix(at(buffer, PACKING_ELEMENTS), blocking.panel)
    while True:
        task = next_task(counter)
        if task >= a.batch * blocking.blocks:
            return
        n, block_ = task // blocking.blocks, task % blocking.blocks
        first = block_ * blocking.panel
        count = min(blocking.panel, a.channels - first)
        start = n * blocking.image_size + first * padded_pixels(a.size)
        row = (a.size[1] + 1) * count
        image = Image(at(pointer(a.images, one), start), count, row)
        sink = GradientSink(image, at(pointer(a.grad_images, one), start), row, a.grad_images != 0)
        strides = a.grad_points.strides
        grad_points = at(pointer(a.grad_points.address, one), block_ * strides[0] + n * strides[1])
        for number in range(blocking.tiling.tiles):
            tile = _place_points(one, a, n, number, unplaced)
            plan_tap(tile, (0, 0), a.size, count)
            target = gradient_rows(samples.pointer, samples.pitch, blocking.rows)
            pack_gradient(one, a.y, n, first, count, tile, target, buffer)
            sample_tap_backward(sink, tile, tile.index, count, samples)
            if a.grad_points.address:
                write_plane(grad_points, (0, 2), tile, at(tile.rows, GRAD_Y))
                write_plane(at(grad_points, 1), (0, 2), tile, at(tile.rows, GRAD_X))
