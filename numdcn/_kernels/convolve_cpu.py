"""The kernels of convolutions on the CPU, all but what tells a deformable one from a plain one: how a tile's columns
are made. That part comes as an argument, so that each operator's kernels hold only their own.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from numdcn._kernels.columns_cpu import (
    chunk_at,
    columns_gradient,
    multiply_chunk,
    pack_gradient,
    weights_gradient,
    write_tile,
)
from numdcn._kernels.convolution import Convolution
from numdcn._kernels.cut_cpu import BackwardCut, ForwardCut
from numdcn._kernels.gemm_cpu import ROWS
from numdcn._kernels.jit_cpu import helper, kernel
from numdcn._kernels.layout_cpu import fill
from numdcn._kernels.parameters_cpu import Place, unpack
from numdcn._kernels.sample_cpu import ROW, place_tile, tile_at
from numdcn._kernels.simd_cpu import at, full, load, load_like, load_scalar, next_task, pointer, prefetch, store, width


class ForwardArrays(NamedTuple):
    """Where everything lies."""

    x: Place
    offsets: Place
    mask: Place
    bias: Place
    y: Place
    images: int  # addresses: rimmed images,
    weights: int  # packed weights,
    slots: int  # scratch of the threads


class ForwardCall(NamedTuple):
    """Parameters of a forward's kernel."""

    p: Convolution
    cut: ForwardCut
    a: ForwardArrays


@helper
def compute_tiles(one, params, counter, slot, make_columns):  # type: ignore[no-untyped-def]
    """y, tile by tile. A task is a tile and a block of groups, or of panels of outputs.

    `make_columns` fills a chunk of a tile's columns: `columns_cpu.sample_chunk` or `copy_chunk`.
    """
    call = unpack(params, ForwardCall)
    p, cut, a, per_block = call.p, call.cut, call.a, call.cut.per_block
    base = a.slots + slot * cut.slot_bytes
    tile = tile_at(base, one)
    columns = pointer(base + cut.tile_bytes, one)
    sums = at(columns, cut.rows * cut.chunks.pitch)
    buffer = at(sums, cut.chunks.group_step * cut.rows * cut.sums_pitch)
    while True:
        task = next_task(counter)
        if task >= p.batch * cut.tiles * cut.parts:
            break
        unit, part = task // cut.parts, task % cut.parts
        n = unit // cut.tiles
        runs, pixels = place_tile(tile, cut, unit % cut.tiles, p.out_size, p.stride, p.before)
        image = at(pointer(a.images, one), n * cut.image_size)
        first_panel, block_ = 0, part
        if cut.chunks.groups == 1:
            first_panel, block_ = part * cut.panel_step, 0
        panels = min(cut.panel_step, cut.weights.panels - first_panel)
        for number in range(block_ * per_block, (block_ + 1) * per_block):
            chunk = chunk_at(cut.chunks, number)
            make_columns(one, p, a, n, tile, runs, pixels, image, chunk, cut.chunks, columns)
            multiply_chunk(one, p, cut, pointer(a.weights, one), chunk, columns, pixels, sums, first_panel, panels)
        outputs, o = cut.weights.outputs, first_panel * cut.weights.panel
        group = block_ * cut.chunks.group_step
        for g in range(group, min(group + cut.chunks.group_step, cut.chunks.groups)):
            done = at(sums, (g - group) * cut.rows * cut.sums_pitch)
            many = min(panels * cut.weights.panel, outputs - o)
            write_tile(one, a, n, g * outputs + o, many, tile, runs, pixels, done, cut.sums_pitch, buffer, p.biased)


class Parts(NamedTuple):
    """Where the partial sums of a gradient lie: strides of parts, images, channels, rows, columns."""

    address: int
    strides: tuple[int, int, int, int, int]


class BackwardArrays(NamedTuple):
    """Where everything lies. Gradients that are not wanted lie nowhere, at address 0."""

    grad_y: Place
    offsets: Place
    mask: Place
    grad_x: Place
    grad_offsets: Parts
    grad_mask: Parts
    grad_w: Place
    images: int  # addresses: rimmed images,
    grad_images: int  # their gradients,
    weights: int  # weights packed in blocks,
    sums: int  # partial sums of their gradient,
    bounds: int  # first channels of the blocks,
    firsts: int  # first and last blocks of the offset groups,
    slots: int  # scratch of the threads


class BackwardCall(NamedTuple):
    """Parameters of the kernels of a backward."""

    p: Convolution
    cut: BackwardCut
    a: BackwardArrays


