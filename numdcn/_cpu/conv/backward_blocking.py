"""Blocking of the backward of convolutions: tasks and their memory. It depends only on shapes, never on threads.

A task owns a block of input channels and some taps, for a region of each image of a band, so no two tasks add to the
same memory. What an image's own tasks are does not depend on the batch, nor do the bits of its gradients.
"""

from __future__ import annotations

import bisect
import functools
import math
from typing import NamedTuple

import numpy as np

from numdcn._call.convolution import Convolution
from numdcn._cpu.conv.blocking import WANTED_TASKS, WORTH_DIVIDING, affordable, band_of, image_size, page, rows_of
from numdcn._cpu.conv.pack import is_depthwise, packing
from numdcn._cpu.conv.windows import SEGMENT, Cut
from numdcn._cpu.gemm import block_size, panel_widths
from numdcn._cpu.layout import padded_pixels
from numdcn._cpu.parameters import Numbers
from numdcn._cpu.simd import OVERRUN
from numdcn._cpu.tile import Tiling, tile_bytes, tiling_of
from numdcn._cpu.tile_io import PACKING_ELEMENTS

PARTIAL_BYTES = 16 * 2**20  # of partial sums of the weights' gradient, in bands of images
WINDOWS_BYTES = 48 * 2**20  # of windows of all images computed at a time, unless those of one take more
REACH = 8  # pixels beyond its taps, on each side, that a window has room for
TAP_GROUPS = 5  # at most: each reads all of grad_y
TASK_WORK = 15 * 2**20  # multiply-adds, or what takes as long, that are worth a task
SAMPLING = 64  # cost of a sample and its gradients, in multiply-adds
KEPT_BYTES = 62 * 2**20  # of scratch memory that is kept between calls
BYTES_PER_WORK = 0.0068  # of memory that a division may touch, for each multiply-add: a few hundredths of the time


class BackwardBlocking(NamedTuple):
    """The backward's tiles, blocks of channels, bands of images and workspace.

    A thread's workspace holds the tile's plan; the buffer of `tile_io.pack_gradient`; the columns; and grad_y at the
    tile. `images` transposes there too, before and after the kernel runs.
    """

    tiling: Tiling  # of the output image
    depthwise: int  # 1 or 0
    outputs: int  # per group, or per block of a depthwise convolution
    panel: int  # outputs per panel of the weights' gradient
    panels: int  # of outputs; if there are several, `panel` is `packed_pitch`
    block: int  # elements per pixel's row of columns: the maximum number of channels in a block
    blocks: int  # of channels
    image_bands: int  # each with its own partial sums of the weights' gradient
    band_images: int  # images per band, at most
    images: int  # computed at a time
    cut: Cut  # of each image
    partials: int  # partial sums of the offsets' and the mask's gradients
    rows: int  # of a tile's columns and of a panel of packed grad_y, including padding
    packed_pitch: int  # elements per pixel of a panel of packed grad_y
    packed_size: int  # elements of a tile of packed grad_y
    prepacked: int  # 1: grad_y is packed before the kernel runs, for all tasks; 0: they pack it themselves
    panel_sums: int  # elements of the gradient of a panel of weights: (channel, tap, output)
    sums_size: int  # elements of that of a block: (panel, channel, tap, output)
    weights_size: int  # elements of packed weights per block
    image_size: int  # elements of a blocked image, all blocks together
    workspace_bytes: int  # per thread
    tile_bytes: int  # of these, for the tile's plan


