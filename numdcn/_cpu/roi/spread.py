"""CPU kernels of the gradient of images whose bins read every channel.

`survey.survey_boxes` runs first. Then a task owns a band of rows of a block of channels of an image. It visits the boxes
that reach the band in order, adds to rows in its workspace, and writes them to grad_x. So no two tasks add to the same
memory, and the order of additions is that of the boxes and bins, however many bands there are and wherever they lie.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numdcn._cpu.bands import Bands, band_of, reaches, span_at
from numdcn._cpu.jit import block, kernel
from numdcn._cpu.layout import fill, from_channels_last
from numdcn._cpu.parameters import Place, unpack
from numdcn._cpu.roi.bins import Bin, Grid, lists_at, plan_bin, samples_of
from numdcn._cpu.roi.pool import mask_of
from numdcn._cpu.roi.survey import Surveys, is_listed, noted_at, noted_bin, numbers_of
from numdcn._cpu.simd import at, full, load_like, load_scalar, narrow, next_task, pointer, store, width
from numdcn._cpu.tile import MOST_PIXELS, Tile, new_tile, tile_bytes
from numdcn._cpu.tile_io import PACKING_ELEMENTS, PackedGradient, pack_gradient
from numdcn._formulas.jit import helper
from numdcn._formulas.vectors import fma, like


class SpreadBlocking(NamedTuple):
    """Tasks and the workspace of a thread; determined by the shapes."""

    bands: Bands
    tile_bytes: int  # of a workspace: for the tile that reads grad_y,
    samples_bytes: int  # then for the gradients of its bins,
    lists_bytes: int  # for lists that were not noted; the rest is as `Bands` says
    workspace_bytes: int


def spread_blocking(bands: Bands, lists_bytes: int, itemsize: int) -> SpreadBlocking:
    """The blocking; `lists_bytes` is the room for lists that were not noted."""
    tile = tile_bytes(itemsize)
    samples = -(-(PACKING_ELEMENTS + (MOST_PIXELS + 32) * bands.panel) * itemsize // 64) * 64
    workspace = tile + samples + lists_bytes + bands.costs_bytes + bands.sums_bytes
    return SpreadBlocking(bands, tile, samples, lists_bytes, -(-workspace // 4096) * 4096)


class SpreadCall(NamedTuple):
    """Parameters of `spread_bins`."""

    batch: int
    channels: int
    grid: Grid
    surveys: Surveys
    blocking: SpreadBlocking
    mask: Place  # (R, 1, Ph, Pw); `NOWHERE`: none
    grad_y: Place  # (R, C, 1, Ph*Pw)
    grad_x: Place  # (N, C, H, W)
    workspaces: int  # address of the threads' workspaces


class Band(NamedTuple):
    """Rows of a block of channels of an image, and where they are added up."""

    first: int
    end: int
    channel: int  # the first
    count: int  # of channels
    origin: Any  # a pointer to where pixel (0, 0) of the image would be
    row: int  # elements from a row to the next


class Room(NamedTuple):
    """What a thread works with; all but the tile are pointers."""

    tile: Tile
    buffer: Any
    gradients: Any
    ys: Any
    xs: Any


@helper
def within(bin_, first, end):
    """The part of a list, which ascends, from pixel `first` to `end`."""
    low, high = 0, bin_.length
    while low < high and load_scalar(bin_.index, low) < first:
        low += 1
    while high > low and load_scalar(bin_.index, high - 1) >= end:
        high -= 1
    return Bin(at(bin_.index, low), at(bin_.weight, low), at(bin_.slope, low), high - low, bin_.active)


@helper
def _add_two(vector, lanes, band, y, x, gradient, scale, c):
    """`add_bin` for two vectors of channels, from channel c of the band on."""
    s = like(scale, vector)
    scaled_a, scaled_b = load_like(gradient, c, vector) * s, load_like(gradient, c + lanes, vector) * s
    for i in range(y.length):
        line, weight = at(band.origin, load_scalar(y.index, i) * band.row + c), load_scalar(y.weight, i)
        for j in range(x.length):
            spot = load_scalar(x.index, j) * band.count
            w = like(weight * load_scalar(x.weight, j), vector)
            a, b = load_like(line, spot, vector), load_like(line, spot + lanes, vector)
            store(line, spot, fma(w, scaled_a, a))
            store(line, spot + lanes, fma(w, scaled_b, b))


@helper
def _add_one(vector, band, y, x, gradient, scale, c):
    """`add_bin` for one vector of channels, or a scalar."""
    scaled = load_like(gradient, c, vector) * like(scale, vector)
    for i in range(y.length):
        line, weight = at(band.origin, load_scalar(y.index, i) * band.row + c), load_scalar(y.weight, i)
        for j in range(x.length):
            spot = load_scalar(x.index, j) * band.count
            w = like(weight * load_scalar(x.weight, j), vector)
            store(line, spot, fma(w, scaled, load_like(line, spot, vector)))


@block
def add_bin(band, y, x, gradient, scale):
    """Add scale * gradient, times the weights of a bin, to the pixels of a band."""
    one, c = like(1.0, scale), 0
    step = width(one)
    while c < band.count:
        rest = band.count - c
        if rest >= 2 * step:
            _add_two(full(one), step, band, y, x, gradient, scale, c)
            c += 2 * step
        elif rest >= step:
            _add_one(full(one), band, y, x, gradient, scale, c)
            c += step
        elif step > 4 and rest >= 4:
            _add_one(narrow(one, 4), band, y, x, gradient, scale, c)
            c += 4
        else:
            _add_one(one, band, y, x, gradient, scale, c)
            c += 1


@helper
def _touched(grid, noted, band):
    """The bins of a box that may reach a band, by its noted lists: number of the first, and the end."""
    bins, first, end = grid.bins[0] * grid.bins[1], grid.bins[0] * grid.bins[1], 0
    shifted = grid.shifts.address != 0
    run = 1 if shifted else grid.bins[1]  # bins that share a list along y
    for b in range(0, bins, run):
        number, _ = numbers_of(grid, b)
        y = noted_bin(noted, number)
        if y.length > 0:
            low, high = load_scalar(y.index, 0), load_scalar(y.index, y.length - 1)
            if low < band.end and high >= band.first:
                first, end = min(first, b), b + run
    return first, end


@helper
def _place(tile, first, count):
    """A tile of adjacent bins of a box, of which only the run is filled in."""
    store(tile.runs, 0, 0)
    store(tile.runs, 1, 0)
    store(tile.runs, 2, first)
    store(tile.runs, 3, count)
    return Tile(tile.runs, tile.index, tile.spots, tile.rows, 1, count)


@block
def _add_box(one, a, r, band, room):
    """Add the gradient of box r to a band."""
    grid, panel, noted = a.grid, a.blocking.bands.panel, noted_at(one, a.surveys, r)
    listed = is_listed(noted)
    first, end = 0, grid.bins[0] * grid.bins[1]
    if listed:
        first, end = _touched(grid, noted, band)
    for start in range(first, end, MOST_PIXELS):
        tile = _place(room.tile, start, min(MOST_PIXELS, end - start))
        target = PackedGradient(room.gradients, panel, MOST_PIXELS + 32)
        pack_gradient(one, a.grad_y, r, band.channel, band.count, tile, target, room.buffer)
        for p in range(tile.pixels):
            b, nowhere = start + p, False
            if listed:
                number_y, number_x = numbers_of(grid, b)
                y, x = noted_bin(noted, number_y), noted_bin(noted, number_x)
                divisor, _ = samples_of(one, grid, r, y, x)
            else:
                y, x, divisor, nowhere = plan_bin(
                    one, grid, r, b // grid.bins[1], b % grid.bins[1], 0, room.ys, room.xs
                )
            y = within(y, band.first, band.end)
            if y.length > 0 and x.length > 0 and not nowhere:
                add_bin(band, y, x, at(room.gradients, p * panel), mask_of(one, a.mask, grid, r, b) / divisor)


@helper
def _spread(of_x, one, params, counter, slot):
    """grad_x, of elements of the type of `of_x`. A task is a band of rows of a block of channels of an image."""
    a = unpack(params, SpreadCall)
    grid, bands, columns = a.grid, a.blocking.bands, a.grid.size[1]
    base = a.workspaces + slot * a.blocking.workspace_bytes
    buffer = pointer(base + a.blocking.tile_bytes, one)
    lists = base + a.blocking.tile_bytes + a.blocking.samples_bytes
    ys, xs = lists_at(lists, grid, one)
    room = Room(new_tile(base, one), buffer, at(buffer, PACKING_ELEMENTS), ys, xs)
    costs = lists + a.blocking.lists_bytes
    sums, spans, strides = pointer(costs + bands.costs_bytes, one), a.surveys.spans, a.grad_x.strides
    while True:
        task = next_task(counter)
        if task >= a.batch * bands.count * bands.blocks:
            return
        n, number = task // (bands.count * bands.blocks), task // bands.blocks % bands.count
        channel = task % bands.blocks * bands.panel
        count = min(bands.panel, a.channels - channel)
        row = (columns + 1) * count
        band_first, band_end = band_of(spans, grid.rois, n, grid.size, number, bands.count, costs)
        for first in range(band_first, band_end, bands.rows):
            end = min(first + bands.rows, band_end)
            fill(sums, 0, (end - first + 1) * row, one - one)
            band = Band(first, end, channel, count, at(sums, row + count - first * row), row)
            for r in range(grid.rois):
                if reaches(span_at(spans, r), n, first, end):
                    _add_box(one, a, r, band, room)
            spot = n * strides[0] + channel * strides[1] + first * strides[2]
            target, size = at(pointer(a.grad_x.address, of_x), spot), (end - first, columns)
            from_channels_last(sums, 0, (end - first) * columns, size, count, target, strides[1:], buffer)


@kernel
def spread_bins(one, params, counter, slot):
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
