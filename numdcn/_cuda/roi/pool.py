"""RoI operators that sample, on the GPU: bins as means over samples of planes, and their gradients.

A thread owns a bin of a channel. It loops over the rows and the columns of samples, in runs that lie between the same
pixels. The backward adds atomically; if deterministic, a thread owns some rows of a plane instead and loops over all
bins that touch them. Gradients of shifts and masks are sums over channels, first within blocks and then over blocks.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numdcn._cuda.coordinates import coordinate_viewer, put_coordinate
from numdcn._cuda.jit import SIMULATED, compute_type, cuda, device, kernels, scalar_type, type_pairs
from numdcn._cuda.memory import at, narrow, put, view, widen
from numdcn._cuda.roi.bins import Bin, Boxes, at_nan, counted, first_of, image_of, lines_of, run_of, visits

I64 = np.int64
BLOCK = 2 if SIMULATED else 16  # channels per partial sum


class Pool(NamedTuple):
    """Parameters of the kernels. Arrays are contiguous; 0: absent or not wanted."""

    boxes: Boxes
    x: int  # (N, channels * cells[0] * cells[1], H, W)
    mask: int  # (R, 1, Ph, Pw)
    y: int  # (R, channels, Ph, Pw); in the backward: its gradient
    grad_x: int  # as x, of the compute type
    sums: int  # (R, classes, channel_blocks, Ph, Pw, 3), of the compute type; see `sum_bins`
    grad_shifts: int
    grad_mask: int
    channels: int
    cells: tuple[int, int]  # per box along y and x, each with channels of its own
    channel_blocks: int  # per class, each of up to BLOCK channels
    bands: int  # of the rows of a plane


def variants() -> list[tuple[object, object, bool]]:
    """All types under both border rules."""
    return [(*pair, psroi) for pair in type_pairs() for psroi in (False, True)]


@device
def bin_of(task, channels, bins):
    """The bin of element `task` of y."""
    i, j = task // bins[1] % bins[0], task % bins[1]
    rest = task // (bins[0] * bins[1])
    return Bin(rest // channels, rest % channels, i, j)


@device
def plane_of(n, channel, i, j, c):
    """Where the plane starts that bin (i, j) of a channel reads in image n."""
    cell = i * c.cells[0] // c.boxes.bins[0] * c.cells[1] + j * c.cells[1] // c.boxes.bins[1]
    number = (n * c.channels + channel) * c.cells[0] * c.cells[1] + cell
    return number * c.boxes.size[0] * c.boxes.size[1]


@device
def corners_of(x, top, bottom, left, right, S):
    """The pixels at two rows (given by where they start) and two columns; the second is 0 if both are the same."""
    x00, x01, x10, x11 = widen(at(x, top + left)), S(0), S(0), S(0)
    if right > left:
        x01 = widen(at(x, top + right))
    if bottom > top:
        x10 = widen(at(x, bottom + left))
        if right > left:
            x11 = widen(at(x, bottom + right))
    return x00, x01, x10, x11


@kernels(Pool, variants)
def pool_bins(T, C, PSROI):
    """y."""
    S, coordinates = scalar_type(T), coordinate_viewer(T)

    def run(c):
        g = c.boxes
        x, y, mask, rois, shifts = (
            view(c.x, T),
            view(c.y, T),
            view(c.mask, T),
            coordinates(g.rois),
            coordinates(g.shifts),
        )
        height, width = g.size[0], g.size[1]
        for task in range(cuda.grid(1), g.rows * c.channels * g.bins[0] * g.bins[1], cuda.gridsize(1)):
            bin_ = bin_of(task, c.channels, g.bins)
            n, value = image_of(rois, bin_.box, g.batch, S), S(np.nan)
            if n >= 0:
                lines = lines_of(rois, shifts, bin_, bin_.channel // (c.channels // g.classes), g, PSROI, S)
                if not at_nan(lines, S):
                    line_y, line_x = lines.y, lines.x
                    plane, total = plane_of(n, bin_.channel, bin_.i, bin_.j, c), S(0)
                    u, end_u = visits(line_y, -1, height, S)
                    begin, end_v = visits(line_x, -1, width, S)
                    while u < end_u:
                        u, top, bottom, weight_top, weight_bottom, _, many = run_of(u, end_u, line_y, height, PSROI, S)
                        v, top_sum, bottom_sum = begin if many else end_v, S(0), S(0)
                        while v < end_v:
                            v, left, right, weight_left, weight_right, _, many = run_of(
                                v, end_v, line_x, width, PSROI, S
                            )
                            if many:
                                x00, x01, x10, x11 = corners_of(
                                    x, plane + top * width, plane + bottom * width, left, right, S
                                )
                                top_sum += weight_left * x00 + weight_right * x01
                                bottom_sum += weight_left * x10 + weight_right * x11
                        total += weight_top * top_sum + weight_bottom * bottom_sum
                    scale = S(1)
                    if c.mask:
                        scale = widen(at(mask, (bin_.box * g.bins[0] + bin_.i) * g.bins[1] + bin_.j))
                    divisor = counted(line_y, height, PSROI, S) * counted(line_x, width, PSROI, S)
                    value = total * (scale / max(divisor, S(1)))
            put(y, task, narrow(value, T))

    return run


@device
def least_of(first):
    """The least position of samples that touch rows from `first` on. Samples before row 0 touch row 1 too, with
    weight 0."""
    return first - 1 if first > 1 else -1


def bin_adder(S: Any, PSROI: bool, ATOMIC: bool) -> Any:
    """Make `add_bin(grad_x, plane, lines, gradient, size, first, end)`, which adds atomically if ATOMIC."""

    @device
    def add_bin(grad_x, plane, lines, gradient, size, first, end):
        """Add a gradient to rows `first` to `end` of a plane, with the weights of the samples of a bin."""
        height, width = size
        u, end_u = visits(lines.y, least_of(first), end, S)
        begin, end_v = visits(lines.x, -1, width, S)
        while u < end_u:
            u, top, bottom, weight_top, weight_bottom, _, many = run_of(u, end_u, lines.y, height, PSROI, S)
            v = begin if many else end_v
            while v < end_v:
                v, left, right, weight_left, weight_right, _, many = run_of(v, end_v, lines.x, width, PSROI, S)
                for corner in range(4 if many else 0):
                    is_bottom, is_right = corner >= 2, corner % 2 == 1
                    row = bottom if is_bottom else top
                    if (
                        first <= row
                        and row < end
                        and not (is_bottom and bottom == top)
                        and not (is_right and right == left)
                    ):
                        weight = (weight_bottom if is_bottom else weight_top) * (
                            weight_right if is_right else weight_left
                        )
                        spot = plane + row * width + (right if is_right else left)
                        if ATOMIC:
                            cuda.atomic.add(grad_x, spot, gradient * weight)
                        else:
                            put(grad_x, spot, at(grad_x, spot) + gradient * weight)

    return add_bin


@device
def scaled_gradient(grad_y, mask, bin_, lines, c, PSROI, S):
    """The gradient of each sample of a bin: the bin's, times its mask, divided by the number of samples that count."""
    g = c.boxes
    divisor = counted(lines.y, g.size[0], PSROI, S) * counted(lines.x, g.size[1], PSROI, S)
    spot = ((bin_.box * c.channels + bin_.channel) * g.bins[0] + bin_.i) * g.bins[1] + bin_.j
    gradient = widen(at(grad_y, spot))
    if c.mask:
        gradient *= widen(at(mask, (bin_.box * g.bins[0] + bin_.i) * g.bins[1] + bin_.j))
    return gradient / max(divisor, S(1))


