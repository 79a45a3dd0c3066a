"""Columns on the GPU: where the taps of output pixels read, and what they read.

Output pixels are numbered across all images of the batch. A column is what one tap reads from one channel. Channels are
divided into groups and into offset groups; a segment is the intersection of one of each. Columns are made in chunks
that start at a multiple of 16 bytes, with zeros outside the segment.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numdcn._cuda.coordinates import coordinate
from numdcn._cuda.jit import THREADS, cuda, device, scalar_type
from numdcn._cuda.memory import at, vector_length, widen
from numdcn._cuda.sample import cell_of, gather, outside
from numdcn._formulas import bilinear

I32 = np.int32


class Stage(NamedTuple):
    """Where one tap of a tile's output pixels reads, in shared memory."""

    places: Any  # (pixels of the tile,) int32: the pixel of the zero-padded image where the cell starts
    image_index: Any  # (pixels of the tile,) int32
    fractions: Any  # (3, pixels of the tile): fractions along y and x, and the mask


class Segment(NamedTuple):
    """The channels low <= channel < high shared by a group and an offset group."""

    group: Any  # read only by the backward on tensor cores
    low: Any
    high: Any


class Room(NamedTuple):
    """A thread's local memory for a vector of V channels."""

    corners: Any  # (4*V,): values of the four corners of a cell
    values: Any  # (V,)


def planner(T: Any, SAMPLED: bool) -> Any:
    """Make `plan(c, a, q, tap, og)`, for offsets of any type."""
    S = scalar_type(T)

    @device
    def plan(c, a, q, tap, og):
        """Where a tap of output pixel q reads: pixel of the zero-padded image, fractions, mask, and the image."""
        p = c.p
        count = p.out_size[0] * p.out_size[1]
        n = q // count
        pixel = I32(q - n * count)
        i, j = pixel // I32(p.out_size[1]), pixel % I32(p.out_size[1])
        y = i * p.stride[0] - p.before[0] + tap // p.kernel[1] * p.dilation[0]
        x = j * p.stride[1] - p.before[1] + tap % p.kernel[1] * p.dilation[1]
        height, width = I32(p.in_size[0]), I32(p.in_size[1])
        scale, fraction_y, fraction_x = S(1), S(0), S(0)
        place = outside(height, width)
        if SAMPLED:
            channel = (n * p.offset_groups + og) * p.taps + tap
            moved_y = S(y) + coordinate(a.offsets, 2 * channel * count + pixel)
            moved_x = S(x) + coordinate(a.offsets, (2 * channel + 1) * count + pixel)
            place, fraction_y, fraction_x = cell_of(moved_y, moved_x, height, width, S)
            if c.mask:
                scale = S(widen(at(a.mask, channel * count + pixel)))
        elif y >= 0 and y < height and x >= 0 and x < width:
            place = I32(y + 1) * I32(width + 1) + I32(x + 1)
        return place, fraction_y, fraction_x, scale, I32(n)

    return plan


def tile_planner(T: Any, SAMPLED: bool, SPOTS: int, THREADS: int = THREADS) -> tuple[Any, Any]:
    """Make `new_stage()`, with room for SPOTS pixels, and `plan_tile(c, a, stage, first, end, tap, og, thread)`."""
    S, plan = scalar_type(T), planner(T, SAMPLED)

    @device
    def new_stage():  # the simulator identifies shared arrays by source line
        places = cuda.shared.array(SPOTS, I32)
        image_index = cuda.shared.array(SPOTS, I32)
        fractions = cuda.shared.array((3, SPOTS), S)
        return Stage(places, image_index, fractions)

    @device
    def plan_tile(c, a, stage, first, end, tap, og, thread):
        """Plan up to SPOTS output pixels from `first` on, ending before `end`."""
        for spot in range(thread, I32(min(SPOTS, end - first)), I32(THREADS)):
            place, fraction_y, fraction_x, scale, n = plan(c, a, first + spot, tap, og)
            stage.places[spot], stage.image_index[spot] = place, n
            stage.fractions[0, spot], stage.fractions[1, spot], stage.fractions[2, spot] = fraction_y, fraction_x, scale

    return new_stage, plan_tile


@device
def weigh(corners, y, x, scale, values, S, V, SAMPLED):
    """values[0 : V] = the columns of V channels, from their corners."""
    if SAMPLED:
        w00, w01, w10, w11 = bilinear.corner_weights(y, x)
        four = (S(w00), S(w01), S(w10), S(w11))
        for i in range(V):
            read = (corners[i], corners[V + i], corners[2 * V + i], corners[3 * V + i])
            values[i] = scale * S(bilinear.value(four, read))
    else:
        for i in range(V):
            values[i] = corners[i]


def spot_sampler(T: Any, SAMPLED: bool) -> tuple[Any, Any]:
    """Make `new_room()`, for the channels of a vector, and `sample_spot(c, a, stage, spot, live, channel, segment, room)`."""
    S, V = scalar_type(T), vector_length(T)
    CORNERS = 4 * V

    @device
    def new_room():
        return Room(cuda.local.array(CORNERS, S), cuda.local.array(V, S))

    @device
    def sample_spot(c, a, stage, spot, live, channel, segment, room):
        """room.values = the columns of V channels of a planned pixel; 0 outside the segment, and all 0 unless
        `live`."""
        values, fractions = room.values, stage.fractions
        for i in range(V):
            values[i] = S(0)
        if live and channel < segment.high:
            start = (stage.image_index[spot] * c.pixels + stage.places[spot]) * c.pitch + channel
            gather(a.images, start, c.pitch, c.pitch * (c.p.in_size[1] + 1), room.corners, V, V)
            weigh(room.corners, fractions[0, spot], fractions[1, spot], fractions[2, spot], values, S, V, SAMPLED)
            for i in range(V):
                values[i] = values[i] if segment.low <= channel + i and channel + i < segment.high else S(0)

    return new_room, sample_spot
