"""The bins of RoI operators: which pixels a bin reads, with which weights.

Every sampling grid here is a product: rows times columns. So a bin is two lists, one an axis, of pixels with the sums of
the weights, and of the slopes, of all samples that touch them; the bin is the sum over both lists of weight * weight *
pixel. The operators differ in where the samples lie, in the border mode, and in the channels that a bin reads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numdcn._cpu.jit import block
from numdcn._cpu.parameters import Place
from numdcn._cpu.simd import at, load_once, load_scalar, pointer, store
from numdcn._formulas.bilinear import ALIGN, PSROI, taps_align, taps_psroi
from numdcn._formulas.jit import helper
from numdcn._formulas.vectors import like

WHOLE_PIXELS = 2  # in the place of a border mode
START, BIN, STEP, SAMPLES, REACH = range(5)  # of an axis of a box, see `Grid`
AXIS = 5


class Grid(NamedTuple):
    """The bins of all boxes.

    The geometry of a box is, for y and then for x: where the first bin starts, a bin's size, the distance and the number of its
    samples, and how far an offset of 1 shifts it; in the dtype of the arrays. For whole pixels it is instead the first
    pixel and the end of each bin, for y and then for x, as int64.
    """

    rois: int
    size: tuple[int, int]  # of an image
    bins: tuple[int, int]  # of a box
    rule: int  # a border mode, `ALIGN` or `PSROI`, or `WHOLE_PIXELS`
    columns: int  # lists along x that are kept at a time: those of all columns, or one; along y it is one
    pitch: int  # elements from one list to the next
    image_index: int  # addresses: the image of each box, as int64,
    geometry: int  # see above
    shifts: Place  # offsets: strides of boxes, axes (x, then y), parts along y and x; nowhere: none
    parts: tuple[int, int]  # of the shifts, along y and x
    class_stride: int  # elements from the shifts of one class to those of the next


class Lists(NamedTuple):
    """Lists of pixels along an axis, as pointers. List i begins at element i * pitch of the first three."""

    index: Any  # of each pixel, int64
    weight: Any  # sum of the weights of the samples that touch it
    slope: Any  # sum of their slopes
    length: Any  # of each list, int64
    active: Any  # samples of each list that are in reach of the image, int64


class Bin(NamedTuple):
    """The list of one bin along one axis; see `Lists`."""

    index: Any
    weight: Any
    slope: Any
    length: int
    active: int


def lists_bytes(columns: int, pitch: int, itemsize: int) -> int:
    """Bytes of one list along y and some along x in a workspace: whole cache lines."""
    return -(-(1 + columns) * (pitch * (8 + 2 * itemsize) + 16) // 64) * 64 + 64


@helper
def lists_at(address, grid, one):
    """The `Lists` of y, and those of x, whose buffers begin at `address`."""
    count, pitch = 1 + grid.columns, grid.pitch
    length = pointer(address, np.int64(0))
    index = at(length, 2 * count)
    weight = pointer(address + 8 * count * (pitch + 2), one)
    slope = at(weight, count * pitch)
    y = Lists(index, weight, slope, length, at(length, count))
    x = Lists(at(index, pitch), at(weight, pitch), at(slope, pitch), at(length, 1), at(length, count + 1))
    return y, x


@helper
def bin_of(lists, number, pitch):
    """List `number`, as a `Bin`."""
    start = number * pitch
    length, active = load_scalar(lists.length, number), load_scalar(lists.active, number)
    return Bin(at(lists.index, start), at(lists.weight, start), at(lists.slope, start), length, active)


@helper
def _add(index, weights, slopes, length, pixel, weight, slope):
    """Add to the entry of a pixel, one of the last two or a new one; returns the new length."""
    spot = length
    if length > 0 and load_scalar(index, length - 1) == pixel:
        spot = length - 1
    elif length > 1 and load_scalar(index, length - 2) == pixel:
        spot = length - 2
    if spot == length:
        store(index, spot, pixel)
        store(weights, spot, weight)
        store(slopes, spot, slope)
        return length + 1
    store(weights, spot, load_scalar(weights, spot) + weight)
    store(slopes, spot, load_scalar(slopes, spot) + slope)
    return length


@helper
def _visits(base, step, samples, size):
    """The first of `samples` samples that can be in reach of an image, and the end, generously."""
    base, step, count = float(base), float(step), float(samples)
    if not abs(base) < 2.0**33:  # boxes are clipped to 2**30: no bin is as long
        return 0, 0
    far = 2.0 + 1e-6 * (abs(base) + size) / abs(step)  # rounding may move a sample by so many
    a, b = (-1.0 - base) / step, (size - base) / step
    first = (a if a < b else b) - far
    end = (b if a < b else a) + far + 1.0
    first = first if first > 0.0 else 0.0  # also where a step of 0 makes it NaN
    end = end if end < count else count
    return int(first if first < count else count), int(end if end > 0.0 else 0.0)


@block
def list_samples(rule, base, bin_, step, samples, size, lists, number, pitch):
    """Fill in list `number`: the pixels that the samples of a bin touch, in rising order.

    Sample u lies at base + (u + 0.5) * bin_ / samples in the border mode `align`, at base + u * step in `psroi`.
    """
    start, length, active = number * pitch, 0, 0
    index, weights, slopes = at(lists.index, start), at(lists.weight, start), at(lists.slope, start)
    zero, half, one = like(0.0, base), like(0.5, base), like(1.0, base)
    first, end = _visits(base, step, samples, size)
    for visit in range(first, end):
        u = like(visit if step >= zero else first + end - 1 - visit, base)
        if rule == PSROI:
            inside, low, high, fraction, sloped = taps_psroi(base + u * step, size)
        else:
            inside, low, high, fraction, sloped = taps_align(base + (u + half) * bin_ / samples, size)
        if inside:
            active += 1
            slope = one if sloped else zero
            length = _add(index, weights, slopes, length, low, one - fraction, zero - slope)
            if high > low:
                length = _add(index, weights, slopes, length, high, fraction, slope)
    store(lists.length, number, length)
    store(lists.active, number, active)


@helper
def _list_pixels(first, end, lists, number, pitch, one):
    """Fill in list `number`: pixels first to end, each once."""
    start = number * pitch
    for i in range(end - first):
        store(lists.index, start + i, first + i)
        store(lists.weight, start + i, one)
        store(lists.slope, start + i, one - one)
    store(lists.length, number, max(end - first, 0))
    store(lists.active, number, max(end - first, 0))


@block
def list_axis(one, grid, r, axis, bin_, shift, lists, number):
    """Fill in list `number` with bin `bin_` of box r along an axis (0: y). Returns whether its samples lie anywhere: not NaN."""
    if grid.rule == WHOLE_PIXELS:
        both = grid.bins[0] + grid.bins[1]
        ends = at(pointer(grid.geometry, np.int64(0)), 2 * (r * both + axis * grid.bins[0] + bin_))
        _list_pixels(load_scalar(ends, 0), load_scalar(ends, 1), lists, number, grid.pitch, one)
        return True
    box = at(pointer(grid.geometry, one), (2 * r + axis) * AXIS)
    start, size = load_scalar(box, START), load_scalar(box, BIN)
    i = like(bin_, one)
    base = (start + i * size) + shift if grid.rule == PSROI else (start + shift) + i * size
    list_samples(
        grid.rule, base, size, load_scalar(box, STEP), load_scalar(box, SAMPLES), grid.size[axis], lists, number, grid.pitch
    )  # fmt: skip
    return base == base


@helper
def shift_of(one, grid, r, axis, class_, i, j):
    """By how much bin (i, j) of box r is shifted along an axis (0: y)."""
    if grid.shifts.address == 0:
        return one - one
    strides = grid.shifts.strides
    part_i, part_j = i * grid.parts[0] // grid.bins[0], j * grid.parts[1] // grid.bins[1]
    spot = r * strides[0] + (1 - axis) * strides[1] + part_i * strides[2] + part_j * strides[3]
    value = load_once(pointer(grid.shifts.address, one), spot + class_ * grid.class_stride)
    return load_scalar(pointer(grid.geometry, one), (2 * r + axis) * AXIS + REACH) * value


@helper
def samples_of(one, grid, r, y, x):
    """The number that a bin's sum is divided by, at least 1, and whether the bin has samples at all."""
    samples = like(y.active, one) * like(x.active, one)
    has_samples = True
    if grid.rule != WHOLE_PIXELS:
        box = at(pointer(grid.geometry, one), 2 * r * AXIS)
        planned = load_scalar(box, SAMPLES) * load_scalar(box, AXIS + SAMPLES)
        has_samples = planned > one - one
        samples = planned if grid.rule == ALIGN else samples
    return max(samples, one), has_samples


