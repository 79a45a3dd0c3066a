"""Convolution on the CPU, deformable or not: a tile's columns, made and multiplied, in the forward and the backward."""

from __future__ import annotations

from numdcn._cpu.gemm import ROWS, multiply_block, multiply_packed, multiply_rows
from numdcn._cpu.jit import block
from numdcn._cpu.lanes import transpose
from numdcn._cpu.sample import copy_tap, plan_tap, sample_tap
from numdcn._cpu.simd import at, full, load, load_scalar, pointer, store, width
from numdcn._cpu.tile import OFFSET_X, OFFSET_Y, SCALE, read_plane, write_plane
from numdcn._formulas.jit import helper
from numdcn._formulas.vectors import fma


@helper
def copy_chunk(one, p, a, n, tile, runs, pixels, image, chunk, chunks, columns):
    """Copy one chunk of a tile's columns: taps that stay where they are. The tile's offsets are 0."""
    group, group_end, tap_first, tap_end, channel_first, channel_end = chunk
    depth = channel_end - channel_first
    for tap in range(tap_first, tap_end):
        shift = (tap // p.kernel[1] * p.dilation[0], tap % p.kernel[1] * p.dilation[1])
        plan_tap(tile, pixels, shift, p.in_size, p.in_channels)
        for g in range(group, group_end):
            source = at(image, g * chunks.channels + channel_first)
            k = ((g - group) * (tap_end - tap_first) + tap - tap_first) * depth
            copy_tap(source, tile, pixels, depth, at(columns, k), chunks.pitch)


@helper
def sample_chunk(one, p, a, n, tile, runs, pixels, image, chunk, chunks, columns):
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
            read_tap(one, p, a.offsets, a.mask, n, g * p.taps + tap, tile, runs)
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
def read_tap(one, p, offsets, mask, n, channel, tile, runs):
    """Read the offsets, and the mask if there is one, of a tap of an offset group, for the pixels of a tile."""
    strides = offsets.strides
    plane = at(pointer(offsets.address, one), n * strides[0] + 2 * channel * strides[1])
    read_plane(plane, strides[2:], 2 * strides[1], tile, runs, at(tile.rows, OFFSET_Y))
    read_plane(at(plane, strides[1]), strides[2:], 2 * strides[1], tile, runs, at(tile.rows, OFFSET_X))
    if p.masked:
        strides = mask.strides
        plane = at(pointer(mask.address, one), n * strides[0] + channel * strides[1])
        read_plane(plane, strides[2:], strides[1], tile, runs, at(tile.rows, SCALE))


@block
def multiply_depthwise(columns, pixels, pitch, weights, taps, depth, weights_pitch, sums, sums_pitch, first):
    """sums[p, c] = or += sum over the taps of columns[p, tap * depth + c] * weights[tap, c].

    The last vectors may run over `depth`: into the sums of channels that come later, or are none.
    """
    step = width(load_scalar(sums, 0))
    for p in range(pixels):
        row, total = at(columns, p * pitch), at(sums, p * sums_pitch)
        for c in range(0, depth, step):
            value = load(row, c) * load(weights, c) if first else fma(load(row, c), load(weights, c), load(total, c))
            for tap in range(1, taps):
                value = fma(load(row, tap * depth + c), load(weights, tap * weights_pitch + c), value)
            store(total, c, value)


@block
def write_tile(one, a, n, first, count, tile, runs, pixels, sums, pitch, buffer, biased):
    """y[n, first : first + count] at the pixels of a tile = bias + sums, which hold a row a pixel; buffer: see `blocking`."""
    step, strides = width(one), a.y.strides
    line_pitch = (pixels + step - 1) // step * step
    lines = at(buffer, step * step)
    for o in range(0, count, step):
        for p in range(0, pixels, step):
            transpose(at(sums, p * pitch + o), pitch, at(lines, p), line_pitch)
        for i in range(min(step, count - o)):
            channel = first + o + i
            bias = load_scalar(pointer(a.bias.address, one), channel * a.bias.strides[0]) if biased else one - one
            line = at(lines, i * line_pitch)
            for p in range(0, line_pitch if biased else 0, step):
                store(line, p, load(line, p) + full(bias))
            plane = at(pointer(a.y.address, one), n * strides[0] + channel * strides[1])
            write_plane(plane, strides[2:], tile, runs, line)


@helper
def chunk_at(chunks, number):
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
def multiply_chunk(one, p, blocking, weights, chunk, columns, pixels, sums, panel, panels):
    """Multiply a chunk of columns by its weights, for `panels` panels of outputs from `panel` on."""
    group, group_end, tap, tap_end, channel, channel_end = chunk
    chunks, packed = blocking.chunks, blocking.weights
    depth = (tap_end - tap) * (channel_end - channel)
    if blocking.depthwise:
        w = at(weights, tap * p.in_channels + channel)
        multiply_depthwise(
            columns, pixels, chunks.pitch, w, tap_end - tap, channel_end - channel, p.in_channels,
            at(sums, channel), blocking.sums_pitch, tap == 0,
        )  # fmt: skip
        return
    panel_size = chunks.taps * chunks.channels * packed.panel
    for g in range(group, group_end):
        w = at(weights, (g * packed.panels + panel) * panel_size)
        w = at(w, (tap * chunks.channels + channel) * packed.panel)
        multiply_rows(
            at(columns, (g - group) * depth), pixels, chunks.pitch, w, depth, packed.panel, panels, panel_size,
            depth * packed.panel, at(sums, (g - group) * blocking.rows * blocking.sums_pitch), blocking.sums_pitch,
            (tap == 0) & (channel == 0),
        )  # fmt: skip


@block
def pack_gradient(one, grad_y, n, first, outputs, blocking, wanted, tile, runs, pixels, lines, packed, panels, buffer):
    """Pack grad_y, `outputs` outputs from `first` on, at the pixels of a tile: as A of the columns' gradient (`packed`), and as B
    of the weights' gradient (`panels`; a row of `block` a pixel in a depthwise convolution); each if `wanted`."""
    step, pitch = width(one), (pixels + 15) // 16 * 16
    strides = grad_y.strides
    for o_first in range(0, outputs, step):
        count = min(step, outputs - o_first)
        for i in range(count):
            plane = at(pointer(grad_y.address, one), n * strides[0] + (first + o_first + i) * strides[1])
            read_plane(plane, strides[2:], strides[1], tile, runs, at(lines, i * pitch))
            for r in range(
                0, pixels if wanted[0] else 0, ROWS
            ):  # a vector may spill into the next output's place, which is filled later
                target = at(packed, r // ROWS * blocking.packed_pitch + (o_first + i) * ROWS)
                for p in range(0, ROWS, step):
                    store(target, p, load(lines, i * pitch + r + p))
        j, o = o_first // blocking.panel, o_first % blocking.panel
        for p in range(0, pixels if wanted[1] else 0, step):
            target = at(panels, (j * blocking.rows + p) * blocking.panel + o)
            if blocking.panel >= step:  # rows beyond the pixels are there, and never read
                transpose(at(lines, p), pitch, target, blocking.panel)
                continue
            transpose(at(lines, p), pitch, buffer, step)
            for i in range(min(step, pixels - p)):
                for k in range(count):
                    store(target, i * blocking.panel + k, load_scalar(buffer, i * step + k))


@helper
def columns_gradient(one, blocking, weights, packed, panels, pixels, count, columns):
    """columns[p, c] = the gradient of a tap's columns: grad_y times the weights."""
    if blocking.depthwise:
        for p in range(pixels):
            for c in range(0, count, width(one)):
                store(columns, p * blocking.block + c, load(panels, p * blocking.block + c) * load(weights, c))
    else:
        multiply_packed(
            packed, pixels, blocking.packed_pitch, blocking.outputs, weights, blocking.block, count, columns
        )


@helper
def weights_gradient(one, blocking, panels, pixels, count, columns, sums):
    """sums (channels, outputs) += the weights' gradient of a tap: the columns times grad_y."""
    if blocking.depthwise:
        for c in range(0, count, width(one)):
            total = full(one - one)
            for p in range(pixels):
                total = fma(load(columns, p * blocking.block + c), load(panels, p * blocking.block + c), total)
            store(sums, c, load(sums, c) + total)
    else:
        multiply_block(
            columns,
            count,
            pixels,
            panels,
            blocking.panel,
            blocking.panels,
            blocking.rows * blocking.panel,
            sums,
            blocking.sums_pitch,
        )
