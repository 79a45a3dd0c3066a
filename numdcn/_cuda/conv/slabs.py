"""Slabs: the rows of output pixels whose columns are in memory at a time, in the convolutions that take two steps.

The rows of all images are numbered through. A block of threads takes a patch of DOWN x ACROSS pixels and up to COMBOS
combinations of a tap and an offset group; it plans all its samples first. Neighbouring samples read the same pixels,
from the L1 cache if they are those of one block, so a patch is as square as full sectors of offsets allow.

Columns are (groups, pixels of the slab, taps, depth): the rows of a matrix for each group. `depth` is its channels,
padded with zeros to whole vectors.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numdcn._call.convolution import Convolution
from numdcn._cuda.coordinates import coordinate, coordinate_viewer
from numdcn._cuda.jit import SIMULATED, THREADS, cuda, device, scalar_type
from numdcn._cuda.lanes import split
from numdcn._cuda.memory import at, view, widen
from numdcn._cuda.sample import cell_of

I32 = np.int32
DOWN, ACROSS = (2, 2) if SIMULATED else (4, 8)
COMBOS = 2 if SIMULATED else 8
SPOTS, PLANS = DOWN * ACROSS, DOWN * ACROSS * COMBOS
IDLE = -1  # place of a pixel outside the slab


class Slab(NamedTuple):
    """Parameters of the kernels; an address of 0 means absent."""

    p: Convolution
    images: int  # (N, pixels, pitch), see `layout`
    pitch: int
    pixels: int  # per image, including padding
    offsets: int  # see `coordinates`
    mask: int
    columns: int  # those of the slab, or their gradients, float32
    first: int  # row of output pixels
    rows: int
    depth: int
    combos: int  # per task, at most COMBOS
    tf32: int  # 1: float32 columns are rounded to tf32
    grad_images: int = 0  # (N, pixels, grad_pitch)
    grad_pitch: int = 0
    grad_offsets: int = 0
    grad_mask: int = 0
    lanes: int = 1  # threads per sample, a power of two


class Stage(NamedTuple):
    """The plans of a block, in shared memory: those of the pixels of a patch, for one combination after another."""

    places: Any  # (PLANS,) int32: the pixel of the zero-padded image where the cell starts; or IDLE
    image_index: Any  # (PLANS,) int32
    channels: Any  # (PLANS,) int32: the first of the offset group
    lines: Any  # (PLANS,) int32: pixel of the slab times taps, plus the tap
    fractions: Any  # (3, PLANS): fractions along y and x, and the mask


class Patch(NamedTuple):
    """A block's work."""

    row: Any  # of the slab
    column: Any
    combo: Any  # the first


@device
def tasks_of(c):
    """How many patches there are, times their shares of the combinations."""
    total = I32(c.p.taps * c.p.offset_groups)
    parts = (total + I32(c.combos) - I32(1)) // I32(c.combos)
    bands = (I32(c.rows) + I32(DOWN - 1)) // I32(DOWN)
    return bands * ((I32(c.p.out_size[1]) + I32(ACROSS - 1)) // I32(ACROSS)) * parts


@device
def patch_of(c, task):
    """The patch of a task."""
    total = I32(c.p.taps * c.p.offset_groups)
    parts = (total + I32(c.combos) - I32(1)) // I32(c.combos)
    strips = (I32(c.p.out_size[1]) + I32(ACROSS - 1)) // I32(ACROSS)
    place, part = split(task, parts)
    band, strip = split(place, strips)
    return Patch(band * I32(DOWN), strip * I32(ACROSS), part * I32(c.combos))


def pair_planner(T: Any) -> tuple[Any, Any]:
    """Make `new_stage()` and `plan_pairs(c, stage, patch, shared, rank)`."""
    S, coordinates = scalar_type(T), coordinate_viewer(T)

    @device
    def new_stage():
        places = cuda.shared.array(PLANS, I32)
        image_index = cuda.shared.array(PLANS, I32)
        channels = cuda.shared.array(PLANS, I32)
        lines = cuda.shared.array(PLANS, I32)
        fractions = cuda.shared.array((3, PLANS), S)
        return Stage(places, image_index, channels, lines, fractions)

    @device
    def plan_pairs(c, stage, patch, shared, rank):
        """Plan the samples of a patch; shared: channels per offset group. Coordinates are computed as in
        `columns.planner`."""
        p, offsets, mask = c.p, coordinates(c.offsets), view(c.mask, T)
        height, width, count = I32(p.in_size[0]), I32(p.in_size[1]), p.out_size[0] * p.out_size[1]
        total = I32(p.taps * p.offset_groups)
        for pair in range(rank, I32(SPOTS) * I32(c.combos), I32(THREADS)):
            spot, combo = pair % I32(SPOTS), patch.combo + pair // I32(SPOTS)
            row, j = patch.row + spot // I32(ACROSS), patch.column + spot % I32(ACROSS)
            stage.places[pair] = I32(IDLE)
            if row < c.rows and j < p.out_size[1] and combo < total:
                n, i = split(I32(c.first + row), I32(p.out_size[0]))
                tap, og = split(combo, I32(p.offset_groups))
                down, across = split(tap, I32(p.kernel[1]))
                channel = (n * p.offset_groups + og) * p.taps + tap
                pixel = i * p.out_size[1] + j
                y = S(i * p.stride[0] - p.before[0] + down * p.dilation[0])
                x = S(j * p.stride[1] - p.before[1] + across * p.dilation[1])
                y += coordinate(offsets, 2 * channel * count + pixel)
                x += coordinate(offsets, (2 * channel + 1) * count + pixel)
                place, fraction_y, fraction_x = cell_of(y, x, height, width, S)
                scale = S(1)
                if c.mask:
                    scale = S(widen(at(mask, channel * count + pixel)))
                stage.places[pair], stage.image_index[pair] = place, n
                stage.channels[pair] = og * shared
                stage.lines[pair] = I32((row * p.out_size[1] + j) * p.taps + tap)
                stage.fractions[0, pair], stage.fractions[1, pair] = fraction_y, fraction_x
                stage.fractions[2, pair] = scale

    return new_stage, plan_pairs


@device
def column_at(c, line, channel, ins):
    """Where a channel of a line of columns is; ins: channels per group."""
    p = c.p
    if p.groups == 1:
        return line * c.depth + channel
    group, within = split(channel, ins)
    return (group * (c.rows * p.out_size[1] * p.taps) + line) * c.depth + within
