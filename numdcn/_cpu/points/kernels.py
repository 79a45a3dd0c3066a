"""The kernels of samples at points on the CPU.

x is copied to channels-last with a border of zeros; then, tile by tile of points: plan (cells and weights), sample along
the channels, turn the tile into y. The backward does so for a block of channels, which a task owns: the gradient of the
samples is added to the image's gradient and yields that of the points, of which each block has a share.
"""

from __future__ import annotations

from typing import NamedTuple

from numdcn._cpu.blocking import PointsBlocking
from numdcn._cpu.conv.columns import pack_gradient, write_tile
from numdcn._cpu.jit import kernel
from numdcn._cpu.layout import padded_pixels
from numdcn._cpu.parameters import Place, unpack
from numdcn._cpu.sample import plan_tap, sample_tap, sample_tap_backward
from numdcn._cpu.simd import at, next_task, pointer
from numdcn._cpu.tile import GRAD_X, GRAD_Y, OFFSET_X, OFFSET_Y, ROW, place_tile, read_plane, tile_at, write_plane
from numdcn._formulas.jit import helper


class Call(NamedTuple):
    """Parameters of the kernels."""

    batch: int
    channels: int
    size: tuple[int, int]
    points_size: tuple[int, int]  # as an image of one row
    blocking: PointsBlocking
    points: Place
    bias: Place  # there is none
    y: Place  # in the backward: its gradient
    grad_points: Place
    images: int
    grad_images: int
    slots: int


@helper
def _place_points(one, a, n, number, tile):
    """Fill in the points of a tile, from base positions that are 0; returns its numbers of runs and of points."""
    runs, pixels = place_tile(tile, a.blocking, number, a.points_size, (0, 0), (0, 0))
    strides = a.points.strides
    points = at(pointer(a.points.address, one), n * strides[0])
    read_plane(points, (0, strides[1]), 0, tile, runs, at(tile.rows, OFFSET_Y))
    read_plane(at(points, strides[2]), (0, strides[1]), 0, tile, runs, at(tile.rows, OFFSET_X))
    return runs, pixels


@kernel
def forward_tiles(one, params, counter, slot):
    """y, tile by tile. A task is a tile of the points of an image."""
    a = unpack(params, Call)
    blocking = a.blocking
    base = a.slots + slot * blocking.slot_bytes
    tile = tile_at(base, one)
    samples = pointer(base + blocking.tile_bytes, one)
    buffer = at(samples, blocking.rows * blocking.pitch)
    while True:
        task = next_task(counter)
        if task >= a.batch * blocking.tiles:
            return
        n = task // blocking.tiles
        runs, pixels = _place_points(one, a, n, task % blocking.tiles, tile)
        plan_tap(tile, pixels, (0, 0), a.size, a.channels)
        image, below = at(pointer(a.images, one), n * blocking.image_size), (a.size[1] + 1) * a.channels
        for c in range(0, a.channels, blocking.panel):
            count = min(blocking.panel, a.channels - c)
            whole = (count + 3) // 4 * 4 if count > 1 else 1  # faster, and what runs over is never read
            sample_tap(at(image, c), tile, pixels, whole, a.channels, below, samples, blocking.pitch)
            write_tile(one, a, n, c, count, tile, runs, pixels, samples, blocking.pitch, buffer, False)


@kernel
def backward_blocks(one, params, counter, slot):
    """The gradients. A task is a block of channels of an image."""
    a = unpack(params, Call)
    blocking = a.blocking
    base = a.slots + slot * blocking.slot_bytes
    tile = tile_at(base, one)
    lines = pointer(base + blocking.tile_bytes, one)
    buffer, samples = at(lines, 16 * ROW), at(lines, 16 * ROW + 256)
    while True:
        task = next_task(counter)
        if task >= a.batch * blocking.blocks:
            return
        n, block_ = task // blocking.blocks, task % blocking.blocks
        first = block_ * blocking.panel
        count = min(blocking.panel, a.channels - first)
        start, below = n * blocking.image_size + first * padded_pixels(a.size), (a.size[1] + 1) * count
        image, grad_image = at(pointer(a.images, one), start), at(pointer(a.grad_images, one), start)
        strides = a.grad_points.strides
        grad_points = at(pointer(a.grad_points.address, one), block_ * strides[0] + n * strides[1])
        for number in range(blocking.tiles):
            runs, pixels = _place_points(one, a, n, number, tile)
            plan_tap(tile, pixels, (0, 0), a.size, count)
            pack_gradient(
                one, a.y, n, first, count, blocking, (False, True), tile, runs, pixels, lines, samples, samples, buffer
            )
            sample_tap_backward(
                image, grad_image, a.grad_images != 0, tile, pixels, count, count, below, samples, blocking.panel
            )
            if a.grad_points.address:
                write_plane(grad_points, (0, 2), tile, runs, at(tile.rows, GRAD_Y))
                write_plane(at(grad_points, 1), (0, 2), tile, runs, at(tile.rows, GRAD_X))
