"""A tile's columns in the forward of convolutions, chunk by chunk: made from an image, then multiplied by the weights.

The columns of a pixel are what the taps read from the channels: taps * channels of a convolution group. A chunk covers
a range of groups, of taps, and of channels of each group, stored in a pixel's row of columns as [group][tap][channel],
the row order of packed weights (`pack.Packing`), so each group's columns and weights are multiplied without
rearranging.
"""

from __future__ import annotations

from typing import NamedTuple

from numdcn._cpu.aside import Aside
from numdcn._cpu.gemm import ROWS, Panels
from numdcn._cpu.jit import block
from numdcn._cpu.layout import Matrix, columns_from, image_from
from numdcn._cpu.sample import copy_tap, plan_tap, sample_pairs, sample_tap
from numdcn._cpu.simd import at, pointer, width
from numdcn._cpu.tile import MASK, OFFSET_X, OFFSET_Y, tile_from
from numdcn._cpu.tile_io import read_plane
from numdcn._formulas.jit import helper


class Chunk(NamedTuple):
    """Ranges of groups, taps and channels of a group; the `_end`s are exclusive."""

    group: int
    group_end: int
    tap: int
    tap_end: int
    channel: int
    channel_end: int


class Share(NamedTuple):
    """What a task computes of a tile of image n: the groups of a block, and panels of their outputs."""

    n: int
    block: int
    first_panel: int
    panels: int


@block
def chunk_at(chunks, number):
    """The `Chunk` of a tile with this number: channels vary fastest, then taps, then groups."""
    channel_chunks = (chunks.channels + chunks.channels_per_chunk - 1) // chunks.channels_per_chunk
    tap_chunks = (chunks.taps + chunks.taps_per_chunk - 1) // chunks.taps_per_chunk
    channel = number % channel_chunks * chunks.channels_per_chunk
    tap = number // channel_chunks % tap_chunks * chunks.taps_per_chunk
    group = number // (channel_chunks * tap_chunks) * chunks.groups_per_chunk
    return Chunk(
        group, min(group + chunks.groups_per_chunk, chunks.groups),
        tap, min(tap + chunks.taps_per_chunk, chunks.taps),
        channel, min(channel + chunks.channels_per_chunk, chunks.channels),
    )  # fmt: skip


@helper
def tap_shift(p, tap):
    """Rows and columns from tap (0, 0) to a tap."""
    return tap // p.kernel[1] * p.dilation[0], tap % p.kernel[1] * p.dilation[1]


@helper
def plan_copies(one, call, n, tile, tap, group):
    """Plan a tap without offsets. The tile's offsets are 0."""
    plan_tap(tile, tap_shift(call.p, tap), call.p.in_size, call.p.in_channels)


@helper
def plan_samples(one, call, n, tile, tap, group):
    """Read the offsets of a tap of an offset group in image n, and plan it."""
    read_tap(one, call.p, call.a.offsets, call.a.mask, n, group * call.p.taps + tap, tile)
    plan_copies(one, call, n, tile, tap, group)


@helper
def copy_chunk(one, call, n, tile, first, count, image, chunk, columns):
    """Copy one chunk of the columns of `count` pixels of a tile, for taps without offsets. The tile's offsets are 0.

    Taps are planned for the tile's first pixels, for all of them: there is one tap, or all pixels come at once.
    """
    chunks, depth = call.blocking.chunks, chunk.channel_end - chunk.channel
    for tap in range(chunk.tap, chunk.tap_end):
        if first == 0:
            plan_copies(one, call, n, tile, tap, 0)
        for g in range(chunk.group, chunk.group_end):
            source = image_from(image, g * chunks.channels + chunk.channel)
            k = ((g - chunk.group) * (chunk.tap_end - chunk.tap) + tap - chunk.tap) * depth
            copy_tap(source, tile_from(tile, first, count), depth, columns_from(columns, k))


