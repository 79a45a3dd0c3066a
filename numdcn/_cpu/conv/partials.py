"""Gradients of offsets and masks to which several blocks of channels contribute: partial sums, and their sum."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from numdcn._call.convolution import Convolution
from numdcn._cpu.jit import kernel
from numdcn._cpu.parameters import Place, unpack
from numdcn._cpu.simd import at, full, load_like, load_scalar, next_task, pointer, store, width
from numdcn._cpu.tile_io import write_plane
from numdcn._formulas.jit import helper


class Partials(NamedTuple):
    """Where the partial sums of a gradient are, one for each block of an offset group."""

    address: int
    strides: tuple[int, int, int, int, int]  # elements between partial sums, images, channels, rows, columns


@helper
def write_partial(one, partials, number, n, channel, tile, source):
    """Write a tile's data to a channel of image n of partial sum `number`."""
    strides = partials.strides
    plane = at(pointer(partials.address, one), number * strides[0] + n * strides[1] + channel * strides[2])
    write_plane(plane, strides[3:], tile, source)


class SumCall(NamedTuple):
    """Parameters of `sum_partials`."""

    p: Convolution
    block_ranges: int  # address of the first block of each offset group, and the end
    channels: int  # per offset group
    partials: Partials
    target: Place


@helper
def _sum_vectors(first, count, pitch, vector):
    """The sum of `count` vectors like `vector`, `pitch` elements apart."""
    total = load_like(first, 0, vector)
    for number in range(1, count):
        total = total + load_like(first, number * pitch, vector)
    return total


@kernel
def sum_partials(one, params, counter, slot):
    """target (n, channel, h, w) = the sum of its partial sums. A task is a plane."""
    a = unpack(params, SumCall)
    p, channels, partials, target = a.p, a.channels, a.partials, a.target
    source, blocks, step = pointer(partials.address, one), pointer(a.block_ranges, np.int64(0)), width(one)
    while True:
        task = next_task(counter)
        if task >= p.batch * channels * p.offset_groups:
            return
        n, channel = task // (channels * p.offset_groups), task % (channels * p.offset_groups)
        count = load_scalar(blocks, channel // channels * 2 + 1) - load_scalar(blocks, channel // channels * 2)
        plane = at(source, n * partials.strides[1] + channel * partials.strides[2])
        out = at(pointer(target.address, one), n * target.strides[0] + channel * target.strides[1])
        for y in range(p.out_size[0]):
            row, x = at(out, y * target.strides[2]), 0
            while target.strides[3] == 1 and x + step <= p.out_size[1]:
                store(row, x, _sum_vectors(at(plane, y * p.out_size[1] + x), count, partials.strides[0], full(one)))
                x += step
            for i in range(x, p.out_size[1]):
                total = _sum_vectors(at(plane, y * p.out_size[1] + i), count, partials.strides[0], one)
                store(row, i * target.strides[3], total)
