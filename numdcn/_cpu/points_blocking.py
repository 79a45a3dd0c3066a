"""The blocking of points and of bins: tiles of them, and blocks of the channels that are sampled side by side."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from numdcn._cpu.layout import padded_pixels
from numdcn._cpu.simd import OVERRUN
from numdcn._cpu.tile import MOST_PIXELS, Tiling, tile_bytes, tiling_of
from numdcn._cpu.tile_io import PACKING_ELEMENTS

CHUNK_BYTES = 1024  # of the channels of a point that a forward samples at a time
BLOCK_BYTES = 128  # of the channels of a pixel that a task of a backward owns; half of it where channels are few


class PointsBlocking(NamedTuple):
    """Tiles of points, blocks of channels, workspace: by shapes alone."""

    tiling: Tiling  # of an image of one row
    panel: int  # channels of a block
    pitch: int  # elements of a point's row of samples
    rows: int  # of a tile's samples
    blocks: int
    image_size: int  # elements of a zero-padded image
    tile_bytes: int  # of a thread's workspace: a tile's plan;
    samples_bytes: int  # behind it its samples, and the buffer that transposes them; behind that the operator's own;
    workspace_bytes: int  # all of it


def points_blocking(
    points: int, channels: int, size: tuple[int, int], panel: int, itemsize: int, more: int
) -> PointsBlocking:
    """The blocking of `points` points an image; `more`: bytes of a workspace for the operator's own use."""
    tiling = tiling_of((1, points), MOST_PIXELS, 1)
    rows, pitch = tiling.tile_pixels + 32, panel + OVERRUN
    image_size = -(-padded_pixels.py_func(size) * channels // 16) * 16
    plan, samples = tile_bytes(itemsize), -(-(PACKING_ELEMENTS + rows * pitch) * itemsize // 64) * 64
    workspace = -(-(plan + samples + more + 256) // 4096) * 4096
    return PointsBlocking(tiling, panel, pitch, rows, -(-channels // panel), image_size, plan, samples, workspace)


def forward_panel(channels: int, dtype: np.dtype) -> int:
    """The number of channels of a block in a forward."""
    return min(channels, CHUNK_BYTES // dtype.itemsize)


def backward_panel(channels: int, dtype: np.dtype) -> int:
    """The number of channels of a block in a backward, whose tasks are blocks of images. The size of the batch has no say: sums over
    blocks would depend on it."""
    wide = BLOCK_BYTES // dtype.itemsize
    return wide if channels >= 8 * wide else wide // 2
