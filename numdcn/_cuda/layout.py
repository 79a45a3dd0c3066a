"""Copies on the GPU: between strides and types, and between NCHW arrays and channels-last images.

The images used by other kernels are (N, pixels, channels), contiguous, with a border of zeros: a row of zeros above,
one row and two pixels below, and a zero pixel before each row, which also ends the row above. Channels are padded with
zeros to a multiple of 16 bytes. A sample then has four corners to read, wherever it is (`bilinear.cell`).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from numdcn._cuda.jit import BF16, F16, F32, F64, SIMULATED, cuda, kernels, scalar_type
from numdcn._cuda.memory import at, narrow, put, view, widen
from numdcn._cuda.mma import from_bits, word

I32, I64 = np.int32, np.int64
AXES = 6  # of a copy, at most
TILE = 4 if SIMULATED else 32  # pixels and channels transposed by a block
PITCH = TILE + 1
ROWS = 2 if SIMULATED else 8  # of threads

STORED_TYPES = (F32, F64, F16, BF16)
CONVERSIONS = [(dtype, dtype) for dtype in STORED_TYPES] + [(F16, F32), (BF16, F32), (F32, F16), (F32, BF16)]


class Copy(NamedTuple):
    """Parameters of `copy`; axes that are not in use come first."""

    source: int  # 0: zeros
    target: int
    count: int
    add: int  # 1: add to the target
    axes: int  # in use
    sizes: tuple[int, int, int, int, int, int]
    source_strides: tuple[int, int, int, int, int, int]
    target_strides: tuple[int, int, int, int, int, int]


@kernels(Copy, lambda: CONVERSIONS)
def copy(S, T):
    """Copy an array of S into one of T, with any strides."""
    N = scalar_type(T)

    def run(c):
        source, target = view(c.source, S), view(c.target, T)
        first, small = AXES - c.axes, c.count < 2**31
        for task in range(cuda.grid(1), c.count, cuda.gridsize(1)):
            rest, i, j = task, 0, 0
            for axis in range(AXES - 1, -1, -1):
                if axis > first:
                    size = c.sizes[axis]
                    upper = (
                        I64(I32(rest) // I32(size)) if small else rest // size
                    )  # a division of 64 bits costs far more
                    place = rest - upper * size
                    rest = upper
                    i += place * c.source_strides[axis]
                    j += place * c.target_strides[axis]
                elif axis == first:
                    i += rest * c.source_strides[axis]
                    j += rest * c.target_strides[axis]
            value = N(0)
            if c.source:
                value = N(widen(at(source, i)))
            if c.add:
                value += widen(at(target, j))
            put(target, j, narrow(value, T))

    return run


class Turn(NamedTuple):
    """Parameters of `pack_images` and `unpack_images`."""

    plain: int  # (N, C, H, W) of any strides
    images: int
    batch: int
    channels: int
    pitch: int  # channels including padding
    size: tuple[int, int]
    pixels: int  # per image, including padding
    strides: tuple[int, int, int, int]  # of the plain array
    pad: int  # 1, or 0 for images without padding


@kernels(Turn, lambda: [(dtype, False) for dtype in STORED_TYPES] + [(F32, True)])
def pack_images(T, TF32):
    """Channels-last images. A block of threads transposes TILE pixels of TILE channels at a time. TF32: round to
    tf32."""

    def run(c):
        tile = cuda.shared.array((TILE, PITCH), T)
        plain, images = view(c.plain, T), view(c.images, T)
        tx, ty = I32(cuda.threadIdx.x), I32(cuda.threadIdx.y)
        height, row_pixels = I32(c.size[0]), I32(c.size[1] + c.pad)
        across, deep = (c.pixels + TILE - 1) // TILE, (c.pitch + TILE - 1) // TILE
        for task in range(cuda.blockIdx.x, c.batch * across * deep, cuda.gridDim.x):
            n, rest = task // (across * deep), I32(task % (across * deep))
            first_pixel, first_channel = rest // I32(deep) * I32(TILE), rest % I32(deep) * I32(TILE)
            pixel = first_pixel + tx
            y, x = pixel // row_pixels - I32(c.pad), pixel % row_pixels - I32(c.pad)
            inside = pixel < c.pixels and y >= 0 and y < height and x >= 0
            start = n * c.strides[0] + y * c.strides[2] + x * c.strides[3]
            for r in range(ty, TILE, ROWS):
                channel = first_channel + I32(r)
                element = T(0)
                if inside and channel < c.channels:
                    element = at(plain, start + channel * c.strides[1])
                    if TF32:
                        element = from_bits(word(element, np.float32(0), F32))
                tile[r, tx] = element
            cuda.syncthreads()
            channel = first_channel + tx
            for r in range(ty, TILE, ROWS):
                pixel = first_pixel + I32(r)
                if pixel < c.pixels and channel < c.pitch:
                    put(images, (n * c.pixels + pixel) * c.pitch + channel, tile[tx, r])
            cuda.syncthreads()

    return run


@kernels(Turn, lambda: [(T, S) for S, T in CONVERSIONS if S in (F32, F64)])
def unpack_images(T, S):
    """Plain arrays of T from images of S, without the padding."""

    def run(c):
        tile = cuda.shared.array((TILE, PITCH), S)
        plain, images = view(c.plain, T), view(c.images, S)
        tx, ty = I32(cuda.threadIdx.x), I32(cuda.threadIdx.y)
        height, row_pixels = I32(c.size[0]), I32(c.size[1] + c.pad)
        across, deep = (c.pixels + TILE - 1) // TILE, (c.channels + TILE - 1) // TILE
        for task in range(cuda.blockIdx.x, c.batch * across * deep, cuda.gridDim.x):
            n, rest = task // (across * deep), I32(task % (across * deep))
            first_pixel, first_channel = rest // I32(deep) * I32(TILE), rest % I32(deep) * I32(TILE)
            channel = first_channel + tx
            for r in range(ty, TILE, ROWS):
                pixel = first_pixel + I32(r)
                if pixel < c.pixels and channel < c.channels:
                    tile[r, tx] = at(images, (n * c.pixels + pixel) * c.pitch + channel)
            cuda.syncthreads()
            pixel = first_pixel + tx
            y, x = pixel // row_pixels - I32(c.pad), pixel % row_pixels - I32(c.pad)
            inside = pixel < c.pixels and y >= 0 and y < height and x >= 0
            start = n * c.strides[0] + y * c.strides[2] + x * c.strides[3]
            for r in range(ty, TILE, ROWS):
                channel = first_channel + I32(r)
                if inside and channel < c.channels:
                    put(plain, start + channel * c.strides[1], narrow(tile[tx, r], T))
            cuda.syncthreads()

    return run
