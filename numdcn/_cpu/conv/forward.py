"""The forward of convolutions on the CPU, deformable or not.

Given zero-padded images and packed weights, it computes y by tiles of output pixels and chunks of columns: plan (cells
and weights), sample (or copy, without offsets), multiply by the weights; the sums are transposed into y.
"""

from __future__ import annotations

from typing import NamedTuple

from numdcn._call.convolution import Convolution
from numdcn._cpu.aside import multiply_copying, multiply_sampling
from numdcn._cpu.conv.blocking import ForwardBlocking
from numdcn._cpu.conv.columns import (
    Share,
    chunk_at,
    copy_chunk,
    multiply_chunk,
    multiply_tile_aside,
    plan_copies,
    plan_samples,
    sample_chunk,
)
from numdcn._cpu.jit import kernel
from numdcn._cpu.layout import Image, Matrix
from numdcn._cpu.parameters import Place, unpack
from numdcn._cpu.sample import copy_tap, sample_tap
from numdcn._cpu.simd import at, next_task, pointer
from numdcn._cpu.tile import new_tile, place_tile
from numdcn._cpu.tile_io import write_tile
from numdcn._formulas.jit import helper


class ForwardArrays(NamedTuple):
    """Places and addresses of all arrays; absent ones have address 0."""

    offsets: Place
    mask: Place
    bias: Place
    y: Place
    images: int  # address of the zero-padded images
    weights: int  # address of the packed weights
    workspaces: int  # address of the threads' workspaces


class ForwardCall(NamedTuple):
    """Parameters of the forward's kernels."""

    p: Convolution
    blocking: ForwardBlocking
    a: ForwardArrays


@helper
def count_tasks(p, blocking):
    """The number of tasks of a forward."""
    return p.batch * blocking.tiling.tiles * blocking.slices


@helper
def compute_tiles(make_columns, plan, make, multiply, one, params, counter, slot):
    """y, tile by tile. A task is a tile and a block of groups, or of panels of outputs.

    `make_columns(one, call, n, tile, first, count, image, chunk, columns)` fills a chunk of the columns of `count`
    pixels of a tile of image n: `sample_chunk` or `copy_chunk`, inlined here like every helper. `plan`, `make` and
    `multiply` are those of `multiply_tile_aside`.
    """
    call = unpack(params, ForwardCall)
    p, blocking, a, chunks_per_block = call.p, call.blocking, call.a, call.blocking.chunks_per_block
    base = a.workspaces + slot * blocking.workspace_bytes
    unplaced = new_tile(base, one)
    columns = Matrix(pointer(base + blocking.tile_bytes, one), blocking.chunks.pitch)
    sums = Matrix(at(columns.pointer, blocking.rows * columns.pitch), blocking.sums_pitch)
    buffer = at(sums.pointer, blocking.chunks.groups_per_chunk * blocking.rows * sums.pitch)
    while True:
        task = next_task(counter)
        if task >= count_tasks(p, blocking):
            break
        tile_number, slice_ = task // blocking.slices, task % blocking.slices
        n = tile_number // blocking.tiling.tiles
        tile = place_tile(
            unplaced, blocking.tiling, tile_number % blocking.tiling.tiles, p.out_size, p.stride, p.before
        )
        start = at(pointer(a.images, one), n * blocking.image_size)
        image = Image(start, p.in_channels, (p.in_size[1] + 1) * p.in_channels)
        first_panel, block_ = 0, slice_
        if blocking.chunks.groups == 1:
            first_panel, block_ = slice_ * blocking.panels_per_task, 0
        panels = min(blocking.panels_per_task, blocking.weights.panels - first_panel)
        if blocking.aside:
            share = Share(n, block_, first_panel, panels)
            multiply_tile_aside(plan, make, multiply, one, call, share, tile, image, columns, sums)
        else:
            # the chunks of a block of groups have consecutive numbers, as groups vary slowest in `chunk_at`
            for number in range(block_ * chunks_per_block, (block_ + 1) * chunks_per_block):
                chunk = chunk_at(blocking.chunks, number)
                for first in range(0, tile.pixels, blocking.pixels_at_once):
                    count = min(blocking.pixels_at_once, tile.pixels - first)
                    make_columns(one, call, n, tile, first, count, image, chunk, columns)
                    multiply_chunk(one, call, chunk, columns, tile, first, count, sums, first_panel, panels)
        outputs, o = blocking.weights.outputs, first_panel * blocking.weights.panel
        group = block_ * blocking.chunks.groups_per_chunk
        for g in range(group, min(group + blocking.chunks.groups_per_chunk, blocking.chunks.groups)):
            done = Matrix(at(sums.pointer, (g - group) * blocking.rows * sums.pitch), sums.pitch)
            count = min(panels * blocking.weights.panel, outputs - o)
            write_tile(one, a.y, a.bias, n, g * outputs + o, count, tile, done, buffer)


@kernel
def forward_sampled(one, params, counter, slot):
    """y from sampled columns, tile by tile."""
    compute_tiles(sample_chunk, plan_samples, sample_tap, multiply_sampling, one, params, counter, slot)


@kernel
def forward_copied(one, params, counter, slot):
    """y from copied columns, tile by tile."""
    compute_tiles(copy_chunk, plan_copies, copy_tap, multiply_copying, one, params, counter, slot)
