"""GPU kernels of weighted samples: y, and the gradients.

A block takes heads of queries one after the other, `lanes` threads for each. Every thread has an element of the
channels, or 16 bytes of them, so that lanes read adjacent memory. The samples of a few points of all of these heads are
located first, each by one thread, and put into shared memory; then every thread goes through those of its head.

Value is read where it lies, whatever its strides, and only at corners in the image.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numdcn._cuda.attention.access import load_element_if, load_vector_if, store_vector
from numdcn._cuda.attention.points import (
    C00,
    C01,
    C10,
    C11,
    FORMS,
    SCALE_X,
    SCALE_Y,
    Origin,
    Points,
    head_at,
    originator,
    sampler,
)
from numdcn._cuda.coordinates import coordinate_viewer, put_coordinate
from numdcn._cuda.jit import F32, F64, STORED, THREADS, compute_type, cuda, device, kernels, scalar_type
from numdcn._cuda.lanes import add_lanes, split
from numdcn._cuda.memory import add_vector, at, narrow, put, vector_length, view
from numdcn._formulas import bilinear

I32, I64 = np.int32, np.int64
SAMPLES = 5 * THREADS // 2  # in shared memory
HEIGHT = 3  # of tables in shared memory: fractions and weight; pixel, width and corners; sums


class Pixels(NamedTuple):
    """An array (B, S, M, D), or its gradient. Channels are adjacent."""

    address: int  # 0: not wanted
    strides: tuple[int, int, int]


class Outputs(NamedTuple):
    """An array (B, Q, M, D), or its gradient."""

    address: int
    strides: tuple[int, int, int, int]


class Call(NamedTuple):
    """Parameters of the kernels."""

    points: Points
    value: Pixels
    y: Outputs  # in the backward: its gradient
    grad_value: Pixels  # of the type of sums
    grad_points: int  # 0: not wanted
    grad_weights: int  # 0: not wanted
    grad_points_strides: tuple[int, int, int, int, int]
    grad_weights_strides: tuple[int, int, int, int]
    heads: int  # of all queries
    channels: int
    lanes: int  # threads per head, a power of two
    portion: int  # points located at a time
    pitch: int  # samples of a head in shared memory


def head_locator(T: Any) -> Any:
    """Make `locate_heads(c, first, origins, bases)`."""
    origin_at = originator(T)

    @device
    def locate_heads(c, first, origins, bases):
        """Put the origins of a block's heads, from `first` on, into shared memory."""
        number = I32(cuda.threadIdx.x)
        if number < split(THREADS, c.lanes)[0] and first + number < c.heads:
            origin = origin_at(c.points, head_at(first + number, c.points))
            origins[0, number], origins[1, number] = origin.points, origin.weights
            bases[0, number], bases[1, number] = origin.y, origin.x

    return locate_heads


def sample_locator(T: Any) -> Any:
    """Make `locate_samples(c, first, begin, count, origins, bases, numbers, places)`."""
    sample_at = sampler(T)

    @device
    def locate_samples(c, first, begin, count, origins, bases, numbers, places):
        """Put the samples of `count` points, from `begin` on, of a block's heads into shared memory."""
        block_heads = split(THREADS, c.lanes)[0]
        for unit in range(I32(cuda.threadIdx.x), block_heads * count, THREADS):
            number, t = split(unit, count)
            if first + number < c.heads:
                origin = Origin(origins[0, number], origins[1, number], bases[0, number], bases[1, number])
                sample, spot = sample_at(c.points, origin, begin + t), number * I32(c.pitch) + t
                numbers[0, spot], numbers[1, spot], numbers[2, spot] = sample.y, sample.x, sample.weight
                places[0, spot], places[1, spot], places[2, spot] = sample.pixel, sample.width, sample.corners

    return locate_samples


def loader(WIDE: bool) -> Any:
    """Make `load(live, array, index, target, first)`: of 16 bytes or of an element."""

    @device
    def load(live, array, index, target, first):
        if WIDE:
            load_vector_if(live, array, index, target, first)
        else:
            load_element_if(live, array, index, target, first)

    return load


def corner_loader(U: int, WIDE: bool) -> Any:
    """Make `load_corners(live, value, start, step, places, spot, corners)`."""
    load = loader(WIDE)

    @device
    def load_corners(live, value, start, step, places, spot, corners):
        """Read U channels of the four corners of a sample: corners[0 : U] for the first, and so on; zeros for those outside
        the image, and unless `live`. `start`: of the channels in pixel 0; `step`: from pixel to pixel."""
        inside = places[2, spot] if live else I32(0)
        upper = start + places[0, spot] * step
        lower = upper + places[1, spot] * step
        load((inside & C00) != 0, value, upper, corners, 0)
        load((inside & C01) != 0, value, upper + step, corners, U)
        load((inside & C10) != 0, value, lower, corners, 2 * U)
        load((inside & C11) != 0, value, lower + step, corners, 3 * U)

    return load_corners


