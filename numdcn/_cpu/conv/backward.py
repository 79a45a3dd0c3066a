"""The backward of convolutions on the CPU, deformable or not.

For a block of input channels, tile by tile and tap by tap: the gradient of the tap's columns is a product of grad_y and the
weights; in one sweep over the pixels it is added to the image's gradient, yields the gradients of offsets and mask, and is
replaced by the columns themselves, whose product with grad_y is the gradient of the weights.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from numdcn._call.convolution import Convolution
from numdcn._cpu.conv.blocking import BackwardBlocking
from numdcn._cpu.conv.columns import columns_gradient, pack_gradient, read_tap, weights_gradient
from numdcn._cpu.gemm import ROWS
from numdcn._cpu.jit import kernel
from numdcn._cpu.layout import fill, padded_pixels
from numdcn._cpu.parameters import Place, unpack
from numdcn._cpu.sample import copy_tap_backward, plan_tap, sample_tap, sample_tap_backward
from numdcn._cpu.simd import at, full, load, load_like, load_scalar, next_task, pointer, prefetch, store, width
from numdcn._cpu.tile import GRAD_SCALE, GRAD_X, GRAD_Y, ROW, place_tile, tile_at, write_plane
from numdcn._formulas.jit import helper


class Parts(NamedTuple):
    """Where the partial sums of a gradient lie: strides of parts, images, channels, rows, columns."""

    address: int
    strides: tuple[int, int, int, int, int]


class BackwardArrays(NamedTuple):
    """Where everything lies. Gradients that are not wanted lie nowhere, at address 0."""

    grad_y: Place
    offsets: Place
    mask: Place
    grad_offsets: Parts
    grad_mask: Parts
    grad_w: Place
    images: int  # addresses: zero-padded images,
    grad_images: int  # their gradients,
    weights: int  # weights packed in blocks,
    sums: int  # partial sums of their gradient,
    bounds: int  # first channels of the blocks,
    firsts: int  # first and last blocks of the offset groups,
    slots: int  # scratch of the threads


class BackwardCall(NamedTuple):
    """Parameters of the kernels of a backward."""

    p: Convolution
    blocking: BackwardBlocking
    a: BackwardArrays


@helper
def compute_gradients(one, params, counter, slot, exchange_columns):
    """The gradients, block by block. A task is a set of blocks of channels for a band of images.

    `exchange_columns` turns the gradient of a tap's columns into the columns, adding to the other gradients.
    """
    call = unpack(params, BackwardCall)
    p, blocking, a = call.p, call.blocking, call.a
    base = a.slots + slot * blocking.slot_bytes
    tile = tile_at(base, one)
    lines = pointer(base + blocking.tile_bytes, one)
    buffer = at(lines, 16 * ROW)
    packed = at(buffer, 256)
    panels = at(packed, blocking.rows // ROWS * blocking.packed_pitch)
    columns = at(panels, blocking.panels * blocking.rows * blocking.panel)
    bounds, per_group = pointer(a.bounds, np.int64(0)), p.in_channels // p.groups
    wanted = (a.weights != 0 and not blocking.depthwise, a.sums != 0 or blocking.depthwise != 0)
    sets = (blocking.blocks + blocking.together - 1) // blocking.together
    while True:
        task = next_task(counter)
        if task >= sets * blocking.image_bands:
            break
        begin, image_band = task % sets * blocking.together, task // sets
        end, channel = min(begin + blocking.together, blocking.blocks), load_scalar(bounds, begin)
        output, outputs = channel // per_group * blocking.outputs, blocking.outputs
        if blocking.depthwise:
            output, outputs = channel, load_scalar(bounds, end) - channel
        if a.sums:
            sums = at(pointer(a.sums, one), (image_band * blocking.blocks + begin) * blocking.sums_size)
            fill(sums, 0, (end - begin) * blocking.sums_size, one - one)
        for n in range(image_band * blocking.band_images, min((image_band + 1) * blocking.band_images, p.batch)):
            for tile_number in range(blocking.tiles):
                runs, pixels = place_tile(tile, blocking, tile_number, p.out_size, p.stride, p.before)
                pack_gradient(
                    one,
                    a.grad_y,
                    n,
                    output,
                    outputs,
                    blocking,
                    wanted,
                    tile,
                    runs,
                    pixels,
                    lines,
                    packed,
                    panels,
                    buffer,
                )
                for number in range(begin, end):
                    first = load_scalar(bounds, number)
                    count = load_scalar(bounds, number + 1) - first
                    weights = at(pointer(a.weights, one), number * blocking.weights_size)
                    sums = at(pointer(a.sums, one), (image_band * blocking.blocks + number) * blocking.sums_size)
                    for tap in range(p.taps):
                        if a.weights:
                            w = at(weights, tap * (blocking.weights_size // p.taps))
                            columns_gradient(one, blocking, w, packed, panels, pixels, count, columns)
                        exchange_columns(one, p, blocking, a, n, number, first, count, tap, tile, runs, pixels, columns)
                        if a.sums:
                            total = at(sums, tap * (blocking.sums_size // p.taps))
                            weights_gradient(one, blocking, panels, pixels, count, columns, total)


@helper
def sample_block(one, p, blocking, a, n, number, first, count, tap, tile, runs, pixels, columns):
    """Turn the gradient of a tap's columns, for the channels of a block, into the columns; add to the other gradients."""
    shift = (tap // p.kernel[1] * p.dilation[0], tap % p.kernel[1] * p.dilation[1])
    per_offset_group, below = p.in_channels // p.offset_groups, (p.in_size[1] + 1) * count
    start = n * blocking.image_size + first * padded_pixels(p.in_size)
    image, grad_image = at(pointer(a.images, one), start), at(pointer(a.grad_images, one), start)
    firsts = pointer(a.firsts, np.int64(0))
    for g in range(first // per_offset_group, (first + count - 1) // per_offset_group + 1):
        channel, part = g * p.taps + tap, number - load_scalar(firsts, 2 * g)
        read_tap(one, p, a.offsets, a.mask, n, channel, tile, runs)
        plan_tap(tile, pixels, shift, p.in_size, count)
        c = max(first, g * per_offset_group) - first
        c_end = min(first + count, (g + 1) * per_offset_group) - first
        target = at(columns, c)
        if not a.weights:
            sample_tap(at(image, c), tile, pixels, c_end - c, count, below, target, blocking.block)
            continue
        sample_tap_backward(
            at(image, c), at(grad_image, c), a.grad_images != 0, tile, pixels, c_end - c, count, below, target, blocking.block,
        )  # fmt: skip
        if a.grad_offsets.address:
            strides = a.grad_offsets.strides
            plane = at(
                pointer(a.grad_offsets.address, one), part * strides[0] + n * strides[1] + 2 * channel * strides[2]
            )
            write_plane(plane, strides[3:], tile, runs, at(tile.rows, GRAD_Y))
            write_plane(at(plane, strides[2]), strides[3:], tile, runs, at(tile.rows, GRAD_X))
        if a.grad_mask.address:
            strides = a.grad_mask.strides
            plane = at(pointer(a.grad_mask.address, one), part * strides[0] + n * strides[1] + channel * strides[2])
            write_plane(plane, strides[3:], tile, runs, at(tile.rows, GRAD_SCALE))


@helper
def copy_block(one, p, blocking, a, n, number, first, count, tap, tile, runs, pixels, columns):
    """Turn the gradient of a tap's columns, for the channels of a block, into the columns; add it to the image's."""
    shift = (tap // p.kernel[1] * p.dilation[0], tap % p.kernel[1] * p.dilation[1])
    start = n * blocking.image_size + first * padded_pixels(p.in_size)
    image, grad_image = at(pointer(a.images, one), start), at(pointer(a.grad_images, one), start)
    plan_tap(tile, pixels, shift, p.in_size, count)
    copy_tap_backward(image, grad_image, a.grad_images != 0, tile, pixels, count, columns, blocking.block)


@kernel
def backward_sampled(one, params, counter, slot):
    """The gradients, block of channels by block of channels, where columns are sampled."""
    compute_gradients(one, params, counter, slot, sample_block)


@kernel
def backward_copied(one, params, counter, slot):
    """The gradients, block of channels by block of channels, where columns are copied."""
    compute_gradients(one, params, counter, slot, copy_block)


class SumCall(NamedTuple):
    """Parameters of `sum_parts`."""

    p: Convolution
    firsts: int
    channels: int  # of an offset group
    partial: Parts
    target: Place


@helper
def sum_of_parts(first, parts, pitch, kind):
    """The sum of `parts` vectors of a kind, `pitch` apart."""
    total = load_like(first, 0, kind)
    for part in range(1, parts):
        total = total + load_like(first, part * pitch, kind)
    return total


@kernel
def sum_parts(one, params, counter, slot):
    """target (n, channel, h, w) = the sum of its parts. A task is a plane."""
    a = unpack(params, SumCall)
    p, channels, partial, target = a.p, a.channels, a.partial, a.target
    source, blocks, step = pointer(partial.address, one), pointer(a.firsts, np.int64(0)), width(one)
    while True:
        task = next_task(counter)
        if task >= p.batch * channels * p.offset_groups:
            return
        n, channel = task // (channels * p.offset_groups), task % (channels * p.offset_groups)
        parts = load_scalar(blocks, channel // channels * 2 + 1) - load_scalar(blocks, channel // channels * 2)
        plane = at(source, n * partial.strides[1] + channel * partial.strides[2])
        out = at(pointer(target.address, one), n * target.strides[0] + channel * target.strides[1])
        for y in range(p.out_size[0]):
            row, x = at(out, y * target.strides[2]), 0
            while target.strides[3] == 1 and x + step <= p.out_size[1]:
                store(row, x, sum_of_parts(at(plane, y * p.out_size[1] + x), parts, partial.strides[0], full(one)))
                x += step
            for i in range(x, p.out_size[1]):
                total = sum_of_parts(at(plane, y * p.out_size[1] + i), parts, partial.strides[0], one)
                store(row, i * target.strides[3], total)


@kernel
def finish_weights(one, params, counter, slot):
    """grad_w = the sums of the image bands. A task is a block of channels."""
    call = unpack(params, BackwardCall)
    p, blocking, a = call.p, call.blocking, call.a
    buffer = pointer(a.slots + slot * blocking.slot_bytes, one)
    bounds, per_group, step = pointer(a.bounds, np.int64(0)), p.in_channels // p.groups, width(one)
    strides = a.grad_w.strides
    while True:
        number = next_task(counter)
        if number >= blocking.blocks:
            return
        first, count = load_scalar(bounds, number), load_scalar(bounds, number + 1) - load_scalar(bounds, number)
        group = first if blocking.depthwise else first // per_group
        outputs = 1 if blocking.depthwise else blocking.outputs
        grad_w = at(pointer(a.grad_w.address, one), group * outputs * strides[0] + first % per_group * strides[1])
        for o in range(0, outputs, step):
            for c in range(count):
                for tap in range(p.taps):
                    row = (tap * blocking.block + c) * blocking.sums_pitch + o
                    if blocking.depthwise:
                        row = tap * blocking.block + c
                    spot = tap // p.kernel[1] * strides[2] + tap % p.kernel[1] * strides[3]
                    spot += c * (strides[0] if blocking.depthwise else strides[1])
                    total = full(one - one)
                    for image_band in range(blocking.image_bands):
                        partial = at(pointer(a.sums, one), (image_band * blocking.blocks + number) * blocking.sums_size)
                        prefetch(partial, row + step)  # what the next outputs need: too far apart to be foreseen
                        total = load(partial, row) if image_band == 0 else total + load(partial, row)
                    store(buffer, 0, total)
                    for i in range(min(step, outputs - o)):
                        store(grad_w, (o + i) * strides[0] + spot, load_scalar(buffer, i))
