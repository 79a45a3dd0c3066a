"""Blocking of points and bins: tiles of them, and blocks of channels that are sampled together."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from numdcn._cpu.layout import padded_pixels
from numdcn._cpu.simd import OVERRUN
from numdcn._cpu.tile import MOST_PIXELS, Tiling, tile_bytes, tiling_of
from numdcn._cpu.tile_io import PACKING_ELEMENTS

CHUNK_BYTES = 1024  # of a point's channels that a forward samples at a time
BLOCK_BYTES = 128  # of a pixel's channels that a backward's task owns; half of that if channels are few


class PointsBlocking(NamedTuple):
    """Tiles of points, blocks of channels, workspace; determined by shapes alone."""

    tiling: Tiling  # the points as an image of one row
    panel: int  # channels per block
    pitch: int  # elements per row of samples, one row per point
    rows: int  # rows of samples per tile
    blocks: int
    image_size: int  # elements of a zero-padded image
    tile_bytes: int  # of a thread's workspace, for a tile's plan
    samples_bytes: (
        int  # after the plan: the samples, and the buffer that transposes them; the rest is the operator's own
    )
    workspace_bytes: int  # all together


def points_blocking(
    points: int, channels: int, size: tuple[int, int], panel: int, itemsize: int, more: int
) -> PointsBlocking:
    """The blocking for `points` points per image; `more` is the number of workspace bytes for the operator's own
    use."""
    tiling = tiling_of((1, points), MOST_PIXELS, 1)
    rows, pitch = tiling.tile_pixels + 32, panel + OVERRUN
    image_size = -(-padded_pixels.py_func(size) * channels // 16) * 16
    plan, samples = tile_bytes(itemsize), -(-(PACKING_ELEMENTS + rows * pitch) * itemsize // 64) * 64
    workspace = -(-(plan + samples + more + 256) // 4096) * 4096
    return PointsBlocking(tiling, panel, pitch, rows, -(-channels // panel), image_size, plan, samples, workspace)


def forward_panel(channels: int, dtype: np.dtype) -> int:
    """The number of channels per block in a forward."""
    return min(channels, CHUNK_BYTES // dtype.itemsize)


def backward_panel(channels: int, dtype: np.dtype) -> int:
    """The number of channels per block in a backward, whose tasks are blocks of images. It must not depend on the batch
    size, because the order of sums over blocks would depend on it."""
    wide = BLOCK_BYTES // dtype.itemsize
    return wide if channels >= 8 * wide else wide // 2