def block_bounds(p: Convolution, depthwise: bool, block: int) -> list[int]:
    """First channels of the blocks, then the end. A block lies within one convolution group, and either within one
    offset group or it covers whole ones (or the part of one that lies in its convolution group)."""
    group = p.in_channels if depthwise else p.in_channels // p.groups
    offset_group = p.in_channels // max(1, p.offset_groups)
    bounds = [0]
    while bounds[-1] < p.in_channels:
        first = bounds[-1]
        group_end = (first // group + 1) * group
        stretch = min((first // offset_group + 1) * offset_group, group_end) - first  # to the end of the offset group
        if stretch <= block:
            end = first + stretch
            while end < group_end and min(end + offset_group, group_end) - first <= block:
                end = min(end + offset_group, group_end)
        else:
            even = -(-stretch // -(-stretch // block))
            end = first + min(-(-even // 16) * 16, block)
        bounds.append(end)
    return bounds


def block_ranges_of(p: Convolution, bounds: list[int]) -> list[int]:
    """For each offset group, the first block that contains channels of it, and one past the last."""
    size, found = p.in_channels // max(1, p.offset_groups), []
    for g in range(p.offset_groups):
        found.append(bisect.bisect_right(bounds, g * size) - 1)
        found.append(bisect.bisect_left(bounds, (g + 1) * size))
    return found


def _cut(
    p: Convolution, blocks: int, outputs: int, sums_bytes: int, partials: int, packed: float, itemsize: int
) -> Cut:
    """How each image is divided: into as many parts as there should be tasks for each block of channels, or as many as
    pay. What a division costs is mainly memory: more windows, more partial sums, and grad_y read by more tasks.

    `outputs`: of a matrix product, 0 if there is none; `sums_bytes`: of the partial sums of all blocks; `partials`: of
    the gradients of offsets; `packed`: elements of packed grad_y per pixel, if it is kept.
    """
    pixels = float(p.out_size[0]) * p.out_size[1]
    work = pixels * p.taps * p.in_channels * (2 * outputs + SAMPLING)
    parts = min(-(-WANTED_TASKS // blocks), int(work / blocks / TASK_WORK)) if work >= 2 * WORTH_DIVIDING else 1
    undivided = made_cut(p, 1, 1, 1)
    others = image_size(p) + pixels * (3 * p.offset_groups * p.taps * partials * (partials > 1) + packed)
    room = KEPT_BYTES - others * itemsize  # for windows and sums, if the memory of a call is to be kept for the next
    if undivided.size * itemsize + sums_bytes > room:
        room = math.inf

    def cheapest(count: int) -> Cut | None:
        """The division into `count` parts that touches least, if it pays."""
        found = []
        for tap_groups, rows, columns in _divisions(p, count):
            cut = made_cut(p, tap_groups, rows, columns)
            if cut.size * itemsize + rows * columns * sums_bytes > room:
                continue
            extra = (cut.size - undivided.size) * itemsize + (rows * columns - 1) * sums_bytes
            extra += (tap_groups - 1) * blocks * pixels * p.out_channels * itemsize / 24  # read, not written
            found.append((extra, cut))
        extra, cut = min(found, default=(math.inf, undivided))
        return cut if extra <= BYTES_PER_WORK * work else None

    best, most = undivided, 0
    for count in range(parts, 1, -1):
        if count <= most * 3 // 4:
            break
        cut = cheapest(count)
        if cut is None:
            continue
        # if fewer than wanted, rather somewhat fewer still that eight cores can share evenly
        if count == parts or blocks * cut.tap_groups * cut.rows * cut.columns % 8 == 0:
            return cut
        if most == 0:
            best, most = cut, count
    return best


def _divisions(p: Convolution, count: int) -> list[tuple[int, int, int]]:
    """(groups of taps, rows of regions, columns of regions) for `count` parts or a little more.

    Parts may be unequal: what counts is how many of the largest make up the whole. Only strips of all taps are exactly as many.
    """
    found = []
    for tap_groups in range(1, min(p.taps, TAP_GROUPS) + 1):
        regions = -(-count * -(-p.taps // tap_groups) // p.taps)
        # with offsets of many groups, most reading is of offsets, along rows: then regions are as wide as the image
        for columns in range(1, min(regions, p.out_size[1]) + 1 if band_of(p) > 1 else 2):
            width = -(-p.out_size[1] // columns)
            height = max(p.out_size[0] * p.out_size[1] // (width * regions), 1)
            rows = min(regions, p.out_size[0]) if columns == 1 else -(-p.out_size[0] // height)
            found.append((tap_groups, rows, columns))
    return found or [(1, 1, 1)]


def made_cut(p: Convolution, tap_groups: int, rows: int, columns: int) -> Cut:
    """A `Cut` into so many groups of taps, rows and columns of regions."""
    height, width = (
        min(
            (-(-out // regions) - 1) * stride + (kernel - 1) * dilation + 2 + (2 * REACH if p.offset_groups else 0),
            size + 2,
        )
        for out, regions, stride, kernel, dilation, size in zip(
            p.out_size, (rows, columns), p.stride, p.kernel, p.dilation, p.in_size, strict=True
        )
    )
    width = p.in_size[1] + 1 if columns == 1 or width > p.in_size[1] else width  # a strip
    pixels = padded_pixels.py_func(p.in_size)
    if rows * columns > 1:
        pixels = max(pixels, rows * columns * ((height + 1) * width + 2))
    return Cut(tap_groups, rows, columns, height, width, pixels, -(-tap_groups * pixels * p.in_channels // 16) * 16)


@functools.lru_cache(256)
def backward_blocking(p: Convolution, dtype: np.dtype) -> tuple[BackwardBlocking, Numbers, Numbers]:
    """The backward's blocking, the bounds of its blocks, and the blocks of each offset group (`block_ranges_of`)."""
    size = dtype.itemsize
    depthwise, weights = is_depthwise(p.groups, p.weights_shape), packing(p.weights_shape, p.groups, dtype)
    block = block_size(size) * (2 if depthwise else 1)  # without a matrix product, wider blocks cost nothing
    bounds = block_bounds(p, depthwise, block)
    block_ranges = block_ranges_of(p, bounds)
    partials = max((last - first for first, last in zip(block_ranges[::2], block_ranges[1::2], strict=True)), default=1)
    outputs, panel, panels = (block, block, 1) if depthwise else (weights.outputs, weights.panel, weights.panels)
    blocks = len(bounds) - 1
    pitch = block if depthwise else panel_widths(dtype)[0]
    panel_sums = p.taps * block * (1 if depthwise else panel)
    sums_size = panels * panel_sums
    kept = not depthwise and 2 * panel >= pitch  # whether packed grad_y is not much larger than grad_y
    packed = 1.2 * p.groups * panels * pitch if kept and blocks > 2 else 0
    cut = _cut(p, blocks, 0 if depthwise else outputs, blocks * sums_size * size, partials, packed, size)
    regions = cut.rows * cut.columns
    region = (-(-p.out_size[0] // cut.rows), -(-p.out_size[1] // cut.columns))
    tiling = tiling_of(region, affordable(pitch * panels * size), band_of(p))
    rows = rows_of(tiling)
    images = max(1, min(p.batch, WINDOWS_BYTES // max(1, cut.size * size)))
    bands = PARTIAL_BYTES // (blocks * regions * sums_size * size)
    bands = max(1, min(images, -(-WANTED_TASKS // (blocks * regions * cut.tap_groups)), bands))
    band_images = -(-images // bands)
    bands = -(-images // max(1, band_images))
    packed = panels * rows * pitch
    elements = PACKING_ELEMENTS + packed + (rows + 1) * block
    added = 16 * 16 + SEGMENT * block + OVERRUN  # for `windows.add_windows`
    plan = tile_bytes(size)
    blocking = BackwardBlocking(
        tiling=tiling,
        depthwise=int(depthwise),
        outputs=outputs,
        panel=panel,
        panels=panels,
        block=block,
        blocks=blocks,
        image_bands=bands,
        band_images=band_images,
        images=images,
        cut=cut,
        partials=partials,
        rows=rows,
        packed_pitch=pitch,
        packed_size=packed,
        prepacked=int(kept and blocks // p.groups * cut.tap_groups > 2),
        panel_sums=panel_sums,
        sums_size=sums_size,
        weights_size=p.taps * block * (1 if depthwise else outputs),
        image_size=image_size(p),
        workspace_bytes=page(max(plan + elements * size, added * size, panel_sums * size) + 256),
        tile_bytes=plan,
    )
    return blocking, Numbers(bounds), Numbers(block_ranges)