@kernels(
    Call,
    lambda: [(dtype, wide) for dtype in STORED.values() for wide in (False, True)],
    lambda T, *rest: (THREADS, 4 if T == F32 else 3),
)
def forward_heads(T, WIDE):
    """y. WIDE: 16 bytes of channels per thread."""
    S, U = scalar_type(T), vector_length(T) if WIDE else 1
    CORNERS, load_corners = 4 * U, corner_loader(U, WIDE)
    locate_heads, locate_samples = head_locator(T), sample_locator(T)

    def run(c):
        origins = cuda.shared.array((2, THREADS), I64)
        bases = cuda.shared.array((2, THREADS), S)
        numbers = cuda.shared.array((HEIGHT, SAMPLES), S)
        places = cuda.shared.array((HEIGHT, SAMPLES), I32)
        corners, totals = cuda.local.array(CORNERS, S), cuda.local.array(U, S)
        value, y = view(c.value.address, T), view(c.y.address, T)
        lanes, portion, portions = I32(c.lanes), I32(c.portion), split(c.points.count + c.portion - 1, c.portion)[0]
        (number, lane), (block_heads, _) = split(cuda.threadIdx.x, lanes), split(THREADS, lanes)
        across, blocks = (
            split(c.channels + lanes * U - 1, lanes * U)[0],
            split(c.heads + block_heads - 1, block_heads)[0],
        )
        for task in range(cuda.blockIdx.x, blocks * across, cuda.gridDim.x):
            block, chunk = split(task, across)
            first, channel = block * block_heads, I64((chunk * lanes + lane) * U)
            head = head_at(first + number, c.points)
            live = first + number < c.heads and channel < c.channels
            start = head.b * c.value.strides[0] + head.m * c.value.strides[2] + channel
            for i in range(U):
                totals[i] = S(0)
            cuda.syncthreads()
            locate_heads(c, first, origins, bases)
            for p in range(portions):
                begin = p * portion
                count = min(portion, I32(c.points.count) - begin)
                cuda.syncthreads()
                locate_samples(c, first, begin, count, origins, bases, numbers, places)
                cuda.syncthreads()
                if live:
                    for spot in range(number * I32(c.pitch), number * I32(c.pitch) + count):
                        load_corners(True, value, start, c.value.strides[1], places, spot, corners)
                        w00, w01, w10, w11 = bilinear.corner_weights(numbers[0, spot], numbers[1, spot])
                        four = (S(w00), S(w01), S(w10), S(w11))
                        weight = numbers[2, spot]
                        for i in range(U):
                            read = (corners[i], corners[U + i], corners[2 * U + i], corners[3 * U + i])
                            totals[i] += weight * S(bilinear.value(four, read))
            if live:
                s = c.y.strides
                target = head.b * s[0] + head.q * s[1] + head.m * s[2] + channel * s[3]
                if WIDE:
                    store_vector(y, target, totals)
                else:
                    put(y, target, narrow(totals[0], T))

    return run


def corner_adder(U: int, VECTORS: bool) -> Any:
    """Make `add_corners(images, start, step, places, spot, four, values, products)`."""

    @device
    def add_corner(images, start, weight, values, products):
        for i in range(U):
            products[i] = weight * values[i]
        if VECTORS:
            for i in range(0, U, 4):
                add_vector(images, start + i, products, i)
        else:
            for i in range(U):
                cuda.atomic.add(images, start + i, products[i])

    @device
    def add_corners(images, start, step, places, spot, four, values, products):
        """Add U numbers, times the weights `four`, atomically to the corners of a sample that are in the image; the rest
        is as in `load_corners`."""
        inside = places[2, spot]
        upper = start + places[0, spot] * step
        lower = upper + places[1, spot] * step
        if inside & C00:
            add_corner(images, upper, four[0], values, products)
        if inside & C01:
            add_corner(images, upper + step, four[1], values, products)
        if inside & C10:
            add_corner(images, lower, four[2], values, products)
        if inside & C11:
            add_corner(images, lower + step, four[3], values, products)

    return add_corners


def gradient_writer(T: Any) -> Any:
    """Make `write_gradients(c, first, begin, count, numbers, sums)`."""
    S, A, coordinates = scalar_type(T), compute_type(T), coordinate_viewer(T)

    @device
    def write_gradients(c, first, begin, count, numbers, sums):
        """Write the gradients of the points and weights that `locate_samples` has located, from their sums over the
        channels."""
        forms = view(c.points.table.forms, A)
        grad_points, grad_weights = coordinates(c.grad_points), coordinates(c.grad_weights)
        block_heads = split(THREADS, c.lanes)[0]
        for unit in range(I32(cuda.threadIdx.x), block_heads * count, THREADS):
            number, t = split(unit, count)
            if first + number < c.heads:
                head = head_at(first + number, c.points)
                spot, t = number * I32(c.pitch) + t, begin + t
                if c.grad_weights:
                    s = c.grad_weights_strides
                    target = head.b * s[0] + head.q * s[1] + head.m * s[2] + t * s[3]
                    put_coordinate(grad_weights, target, S(sums[0, spot]), T)
                if c.grad_points:
                    s = c.grad_points_strides
                    target = head.b * s[0] + head.q * s[1] + head.m * s[2] + t * s[3]
                    weight = S(numbers[2, spot])
                    along_y = at(forms, t * FORMS + SCALE_Y) * (weight * S(sums[1, spot]))
                    along_x = at(forms, t * FORMS + SCALE_X) * (weight * S(sums[2, spot]))
                    put_coordinate(grad_points, target, S(along_x), T)
                    put_coordinate(grad_points, target + s[4], S(along_y), T)

    return write_gradients


