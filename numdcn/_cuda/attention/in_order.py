"""The gradient of value without atomics: each element is added to by one thread, in the order of the samples.

A group of `lanes` threads owns a band of the pixels of a head's level, a channel each. A block of groups goes through all
samples of that head and level together; each group adds those that touch its band. Many bands make many tasks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from numdcn._cuda.attention.kernels import HEIGHT, Outputs, Pixels
from numdcn._cuda.attention.points import C00, C01, C10, C11, Head, Points, originator, sampler
from numdcn._cuda.jit import STORED, THREADS, compute_type, cuda, device, kernels, scalar_type
from numdcn._cuda.lanes import split
from numdcn._cuda.memory import at, put, view, widen
from numdcn._formulas import bilinear

I32, I64 = np.int32, np.int64


class InOrder(NamedTuple):
    """Parameters of `add_in_order`: those of one level."""

    points: Points
    grad_y: Outputs
    grad_value: Pixels
    batch: int
    channels: int
    lanes: int  # threads per band, a power of two
    first: int  # of the level's points
    count: int  # of points
    start: int  # of the level's pixels
    pixels: int
    bands: int


def pixel_adder(T):
    """Make `add_pixel(images, start, step, pixel, bounds, product)`."""
    S = scalar_type(T)

    @device
    def add_pixel(images, start, step, pixel, bounds, product):
        """Add a number to a pixel of a band."""
        if bounds[0] <= pixel and pixel < bounds[1]:
            spot = start + pixel * step
            put(images, spot, at(images, spot) + S(product))

    return add_pixel


@kernels(InOrder, lambda: [(dtype,) for dtype in STORED.values()])
def add_in_order(T):
    """Add the gradients of all samples of a level to the gradient of value."""
    S, A, add_pixel = scalar_type(T), compute_type(T), pixel_adder(T)
    origin_at, sample_at = originator(T), sampler(T)

    def run(c):
        numbers = cuda.shared.array((HEIGHT, THREADS), S)
        places = cuda.shared.array((HEIGHT, THREADS), I32)
        queries = cuda.shared.array(THREADS, I32)
        grad_y, grad_value = view(c.grad_y.address, T), view(c.grad_value.address, A)
        thread, lanes = I32(cuda.threadIdx.x), I32(c.lanes)
        (group, lane), (groups, _) = split(thread, lanes), split(THREADS, lanes)
        across, down = split(c.channels + lanes - 1, lanes)[0], split(c.bands + groups - 1, groups)[0]
        samples, step = c.points.queries * c.count, c.grad_value.strides[1]
        for task in range(cuda.blockIdx.x, c.batch * c.points.heads * across * down, cuda.gridDim.x):
            rest, row = split(task, down)
            rest, chunk = split(rest, across)
            b, m = split(rest, c.points.heads)
            channel, band = I64(chunk * lanes + lane), I64(row * groups + group)
            live = channel < c.channels and band < c.bands
            bounds = (c.start + band * c.pixels // c.bands, c.start + (band + 1) * c.pixels // c.bands)
            start = b * c.grad_value.strides[0] + m * c.grad_value.strides[2] + channel
            source = b * c.grad_y.strides[0] + m * c.grad_y.strides[2] + channel * c.grad_y.strides[3]
            for begin in range(0, samples, THREADS):
                cuda.syncthreads()
                if begin + thread < samples:
                    q, t = split(begin + thread, c.count)
                    sample = sample_at(c.points, origin_at(c.points, Head(I64(b), I64(q), I64(m))), c.first + t)
                    queries[thread] = q
                    numbers[0, thread], numbers[1, thread], numbers[2, thread] = sample.y, sample.x, sample.weight
                    places[0, thread], places[1, thread], places[2, thread] = sample.pixel, sample.width, sample.corners
                cuda.syncthreads()
                if live:
                    for s in range(min(THREADS, samples - begin)):
                        pixel, width, inside = places[0, s], places[1, s], places[2, s]
                        if not inside or pixel + width + 1 < bounds[0] or pixel >= bounds[1]:
                            continue
                        number = numbers[2, s] * widen(at(grad_y, source + queries[s] * c.grad_y.strides[1]))
                        w00, w01, w10, w11 = bilinear.corner_weights(numbers[0, s], numbers[1, s])
                        if inside & C00:
                            add_pixel(grad_value, start, step, pixel, bounds, w00 * number)
                        if inside & C01:
                            add_pixel(grad_value, start, step, pixel + 1, bounds, w01 * number)
                        if inside & C10:
                            add_pixel(grad_value, start, step, pixel + width, bounds, w10 * number)
                        if inside & C11:
                            add_pixel(grad_value, start, step, pixel + width + 1, bounds, w11 * number)

    return run
