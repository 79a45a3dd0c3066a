"""What the kernels of convolutions on the GPU share: their parameters, tile sizes, plans of samples, columns, products.

Output pixels are counted through all images of the batch; a tile of them goes with a tile of outputs or input channels. A
column is what one tap reads from one channel. Channels are dealt to groups and to offset groups: a segment is what two of them
have in common, and columns are made in chunks that begin at a multiple of 16 bytes, zeros where they are outside the segment.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numdcn._call.convolution import Convolution
from numdcn._cuda.jit import F64, SIMULATED, device, type_pairs
from numdcn._cuda.memory import at, load_four, narrow, put, widen
from numdcn._cuda.sample import cell_of, gather, outside
from numdcn._formulas import bilinear

I32 = np.int32
CHUNK = 8 if SIMULATED else 16  # columns, or pixels, that are multiplied at a time


class Tile(NamedTuple):
    """A block's part of a product: rows x columns, by `down` x `across` threads, each with some fours of both."""

    rows: int
    columns: int
    down: int
    across: int


def tiles(kind: object) -> tuple[Tile, ...]:
    """The tiles there are, those for few outputs first."""
    if SIMULATED:
        return (Tile(8, 8, 2, 2),)
    if kind == F64:
        return (Tile(64, 64, 16, 16),)
    return Tile(128, 64, 16, 16), Tile(128, 128, 16, 16), Tile(64, 256, 8, 32)


class Call(NamedTuple):
    """Parameters of the kernels. Addresses are 0 where there is nothing."""

    p: Convolution
    images: int
    pitch: int  # channels of the images, padded
    pixels: int  # of an image, with its padding
    offsets: int
    mask: int
    weights: int  # (groups, taps, channels, outputs); for the gradients of columns (groups, taps, outputs, channels)
    bias: int
    y: int  # in the backward: its gradient
    grad_images: int
    grad_pitch: int
    grad_offsets: int
    grad_mask: int
    values: int  # (offset groups, pixels, channels) of one tap, for `scatter`
    places: int
    corners: int
    first_tap: int  # of `taps`
    taps: int
    sums: int  # (splits, the shape of what is summed up: y or the gradient of w); not used where splits is 1
    split_k: int
    depth: int  # for tensor cores: elements of a row of packed weights (see `pack`) and of the packed gradient of y
    part_channels: int  # the same: channels of a part of a group, which share their offsets


@device
def offset_groups_of(p):
    """The number of offset groups; 1 for a convolution without offsets."""
    return max(p.offset_groups, 1)


@device
def plan(c, q, tap, og, offsets, mask, S, SAMPLED):
    """Where tap `tap` of output pixel q reads: pixel of the zero-padded image, fractions, mask, and the image."""
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
        moved_y = S(y) + widen(at(offsets, 2 * channel * count + pixel))
        moved_x = S(x) + widen(at(offsets, (2 * channel + 1) * count + pixel))
        place, fraction_y, fraction_x = cell_of(moved_y, moved_x, height, width, S)
        if c.mask:
            scale = S(widen(at(mask, channel * count + pixel)))
    elif y >= 0 and y < height and x >= 0 and x < width:
        place = I32(y + 1) * I32(width + 1) + I32(x + 1)
    return place, fraction_y, fraction_x, scale, I32(n)


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


@device
def plan_tile(
    c, first, end, tap, og, offsets, mask, places, image_index, fractions, thread, S, SAMPLED, SPOTS, THREADS
):
    """Write the plans of SPOTS output pixels from `first` on, those before `end`, to shared memory."""
    for spot in range(thread, I32(min(SPOTS, end - first)), I32(THREADS)):
        place, fraction_y, fraction_x, scale, n = plan(c, first + spot, tap, og, offsets, mask, S, SAMPLED)
        places[spot], image_index[spot] = place, n
        fractions[0, spot], fractions[1, spot], fractions[2, spot] = fraction_y, fraction_x, scale


@device
def sample_spot(
    c, images, spot, channel, low, high, live, places, image_index, fractions, corners, values, S, V, SAMPLED
):
    """values[0 : V] = the columns of V channels of a planned pixel; 0 for channels outside low to high, or all if not `live`."""
    for i in range(V):
        values[i] = S(0)
    if live and channel < high:
        start = (image_index[spot] * c.pixels + places[spot]) * c.pitch + channel
        gather(images, start, c.pitch, c.pitch * (c.p.in_size[1] + 1), corners, V, V)
        weigh(corners, fractions[0, spot], fractions[1, spot], fractions[2, spot], values, S, V, SAMPLED)
        for i in range(V):
            values[i] = values[i] if low <= channel + i and channel + i < high else S(0)


@device
def put_result(c, y, partial, bias, split, q, out, result, T):
    """Write the result of output channel `out` of pixel q, or a part of it; the bias is in the first part."""
    p = c.p
    count = p.out_size[0] * p.out_size[1]
    n = q // count
    spot = (n * p.out_channels + out) * count + q - n * count
    if c.bias and split == 0:
        result += widen(at(bias, out))
    if c.split_k > 1:
        put(partial, split * p.batch * p.out_channels * count + spot, result)
    else:
        put(y, spot, narrow(result, T))


@device
def multiply(buffer, left, right, left_pitch, right_pitch, row, column, a, b, sums, ROWS, COLUMNS, DOWN, ACROSS, DEPTH):
    """sums += left^T right, for the ROWS and COLUMNS of a thread, over DEPTH steps; left and right begin there in shared memory.
    The thread's rows are the fours that begin at 4*row, 4*row + 4*DOWN, ...; so are its columns."""
    for k in range(DEPTH):
        for i in range(0, ROWS, 4):
            load_four(buffer, left + k * left_pitch + i * DOWN + 4 * row, a, i)
        for j in range(0, COLUMNS, 4):
            load_four(buffer, right + k * right_pitch + j * ACROSS + 4 * column, b, j)
        for i in range(ROWS):
            for j in range(COLUMNS):
                sums[i, j] += a[i] * b[j]


def variants() -> list[tuple[Any, ...]]:
    """(stored, coordinates, sampled): what all kernels of convolutions are made for."""
    plain = [(kind, kind, False) for kind, other in type_pairs() if kind == other]
    return [(*pair, True) for pair in type_pairs()] + plain
