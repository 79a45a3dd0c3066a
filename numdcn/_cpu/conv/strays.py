"""The gradients of samples beyond their window (`conv.windows`), added to the gradient of the whole image."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from numdcn._cpu.conv.backward import (
    BackwardCall,
    block_at,
    columns_gradient,
    flag_at,
    outputs_of,
    place_operands,
    plan_block,
)
from numdcn._cpu.conv.columns import read_tap, tap_shift
from numdcn._cpu.conv.windows import is_whole, region_at, regions_of, window_of
from numdcn._cpu.jit import block, kernel
from numdcn._cpu.layout import Image, columns_from, image_from, padded_pixels
from numdcn._cpu.parameters import unpack
from numdcn._cpu.sample import add_at, weights_of
from numdcn._cpu.simd import at, load_scalar, next_task, pointer
from numdcn._cpu.tile import MASK, place_tile_in, tiles_in
from numdcn._cpu.tile_io import pack_gradient
from numdcn._formulas.jit import helper


class StraysCall(NamedTuple):
    """Parameters of `add_strays`."""

    call: BackwardCall
    images: int  # address of the zero-padded images that receive the gradients


@block
def _scatter(image, end, tile, count, columns):
    """Add a tap's gradients, `count` channels of columns, to the image at the pixels of a tile whose spot is `end`."""
    for pixel in range(tile.pixels):
        if load_scalar(tile.spots, pixel) != end:
            continue
        index, mask = load_scalar(tile.index, pixel), load_scalar(tile.rows, MASK + pixel)
        weights = weights_of(tile, pixel, mask)
        for c in range(count):
            gradient = load_scalar(columns.pointer, pixel * columns.pitch + c) * mask
            add_at(image, index + c, weights, gradient)


@helper
def _has_flag(call, flags, n, number, region, tile_number):
    """Whether a tile of a block of channels has strays."""
    found = False
    for tap in range(call.p.taps):
        found |= load_scalar(flags, flag_at(call, n, number, region, tile_number, tap)) != 0
    return found


@kernel
def add_strays(one, params, counter, slot):
    """Add the gradients of strays to images. A task is a block of channels of an image."""
    a = unpack(params, StraysCall)
    call, p, blocking = a.call, a.call.p, a.call.blocking
    unplaced, buffer, grad_y, columns = place_operands(one, call, slot)
    bounds, placed = pointer(call.a.bounds, np.int64(0)), pointer(call.a.placed, np.int64(0))
    flags, per_offset_group = pointer(call.a.flags, np.int64(0)), p.in_channels // p.offset_groups
    while True:
        task = next_task(counter)
        if task >= blocking.blocks * (call.end - call.first):
            return
        n, number = call.first + task // blocking.blocks, task % blocking.blocks
        channels = block_at(bounds, number)
        first, end = channels.first, channels.first + channels.count
        output, outputs = outputs_of(call, channels)
        start = (n - call.first) * blocking.image_size + first * padded_pixels(p.in_size)
        image = Image(at(pointer(a.images, one), start), channels.count, (p.in_size[1] + 1) * channels.count)
        for region in range(0 if is_whole(blocking.cut, placed, n) else regions_of(blocking.cut)):
            area = region_at(blocking.cut, p.out_size, region)
            window = window_of(blocking.cut, placed, n, region, p.in_size)
            nowhere = window.height * window.width * channels.count
            for tile_number in range(tiles_in(blocking.tiling, area)):
                if not _has_flag(call, flags, n, number, region, tile_number):
                    continue
                tile = place_tile_in(unplaced, blocking.tiling, tile_number, area, p.stride, p.before)
                pack_gradient(one, call.a.grad_y, n, output, outputs, tile, grad_y, buffer)
                for tap in range(p.taps):
                    if load_scalar(flags, flag_at(call, n, number, region, tile_number, tap)) == 0:
                        continue
                    w = at(pointer(call.a.weights, one), number * blocking.weights_size)
                    w = at(w, tap * (blocking.weights_size // p.taps))
                    columns_gradient(one, blocking, grad_y, w, tile.pixels, channels.count, columns)
                    for g in range(first // per_offset_group, (end - 1) // per_offset_group + 1):
                        read_tap(one, p, call.a.offsets, call.a.mask, n, g * p.taps + tap, tile)
                        plan_block(window, tile, tap_shift(p, tap), p.in_size, channels.count)
                        c = max(first, g * per_offset_group) - first
                        c_end = min(end, (g + 1) * per_offset_group) - first
                        _scatter(image_from(image, c), nowhere, tile, c_end - c, columns_from(columns, c))
