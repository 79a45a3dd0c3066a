"""The backward of convolutions on the CPU, deformable or not.

Given grad_y, zero-padded images and packed weights, it computes the gradients for a block of input channels, tile by
tile and tap by tap. The gradient of the tap's columns is a product of grad_y and the weights. One sweep over the pixels
adds it to the image's gradient, accumulates the gradients of offsets and mask, and replaces it with the columns
themselves, whose product with grad_y is the gradient of the weights. `conv.partials` adds up partial sums left by
tasks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from numdcn._call.convolution import Convolution
from numdcn._cpu.conv.backward_blocking import BackwardBlocking
from numdcn._cpu.conv.columns import read_tap, tap_shift
from numdcn._cpu.conv.partials import Partials, write_partial
from numdcn._cpu.conv.windows import is_whole, region_at, regions_of, window_of
from numdcn._cpu.gemm import Panels, multiply_block, multiply_panels
from numdcn._cpu.jit import block, kernel
from numdcn._cpu.lanes import transpose
from numdcn._cpu.layout import GradientSink, Image, Matrix, columns_from, fill, image_from, padded_pixels, sink_from
from numdcn._cpu.parameters import Place, unpack
from numdcn._cpu.sample import copy_tap_backward, plan_tap, plan_tap_in, sample_tap, sample_tap_backward
from numdcn._cpu.simd import at, full, load, load_scalar, next_task, pointer, store, width
from numdcn._cpu.tile import GRAD_MASK, GRAD_X, GRAD_Y, new_tile, place_tile_in, tiles_in
from numdcn._cpu.tile_io import PACKING_ELEMENTS, PackedGradient, pack_gradient
from numdcn._formulas.jit import helper
from numdcn._formulas.vectors import fma, like


class BackwardArrays(NamedTuple):
    """Places and addresses of all arrays. Gradients that are not requested have address 0."""

    grad_y: Place
    offsets: Place
    mask: Place
    grad_offsets: Partials
    grad_mask: Partials
    grad_w: Place
    packed: int  # of grad_y, packed tile by tile by `pack_tiles`; 0: tasks pack it for themselves
    images: int  # addresses of the zero-padded images
    windows: int  # of the windows of their gradients; 0: not wanted
    placed: int  # of what `place_windows` writes
    flags: int  # of an int64 for each tap of each tile of a block of an image: whether it has strays
    strays: int  # of an int64: whether there are any
    weights: int  # of weights packed in blocks; 0: the gradient of the columns is not wanted
    sums: int  # of the partial sums of the weights' gradient
    bounds: int  # of the first channel of each block
    block_ranges: int  # of the first block of each offset group, and the end
    workspaces: int  # of the threads' workspaces


class BackwardCall(NamedTuple):
    """Parameters of the backward's kernels."""

    p: Convolution
    blocking: BackwardBlocking
    first: int  # image
    end: int
    a: BackwardArrays


class ChannelBlock(NamedTuple):
    """A block of input channels."""

    number: int
    first: int  # channel
    count: int  # channels


@helper
def block_at(bounds, number):
    """The block of channels with this number."""
    first = load_scalar(bounds, number)
    return ChannelBlock(number, first, load_scalar(bounds, number + 1) - first)


@helper
def bands_of(blocking):
    """The number of partial sums of a block's weights: one for each region of each band of images."""
    return blocking.image_bands * regions_of(blocking.cut)


@helper
def place_operands(one, call, slot):
    """In a thread's workspace: a tile without pixels, the buffer of `pack_gradient`, room for packed grad_y, and columns."""
    blocking, a = call.blocking, call.a
    base = a.workspaces + slot * blocking.workspace_bytes
    buffer = pointer(base + blocking.tile_bytes, one)
    columns = Matrix(at(buffer, PACKING_ELEMENTS), blocking.block)
    grad_y = packed_at(call, at(columns.pointer, (blocking.rows + 1) * blocking.block))
    return new_tile(base, one), buffer, grad_y, columns


@helper
def packed_at(call, target):
    """A tile of packed grad_y at `target`."""
    return PackedGradient(target, call.blocking.packed_pitch, call.blocking.rows)