@helper
def compute_gradients(one, params, counter, slot, exchange_columns):  # type: ignore[no-untyped-def]
    """The gradients, block by block. A task is a set of blocks of channels for a band of images.

    `exchange_columns` turns the gradient of a tap's columns into the columns, adding to the other gradients.
    """
    call = unpack(params, BackwardCall)
    p, cut, a = call.p, call.cut, call.a
    base = a.slots + slot * cut.slot_bytes
    tile = tile_at(base, one)
    lines = pointer(base + cut.tile_bytes, one)
    buffer = at(lines, 16 * ROW)
    packed = at(buffer, 256)
    panels = at(packed, cut.rows // ROWS * cut.packed_pitch)
    columns = at(panels, cut.panels * cut.rows * cut.panel)
    bounds, per_group = pointer(a.bounds, np.int64(0)), p.in_channels // p.groups
    wanted = (a.weights != 0 and not cut.depthwise, a.sums != 0 or cut.depthwise != 0)
    sets = (cut.blocks + cut.together - 1) // cut.together
    while True:
        task = next_task(counter)
        if task >= sets * cut.image_bands:
            break
        begin, image_band = task % sets * cut.together, task // sets
        end, channel = min(begin + cut.together, cut.blocks), load_scalar(bounds, begin)
        output, outputs = channel // per_group * cut.outputs, cut.outputs
        if cut.depthwise:
            output, outputs = channel, load_scalar(bounds, end) - channel
        if a.sums:
            sums = at(pointer(a.sums, one), (image_band * cut.blocks + begin) * cut.sums_size)
            fill(sums, 0, (end - begin) * cut.sums_size, one - one)
        for n in range(image_band * cut.band_images, min((image_band + 1) * cut.band_images, p.batch)):
            for tile_number in range(cut.tiles):
                runs, pixels = place_tile(tile, cut, tile_number, p.out_size, p.stride, p.before)
                pack_gradient(
                    one, a.grad_y, n, output, outputs, cut, wanted, tile, runs, pixels, lines, packed, panels, buffer
                )
                for number in range(begin, end):
                    first = load_scalar(bounds, number)
                    count = load_scalar(bounds, number + 1) - first
                    weights = at(pointer(a.weights, one), number * cut.weights_size)
                    sums = at(pointer(a.sums, one), (image_band * cut.blocks + number) * cut.sums_size)
                    for tap in range(p.taps):
                        if a.weights:
                            w = at(weights, tap * (cut.weights_size // p.taps))
                            columns_gradient(one, cut, w, packed, panels, pixels, count, columns)
                        exchange_columns(one, p, cut, a, n, number, first, count, tap, tile, runs, pixels, columns)
                        if a.sums:
                            total = at(sums, tap * (cut.sums_size // p.taps))
                            weights_gradient(one, cut, panels, pixels, count, columns, total)


class SumCall(NamedTuple):
    """Parameters of `sum_parts`."""

    p: Convolution
    firsts: int
    channels: int  # of an offset group
    partial: Parts
    target: Place


@helper
def sum_of_parts(first, parts, pitch, kind):  # type: ignore[no-untyped-def]
    """The sum of `parts` vectors of a kind, `pitch` apart."""
    total = load_like(first, 0, kind)
    for part in range(1, parts):
        total = total + load_like(first, part * pitch, kind)
    return total


@kernel
def sum_parts(one, params, counter, slot):  # type: ignore[no-untyped-def]
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
def finish_weights(one, params, counter, slot):  # type: ignore[no-untyped-def]
    """grad_w = the sums of the image bands. A task is a block of channels."""
    call = unpack(params, BackwardCall)
    p, cut, a = call.p, call.cut, call.a
    buffer = pointer(a.slots + slot * cut.slot_bytes, one)
    bounds, per_group, step = pointer(a.bounds, np.int64(0)), p.in_channels // p.groups, width(one)
    strides = a.grad_w.strides
    while True:
        number = next_task(counter)
        if number >= cut.blocks:
            return
        first, count = load_scalar(bounds, number), load_scalar(bounds, number + 1) - load_scalar(bounds, number)
        group = first if cut.depthwise else first // per_group
        outputs = 1 if cut.depthwise else cut.outputs
        grad_w = at(pointer(a.grad_w.address, one), group * outputs * strides[0] + first % per_group * strides[1])
        for o in range(0, outputs, step):
            for c in range(count):
                for tap in range(p.taps):
                    row = (tap * cut.block + c) * cut.sums_pitch + o
                    if cut.depthwise:
                        row = tap * cut.block + c
                    spot = tap // p.kernel[1] * strides[2] + tap % p.kernel[1] * strides[3]
                    spot += c * (strides[0] if cut.depthwise else strides[1])
                    total = full(one - one)
                    for image_band in range(cut.image_bands):
                        partial = at(pointer(a.sums, one), (image_band * cut.blocks + number) * cut.sums_size)
                        prefetch(partial, row + step)  # what the next outputs need: too far apart to be foreseen
                        total = load(partial, row) if image_band == 0 else total + load(partial, row)
                    store(buffer, 0, total)
                    for i in range(min(step, outputs - o)):
                        store(grad_w, (o + i) * strides[0] + spot, load_scalar(buffer, i))
