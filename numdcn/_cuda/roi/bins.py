"""The bins of RoI operators on the GPU: boxes read from the rows of `rois`, and where the samples of a bin lie.

The formulas match the CPU's `boxes` and `bins` rounding by rounding, as they determine which pixels a bin reads: a
product that is rounded before it is added is `product`, which the compiler does not fuse with the addition.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir

from numdcn._call.numba_cuda import intrinsic
from numdcn._cuda.coordinates import coordinate
from numdcn._cuda.jit import F64, Scalar, device
from numdcn._cuda.memory import compiled_as
from numdcn._formulas import bilinear

I64 = np.int64


class Boxes(NamedTuple):
    """The boxes of a call and how bins are made of them. Tuples have one entry per axis, y first."""

    rois: int  # address of (R, 5), contiguous
    shifts: int  # address of offsets (R, 2 * classes, parts), for each class x, then y, contiguous; 0: none
    rows: int  # R
    batch: int
    size: tuple[int, int]  # of an image
    bins: tuple[int, int]  # of a box
    parts: tuple[int, int]  # of the shifts
    classes: int
    samples: int  # of a bin along an axis; 0 or less: about one per pixel
    scale: Scalar
    limit: Scalar  # scaled corners are clipped to -limit .. limit
    half: Scalar  # subtracted from scaled corners
    least: Scalar  # minimum size of a box; -inf: any
    reach: Scalar  # shift of a bin by an offset of 1, as a fraction of the box's size
    largest: Scalar  # largest finite number of the type, to which the shift by an offset of 1 is clipped


@intrinsic
def _product(typingctx, a, b):
    def codegen(context, builder, sig, args):
        name, letter = ("f64", "d") if a == F64 else ("f32", "f")
        kind = ir.FunctionType(args[0].type, [args[0].type] * 2)
        code = ir.InlineAsm(kind, f"mul.rn.{name} $0, $1, $2;", f"={letter},{letter},{letter}", side_effect=False)
        return builder.call(code, list(args))

    return a(a, a), codegen


@compiled_as(_product)
def product(a, b):
    """a * b, rounded."""
    return a * b


@device
def rounded(value, S):
    """`value` rounded to the nearest integer, halves away from zero."""
    whole = value
    if abs(value) < S(2.0**60):
        whole = S(I64(value))
    if abs(value - whole) >= S(0.5):
        whole += S(1) if value > S(0) else S(-1)
    return whole


@device
def image_of(rois, r, batch, S):
    """The image of box r; -1 for an invalid row."""
    number, n = coordinate(rois, 5 * r), I64(-1)
    if number >= S(0) and number < S(2.0**31):
        n = I64(number)
        if n >= batch or S(n) != number:
            n = I64(-1)
    for k in range(1, 5):
        if not abs(coordinate(rois, 5 * r + k)) < S(np.inf):
            n = I64(-1)
    return n


# Bins of whole pixels.


@device
def pixels_of(near, far, bins, index, size, last_counts, g, S):
    """The first pixel and the end of bin `index` along an axis, for a box with corners `near` and `far`.
    `last_counts`: 1 if the pixel of corner `far` is part of the box, else 0."""
    start = I64(rounded(min(max(near * g.scale, -g.limit), g.limit), S))
    stop = I64(rounded(min(max(far * g.scale, -g.limit), g.limit), S))
    length = max(stop - start + last_counts, 1)
    first = index * length // bins + start
    end = ((index + 1) * length + bins - 1) // bins + start
    return min(max(first, 0), size), min(max(end, 0), size)


@device
def ranges_of(rois, r, i, j, last_counts, g, S):
    """First row, end of rows, first column and end of columns of bin (i, j) of box r."""
    x1, y1 = coordinate(rois, 5 * r + 1), coordinate(rois, 5 * r + 2)
    x2, y2 = coordinate(rois, 5 * r + 3), coordinate(rois, 5 * r + 4)
    top, bottom = pixels_of(y1, y2, g.bins[0], i, g.size[0], last_counts, g, S)
    left, right = pixels_of(x1, x2, g.bins[1], j, g.size[1], last_counts, g, S)
    return top, bottom, left, right


# Bins of samples.


class Bin(NamedTuple):
    """A bin of a box, in a channel of the result."""

    box: Any
    channel: Any
    i: Any  # along y
    j: Any  # along x


class Line(NamedTuple):
    """A bin and its samples along an axis, in pixels."""

    start: Any
    size: Any
    step: Any  # from sample to sample
    samples: Any  # number of samples, as a scalar
    reach: Any  # shift of the bin by an offset of 1


class Lines(NamedTuple):
    """A bin and its samples along both axes."""

    y: Line
    x: Line


@device
def line_of(near, far, bins, index, shift, g, PSROI, S):
    """The line of bin `index` along an axis, for a box with corners `near` and `far`."""
    if PSROI:
        first, end = product(rounded(near, S), g.scale), product(rounded(far, S) + S(1), g.scale)
    else:
        first, end = near * g.scale, far * g.scale
    start = min(max(first, -g.limit), g.limit) - g.half
    size = max(min(max(end, -g.limit), g.limit) - g.half - start, g.least)
    bin_, samples = size / S(bins), S(g.samples)
    if g.samples <= 0:
        samples = S(I64(bin_))
        samples = max(samples + S(1) if samples < bin_ else samples, S(0))
    reach = min(max(g.reach * size, -g.largest), g.largest)
    moved, before = product(reach, shift), product(S(index), bin_)
    base = (start + before) + moved if PSROI else (start + moved) + before
    return Line(base, bin_, bin_ / max(samples, S(1)), samples, reach)


@device
def lines_of(rois, shifts, bin_, class_, g, PSROI, S):
    """The lines of a bin, moved by the shifts of a class."""
    r, i, j = bin_.box, bin_.i, bin_.j
    shift_y, shift_x = S(0), S(0)
    if g.shifts:
        part = i * g.parts[0] // g.bins[0] * g.parts[1] + j * g.parts[1] // g.bins[1]
        many = g.parts[0] * g.parts[1]
        spot = (r * g.classes + class_) * 2 * many + part
        shift_x, shift_y = coordinate(shifts, spot), coordinate(shifts, spot + many)
    x1, y1 = coordinate(rois, 5 * r + 1), coordinate(rois, 5 * r + 2)
    x2, y2 = coordinate(rois, 5 * r + 3), coordinate(rois, 5 * r + 4)
    y = line_of(y1, y2, g.bins[0], i, shift_y, g, PSROI, S)
    x = line_of(x1, x2, g.bins[1], j, shift_x, g, PSROI, S)
    return Lines(y, x)


@device
def at_nan(lines, S):
    """Whether the samples of a bin are at NaN."""
    y, x = lines.y, lines.x
    return y.samples * x.samples > S(0) and not (y.start == y.start and x.start == x.start)


@device
def visits(line, low, high, S):
    """The range (first, end) of a line's samples that can lie in low <= p <= high; it may be too wide, but never too
    narrow."""
    base, step, count = line.start, line.step, line.samples
    first, end = S(0), S(0)
    if abs(base) < S(2.0**33):  # boxes are clipped to 2**30: no bin from farther out reaches the image
        far = S(2) + S(2e-6) * (abs(base) + S(high) + S(1)) / abs(step)  # rounding may move a sample by this much
        a, b = (S(low) - base) / step, (S(high) - base) / step
        first = (a if a < b else b) - far
        end = (b if a < b else a) + far + S(1)
        first = first if first > S(0) else S(0)  # also if a step of 0 makes it NaN
        end = end if end < count else count
        first, end = first if first < count else count, end if end > S(0) else S(0)
    return I64(first), I64(end)


@device
def run_of(u, end, line, size, PSROI, S):
    """The run of samples from u on that lie between the same two pixels. Returns where the next run starts; the lower
    and the upper pixel (equal if there is only one); the sum of the weights of each; the number of samples with a
    slope; and the number of samples, 0 if sample u is not active."""
    low, high, many, weight_low, weight_high, slope = I64(0), I64(0), I64(0), S(0), S(0), S(0)
    more = True
    while more:
        # Each position in its reference's order of operations. `visits` allows for the half step and rounding.
        if PSROI:
            taps = bilinear.taps_psroi(S(line.start + product(S(u), line.step)), size)
        else:
            taps = bilinear.taps_align(S(line.start + (S(u) + S(0.5)) * line.size / line.samples), size)
        inside, tap_low, tap_high, fraction, sloped = taps
        more = inside and (many == 0 or tap_low == low)
        if more:
            low, high = I64(tap_low), I64(tap_high)
            many += 1
            weight_low += S(1) - S(fraction)
            weight_high += S(fraction)
            slope += S(1) if sloped else S(0)
        if more or many == 0:
            u += 1
        more = more and u < end
    return u, low, high, weight_low, weight_high, slope, many


@device
def counted(line, size, PSROI, S):
    """The number of a line's samples that count in the bin's divisor: all under the border rule `align`, the active
    ones under `psroi`."""
    count = line.samples
    if PSROI:
        u, end = visits(line, -1, size, S)
        active = I64(0)
        while u < end:
            active += 1 if bilinear.taps_psroi(S(line.start + product(S(u), line.step)), size)[0] else 0
            u += 1
        count = S(active)
    return count


@device
def first_of(cell, bins, cells):
    """The first of `bins` bins that belongs to a cell: the smallest i with i * cells // bins >= cell."""
    return (cell * bins + cells - 1) // cells
