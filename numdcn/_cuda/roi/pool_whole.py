"""RoI operators over whole pixels, on the GPU: maxima or means of bins, and their gradients.

A thread owns a bin of a channel. The backward adds atomically; if deterministic, a thread owns some rows of a plane.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from numdcn._cuda.coordinates import coordinate_viewer
from numdcn._cuda.jit import compute_type, cuda, kernels, scalar_type, type_pairs, types
from numdcn._cuda.memory import at, narrow, put, view, widen
from numdcn._cuda.roi.bins import Boxes, image_of, ranges_of

I32 = np.int32
PLACE = types.int32


class Whole(NamedTuple):
    """Parameters of the kernels. Arrays are contiguous; 0: absent or not wanted."""

    boxes: Boxes
    x: int  # (N, C, H, W)
    y: int  # (R, channels, Ph, Pw); in the backward: its gradient
    argmax: int  # as y, int32
    grad_x: int  # as x, of the compute type
    channels: int
    bands: int  # of the rows of a plane
    in_order: int  # 1: each element of the gradient of x is added to by one thread, in the order of the boxes
    last_counts: int  # 1 if the second corner of a box is part of it, else 0


@kernels(Whole, type_pairs)
def max_bins(T, C):
    """y and argmax: the first of the largest pixels of each bin; NaN counts as largest."""
    S, coordinates = scalar_type(T), coordinate_viewer(T)

    def run(c):
        g = c.boxes
        x, y, argmax, rois = view(c.x, T), view(c.y, T), view(c.argmax, PLACE), coordinates(g.rois)
        for task in range(cuda.grid(1), g.rows * c.channels * g.bins[0] * g.bins[1], cuda.gridsize(1)):
            i, j, rest = task // g.bins[1] % g.bins[0], task % g.bins[1], task // (g.bins[0] * g.bins[1])
            channel, r = rest % c.channels, rest // c.channels
            n, best, where = image_of(rois, r, g.batch, S), S(np.nan), -1
            if n >= 0:
                top, bottom, left, right = ranges_of(rois, r, i, j, c.last_counts, g, S)
                plane = (n * c.channels + channel) * g.size[0] * g.size[1]
                best = S(0)
                if top < bottom and left < right:
                    where = top * g.size[1] + left
                    best = widen(at(x, plane + where))
                for row in range(top, bottom):
                    for column in range(left, right):
                        pixel = widen(at(x, plane + row * g.size[1] + column))
                        if best < pixel or (pixel != pixel and best == best):
                            best, where = pixel, row * g.size[1] + column
            if c.y:
                put(y, task, narrow(best, T))
            if c.argmax:
                put(argmax, task, I32(where))

    return run


@kernels(Whole, type_pairs)
def add_at_maxima(T, C):
    """The gradient of x from argmax. A position outside the image adds nothing."""
    S, A, coordinates = scalar_type(T), compute_type(T), coordinate_viewer(T)

    def run(c):
        g = c.boxes
        grad_y, argmax, grad_x, rois = view(c.y, T), view(c.argmax, PLACE), view(c.grad_x, A), coordinates(g.rois)
        bins, pixels = g.bins[0] * g.bins[1], g.size[0] * g.size[1]
        if c.in_order:
            for task in range(cuda.grid(1), g.batch * c.bands * c.channels, cuda.gridsize(1)):
                channel, band, n = task % c.channels, task // c.channels % c.bands, task // c.channels // c.bands
                first = band * g.size[0] // c.bands * g.size[1]
                end = (band + 1) * g.size[0] // c.bands * g.size[1]
                plane = (n * c.channels + channel) * g.size[0] * g.size[1]
                for r in range(g.rows):
                    if image_of(rois, r, g.batch, S) != n:
                        continue
                    start = (r * c.channels + channel) * bins
                    for b in range(start, start + bins):
                        pixel = at(argmax, b)
                        if first <= pixel and pixel < end:
                            put(grad_x, plane + pixel, at(grad_x, plane + pixel) + widen(at(grad_y, b)))
            return
        for task in range(cuda.grid(1), g.rows * c.channels * bins, cuda.gridsize(1)):
            plane, pixel = task // bins, at(argmax, task)
            n = image_of(rois, plane // c.channels, g.batch, S)
            if n >= 0 and pixel >= 0 and pixel < pixels:
                cuda.atomic.add(grad_x, (n * c.channels + plane % c.channels) * pixels + pixel, widen(at(grad_y, task)))

    return run


@kernels(Whole, type_pairs)
def mean_bins(T, C):
    """y: means of bins, each from channels of its own."""
    S, coordinates = scalar_type(T), coordinate_viewer(T)

    def run(c):
        g = c.boxes
        x, y, rois = view(c.x, T), view(c.y, T), coordinates(g.rois)
        bins = g.bins[0] * g.bins[1]
        for task in range(cuda.grid(1), g.rows * c.channels * bins, cuda.gridsize(1)):
            number, r = task % (c.channels * bins), task // (c.channels * bins)
            n, value = image_of(rois, r, g.batch, S), S(np.nan)
            if n >= 0:
                bin_ = number % bins
                top, bottom, left, right = ranges_of(rois, r, bin_ // g.bins[1], bin_ % g.bins[1], c.last_counts, g, S)
                plane = (n * c.channels * bins + number) * g.size[0] * g.size[1]
                value = S(0)
                for row in range(top, bottom):
                    total = S(0)
                    for column in range(left, right):
                        total += widen(at(x, plane + row * g.size[1] + column))
                    value += total
                value = value / S(max((bottom - top) * (right - left), 1))
            put(y, task, narrow(value, T))

    return run


@kernels(Whole, type_pairs)
def add_means(T, C):
    """The gradient of x from that of means."""
    S, A, coordinates = scalar_type(T), compute_type(T), coordinate_viewer(T)

    def run(c):
        g = c.boxes
        grad_y, grad_x, rois = view(c.y, T), view(c.grad_x, A), coordinates(g.rois)
        bins = g.bins[0] * g.bins[1]
        if c.in_order:
            for task in range(cuda.grid(1), g.batch * c.bands * c.channels * bins, cuda.gridsize(1)):
                number, rest = task % (c.channels * bins), task // (c.channels * bins)
                band, n = rest % c.bands, rest // c.bands
                first, end = band * g.size[0] // c.bands, (band + 1) * g.size[0] // c.bands
                bin_, plane = number % bins, (n * c.channels * bins + number) * g.size[0] * g.size[1]
                for r in range(g.rows):
                    if image_of(rois, r, g.batch, S) != n:
                        continue
                    top, bottom, left, right = ranges_of(
                        rois, r, bin_ // g.bins[1], bin_ % g.bins[1], c.last_counts, g, S
                    )
                    gradient = widen(at(grad_y, r * c.channels * bins + number))
                    gradient = gradient / S(max((bottom - top) * (right - left), 1))
                    for row in range(max(top, first), min(bottom, end)):
                        for column in range(left, right):
                            spot = plane + row * g.size[1] + column
                            put(grad_x, spot, at(grad_x, spot) + gradient)
            return
        for task in range(cuda.grid(1), g.rows * c.channels * bins, cuda.gridsize(1)):
            number, r = task % (c.channels * bins), task // (c.channels * bins)
            n = image_of(rois, r, g.batch, S)
            if n >= 0:
                bin_ = number % bins
                top, bottom, left, right = ranges_of(rois, r, bin_ // g.bins[1], bin_ % g.bins[1], c.last_counts, g, S)
                plane = (n * c.channels * bins + number) * g.size[0] * g.size[1]
                gradient = widen(at(grad_y, task)) / S(max((bottom - top) * (right - left), 1))
                for row in range(top, bottom):
                    for column in range(left, right):
                        cuda.atomic.add(grad_x, plane + row * g.size[1] + column, gradient)

    return run
