"""CPU kernels of the gradient of images that are sampled at points.

The rows that each tile of points reaches are noted first, by `survey_points` unless `kernels.point_gradients` did it. Then
a task owns a band of rows of a block of channels of an image. It visits the tiles that reach the band in order, adds to
rows in its workspace, and writes them to grad_x. So no two tasks add to the same memory, and the order of additions is
that of the points, however many bands there are and wherever they lie.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from numdcn._cpu.bands import SPAN, Bands, band_of, reaches, span_at
from numdcn._cpu.jit import block, kernel
from numdcn._cpu.layout import Image, fill, from_channels_last
from numdcn._cpu.parameters import Place, unpack
from numdcn._cpu.points.kernels import note_tile, place_points
from numdcn._cpu.sample import add_at, plan_tap, weights_of
from numdcn._cpu.simd import at, full, load_like, load_scalar, narrow, next_task, pointer, width
from numdcn._cpu.tile import MOST_PIXELS, W00, Tiling, new_tile, tile_bytes
from numdcn._cpu.tile_io import PACKING_ELEMENTS, PackedGradient, pack_gradient
from numdcn._formulas.jit import helper

TILES = 16  # surveyed per task


class SpreadBlocking(NamedTuple):
    """Tasks and the workspace of a thread; determined by the shapes."""

    tiling: Tiling  # the points as an image of one row
    bands: Bands
    tile_bytes: int  # of a workspace: for a tile's plan,
    samples_bytes: int  # then for the gradients of its points; the rest is as `Bands` says
    workspace_bytes: int


def spread_blocking(tiling: Tiling, bands: Bands, itemsize: int) -> SpreadBlocking:
    """The blocking for tiles of points."""
    tile = tile_bytes(itemsize)
    samples = -(-(PACKING_ELEMENTS + (MOST_PIXELS + 32) * bands.panel) * itemsize // 64) * 64
    workspace = -(-(tile + samples + bands.costs_bytes + bands.sums_bytes) // 4096) * 4096
    return SpreadBlocking(tiling, bands, tile, samples, workspace)


class SpreadCall(NamedTuple):
    """Parameters of `survey_points` and `spread_points`."""

    batch: int
    channels: int
    size: tuple[int, int]  # of an image
    points_size: tuple[int, int]  # the points as an image of one row
    blocking: SpreadBlocking
    points: Place  # (N, points, 2)
    grad_y: Place  # (N, C, 1, points)
    grad_x: Place  # (N, C, H, W)
    spans: int  # address of the spans of all tiles
    workspaces: int  # address of the threads' workspaces


@kernel
def survey_points(one, params, counter, slot):
    """Note which rows the tiles of points reach. A task is a few tiles."""
    a = unpack(params, SpreadCall)
    tiling = a.blocking.tiling
    unplaced = new_tile(a.workspaces + slot * a.blocking.workspace_bytes, one)
    while True:
        first = next_task(counter) * TILES
        if first >= a.batch * tiling.tiles:
            return
        for number in range(first, min(first + TILES, a.batch * tiling.tiles)):
            n = number // tiling.tiles
            tile = place_points(one, a.points, tiling, a.points_size, n, number % tiling.tiles, unplaced)
            plan_tap(tile, (0, 0), a.size, 1)
            note_tile(tile, a.spans, number, n, a.size, 1)


@block
def add_points(grad, tile, start, end, count, gradients, pitch):
    """Add the gradients of a tile's points whose cells start at elements `start` to `end` of the image, for `count`
    channels. `grad` begins at element `start`."""
    one = load_scalar(tile.rows, W00)
    step = width(one)
    for pixel in range(tile.pixels):
        cell = load_scalar(tile.index, pixel)
        if cell < start or cell >= end:
            continue
        index, gradient, c = cell - start, at(gradients, pixel * pitch), 0
        weights = weights_of(tile, pixel, full(one))
        while c + step <= count:
            add_at(grad, index + c, weights, load_like(gradient, c, full(one)))
            c += step
        if c < count:
            narrow_weights = weights_of(tile, pixel, narrow(one, 4))
            while step > 4 and c + 4 <= count:
                add_at(grad, index + c, narrow_weights, load_like(gradient, c, narrow(one, 4)))
                c += 4
            scalars = weights_of(tile, pixel, one)
            while c < count:
                add_at(grad, index + c, scalars, load_like(gradient, c, one))
                c += 1


@helper
def _spread(of_x, one, params, counter, slot):
    """grad_x, of elements of the type of `of_x`. A task is a band of rows of a block of channels of an image."""
    a = unpack(params, SpreadCall)
    b, bands, columns, tiles = a.blocking, a.blocking.bands, a.size[1], a.blocking.tiling.tiles
    base = a.workspaces + slot * b.workspace_bytes
    unplaced, buffer = new_tile(base, one), pointer(base + b.tile_bytes, one)
    gradients, costs = at(buffer, PACKING_ELEMENTS), base + b.tile_bytes + b.samples_bytes
    sums, strides = pointer(costs + bands.costs_bytes, one), a.grad_x.strides
    while True:
        task = next_task(counter)
        if task >= a.batch * bands.count * bands.blocks:
            return
        n, number = task // (bands.count * bands.blocks), task // bands.blocks % bands.count
        channel = task % bands.blocks * bands.panel
        count = min(bands.panel, a.channels - channel)
        row, spans = (columns + 1) * count, a.spans + n * tiles * SPAN * 8
        band_first, band_end = band_of(spans, tiles, n, a.size, number, bands.count, costs)
        for first in range(band_first, band_end, bands.rows):
            end = min(first + bands.rows, band_end)
            # from the row above the first to the one below
            fill(sums, 0, (end - first + 2) * row + 2 * count, one - one)
            for t in range(tiles):
                if not reaches(span_at(spans, t), n, first, end):
                    continue
                tile = place_points(one, a.points, b.tiling, a.points_size, n, t, unplaced)
                plan_tap(tile, (0, 0), a.size, count)
                target = PackedGradient(gradients, bands.panel, MOST_PIXELS + 32)
                pack_gradient(one, a.grad_y, n, channel, count, tile, target, buffer)
                grad = Image(sums, count, row)  # rows of cells are counted from the padding
                add_points(grad, tile, first * row, (end + 1) * row, count, gradients, bands.panel)
            spot = n * strides[0] + channel * strides[1] + first * strides[2]
            plane, size = at(pointer(a.grad_x.address, of_x), spot), (end - first, columns)
            from_channels_last(sums, 0, (end - first) * columns, size, count, plane, strides[1:], buffer)


@kernel
def spread_points(one, params, counter, slot):
    """grad_x in the type of the computation."""
    _spread(one, one, params, counter, slot)


@kernel
def spread_float16(one, params, counter, slot):
    """grad_x in float16."""
    _spread(np.uint16(0), one, params, counter, slot)


@kernel
def spread_bfloat16(one, params, counter, slot):
    """grad_x in bfloat16."""
    _spread(np.int16(0), one, params, counter, slot)
