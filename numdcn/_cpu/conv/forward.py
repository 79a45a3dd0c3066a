"""The forward of convolutions on the CPU, deformable or not.

Given zero-padded images and packed weights, it computes y by tiles of output pixels and chunks of columns: plan (cells
and weights), sample (or copy, without offsets), multiply by the weights; the sums are transposed into y.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from numdcn._call.convolution import Convolution
from numdcn._cpu.aside import multiply_copying, multiply_sampling
from numdcn._cpu.conv.blocking import ForwardBlocking
from numdcn._cpu.conv.columns import (
    Share,
    copy_chunk,
    multiply_tile,
    multiply_tile_aside,
    plan_copies,
    plan_samples,
    sample_chunk,
    sample_chunk_of_pairs,
)
from numdcn._cpu.gemm import multiply_pairs, multiply_rows
from numdcn._cpu.jit import block, kernel
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
def compute_tiles(compute_share, of_y, one, params, counter, slot):
    """y, of elements of the type of `of_y`, tile by tile. A task is a tile and a block of groups, or of panels of
    outputs.

    `compute_share(one, call, share, tile, image, columns, sums)` fills the sums of a share of a tile.
    """
    call = unpack(params, ForwardCall)
    p, blocking, a = call.p, call.blocking, call.a
    base = a.workspaces + slot * blocking.workspace_bytes
    unplaced = new_tile(base, one)
    columns = Matrix(pointer(base + blocking.tile_bytes, one), blocking.chunks.pitch)
    sums = Matrix(at(columns.pointer, blocking.columns_size), blocking.sums_pitch)
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
        compute_share(one, call, Share(n, block_, first_panel, panels), tile, image, columns, sums)
        outputs, o = blocking.weights.outputs, first_panel * blocking.weights.panel
        group = block_ * blocking.chunks.groups_per_chunk
        for g in range(group, min(group + blocking.chunks.groups_per_chunk, blocking.chunks.groups)):
            done = Matrix(at(sums.pointer, (g - group) * blocking.rows * sums.pitch), sums.pitch)
            count = min(panels * blocking.weights.panel, outputs - o)
            write_tile(one, of_y, a.y, a.bias, n, g * outputs + o, count, tile, done, buffer)


@block
def _sampled(one, call, share, tile, image, columns, sums):
    multiply_tile(sample_chunk, multiply_rows, one, call, share, tile, image, columns, sums)


@block
def _sampled_aside(one, call, share, tile, image, columns, sums):
    multiply_tile_aside(plan_samples, sample_tap, multiply_sampling, one, call, share, tile, image, columns, sums)


@block
def _sampled_pairs(one, call, share, tile, image, columns, sums):
    multiply_tile(sample_chunk_of_pairs, multiply_pairs, one, call, share, tile, image, columns, sums)


@block
def _copied(one, call, share, tile, image, columns, sums):
    multiply_tile(copy_chunk, multiply_rows, one, call, share, tile, image, columns, sums)


@block
def _copied_aside(one, call, share, tile, image, columns, sums):
    multiply_tile_aside(plan_copies, copy_tap, multiply_copying, one, call, share, tile, image, columns, sums)


@block
def _copied_pairs(one, call, share, tile, image, columns, sums):
    multiply_tile(copy_chunk, multiply_pairs, one, call, share, tile, image, columns, sums)


@kernel
def forward_sampled(one, params, counter, slot):
    """y from sampled columns, tile by tile."""
    compute_tiles(_sampled, one, one, params, counter, slot)


@kernel
def forward_sampled_aside(one, params, counter, slot):
    """`forward_sampled`, with columns made during the product."""
    compute_tiles(_sampled_aside, one, one, params, counter, slot)


@kernel
def forward_sampled_pairs(one, params, counter, slot):
    """y in bfloat16 from sampled columns; elements of images, columns and weights are pairs of bfloat16."""
    compute_tiles(_sampled_pairs, np.int16(0), one, params, counter, slot)


@kernel
def forward_copied(one, params, counter, slot):
    """y from copied columns, tile by tile."""
    compute_tiles(_copied, one, one, params, counter, slot)


@kernel
def forward_copied_aside(one, params, counter, slot):
    """`forward_copied`, with columns made during the product."""
    compute_tiles(_copied_aside, one, one, params, counter, slot)


@kernel
def forward_copied_pairs(one, params, counter, slot):
    """`forward_sampled_pairs` from copied columns."""
    compute_tiles(_copied_pairs, np.int16(0), one, params, counter, slot)
