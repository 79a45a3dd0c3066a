"""Columns on the GPU: where the taps of output pixels read, and what they read.

A column is what one tap reads from one channel at one output pixel. The output pixels of the batch are numbered patch by
patch, so that those of a tile lie close together and share the pixels they read. Channels are divided into groups and
into offset groups. Columns are made in chunks of consecutive channels that start at a multiple of 16 bytes, with zeros
outside their segment: channels of one group, and of offset groups that are planned together.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np

from numdcn._call.convolution import Convolution
from numdcn._cuda.conv.call import offset_groups_of
from numdcn._cuda.coordinates import coordinate
from numdcn._cuda.jit import SIMULATED, THREADS, cuda, device, scalar_type
from numdcn._cuda.memory import at, put, vector_length, widen
from numdcn._cuda.sample import cell_of, gather, outside
from numdcn._formulas import bilinear

I32 = np.int32
TALL, WIDE = (2, 4) if SIMULATED else (8, 16)  # a patch of output pixels
STATIC = 48 * 1024  # bytes of shared memory that a block may have
DIGITS = 24  # of the fraction that `plan_of` multiplies by
MOST_CHANNELS = 512  # of an offset group, so that its results are exact for up to 17 offset groups


class Stage(NamedTuple):
    """The output pixels of a tile, and where one tap of them reads, in shared memory."""

    image_index: Any  # (pixels,) int32
    pixels: Any  # (pixels,) int32: within the output image
    places: Any  # (plans,) int32: the pixel of the zero-padded image where the cell starts
    ys: Any  # (plans,): fractions along y
    xs: Any
    scales: Any  # (plans,): the mask


class Segment(NamedTuple):
    """The channels low <= channel < high of a group, whose offset groups are planned together."""

    group: Any  # read only by the backward on tensor cores
    low: Any
    high: Any
    origin: Any  # the first channel of the first of these offset groups
    part: Any  # 2**DIGITS / channels of an offset group, rounded up; 0 if there is only one offset group
    pitch: Any  # plans from offset group to offset group
    ragged: Any  # whether groups or offset groups may start within ATOM channels
    mixed: Any  # whether offset groups may start within a vector


class Room(NamedTuple):
    """A thread's local memory for a vector of V channels."""

    corners: Any  # (4*V,): values of the four corners of a cell
    values: Any  # (V,)


