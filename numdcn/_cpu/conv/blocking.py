"""Blocking of the forward of convolutions: tasks, tiles and chunks. It depends only on shapes, never on threads.

A task owns a tile of output pixels and a block of convolution groups. If that gives too few tasks, tiles
become smaller, and finally the outputs of a tile are divided too (each task then samples for itself). The columns of a
tile, taps * channels of a convolution group, are processed in chunks that fit the cache along with the weights: several
groups, or some taps of one group, or some channels of one tap. Offsets are read and taps planned anew for each chunk.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import numpy as np

from numdcn._call.convolution import Convolution
from numdcn._cpu.conv.pack import Packing, is_depthwise, packing
from numdcn._cpu.gemm import ROWS, chunk_size, column_pitch, panel_widths
from numdcn._cpu.layout import padded_pixels
from numdcn._cpu.simd import OVERRUN
from numdcn._cpu.tile import MOST_PIXELS, ROW, Tiling, tile_bytes, tiling_of

WANTED_TASKS = 64  # in a large call
ENOUGH_TASKS = 54  # in a large call: more are not worth smaller tiles or repeated sampling
WORTH_DIVIDING = 64 * 2**20  # multiply-adds that make a call large
DEPTHWISE = 16  # multiply-adds that take as long as one of a depthwise convolution, with its sample
PLANNED_TAPS = 64  # of a depthwise convolution, whose plans a thread keeps at a time
TILE_PIXELS = MOST_PIXELS // ROWS * ROWS  # per tile, unless there would be few tasks or a large workspace
SMALL_TILE = 28 // ROWS * ROWS  # pixels; smaller tiles read the weights too often
WORKSPACE_BYTES = 16 * 2**20  # of a thread's workspace, for sums or for grad_y


class Chunking(NamedTuple):
    """The columns of a tile, chunk by chunk. In a depthwise convolution all channels count as one group."""

    groups: int  # of the convolution
    channels: int  # per group
    taps: int  # of the kernel
    groups_per_chunk: int  # at most, like the next two
    channels_per_chunk: int  # of each group
    taps_per_chunk: int
    pitch: int  # elements per row of columns


class ForwardBlocking(NamedTuple):
    """The forward's tiles, chunks and workspace.

    A thread's workspace holds the tile's plan; its columns, `rows` rows of `chunks.pitch`, or the plans of a depthwise
    convolution; its sums, `rows` rows of `sums_pitch` for each group of a chunk; and the buffer of `tile_io.write_tile`.
    Before the kernel runs, `images` transposes there.
    """

    tiling: Tiling  # of the output image
    chunks: Chunking  # of a tile's columns
    weights: Packing  # their packing
    depthwise: int  # 1 or 0
    rows: int  # of a tile's columns and sums, including padding
    pixels_at_once: int  # pixels whose columns are made, then multiplied, before the next pixels' are made
    columns_size: int  # elements of columns or plans
    aside: int  # 1 or 0: whether columns are made while those of the previous pixels are multiplied
    sums_pitch: int  # elements per row of sums
    chunks_per_block: int  # chunks per block of groups, which is computed on its own
    slices: int  # tasks per tile: blocks of groups, or of panels of outputs if there is only one group
    panels_per_task: int
    image_size: int  # elements of a zero-padded image
    workspace_bytes: int  # per thread
    tile_bytes: int  # of these, for the tile's plan


def page(nbytes: int) -> int:
    """Bytes rounded up to whole pages."""
    return -(-nbytes // 4096) * 4096


def _chunks(p: Convolution, depthwise: bool, itemsize: int) -> Chunking:
    """The chunks of a tile's columns, as large as `gemm.chunk_size` allows."""
    groups, channels = p.groups, p.in_channels // p.groups
    most, pitch = chunk_size(itemsize), column_pitch(itemsize)
    if depthwise:
        return Chunking(1, p.in_channels, p.taps, 1, p.in_channels, min(p.taps, PLANNED_TAPS), pitch)
    if channels > most:  # even chunks of whole cache lines
        line = 64 // itemsize
        step = -(-channels // -(-channels // most))
        return Chunking(groups, channels, p.taps, 1, -(-step // line) * line, 1, pitch)
    if channels * p.taps > most:
        chunks = -(-p.taps // (most // channels))
        return Chunking(groups, channels, p.taps, 1, channels, -(-p.taps // chunks), pitch)
    return Chunking(groups, channels, p.taps, min(groups, most // (channels * p.taps)), channels, p.taps, pitch)


def _planned_once(p: Convolution, chunks: Chunking) -> bool:
    """Whether one plan serves a chunk: it has a single tap, and channels of a single offset group."""
    if chunks.taps_per_chunk > 1 or chunks.groups_per_chunk > 1:
        return False
    # chunks start at multiples of channels_per_chunk in each group
    size = p.in_channels // max(1, p.offset_groups)
    aligned = size % chunks.channels_per_chunk == 0 and chunks.channels % chunks.channels_per_chunk == 0
    return p.offset_groups <= 1 or aligned


def band_of(p: Convolution) -> int:
    """Rows per tile: four, so that little of x is read, unless reading offsets and masks costs more than reading x."""
    return 1 if 3 * p.offset_groups * p.taps > p.in_channels else 4


def _register_rows(out_size: tuple[int, int], tiling: Tiling) -> int:
    """The rows of all register tiles of an output image."""
    height, columns = out_size[0], tiling.tile_columns
    full_bands = height // tiling.band * out_size[1]  # their columns, then those of the last band
    end, rest = -(-height // tiling.band) * out_size[1], height % tiling.band
    rows = full_bands // columns * -(-columns * tiling.band // ROWS) * ROWS
    for first in range(full_bands // columns * columns, end, columns):
        full = max(0, full_bands - first)
        rows += -(-(full * tiling.band + (min(columns, end - first) - full) * rest) // ROWS) * ROWS
    return rows


def _forward_tiling(p: Convolution, pixels: int) -> Tiling:
    """Tiles of at most `pixels` pixels, in bands as high as `band_of` says, or lower if that leaves fewer rows of
    register tiles without a pixel."""
    tilings = [tiling_of(p.out_size, pixels, band) for band in range(band_of(p), 0, -1)]
    rows = [_register_rows(p.out_size, tiling) for tiling in tilings]
    return next(t for t, r in zip(tilings, rows, strict=True) if r <= 1.01 * min(rows))


def image_size(p: Convolution) -> int:
    """Elements of a zero-padded channels-last image, rounded up to cache lines."""
    return -(-padded_pixels.py_func(p.in_size) * p.in_channels // 16) * 16


def rows_of(tiling: Tiling) -> int:
    """Rows of a tile's columns and sums: whole register tiles, plus one that vectors may overrun into."""
    return -(-tiling.tile_pixels // ROWS) * ROWS + ROWS


def affordable(pixel_bytes: int) -> int:
    """Pixels per tile, reduced if they would need more than `WORKSPACE_BYTES`."""
    pixels = TILE_PIXELS
    while pixels > ROWS and pixels * pixel_bytes > WORKSPACE_BYTES:
        pixels = _half(pixels, ROWS)
    return pixels


def _half(pixels: int, least: int) -> int:
    """About half as many pixels, in whole register tiles."""
    return max(pixels // 2 // ROWS * ROWS, least)


def _smaller(p: Convolution, tiling: Tiling, slices: int, least: int) -> Tiling:
    """Halve the pixels per tile, down to `least`, until there are enough tasks."""
    while p.batch * tiling.tiles * slices < ENOUGH_TASKS and tiling.tile_pixels > least:
        tiling = _forward_tiling(p, _half(tiling.tile_pixels, least))
    return tiling


@functools.lru_cache(256)
def forward_blocking(p: Convolution, dtype: np.dtype) -> ForwardBlocking:
    """The forward's blocking."""
    depthwise = is_depthwise(p.groups, p.weights_shape)
    weights = packing(p.weights_shape, p.groups, dtype)
    chunks = _chunks(p, depthwise, dtype.itemsize)
    chunks_per_block = -(-chunks.channels // chunks.channels_per_chunk) * -(-chunks.taps // chunks.taps_per_chunk)
    tiling = _forward_tiling(p, affordable(weights.panels * weights.panel * dtype.itemsize))
    group_sums_bytes = (rows_of(tiling) * weights.panel * weights.panels + 1) * dtype.itemsize  # approximately
    chunks = chunks._replace(groups_per_chunk=max(1, min(chunks.groups_per_chunk, WORKSPACE_BYTES // group_sums_bytes)))
    slices, panels_per_task = -(-chunks.groups // chunks.groups_per_chunk), weights.panels
    product = weights.size * (DEPTHWISE if depthwise else 1)
    if float(p.batch) * p.out_size[0] * p.out_size[1] * product >= WORTH_DIVIDING:
        tiling = _smaller(p, tiling, slices, SMALL_TILE)
        if weights.groups == 1 and p.batch * tiling.tiles < ENOUGH_TASKS:
            panels_per_task = max(1, weights.panels // -(-WANTED_TASKS // (p.batch * tiling.tiles)))
            slices = -(-weights.panels // panels_per_task)
        tiling = _smaller(p, tiling, slices, ROWS)
    planned_once = _planned_once(p, chunks)
    rows, pitch = rows_of(tiling), weights.panel * panels_per_task + OVERRUN
    transposed = 16 * (16 + ROW)  # for `tile_io.write_tile`
    columns = chunks.taps_per_chunk * 7 * ROW if depthwise else rows * chunks.pitch  # a plan: 2 for an index, 5 numbers
    elements = columns + chunks.groups_per_chunk * rows * pitch + transposed
    plan = tile_bytes(dtype.itemsize)
    return ForwardBlocking(
        tiling=tiling,
        chunks=chunks,
        weights=weights,
        depthwise=int(depthwise),
        rows=rows,
        pixels_at_once=ROWS if planned_once else tiling.tile_pixels,
        columns_size=columns,
        aside=int(planned_once and weights.panel == panel_widths(dtype)[0]),
        sums_pitch=pitch,
        chunks_per_block=chunks_per_block,
        slices=slices,
        panels_per_task=panels_per_task,
        image_size=image_size(p),
        workspace_bytes=page(plan + elements * dtype.itemsize + 128),
        tile_bytes=plan,
    )