@kernels(Pool, variants)
def add_bins(T, C, PSROI):
    """The gradient of x, in any order."""
    S, A, coordinates = scalar_type(T), compute_type(T), coordinate_viewer(T)
    add_bin = bin_adder(S, PSROI, ATOMIC=True)

    def run(c):
        g = c.boxes
        grad_y, grad_x, mask = view(c.y, T), view(c.grad_x, A), view(c.mask, T)
        rois, shifts = coordinates(g.rois), coordinates(g.shifts)
        for task in range(cuda.grid(1), g.rows * c.channels * g.bins[0] * g.bins[1], cuda.gridsize(1)):
            bin_ = bin_of(task, c.channels, g.bins)
            n = image_of(rois, bin_.box, g.batch, S)
            if n >= 0:
                lines = lines_of(rois, shifts, bin_, bin_.channel // (c.channels // g.classes), g, PSROI, S)
                if not at_nan(lines, S):
                    gradient = scaled_gradient(grad_y, mask, bin_, lines, c, PSROI, S)
                    plane = plane_of(n, bin_.channel, bin_.i, bin_.j, c)
                    add_bin(grad_x, plane, lines, gradient, g.size, 0, g.size[0])

    return run


@kernels(Pool, variants)
def add_bins_in_order(T, C, PSROI):
    """The gradient of x: each element is added to by one thread, in the order of the bins."""
    S, A, coordinates = scalar_type(T), compute_type(T), coordinate_viewer(T)
    add_bin = bin_adder(S, PSROI, ATOMIC=False)

    def run(c):
        g = c.boxes
        grad_y, grad_x, mask = view(c.y, T), view(c.grad_x, A), view(c.mask, T)
        rois, shifts = coordinates(g.rois), coordinates(g.shifts)
        cell_count = c.cells[0] * c.cells[1]
        for task in range(cuda.grid(1), g.batch * c.bands * c.channels * cell_count, cuda.gridsize(1)):
            number, rest = task % (c.channels * cell_count), task // (c.channels * cell_count)
            band, n = rest % c.bands, rest // c.bands
            first, end = band * g.size[0] // c.bands, (band + 1) * g.size[0] // c.bands
            channel, row, column = number // cell_count, number % cell_count // c.cells[1], number % c.cells[1]
            plane = (n * c.channels * cell_count + number) * g.size[0] * g.size[1]
            top, bottom = first_of(row, g.bins[0], c.cells[0]), first_of(row + 1, g.bins[0], c.cells[0])
            left, right = first_of(column, g.bins[1], c.cells[1]), first_of(column + 1, g.bins[1], c.cells[1])
            for r in range(g.rows):
                if image_of(rois, r, g.batch, S) != n:
                    continue
                for i in range(top, bottom):
                    for j in range(left, right):
                        bin_ = Bin(r, channel, i, j)
                        lines = lines_of(rois, shifts, bin_, channel // (c.channels // g.classes), g, PSROI, S)
                        begin, stop = visits(lines.y, least_of(first), end, S)
                        if begin < stop and not at_nan(lines, S):
                            gradient = scaled_gradient(grad_y, mask, bin_, lines, c, PSROI, S)
                            add_bin(grad_x, plane, lines, gradient, g.size, first, end)

    return run


@kernels(Pool, variants)
def sum_bins(T, C, PSROI):
    """Gradients of each bin's mask and of its shifts along x and y, for a block of the channels of a class."""
    S, A, coordinates = scalar_type(T), compute_type(T), coordinate_viewer(T)

    def run(c):
        g = c.boxes
        x, grad_y, mask = view(c.x, T), view(c.y, T), view(c.mask, T)
        rois, shifts = coordinates(g.rois), coordinates(g.shifts)
        sums, per_class, many_bins = view(c.sums, A), c.channels // g.classes, g.bins[0] * g.bins[1]
        height, width, step = g.size[0], g.size[1], g.size[0] * g.size[1] * c.cells[0] * c.cells[1]
        for task in range(cuda.grid(1), g.rows * g.classes * c.channel_blocks * many_bins, cuda.gridsize(1)):
            bin_ = bin_of(task, g.classes * c.channel_blocks, g.bins)  # a block's instead of a channel's
            r, block, i, j = bin_.box, bin_.channel, bin_.i, bin_.j
            class_ = block // c.channel_blocks
            first = class_ * per_class + block % c.channel_blocks * BLOCK
            end = min(first + BLOCK, (class_ + 1) * per_class)
            n, by_value, by_x, by_y = image_of(rois, r, g.batch, S), S(np.nan), S(np.nan), S(np.nan)
            if n >= 0:
                lines = lines_of(rois, shifts, bin_, class_, g, PSROI, S)
                if not at_nan(lines, S):
                    line_y, line_x = lines.y, lines.x
                    by_value, by_x, by_y, runs = S(0), S(0), S(0), I64(0)
                    start = plane_of(n, first, i, j, c)
                    gradients = ((r * c.channels + first) * g.bins[0] + i) * g.bins[1] + j
                    u, end_u = visits(line_y, -1, height, S)
                    begin, end_v = visits(line_x, -1, width, S)
                    while u < end_u:
                        u, top, bottom, weight_top, weight_bottom, slope_y, many = run_of(
                            u, end_u, line_y, height, PSROI, S
                        )
                        v = begin if many else end_v
                        while v < end_v:
                            v, left, right, weight_left, weight_right, slope_x, many = run_of(
                                v, end_v, line_x, width, PSROI, S
                            )
                            runs += many
                            for k in range(end - first if many else 0):
                                plane = start + k * step
                                x00, x01, x10, x11 = corners_of(
                                    x, plane + top * width, plane + bottom * width, left, right, S
                                )
                                gradient = widen(at(grad_y, gradients + k * many_bins))
                                top_sum, bottom_sum = (
                                    weight_left * x00 + weight_right * x01,
                                    weight_left * x10 + weight_right * x11,
                                )
                                by_value += gradient * (weight_top * top_sum + weight_bottom * bottom_sum)
                                by_y += gradient * (slope_y * (bottom_sum - top_sum))
                                by_x += gradient * (slope_x * (weight_top * (x01 - x00) + weight_bottom * (x11 - x10)))
                    if runs == 0:  # the mean and its slopes are 0, but a gradient times 0 may be NaN
                        for k in range(end - first):
                            by_value += widen(at(grad_y, gradients + k * many_bins)) * S(0)
                        by_x, by_y = by_value, by_value
                    divisor = counted(line_y, height, PSROI, S) * counted(line_x, width, PSROI, S)
                    weight = S(1) / max(divisor, S(1))
                    by_value, by_x, by_y = by_value * weight, by_x * weight * line_x.reach, by_y * weight * line_y.reach
                    if c.mask:
                        scale = widen(at(mask, (r * g.bins[0] + i) * g.bins[1] + j))
                        by_x, by_y = by_x * scale, by_y * scale
            put(sums, 3 * task, by_value)
            put(sums, 3 * task + 1, by_x)
            put(sums, 3 * task + 2, by_y)

    return run


@kernels(Pool, type_pairs)
def sum_blocks(T, C):
    """The gradients of mask (of T) and shifts (of C): `sums` added over the blocks of channels and the bins of a
    part."""
    S, A, coordinates = scalar_type(T), compute_type(T), coordinate_viewer(T)

    def run(c):
        g = c.boxes
        sums, grad_shifts, grad_mask = view(c.sums, A), coordinates(c.grad_shifts), view(c.grad_mask, T)
        parts, bins = g.parts[0] * g.parts[1], g.bins[0] * g.bins[1]
        for task in range(cuda.grid(1), g.rows * g.classes * parts, cuda.gridsize(1)):
            box, row, column = task // parts, task % parts // g.parts[1], task % g.parts[1]
            by_value, by_x, by_y = S(0), S(0), S(0)
            top, bottom = first_of(row, g.bins[0], g.parts[0]), first_of(row + 1, g.bins[0], g.parts[0])
            left, right = first_of(column, g.bins[1], g.parts[1]), first_of(column + 1, g.bins[1], g.parts[1])
            for i in range(top, bottom):
                for j in range(left, right):
                    for block in range(c.channel_blocks):
                        spot = 3 * ((box * c.channel_blocks + block) * bins + i * g.bins[1] + j)
                        by_value += at(sums, spot)
                        by_x += at(sums, spot + 1)
                        by_y += at(sums, spot + 2)
            if c.grad_shifts:
                spot = 2 * box * parts + task % parts
                put_coordinate(grad_shifts, spot, by_x, T)
                put_coordinate(grad_shifts, spot + parts, by_y, T)
            if c.grad_mask:
                put(grad_mask, task, narrow(by_value, T))

    return run