@helper
def packed_tile(one, call, n, output, region, tile_number):
    """A tile of grad_y for a group's outputs, which begin with `output`, as `pack_tiles` leaves it."""
    p, blocking, a = call.p, call.blocking, call.a
    tile = ((n - call.first) * p.groups + output // blocking.outputs) * regions_of(blocking.cut) + region
    tile = tile * blocking.tiling.tiles + tile_number
    return packed_at(call, at(pointer(a.packed, one), tile * blocking.packed_size))


@kernel
def pack_tiles(one, params, counter, slot):
    """Pack grad_y, tile by tile. A task is a tile of the outputs of a group."""
    call = unpack(params, BackwardCall)
    p, blocking, a = call.p, call.blocking, call.a
    unplaced, buffer, _, _ = place_operands(one, call, slot)
    tiles, regions = blocking.tiling.tiles, regions_of(blocking.cut)
    while True:
        task = next_task(counter)
        if task >= (call.end - call.first) * p.groups * regions * tiles:
            return
        tile_number, region, group = task % tiles, task // tiles % regions, task // tiles // regions % p.groups
        n, area = call.first + task // tiles // regions // p.groups, region_at(blocking.cut, p.out_size, region)
        if tile_number >= tiles_in(blocking.tiling, area):
            continue
        tile = place_tile_in(unplaced, blocking.tiling, tile_number, area, p.stride, p.before)
        output = group * blocking.outputs
        target = packed_tile(one, call, n, output, region, tile_number)
        pack_gradient(one, a.grad_y, n, output, blocking.outputs, tile, target, buffer)


@helper
def outputs_of(call, channels):
    """The first output that a block of channels contributes to, and the number of outputs."""
    if call.blocking.depthwise:
        return channels.first, channels.count
    return channels.first // (call.p.in_channels // call.p.groups) * call.blocking.outputs, call.blocking.outputs


@helper
def flag_at(call, n, number, region, tile_number, tap):
    """Which of `flags` tells whether a tap of a tile of a block of channels has strays."""
    blocking = call.blocking
    tile = ((n - call.first) * blocking.blocks + number) * regions_of(blocking.cut) + region
    return (tile * blocking.tiling.tiles + tile_number) * call.p.taps + tap


@helper
def compute_gradients(one, params, counter, slot, exchange_columns):
    """The gradients. A task is a block of channels, a group of taps, and a region of each image of a band.

    `exchange_columns` replaces the gradient of a tap's columns with the columns, adding to the other gradients.
    """
    call = unpack(params, BackwardCall)
    p, blocking, a, cut = call.p, call.blocking, call.a, call.blocking.cut
    unplaced, buffer, own_grad_y, columns = place_operands(one, call, slot)
    bounds, placed, regions = pointer(a.bounds, np.int64(0)), pointer(a.placed, np.int64(0)), regions_of(cut)
    flags, any_strays = pointer(a.flags, np.int64(0)), pointer(a.strays, np.int64(0))
    parts = cut.tap_groups * regions
    while True:
        task = next_task(counter)
        if task >= blocking.blocks * parts * blocking.image_bands:
            break
        channels, tap_group = block_at(bounds, task % blocking.blocks), task // blocking.blocks % cut.tap_groups
        first_region, band = task // blocking.blocks // cut.tap_groups % regions, task // blocking.blocks // parts
        taps = (tap_group * p.taps // cut.tap_groups, (tap_group + 1) * p.taps // cut.tap_groups)
        output, outputs = outputs_of(call, channels)
        weights = at(pointer(a.weights, one), channels.number * blocking.weights_size)
        part_sums = (band * regions + first_region) * blocking.blocks + channels.number
        sums = at(pointer(a.sums, one), part_sums * blocking.sums_size)
        if a.sums and call.first == 0:
            _clear_sums(sums, blocking, p.taps, taps)
        first_image = call.first + band * blocking.band_images
        for n in range(first_image, min(first_image + blocking.band_images, call.end)):
            end_region = first_region + 1
            if is_whole(cut, placed, n):
                end_region = regions if first_region == 0 else first_region
            window = window_of(cut, placed, n, first_region, p.in_size)
            sink = sink_of(one, call, n, tap_group, window, channels)
            if a.windows and first_region < end_region:
                fill(sink.grad, 0, window.pixels * channels.count, one - one)
            for region in range(first_region, end_region):
                area = region_at(cut, p.out_size, region)
                for tile_number in range(tiles_in(blocking.tiling, area)):
                    tile = place_tile_in(unplaced, blocking.tiling, tile_number, area, p.stride, p.before)
                    grad_y = own_grad_y
                    if a.packed:
                        grad_y = packed_tile(one, call, n, output, region, tile_number)
                    else:
                        pack_gradient(one, a.grad_y, n, output, outputs, tile, grad_y, buffer)
                    for tap in range(taps[0], taps[1]):
                        if a.weights:
                            w = at(weights, tap * (blocking.weights_size // p.taps))
                            columns_gradient(one, blocking, grad_y, w, tile.pixels, channels.count, columns)
                        strays = exchange_columns(one, call, n, channels, window, sink, tap, tile, columns)
                        if a.windows and not window.whole:
                            flag = flag_at(call, n, channels.number, region, tile_number, tap)
                            note_strays(flags, flag, strays, any_strays)
                        if a.sums:
                            total = at(sums, tap * blocking.panel)
                            weights_gradient(one, blocking, p.taps, grad_y, tile.pixels, channels.count, columns, total)


@block
def note_strays(flags, flag, strays, any_strays):
    """Note whether a tap of a tile has strays, and whether any has."""
    store(flags, flag, 1 if strays else 0)
    if strays and load_scalar(any_strays, 0) == 0:  # all threads read what lies around it
        store(any_strays, 0, 1)


@block
def _clear_sums(sums, blocking, all_taps, taps):
    """Zero a block's partial sums of taps[0] to taps[1]."""
    line, zero = blocking.panel, like(0.0, load_scalar(sums, 0))
    rows = blocking.sums_size // (all_taps * line)  # a channel of a panel, or all channels of a depthwise convolution
    for row in range(rows):
        fill(sums, (row * all_taps + taps[0]) * line, (taps[1] - taps[0]) * line, zero)


@block
def columns_gradient(one, blocking, grad_y, weights, pixels, count, columns):
    """columns[p, c] = the gradient of a tap's columns: packed grad_y times the weights."""
    if blocking.depthwise:
        for p in range(pixels):
            for c in range(0, count, width(one)):
                spot = p * blocking.block + c
                store(columns.pointer, spot, load(grad_y.pointer, spot) * load(weights, c))
    else:
        multiply_panels(
            grad_y.pointer, grad_y.rows * grad_y.pitch, pixels, blocking.outputs, Matrix(weights, blocking.block), count,
            columns.pointer,
        )  # fmt: skip


@block
def weights_gradient(one, blocking, taps, grad_y, pixels, count, columns, sums):
    """sums (panel, channel, tap, output) += the gradient of a tap's weights: the columns times packed grad_y."""
    if blocking.depthwise:
        for c in range(0, count, width(one)):
            total = full(one - one)
            for p in range(pixels):
                spot = p * blocking.block + c
                total = fma(load(columns.pointer, spot), load(grad_y.pointer, spot), total)
            store(sums, c, load(sums, c) + total)
    else:
        panels = Panels(grad_y.pointer, blocking.panel, blocking.panels, grad_y.rows * grad_y.pitch)
        sums_pitch = taps * blocking.panel
        multiply_block(columns.pointer, count, pixels, panels, grad_y.pitch, sums, sums_pitch, blocking.panel_sums)


@helper
def sink_of(one, call, n, tap_group, window, channels):
    """Zero-padded image n of a block of channels, and the window of its gradient."""
    p, a, cut = call.p, call.a, call.blocking.cut
    start = n * call.blocking.image_size + channels.first * padded_pixels(p.in_size)
    image = Image(at(pointer(a.images, one), start), channels.count, (p.in_size[1] + 1) * channels.count)
    spot = (n - call.first) * cut.size + (tap_group * p.in_channels + channels.first) * cut.pixels
    grad = at(pointer(a.windows, one), spot + window.start * channels.count)
    return GradientSink(image, grad, window.width * channels.count, a.windows != 0)


@helper
def plan_block(window, tile, shift, size, count):
    """Plan a tap for an image of `count` channels; returns whether there are samples beyond the window."""
    strays = False
    if window.whole:
        plan_tap(tile, shift, size, count)
    else:
        strays = plan_tap_in(window, tile, shift, size, count)
    return strays


@block
def sample_block(one, call, n, channels, window, images, tap, tile, columns):
    """Replace the gradient of a tap's columns, for a block of channels, with the columns; add to the other gradients.

    Returns whether there are samples beyond the window.
    """
    p, a, strays = call.p, call.a, False
    shift, spots = tap_shift(p, tap), tile.index if window.whole else tile.spots
    per_offset_group, first, end = p.in_channels // p.offset_groups, channels.first, channels.first + channels.count
    block_ranges = pointer(a.block_ranges, np.int64(0))
    for g in range(first // per_offset_group, (end - 1) // per_offset_group + 1):
        channel, number = g * p.taps + tap, channels.number - load_scalar(block_ranges, 2 * g)
        read_tap(one, p, a.offsets, a.mask, n, channel, tile)
        strays |= plan_block(window, tile, shift, p.in_size, channels.count)
        c = max(first, g * per_offset_group) - first
        c_end = min(end, (g + 1) * per_offset_group) - first
        target = columns_from(columns, c)
        if not a.weights:
            sample_tap(image_from(images.image, c), tile, c_end - c, target)
            continue
        sample_tap_backward(sink_from(images, c), tile, spots, c_end - c, target)
        if a.grad_offsets.address:
            write_partial(one, a.grad_offsets, number, n, 2 * channel, tile, at(tile.rows, GRAD_Y))
            write_partial(one, a.grad_offsets, number, n, 2 * channel + 1, tile, at(tile.rows, GRAD_X))
        if a.grad_mask.address:
            write_partial(one, a.grad_mask, number, n, channel, tile, at(tile.rows, GRAD_MASK))
    return strays


@block
def copy_block(one, call, n, channels, window, images, tap, tile, columns):
    """Replace the gradient of a tap's columns, for a block of channels, with the columns; add it to the image's
    gradient. No sample is beyond the window, so this returns False."""
    p = call.p
    strays = plan_block(window, tile, tap_shift(p, tap), p.in_size, channels.count)
    copy_tap_backward(images, tile, tile.index if window.whole else tile.spots, channels.count, columns)
    return strays


@kernel
def backward_sampled(one, params, counter, slot):
    """The gradients with sampled columns, one block of channels at a time."""
    compute_gradients(one, params, counter, slot, sample_block)


@kernel
def backward_copied(one, params, counter, slot):
    """The gradients with copied columns, one block of channels at a time."""
    compute_gradients(one, params, counter, slot, copy_block)


@kernel
def finish_weights(one, params, counter, slot):
    """grad_w = the sum over the regions and bands of images. A task is a panel of outputs of a block of channels."""
    call = unpack(params, BackwardCall)
    p, blocking, a = call.p, call.blocking, call.a
    totals = pointer(a.workspaces + slot * blocking.workspace_bytes, one)
    bounds, per_group, count_bands = pointer(a.bounds, np.int64(0)), p.in_channels // p.groups, bands_of(blocking)
    while True:
        task = next_task(counter)
        if task >= blocking.blocks * blocking.panels:
            return
        number, panel = task // blocking.panels, task % blocking.panels
        channels = block_at(bounds, number)
        for band in range(count_bands):
            sums = at(pointer(a.sums, one), (band * blocking.blocks + number) * blocking.sums_size)
            _add_sums(at(sums, panel * blocking.panel_sums), blocking.panel_sums, totals, band == 0)
        first, strides = channels.first, a.grad_w.strides
        outputs = min(blocking.panel, blocking.outputs - panel * blocking.panel)
        output = first // per_group * blocking.outputs + panel * blocking.panel
        spot, channel_stride = output * strides[0] + first % per_group * strides[1], strides[1]
        if blocking.depthwise:
            outputs, spot, channel_stride = per_group, first * strides[0], strides[0]  # one output of one channel
        target = at(pointer(a.grad_w.address, one), spot)
        _write_weights(totals, blocking, p, outputs, channels.count, channel_stride, strides, target)


@block
def _add_sums(sums, count, totals, first):
    """totals = or += sums."""
    for i in range(0, count, width(load_scalar(totals, 0))):
        store(totals, i, load(sums, i) if first else load(totals, i) + load(sums, i))


@block
def _write_weights(totals, blocking, p, outputs, count, channel_stride, strides, target):
    """Write totals (channel, tap, output), or (tap, channel) of a depthwise convolution, to the weights' gradient."""
    rows, panel, step = count * p.taps, blocking.panel, width(load_scalar(totals, 0))
    plain = strides[3] == 1 and strides[2] == p.kernel[1] and channel_stride == p.taps
    if not blocking.depthwise and plain and outputs >= step and rows >= step:
        for o in range(0, outputs, step):
            o_ = min(o, outputs - step)  # the last squares overlap those before
            for row in range(0, rows, step):
                row_ = min(row, rows - step)
                transpose(at(totals, row_ * panel + o_), panel, at(target, o_ * strides[0] + row_), strides[0])
        return
    for o in range(outputs):
        for c in range(count):
            for tap in range(p.taps):
                spot = tap // p.kernel[1] * strides[2] + tap % p.kernel[1] * strides[3]
                row = tap * blocking.block + c if blocking.depthwise else (c * p.taps + tap) * panel + o
                store(target, o * strides[0] + c * channel_stride + spot, load_scalar(totals, row))
