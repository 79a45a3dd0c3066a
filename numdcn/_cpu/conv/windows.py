"""How the backward of one image is divided: into groups of taps, and into regions of the output.

A task works for some taps and one region, and adds to the gradient of the image in a *window* of its own. With one
region the window is the zero-padded image. With several, a window is a rectangle of it that reaches some pixels farther
than the region's taps; `place_windows` puts it where the region's offsets point to. Samples beyond their window, which
offsets allow anywhere, are *strays*: `strays` adds them later. An image with too many of them is not divided: the tasks
of its first region do the work of all, and their window is the image. `add_windows` adds the windows in a fixed order.

A window's pixels are followed by room for one cell, where the gradient of whatever is not added goes.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from numdcn._call.convolution import Convolution
from numdcn._cpu.jit import block, kernel
from numdcn._cpu.layout import fill, from_channels_last, padded_pixels
from numdcn._cpu.parameters import Place, unpack
from numdcn._cpu.simd import (
    at,
    first_lanes,
    full,
    load,
    load_masked,
    load_scalar,
    next_task,
    pointer,
    store,
    store_masked,
    width,
)
from numdcn._cpu.tile import Area
from numdcn._formulas.bilinear import cell
from numdcn._formulas.jit import helper
from numdcn._formulas.vectors import like

SEGMENT = 256  # pixels of a row added up per task
LOOKS = 512  # samples of an image looked at to place its windows: 16 to 64 for each
MOST_STRAYS = 128  # an image is divided if less than one sample in so many is a stray


class Cut(NamedTuple):
    """How an image is divided; determined by the sizes of the convolution, without the batch."""

    tap_groups: int
    rows: int  # of regions
    columns: int
    height: int  # of a window, in pixels
    width: int
    pixels: int  # of the memory for the windows of all regions, or for one image
    size: int  # elements of all windows of an image, of all channels


class Window(NamedTuple):
    """What a task adds to of the gradient of an image."""

    row: int  # the first, counted from the padding
    column: int
    height: int
    width: int
    start: int  # pixels of the windows before it
    pixels: int
    whole: bool  # whether it is laid out like the zero-padded image


class PlacingCall(NamedTuple):
    """Parameters of `place_windows`."""

    p: Convolution
    cut: Cut
    offsets: Place
    placed: int  # address of (N, 1 + 2 * regions) int64: whether the image is whole, and the windows' first pixels


class AddingCall(NamedTuple):
    """Parameters of `add_windows`."""

    p: Convolution
    cut: Cut
    first: int  # image
    images: int
    blocks: int  # of channels
    bounds: int  # address of the first channel of each block, then the number of channels
    placed: int
    windows: int  # address of the images' windows
    strays: int  # address of zero-padded images of strays; 0: there are none
    image_size: int  # elements of one
    grad_x: Place
    workspaces: int
    workspace_bytes: int  # per thread


@helper
def regions_of(cut):
    """The number of regions."""
    return cut.rows * cut.columns


@block
def region_at(cut, out_size, number):
    """The `Area` of a region."""
    i, j = number // cut.columns, number % cut.columns
    row, column = i * out_size[0] // cut.rows, j * out_size[1] // cut.columns
    return Area(row, column, (i + 1) * out_size[0] // cut.rows - row, (j + 1) * out_size[1] // cut.columns - column)


@block
def is_whole(cut, placed, n):
    """Whether the windows of image n are the image."""
    return regions_of(cut) == 1 or load_scalar(placed, n * (1 + 2 * regions_of(cut))) != 0


@block
def window_of(cut, placed, n, region, size):
    """The window of a region of image n."""
    if is_whole(cut, placed, n):
        return Window(0, 0, size[0] + 2, size[1] + 1, 0, padded_pixels(size), True)
    spot = n * (1 + 2 * regions_of(cut)) + 1 + 2 * region
    pixels = (cut.height + 1) * cut.width + 2
    return Window(
        load_scalar(placed, spot), load_scalar(placed, spot + 1), cut.height, cut.width, region * pixels, pixels, False
    )


@helper
def _looked_at(one, a, n, area, look, looks):
    """One of some samples of a region: its y and x without offset, and its offset."""
    p, strides = a.p, a.offsets.strides
    channel = look * 37 % 64 * p.offset_groups * p.taps // 64
    row = area.row + (look * 19 % 64 * 2 + 1) * area.height // 128
    column = area.column + (look * 2 + 1) * area.width // (2 * looks)
    spot = n * strides[0] + 2 * channel * strides[1] + row * strides[2] + column * strides[3]
    offsets, tap = pointer(a.offsets.address, one), channel % p.taps
    base_y = row * p.stride[0] - p.before[0] + tap // p.kernel[1] * p.dilation[0]
    base_x = column * p.stride[1] - p.before[1] + tap % p.kernel[1] * p.dilation[1]
    return one * base_y, one * base_x, load_scalar(offsets, spot), load_scalar(offsets, spot + strides[1])


@helper
def _place(first, taps, shift, count, window, size):
    """The first row or column of a window around the middle of a region's taps. It is moved by the mean of `count`
    offsets whose sum is `shift`, unless that is small."""
    mean = round(shift / max(count, 1))
    return max(min(first + 1 + (mean if abs(mean) > 1 else 0) + (taps - window) // 2, size - window), 0)


@kernel
def place_windows(one, params, counter, slot):
    """Where the windows are: around the taps of their regions, moved by the mean of the offsets. A task is an image."""
    a = unpack(params, PlacingCall)
    p, cut, regions = a.p, a.cut, regions_of(a.cut)
    looks = max(min(LOOKS // regions, 64), 16) if p.offset_groups else 0
    reach = ((p.kernel[0] - 1) * p.dilation[0] + 2, (p.kernel[1] - 1) * p.dilation[1] + 2)  # pixels of a pixel's taps
    while True:
        n = next_task(counter)
        if n >= p.batch:
            return
        placed, strays, seen = at(pointer(a.placed, np.int64(0)), n * (1 + 2 * regions)), 0, 0
        for region in range(regions):
            area = region_at(cut, p.out_size, region)
            shift_y, shift_x, count = one - one, one - one, 0
            for look in range(looks):
                y, x, dy, dx = _looked_at(one, a, n, area, look, looks)
                if -1 <= y + dy < p.in_size[0] and -1 <= x + dx < p.in_size[1]:
                    shift_y, shift_x, count = shift_y + dy, shift_x + dx, count + 1
            row = _place(
                area.row * p.stride[0] - p.before[0], (area.height - 1) * p.stride[0] + reach[0],
                shift_y, count, cut.height, p.in_size[0] + 2,
            )  # fmt: skip
            column = _place(
                area.column * p.stride[1] - p.before[1], (area.width - 1) * p.stride[1] + reach[1],
                shift_x, count, cut.width, p.in_size[1] + 1 + (cut.width <= p.in_size[1]),
            )  # fmt: skip
            store(placed, 1 + 2 * region, row)
            store(placed, 2 + 2 * region, column)
            for look in range(looks):
                y, x, dy, dx = _looked_at(one, a, n, area, look, looks)
                if -1 <= y + dy < p.in_size[0] and -1 <= x + dx < p.in_size[1]:
                    y_, x_, _, _ = cell(y + dy, x + dx, one * p.in_size[0], one * p.in_size[1])
                    seen += 1
                    inside = cut.width == p.in_size[1] + 1 or column <= x_ < column + cut.width - 1  # a strip has all
                    if not inside or not row <= y_ < row + cut.height - 1:
                        strays += 1
        store(placed, 0, 1 if strays * MOST_STRAYS > seen else 0)


@block
def _add(source, count, target, begin):
    """target[:count] += source[:count], or = if `begin`."""
    lane, step = full(load_scalar(target, 0)), width(load_scalar(target, 0))
    whole = count // step * step
    some = first_lanes(count - whole, lane)
    if begin:
        for i in range(0, whole, step):
            store(target, i, load(source, i))
        store_masked(target, whole, load_masked(source, whole, some), some)
        return
    for i in range(0, whole, step):
        store(target, i, load(target, i) + load(source, i))
    store_masked(target, whole, load_masked(target, whole, some) + load_masked(source, whole, some), some)


@block
def _add_row(source, window, channels, row, first, end, target, filled):
    """Add what a window has of pixels `first` to `end` of a row to target, where pixel `first` begins, `filled` or not.
    Returns whether it is now."""
    low, high = max(first, window.column), min(end, window.column + window.width)
    if window.row <= row < window.row + window.height and low < high:
        begin = not filled and low == first and high == end
        if not filled and not begin:
            fill(target, 0, (end - first) * channels, like(0.0, load_scalar(target, 0)))
        spot = ((row - window.row) * window.width + low - window.column) * channels
        _add(at(source, spot), (high - low) * channels, at(target, (low - first) * channels), begin)
        filled = True
    return filled


@helper
def _add_windows(one, of_x, params, counter, slot):
    """grad_x, of elements of the type of `of_x`, = the sum of the windows. A task is a segment of a row."""
    a = unpack(params, AddingCall)
    cut, size = a.cut, a.p.in_size
    bounds, placed = pointer(a.bounds, np.int64(0)), pointer(a.placed, np.int64(0))
    buffer = pointer(a.workspaces + slot * a.workspace_bytes, one)
    sums = at(buffer, width(one) * width(one))
    segments = (size[1] + SEGMENT - 1) // SEGMENT
    while True:
        task = next_task(counter)
        if task >= a.images * size[0] * segments:
            return
        n, row, first = task // segments // size[0], task // segments % size[0], task % segments * SEGMENT
        end = min(first + SEGMENT, size[1])
        regions = 1 if is_whole(cut, placed, a.first + n) else regions_of(cut)
        for number in range(a.blocks):
            channel, count = load_scalar(bounds, number), load_scalar(bounds, number + 1) - load_scalar(bounds, number)
            filled = False
            for part in range(cut.tap_groups * regions):
                window = window_of(cut, placed, a.first + n, part % regions, size)
                spot = n * cut.size + (part // regions * a.p.in_channels + channel) * cut.pixels + window.start * count
                source = at(pointer(a.windows, one), spot)
                filled = _add_row(source, window, count, row + 1, first + 1, end + 1, sums, filled)
            if a.strays:
                spot = n * a.image_size + channel * padded_pixels(size)
                window = Window(0, 0, size[0] + 2, size[1] + 1, 0, 0, True)
                source = at(pointer(a.strays, one), spot)
                filled = _add_row(source, window, count, row + 1, first + 1, end + 1, sums, filled)
            if not filled:
                fill(sums, 0, (end - first) * count, one - one)
            strides, q = a.grad_x.strides, row * size[1]
            shifted = at(sums, -(((row + 1) * (size[1] + 1)) + first + 1) * count)
            target = at(pointer(a.grad_x.address, of_x), (a.first + n) * strides[0] + channel * strides[1])
            from_channels_last(shifted, q + first, q + end, size, count, target, strides[1:], buffer)


@kernel
def add_windows(one, params, counter, slot):
    """grad_x of the type of the windows."""
    _add_windows(one, one, params, counter, slot)


@kernel
def add_windows_float16(one, params, counter, slot):
    """grad_x in float16."""
    _add_windows(one, np.uint16(0), params, counter, slot)


@kernel
def add_windows_bfloat16(one, params, counter, slot):
    """grad_x in bfloat16."""
    _add_windows(one, np.int16(0), params, counter, slot)