def backward_variants() -> list[tuple[Any, ...]]:
    """Those of the forward, and with vectors for the types that have them."""
    plain = [(dtype, wide, False) for dtype in STORED.values() for wide in (False, True)]
    return plain + [(dtype, True, True) for dtype in STORED.values() if dtype != F64]


@kernels(Call, backward_variants, lambda T, WIDE, VECTORS: (THREADS, 3 if T == F32 and VECTORS else 2))
def backward_heads(T, WIDE, VECTORS):
    """The gradients: that of value is added to, those of points and weights are written. WIDE without VECTORS (16-byte
    atomic adds) leaves out that of value."""
    ADDS = VECTORS or not WIDE
    S, A, U, load = scalar_type(T), compute_type(T), vector_length(T) if WIDE else 1, loader(WIDE)
    CORNERS, load_corners, add_corners = 4 * U, corner_loader(U, WIDE), corner_adder(U, VECTORS)
    locate_heads, locate_samples, write_gradients = head_locator(T), sample_locator(T), gradient_writer(T)

    def run(c):
        origins = cuda.shared.array((2, THREADS), I64)
        bases = cuda.shared.array((2, THREADS), S)
        numbers = cuda.shared.array((HEIGHT, SAMPLES), S)
        places = cuda.shared.array((HEIGHT, SAMPLES), I32)
        sums = cuda.shared.array((HEIGHT, SAMPLES), S)
        corners, products = cuda.local.array(CORNERS, S), cuda.local.array(U, S)
        gradients, weighted = cuda.local.array(U, S), cuda.local.array(U, S)
        value, grad_y, grad_value = view(c.value.address, T), view(c.y.address, T), view(c.grad_value.address, A)
        lanes, portion, portions = I32(c.lanes), I32(c.portion), split(c.points.count + c.portion - 1, c.portion)[0]
        (number, lane), (block_heads, _) = split(cuda.threadIdx.x, lanes), split(THREADS, lanes)
        across = split(c.channels + lanes * U - 1, lanes * U)[0]
        with_sums = c.grad_points != 0 or c.grad_weights != 0
        for task in range(cuda.blockIdx.x, split(c.heads + block_heads - 1, block_heads)[0], cuda.gridDim.x):
            first = task * block_heads
            head = head_at(first + number, c.points)
            s = c.y.strides
            source = head.b * s[0] + head.q * s[1] + head.m * s[2]
            start = head.b * c.value.strides[0] + head.m * c.value.strides[2]
            grad_start = head.b * c.grad_value.strides[0] + head.m * c.grad_value.strides[2]
            cuda.syncthreads()
            locate_heads(c, first, origins, bases)
            for p in range(portions):
                begin = p * portion
                count = min(portion, I32(c.points.count) - begin)
                cuda.syncthreads()
                locate_samples(c, first, begin, count, origins, bases, numbers, places)
                cuda.syncthreads()
                for chunk in range(across):
                    channel = I64((chunk * lanes + lane) * U)
                    live = first + number < c.heads and channel < c.channels
                    load(live, grad_y, source + channel * s[3], gradients, 0)
                    for t in range(count):
                        spot = number * I32(c.pitch) + t
                        y, x, weight = numbers[0, spot], numbers[1, spot], numbers[2, spot]
                        w00, w01, w10, w11 = bilinear.corner_weights(y, x)
                        four = (S(w00), S(w01), S(w10), S(w11))
                        if ADDS and live and c.grad_value.address:
                            for i in range(U):
                                weighted[i] = weight * gradients[i]
                            add_corners(
                                grad_value,
                                grad_start + channel,
                                c.grad_value.strides[1],
                                places,
                                spot,
                                four,
                                weighted,
                                products,
                            )
                        if with_sums:
                            load_corners(live, value, start + channel, c.value.strides[1], places, spot, corners)
                            both, total, total_y, total_x = (y, x, S(1) - y, S(1) - x), S(0), S(0), S(0)
                            for i in range(U):
                                read = (corners[i], corners[U + i], corners[2 * U + i], corners[3 * U + i])
                                along_y, along_x = bilinear.slopes(both, read)
                                total += gradients[i] * S(bilinear.value(four, read))
                                total_y += gradients[i] * S(along_y)
                                total_x += gradients[i] * S(along_x)
                            total, total_y, total_x = add_lanes(total, total_y, total_x, lanes)
                            if lane == 0:
                                if chunk:
                                    total += sums[0, spot]
                                    total_y += sums[1, spot]
                                    total_x += sums[2, spot]
                                sums[0, spot], sums[1, spot], sums[2, spot] = total, total_y, total_x
                cuda.syncthreads()
                if with_sums:
                    write_gradients(c, first, begin, count, numbers, sums)

    return run
