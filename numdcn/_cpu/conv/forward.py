"""The forward of convolutions on the CPU, deformable or not.

x is copied to channels-last with a border of zeros; then, tile by tile of output pixels and chunk by chunk of columns: plan
(cells and weights), sample, or copy where there are no offsets, multiply by the packed weights; the sums are turned into y.
"""

from __future__ import annotations

from typing import NamedTuple

from numdcn._call.convolution import Convolution
from numdcn._cpu.conv.blocking import ForwardBlocking
from numdcn._cpu.conv.columns import chunk_at, copy_chunk, multiply_chunk, sample_chunk, write_tile
from numdcn._cpu.jit import kernel
from numdcn._cpu.parameters import Place, unpack
from numdcn._cpu.simd import at, next_task, pointer
from numdcn._cpu.tile import place_tile, tile_at
from numdcn._formulas.jit import helper


class ForwardArrays(NamedTuple):
    """Where everything lies."""

    offsets: Place
    mask: Place
    bias: Place
    y: Place
    images: int  # addresses: zero-padded images,
    weights: int  # packed weights,
    slots: int  # scratch of the threads


class ForwardCall(NamedTuple):
    """Parameters of a forward's kernel."""

    p: Convolution
    blocking: ForwardBlocking
    a: ForwardArrays


@helper
def compute_tiles(one, params, counter, slot, make_columns):
    """y, tile by tile. A task is a tile and a block of groups, or of panels of outputs.

    `make_columns` fills a chunk of a tile's columns: `columns.sample_chunk` or `copy_chunk`.
    """
    call = unpack(params, ForwardCall)
    p, blocking, a, per_block = call.p, call.blocking, call.a, call.blocking.per_block
    base = a.slots + slot * blocking.slot_bytes
    tile = tile_at(base, one)
    columns = pointer(base + blocking.tile_bytes, one)
    sums = at(columns, blocking.rows * blocking.chunks.pitch)
    buffer = at(sums, blocking.chunks.group_step * blocking.rows * blocking.sums_pitch)
    while True:
        task = next_task(counter)
        if task >= p.batch * blocking.tiles * blocking.parts:
            break
        unit, part = task // blocking.parts, task % blocking.parts
        n = unit // blocking.tiles
        runs, pixels = place_tile(tile, blocking, unit % blocking.tiles, p.out_size, p.stride, p.before)
        image = at(pointer(a.images, one), n * blocking.image_size)
        first_panel, block_ = 0, part
        if blocking.chunks.groups == 1:
            first_panel, block_ = part * blocking.panel_step, 0
        panels = min(blocking.panel_step, blocking.weights.panels - first_panel)
        for number in range(block_ * per_block, (block_ + 1) * per_block):
            chunk = chunk_at(blocking.chunks, number)
            make_columns(one, p, a, n, tile, runs, pixels, image, chunk, blocking.chunks, columns)
            multiply_chunk(one, p, blocking, pointer(a.weights, one), chunk, columns, pixels, sums, first_panel, panels)
        outputs, o = blocking.weights.outputs, first_panel * blocking.weights.panel
        group = block_ * blocking.chunks.group_step
        for g in range(group, min(group + blocking.chunks.group_step, blocking.chunks.groups)):
            done = at(sums, (g - group) * blocking.rows * blocking.sums_pitch)
            many = min(panels * blocking.weights.panel, outputs - o)
            write_tile(
                one, a, n, g * outputs + o, many, tile, runs, pixels, done, blocking.sums_pitch, buffer, p.biased
            )


@kernel
def forward_sampled(one, params, counter, slot):
    """y, tile by tile, from columns that are sampled."""
    compute_tiles(one, params, counter, slot, sample_chunk)


@kernel
def forward_copied(one, params, counter, slot):
    """y, tile by tile, from columns that are copied."""
    compute_tiles(one, params, counter, slot, copy_chunk)
