"""Deformable convolution on NumPy arrays: forward.

Stages: x is copied to channels-last with a rim of zeros; then, tile by tile of output pixels and chunk by chunk of
columns, plan (cells and weights), sample, multiply by the packed weights; the sums are turned into y.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from numdcn._host.arrays import Place, place
from numdcn._host.scratch import scratch
from numdcn._host.threads import plan_threads, run
from numdcn._host.weights import PreparedWeights
from numdcn._kernels.gemm_cpu import multiply_rows
from numdcn._kernels.jit_cpu import block, helper, kernel
from numdcn._kernels.layout_cpu import BLOCK, clear_rim, to_channels_last
from numdcn._kernels.sample_cpu import (
    PADDING,
    place_tile,
    plan_tap,
    read_plane,
    sample_tap,
    tile_at,
)
from numdcn._kernels.simd_cpu import at, fma, full, load, load_scalar, next_task, pointer, store, transpose, width
from numdcn._kernels.weights_cpu import pack
from numdcn.deform_conv.cut import forward_cut
from numdcn.deform_conv.problem import Problem


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


@kernel
def pack_images(one, p, image_size, x, images, slots, slot_bytes, counter, slot):  # type: ignore[no-untyped-def]
    """Copy x to rimmed channels-last images. A task is a block of pixels of an image."""
    buffer = pointer(slots + slot * slot_bytes, one)
    pixels = p.in_size[0] * p.in_size[1]
    blocks = (pixels + BLOCK - 1) // BLOCK
    while True:
        task = next_task(counter)
        if task >= p.batch * blocks:
            return
        n, first = task // blocks, task % blocks * BLOCK
        last = min(first + BLOCK, pixels)
        image = at(pointer(images, one), n * image_size)
        clear_rim(image, first, last, p.in_size, p.in_channels, one - one)
        source = at(pointer(x.address, one), n * x.strides[0])
        to_channels_last(source, x.strides[1:], first, last, p.in_size, p.in_channels, image, buffer)


@helper
def sample_chunk(one, p, a, n, tile, runs, pixels, image, chunk, chunks, columns):  # type: ignore[no-untyped-def]
    """Sample one chunk of a tile's columns."""
    group, group_end, tap_first, tap_end, channel_first, channel_end = chunk
    depth = channel_end - channel_first
    first = group * chunks.channels + channel_first
    end = (group_end - 1) * chunks.channels + channel_end
    per_offset_group = p.in_channels // p.offset_groups
    below = (p.in_size[1] + 1) * p.in_channels
    for tap in range(tap_first, tap_end):
        shift = (tap // p.kernel[1] * p.dilation[0], tap % p.kernel[1] * p.dilation[1])
        for g in range(first // per_offset_group, (end - 1) // per_offset_group + 1):
            read_tap(one, p, a, n, g * p.taps + tap, tile, runs)
            plan_tap(tile, pixels, shift, p.in_size, p.in_channels)
            c, c_end = max(first, g * per_offset_group), min(end, (g + 1) * per_offset_group)
            while c < c_end:  # stretches of one convolution group
                c_group = c // chunks.channels
                stop = min(c_end, (c_group + 1) * chunks.channels)
                k = ((c_group - group) * (tap_end - tap_first) + tap - tap_first) * depth
                k += c - c_group * chunks.channels - channel_first
                sample_tap(at(image, c), tile, pixels, stop - c, p.in_channels, below, at(columns, k), chunks.pitch)
                c = stop


@block
def read_tap(one, p, a, n, channel, tile, runs):  # type: ignore[no-untyped-def]
    """Read the offsets, and the mask if there is one, of a tap of an offset group, for the pixels of a tile."""
    strides = a.offsets.strides
    plane = at(pointer(a.offsets.address, one), n * strides[0] + 2 * channel * strides[1])
    read_plane(plane, strides[2:], 2 * strides[1], tile, runs, tile.offset_y)
    read_plane(at(plane, strides[1]), strides[2:], 2 * strides[1], tile, runs, tile.offset_x)
    if p.masked:
        strides = a.mask.strides
        plane = at(pointer(a.mask.address, one), n * strides[0] + channel * strides[1])
        read_plane(plane, strides[2:], strides[1], tile, runs, tile.scale)


@block
def multiply_depthwise(columns, pixels, pitch, weights, taps, depth, weights_pitch, sums, sums_pitch, first):  # type: ignore[no-untyped-def]
    """sums[p, c] = or += sum over the taps of columns[p, tap * depth + c] * weights[tap, c]."""
    step = width(load_scalar(sums, 0))
    for p in range(pixels):
        row, total = at(columns, p * pitch), at(sums, p * sums_pitch)
        for c in range(0, depth // step * step, step):
            value = load(row, c) * load(weights, c) if first else fma(load(row, c), load(weights, c), load(total, c))
            for tap in range(1, taps):
                value = fma(load(row, tap * depth + c), load(weights, tap * weights_pitch + c), value)
            store(total, c, value)
        for c in range(depth // step * step, depth):
            x, w = load_scalar(row, c), load_scalar(weights, c)
            scalar = x * w if first else fma(x, w, load_scalar(total, c))
            for tap in range(1, taps):
                scalar = fma(load_scalar(row, tap * depth + c), load_scalar(weights, tap * weights_pitch + c), scalar)
            store(total, c, scalar)


@block
def write_tile(one, a, n, first, count, tile, runs, pixels, sums, pitch, buffer, biased):  # type: ignore[no-untyped-def]
    """y[n, first : first + count] at the pixels of a tile = bias + sums, which hold a row a pixel; buffer: see `cut`."""
    step, strides = width(one), a.y.strides
    line_pitch = (pixels + step - 1) // step * step
    lines = at(buffer, step * step)
    for o in range(0, count, step):
        for p in range(0, pixels, step):
            transpose(at(sums, p * pitch + o), pitch, buffer)
            for i in range(step):
                store(lines, i * line_pitch + p, load(buffer, i * step))
        for i in range(min(step, count - o)):
            channel = first + o + i
            bias = load_scalar(pointer(a.bias.address, one), channel * a.bias.strides[0]) if biased else one - one
            line = at(lines, i * line_pitch)
            for p in range(0, line_pitch if biased else 0, step):
                store(line, p, load(line, p) + full(bias))
            plane = at(pointer(a.y.address, one), n * strides[0] + channel * strides[1])
            write_plane(plane, strides[2:], tile, runs, line)


@block
def write_plane(plane, strides, tile, runs, source):  # type: ignore[no-untyped-def]
    """Copy source, in the order of a tile, to the tile's pixels of an (out_h, out_w) plane."""
    step = width(load_scalar(source, 0))
    for run_ in range(runs):
        first, y = load_scalar(tile.runs, 4 * run_), load_scalar(tile.runs, 4 * run_ + 1)
        x, count = load_scalar(tile.runs, 4 * run_ + 2), load_scalar(tile.runs, 4 * run_ + 3)
        target, done = at(plane, y * strides[0] + x * strides[1]), 0
        if strides[1] == 1:
            while done + step <= count:
                store(target, done, load(source, first + done))
                done += step
        for i in range(done, count):
            store(target, i * strides[1], load_scalar(source, first + i))


@helper
def chunk_at(chunks, number):  # type: ignore[no-untyped-def]
    """Chunk `number` of all blocks: its ranges of groups, taps and channels."""
    parts = (chunks.channels + chunks.channel_step - 1) // chunks.channel_step
    tap_parts = (chunks.taps + chunks.tap_step - 1) // chunks.tap_step
    channel, tap = number % parts * chunks.channel_step, number // parts % tap_parts * chunks.tap_step
    group = number // (parts * tap_parts) * chunks.group_step
    return (
        group, min(group + chunks.group_step, chunks.groups),
        tap, min(tap + chunks.tap_step, chunks.taps),
        channel, min(channel + chunks.channel_step, chunks.channels),
    )  # fmt: skip


@helper
def multiply_chunk(one, p, cut, weights, chunk, columns, pixels, sums, panel, panels):  # type: ignore[no-untyped-def]
    """Multiply a chunk of columns by its weights, for `panels` panels of outputs from `panel` on."""
    group, group_end, tap, tap_end, channel, channel_end = chunk
    chunks, packed = cut.chunks, cut.weights
    depth = (tap_end - tap) * (channel_end - channel)
    if cut.depthwise:
        w = at(weights, tap * p.in_channels + channel)
        multiply_depthwise(
            columns, pixels, chunks.pitch, w, tap_end - tap, channel_end - channel, p.in_channels,
            at(sums, channel), cut.sums_pitch, tap == 0,
        )  # fmt: skip
        return
    panel_size = chunks.taps * chunks.channels * packed.panel
    for g in range(group, group_end):
        w = at(weights, (g * packed.panels + panel) * panel_size)
        w = at(w, (tap * chunks.channels + channel) * packed.panel)
        multiply_rows(
            at(columns, (g - group) * depth), pixels, chunks.pitch, w, depth, packed.panel, panels, panel_size,
            depth * packed.panel, at(sums, (g - group) * cut.rows * cut.sums_pitch), cut.sums_pitch,
            (tap == 0) & (channel == 0),
        )  # fmt: skip


@kernel
def forward_tiles(one, p, cut, per_block, a, counter, slot):  # type: ignore[no-untyped-def]
    """y, tile by tile. A task is a tile and a block of groups, or of panels of outputs."""
    base = a.slots + slot * cut.slot_bytes
    tile = tile_at(base, cut.tile_pixels, one)
    columns = pointer(base + cut.tile_bytes, one)
    sums = at(columns, cut.rows * cut.chunks.pitch)
    buffer = at(sums, cut.chunks.group_step * cut.rows * cut.sums_pitch)
    for i in range(cut.tile_pixels + PADDING):
        store(tile.scale, i, one)
    while True:
        task = next_task(counter)
        if task >= p.batch * cut.tiles * cut.parts:
            return
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
            sample_chunk(one, p, a, n, tile, runs, pixels, image, chunk, cut.chunks, columns)
            multiply_chunk(one, p, cut, pointer(a.weights, one), chunk, columns, pixels, sums, first_panel, panels)
        outputs, o = cut.weights.outputs, first_panel * cut.weights.panel
        group = block_ * cut.chunks.group_step
        for g in range(group, min(group + cut.chunks.group_step, cut.chunks.groups)):
            done = at(sums, (g - group) * cut.rows * cut.sums_pitch)
            many = min(panels * cut.weights.panel, outputs - o)
            write_tile(one, a, n, g * outputs + o, many, tile, runs, pixels, done, cut.sums_pitch, buffer, p.biased)


def forward(p: Problem, arrays: dict[str, Any], y: np.ndarray) -> None:
    """Fill y. All arrays are addressable and checked."""
    if p.batch == 0:
        return
    x, w = arrays["x"], arrays["w"]
    dtype = x.dtype
    one, cut = dtype.type(1), forward_cut(p, dtype)
    tasks, blocks = p.batch * cut.tiles * cut.parts, p.batch * -(-p.in_size[0] * p.in_size[1] // BLOCK)
    threads = plan_threads(tasks, float(p.batch) * p.out_size[0] * p.out_size[1] * cut.weights.size)
    prepared = isinstance(w, PreparedWeights)
    weights_bytes = 0 if prepared else cut.weights.size * dtype.itemsize
    with scratch(p.batch * cut.image_size * dtype.itemsize, weights_bytes, threads * cut.slot_bytes) as memory:
        images, weights, slots = memory
        x_place = place(x)
        run(
            lambda counter, slot: pack_images(one, p, cut.image_size, x_place, images, slots, cut.slot_bytes, counter, slot),
            min(threads, blocks),
        )
        if prepared:
            weights = w.packed
        else:
            panels = cut.weights.groups * cut.weights.panels
            run(lambda counter, slot: pack(w, cut.weights, weights, counter), min(threads, panels))
        a = ForwardArrays(
            x_place, place(arrays["offsets"]), place(arrays["mask"]), place(arrays["bias"], 1), place(y), images, weights, slots
        )
        per_block = cut.chunks.per_block
        run(lambda counter, slot: forward_tiles(one, p, cut, per_block, a, counter, slot), threads)
