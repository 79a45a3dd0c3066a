"""GPU kernels for sampling at points.

x is copied to channels-last with a border of zeros. A block of threads takes a tile of points: plan (cells and
weights), sample along the channels, transpose the tile into y. The backward reads the tile of grad_y, adds it to the
image's gradient and sums it times the slopes over the channels, in a fixed order.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from numdcn._cuda.coordinates import coordinate, coordinate_viewer, put_coordinate
from numdcn._cuda.jit import F64, SIMULATED, THREADS, compute_type, cuda, kernels, scalar_type, type_pairs
from numdcn._cuda.memory import at, narrow, put, vector_length, view, widen
from numdcn._cuda.sample import cell_of, corner_adder, gather, outside, write_plan
from numdcn._cuda.scatter import PLACE
from numdcn._formulas import bilinear

I32 = np.int32
POINTS = 4 if SIMULATED else 32  # per tile
CHANNELS = 8 if SIMULATED else 32  # per tile
PITCH = POINTS + 1


class Call(NamedTuple):
    """Parameters of the kernels."""

    images: int
    points: int  # (N, points, 2)
    y: int  # (N, channels, points); in the backward: its gradient
    grad_images: int  # 0: not wanted
    grad_points: int  # (N, points, 2); 0: not wanted
    batch: int
    channels: int
    count: int  # of points
    size: tuple[int, int]
    pitch: int  # channels of the images, including padding
    pixels: int
    grad_pitch: int


@kernels(Call, type_pairs)
def forward_tiles(T, C):
    """y, from images and y of T, points of C."""
    S, V, coordinates = scalar_type(T), vector_length(T), coordinate_viewer(T)
    CORNERS = 4 * V

    def run(c):
        places = cuda.shared.array(POINTS, I32)  # the simulator identifies shared arrays by source line
        weights = cuda.shared.array((4, POINTS), S)
        tile = cuda.shared.array((CHANNELS, PITCH), S)
        corners = cuda.local.array(CORNERS, S)
        images, points, y = view(c.images, T), coordinates(c.points), view(c.y, T)
        thread, height, width = I32(cuda.threadIdx.x), I32(c.size[0]), I32(c.size[1])
        across, row_step = (c.count + POINTS - 1) // POINTS, c.pitch * (width + 1)
        for task in range(cuda.blockIdx.x, c.batch * across, cuda.gridDim.x):
            n, first = task // across, task % across * POINTS
            cuda.syncthreads()
            if thread < POINTS and first + thread < c.count:
                spot = 2 * (n * c.count + first + thread)
                place, fraction_y, fraction_x = cell_of(
                    coordinate(points, spot), coordinate(points, spot + 1), height, width, S
                )
                places[thread] = place
                w00, w01, w10, w11 = bilinear.corner_weights(fraction_y, fraction_x)
                weights[0, thread], weights[1, thread], weights[2, thread], weights[3, thread] = w00, w01, w10, w11
            cuda.syncthreads()
            for chunk in range(0, c.pitch, CHANNELS):
                for unit in range(thread, POINTS * (CHANNELS // V), THREADS):
                    point, slot = unit // (CHANNELS // V), unit % (CHANNELS // V) * V
                    if first + point < c.count and chunk + slot < c.pitch:
                        start = (n * c.pixels + places[point]) * c.pitch + chunk + slot
                        gather(images, start, c.pitch, row_step, corners, V, V)
                        four = (weights[0, point], weights[1, point], weights[2, point], weights[3, point])
                        for i in range(V):
                            read = (corners[i], corners[V + i], corners[2 * V + i], corners[3 * V + i])
                            tile[slot + i, point] = bilinear.value(four, read)
                cuda.syncthreads()
                for unit in range(thread, POINTS * CHANNELS, THREADS):
                    point, slot = unit % POINTS, unit // POINTS
                    if first + point < c.count and chunk + slot < c.channels:
                        put(y, (n * c.channels + chunk + slot) * c.count + first + point, narrow(tile[slot, point], T))
                cuda.syncthreads()

    return run


@kernels(Call, lambda: [(*pair, v) for pair in type_pairs() for v in (False, True) if not (v and pair[0] == F64)])
def backward_tiles(T, C, VECTORS):
    """The gradients, added to images and summed over the channels for points. VECTORS: use 16-byte atomic adds."""
    S, A, V, coordinates = scalar_type(T), compute_type(T), vector_length(T), coordinate_viewer(T)
    SLOTS, CORNERS, add_corners = CHANNELS // V, 4 * V, corner_adder(T, V, VECTORS, True)

    def run(c):
        places = cuda.shared.array(POINTS, I32)
        fractions = cuda.shared.array((2, POINTS), S)
        tile = cuda.shared.array((CHANNELS, PITCH), S)
        sums = cuda.shared.array((2, SLOTS, POINTS), S)
        corners, values, products = cuda.local.array(CORNERS, S), cuda.local.array(V, S), cuda.local.array(V, S)
        images, points, grad_y = view(c.images, T), coordinates(c.points), view(c.y, T)
        grad_images, grad_points = view(c.grad_images, A), coordinates(c.grad_points)
        thread, height, width = I32(cuda.threadIdx.x), I32(c.size[0]), I32(c.size[1])
        across, row_step, grad_row_step = (
            (c.count + POINTS - 1) // POINTS,
            c.pitch * (width + 1),
            c.grad_pitch * (width + 1),
        )
        nowhere = outside(height, width)
        for task in range(cuda.blockIdx.x, c.batch * across, cuda.gridDim.x):
            n, first = task // across, task % across * POINTS
            cuda.syncthreads()
            if thread < POINTS and first + thread < c.count:
                spot = 2 * (n * c.count + first + thread)
                place, fraction_y, fraction_x = cell_of(
                    coordinate(points, spot), coordinate(points, spot + 1), height, width, S
                )
                places[thread], fractions[0, thread], fractions[1, thread] = place, fraction_y, fraction_x
            for unit in range(thread, 2 * SLOTS * POINTS, THREADS):
                sums[unit // (SLOTS * POINTS), unit // POINTS % SLOTS, unit % POINTS] = S(0)
            for chunk in range(0, c.pitch, CHANNELS):
                cuda.syncthreads()
                for unit in range(thread, POINTS * CHANNELS, THREADS):
                    point, slot = unit % POINTS, unit // POINTS
                    grad = S(0)
                    if first + point < c.count and chunk + slot < c.channels:
                        grad = widen(at(grad_y, (n * c.channels + chunk + slot) * c.count + first + point))
                    tile[slot, point] = grad
                cuda.syncthreads()
                for unit in range(thread, POINTS * SLOTS, THREADS):
                    point, slot = unit // SLOTS, unit % SLOTS
                    channel = chunk + slot * V
                    if first + point >= c.count or channel >= c.pitch:
                        continue
                    y, x, place = fractions[0, point], fractions[1, point], places[point]
                    for i in range(V):
                        values[i] = tile[slot * V + i, point]
                    if c.grad_points:
                        gather(images, (n * c.pixels + place) * c.pitch + channel, c.pitch, row_step, corners, V, V)
                        both = (y, x, S(1) - y, S(1) - x)
                        for i in range(V):
                            if channel + i < c.channels:
                                read = (corners[i], corners[V + i], corners[2 * V + i], corners[3 * V + i])
                                along_y, along_x = bilinear.slopes(both, read)
                                sums[0, slot, point] += values[i] * S(along_y)
                                sums[1, slot, point] += values[i] * S(along_x)
                    if c.grad_images and place < nowhere:
                        start = (n * c.pixels + place) * c.grad_pitch + channel
                        add_corners(grad_images, start, c.grad_pitch, grad_row_step, y, x, values, products)
            cuda.syncthreads()
            if c.grad_points and thread < POINTS and first + thread < c.count:
                for axis in range(2):
                    total = S(0)
                    for slot in range(SLOTS):
                        total += sums[axis, slot, thread]
                    put_coordinate(grad_points, 2 * (n * c.count + first + thread) + axis, total, T)

    return run


@kernels(Call, type_pairs)
def plan_points(T, C):
    """For `scatter`: the cell of each point (as int32, at `grad_points`) and the weights of its corners (at `images`)."""
    S, A, coordinates = scalar_type(T), compute_type(T), coordinate_viewer(T)

    def run(c):
        points, places, weights = coordinates(c.points), view(c.grad_points, PLACE), view(c.images, A)
        height, width = I32(c.size[0]), I32(c.size[1])
        for task in range(cuda.grid(1), c.batch * c.count, cuda.gridsize(1)):
            n, point = task // c.count, task % c.count
            place, y, x = cell_of(coordinate(points, 2 * task), coordinate(points, 2 * task + 1), height, width, S)
            write_plan(places, weights, task, 4 * n * c.count + point, c.count, place, outside(height, width), y, x, S)

    return run
