"""Tiles of photographs, and what tiles_dask.py and tiles_ray.py compute of each: how strong its edges are, by direction.

A deformable convolution turns its kernel at every pixel towards the centre of the tile, so that its outputs are edges
at four angles to that direction.
"""

from __future__ import annotations

import functools
import sys
from typing import NamedTuple

import numpy as np
from sklearn.datasets import load_sample_image

import numdcn

SIZE = 128  # pixels of a tile along each axis
ANGLES = 4
TILE_BYTES = 3 * SIZE * SIZE * 4
STEP = 7919  # from tile to tile, in positions on a photograph; a prime, so that no two are alike for long
LIMIT = 576 * 2**20  # bytes of memory that a worker may use
TILES, QUICK_TILES = 16384, 3104  # both are more than that


class Layer(NamedTuple):
    """A deformable convolution: offsets (1, 18, SIZE, SIZE), the same for every tile, and weights (ANGLES, 3, 3, 3)."""

    offsets: np.ndarray
    w: np.ndarray


@functools.cache
def photographs() -> tuple[np.ndarray, ...]:
    """Those of scikit-learn, (3, H, W), float32 in 0 to 1; each worker reads them once."""
    images = [load_sample_image(name) for name in ("china.jpg", "flower.jpg")]
    return tuple(np.ascontiguousarray(image.transpose(2, 0, 1), np.float32) / 255 for image in images)


def cut(numbers: np.ndarray) -> np.ndarray:
    """The tiles with these numbers, (N, 3, SIZE, SIZE)."""
    tiles = np.empty((len(numbers), 3, SIZE, SIZE), np.float32)
    for tile, number in zip(tiles, numbers.tolist(), strict=True):
        photo = photographs()[number % 2]
        rows, columns = (size - SIZE + 1 for size in photo.shape[1:])
        top, left = divmod(number * STEP % (rows * columns), columns)
        tile[...] = photo[:, top : top + SIZE, left : left + SIZE]
    return tiles


def layer() -> Layer:
    """Offsets that turn a 3x3 kernel towards the centre, and derivatives of brightness at angles to that direction."""
    dy, dx = np.mgrid[:SIZE, :SIZE] - (SIZE - 1) / 2
    angle = np.arctan2(dy, dx)
    moved = []
    for row, column in np.ndindex(3, 3):
        y, x = row - 1, column - 1
        moved += [np.sin(angle) * x + np.cos(angle) * y - y, np.cos(angle) * x - np.sin(angle) * y - x]
    sobel = np.outer([1, 2, 1], [-1, 0, 1]) / 8
    turns = np.arange(ANGLES) * np.pi / ANGLES
    derivatives = np.cos(turns)[:, None, None] * sobel + np.sin(turns)[:, None, None] * sobel.T
    w = derivatives[:, None] * np.array([0.299, 0.587, 0.114])[:, None, None]
    return Layer(np.stack(moved)[None].astype(np.float32), w.astype(np.float32))


def strengths(tiles: np.ndarray, how: Layer) -> np.ndarray:
    """The mean strength of edges at each angle, (N, ANGLES), by numdcn's plain function."""
    offsets = np.broadcast_to(how.offsets, (len(tiles), *how.offsets.shape[1:]))
    return np.asarray(np.abs(numdcn.deform_conv_forward(tiles, offsets, how.w, padding=1)).mean(axis=(2, 3)))


def peak_memory() -> int:
    """The most memory that this process has used, in bytes; 0 where the system does not tell."""
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def report(result: np.ndarray, peaks: dict[str, int], how: Layer) -> None:
    """Print the peaks, and compare some tiles with the plain function; exit with code 1 if anything is off."""
    for worker, peak in peaks.items():
        print(f"   peak memory of {worker}: {peak / 1e6:.0f} MB of {LIMIT / 1e6:.0f} MB")
    if max(peaks.values()) > LIMIT:
        sys.exit("FAILED: a worker used more memory than its limit")
    some = np.linspace(0, len(result) - 1, 16).astype(int)
    if not np.array_equal(result[some], strengths(cut(some), how)):
        sys.exit("FAILED: the result differs from that of the plain function")
    print(f"   mean strengths by angle: {np.array2string(result.mean(axis=0), precision=4)}")
    print("all checks passed")