def planned_together(p: Convolution, atom: int, most: int, chunk: int) -> int:
    """The number of offset groups that are planned together: `most`, if `atom` channels never belong to two offset groups
    or groups and there is always room for the plans of a chunk; otherwise 1."""
    shared = p.in_channels // max(p.offset_groups, 1)
    whole = math.gcd(shared, p.in_channels // p.groups) % atom == 0
    fits = shared <= MOST_CHANNELS and (most - 1) * shared + atom >= chunk
    return most if p.offset_groups > 1 and whole and fits else 1


def plans_that_fit(T: Any, pixels: int, taken: int, most: int) -> int:
    """How many offset groups of a tile's pixels, at most `most`, can be planned together, next to `taken` bytes of shared
    memory."""
    each = pixels * (4 + 3 * np.dtype(scalar_type(T)).itemsize)
    return max(1, min(most, (STATIC - taken - 8 * pixels) // each))


@device
def located(p, q):
    """The image of output pixel q, numbered patch by patch, and its number within the image, row by row."""
    height, width = I32(p.out_size[0]), I32(p.out_size[1])
    count = p.out_size[0] * p.out_size[1]
    n = q // count
    rest = I32(q - n * count)
    band = I32(rest // I32(min(I32(TALL), height) * width))
    first = I32(band * I32(TALL))
    rest = I32(rest - first * width)
    tall = I32(min(I32(TALL), height - first))
    patch = I32(rest // I32(tall * I32(WIDE)))
    rest = I32(rest - patch * tall * I32(WIDE))
    wide = I32(min(I32(WIDE), width - patch * I32(WIDE)))
    row = I32(rest // wide)
    return I32(n), I32((first + row) * width + patch * I32(WIDE) + rest - row * wide)


@device
def plan_of(segment, channel):
    """Where the plans of a channel's offset group start in a stage."""
    which = I32(I32(I32(channel - segment.origin) * segment.part) >> I32(DIGITS))
    return I32(which * segment.pitch)


@device
def part_of(shared, ogs):
    """`Segment.part` for offset groups of `shared` channels, of which `ogs` are planned together."""
    return I32((1 << DIGITS) // shared + 1) if ogs > 1 else I32(0)


@device
def segment_from(c, group, low, end, pitch, V, CHUNK, ATOM):
    """The segment of a group from channel `low` on, before channel `end`: whole chunks, as long as their offset groups
    can be planned together."""
    p = c.p
    shared, ins = I32(p.in_channels // offset_groups_of(p)), I32(p.in_channels // p.groups)
    og = I32(low // shared)
    high = I32(min(end, (og + c.ogs) * shared))
    if c.ogs > 1 and high < end:
        chunk = I32(low // V * V)
        high = I32(chunk + (high - chunk) // CHUNK * CHUNK)
    ragged = shared % I32(ATOM) != 0 or ins % I32(ATOM) != 0
    mixed = c.ogs > 1 and shared % I32(V) != 0
    return Segment(group, low, high, I32(og * shared), part_of(shared, c.ogs), I32(pitch), ragged, mixed)


@device
def tile_segment(c, group, low, end, COLUMNS, PLANS, CHUNK, V, ATOM):
    """The same for at most COLUMNS channels. Its offset groups share PLANS plans, for a multiple of CHUNK pixels."""
    shared = I32(c.p.in_channels // offset_groups_of(c.p))
    stop = I32(min(end, low // V * V + COLUMNS))
    ogs = min(c.ogs, (stop - 1) // shared - low // shared + 1)
    return segment_from(c, group, low, stop, PLANS // ogs // CHUNK * CHUNK, V, V, ATOM)


def pixel_planner(T: Any, SAMPLED: bool) -> Any:
    """Make `plan_pixel(c, a, n, pixel, tap, og)`, for offsets of any type."""
    S = scalar_type(T)

    @device
    def plan_pixel(c, a, n, pixel, tap, og):
        """Where a tap of an output pixel of image n reads: pixel of the zero-padded image, fractions, mask."""
        p = c.p
        count = p.out_size[0] * p.out_size[1]
        i, down = I32(pixel // I32(p.out_size[1])), I32(I32(tap) // I32(p.kernel[1]))
        j, across = I32(pixel - i * I32(p.out_size[1])), I32(tap - down * I32(p.kernel[1]))
        y = i * p.stride[0] - p.before[0] + down * p.dilation[0]
        x = j * p.stride[1] - p.before[1] + across * p.dilation[1]
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
        return place, fraction_y, fraction_x, scale

    return plan_pixel


def planner(T: Any, SAMPLED: bool) -> Any:
    """Make `plan(c, a, q, tap, og)`, for output pixels numbered row by row."""
    plan_pixel = pixel_planner(T, SAMPLED)

    @device
    def plan(c, a, q, tap, og):
        """The same for output pixel q; and its image."""
        count = c.p.out_size[0] * c.p.out_size[1]
        n = q // count
        place, y, x, scale = plan_pixel(c, a, n, I32(q - n * count), tap, og)
        return place, y, x, scale, I32(n)

    return plan


def tile_planner(T: Any, SAMPLED: bool, SPOTS: int, PLANS: int, THREADS: int = THREADS) -> tuple[Any, ...]:
    """Make `new_stage()`, with room for SPOTS pixels and PLANS plans, `locate_tile(c, stage, first, size, rank)` and
    `plan_tile(c, a, stage, size, tap, segment, rank)`."""
    S, plan_pixel = scalar_type(T), pixel_planner(T, SAMPLED)

    @device
    def new_stage():  # the simulator identifies shared arrays by source line
        image_index = cuda.shared.array(SPOTS, I32)
        pixels = cuda.shared.array(SPOTS, I32)
        places = cuda.shared.array(PLANS, I32)
        ys = cuda.shared.array(PLANS, S)
        xs = cuda.shared.array(PLANS, S)
        scales = cuda.shared.array(PLANS, S)
        return Stage(image_index, pixels, places, ys, xs, scales)

    @device
    def locate_tile(c, stage, first, size, rank):
        """Find `size` output pixels, from `first` on; a barrier must follow."""
        for spot in range(rank, size, I32(THREADS)):
            n, pixel = located(c.p, first + spot)
            put(stage.image_index, spot, n)
            put(stage.pixels, spot, pixel)

    @device
    def plan_tile(c, a, stage, size, tap, segment, rank):
        """Plan a tap of a tile's pixels for the offset groups of a segment."""
        shared, pitch = I32(c.p.in_channels // offset_groups_of(c.p)), segment.pitch
        og, last = I32(segment.origin // shared), I32((segment.high - 1) // shared)
        for unit in range(rank, I32((last - og + 1) * pitch), I32(THREADS)):
            which = I32(unit // pitch)
            spot = I32(unit - which * pitch)
            if spot < size:
                n, pixel = at(stage.image_index, spot), at(stage.pixels, spot)
                place, fraction_y, fraction_x, scale = plan_pixel(c, a, n, pixel, tap, I32(og + which))
                put(stage.places, unit, place)
                put(stage.ys, unit, fraction_y)
                put(stage.xs, unit, fraction_x)
                put(stage.scales, unit, scale)

    return new_stage, locate_tile, plan_tile


@device
def start_of(c, stage, spot, plan):
    """The element of the images where the cell of a planned pixel starts. (Images have fewer than 2**31 pixels.)"""
    return (at(stage.image_index, spot) * I32(c.pixels) + at(stage.places, plan)) * c.pitch


@device
def fractions_of(stage, plan):
    """The fractions along y and x of a plan, and the mask."""
    return at(stage.ys, plan), at(stage.xs, plan), at(stage.scales, plan)


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
        values = room.values
        for i in range(V):
            values[i] = S(0)
        if live and channel < segment.high:
            plan = I32(plan_of(segment, channel) + spot)
            start = start_of(c, stage, spot, plan) + channel
            gather(a.images, start, c.pitch, c.pitch * (c.p.in_size[1] + 1), room.corners, V, V)
            y, x, scale = fractions_of(stage, plan)
            weigh(room.corners, y, x, scale, values, S, V, SAMPLED)
            if segment.ragged:
                for i in range(V):
                    inside = segment.low <= channel + I32(i) and channel + I32(i) < segment.high
                    values[i] = values[i] if inside else S(0)

    return new_room, sample_spot
