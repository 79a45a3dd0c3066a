"""Points or bins, tile by tile: how those whose channels are sampled one beside another are cut into tasks."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from numdcn._cpu.layout import padded_pixels
from numdcn._cpu.tile import MOST_PIXELS, ROW, tile_bytes, tiling

CHUNK_BYTES = 1024  # of the channels that are sampled at a time in a forward
BLOCK_BYTES = 128  # of the channels that a task of a backward owns; half of it where there would be few tasks


class PointsBlocking(NamedTuple):
    """Tiles of points, blocks of channels, scratch: by shapes alone."""

    band: int
    tile_columns: int
    tile_pixels: int
    tiles: int
    panel: int  # channels of a block
    pitch: int  # elements of a point's row of samples
    rows: int  # of a tile's samples
    packed_pitch: int  # nothing is packed
    blocks: int
    image_size: int  # elements of a zero-padded image
    tile_bytes: int  # scratch of a thread: a tile's plan,
    samples_bytes: int  # its samples,
    slot_bytes: int  # and all


def points_blocking(
    points: int, channels: int, size: tuple[int, int], panel: int, itemsize: int, more: int
) -> PointsBlocking:
    """The cut of `points` points a row; `more`: bytes of scratch for the operator's own use."""
    tiles = tiling((1, points), MOST_PIXELS, 1)
    rows, pitch = tiles.tile_pixels + 32, panel + 16
    image_size = -(-padded_pixels.py_func(size) * channels // 16) * 16
    plan, samples = tile_bytes(itemsize), -(-(16 * ROW + 256 + rows * pitch) * itemsize // 64) * 64
    slot = -(-(plan + samples + more + 256) // 4096) * 4096
    return PointsBlocking(*tiles, panel, pitch, rows, 0, -(-channels // panel), image_size, plan, samples, slot)


def forward_panel(channels: int, dtype: np.dtype) -> int:
    """Channels of a block in a forward."""
    return min(channels, CHUNK_BYTES // dtype.itemsize)


def backward_panel(channels: int, dtype: np.dtype) -> int:
    """Channels of a block in a backward, whose tasks are blocks of images. The size of the batch has no say: sums over
    blocks would depend on it."""
    wide = BLOCK_BYTES // dtype.itemsize
    return wide if channels >= 8 * wide else wide // 2
