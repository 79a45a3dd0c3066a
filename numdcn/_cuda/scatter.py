"""Gradients of images without atomics: each element is added to by one thread, in the order of the samples.

A block owns a band of rows of an image, for a block of channels, one per thread. It goes through all samples and adds
those that touch its rows, so the sums do not depend on how threads were scheduled. Many bands make many tasks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from numdcn._cuda.jit import F32, F64, SIMULATED, cuda, kernels, scalar_type, types
from numdcn._cuda.memory import at, put, view

I32 = np.int32
PLACE = types.int32
SKIPPED = -(2**30)  # place of a sample that adds nothing
CHANNELS = 4 if SIMULATED else 64  # per block: one per thread


class Scatter(NamedTuple):
    """Parameters of `scatter`."""

    places: int  # int32 (N, samples): the pixel of the zero-padded image where each cell starts
    weights: int  # (N, 4, samples)
    values: int  # (N, samples, channels): what the corners of each sample receive, times their weights
    images: int
    batch: int
    samples: int
    channels: int
    first_channel: int  # where they start in the images
    pitch: int
    pixels: int  # per image
    row: int  # pixels per row
    rows: int
    bands: int
    corners: int  # 4, or 1 without interpolation: then the others are not touched, not even by NaN times 0


@kernels(Scatter, lambda: [(F32,), (F64,)])
def scatter(T):
    """Add samples to images."""
    S = scalar_type(T)

    def run(c):
        staged_places = cuda.shared.array(CHANNELS, I32)
        staged_weights = cuda.shared.array((4, CHANNELS), S)
        places, weights = view(c.places, PLACE), view(c.weights, T)
        values, images = view(c.values, T), view(c.images, T)
        thread = I32(cuda.threadIdx.x)
        deep = (c.channels + CHANNELS - 1) // CHANNELS
        for task in range(cuda.blockIdx.x, c.batch * c.bands * deep, cuda.gridDim.x):
            n, rest = task // (c.bands * deep), task % (c.bands * deep)
            band, channel = rest // deep, rest % deep * CHANNELS + thread
            first, end = band * c.rows // c.bands * c.row, (band + 1) * c.rows // c.bands * c.row
            if band == c.bands - 1:
                end = c.pixels
            image = n * c.pixels * c.pitch + c.first_channel + channel
            for begin in range(0, c.samples, CHANNELS):
                cuda.syncthreads()
                if begin + thread < c.samples:
                    staged_places[thread] = at(places, n * c.samples + begin + thread)
                    for corner in range(4):
                        staged_weights[corner, thread] = at(weights, (n * 4 + corner) * c.samples + begin + thread)
                cuda.syncthreads()
                if channel < c.channels:
                    for s in range(min(CHANNELS, c.samples - begin)):
                        upper = staged_places[s]
                        lower = upper + c.row
                        if lower < first or upper >= end:
                            continue
                        value = at(values, (n * c.samples + begin + s) * c.channels + channel)
                        for corner in range(c.corners):
                            pixel = (upper if corner < 2 else lower) + corner % 2
                            # the pixel after a row is the padding of the next row, but belongs to the cell's own row
                            own = upper if corner < 2 else lower
                            if first <= own and own < end:
                                spot = image + pixel * c.pitch
                                put(images, spot, at(images, spot) + staged_weights[corner, s] * value)

    return run
