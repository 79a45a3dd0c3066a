"""The bins of RoI operators: which pixels a bin reads, and with which weights.

Every sampling grid here is a product of rows and columns. So a bin is described by two lists, one per axis, of pixels
with the summed weights and the summed slopes of all samples that touch them; the bin is the sum over both lists of
weight * weight * pixel. The operators differ in the sample positions, the border rule, and the channels a bin reads.
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

WHOLE_PIXELS = 2  # in place of a border rule
START, BIN, STEP, SAMPLES, REACH = range(5)  # of an axis of a box, see `Grid`
AXIS = 5


class Grid(NamedTuple):
    """The bins of all boxes.

    The geometry of a box, for y and then for x, is the start of its first bin, the size of a bin, the spacing and
    number of its samples, and the shift caused by an offset of 1, in the dtype of the arrays. For whole pixels it is
    instead the first pixel and the end of each bin, for y and then for x, as int64.
    """

    rois: int
    size: tuple[int, int]  # of an image
    bins: tuple[int, int]  # of a box
    rule: int  # a border rule, `ALIGN` or `PSROI`, or `WHOLE_PIXELS`
    columns: int  # lists along x kept at a time: those of all columns, or one; along y it is always one
    pitch: int  # elements from one list to the next
    image_index: int  # address of the image of each box, int64
    geometry: int  # address, see above
    shifts: Place  # offsets: strides of boxes, axes (x, then y), parts along y and x; `NOWHERE`: none
    parts: tuple[int, int]  # parts of the shifts along y and x
    class_stride: int  # elements from the shifts of one class to those of the next


class Lists(NamedTuple):
    """Lists of pixels along an axis, as pointers. List i starts at element i * pitch of the first three."""

    index: Any  # of each pixel, int64
    weight: Any  # sum of the weights of the samples that touch it
    slope: Any  # sum of their slopes
    length: Any  # of each list, int64
    active: Any  # active samples of each list, int64


class Bin(NamedTuple):
    """The list of one bin along one axis; see `Lists`."""

    index: Any
    weight: Any
    slope: Any
    length: int
    active: int


def lists_bytes(columns: int, pitch: int, itemsize: int) -> int:
    """Bytes of one list along y and `columns` along x in a workspace, in whole cache lines."""
    return -(-(1 + columns) * (pitch * (8 + 2 * itemsize) + 16) // 64) * 64 + 64


@helper
def lists_at(address, grid, one):
    """The `Lists` of y and of x whose buffers start at `address`."""
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
    """Add to the entry of a pixel, which is one of the last two or new; returns the new length."""
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
    """A generous range of the `samples` samples that can reach an image: the first, and the end."""
    base, step, count = float(base), float(step), float(samples)
    if not abs(base) < 2.0**33:  # boxes are clipped to 2**30: no bin from farther out reaches the image
        return 0, 0
    far = 2.0 + 1e-6 * (abs(base) + size) / abs(step)  # rounding may move a sample by this much
    a, b = (-1.0 - base) / step, (size - base) / step
    first = (a if a < b else b) - far
    end = (b if a < b else a) + far + 1.0
    first = first if first > 0.0 else 0.0  # also if a step of 0 makes it NaN
    end = end if end < count else count
    return int(first if first < count else count), int(end if end > 0.0 else 0.0)


@block
def list_samples(rule, base, bin_, step, samples, size, lists, number, pitch):
    """Fill in list `number`: the pixels touched by the samples of a bin, in ascending order.

    Sample u is at base + (u + 0.5) * bin_ / samples under the border rule `align`, at base + u * step under `psroi`.
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
    """Fill in list `number` with pixels first to end, once each."""
    start = number * pitch
    for i in range(end - first):
        store(lists.index, start + i, first + i)
        store(lists.weight, start + i, one)
        store(lists.slope, start + i, one - one)
    store(lists.length, number, max(end - first, 0))
    store(lists.active, number, max(end - first, 0))


@block
def list_axis(one, grid, r, axis, bin_, shift, lists, number):
    """Fill in list `number` with bin `bin_` of box r along an axis (0: y). Returns whether its position is not NaN."""
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
    """The shift of bin (i, j) of box r along an axis (0: y)."""
    if grid.shifts.address == 0:
        return one - one
    strides = grid.shifts.strides
    part_i, part_j = i * grid.parts[0] // grid.bins[0], j * grid.parts[1] // grid.bins[1]
    spot = r * strides[0] + (1 - axis) * strides[1] + part_i * strides[2] + part_j * strides[3]
    value = load_once(pointer(grid.shifts.address, one), spot + class_ * grid.class_stride)
    return load_scalar(pointer(grid.geometry, one), (2 * r + axis) * AXIS + REACH) * value


@helper
def samples_of(one, grid, r, y, x):
    """The divisor of a bin's sum, at least 1, and whether the bin has samples at all."""
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
    """The lists of bin (i, j) of box r along both axes, its divisor, and whether its samples are at NaN."""
    known_y = list_axis(one, grid, r, 0, i, shift_of(one, grid, r, 0, class_, i, j), ys, 0)
    known_x = list_axis(one, grid, r, 1, j, shift_of(one, grid, r, 1, class_, i, j), xs, 0)
    return _bin_planned(one, grid, r, known_y and known_x, ys, xs, 0)


@helper
def plan_next_bin(one, grid, r, b, first, ys, xs):
    """The result of `plan_bin` for bin number b, with bins visited in ascending order from `first`: without shifts,
    bins in a row share the list along y, and those in a column the list along x if all are kept."""
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
    """The result of `plan_bin`, once the lists are filled."""
    y, x = bin_of(ys, 0, grid.pitch), bin_of(xs, number, grid.pitch)
    divisor, has_samples = samples_of(one, grid, r, y, x)
    return y, x, divisor, has_samples and not known