@helper
def plan_bin(one, grid, r, i, j, class_, ys, xs):
    """The lists of bin (i, j) of box r along both axes, its divisor, and whether its samples lie nowhere: at NaN."""
    known_y = list_axis(one, grid, r, 0, i, shift_of(one, grid, r, 0, class_, i, j), ys, 0)
    known_x = list_axis(one, grid, r, 1, j, shift_of(one, grid, r, 1, class_, i, j), xs, 0)
    return _bin_planned(one, grid, r, known_y and known_x, ys, xs, 0)


@helper
def plan_next_bin(one, grid, r, b, first, ys, xs):
    """What `plan_bin` returns, for bin number b where bins come in rising order from `first` on: where nothing shifts them, rows
    share lists, and columns do if those of all are kept."""
    i, j = b // grid.bins[1], b % grid.bins[1]
    shifted = grid.shifts.address != 0
    kept = not shifted and grid.columns == grid.bins[1]
    number = j if kept else 0
    known_y, known_x = True, True
    if shifted or b == first or j == 0:
        known_y = list_axis(one, grid, r, 0, i, shift_of(one, grid, r, 0, 0, i, j), ys, 0)
    if not kept or b < first + grid.bins[1]:
        known_x = list_axis(one, grid, r, 1, j, shift_of(one, grid, r, 1, 0, i, j), xs, number)
    return _bin_planned(one, grid, r, known_y and known_x, ys, xs, number)


@helper
def _bin_planned(one, grid, r, known, ys, xs, number):
    """What `plan_bin` returns, once the lists are made."""
    y, x = bin_of(ys, 0, grid.pitch), bin_of(xs, number, grid.pitch)
    divisor, has_samples = samples_of(one, grid, r, y, x)
    return y, x, divisor, has_samples and not known