@helper
def sample_chunk(one, call, n, tile, first, count, image, chunk, columns):
    """Sample one chunk of the columns of `count` pixels of a tile.

    Offsets are read and taps planned anew for each chunk, for all pixels at once: see `copy_chunk`.
    """
    _sample_chunk(sample_tap, one, call, n, tile, first, count, image, chunk, columns)


@helper
def sample_chunk_of_pairs(one, call, n, tile, first, count, image, chunk, columns):
    """`sample_chunk` where channels are pairs of bfloat16."""
    _sample_chunk(sample_pairs, one, call, n, tile, first, count, image, chunk, columns)


@helper
def _sample_chunk(sample, one, call, n, tile, first, count, image, chunk, columns):
    """`sample_chunk`, tap by tap by `sample`."""
    p, chunks, depth = call.p, call.blocking.chunks, chunk.channel_end - chunk.channel
    start = chunk.group * chunks.channels + chunk.channel
    end = (chunk.group_end - 1) * chunks.channels + chunk.channel_end
    per_offset_group = p.in_channels // p.offset_groups
    part = tile_from(tile, first, count)
    for tap in range(chunk.tap, chunk.tap_end):
        for g in range(start // per_offset_group, (end - 1) // per_offset_group + 1):
            if first == 0:
                plan_samples(one, call, n, tile, tap, g)
            c, c_end = max(start, g * per_offset_group), min(end, (g + 1) * per_offset_group)
            while c < c_end:  # one convolution group at a time
                c_group = c // chunks.channels
                stop = min(c_end, (c_group + 1) * chunks.channels)
                k = ((c_group - chunk.group) * (chunk.tap_end - chunk.tap) + tap - chunk.tap) * depth
                k += c - c_group * chunks.channels - chunk.channel
                sample(image_from(image, c), part, stop - c, columns_from(columns, k))
                c = stop


@block
def read_tap(one, p, offsets, mask, n, channel, tile):
    """Read the offsets of a tap of an offset group, and the mask if there is one, for the pixels of a tile."""
    strides = offsets.strides
    plane = at(pointer(offsets.address, one), n * strides[0] + 2 * channel * strides[1])
    read_plane(plane, strides[2:], 2 * strides[1], tile, at(tile.rows, OFFSET_Y))
    read_plane(at(plane, strides[1]), strides[2:], 2 * strides[1], tile, at(tile.rows, OFFSET_X))
    if p.masked:
        strides = mask.strides
        plane = at(pointer(mask.address, one), n * strides[0] + channel * strides[1])
        read_plane(plane, strides[2:], strides[1], tile, at(tile.rows, MASK))


@helper
def multiply_chunk(multiply, one, call, share, chunk, columns, tile, first, count, sums):
    """Multiply a chunk of the columns of `count` pixels of a tile by its weights, for a share of the outputs, by
    `multiply`: `gemm.multiply_rows`, or `multiply_pairs` where channels are pairs of bfloat16."""
    blocking, chunks, packed = call.blocking, call.blocking.chunks, call.blocking.weights
    weights, depth = pointer(call.a.weights, one), (chunk.tap_end - chunk.tap) * (chunk.channel_end - chunk.channel)
    panel_size = chunks.taps * chunks.channels * packed.panel
    ahead_step = packed.panel * ROWS // max(tile.pixels, ROWS)  # the tile prefetches the next chunk's weights
    for g in range(chunk.group, chunk.group_end):
        w = at(weights, (g * packed.panels + share.first_panel) * panel_size)
        w = at(w, (chunk.tap * chunks.channels + chunk.channel) * packed.panel)
        group_sums = at(sums.pointer, ((g - chunk.group) * blocking.rows + first) * sums.pitch)
        multiply(
            columns_from(columns, (g - chunk.group) * depth), count, depth,
            Panels(w, packed.panel, share.panels, panel_size),
            depth * packed.panel + first // ROWS * ahead_step * depth, ahead_step, Matrix(group_sums, sums.pitch),
            (chunk.tap == 0) & (chunk.channel == 0),
        )  # fmt: skip


@helper
def multiply_tile(make_columns, multiply, one, call, share, tile, image, columns, sums):
    """Multiply a share of a tile's columns by their weights, chunk by chunk.

    `make_columns(one, call, n, tile, first, count, image, chunk, columns)` fills a chunk of the columns of `count`
    pixels of a tile of image n: `sample_chunk`, `copy_chunk` or `sample_chunk_of_pairs`, inlined here like every helper.
    """
    blocking = call.blocking
    # the chunks of a block of groups have consecutive numbers, as groups vary slowest in `chunk_at`
    for number in range(share.block * blocking.chunks_per_block, (share.block + 1) * blocking.chunks_per_block):
        chunk = chunk_at(blocking.chunks, number)
        for first in range(0, tile.pixels, blocking.pixels_at_once):
            count = min(blocking.pixels_at_once, tile.pixels - first)
            make_columns(one, call, share.n, tile, first, count, image, chunk, columns)
            multiply_chunk(multiply, one, call, share, chunk, columns, tile, first, count, sums)


@helper
def multiply_tile_aside(plan, make, multiply, one, call, share, tile, image, columns, sums):
    """Multiply a share of a tile's columns by their weights, register tile by register tile, while the columns of the
    next register tile are made.

    One plan serves a chunk, made by `plan`: `plan_samples` or `plan_copies`. `make` and `multiply` are `sample_tap` and
    `multiply_sampling`, or `copy_tap` and `multiply_copying`. `columns` holds those of two register tiles.
    """
    p, blocking, chunks, packed = call.p, call.blocking, call.blocking.chunks, call.blocking.weights
    panel_size, step = chunks.taps * chunks.channels * packed.panel, width(one)
    ahead_step = packed.panel * ROWS // max(tile.pixels, ROWS)
    per_offset_group = p.in_channels // max(p.offset_groups, 1)
    end, turn = (share.block + 1) * blocking.chunks_per_block, 0
    chunk = chunk_at(chunks, share.block * blocking.chunks_per_block)
    following = chunk
    channel = chunk.group * chunks.channels + chunk.channel
    plan(one, call, share.n, tile, chunk.tap, channel // per_offset_group)
    part = tile_from(tile, 0, min(ROWS, tile.pixels))
    make(image_from(image, channel), part, chunk.channel_end - chunk.channel, columns)
    for number in range(share.block * blocking.chunks_per_block, end):
        chunk, depth = following, following.channel_end - following.channel
        w = at(pointer(call.a.weights, one), (chunk.group * packed.panels + share.first_panel) * panel_size)
        w = at(w, (chunk.tap * chunks.channels + chunk.channel) * packed.panel)
        for first in range(0, tile.pixels, ROWS):
            start, count = first + ROWS, min(ROWS, tile.pixels - first - ROWS)
            if count <= 0:
                start, count = 0, 0
                if number + 1 < end:
                    following, count = chunk_at(chunks, number + 1), min(ROWS, tile.pixels)
                    channel = following.group * chunks.channels + following.channel
                    plan(one, call, share.n, tile, following.tap, channel // per_offset_group)
            a = at(columns.pointer, turn * ROWS * columns.pitch)
            target = at(columns.pointer, (1 - turn) * ROWS * columns.pitch)
            next_depth, source, part = (
                following.channel_end - following.channel, image_from(image, channel), tile_from(tile, start, count),
            )  # fmt: skip
            vectors = (next_depth + step - 1) // step
            made = multiply(
                a, depth, Panels(w, packed.panel, share.panels, panel_size),
                depth * packed.panel + first // ROWS * ahead_step * depth, ahead_step,
                Matrix(at(sums.pointer, first * sums.pitch), sums.pitch), (chunk.tap == 0) & (chunk.channel == 0),
                Aside(source, part, target, vectors),
            )  # fmt: skip
            if made < count * vectors:  # more than the product had time for
                pixel = made // vectors
                rest = tile_from(part, pixel, count - pixel)
                make(source, rest, next_depth, Matrix(at(target, pixel * columns.pitch), columns.pitch))
            turn = 1 - turn
