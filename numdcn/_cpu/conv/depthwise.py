"""The forward of depthwise convolutions on the CPU: each channel makes one output by itself.

There is no matrix product. All taps of a tile are planned first (at most `PLANNED_TAPS` at a time); then, for each pixel and some
registers of channels, the samples of all taps are multiplied by their weights and added up in registers. So what the taps of a
pixel have in common is read from the L1 cache, and no column is stored.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from numdcn._cpu.conv.columns import plan_copies, plan_samples
from numdcn._cpu.conv.forward import compute_tiles
from numdcn._cpu.jit import block, kernel
from numdcn._cpu.layout import Matrix, columns_from, image_from
from numdcn._cpu.sample import corners, weights_at
from numdcn._cpu.simd import at, full, load, load_like, load_scalar, pointer, store, width
from numdcn._cpu.tile import MASK, ROW, W00, W01, W10, W11
from numdcn._formulas.bilinear import value
from numdcn._formulas.jit import helper
from numdcn._formulas.vectors import fma, like


class Plans(NamedTuple):
    """The plans of some taps of a tile: a row of each for every tap."""

    index: Any  # (taps, ROW) int64: the element of the zero-padded image where the cell starts
    rows: Any  # (taps, 5, ROW): the weights of its corners, and the mask
    pixels: int
    taps: int


@block
def _note_plan(tile, tap, plans):
    """Copy the plan of a tap from its tile."""
    step = width(load_scalar(tile.rows, 0))
    rows = at(plans.rows, tap * 5 * ROW)
    for pixel in range(0, tile.pixels, step):
        store(rows, pixel, load(tile.rows, W00 + pixel))
        store(rows, ROW + pixel, load(tile.rows, W01 + pixel))
        store(rows, 2 * ROW + pixel, load(tile.rows, W10 + pixel))
        store(rows, 3 * ROW + pixel, load(tile.rows, W11 + pixel))
        store(rows, 4 * ROW + pixel, load(tile.rows, MASK + pixel))
    for pixel in range(tile.pixels):
        store(plans.index, tap * ROW + pixel, load_scalar(tile.index, pixel))


@helper
def _sampled(image, index, rows, spot, vector):
    """The mask times the sample of a cell, for a vector of channels; its weights are at `spot`."""
    mask = like(load_scalar(rows, spot + 4 * ROW), vector)
    return mask * value(weights_at(rows, spot, vector), corners(image, index, vector))


@helper
def _copied(image, index, rows, spot, vector):
    """The pixel where a cell starts, for a vector of channels."""
    return load_like(image.pointer, index, vector)


@helper
def _add_taps(make, plans, image, count, weights, sums, first):
    """sums[pixel, c] = (or +=, unless these are the `first` taps) the sum over taps of what `make` makes of channel c, times
    weights[tap, c], for c < count. Overruns `count` by less than a register."""
    zero = full(like(-0.0, load_scalar(plans.rows, 0)))  # to which a product is added as it is, even one of 0
    step, c = width(load_scalar(plans.rows, 0)), 0
    while c + 3 * step < count:
        for pixel in range(plans.pixels):
            total = at(sums.pointer, pixel * sums.pitch + c)
            a, b, d, e = zero, zero, zero, zero
            if not first:
                a, b, d, e = load(total, 0), load(total, step), load(total, 2 * step), load(total, 3 * step)
            for tap in range(plans.taps):
                index, spot = load_scalar(plans.index, tap * ROW + pixel) + c, tap * 5 * ROW + pixel
                w = at(weights.pointer, tap * weights.pitch + c)
                a = fma(make(image, index, plans.rows, spot, zero), load(w, 0), a)
                b = fma(make(image, index + step, plans.rows, spot, zero), load(w, step), b)
                d = fma(make(image, index + 2 * step, plans.rows, spot, zero), load(w, 2 * step), d)
                e = fma(make(image, index + 3 * step, plans.rows, spot, zero), load(w, 3 * step), e)
            store(total, 0, a)
            store(total, step, b)
            store(total, 2 * step, d)
            store(total, 3 * step, e)
        c += 4 * step
    while c < count:
        for pixel in range(plans.pixels):
            a = zero if first else load(sums.pointer, pixel * sums.pitch + c)
            for tap in range(plans.taps):
                index, spot = load_scalar(plans.index, tap * ROW + pixel) + c, tap * 5 * ROW + pixel
                made = make(image, index, plans.rows, spot, zero)
                a = fma(made, load(weights.pointer, tap * weights.pitch + c), a)
            store(sums.pointer, pixel * sums.pitch + c, a)
        c += step


@block
def _add_samples(plans, image, count, weights, sums, first):
    """`_add_taps` of samples."""
    _add_taps(_sampled, plans, image, count, weights, sums, first)


@block
def _add_copies(plans, image, count, weights, sums, first):
    """`_add_taps` of pixels."""
    _add_taps(_copied, plans, image, count, weights, sums, first)


@helper
def _compute(plan, add, one, call, share, tile, image, columns, sums):
    """The sums of all channels of a tile. The memory for columns holds the plans of a chunk of taps."""
    p, most = call.p, call.blocking.chunks.taps_per_chunk
    index, rows = at(tile.runs, call.blocking.tile_bytes // 8), at(columns.pointer, 2 * most * ROW)
    offset_groups = max(p.offset_groups, 1)
    count = p.in_channels // offset_groups
    for g in range(offset_groups):
        part, total = image_from(image, g * count), columns_from(sums, g * count)
        for first in range(0, p.taps, most):
            plans = Plans(index, rows, tile.pixels, min(most, p.taps - first))
            for tap in range(plans.taps):
                plan(one, call, share.n, tile, first + tap, g)
                _note_plan(tile, tap, plans)
            w = Matrix(at(pointer(call.a.weights, one), first * p.in_channels + g * count), p.in_channels)
            add(plans, part, count, w, total, first == 0)


@helper
def _compute_sampled(one, call, share, tile, image, columns, sums):
    _compute(plan_samples, _add_samples, one, call, share, tile, image, columns, sums)


@helper
def _compute_copied(one, call, share, tile, image, columns, sums):
    _compute(plan_copies, _add_copies, one, call, share, tile, image, columns, sums)


@kernel
def depthwise_sampled(one, params, counter, slot):
    """y from samples, tile by tile."""
    compute_tiles(_compute_sampled, one, one, params, counter, slot)


@kernel
def depthwise_copied(one, params, counter, slot):
    """y from pixels, tile by tile."""
    compute_tiles(_compute_copied, one, one, params, counter, slot)
